"""Loads the native library and tells torch what its operators do to shapes (nothing: they only mutate)."""

from __future__ import annotations

from pathlib import Path

import torch

NAMESPACE = "adahessian_fused"
NAMESPACES = (NAMESPACE, "adahessian_fused_emulated")
OPS = ("rademacher", "perturb", "hessian_diag", "adahessian_step")


def _load() -> None:
    library = next(Path(__file__).parent.glob("libadahessian_ops.*"), None)
    if library is None:
        raise ImportError(
            "it is not part of this installation, which was built without a C++ compiler or without torch at hand; "
            'with both, "pip install --no-build-isolation --force-reinstall --no-deps ." in the source folder adds it'
        )
    torch.ops.load_library(str(library))
    for namespace in NAMESPACES:
        for op in OPS:
            torch.library.register_fake(f"{namespace}::{op}")(lambda *args, **kwargs: None)


_load()


def build_info() -> dict[str, object]:
    """How the native library was built: version, compiler, CUDA version and architectures, instruction sets."""
    from . import _C

    return _C.build_info()


def cuda_missing() -> str | None:
    """Why the native kernels cannot run on CUDA tensors here; None if they can."""
    info = build_info()
    if not info["cuda"]:
        return f"the native library was built without CUDA ({info['cuda_decision']})"
    if torch.version.cuda is None:
        return "the native kernels are CUDA; this torch was built for another GPU or none"
    return None
