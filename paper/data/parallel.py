"""Parallel text as padded numbers: sentences of the grammar, or files with a sentence a line like IWSLT14's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import DataError, find, lines_of
from .grammar import Pair, sentences
from .text import vocabulary

PAD, UNKNOWN, START, END = 0, 1, 2, 3
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
PARTS = {"train": ("train",), "validation": ("valid", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Side:
    """A language: what its numbers stand for."""

    words: Sequence[str]

    def encode(self, sentence: Sequence[str]) -> Tensor:
        """With both ends."""
        index = self._index()
        return torch.tensor([START, *(index.get(word, UNKNOWN) for word in sentence), END])

    def decode(self, tokens: Tensor) -> str:
        """Return the words before the end."""
        found = itertools.takewhile(lambda i: i != END, tokens.tolist())
        return " ".join(self.words[i] for i in found if i not in (PAD, START))

    def _index(self) -> dict[str, int]:
        if not hasattr(self, "_cached"):
            object.__setattr__(self, "_cached", {word: i for i, word in enumerate(self.words)})
        return self._cached


@dataclass(frozen=True)
class Parallel:
    """Padded (n, length) tokens of both languages by part, and the reference translations."""

    source: Side
    target: Side
    tokens: dict[str, tuple[Tensor, Tensor]]
    references: dict[str, list[str]]


def collect(pairs: dict[str, list[Pair]], least: int = 1) -> Parallel:
    """From pairs of words by part; the vocabularies are the training part's."""
    sides = []
    for i in (0, 1):
        words = vocabulary((word for pair in pairs["train"] for word in pair[i]), least)
        sides.append(Side((*SPECIAL, *words[2:])))
    tokens = {
        part: tuple(
            torch.nn.utils.rnn.pad_sequence([side.encode(pair[i]) for pair in rows], batch_first=True)
            for i, side in enumerate(sides)
        )
        for part, rows in pairs.items()
    }
    return Parallel(*sides, tokens, {part: [" ".join(pair[1]) for pair in rows] for part, rows in pairs.items()})


def from_grammar(n_train: int = 6000, n_held: int = 200) -> Parallel:
    """Pairs of the grammar, all different."""
    stream = sentences(seed=0)
    sizes = {"validation": n_held, "test": n_held, "train": n_train}
    return collect({part: list(itertools.islice(stream, n)) for part, n in sizes.items()})


def read(root: Path, source: str = "de", target: str = "en", longest: int = 100) -> Parallel:
    """``train.de``, ``train.en``, ``valid.de`` ...: tokenised, and split into subwords, by words separated by spaces.

    Training pairs with more than ``longest`` words on a side are left out.

    Raises:
        DataError: a file is missing or the files of a part have different lengths.
    """
    pairs = {}
    for part, names in PARTS.items():
        files = [find(root, *(f"{name}.{language}" for name in names)) for language in (source, target)]
        lines = [lines_of(path) for path in files]
        if len(lines[0]) != len(lines[1]):
            raise DataError(f"{files[0]} has {len(lines[0])} lines, {files[1]} has {len(lines[1])}; expected as many")
        rows = [(a.split(), b.split()) for a, b in zip(*lines, strict=True)]
        pairs[part] = [
            pair for pair in rows if part != "train" or (0 < max(map(len, pair)) <= longest and min(map(len, pair)))
        ]
    return collect(pairs, least=2)
