"""What the paper claims and whether these runs show it: sentences by rule, never by hand."""

from __future__ import annotations

from collections.abc import Sequence

from ..optimizers import OURS
from .outcome import Outcome
from .statistics import Difference, mean

SHOWN, NOT_SHOWN, OPPOSITE = "**shown**", "**not shown**", "**the opposite**"
TOO_FEW = "not decided: fewer than two seeds have a score for both."


def against(d: Difference | None, claim: str) -> str:
    """A claim that something is better."""
    if d is None:
        return f"{claim}: {TOO_FEW}"
    found = {"better": SHOWN, "even": NOT_SHOWN, "worse": OPPOSITE}[d.verdict]
    reason = ", the interval contains zero" if d.verdict == "even" else ""
    return f"{claim}: {found}; difference {d}{reason}."


def optimizers(o: Outcome) -> list[str]:
    """AdaHessian against AdamW (and Adagrad), AdamW against SGD."""
    cells = {name: runs for (name, _), runs in o.tables["optimizers"].cells.items()}
    where = f"{o.task.title}: "
    said = [against(o.difference(cells[OURS], cells["AdamW"]), f"{where}AdaHessian is better than AdamW")]
    if "AdaGrad" in cells:
        said.append(against(o.difference(cells[OURS], cells["AdaGrad"]), f"{where}AdaHessian is better than Adagrad"))
    if o.stem in ("nmt", "lm"):
        said.append(against(o.difference(cells["AdamW"], cells["SGD"]), f"{where}SGD is behind AdamW"))
    if o.stem.startswith("resnet"):
        d = o.difference(cells[OURS], cells["SGD"])
        said.append(no_loss(d, f"{where}AdaHessian is no worse than SGD"))
    return said


def no_loss(d: Difference | None, claim: str) -> str:
    """A claim that nothing is lost."""
    if d is None:
        return f"{claim}: {TOO_FEW}"
    if d.verdict == "worse":
        return f"{claim}: {NOT_SHOWN}; difference {d}."
    return f"{claim}: {SHOWN}, as far as so few seeds can tell; difference {d}."


def frequencies(o: Outcome) -> list[str]:
    """The largest frequency against curvature at every step."""
    cells = o.tables["frequency"].cells
    (_, first), (_, last) = next(iter(cells)), list(cells)[-1]
    d = o.difference(cells["", last], cells["", first])
    return [no_loss(d, f"{o.task.title}: curvature every {last} steps costs no accuracy")]


def holds_up_to(o: Outcome, name: str) -> float | None:
    """Largest factor up to which the mean score is at least half of that at factor 1 and no seed diverged."""
    cells = {float(scale): runs for (row, scale), runs in o.tables["lr_scaling"].cells.items() if row == name}
    if not all(o.complete(runs) for runs in cells.values()) or 1.0 not in cells:
        return None
    base, best = mean(o.scores(cells[1.0])), None
    for scale in sorted(cells):
        scores = o.scores(cells[scale])
        if None in scores or mean(scores) < base / 2:
            break
        best = scale
    return best


def scaling(o: Outcome) -> list[str]:
    """Where each falls below half of its score at the tuned learning rate."""
    factors = {name: holds_up_to(o, name) for name in ("AdamW", OURS)}
    claim = "AdaHessian bears larger learning rates than AdamW"
    if None in factors.values():
        return [f"{claim}: not decided; runs are missing, or one fails at its own learning rate."]
    a, b = factors["AdamW"], factors[OURS]
    found = SHOWN if b > a else NOT_SHOWN if b == a else OPPOSITE
    largest = max(float(scale) for _, scale in o.tables["lr_scaling"].cells)
    texts = [f"{name} up to {x:g} times{' (the largest tried)' if x == largest else ''}" for name, x in factors.items()]
    return [f"{claim}: {found}; at least half of the score at the tuned rate, no seed diverged: {', '.join(texts)}."]


def blocks(o: Outcome) -> list[str]:
    """Spread over block sizes, and all of them against AdamW."""
    cells = o.tables["block_size"].cells
    adamw = o.tables["optimizers"].cells["AdamW", o.task.name]
    if not all(o.complete(runs) for runs in (*cells.values(), adamw)):
        return ["The block size matters little: not decided; runs are missing."]
    sign = 1 if o.task.higher_is_better else -1
    means = {column: sign * mean(o.scores(runs)) for (_, column), runs in cells.items()}
    best, worst = max(means, key=means.get), min(means, key=means.get)
    d = o.difference(cells[OURS, best], cells[OURS, worst])
    said = []
    if d is not None:
        found = NOT_SHOWN if d.verdict == "better" else SHOWN
        said.append(f"The block size matters little: {found}; best (b = {best}) against worst (b = {worst}): {d}.")
    below = [column for column, value in means.items() if value < sign * mean(o.scores(adamw))]
    text = f"**not shown** for b = {', '.join(below)}" if below else SHOWN
    said.append(f"No block size is worse than AdamW (by the means): {text}.")
    return said


def bags(o: Outcome) -> list[str]:
    """The ways against each other, where they should give the same."""
    cells = {label: runs for (label, _), runs in o.tables["bags"].cells.items()}
    pairs = (("curvature_friendly", "dense embeddings"), ("curvature_friendly, GELU", "finite differences"))
    said = []
    for a, b in pairs:
        d = o.difference(cells[a], cells[b])
        claim = f"{a} and {b} train alike"
        found = TOO_FEW if d is None else f"{SHOWN if d.verdict == 'even' else NOT_SHOWN}; difference {d}."
        said.append(f"{claim}: {found}")
    return said


def listed(sentences: Sequence[str]) -> str:
    """As bullets."""
    return "\n".join(f"* {sentence}" for sentence in sentences)
