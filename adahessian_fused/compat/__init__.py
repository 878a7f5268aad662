"""The AdaHessians people have, with their constructors, rules and state dicts, on fused kernels.

One module for each origin: ``official``, ``torch_optimizer``, ``pytorch_optimizer``, ``timm``, ``davda54``. None of the
original packages is needed or imported.
"""

from . import davda54, official, pytorch_optimizer, timm, torch_optimizer
from .convert import accelerate

__all__ = ["accelerate", "davda54", "official", "pytorch_optimizer", "timm", "torch_optimizer"]
