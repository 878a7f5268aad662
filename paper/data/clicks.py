"""Click logs: generated ones with planted structure, and Criteo's TSV format."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import DataError, find

N_DENSE, N_SPARSE = 13, 26  # columns of Criteo's files
SIZES = (4, 12, 30, 80, 200, 500, 1000, 2000)  # categories of the generated fields
BAG = 4  # most categories of one example in the last two fields


@dataclass(frozen=True)
class Clicks:
    """Numbers (n, d), categories (n, fields, bag) with 0 for none, and clicks (n,) of 0 and 1."""

    dense: Tensor
    sparse: Tensor
    clicked: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Clicks:
        return Clicks(self.dense[rows], self.sparse[rows], self.clicked[rows])

    def __len__(self) -> int:
        return len(self.clicked)


def generate(n: int, seed: int = 0, rank: int = 4) -> Clicks:
    """Make logs of a factorisation machine: log-odds of clicks are linear in the numbers, have a term for each category
    and the inner products of all pairs of fields' hidden factors. Categories follow Zipf's law.
    """
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, N_DENSE, generator=generator)
    weights = torch.randn(N_DENSE, generator=generator) / math.sqrt(N_DENSE)
    bags = torch.zeros(n, len(SIZES), BAG, dtype=torch.int64)
    odds, total, squares = dense @ weights, torch.zeros(n, rank), torch.zeros(n)
    for field, size in enumerate(SIZES):
        popularity = 1 / torch.arange(1, size + 1, dtype=torch.float64)
        length = BAG if field >= len(SIZES) - 2 else 1
        drawn = torch.multinomial(popularity, n * length, replacement=True, generator=generator).view(n, length)
        kept = torch.randint(1, length + 1, (n, 1), generator=generator) > torch.arange(length)
        bags[:, field, :length] = (drawn + 1) * kept
        biases = torch.randn(size, generator=generator) / math.sqrt(len(SIZES))
        factors = torch.randn(size, rank, generator=generator) / rank**0.5
        share = kept / kept.sum(1, keepdim=True)
        odds = odds + (biases[drawn] * share).sum(1)
        mean = (factors[drawn] * share[..., None]).sum(1)
        total, squares = total + mean, squares + mean.square().sum(1)
    pairs = (total.square().sum(1) - squares) / 2
    chance = torch.sigmoid(odds + pairs - 1)
    return Clicks(dense, bags, torch.bernoulli(chance, generator=generator))


def read_criteo(root: Path, n_categories: int, most: int = 2_000_000) -> Clicks:
    """Read ``most`` rows of ``train.txt``: a click, 13 integers, 26 hexadecimal categories; some of them empty.

    Numbers become log(1 + max(x, 0)), as DLRM takes them; categories are counted modulo ``n_categories - 1``.

    Raises:
        DataError: the file is missing, or a row is not of this form.
    """
    path = find(root, "train.txt", "dac/train.txt")
    clicks, numbers, categories = [], [], []
    with path.open(encoding="ascii") as lines:
        for count, line in enumerate(itertools.islice(lines, most), 1):
            fields = line.rstrip("\n").split("\t")
            try:
                if len(fields) != 1 + N_DENSE + N_SPARSE:
                    raise ValueError(f"{len(fields)} fields; expected {1 + N_DENSE + N_SPARSE}")
                clicks.append({"0": 0.0, "1": 1.0}[fields[0]])
                numbers.append([math.log1p(max(int(x or 0), 0)) for x in fields[1 : 1 + N_DENSE]])
                categories.append([int(x, 16) % (n_categories - 1) + 1 if x else 0 for x in fields[1 + N_DENSE :]])
            except (ValueError, KeyError) as error:
                raise DataError(
                    f"{path}, line {count}: {error}; expected a click, 13 integers, 26 categories"
                ) from error
    if not clicks:
        raise DataError(f"{path} is empty")
    return Clicks(torch.tensor(numbers), torch.tensor(categories)[..., None], torch.tensor(clicks))


def in_order(clicks: Clicks, held: int) -> dict[str, Clicks]:
    """Take the last ``held`` rows for testing, the ones before for validation, all others for training."""
    n = len(clicks)
    ends: Sequence[tuple[str, int, int]] = (
        ("train", 0, n - 2 * held),
        ("validation", n - 2 * held, n - held),
        ("test", n - held, n),
    )
    return {part: clicks[a:b] for part, a, b in ends}
