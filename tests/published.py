"""AdaHessian by the rules of the paper alone, which the tests' references in float64 have."""

from __future__ import annotations

from typing import Any

import adahessian_fused
from adahessian_fused import recipes


class AdaHessian(adahessian_fused.AdaHessian):
    """The package's, with ``recipes.published`` and the probes of seed 0 where nothing else is asked for."""

    def __init__(self, params: Any, *args: Any, **options: Any) -> None:
        super().__init__(params, *args, **{**recipes.published, "seed": 0, **options})
