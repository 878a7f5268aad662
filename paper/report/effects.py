"""What the paper claims and whether these runs show it: sentences by rule, never by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..optimizers import OURS
from .outcome import Outcome
from .statistics import Difference, mean

SHOWN, NOT_SHOWN, OPPOSITE = "**shown**", "**not shown**", "**the opposite**"
BETTER = {"better": SHOWN, "even": f"{NOT_SHOWN}, the interval contains zero", "worse": OPPOSITE}
NO_WORSE = dict.fromkeys(("better", "even"), f"{SHOWN}, as far as so few seeds can tell") | {"worse": NOT_SHOWN}
ALIKE = {"better": NOT_SHOWN, "even": SHOWN, "worse": NOT_SHOWN}


def judged(claim: str, d: Difference | None, words: Mapping[str, str]) -> str:
    """A claim about a difference, and whether that shows it."""
    if d is None:
        return f"{claim}: not decided: fewer than two seeds have a score for both."
    return f"{claim}: {words[d.verdict]}; difference {d}."


def optimizers(o: Outcome) -> list[str]:
    """AdaHessian against AdamW (and Adagrad), AdamW against SGD."""
    cells = {name: runs for (name, _), runs in o.tables["optimizers"].cells.items()}
    claims = [(OURS, "AdamW", "AdaHessian is better than AdamW", BETTER)]
    if "AdaGrad" in cells:
        claims.append((OURS, "AdaGrad", "AdaHessian is better than Adagrad", BETTER))
    if o.stem in ("nmt", "lm"):
        claims.append(("AdamW", "SGD", "SGD is behind AdamW", BETTER))
    if o.stem.startswith("resnet"):
        claims.append((OURS, "SGD", "AdaHessian is no worse than SGD", NO_WORSE))
    return [judged(f"{o.task.title}: {text}", o.difference(cells[a], cells[b]), w) for a, b, text, w in claims]


def frequencies(o: Outcome) -> list[str]:
    """The largest frequency against curvature at every step."""
    cells = o.tables["frequency"].cells
    (_, first), (_, last) = next(iter(cells)), list(cells)[-1]
    claim = f"{o.task.title}: curvature every {last} steps costs no accuracy"
    return [judged(claim, o.difference(cells["", last], cells["", first]), NO_WORSE)]


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
    return [judged(f"{a} and {b} train alike", o.difference(cells[a], cells[b]), ALIKE) for a, b in pairs]


def listed(sentences: Sequence[str]) -> str:
    """As bullets."""
    return "\n".join(f"* {sentence}" for sentence in sentences)
