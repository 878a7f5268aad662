"""When does it pay? Tables from the runs, and sentences that follow from them by rule."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.table import markdown

from ..optimizers import OURS
from ..run import Run
from .outcome import Outcome
from .plots import curve
from .statistics import Difference

SLACK = 1.1  # a run counts as one in AdamW's time if it takes at most this much longer
KINDS = {
    "resnet20": "convolution nets",
    "nmt": "transformers (translation)",
    "lm": "transformers (language)",
    "recsys": "recommenders",
}


@dataclass(frozen=True)
class Row:
    """One setting: its runs, its time, and how it compares with AdamW.

    Attributes:
        seconds: a run's steps times the time of a step.
        gain: difference of the test scores to AdamW's; None for AdamW and while seeds are missing.
        reached: time in which the mean validation loss first was at AdamW's last; None if it never was.
    """

    label: str
    runs: tuple[Run, ...]
    seconds: float
    gain: Difference | None
    reached: float | None

    @property
    def ours(self) -> bool:
        """Whether it is a setting of AdaHessian."""
        return self.label.startswith(OURS)


def rows(o: Outcome) -> list[Row]:
    """All settings whose runs and step times are there; none while AdamW's are missing."""
    cells = {label: runs for (label, _), runs in o.tables["cheap"].cells.items()}
    adamw = cells["AdamW"]
    target = curve(o, adamw, "validation")
    if not o.complete(adamw) or not target:
        return []
    found = []
    for label, runs in cells.items():
        taken = o.step_time(runs[0].setup)
        if taken is None or not o.complete(runs):
            continue
        steps = next((step for step, loss, *_ in curve(o, runs, "validation") if loss <= target[-1][1]), None)
        gain = None if label == "AdamW" else o.difference(runs, adamw)
        found.append(Row(label, runs, runs[0].steps * taken, gain, steps and steps * taken))
    return found


def table(o: Outcome, found: Sequence[Row]) -> str:
    """A line for each setting."""
    base = next(row for row in found if row.label == "AdamW")
    lines = []
    for row in found:
        step = 1e3 * row.seconds / row.runs[0].steps
        losses = [o.results.runs[run.key]["train"][-1][1] for run in row.runs]
        lines.append([
            row.label, f"{step:.1f}", str(row.runs[0].steps), f"{row.seconds / base.seconds:.2f}",
            f"{statistics.mean(losses):.3g}", o.cell(row.runs),
            "never" if row.reached is None else f"{row.reached / base.seconds:.2f}",
            "" if row.gain is None else row.gain.verdict,
        ])  # fmt: skip
    header = ["", "ms a step", "steps", "time / AdamW's", "last training loss", f"test {o.task.metric}",
              "time to AdamW's validation loss / AdamW's", "against AdamW"]  # fmt: skip
    return markdown(header, lines)


def start_with(o: Outcome, found: Sequence[Row]) -> str:
    """The cheapest of our settings whose mean is within a standard deviation of our best one's."""
    sign = 1 if o.task.higher_is_better else -1
    scores = {row.label: [sign * score for score in o.scores(row.runs) if score is not None] for row in found}
    ours = [row for row in found if row.ours and len(scores[row.label]) == len(row.runs)]
    if not ours:
        return "not decided: no setting of ours has a score for every seed."
    means = {row.label: statistics.mean(scores[row.label]) for row in ours}
    best = max(ours, key=lambda row: means[row.label])
    spread = statistics.stdev(scores[best.label]) if len(best.runs) > 1 else 0.0
    near = [row for row in ours if means[row.label] >= means[best.label] - spread]
    run = min(near, key=lambda row: row.seconds).runs[0]
    options = {"lr": run.lr, "block_size": o.task.block_size, **run.setup.options}
    text = ", ".join(f"{name}={value!r}" for name, value in options.items())
    steps = "" if run.steps == o.task.steps else f" for {run.steps} instead of {o.task.steps} steps"
    return (
        f"`AdaHessian(..., {text})`{steps}: the cheapest within a standard deviation of our best setting here "
        f"({best.label})."
    )


def verdict(o: Outcome, found: Sequence[Row]) -> str:
    """Whether it pays in AdamW's time, and if not, whether it does in AdamW's steps."""
    base = next(row for row in found if row.label == "AdamW")
    ours = [row for row in found if row.ours and row.gain is not None]
    in_time = [row for row in ours if row.seconds <= SLACK * base.seconds]
    winners = [row for row in in_time if row.gain.verdict == "better"]
    if winners:
        best = max(winners, key=lambda row: row.gain.mean)
        return f"**pays**: in AdamW's time, {best.label} is better by {best.gain}."
    slower = [row for row in ours if row.gain.verdict == "better"]
    if slower:
        best = max(slower, key=lambda row: row.gain.mean)
        return (
            f"**pays in steps, not in time**: {best.label} is better by {best.gain}, and takes "
            f"{best.seconds / base.seconds:.1f} times as long; within AdamW's time nothing of ours is better."
        )
    losers = [row for row in ours if row.gain.verdict == "worse"]
    if ours and len(losers) == len(ours):
        return "**stay with AdamW**: every setting of ours is worse."
    return "**stay with AdamW**: no setting of ours is better that these seeds can tell, and a step costs more."
