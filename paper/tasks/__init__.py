"""The experiments' tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from ..data.sentences import GLUE, RULES
from ..task import Task
from .cv import Images
from .lm import Language
from .nlu import Sentences
from .nmt import Translation
from .recsys import Recommendation

# Task: how it is made, and the data it can have, its own first.
MAKERS: dict[str, tuple[Callable[..., Task], tuple[str, ...]]] = {
    "resnet20": (partial(Images, "resnet20"), ("digits", "cifar10")),
    "resnet32": (partial(Images, "resnet32"), ("digits", "cifar10")),
    "nmt": (Translation, ("grammar", "iwslt14")),
    "lm": (Language, ("topics", "ptb", "wikitext")),
    **{name: (partial(Sentences, name), ("rules",)) for name in RULES},
    **{name: (partial(Sentences, name), ("glue",)) for name in GLUE},
    "recsys": (Recommendation, ("generated", "criteo")),
}
# What a person calls them.
EXPERIMENTS = {
    "cv": ("resnet20", "resnet32"),
    "nmt": ("nmt",),
    "lm": ("lm",),
    "nlu": (*RULES, *GLUE),
    "recsys": ("recsys",),
}
BUILT_IN = ("digits", "grammar", "topics", "rules", "generated")


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
        return self.name if self.data in BUILT_IN else f"{self.name}-{self.data}"


@cache
def make(spec: Spec) -> Task:
    """The task; made once in each process."""
    task = MAKERS[spec.name][0](spec.data, spec.root)
    task.device, task.folder = spec.device, spec.folder
    return task
