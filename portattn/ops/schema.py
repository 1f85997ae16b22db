"""The torch operators ``portattn::attention`` and ``portattn::attention_backward``.

`torch.compile`, `torch.export` and `torch.onnx.export` see each as one node. Tensors are bhsd:
query [batch, num_heads, seqlen_q, head_dim], key [batch, num_kv_heads, seqlen_k, head_dim], value
[batch, num_kv_heads, seqlen_k, head_dim_v]. The results are the output [batch, num_heads,
seqlen_q, head_dim_v] in the query's dtype, and the LSE, float32 [batch, num_heads, seqlen_q]
(shape [0] unless return_lse).

* ``program`` and ``mask_data`` encode the mask (docs/formats.md), ``is_causal`` folded in; an
  empty program keeps everything.
* ``q_offset_mode`` is ``"value"`` (q_offset holds it), ``"end"`` (seqlen_k - seqlen_q),
  ``"start"`` (0) or ``"unset"`` (0 where seqlen_q == seqlen_k; else an error if the mask or ALiBi
  depends on the queries' positions). The check runs inside the op, so that traced models with
  dynamic lengths keep it. q_offset is None except for "value".
* ``scale`` None is head_dim ** -0.5; ``softcap`` 0 is none.
* ``backend`` as in `portattn.attention`; ``config`` is "" or a JSON object of the kernel's config
  fields.

The schema is what exported models hold: arguments are only ever appended.
"""

from __future__ import annotations

import collections
import json
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from portattn import dispatch
from portattn.errors import ConfigError
from portattn.masks import from_program
from portattn.preparation import Options, Terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from portattn.masks import Mask

SchemaValue: TypeAlias = Any  # an argument of an op, of the type that the schema gives it

ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, int[] program, Tensor[] mask_data, "
    "SymInt? q_offset, str q_offset_mode, Tensor? kv_lengths, Tensor? alibi_slopes, Tensor? bias, "
    "Tensor? sinks, float? scale, float softcap, bool return_lse, bool deterministic, "
    "str backend, str config"
)
# wanted: which of query, key, value, alibi_slopes, bias, sinks need a gradient; the others come
# back with shape [0].
BACKWARD_ARGUMENTS = (
    "Tensor grad_output, Tensor grad_lse, Tensor output, Tensor lse, bool[] wanted, " + ARGUMENTS
)
_MAX_MASKS = 256


class Arguments(NamedTuple):
    """The arguments of ``portattn::attention``, in the schema's order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    program: Sequence[int]
    mask_data: Sequence[torch.Tensor]
    q_offset: int | None
    q_offset_mode: str
    kv_lengths: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: float | None
    softcap: float
    return_lse: bool
    deterministic: bool
    backend: str
    config: str

    def terms(self) -> Terms:
        """The optional tensors."""
        return Terms(self.kv_lengths, self.alibi_slopes, self.bias, self.sinks)

    def options(self, mask: Mask | None) -> Options:
        """Everything but tensors. Grouped-query attention needs no asking here."""
        return Options(
            mask=mask,
            q_offset=_q_offset(self.q_offset, self.q_offset_mode),
            scale=self.scale,
            softcap=self.softcap,
            enable_gqa=True,
            return_lse=self.return_lse,
            deterministic=self.deterministic,
            backend=self.backend,
            config=_config(self.config),
        )

    def differentiable(self) -> tuple[torch.Tensor | None, ...]:
        """The inputs that may have gradients, in the order of AttentionGradients."""
        return self.query, self.key, self.value, self.alibi_slopes, self.bias, self.sinks


def _q_offset(q_offset: int | None, mode: str) -> int | str | None:
    if mode == "value":
        return q_offset
    if mode in ("end", "start"):
        return mode
    if mode == "unset":
        return None
    raise ConfigError(f'q_offset_mode is {mode!r}; it must be "value", "end", "start" or "unset"')


def _config(text: str) -> dispatch.ConfigItems | None:
    if not text:
        return None
    frozen = dispatch.freeze_config(json.loads(text))
    return frozen if isinstance(frozen, tuple) else None


# (program, identity and version of each data tensor) -> (the mask, the tensors, held so that ids
# stay theirs).
_masks: collections.OrderedDict[Any, tuple[Mask, tuple[torch.Tensor, ...]]] = (
    collections.OrderedDict()
)


def mask_of(program: Sequence[int], mask_data: Sequence[torch.Tensor]) -> Mask | None:
    """The mask of a program and its data; the same tensors give the same mask object.

    Raises:
        MaskError: the program or its data are malformed.
    """
    if not program:
        return None
    data = tuple(mask_data)
    versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in data)
    identity = (tuple(program), tuple(map(id, data)), versions)
    found = _masks.get(identity)
    if found is not None:
        return found[0]
    mask = from_program(identity[0], tuple(tensor.cpu() for tensor in data))
    while len(_masks) >= _MAX_MASKS:
        _masks.popitem(last=False)
    _masks[identity] = (mask, data)
    return mask
