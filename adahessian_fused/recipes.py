"""Settings by name: ``AdaHessian(model.parameters(), lr=0.1, **recipes.cheap)``.

Each is a dict, so that ``{**recipes.cheap, "update_each": 5}`` is another.

Attributes:
    cheap: little more than the price of a first-order optimizer: curvature on each of the first 20 steps, in which lr
        rises linearly, then on every tenth; magnitudes averaged; no element moves by more than lr.
    published: the rules of the paper (Yao et al. 2021, Algorithm 1): signed averages (Eq. 7), the whole lr from the
        first step on, no bound.
"""

from __future__ import annotations

from typing import Any

cheap: dict[str, Any] = {"update_each": 10, "averaging": "abs", "warmup": 20, "clip": 1.0}
published: dict[str, Any] = {"averaging": "signed", "warmup": 0, "clip": None}
