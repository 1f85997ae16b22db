"""Calling the op from checked Python arguments; what torch.compile traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from portattn.backends.base import Config
from portattn.masks import causal

if TYPE_CHECKING:
    from portattn.backends.base import ConfigValue
    from portattn.dispatch import ConfigItems
    from portattn.preparation import Options, Terms

_CAUSAL = causal().program
_AND_OPCODE = 13  # docs/formats.md


def call_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Terms,
    options: Options,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Through ``torch.ops.portattn.attention``; what torch.compile traces."""
    mask = options.mask
    q_offset = options.q_offset
    if q_offset is None:
        value_of_offset, mode = None, "unset"
    elif isinstance(q_offset, str):
        value_of_offset, mode = None, q_offset
    else:
        value_of_offset, mode = q_offset, "value"
    program = () if mask is None else mask.program
    output, lse = torch.ops.portattn.attention.default(
        query,
        key,
        value,
        list(_and_causal_program(program) if is_causal else program),
        [] if mask is None else list(mask.data),
        value_of_offset,
        mode,
        terms.kv_lengths,
        terms.alibi_slopes,
        terms.bias,
        terms.sinks,
        options.scale,
        options.softcap or 0.0,
        options.return_lse,
        options.deterministic,
        options.backend,
        _config_text(options.config),
    )
    return output, (lse if options.return_lse else None)


def _and_causal_program(program: tuple[int, ...]) -> tuple[int, ...]:
    """The program of ``mask & causal()``: torch.compile can trace this."""
    if not program:
        return _CAUSAL
    return (program[0], _AND_OPCODE, 2, *program[1:], *_CAUSAL[1:])


def _config_text(config: Config | ConfigItems | None) -> str:
    """The op's ``config`` argument: JSON by hand, as torch.compile cannot trace json.dumps."""
    if config is None:
        return ""
    items = config.to_dict().items() if isinstance(config, Config) else config
    return "{" + ", ".join(f'"{name}": {_json_value(value)}' for name, value in items) + "}"


def _json_value(value: ConfigValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
