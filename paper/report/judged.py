"""What is claimed, and whether these runs show it: sentences by rule, never by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..optimizers import CAUTIOUS, CHEAP, OURS, SIGNED
from ..plan import IN_TIME
from .outcome import Difference, Outcome, Runs

SHOWN, NOT_SHOWN, OPPOSITE = "**shown**", "**not shown**", "**the opposite**"
BETTER = {"better": SHOWN, "even": f"{NOT_SHOWN}, the interval contains zero", "worse": OPPOSITE}
SLACK = 1.1  # a run counts as one in AdamW's time if it takes at most this much longer


def judged(claim: str, d: Difference | None, words: Mapping[str, str] = BETTER) -> str:
    """Return a claim about a difference, and whether that shows it."""
    if d is None:
        return f"{claim}: not decided: fewer than two seeds have a score for both."
    return f"{claim}: {words[d.verdict]}; difference {d}."


def optimizers(o: Outcome) -> list[str]:
    """Each claim about two rows of the first table that are there."""
    cells = {name: runs for (name, _), runs in o.tables["optimizers"].items()}
    claims = [(OURS, "AdamW", "AdaHessian is better than AdamW"), (OURS, SIGNED, "averaging |D| is better than Eq. 7")]
    claims += [(OURS, "AdaGrad", "AdaHessian is better than Adagrad")]
    claims += [("AdamW", "SGD", "SGD is behind AdamW")] if o.stem in ("nmt", "lm") else []
    return [judged(f"{o.task.title}: {text}", o.difference(cells[a], cells[b])) for a, b, text in claims
            if a in cells and b in cells]  # fmt: skip


def holds_up_to(o: Outcome, name: str) -> float | None:
    """Largest factor up to which the mean score is at least half of that at factor 1 and no seed diverged."""
    cells = {float(scale): runs for (row, scale), runs in o.tables["lr_scaling"].items() if row == name}
    if not cells or not all(map(o.complete, cells.values())) or o.mean(cells[1.0]) is None:
        return None
    best = 1.0
    for scale in sorted(scale for scale in cells if scale > 1):
        if (o.mean(cells[scale]) or 0) < o.mean(cells[1.0]) / 2:
            break
        best = scale
    return best


def scaling(o: Outcome) -> str:
    """Table 4: where each falls below half of its score at the tuned learning rate."""
    claim, names = "AdaHessian bears larger learning rates than AdamW", ("AdamW", OURS)
    limits = [holds_up_to(o, name) for name in names]
    if None in limits:
        return f"{claim}: not decided; runs are missing, or one fails at its own learning rate."
    a, b = limits
    found = SHOWN if b > a else NOT_SHOWN if b == a else OPPOSITE
    texts = [f"{name} up to {limit:g} times" for name, limit in zip(names, limits, strict=True)]
    return f"{claim}: {found}; at least half of the score at the tuned rate, no seed diverged: {', '.join(texts)}."


def blocks(o: Outcome) -> list[str]:
    """Table 5: spread over block sizes, by kind of average."""
    said = []
    for name, rate in ((OURS, "each at its own rate"), (SIGNED, f"all at the rate of b = {o.task.block_size}")):
        cells = {column: runs for (row, column), runs in o.tables["block_size"].items() if row == name}
        claim = f"{name}, {rate}: the block size matters little"
        means = {column: o.mean(runs) for column, runs in cells.items()}
        if None in means.values() or len(means) < len(o.extent.block_sizes):
            said.append(f"{claim}: not decided; runs are missing or diverged.")
            continue
        low, high = min(means, key=means.get), max(means, key=means.get)
        best, worst = (high, low) if o.task.higher_is_better else (low, high)
        d = o.difference(cells[best], cells[worst])
        words = {"better": NOT_SHOWN, "even": f"{SHOWN}, as far as these seeds can tell", "worse": SHOWN}
        said.append(judged(f"{claim} (best b = {best}, worst b = {worst})", d, words))
    return said


def beside_adamw(o: Outcome, runs: Runs) -> Difference | None:
    """Compare runs of the grid over f and r with AdamW's of the same seeds."""
    return o.difference(runs, o.tables["optimizers"]["AdamW", ""][: len(runs)])


def frontier(outcomes: Sequence[Outcome]) -> list[str]:
    """How many settings of f and r the seeds tell from AdamW, and which are better in AdamW's time: task by task, and
    in two tasks or more.
    """
    said, wins = [], Counter()
    for o in outcomes:
        cells = {name: (o.cost(runs), beside_adamw(o, runs)) for name, runs in o.tables["frontier"].items()}
        known = {name: (cost, d) for name, (cost, d) in cells.items() if cost is not None and d is not None}
        verdicts = [d.verdict for _, d in known.values()]
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("better", "even", "worse"))
        short = {name: d for name, (cost, d) in known.items() if cost <= SLACK}
        better = [name for name, d in short.items() if d.verdict == "better"]
        wins.update(better)
        text = f"{o.task.title}: of {len(known)} settings {counts}; {len(short)} in AdamW's time, better of them: "
        text += _settings({name: f" ({short[name].mean:+.2f})" for name in better})
        best = max(short, key=lambda name: short[name].mean, default=None)
        said.append(text + (f". The best mean of them has f = {best[1]}, r = {best[0]}." if best else "."))
    twice = _settings(dict.fromkeys((name for name, n in wins.items() if n > 1), ""))
    return [*said, f"Better in AdamW's time in two tasks or more: {twice}."]


def _settings(notes: Mapping[tuple[str, str], str]) -> str:
    return "; ".join(f"f = {f}, r = {r}{note}" for (r, f), note in notes.items()) or "none"


# ---- when it pays ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A setting beside AdamW: its time over AdamW's, and the difference of the test scores; None where not known."""

    label: str
    runs: Runs
    cost: float | None
    gain: Difference | None

    @property
    def in_time(self) -> bool:
        """Whether it takes no longer than AdamW."""
        return self.cost is not None and self.cost <= SLACK

    @property
    def better(self) -> bool:
        """Whether the seeds can tell that it is."""
        return self.gain is not None and self.gain.verdict == "better"


def rows(o: Outcome) -> dict[str, Row]:
    """All settings of the first table whose runs are there."""
    cells = {label: runs for (label, _), runs in o.tables["optimizers"].items() if o.scores(runs)}
    adamw = cells.get("AdamW")
    if adamw is None:
        return {}
    return {
        label: Row(label, runs, o.cost(runs), None if label == "AdamW" else o.difference(runs, adamw))
        for label, runs in cells.items()
    }


def verdict(found: Mapping[str, Row]) -> str:
    """Whether the recipe or exact curvature pays in AdamW's time, and if not, whether it does in AdamW's steps."""
    ours = [row for name, row in found.items() if name.startswith(OURS) and name != SIGNED and row.gain is not None]
    if not ours:
        return "not decided: runs are missing."
    winners = [row for row in ours if row.better]
    for title, chosen in (("pays", [row for row in winners if row.in_time]), ("pays in steps, not in time", winners)):
        if chosen:
            best = max(chosen, key=lambda row: row.gain.mean)
            cost = "" if best.cost is None else f", in {best.cost:.2f} times AdamW's time"
            return f"**{title}**: {best.label} is better by {best.gain}{cost}."
    if all(row.gain.verdict == "worse" for row in ours):
        return "**stay with AdamW**: every setting of ours is worse."
    best = max(ours, key=lambda row: row.gain.mean)
    seen = f"no better, as far as these seeds can tell; the best is {best.label}, {best.gain}."
    return f"**even, so stay with AdamW**: {seen}"


def goal(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return what is asked of the recipe, counted over the tasks.

    It is to beat AdamW in AdamW's time in two tasks, to lose in none by more than the scatter of the seeds, and to
    diverge nowhere where AdamW does not.
    """
    known = {
        o: found for o in outcomes.values() if CHEAP in (found := rows(o)) and len(o.scores(found[CHEAP].runs)) > 1
    }
    if not known:
        return ["Not decided: runs are missing."]

    def those(holds: Callable[[Outcome, dict[str, Row]], bool]) -> str:
        return ", ".join(o.task.title for o, found in known.items() if holds(o, found)) or "none"

    def judges(label: str, word: str) -> str:
        return those(lambda _, found: label in found and (d := found[label].gain) is not None and d.verdict == word)

    def beside(word: str) -> str:
        pairs = {o: (found[CHEAP].runs, found[CAUTIOUS].runs) for o, found in known.items() if CAUTIOUS in found}
        return those(lambda o, _: o in pairs and (d := o.difference(*pairs[o])) is not None and d.verdict == word)

    short = CHEAP + IN_TIME
    winners = those(lambda _, found: short in found and found[short].in_time and found[short].better)
    diverged = those(lambda o, found: o.diverged(found[CHEAP].runs) > o.diverged(found["AdamW"].runs))
    return [
        f"Better than AdamW in AdamW's time: {winners}, of {len(known)} tasks.",
        f"Worse than AdamW in AdamW's time: {judges(short, 'worse')}.",
        f"Better than AdamW in AdamW's steps: {judges(CHEAP, 'better')}.",
        f"Worse than AdamW in AdamW's steps: {judges(CHEAP, 'worse')}.",
        f"Diverged in more seeds than AdamW: {diverged}.",
        f"Beside *{CAUTIOUS}*, in as many steps: better in {beside('better')}; worse in {beside('worse')}.",
    ]
