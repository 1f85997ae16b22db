"""What a kernel is. A new kernel implements `Kernel` and adds a line to registry.py."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from portattn.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from portattn.masks import Mask
    from portattn.problem import AttentionProblem

ConfigValue: TypeAlias = int | bool | str


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """How a kernel runs: base of each kernel's own frozen config dataclass.

    Fields are int, bool or str only, so that a config is stored and compared as plain JSON.
    """

    def to_dict(self) -> dict[str, ConfigValue]:
        """The fields by name."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionInputs:
    """One validated call; bhsd layout, any strides with a contiguous last dimension.

    Attributes:
        query: [batch, num_heads, seqlen_q, head_dim].
        key: [batch, num_kv_heads, seqlen_k, head_dim].
        value: [batch, num_kv_heads, seqlen_k, head_dim_v].
        output: [batch, num_heads, seqlen_q, head_dim_v], to be written.
        lse: float32 [batch, num_heads, seqlen_q], to be written, natural log; None if not asked
            for.
        mask: what may attend, ``is_causal`` folded in; None keeps everything.
        q_offset: key position of query row 0. Ignored where kv_lengths is given.
        kv_lengths: integer [batch] or None: keys >= kv_lengths[b] do not exist, and query r of
            batch b stands at kv_lengths[b] - seqlen_q + r.
        scale: softmax scale; any real number.
        softcap: c in c*tanh(x/c); 0 means none.
        alibi_slopes: float32 [num_heads] or [batch, num_heads], or None.
        bias: [batch, num_heads, seqlen_q, seqlen_k], expanded by strides of 0; or None.
        sinks: float32 [num_heads], or None.
        deterministic: only kernels whose result never depends on timing may run.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor | None
    mask: Mask | None
    q_offset: int
    kv_lengths: torch.Tensor | None
    scale: float
    softcap: float
    alibi_slopes: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    deterministic: bool


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionGradients:
    """What comes into a backward pass, and where its results go.

    Attributes:
        output, lse: gradients of the loss by the output and the LSE (None: zero); to be read.
        query, key, value, alibi_slopes, sinks: gradients by the inputs, in their shapes and
            dtypes, to be written; None where nobody asks.
        bias: the gradient by the bias as it was given: size 1 where it broadcasts.
    """

    output: torch.Tensor | None
    lse: torch.Tensor | None
    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None


class Repeat(Protocol):
    """A call that a kernel has seen, for other tensors with equal metadata.

    Attributes:
        is_renewable: whether `renewed` may do something.
    """

    is_renewable: bool

    def again(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        terms: tuple[torch.Tensor | None, ...] | None,
    ) -> bool:
        """Compute; False, and nothing done, where only `Kernel.run` can.

        Args:
            query, key, value, output, lse: as in AttentionInputs; dtypes, shapes, strides and
                device are those of the call that was seen.
            terms: kv_lengths, alibi_slopes, bias and sinks; None where it had none of them.
        """

    def renewed(
        self, mask: Mask | None, q_offset: int, seqlen_q: int, seqlen_k: int
    ) -> Repeat | None:
        """The same call with another mask; None where only `Kernel.run` can prepare it.

        Args:
            mask: of the same program as the one that was seen, with other data.
            q_offset, seqlen_q, seqlen_k: of the call that was seen.
        """


class Kernel(abc.ABC):
    """One implementation of attention. Stateless: one instance serves every call and thread.

    Attributes:
        name: unique, e.g. ``"cpu_forward"``.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cupy"``.
        config_type: the kernel's frozen config dataclass.
        has_backward: whether `backward` exists; without, calls that need gradients are refused.
    """

    name: ClassVar[str]
    backend: ClassVar[str]
    config_type: ClassVar[type[Config]]
    has_backward: ClassVar[bool] = False

    @abc.abstractmethod
    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Why this kernel cannot run the problem, in full clauses; empty if it can."""

    def is_preferred(self, problem: AttentionProblem) -> bool:
        """Whether it goes before kernels that the registry names first, on a problem it supports.

        What was measured on the device goes before both.
        """
        del problem
        return False

    @abc.abstractmethod
    def default_config(self, problem: AttentionProblem) -> Config:
        """A good config without tuning; always feasible when `unsupported_reasons` is empty."""

    @abc.abstractmethod
    def search_space(self, problem: AttentionProblem) -> Mapping[str, Sequence[ConfigValue]]:
        """For each config field the values worth trying.

        The product is filtered by `infeasible_reasons`; empty: the kernel is not tuned.
        """

    @abc.abstractmethod
    def infeasible_reasons(self, problem: AttentionProblem, config: Config) -> list[str]:
        """Why this config cannot run the problem on this device (shared memory, tile rules)."""

    @abc.abstractmethod
    def run(self, inputs: AttentionInputs, config: Config) -> Repeat | None:
        """Write ``inputs.output`` and ``inputs.lse``, on the tensors' device and current stream.

        The inputs are valid, the problem supported and the config feasible: the caller has
        checked.

        Returns:
            What does the same for tensors at other addresses, if there is such a thing; the caller
            holds it by a weak reference.
        """

    def backward(
        self, inputs: AttentionInputs, gradients: AttentionGradients, config: Config
    ) -> None:
        """Write the gradients asked for; ``inputs.output`` and ``inputs.lse`` are the forward's.

        Called only where `has_backward` is True.
        """
        raise NotImplementedError(f"{self.name} sets has_backward without a backward")

    def source_files(self) -> Sequence[str]:
        """Paths of the files that make up the kernel, for its identity in the tuning database."""
        return [inspect.getfile(type(self))]

    def config_from_dict(self, values: Mapping[str, Any]) -> Config:
        """Rebuild a config from stored values.

        Raises:
            ConfigError: an unknown or missing field, or a value of the wrong type.
        """
        fields = {
            field.name: type(field.default) for field in dataclasses.fields(self.config_type)
        }
        if set(values) != set(fields):
            raise ConfigError(
                f"config of {self.name} has fields {sorted(values)}; it needs exactly "
                f"{sorted(fields)}"
            )
        for name, value in values.items():
            if type(value) is not fields[name]:
                raise ConfigError(
                    f"config field {name} of {self.name} is {value!r}; it needs "
                    f"{fields[name].__name__}"
                )
        return self.config_type(**values)
