"""Real timm where torchvision is missing, as it is for a PyTorch without CUDA: timm imports it for its image data."""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest


class _Anything(type):
    """Any attribute of any class is this class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``torchvision`` and all of its submodules, with classes that do nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        found = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        anything = _Anything("anything", (), {})
        module.InterpolationMode = enum.Enum("InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
        module.__getattr__ = lambda name: getattr(anything, name)


@pytest.fixture
def timm() -> ModuleType:
    """The real one; its optimizers, schedules and models do not need what the stand-in stands for."""
    pytest.importorskip("huggingface_hub", reason="timm needs huggingface_hub")
    if importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("timm", reason="needs timm")
    finder = _StandIn()
    sys.meta_path.append(finder)
    try:
        return pytest.importorskip("timm", reason="needs timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # other packages ask whether it is installed
