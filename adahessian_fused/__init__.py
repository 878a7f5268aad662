"""AdaHessian (Yao et al. 2021) for PyTorch with fused C++/CUDA and Triton kernels."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    # Of python -m adahessian_fused a plain line is expected, not a traceback.
    error = SystemExit if sys.argv[:1] == ["-m"] else ModuleNotFoundError
    raise error("adahessian_fused needs PyTorch 2.10 or newer: pip install torch")

from . import compat, recipes
from .backends import available_backends
from .compat import accelerate
from .distributed.ranks import batch_weight
from .fraction import split_batch
from .friendly import curvature_friendly
from .functional import adahessian, hutchinson_diagonal
from .hessian_step import NoCurvatureError
from .hvp_check import HvpCheck, StrategyCheck, check_along_z, check_hvp
from .optimizer import AdaHessian
from .statistics import LongStepWarning
from .train_step import TrainStep

__version__ = "0.1.0"

__all__ = [
    "AdaHessian",
    "HvpCheck",
    "LongStepWarning",
    "NoCurvatureError",
    "StrategyCheck",
    "TrainStep",
    "__version__",
    "accelerate",
    "adahessian",
    "available_backends",
    "batch_weight",
    "check_along_z",
    "check_hvp",
    "compat",
    "curvature_friendly",
    "hutchinson_diagonal",
    "recipes",
    "split_batch",
]
