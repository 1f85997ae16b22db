"""A call's launches, laid out at its first time and repeated with other addresses.

For any kernel whose first parameter is the struct of params.cuh, with or without a struct of
tensor maps after it:

    call = forward_call(prepare(inputs, config, workers), make_launch, device)
    call.run(inputs)  # now, and for every later call on the plan with an equal `call_key`

`make_launch` turns the bytes of the parameters into a launch; on a device

    def make_launch(arguments):
        function = loader.load_function(program, device_index, shared_bytes)
        return device_launch(function, arguments, threads, shared_bytes, name)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from portattn.backends import repeated
from portattn.backends.cuda_launch import Launch, Launches, Patch
from portattn.backends.cupy.params import offset_of
from portattn.backends.repeated import RepeatedCall

if TYPE_CHECKING:
    import torch

    from portattn.backends.cupy.launch import Launch as Prepared

# The fields that change from call to call, but for those of the scratch memory.
FIELDS: Mapping[str, int] = {
    "query": repeated.QUERY,
    "key": repeated.KEY,
    "value": repeated.VALUE,
    "output": repeated.OUTPUT,
    "lse": repeated.LSE,
    "alibi": repeated.SLOPES,
    "bias": repeated.BIAS,
    "sinks": repeated.SINKS,
    "counters": repeated.COUNTERS,
}
_SCRATCH = ("piece_output", "piece_lse", "running_output", "running_lse")

MakeLaunch: TypeAlias = Callable[[Sequence[bytes]], Launch]
# The parameter that holds tensor maps, and where in it each lies: of a pass.
Maps: TypeAlias = Callable[[int], tuple[bytes, Sequence[Patch]]]


def device_launch(
    function: Any,  # noqa: ANN401  # CuPy has no types
    arguments: Sequence[bytes],
    threads: int,
    shared_bytes: int,
    name: str,
) -> Launch:
    """A launch of a `cupy.cuda.Function`, without its grid."""
    return Launch(function.ptr, arguments, 0, threads, shared_bytes, name, keep=function)


def field_patches(
    fields: Mapping[str, int], scratch: Mapping[str, int], header: str = "params.cuh"
) -> list[Patch]:
    """What a call writes into the struct.

    Args:
        fields: names of pointers -> their sources (`repeated.QUERY`, ...).
        scratch: names of pointers into the scratch memory -> where they start, in bytes.
        header: which struct.
    """
    found = [Patch(0, offset_of(name, header), source) for name, source in fields.items()]
    return found + [
        Patch(0, offset_of(name, header), repeated.SCRATCH, start)
        for name, start in scratch.items()
    ]


def forward_call(
    prepared: Prepared[Any],
    make_launch: MakeLaunch,
    device: torch.device,
    maps: Maps | None = None,
) -> RepeatedCall:
    """Lay out every pass.

    Args:
        prepared: what `launch.prepare` made of the first call.
        make_launch: see the module.
        device: of the tensors.
        maps: the second parameter of a pass, if the kernel takes any.
    """
    starts, total = {}, 0
    for name, size in zip(_SCRATCH, prepared.scratch_sizes, strict=True):
        if size:  # else the pointer stays null
            starts[name] = 4 * total
        total += size
    patches = field_patches(FIELDS, starts)
    launches = []
    for index in range(prepared.num_passes):
        grid, params = prepared.pass_params(index)
        content, map_patches = (None, ()) if maps is None else maps(index)
        launch = make_launch([params] if content is None else [params, content])
        launches.append(
            dataclasses.replace(
                launch,
                grid=grid,
                patches=[*patches, *map_patches],
                fields=prepared.plan_fields() if prepared.renewal else (),
                most_blocks=prepared.most_blocks,
            )
        )
    return RepeatedCall(
        Launches(launches, num_sources=repeated.NUM_SOURCES, device_index=device.index or 0),
        device,
        on_device=prepared.on_device,
        scratch_floats=total,
        num_counters=prepared.num_counters,
        num_launches=len(launches),
        renewal=prepared.renewal,
    )
