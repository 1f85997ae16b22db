"""`explain`: what a call would run, and why nothing else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import torch

from portattn import api, dispatch
from portattn.backends import registry
from portattn.errors import UnsupportedError
from portattn.preparation import Options, Terms, describe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portattn.backends.base import Config, ConfigValue
    from portattn.masks import Mask
    from portattn.problem import AttentionProblem


class CallArguments(TypedDict, total=False):
    """The keyword arguments of `portattn.attention`."""

    is_causal: bool
    q_offset: int | Literal["end", "start"] | None
    kv_lengths: torch.Tensor | None
    scale: float | None
    enable_gqa: bool
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    layout: Literal["bhsd", "bshd"]
    return_lse: bool
    backend: str
    deterministic: bool | None
    config: Config | Mapping[str, ConfigValue] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """What a call would run; ``print`` it.

    Attributes:
        problem: the call, without its data: the tuning key.
        backend: the argument of the call.
        kernel: the kernel's name; None if nothing can run the call, or nothing is to be computed.
        config: its config, or None.
        rung: where the config is from (`portattn.dispatch.Choice`); ``"none"`` without a kernel.
        refused: each other kernel -> why it does not run this call.
    """

    problem: AttentionProblem
    backend: str
    kernel: str | None
    config: Config | None
    rung: str
    refused: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        problem = self.problem
        lines = [
            f"call     {problem.dtype} on {problem.device}, batch {problem.batch}, heads "
            f"{problem.num_heads}/"
            f"{problem.num_kv_heads}, lengths {problem.seqlen_q}/{problem.seqlen_k}, head_dim "
            f"{problem.head_dim}/{problem.head_dim_v}, backend={self.backend!r}",
            f"terms    {', '.join(sorted(problem.features)) or 'none'}",
            f"kernel   {self.kernel or 'none'}",
        ]
        if self.config is not None:
            fields = ", ".join(f"{name}={value}" for name, value in self.config.to_dict().items())
            lines.append(f"config   {fields or '(no fields)'}  [{self.rung}]")
        for name, why in self.refused.items():
            lines.append(f"not used {name}: {'; '.join(why)}")
        return "\n".join(lines)


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask | None = None,
    **arguments: Unpack[CallArguments],
) -> Explanation:
    """What `portattn.attention` would run for the same arguments; computes nothing.

    Args:
        query, key, value, mask: as in `portattn.attention`.
        **arguments: as in `portattn.attention`.

    Returns:
        The kernel, its config and where the config is from, and every other kernel's reasons. If
        no kernel can run the call, ``kernel`` is None.

    Raises:
        ShapeError, MaskError, ConfigError: the arguments are no valid call.
    """
    layout = arguments.get("layout", "bhsd")
    if layout != "bhsd":
        query, key, value = api.to_bhsd(query, key, value, layout)
    terms = Terms(
        arguments.get("kv_lengths"),
        arguments.get("alibi_slopes"),
        arguments.get("bias"),
        arguments.get("sinks"),
    )
    deterministic = arguments.get("deterministic")
    options = Options(
        mask=api.and_causal(mask) if arguments.get("is_causal", False) else mask,
        q_offset=arguments.get("q_offset"),
        scale=arguments.get("scale"),
        softcap=arguments.get("softcap"),
        enable_gqa=arguments.get("enable_gqa", False),
        return_lse=arguments.get("return_lse", False),
        deterministic=torch.are_deterministic_algorithms_enabled()
        if deterministic is None
        else deterministic,
        backend=arguments.get("backend", "auto"),
        config=dispatch.freeze_config(arguments.get("config")),
    )
    needs_grad = torch.is_grad_enabled() and api.requires_grad(query, key, value, terms)
    query, key, value, terms = api.autocast(query, key, value, terms)
    problem = describe(query, key, value, terms, options, needs_grad=needs_grad).problem
    return explain_problem(problem, options.backend, options.config)


def explain_problem(
    problem: AttentionProblem,
    backend: str = "auto",
    config: Config | Mapping[str, ConfigValue] | dispatch.ConfigItems | None = None,
) -> Explanation:
    """`explain` for a problem instead of tensors.

    Raises:
        ConfigError: the backend is unknown or the kernel cannot run the config.
    """
    try:
        choice = dispatch.choose(problem, backend, config)
    except UnsupportedError:
        choice = None
    names = dispatch.candidates(backend)
    refused = {}
    for name in registry.KERNELS:
        if choice is not None and name == choice.kernel_name:
            continue
        why = dispatch.refusals(name, problem, is_named=backend != "auto")
        if not why and name not in names:
            is_law = backend == "auto"
            why = (
                ('never taken by backend="auto"; pass backend="reference"',)
                if is_law
                else (f"backend={backend!r} does not name it",)
            )
        elif not why and choice is not None:
            why = choice.reasons.get(
                name, (f"could run it, but {choice.kernel_name} comes first",)
            )
        refused[name] = why
    if choice is None:
        return Explanation(problem, backend, None, None, "none", refused)
    return Explanation(problem, backend, choice.kernel_name, choice.config, choice.rung, refused)
