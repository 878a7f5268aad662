"""Other random numbers in place of those that the tests draw their data from.

``TEST_SEED=3`` shifts every seed in them: what passes because of its numbers does not pass with all of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

SHIFT = 1_000_000 * int(os.environ.get("TEST_SEED", "0"))
HERE = str(Path(__file__).parent)
manual_seed = torch.manual_seed  # as it is, for tests of what a seed does


def shifted(seed: int) -> int:
    """Another seed, if a test gives it: packages draw what they would."""
    return seed + SHIFT * sys._getframe(2).f_code.co_filename.startswith(HERE)


def shift() -> None:
    """Shift what tests give to ``torch.manual_seed`` and to generators from now on."""
    if not SHIFT:
        return

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> Generator:
            return super().manual_seed(shifted(seed))

    torch.manual_seed, torch.Generator = lambda seed: manual_seed(shifted(seed)), Generator
