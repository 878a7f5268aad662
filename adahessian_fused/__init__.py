"""AdaHessian (Yao et al. 2021) for PyTorch with fused C++/CUDA and Triton kernels."""

from importlib.metadata import PackageNotFoundError, version

from . import compat
from .backends import available_backends
from .compat import accelerate
from .fraction import split_batch
from .friendly import curvature_friendly
from .functional import adahessian, hutchinson_diagonal
from .hvp_check import HvpCheck, StrategyCheck, check_hvp
from .optimizer import AdaHessian
from .train_step import TrainStep

try:
    __version__ = version("adahessian_fused")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "AdaHessian",
    "HvpCheck",
    "StrategyCheck",
    "TrainStep",
    "__version__",
    "accelerate",
    "adahessian",
    "available_backends",
    "check_hvp",
    "compat",
    "curvature_friendly",
    "hutchinson_diagonal",
    "split_batch",
]
