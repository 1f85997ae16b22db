"""Reads of uniform registers that some path through a kernel's machine code has not written.

ptxas of CUDA 12.8 was seen to compute addresses that two loops share in front of the first loop
alone, also where a branch jumps over it: the kernel then computes nonsense, or not, depending on
the data. No run on a GPU is needed to see that.
"""

from __future__ import annotations

import dataclasses
import re

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_UNIFORM = re.compile(r"\bUR(\d+)\b")
_DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")
# Instructions of these names that write their first operand, a uniform register.
_WRITES = ("U", "R2UR", "S2UR")
_NO_WRITES = ("UTMA", "USETMAXREG", "UISETP", "UPLOP3")


@dataclasses.dataclass(slots=True)
class _Instruction:
    text: str
    reads: set[int]
    writes: set[int]
    next: list[int]


def _registers(text: str) -> set[int]:
    return {int(number) for number in _UNIFORM.findall(text)}


def _pair(registers: set[int]) -> set[int]:
    return registers | {number + 1 for number in registers}


def _operands(name: str, rest: str) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction reads and writes."""
    descriptor = _DESCRIPTOR.search(rest)
    if descriptor:
        # Four registers, two for each factor; of a product whose first factor lies in registers
        # the first two mean nothing.
        first = int(descriptor[1])
        from_registers = re.search(r"R\d+, R\d+, gdesc", rest) is not None
        return set(range(first + 2 if from_registers else first, first + 4)), set()
    first_operand, _, others = rest.partition(",")
    is_write = name.startswith(_WRITES) and not name.startswith(_NO_WRITES)
    if is_write and re.fullmatch(r"UR\d+", first_operand.strip()):
        written, read = _registers(first_operand), _registers(others)
        if ".64" in name or "WIDE" in name:
            written = _pair(written)
        return _pair(read) if name.startswith("UIADD3.64") else read, written
    return _registers(rest), set()


def _parse(sass: str) -> tuple[list[_Instruction], list[int]]:
    """The instructions, and where indirect branches stand."""
    lines = [(int(address, 16), text) for address, text in _LINE.findall(sass)]
    index = {address: i for i, (address, _) in enumerate(lines)}
    code, indirect = [], []
    for i, (_, text) in enumerate(lines):
        predicate, name, rest = re.fullmatch(r"(@!?U?P\w+ )?(\S+)\s*(.*)", text).groups()  # type: ignore[union-attr]
        following = [i + 1] if i + 1 < len(lines) else []
        if name.startswith("BRX"):
            indirect.append(i)
            following = []
        elif name.startswith("BRA"):
            target = index.get(int(re.findall(r"0x([0-9a-f]+)", rest)[-1], 16))
            is_conditional = predicate or re.match(r"!?U?P\d", rest)
            following = (following if is_conditional else []) + [t for t in [target] if t]
        elif name.startswith("EXIT") and not predicate:
            following = []
        # A write under a predicate counts: what reads it stands under the same one.
        code.append(_Instruction(text, *_operands(name, rest), following))
    return code, indirect


def _spread(code: list[_Instruction], known: list[set[int] | None], start: int) -> None:
    """Registers that all paths from `start` have written, in front of every instruction."""
    pending = [start]
    while pending:
        i = pending.pop()
        here = known[i]
        assert here is not None
        after = here | code[i].writes
        for following in code[i].next:
            before = known[following]
            merged = after if before is None else before & after
            if merged != before:
                known[following] = set(merged)
                pending.append(following)


def unwritten(sass: str) -> list[str]:
    """The instructions that read a uniform register which not every path to them has written.

    Args:
        sass: what `cuobjdump -sass` prints of one kernel.
    """
    code, indirect = _parse(sass)
    known: list[set[int] | None] = [None] * len(code)
    if code:
        known[0] = set()
        _spread(code, known, 0)
    targets = [set[int](known[i] or ()) for i in indirect]
    at_targets = set.intersection(*targets) if targets else set[int]()
    reached = {following for instruction in code for following in instruction.next}
    for i, instruction in enumerate(code):
        # Only an indirect branch leads here.
        if known[i] is None and i not in reached and not instruction.text.startswith("NOP"):
            known[i] = set(at_targets)
            _spread(code, known, i)
    return [
        instruction.text
        for instruction, before in zip(code, known, strict=True)
        if before is not None and instruction.reads - before
    ]
