"""The experiments' tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..task import Task
from .cv import Images
from .lm import Bytes, Language
from .nlu import Acceptability
from .nmt import Translation
from .recsys import Recommendation

# Task: how it is made, and the data it can have, its own first.
MAKERS: dict[str, tuple[Callable[..., Task], tuple[str, ...]]] = {
    "nmt": (Translation, ("grammar", "iwslt14")),
    "lm": (Language, ("topics", "ptb", "wikitext")),
    "acceptability": (Acceptability, ("rules",)),
    "recsys": (Recommendation, ("generated", "criteo")),
    "resnet20": (Images, ("digits", "cifar10")),
    "gpt": (Bytes, ("library",)),
    "mnist": (Images, ("mnist",)),
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
    """Return the task; made once in each process."""
    task = MAKERS[spec.name][0](spec.data, spec.root)
    task.device, task.folder = spec.device, spec.folder
    return task
