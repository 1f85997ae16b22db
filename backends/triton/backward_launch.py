"""Launches of the plain Triton backward for a call: rows made ready, then columns, then rows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from portattn.backends.repeated import call_key
from portattn.backends.stream_memory import arrival_counters
from portattn.backends.triton.backward_columns import COLUMN_PARAMETERS, column_kernel
from portattn.backends.triton.backward_config import block_width
from portattn.backends.triton.backward_rows import (
    PREPARE_PARAMETERS,
    ROW_PARAMETERS,
    prepare_rows,
    row_kernel,
)
from portattn.backends.triton.backward_sides import (
    NamedLaunch,
    Side,
    add_strides,
    constants_of,
    make_side,
    shared_values,
)
from portattn.backends.triton.backward_terms import (
    BiasKind,
    bias_kind,
    fill_bias,
    fill_sinks,
    fill_slopes,
)
from portattn.backends.triton.geometry import vector_elements
from portattn.backends.triton.limits import device_limits

if TYPE_CHECKING:
    from collections.abc import Hashable

    from portattn.backends.base import AttentionGradients, AttentionInputs, Config, Kernel
    from portattn.backends.triton.backward_config import TritonBackwardConfig

_PREPARE_ROWS = 64
_BY_DISTANCE, _PLAIN = 1, 2  # what row_kernel's SUMS are


def backward_key(
    kernel: Kernel, inputs: AttentionInputs, gradients: AttentionGradients, config: Config
) -> Hashable:
    """`repeated.call_key`, and what the gradients are like."""
    targets = [
        None
        if tensor is None
        else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16)
        for tensor in (
            gradients.output, gradients.lse, gradients.query, gradients.key, gradients.value,
            gradients.alibi_slopes, gradients.bias, gradients.sinks,
        )
    ]  # fmt: skip
    return call_key(kernel, inputs, config), "backward", *targets


def seed_of(inputs: AttentionInputs, gradients: AttentionGradients) -> torch.Tensor:
    """The output's gradient as kernels read it: its last dimension contiguous."""
    given = gradients.output
    if given is None:
        return torch.zeros_like(inputs.output)
    if given.stride(3) != 1 and given.shape[3] > 1:
        return given.contiguous()
    return given


class BackwardCall:
    """One kind of backward, ready to be repeated (`backward_key`). Thread-safe.

    It holds the device's arrays of the plans and the schedules, and none of these, which may hold
    it in turn.

    Attributes:
        used: see plan.cache.KeptCall.
    """

    def __init__(
        self,
        inputs: AttentionInputs,
        gradients: AttentionGradients,
        config: TritonBackwardConfig,
        workers: int | None = None,
    ) -> None:
        """Work out every launch; nothing is launched yet.

        Args:
            inputs, gradients, config: of the call.
            workers: programs that run at once, for tests; None asks the device.
        """
        self.used = True
        device = inputs.query.device
        self._arch = device_limits(str(device)).arch if device.type == "cuda" else "interpreter"
        self._config, self._seed = config, seed_of(inputs, gradients)
        self._kind = bias_kind(inputs, gradients)
        wanted = (inputs.query, inputs.key, inputs.value, inputs.output, self._seed)
        targets = (gradients.query, gradients.key, gradients.value)
        self._vector = vector_elements((*wanted, *(x for x in targets if x is not None)))
        self._launches = [self._prepare(inputs, gradients)]
        self._sides: list[Side] = []
        self._running_floats = 0
        if (
            gradients.key is not None
            or gradients.value is not None
            or self._kind is BiasKind.BY_COLUMN
        ):
            side = make_side("column", inputs, config, workers)
            self._sides.append(side)
            self._columns(inputs, gradients, side)
        kinds = [_BY_DISTANCE] if gradients.alibi_slopes is not None else []
        kinds += [_PLAIN] if self._kind is BiasKind.BY_ROW else []
        if kinds or gradients.query is not None or self._kind is BiasKind.FULL:
            side = make_side("row", inputs, config, workers)
            self._sides.append(side)
            for n, kind in enumerate(kinds or [0]):
                is_full = self._kind is BiasKind.FULL and n == 0
                self._rows(inputs, gradients, side, kind, is_full)
        self._slot_floats = max((side.slot_floats for side in self._sides), default=0)
        programs = inputs.query.shape[0] * inputs.query.shape[1]
        self._num_counters = programs * max((side.num_counters for side in self._sides), default=0)
        del self._seed

    def run(self, inputs: AttentionInputs, gradients: AttentionGradients) -> bool:
        """Launch on the inputs' device, which is the current one, and current stream.

        Returns:
            Whether a CUDA graph was being captured: then the plans must be kept.
        """
        self.used = True
        capturing = False
        for side in self._sides:
            capturing = side.plan_on.use() | side.schedule_on.use() | capturing
        tensors = self._tensors(inputs, gradients)
        for launch in self._launches:
            launch(tensors)
        if gradients.alibi_slopes is not None:
            fill_slopes(gradients.alibi_slopes, tensors[f"sums{_BY_DISTANCE}"])
        if gradients.sinks is not None and inputs.sinks is not None:
            fill_sinks(gradients.sinks, inputs.sinks, tensors["stats"])
        if gradients.bias is not None:
            fill_bias(gradients.bias, self._kind, tensors)
        return capturing

    def _tensors(
        self, inputs: AttentionInputs, gradients: AttentionGradients
    ) -> dict[str, torch.Tensor]:
        """All that the launches take, by name; memory is freed in stream order."""
        batch, num_heads, seqlen_q, _ = inputs.query.shape
        rows, columns = (batch, num_heads, seqlen_q), (batch, num_heads, inputs.key.shape[2])
        device = inputs.query.device
        floats: dict[str, tuple[int, ...]] = {"stats": (batch, num_heads, 2, seqlen_q)}
        if self._slot_floats:
            floats["slots"] = (self._slot_floats,)
        if self._running_floats:
            floats["running"] = (self._running_floats,)
        sums: dict[str, tuple[int, ...]] = {}
        if gradients.alibi_slopes is not None:
            sums[f"sums{_BY_DISTANCE}"] = rows
        if self._kind is BiasKind.BY_ROW:
            sums[f"sums{_PLAIN}"] = rows
        if self._kind is BiasKind.BY_COLUMN:
            sums["column_sums"] = columns
        if self._kind is BiasKind.FULL and gradients.bias is not None:
            sums["dbias"] = tuple(gradients.bias.shape)
        given = {
            "query": inputs.query, "key": inputs.key, "value": inputs.value,
            "output": inputs.output, "seed": seed_of(inputs, gradients), "lse": inputs.lse,
            "dlse": gradients.lse, "slopes": inputs.alibi_slopes, "bias": inputs.bias,
            "dq": _like(gradients.query, inputs.query), "dk": _like(gradients.key, inputs.key),
            "dv": _like(gradients.value, inputs.value),
        }  # fmt: skip
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        for name, sizes in floats.items():
            tensors[name] = torch.empty(sizes, dtype=torch.float32, device=device)
        for name, sizes in sums.items():
            tensors[name] = torch.zeros(sizes, dtype=torch.float32, device=device)
        if self._slot_floats:
            tensors["counters"] = arrival_counters(device, self._num_counters)
        return tensors

    def _prepare(self, inputs: AttentionInputs, gradients: AttentionGradients) -> NamedLaunch:
        batch, num_heads, seqlen_q, head_dim_v = inputs.output.shape
        values: dict[str, Any] = {"num_heads": num_heads, "seqlen_q": seqlen_q}
        add_strides(values, "out", inputs.output, self._vector)
        add_strides(values, "do", self._seed, self._vector)
        add_strides(values, "lse", inputs.lse)
        add_strides(values, "dlse", gradients.lse)
        has_dlse = gradients.lse is not None
        moving = {"out_ptr": "output", "do_ptr": "seed", "lse_ptr": "lse", "stats_ptr": "stats"}
        moving |= {"dlse_ptr": "dlse"} if has_dlse else {}
        constants = head_dim_v, block_width(head_dim_v), self._vector, _PREPARE_ROWS, has_dlse
        grid = batch * num_heads * -(-seqlen_q // _PREPARE_ROWS)
        options = {"num_warps": 4, "num_stages": 1}
        return NamedLaunch(
            prepare_rows, PREPARE_PARAMETERS, values, constants, moving, grid, options,
            inputs.query.device,
        )  # fmt: skip

    def _moving(self, inputs: AttentionInputs, side: Side, is_alone: bool) -> dict[str, str]:
        moving = {"q_ptr": "query", "k_ptr": "key", "v_ptr": "value"}
        moving |= {"do_ptr": "seed", "stats_ptr": "stats"}
        moving |= {"slopes_ptr": "slopes"} if inputs.alibi_slopes is not None else {}
        moving |= {"bias_ptr": "bias"} if inputs.bias is not None else {}
        moving |= {} if is_alone else {"running_ptr": "running"}
        if side.num_slots:
            moving |= {"slots_ptr": "slots", "counters_ptr": "counters"}
        return moving

    def _options(self, part: str) -> dict[str, int]:
        return {
            "num_warps": getattr(self._config, f"{part}_warps"),
            "num_stages": getattr(self._config, f"{part}_stages"),
        }

    def _columns(self, inputs: AttentionInputs, gradients: AttentionGradients, side: Side) -> None:
        """The launches of dK and dV: one per pass, or per pass and query head of a group."""
        batch, num_kv_heads, seqlen_k, head_dim = inputs.key.shape
        group = inputs.query.shape[1] // num_kv_heads
        sums = int(self._kind is BiasKind.BY_COLUMN)
        # Heads with masks of their own have items of their own.
        splits = group > 1 and (side.layout_strides[1] > 0 or bool(sums))
        steps = list(itertools.product(side.passes, range(group) if splits else (None,)))
        if len(steps) > 1:
            width = block_width(head_dim) + block_width(inputs.value.shape[3])
            self._running_floats = batch * num_kv_heads * seqlen_k * width
        moving = self._moving(inputs, side, len(steps) == 1) | {"dk_ptr": "dk", "dv_ptr": "dv"}
        moving |= {"sums_ptr": "column_sums"} if sums else {}
        for n, (shape, head) in enumerate(steps):
            values = shared_values(inputs, self._seed, side, shape, self._config, self._vector)
            add_strides(values, "dk", _like(gradients.key, inputs.key), self._vector)
            add_strides(values, "dv", _like(gradients.value, inputs.value), self._vector)
            if head is not None:
                values["first"], values["count"] = head, 1
            constants = constants_of(
                inputs, side.part, shape, self._config, self._vector, arch=self._arch,
                pieces=side.num_slots > 0,
                first=n == 0, last=n == len(steps) - 1, sums=sums,
            )  # fmt: skip
            self._launches.append(NamedLaunch(
                column_kernel, COLUMN_PARAMETERS, values,
                (inputs.scale, inputs.softcap, *constants.values()), moving,
                shape.num_items * values["num_bh"], self._options("column"), inputs.query.device,
            ))  # fmt: skip

    def _rows(
        self,
        inputs: AttentionInputs,
        gradients: AttentionGradients,
        side: Side,
        sums: int,
        is_full: bool,
    ) -> None:
        """The launches of dQ: one per pass.

        For the gradient of a bias, batches and heads that share one follow each other.
        """
        batch, num_heads, seqlen_q, head_dim = inputs.query.shape
        if len(side.passes) > 1:
            floats = batch * num_heads * seqlen_q * block_width(head_dim)
            self._running_floats = max(self._running_floats, floats)
        moving = self._moving(inputs, side, len(side.passes) == 1) | {"dq_ptr": "dq"}
        moving |= {"sums_ptr": f"sums{sums}"} if sums else {}
        moving |= {"dbias_ptr": "dbias"} if is_full else {}
        batches: list[tuple[int, int]] = [(0, batch)]
        heads: list[tuple[int, int]] = [(0, num_heads)]
        if is_full and gradients.bias is not None:
            if gradients.bias.shape[0] == 1:
                batches = [(b, 1) for b in range(batch)]
            if gradients.bias.shape[1] == 1:
                heads = [(h, 1) for h in range(num_heads)]
        for (n, shape), of_batch, of_head in itertools.product(
            enumerate(side.passes), batches, heads
        ):
            values = shared_values(inputs, self._seed, side, shape, self._config, self._vector)
            add_strides(values, "dq", _like(gradients.query, inputs.query), self._vector)
            values["first_batch"], (values["first"], values["count"]) = of_batch[0], of_head
            values["num_bh"] = of_batch[1] * of_head[1]
            values |= {"dbias_stride_b": 0, "dbias_stride_h": 0}
            if is_full and gradients.bias is not None:
                sizes = gradients.bias.shape
                per_head = sizes[2] * sizes[3]
                values["dbias_stride_b"] = per_head * sizes[1] if sizes[0] > 1 else 0
                values["dbias_stride_h"] = per_head if sizes[1] > 1 else 0
            constants = constants_of(
                inputs, side.part, shape, self._config, self._vector, arch=self._arch,
                pieces=side.num_slots > 0,
                first=n == 0, last=n == len(side.passes) - 1, sums=sums,
            )  # fmt: skip
            self._launches.append(NamedLaunch(
                row_kernel, ROW_PARAMETERS, values,
                (inputs.scale, inputs.softcap, *constants.values(), is_full), moving,
                shape.num_items * values["num_bh"], self._options("row"), inputs.query.device,
            ))  # fmt: skip


def _like(target: torch.Tensor | None, source: torch.Tensor) -> torch.Tensor:
    """The target, or memory for what nobody asks for."""
    if target is not None:
        return target
    return torch.empty(source.shape, dtype=source.dtype, device=source.device)
