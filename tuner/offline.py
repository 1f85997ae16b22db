"""Makes a process compile for a device that it does not touch.

A kernel's `run` on CPU tensors goes all the way to its launch: plan, schedule, variant, compiler.
Here the launch is left out and the device's properties are given, so that whatever the kernels
would compile on the device lies in the caches on disk afterwards: CuPy's backend's and Triton's.
For processes made for this (`portattn.tuner.worker`), never for one that computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from portattn.backends.base import AttentionInputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from portattn.backends.base import Config, Kernel
    from portattn.device import DeviceKey
    from portattn.tuner.cases import Case

# Fields of configs that decide the schedule only, which is hashed as a whole.
_SCHEDULE_FIELDS = frozenset({"min_piece"})


class _CompiledError(Exception):
    """Thrown where a CuPy kernel would be loaded: nothing after that compiles anything."""


class Offline:
    """The device that this process pretends to have.

    Args:
        device: an NVIDIA GPU.
    """

    def __init__(self, device: DeviceKey) -> None:
        self._parts: list[str] = []
        major, minor = divmod(int(device.arch.removeprefix("sm_")), 10)
        properties = types.SimpleNamespace(
            name=device.name,
            major=major,
            minor=minor,
            multi_processor_count=device.cores,
            shared_memory_per_block_optin=device.shared_memory_bytes,
            regs_per_multiprocessor=device.registers,
            L2_cache_size=device.l2_bytes,
            total_memory=device.memory_bytes,
        )
        torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment, return-value]
        self._record_schedules()
        if importlib.util.find_spec("cupy") is not None:
            self._stop_cupy()
        if importlib.util.find_spec("triton") is not None:
            self._stop_triton(10 * major + minor)

    def compile(self, kernel: Kernel, inputs: AttentionInputs, config: Config) -> str:
        """Compile what a call would run.

        Args:
            kernel: of the registry.
            inputs: of `empty_inputs`.
            config: feasible.

        Returns:
            A digest of the code and the launch: calls with equal ones do the same.

        Raises:
            Exception: whatever the compiler raises.
        """
        self._parts.clear()
        with contextlib.suppress(_CompiledError):
            kernel.run(inputs, config)
        # Triton's launches are hashed whole; CuPy's by what is not in code and schedule.
        if kernel.backend != "triton":
            fields = config.to_dict()
            self._parts += [f"{n}={v}" for n, v in fields.items() if n not in _SCHEDULE_FIELDS]
        return hashlib.sha256("\n".join([kernel.name, *self._parts]).encode()).hexdigest()

    def _record_schedules(self) -> None:
        from portattn.plan import Plan

        made = Plan.schedule

        def schedule(plan: Plan, **arguments: Any) -> Any:  # noqa: ANN401
            found = made(plan, **arguments)
            digest = hashlib.sha256(found.items.tobytes())
            digest.update(found.full_list.tobytes())
            self._parts.append(digest.hexdigest())
            return found

        Plan.schedule = schedule  # type: ignore[method-assign, assignment]

    def _stop_cupy(self) -> None:
        import cupy

        from portattn.backends.cupy import forward_sm90, loader, tensor_map

        def load(program: loader.Program, device_index: int, shared_bytes: int) -> Any:  # noqa: ANN401
            name = loader.cache_key(program)
            with _alone(name):
                loader.cached_cubin(program)
            self._parts.append(name)
            raise _CompiledError

        loader.load_function = load
        # The driver makes tensor maps; nobody reads these.
        forward_sm90.encode = lambda address, shape: bytes(  # type: ignore[attr-defined]
            tensor_map.MAP_BYTES
        )
        cupy.cuda.runtime.setDevice = lambda index: None

    def _stop_triton(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        driver.set_active(_NoDriver(GPUTarget("cuda", capability, 32)))
        run = JITFunction.run

        def compile_only(function: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            compiled = run(function, *arguments, **{**options, "warmup": True})
            numbers = [x for x in arguments if isinstance(x, bool | int | float | str)]
            self._parts.append(f"{compiled.hash} {options['grid']} {numbers}")
            return compiled

        JITFunction.run = compile_only


class _NoDriver:
    """What Triton asks its driver before it compiles."""

    def __init__(self, target: Any) -> None:  # noqa: ANN401  # GPUTarget
        self._target = target

    def get_current_target(self) -> Any:  # noqa: ANN401
        """What to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None is needed."""
        return 0


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Of the processes that compile the same, one works and the others wait for its result."""
    folder = Path(tempfile.gettempdir()) / f"portattn-compiling-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def empty_inputs(case: Case) -> AttentionInputs:
    """The call of `portattn.tuner.inputs.make`, of memory on the CPU that nobody writes or reads.

    Large tensors cost addresses only.
    """
    problem = case.problem
    dtype, has = problem.torch_dtype, problem.features.__contains__
    b, h, kv = problem.batch, problem.num_heads, problem.num_kv_heads
    sq, sk = problem.seqlen_q, problem.seqlen_k

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    return AttentionInputs(
        query=empty(b, h, sq, problem.head_dim),
        key=empty(b, kv, sk, problem.head_dim),
        value=empty(b, kv, sk, problem.head_dim_v),
        output=empty(b, h, sq, problem.head_dim_v),
        lse=empty(b, h, sq, dtype=torch.float32) if has("lse") else None,
        mask=case.mask,
        q_offset=problem.q_offset,
        kv_lengths=empty(b, dtype=torch.int32) if has("kv_lengths") else None,
        scale=problem.head_dim**-0.5,
        softcap=30.0 if has("softcap") else 0.0,
        alibi_slopes=empty(h, dtype=torch.float32) if has("alibi") else None,
        bias=empty(1, 1, sq, sk).expand(b, h, sq, sk) if has("bias") else None,
        sinks=empty(h, dtype=torch.float32) if has("sinks") else None,
        deterministic=has("deterministic"),
    )


def device_from_json(values: Mapping[str, Any]) -> DeviceKey:
    """A device key from its fields.

    Raises:
        TypeError, KeyError: they are not those of a device key.
    """
    from portattn.device import DeviceKey

    fields = {field.name: values[field.name] for field in dataclasses.fields(DeviceKey)}
    return DeviceKey(**{**fields, "isa": tuple(fields["isa"])})
