"""Sentences to classify: three kinds made by rules, and GLUE's TSV files."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import DataError, find, lines_of
from .grammar import ADJECTIVES, NOUNS, PEOPLE, PLACES, PREPOSITIONS, VERBS
from .text import vocabulary

PAD, UNKNOWN, MASK, SEPARATOR = "<pad>", "<unk>", "<mask>", "<sep>"
SPECIAL = (PAD, UNKNOWN, MASK, SEPARATOR)
Example = tuple[list[str], int]  # words, two sentences with a separator between them; class

GOOD = ("good", "great", "friendly", "charming", "fresh", "excellent", "warm", "clever")
BAD = ("bad", "awful", "rude", "boring", "stale", "terrible", "cold", "stupid")
THINGS = ("food", "service", "room", "film", "plot", "music", "staff", "view", "coffee", "story")
ADVERBS = ("really", "very", "quite", "rather")


def polarity(rng: random.Random) -> Example:
    """Whether an opinion is favourable; "not" turns it round, and a clause about something else may stand beside it."""
    good, negated = rng.random() < 0.5, rng.random() < 0.4
    middle = (["not"] if negated else []) + ([rng.choice(ADVERBS)] if rng.random() < 0.5 else [])
    opinion = ["the", rng.choice(THINGS), "was", *middle, rng.choice(GOOD if good else BAD)]
    aside = ["a", rng.choice(PEOPLE)[0], rng.choice(VERBS)[0], "the", rng.choice(NOUNS)[0]]
    words = rng.choice((opinion, [*opinion, "and", *aside], [*aside, "and", *opinion]))
    return words, int(good != negated)


def acceptability(rng: random.Random) -> Example:
    """Whether the verb agrees with its subject, which may have a place between itself and the verb."""
    plural, right = rng.random() < 0.5, rng.random() < 0.5
    subject = rng.choice([noun for noun in PEOPLE if noun[0] != noun[1]])[plural]
    place = [rng.choice(PREPOSITIONS)[0], "the", rng.choice(PLACES)[rng.randrange(2)]] if rng.random() < 0.3 else []
    verb = rng.choice(VERBS)[plural if right else not plural]
    adjectives = [adjective[0] for adjective in rng.sample(ADJECTIVES, rng.randrange(3))]
    return ["the", *adjectives, subject, *place, verb, "the", rng.choice(NOUNS)[rng.randrange(2)]], int(right)


def contrast(rng: random.Random) -> Example:
    """Whether the opinion behind "but", or beside "although", is favourable."""
    good = [rng.random() < 0.5, rng.random() < 0.5]
    first, second = (["the", rng.choice(THINGS), "was", rng.choice(GOOD if g else BAD)] for g in good)
    if rng.random() < 0.5:
        return [*first, "but", *second], int(good[1])
    return ["although", *first, ",", *second], int(good[1])


RULES: dict[str, Callable[[random.Random], Example]] = {
    "polarity": polarity,
    "acceptability": acceptability,
    "contrast": contrast,
}
# Of GLUE: folder, file of the development set, columns of the sentences, column of the label; by number without header.
GLUE = {
    "sst2": ("SST-2", "dev.tsv", ("sentence",), "label"),
    "cola": ("CoLA", "dev.tsv", (3,), 1),
    "mrpc": ("MRPC", "dev.tsv", ("#1 String", "#2 String"), "Quality"),
    "rte": ("RTE", "dev.tsv", ("sentence1", "sentence2"), "label"),
    "qnli": ("QNLI", "dev.tsv", ("question", "sentence"), "label"),
    "qqp": ("QQP", "dev.tsv", ("question1", "question2"), "is_duplicate"),
    "mnli": ("MNLI", "dev_matched.tsv", ("sentence1", "sentence2"), "gold_label"),
}


@dataclass(frozen=True)
class Classified:
    """Padded (n, length) tokens and (n,) classes of a part."""

    tokens: Tensor
    labels: Tensor


def different(rule: Callable[[random.Random], Example], seed: int) -> Iterator[Example]:
    """Examples of a rule, all different, without end."""
    rng, seen = random.Random(seed), set()
    while True:
        words, label = rule(rng)
        if " ".join(words) not in seen:
            seen.add(" ".join(words))
            yield words, label


def by_rule(name: str, sizes: dict[str, int]) -> dict[str, list[Example]]:
    """Parts of the given sizes, no sentence in two of them."""
    stream = different(RULES[name], seed=0)
    return {part: list(itertools.islice(stream, n)) for part, n in sizes.items()}


def read_glue(root: Path, name: str) -> dict[str, list[Example]]:
    """A task of GLUE; its development set is "test", as in the paper, and a tenth of the training set "validation".

    Raises:
        DataError: a file or a column is missing, or more than one row in a thousand has too few fields.
    """
    folder, dev, columns, label = GLUE[name]
    train, test = (read_tsv(find(root / folder, file), columns, label) for file in ("train.tsv", dev))
    classes = sorted({row[-1] for row in train})
    parts = {"train": [], "validation": [], "test": []}
    for number, row in enumerate(train):
        parts["validation" if number % 10 == 9 else "train"].append(_example(row, classes))
    parts["test"] = [_example(row, classes) for row in test]
    return parts


def read_tsv(path: Path, columns: tuple[str | int, ...], label: str | int) -> list[list[str]]:
    """Rows of the wanted columns and the label; quotes are ordinary characters."""
    lines = [line.rstrip("\r").split("\t") for line in lines_of(path)]
    chosen = [*columns, label]
    if isinstance(label, str):
        header = [name.strip("\ufeff") for name in lines.pop(0)]
        missing = [name for name in chosen if name not in header]
        if missing:
            raise DataError(f"{path} has no column {', '.join(missing)}; found {', '.join(header)}")
        chosen = [header.index(name) for name in chosen]
    rows = [[row[i].strip() for i in chosen] for row in lines if len(row) > max(chosen)]
    if len(lines) - len(rows) > len(lines) / 1000 or not rows:
        raise DataError(
            f"{path}: {len(lines) - len(rows)} of {len(lines)} rows have fewer than {max(chosen) + 1} fields"
        )
    return rows


def _example(row: list[str], classes: list[str]) -> Example:
    *sentences, label = row
    words = f" {SEPARATOR} ".join(sentences).lower().replace(SEPARATOR.lower(), SEPARATOR).split()
    if label not in classes:
        raise DataError(f"label {label!r} is none of the training set's: {', '.join(classes)}")
    return words, classes.index(label)


def words_of(examples: list[list[Example]], most: int = 20_000) -> list[str]:
    """The special words, then those of all examples, the most frequent first."""
    found = vocabulary((word for part in examples for words, _ in part for word in words), 1)
    return [*SPECIAL, *(word for word in found[2:] if word not in SPECIAL)][:most]


def padded(examples: list[Example], words: list[str], longest: int) -> Classified:
    """As tensors; what is longer is cut."""
    known = {word: i for i, word in enumerate(words)}
    rows = [torch.tensor([known.get(w, 1) for w in sentence[:longest]]) for sentence, _ in examples]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Classified(tokens, torch.tensor([label for _, label in examples]))
