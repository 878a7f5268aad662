"""The results file of a task: every run with its curves, written after each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .plan import Planner
from .run import Run


class OtherSettingsError(Exception):
    """The file has results of other settings."""


class Results:
    """``runs`` by key, ``step_times`` by setup, and what they have in common.

    Args:
        path: of the JSON file; it need not exist.
        settings: what all runs have in common; None to take over what the file says.

    Raises:
        OtherSettingsError: the file's settings are others.
    """

    def __init__(self, path: Path, settings: dict[str, Any] | None = None) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.settings = settings or found["settings"]
        if found and found["settings"] != self.settings:
            differing = sorted(k for k in found["settings"] | self.settings
                               if found["settings"].get(k) != self.settings.get(k))  # fmt: skip
            raise OtherSettingsError(
                f"{path} has results with other settings ({', '.join(differing)}); remove it, or write elsewhere with "
                "--out"
            )
        self.machine: dict[str, Any] = found.get("machine", {})
        self.step_times: dict[str, dict[str, float]] = found.get("step_times", {})
        self.runs: dict[str, dict[str, Any]] = found.get("runs", {})

    def add(self, run: Run, record: dict[str, Any]) -> None:
        """Keep a run's record, on the disk too."""
        setup = {"optimizer": run.setup.optimizer, "options": dict(run.setup.options)}
        commit = str(self.machine.get("commit"))[:7]
        self.runs[run.key] = {**setup, "lr": run.lr, "steps": run.steps, "seed": run.seed, "commit": commit, **record}
        self.write()

    def write(self) -> None:
        """All of it; an interruption leaves the file as it was before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = {name: getattr(self, name) for name in ("settings", "machine", "step_times")}
        lines = [f"{json.dumps(name)}: {json.dumps(part, ensure_ascii=False)}" for name, part in parts.items()]
        runs = ",\n".join(f"{json.dumps(key)}: {json.dumps(self.runs[key])}" for key in sorted(self.runs))
        text = "{\n" + ",\n".join([*lines, f'"runs": {{\n{runs}\n}}']) + "\n}\n"
        beside = self.path.with_suffix(".tmp")
        beside.write_text(text)
        os.replace(beside, self.path)

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those that have no record yet."""
        return [run for run in runs if run.key not in self.runs]

    def scores(self, runs: Iterable[Run], split: str = "test") -> list[float | None]:
        """One for each run that there is; None where the loss was not finite."""
        return [self.runs[run.key]["scores"][split] for run in runs if run.key in self.runs]

    def trials(self, planner: Planner, table: str) -> dict[str, list[Run]]:
        """Of the settings of a table those of the grid, and as soon as they are done those around its best."""
        found = {}
        for name, setup in planner.settings(table).items():
            runs = planner.trials(name, setup)
            best = self._best_of(runs, planner)
            more = planner.trials(name, setup, best) if best is not None and planner.refines else []
            found[name] = [*runs, *more]
        return found

    def best_lrs(self, planner: Planner, table: str) -> dict[str, float]:
        """Learning rates with the best validation score, by setting; without those whose trials are missing."""
        best = {name: self._best_of(runs, planner) for name, runs in self.trials(planner, table).items()}
        return {name: lr for name, lr in best.items() if lr is not None}

    def _best_of(self, trials: list[Run], planner: Planner) -> float | None:
        if self.missing(trials):
            return None
        sign = 1 if planner.task.higher_is_better else -1

        def value(run: Run) -> float:
            score = self.scores([run], "validation")[0]
            return -math.inf if score is None else sign * score

        return max(trials, key=value).lr
