"""Sentences to classify, of three kinds made by rules."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .grammar import ADJECTIVES, NOUNS, PEOPLE, PLACES, PREPOSITIONS, VERBS
from .text import vocabulary

PAD, UNKNOWN, MASK, SEPARATOR = "<pad>", "<unk>", "<mask>", "<sep>"
SPECIAL = (PAD, UNKNOWN, MASK, SEPARATOR)
Example = tuple[list[str], int]  # words, class

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


def words_of(examples: list[list[Example]], most: int = 20_000) -> list[str]:
    """Return the special words, then those of all examples, the most frequent first."""
    found = vocabulary((word for part in examples for words, _ in part for word in words), 1)
    return [*SPECIAL, *(word for word in found[2:] if word not in SPECIAL)][:most]


def padded(examples: list[Example], words: list[str], longest: int) -> Classified:
    """As tensors; what is longer is cut."""
    known = {word: i for i, word in enumerate(words)}
    rows = [torch.tensor([known.get(w, 1) for w in sentence[:longest]]) for sentence, _ in examples]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Classified(tokens, torch.tensor([label for _, label in examples]))
