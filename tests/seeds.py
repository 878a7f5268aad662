"""Other random numbers in place of those that the tests draw their data from.

``TEST_SEED=3`` shifts every seed: what passes because of its numbers does not pass with all of them.
"""

from __future__ import annotations

import os

import torch

SHIFT = 1_000_000 * int(os.environ.get("TEST_SEED", "0"))


def shift() -> None:
    """Shift what is given to ``torch.manual_seed`` and to generators from now on."""
    if not SHIFT:
        return
    manual_seed = torch.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> Generator:
            return super().manual_seed(seed + SHIFT)

    torch.manual_seed, torch.Generator = lambda seed: manual_seed(seed + SHIFT), Generator
