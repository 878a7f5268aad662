"""What the scripts train on: pictures that come with scikit-learn, the help texts of Python, and what is generated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn.functional import interpolate


@cache
def digits(size: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: images (N, 1, size, size) from 0 to 1, labels (N,)."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return interpolate(images, size=(size, size), mode="bilinear"), torch.from_numpy(data.target)


def some(*tensors: Tensor, n: int) -> Iterator[tuple[Tensor, ...]]:
    """Random mini-batches of n rows, without end."""
    while True:
        rows = torch.randint(len(tensors[0]), (n,))
        yield tuple(t[rows] for t in tensors)


@cache
def photographs(size: int) -> Tensor:
    """Luminances of the squares of two photographs: (N, 1, size, size) from 0 to 1."""
    grey = torch.stack([torch.tensor(i, dtype=torch.float32).mean(-1) / 255 for i in load_sample_images().images])
    return grey.unfold(1, size, size).unfold(2, size, size).reshape(-1, 1, size, size)


@cache
def characters(kinds: int) -> Tensor:
    """Python's help texts as the numbers of their characters, the most frequent first: (N,)."""
    return _numbered("\n".join(topics.values()), kinds)


@cache
def words(kinds: int) -> Tensor:
    """Python's help texts as the numbers of their words: (N,)."""
    return _numbered(re.findall(r"\w+|[^\w\s]", "\n".join(topics.values())), kinds)


def _numbered(tokens: str | list[str], kinds: int) -> Tensor:
    """Give each word a number; the rarest share the last one."""
    number = {token: i for i, (token, _) in enumerate(Counter(tokens).most_common(kinds - 1))}
    return torch.tensor([number.get(token, kinds - 1) for token in tokens])


def stretches(text: Tensor, *, length: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random stretches of a text and what follows each token: two of shape (n, length), without end."""
    while True:
        places = torch.randint(len(text) - length, (n, 1)) + torch.arange(length + 1)
        yield text[places[:, :-1]], text[places[:, 1:]]
