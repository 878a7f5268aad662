"""Loads the native library and tells torch what its operators do to shapes: most only mutate."""

from __future__ import annotations

import struct
import sysconfig
from pathlib import Path
from typing import Any

import torch

from . import norm_operators

NAMESPACE = norm_operators.NAMESPACE
NAMESPACES = (NAMESPACE, "adahessian_fused_emulated")
OPS = ("rademacher", "perturb", "hessian_diag", "adahessian_step")


def _find() -> Path:
    """Find the library of operators; ImportError says what to do if it, or _C beside it, is not there or not whole."""
    folder = Path(__file__).parent
    found = [*folder.glob("libadahessian_ops.*"), *folder.glob("_C.*")]
    add = '"pip install --force-reinstall --no-deps ." in the source folder'
    if not found and (folder.parent / "CMakeLists.txt").exists():
        raise ImportError(f'{folder.parent} is a source folder, not built to the end: "pip install -v -e ." does it')
    if not found:
        note = folder / "native_missing.txt"  # setup.py's
        why = note.read_text().strip() if note.exists() else "nothing was noted"
        raise ImportError(f"it is not part of this installation. When that was built: {why}. Then {add} adds it")
    parts = [folder / "libadahessian_ops.so", folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    if not all(part in found and _is_whole(part) for part in parts):
        raise ImportError(
            f"it is not whole: {folder} has {', '.join(p.name for p in found)}; expected {parts[0].name} and "
            f"{parts[1].name}, neither cut short. {add} makes both"
        )
    return parts[0]


def _is_whole(library: Path) -> bool:
    """Tell whether an ELF file has its end, the table of sections; to load one cut short would end the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return False
    offset, size, count = struct.unpack_from("<40xQ10xHH", header)
    return offset + size * count <= library.stat().st_size


def _load() -> None:
    torch.ops.load_library(str(_find()))
    for namespace in NAMESPACES:
        for op in OPS:
            torch.library.register_fake(f"{namespace}::{op}")(lambda *args, **kwargs: None)
    norm_operators.register_shapes()


_load()


def build_info() -> dict[str, Any]:
    """Tell how the native library was built: version, compiler, CUDA version and architectures, instruction sets."""
    from . import _C  # type: ignore[attr-defined]

    return _C.build_info()


def cuda_missing() -> str | None:
    """Tell why the native kernels cannot run on CUDA tensors here; None if they can."""
    info = build_info()
    if not info["cuda"]:
        return f"the native library was built without CUDA ({info['cuda_decision']})"
    if torch.version.cuda is None:
        return "the native kernels are CUDA; this torch was built for another GPU or none"
    return None
