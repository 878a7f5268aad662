"""The backends: which of them can run here, why the others cannot, and which one `backend="auto"` means.

A backend is anything with the four functions of reference.py, same names and signatures.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from .checks import warn
from .profiling import profiled

PREFERENCE = ("native", "triton", "reference")
OPS = ("rademacher", "perturb", "hessian_diag", "adahessian_step")


def _native() -> SimpleNamespace:
    from . import _native  # loads the library and registers the operators

    ops = getattr(torch.ops, _native.NAMESPACE)
    found = SimpleNamespace(**{op: getattr(ops, op).default for op in OPS})
    found.step_at_addresses = getattr(ops.adahessian_step, "addresses", None)  # which older libraries lack
    return found


def _python(module: str) -> SimpleNamespace:
    """Return a backend of Python functions; profilers show them under the names of the native operators."""
    functions = importlib.import_module(module, __package__)
    names = getattr(functions, "__all__", OPS)
    return SimpleNamespace(**{op: profiled(f"adahessian_fused::{op}")(getattr(functions, op)) for op in names})


@functools.cache
def get(name: str) -> SimpleNamespace:
    """Return the backend called ``name``: an object with rademacher, perturb, hessian_diag and adahessian_step."""
    if name == "reference":
        return _python(".reference")
    if name == "triton":
        return _python(".kernels")
    if name == "native":
        return _native()
    raise ValueError(f'unknown backend "{name}"; expected "auto" or one of {", ".join(PREFERENCE)}')


@functools.cache
def _import_failure(name: str) -> str | None:
    try:
        get(name)
    except (ImportError, OSError, RuntimeError) as error:
        return f"the {name} backend does not load: {error}"
    return None


def unavailable_reason(name: str, device_type: str = "cpu") -> str | None:
    """Tell why the backend cannot run on this kind of device here; None if it can."""
    if name not in PREFERENCE:
        raise ValueError(f'unknown backend "{name}"; expected "auto" or one of {", ".join(PREFERENCE)}')
    if device_type not in ("cpu", "cuda") and name != "reference":
        return f"has no kernels for {device_type} devices"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if importlib.util.find_spec(".kernels", __package__) is None:
            return "its kernels are in another folder of the source, which is not installed (pip install -e .)"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device_type == "cpu" and not interpreted:
            return "runs on GPUs; on CPU tensors only interpreted, for tests (set TRITON_INTERPRET=1)"
    failure = _import_failure(name)
    if failure is not None:
        return failure
    if name == "native" and device_type == "cuda":
        from . import _native

        return _native.cuda_missing()
    return None


def available_backends(device_type: str = "cpu") -> dict[str, str | None]:
    """List every backend, best first, with the reason it cannot run on ``device_type`` here, or None if it can."""
    return {name: unavailable_reason(name, device_type) for name in PREFERENCE}


@functools.cache
def _warn_of_broken_library() -> None:
    """Warn once if there is a native library that does not load: older than the Python code, or for another torch."""
    here = Path(__file__).parent
    failure = _import_failure("native")
    if failure is not None and next(here.glob("libadahessian_ops.*"), None) is not None:
        warn(
            f'{failure}. backend="auto" goes on without it, which is slow; expected a library built from this source '
            "(pip install --force-reinstall --no-deps .) for this Python and torch >= 2.10",
            RuntimeWarning,
        )


def choose(name: str, device_type: str) -> str:
    """Choose the backend for tensors on ``device_type``: ``name`` itself, or the best there is if it is "auto".

    Raises:
        RuntimeError: the backend asked for cannot run on that device.
    """
    if name == "auto":
        _warn_of_broken_library()
        # Interpreted Triton is for tests: never chosen unasked.
        names = [n for n in PREFERENCE if n != "triton" or device_type != "cpu"]
        return next(n for n in names if unavailable_reason(n, device_type) is None)
    reason = unavailable_reason(name, device_type)
    if reason is not None:
        others = [n for n, why in available_backends(device_type).items() if why is None]
        raise RuntimeError(
            f'backend="{name}" cannot run on {device_type} tensors here: {reason}. Available: {", ".join(others)}; '
            'backend="auto" takes the first of them'
        )
    return name


class ByDevice(dict):
    """The backend ``name`` resolves to, by device type; looked up when a device first turns up."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __missing__(self, device_type: str) -> SimpleNamespace:
        self[device_type] = get(choose(self._name, device_type))
        return self[device_type]
