"""Which kernel runs a problem, and with which config.

The kernel is the first in the registry's order of preference that refuses nothing, or the fastest
of those that were measured on this device. Its config comes from the first rung that has a usable
one: given by the caller ("caller"), then what the tuning database knows ("exact", "stale",
"family", "seeds", "nearest": see portattn.tuning_db.lookup), then the kernel's own default
("default").
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import types
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from portattn.backends import registry
from portattn.backends.base import Config, ConfigValue, Kernel
from portattn.device import device_key
from portattn.errors import ConfigError, UnsupportedError
from portattn.tuning_db import TuningDatabaseWarning, lookup
from portattn.tuning_db.identity import source_of_files

if TYPE_CHECKING:
    from portattn.problem import AttentionProblem

# Device types of a backend's kernels: checked here so that a CPU call never imports a GPU backend.
_DEVICES = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "triton": ("cuda",),
    "cupy": ("cuda",),
}
ConfigItems = tuple[tuple[str, ConfigValue], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What runs a problem.

    Attributes:
        kernel_name: a name of registry.KERNELS.
        config: its config, feasible for the problem.
        rung: where the config is from: ``"caller"``, a rung of the tuning database, or
            ``"default"``.
        reasons: the candidates that refused -> why.
    """

    kernel_name: str
    config: Config
    rung: str
    reasons: Mapping[str, tuple[str, ...]]


def choose(
    problem: AttentionProblem,
    backend: str = "auto",
    config: Config | Mapping[str, ConfigValue] | ConfigItems | None = None,
) -> Choice:
    """The kernel and config for a problem; remembered per problem.

    Args:
        problem: what is to be computed.
        backend: ``"auto"``, a backend or one kernel's name. "auto" never takes the reference.
        config: fields of the kernel's config, or a config object of its type.

    Raises:
        UnsupportedError: every candidate refuses; it names each and every reason.
        ConfigError: the backend is unknown, or the kernel cannot run the config.
    """
    return _choose(problem, backend, freeze_config(config))


def freeze_config(
    config: Config | Mapping[str, ConfigValue] | ConfigItems | None,
) -> Config | ConfigItems | None:
    """A config as something hashable; one that is already stays as it is.

    Raises:
        ConfigError: it is neither a Config, nor a mapping of names to int, bool or str, nor None.
    """
    if config is None or isinstance(config, (Config, tuple)):
        return config
    if not isinstance(config, Mapping) or not all(
        isinstance(name, str) and isinstance(value, (int, str)) for name, value in config.items()
    ):
        raise ConfigError(
            f"config is {config!r}; it must be a mapping of field names to int, bool or str, a "
            "kernel's "
            "config object, or None: portattn.explain(...) shows the fields"
        )
    return tuple(sorted(config.items()))


def clear_cache() -> None:
    """Forget every choice, e.g. after the tuning database changed."""
    _choose.cache_clear()


def candidates(backend: str) -> list[str]:
    """The kernels that a backend argument names, in order of preference.

    Raises:
        ConfigError: the name is neither "auto", a backend nor a kernel.
    """
    if backend == "auto":
        return [name for name, entry in registry.KERNELS.items() if entry[0] != "reference"]
    if backend in registry.KERNELS:
        return [backend]
    names = [name for name, entry in registry.KERNELS.items() if entry[0] == backend]
    if not names:
        raise ConfigError(
            f'backend is {backend!r}; it must be "auto", one of the backends '
            f"{', '.join(registry.BACKENDS)}, "
            f"or one of the kernels {', '.join(registry.KERNELS)}"
        )
    return names


def backward_backend(backend: str) -> str:
    """Whose kernels compute the gradients of a call that was given this backend argument.

    Outputs and LSEs are the same whoever computed them: a kernel without a backward leaves the
    gradients to all kernels of its backend.
    """
    entry = registry.KERNELS.get(backend)
    if entry is None or registry.missing_packages(backend):
        return backend
    return backend if registry.kernel(backend).has_backward else entry[0]


def refusals(name: str, problem: AttentionProblem, *, is_named: bool = True) -> tuple[str, ...]:
    """Why a kernel cannot run a problem here; empty if it can.

    Args:
        name: the kernel.
        problem: what is to be computed.
        is_named: the caller asked for this kernel or its backend, and not for "auto".
    """
    absent = absence(name, problem.device_type, is_named=is_named)
    if absent:
        return absent
    kernel = registry.kernel(name)
    reasons = list(kernel.unsupported_reasons(problem))
    if problem.dtype == "float64" and kernel.backend != "reference":
        reasons.append('float64 is computed by backend="reference" only')
    if "grad" in problem.features and not kernel.has_backward:
        reasons.append(NO_BACKWARD)
    return tuple(dict.fromkeys(reasons))


def absence(name: str, device_type: str, *, is_named: bool = True) -> tuple[str, ...]:
    """Why a kernel is not there for tensors on a device, whatever the problem; empty if it is."""
    backend = registry.KERNELS[name][0]
    missing = registry.missing_packages(name)
    if missing:
        return tuple(
            f"package {package} is not installed: pip install 'portattn[{backend}]'"
            for package in missing
        )
    devices = _DEVICES[backend]
    # Triton's interpreter runs kernels on the CPU, for tests: nobody wants it unasked.
    if is_named and backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        devices = ("cpu", "cuda")
    if device_type not in devices:
        return (f"runs on {' and '.join(devices)} tensors and these are on {device_type}",)
    try:
        registry.kernel(name)
    except ImportError as error:
        return (f"cannot be imported: {error}",)
    return ()


NO_BACKWARD = "has no backward yet, and an input requires grad"


@functools.lru_cache(maxsize=4096)
def _choose(
    problem: AttentionProblem, backend: str, config: Config | ConfigItems | None
) -> Choice:
    names, is_named = candidates(backend), backend != "auto"
    reasons = {name: why for name in names if (why := refusals(name, problem, is_named=is_named))}
    able = [name for name in names if name not in reasons]
    able.sort(key=lambda name: not registry.kernel(name).is_preferred(problem))
    if not able:
        raise UnsupportedError(unsupported_message(problem, backend), reasons)
    if isinstance(config, Config):
        fitting = [name for name in able if isinstance(config, registry.kernel(name).config_type)]
        if not fitting:
            takes = {name: registry.kernel(name).config_type.__name__ for name in able}
            raise ConfigError(
                f"config is a {type(config).__name__}; it must be the config of a kernel of "
                f"backend {backend!r} "
                f"that can run this call: {takes}. Pass one of those, or name its kernel as "
                "backend="
            )
        able = fitting
    name = able[0]
    if len(able) > 1 and config is None:
        # Kernels measured on this device overrule the registry's order.
        ranking = lookup.ranking(able, problem, device_key(problem.device))
        name = ranking[0] if ranking else name
    chosen, rung = _config(registry.kernel(name), problem, config)
    return Choice(name, chosen, rung, types.MappingProxyType(reasons))


def unsupported_message(problem: AttentionProblem, backend: str) -> str:
    """The first line of "nothing can run this"."""
    terms = ", ".join(sorted(problem.features)) or "no score terms"
    way = (
        'pass backend="reference" (slow, exact) or change what is refused:'
        if backend != "reference"
        else "change what is refused:"
    )
    return (
        f"backend is {backend!r} and cannot run {problem.dtype} on {problem.device}, batch "
        f"{problem.batch}, "
        f"heads {problem.num_heads}/{problem.num_kv_heads}, lengths "
        f"{problem.seqlen_q}/{problem.seqlen_k}, "
        f"head_dim {problem.head_dim}/{problem.head_dim_v}, {terms}; {way}"
    )


def _config(
    kernel: Kernel, problem: AttentionProblem, given: Config | ConfigItems | None
) -> tuple[Config, str]:
    """The config and its rung."""
    if given is not None:
        config = given if isinstance(given, Config) else kernel.config_from_dict(dict(given))
        wrong = kernel.infeasible_reasons(problem, config)
        if wrong:
            raise ConfigError(
                f"config is {config} and {kernel.name} cannot run it: {'; '.join(wrong)}. "
                "Change it, or pass config=None for a tuned or default one"
            )
        return config, "caller"
    stored = _stored(kernel, problem)
    return stored if stored is not None else (kernel.default_config(problem), "default")


def _stored(kernel: Kernel, problem: AttentionProblem) -> tuple[Config, str] | None:
    """What the tuning database knows; an unusable config is a miss and one warning."""
    if not kernel.search_space(problem):
        return None
    found = lookup.find(
        kernel.name,
        problem,
        device_key(problem.device),
        kernel_source=lambda: source_of_files(tuple(kernel.source_files())),
    )
    if found is None:
        return None
    values, rung = found
    if not values:  # measured: nothing beats the default, which may depend on the exact shape
        return kernel.default_config(problem), str(rung)
    try:
        config = kernel.config_from_dict(values)
        wrong = kernel.infeasible_reasons(problem, config)
    except ConfigError as error:
        wrong = [str(error)]
    if not wrong:
        return config, str(rung)
    _warn_once(
        f"the tuning database holds a config for {kernel.name} (rung {rung!r}) that cannot run: "
        f"{'; '.join(wrong)}. The default config is used; `portattn tune` replaces it. "
        f"Stored: {json.dumps(dict(values), sort_keys=True, default=str)}"
    )
    return None


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    warnings.warn(message, TuningDatabaseWarning, stacklevel=2)
