"""Settings by name: ``AdaHessian(model.parameters(), lr=0.1, **recipes.cheap)``.

Each is a dict. With an option changed it is ``AdaHessian(model.parameters(), **{**recipes.cheap, "update_each": 5})``.

Attributes:
    cheap: curvature in steps 1 to 5, and 21, 41, 61 and so on, 1.1 first-order steps by matrix products, and no element
        moves by more than a tenth of lr in a step. Everything else is at its default, and written out.
    published: the rules of the paper (Yao et al. 2021, Algorithm 1), without what the defaults add to them: signed
        averages (Eq. 7), the whole lr from the first step on, no bound, momentum as it is.
"""

from __future__ import annotations

from typing import Any

cheap: dict[str, Any] = {
    "update_each": 20,
    "dense_steps": 5,
    "averaging": "abs",
    "warmup": 20,
    "clip": 0.1,
    "nesterov": True,
    "cautious": True,
}
published: dict[str, Any] = {"averaging": "signed", "warmup": 0, "clip": None, "nesterov": False, "cautious": False}
