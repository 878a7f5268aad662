"""The experiments' tasks by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from ..task import Task
from .cv import Images
from .lm import Language
from .nlu import Sentences
from .nmt import Translation
from .recsys import Recommendation

# Task: how it is made, and the data it can have, its own first.
MAKERS = {
    "resnet20": (lambda *a: Images("resnet20", *a), ("digits", "cifar10")),
    "resnet32": (lambda *a: Images("resnet32", *a), ("digits", "cifar10")),
    "nmt": (Translation, ("grammar", "iwslt14")),
    "lm": (Language, ("topics", "ptb", "wikitext")),
    "polarity": (lambda *a: Sentences("polarity", *a), ("rules", "glue")),
    "acceptability": (lambda *a: Sentences("acceptability", *a), ("rules", "glue")),
    "relatedness": (lambda *a: Sentences("relatedness", *a), ("rules", "glue")),
    "recsys": (Recommendation, ("generated", "criteo")),
}
# What a person calls them.
EXPERIMENTS = {
    "cv": ("resnet20", "resnet32"),
    "nmt": ("nmt",),
    "lm": ("lm",),
    "nlu": ("polarity", "acceptability", "relatedness"),
    "recsys": ("recsys",),
}


@dataclass(frozen=True)
class Spec:
    """A task that a process can be told to make."""

    name: str
    data: str
    root: Path | None = None
    device: str = "cpu"
    folder: Path = Path()  # for what a task prepares

    @property
    def stem(self) -> str:
        """Of its results file."""
        return self.name if self.data == MAKERS[self.name][1][0] else f"{self.name}-{self.data}"


@cache
def make(spec: Spec) -> Task:
    """The task; made once in each process."""
    task = MAKERS[spec.name][0](spec.data, spec.root)
    task.device, task.folder = spec.device, spec.folder
    return task
