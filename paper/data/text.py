"""Running text: what ships with Python, and the files of Penn Treebank and WikiText."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, frombuffer, tensor, uint8

from .files import DataError, find, lines_of

UNKNOWN, END = "<unk>", "<eos>"
PTB = {"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"}
WIKITEXT = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}


@dataclass(frozen=True)
class Corpus:
    """Token streams, int64 of shape (n,), and the words that the numbers stand for."""

    train: Tensor
    validation: Tensor
    test: Tensor
    words: Sequence[str]


def vocabulary(words: Iterable[str], least: int) -> list[str]:
    """<unk>, <eos> and the words that occur at least ``least`` times, the most frequent first."""
    counts = Counter(words)
    kept = [word for word, n in counts.most_common() if n >= least and word not in (UNKNOWN, END)]
    return [UNKNOWN, END, *kept]


def encode(words: Iterable[str], vocabulary: Sequence[str]) -> Tensor:
    """Numbers of words; 0 for those that are not in the vocabulary."""
    index = {word: i for i, word in enumerate(vocabulary)}
    return tensor([index.get(word, 0) for word in words])


def from_words(parts: dict[str, list[str]], least: int) -> Corpus:
    """Return a corpus from the words of its three parts; the vocabulary is the training part's."""
    words = vocabulary(parts["train"], least)
    return Corpus(*(encode(parts[name], words) for name in ("train", "validation", "test")), words)


def python_topics(least: int = 3) -> Corpus:
    """Return the language reference that ``help()`` shows, in lower-case words; every tenth topic is for each test."""
    from pydoc_data.topics import topics

    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for number, name in enumerate(sorted(topics)):
        part = {8: "validation", 9: "test"}.get(number % 10, "train")
        for line in re.split(r"\n\s*\n", topics[name]):
            parts[part] += [*re.findall(r"\w+|[^\w\s]", line.lower()), END]
    return from_words(parts, least)


def read(root: Path, kind: str) -> Corpus:
    """Penn Treebank or WikiText: words separated by spaces, a line each sentence or paragraph.

    Raises:
        DataError: a file is missing or empty.
    """
    parts = {}
    for part, name in {"ptb": PTB, "wikitext": WIKITEXT}[kind].items():
        path = find(root, name)
        parts[part] = [word for line in lines_of(path) if line.strip() for word in (*line.split(), END)]
        if not parts[part]:
            raise DataError(f"{path} has no words")
    return from_words(parts, least=1)


def python_library() -> Corpus:
    """Return the sources of Python's own library, byte by byte; every tenth module is for each test."""
    parts = {"train": bytearray(), "validation": bytearray(), "test": bytearray()}
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        parts[{8: "validation", 9: "test"}.get(number % 10, "train")] += path.read_bytes()
    return Corpus(*(frombuffer(part, dtype=uint8).long() for part in parts.values()), [chr(i) for i in range(256)])
