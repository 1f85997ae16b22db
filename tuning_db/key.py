"""The tuning key: which problems share one tuned config.

The one bucketing function, for tuner and lookup alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

from portattn.masks.opcodes import instructions, is_bound

if TYPE_CHECKING:
    from portattn.problem import AttentionProblem

# Raise it whenever `bucket` maps some problem elsewhere: rows of another version are never
# matched.
BUCKET_VERSION = 2

# A config further away than this, in doublings summed over lengths, heads and mask sizes, is a
# guess.
MAX_DISTANCE = 4.0

# Opcodes of docs/formats.md.
_KIND = {
    1: "band", 2: "range", 3: "range", 4: "step", 5: "stride", 6: "blocks", 7: "set", 8: "set",
    9: "random", 10: "table", 11: "ids", 12: "lengths", 15: "not", 16: "heads", 17: "batch",
    18: "ids",
}  # fmt: skip
_KEYED_FEATURES = ("alibi", "bias", "sinks", "softcap")


@dataclasses.dataclass(frozen=True, slots=True)
class ProblemKey:
    """The bucket of a problem: the columns of table ``problem``.

    Attributes:
        op: ``"fwd"``.
        dtype, acc_dtype: of the tensors, and of the accumulation.
        head_dim, head_dim_v, hq, hkv: exact.
        batch_bucket, sq_bucket, sk_bucket: the next power of two (0 stays 0).
        causal: some part of the mask is bounded by j <= i.
        window_bucket: next power of two of the largest finite band bound; 0 if none.
        mask_kind: ``"dense"``, or the kinds of primitives in the program, joined by ``+``.
        sparsity_bucket: -1 (not known from the program alone).
        block_size: next power of two of the largest block or modulus in the program; 0 if none.
        layout: ``"bhsd"``.
        varlen: kv_lengths is given.
        deterministic: only deterministic kernels may run.
        features: score terms present, sorted and joined by ``+``.
        bucket_version: of the rule that made this key.
    """

    op: str
    dtype: str
    acc_dtype: str
    head_dim: int
    head_dim_v: int
    hq: int
    hkv: int
    batch_bucket: int
    sq_bucket: int
    sk_bucket: int
    causal: bool
    window_bucket: int
    mask_kind: str
    sparsity_bucket: int
    block_size: int
    layout: str
    varlen: bool
    deterministic: bool
    features: str
    bucket_version: int

    @property
    def group(self) -> tuple[str | int | bool, ...]:
        """What must be equal for one bucket's config to say anything about another."""
        return (
            *(self.op, self.dtype, self.acc_dtype, self.head_dim, self.head_dim_v, self.causal),
            *(self.mask_kind, self.layout, self.varlen, self.deterministic, self.features),
            *(
                self.bucket_version,
                self.sq_bucket <= 1,
            ),  # decoding and prefilling are different work
        )

    @property
    def label(self) -> str:
        """One line for tables: sizes, dtype, mask."""
        sizes = f"b{self.batch_bucket} h{self.hq}"
        if self.hkv != self.hq:
            sizes += f" kv{self.hkv}"
        lengths = (
            f"s{self.sq_bucket}"
            if self.sq_bucket == self.sk_bucket
            else f"sq{self.sq_bucket} sk{self.sk_bucket}"
        )
        dims = f"d{self.head_dim}" + (
            f" dv{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        )
        edge = "causal " if self.causal and self.mask_kind != "causal" else ""
        mask = edge + self.mask_kind + (f"~{self.window_bucket}" if self.window_bucket else "")
        extra = [
            name
            for name, on in (("varlen", self.varlen), ("deterministic", self.deterministic))
            if on
        ]
        extra += self.features.split("+") if self.features else []
        return " ".join([sizes, lengths, dims, self.dtype, mask, *extra])


def power_of_two(size: int) -> int:
    """The next power of two at or above size; sizes <= 0 give 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


@functools.lru_cache(maxsize=4096)
def _mask_columns(program: tuple[int, ...]) -> tuple[str, bool, int, int]:
    """mask_kind, causal, window_bucket and block_size of a program."""
    kinds: set[str] = set()
    bounds: list[int] = []
    blocks: list[int] = []
    causal = False
    try:
        found = list(instructions(program))
    except ValueError:
        return "unknown", False, 0, 0  # a program of a newer format: a bucket of its own
    for opcode, operands in found:
        if opcode == 1:
            causal = causal or operands[1] == 0
            bounds += [abs(bound) + 1 for bound in operands if bound and is_bound(bound)]
        elif opcode in (4, 5, 6, 9):
            blocks.append(operands[0])
        elif opcode == 10:
            blocks += operands[1:]
        if opcode == 1 and operands[1] == 0 and not is_bound(operands[0]):
            continue  # plain causal is told by its own column
        if opcode in _KIND:
            kinds.add(_KIND[opcode])
    kind = "+".join(sorted(kinds)) or ("causal" if causal else "dense")
    return kind, causal, power_of_two(max(bounds, default=0)), power_of_two(max(blocks, default=0))


def bucket(problem: AttentionProblem) -> ProblemKey:
    """The tuning key of a problem. Pure, and the same on every device."""
    kind, causal, window, block_size = _mask_columns(problem.program)
    return ProblemKey(
        op="fwd",
        dtype=problem.dtype,
        acc_dtype="float32",
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        hq=problem.num_heads,
        hkv=problem.num_kv_heads,
        batch_bucket=power_of_two(problem.batch),
        sq_bucket=power_of_two(problem.seqlen_q),
        sk_bucket=power_of_two(problem.seqlen_k),
        causal=causal,
        window_bucket=window,
        mask_kind=kind,
        sparsity_bucket=-1,
        block_size=block_size,
        layout="bhsd",
        varlen="kv_lengths" in problem.features,
        deterministic="deterministic" in problem.features,
        features="+".join(name for name in _KEYED_FEATURES if name in problem.features),
        bucket_version=BUCKET_VERSION,
    )


def _doublings(a: int, b: int) -> float:
    """How many doublings lie between two sizes; 0 counts as 1/2."""
    return abs(math.log2(max(a, 0.5)) - math.log2(max(b, 0.5)))


def distance(a: ProblemKey, b: ProblemKey) -> float:
    """How far two buckets lie apart, in doublings; inf between different groups."""
    if a.group != b.group:
        return math.inf
    return (
        _doublings(a.sq_bucket, b.sq_bucket)
        + _doublings(a.sk_bucket, b.sk_bucket)
        + _doublings(a.batch_bucket * a.hq, b.batch_bucket * b.hq)
        + _doublings(a.hq * b.hkv, b.hq * a.hkv)
        + _doublings(a.window_bucket, b.window_bucket)
        + _doublings(a.block_size, b.block_size)
    )
