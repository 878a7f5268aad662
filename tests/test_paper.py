"""``make paper``: a step of every experiment, results that are kept, the plan and the report."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from tolerances import assert_trajectory

for module in ("sklearn", "scipy", "matplotlib", "rich", "sacrebleu"):
    pytest.importorskip(module)

from paper import __main__ as program  # noqa: E402 - without its packages there is nothing to test
from paper import schedules  # noqa: E402
from paper.optimizers import OURS, make, stepper  # noqa: E402
from paper.plan import FULL, QUICK, around, comparisons, nominal_cost, refinement, tuning  # noqa: E402
from paper.report import effects, paper_page, pays_page, tables, write  # noqa: E402
from paper.report.outcome import Outcome  # noqa: E402
from paper.report.statistics import cell, difference  # noqa: E402
from paper.results import OtherSettingsError, Results  # noqa: E402
from paper.run import Run, Setup  # noqa: E402
from paper.tasks import EXPERIMENTS, MAKERS, RULES, Spec  # noqa: E402
from paper.tasks import make as make_task  # noqa: E402
from paper.training import thin, train  # noqa: E402

TASKS = ("resnet20", "nmt", "lm", "polarity", "recsys")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Tasks by name, with next to no pre-training."""
    folder = tmp_path_factory.mktemp("paper")

    def get(name: str):
        found = make_task(Spec(name, MAKERS[name][1][0], folder=folder))
        found.pretraining_steps = 1
        found.prepare()
        return found

    return get


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_step_of_every_experiment(task, name):
    record = train(task(name), Run(Setup(OURS), 0.01, seed=0, steps=1))
    assert all(math.isfinite(score) for score in record["scores"].values())
    assert [step for step, _ in record["train"]] == [1]
    assert [step for step, _ in record["validation"]] == [1]
    json.dumps(record)


SETUPS = (
    *(Setup(name) for name in ("SGD", "AdaGrad", "AdamW", OURS)),
    Setup(OURS, {"update_each": 5, "hessian_fraction": 0.25}),
    Setup(OURS, variant="dense"),
    Setup(OURS, {"hvp": "finite_difference"}, "gelu"),
)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.key)
def test_every_setting_learns(task, setup):
    """The loss of one and the same batch falls; the same run again gives the same losses."""
    recsys = task("recsys")
    batch = next(recsys.batches(0))

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = recsys.model(setup.variant)
        lr = 0.02 if setup.options else 0.1 if setup.optimizer in ("SGD", OURS) else 0.01
        step = stepper(make(setup, lr, 0, recsys, model.parameters()), lambda *b: recsys.loss(model, *b))
        return [float(step(batch)) for _ in range(12)]

    found = losses()
    assert found[-1] < 0.95 * found[0]
    assert found == losses()


def test_embedding_bags_and_dense_embeddings_take_the_same_step(task):
    recsys = task("recsys")
    batch = tuple(t.double() if t.is_floating_point() else t for t in next(recsys.batches(0)))
    weights = []
    for variant in ("", "dense"):
        torch.manual_seed(0)
        model = recsys.model(variant).double()
        stepper(make(Setup(OURS), 0.1, 0, recsys, model.parameters()), lambda *b, m=model: recsys.loss(m, *b))(batch)
        weights.append(list(model.parameters()))
    assert_trajectory(*weights, steps=1)


def test_divergence_is_recorded_and_ends_the_run(task):
    record = train(task("recsys"), Run(Setup("SGD"), 1e30, seed=0, steps=20))
    assert record["diverged"]
    assert record["scores"] == {"validation": None, "test": None}
    assert len(record["train"]) < 20
    assert "NaN" not in json.dumps(record)


def test_thinned_curves_keep_the_mean():
    values = [float(i) for i in range(100)]
    points = thin(values, 30)
    assert len(points) <= 30
    assert points[0] == [4, 1.5]
    assert points[-1][0] == 100


@pytest.mark.parametrize("schedule", [schedules.inverse_sqrt, schedules.cosine, schedules.linear, schedules.constant])
def test_schedules_warm_up_and_fall(schedule):
    factors = [schedule((i + 0.5) / 100) for i in range(100)]
    top = factors.index(max(factors))
    assert 0 < factors[0] < 0.1
    assert 9 <= top <= 15
    assert max(factors) == pytest.approx(1, abs=0.06)
    assert factors[top:] == sorted(factors[top:], reverse=True)


# ---- plan and results ------------------------------------------------------------------------------------------------


def test_every_optimizer_has_as_many_trials(task):
    for name in TASKS:
        trials = tuning(task(name), FULL)
        assert len({len(runs) for runs in trials.values()}) == 1
        more = refinement(task(name), FULL, {optimizer: runs[0].lr for optimizer, runs in trials.items()})
        assert {len(runs) for runs in more.values()} == {2}
        seeds = {run.seed for found in (trials, more) for runs in found.values() for run in runs}
        assert not seeds & set(FULL.seeds)


@pytest.mark.parametrize(("best", "expected"), [(0.1, (0.033, 0.17)), (0.3, (0.17, 0.55)), (1.0, (0.55, 3.3))])
def test_trials_around_the_best_of_a_grid(best, expected):
    assert around(best, (0.1, 0.3, 1.0)) == expected


def test_nominal_cost():
    assert nominal_cost({}) == 3
    assert nominal_cost({"update_each": 5}) == pytest.approx(1.4)
    assert nominal_cost({"update_each": 5, "hessian_fraction": 0.25}) == pytest.approx(1.1)


SETTINGS = {
    "name": "nmt",
    "title": "translation",
    "data": "invented",
    "metric": "BLEU",
    "higher_is_better": True,
    "parameters": 7,
    "steps": 100,
    "block_size": 32,
    "tables": ["optimizers", "frequency", "lr_scaling", "block_size", "bags", "cheap"],
    "learning_rates": {"SGD": [0.1, 1.0], "AdamW": [0.01, 0.1], OURS: [0.1, 0.3]},
    "tuned_on": None,
}
GRID_ONLY = replace(FULL, refine=False)
STEP_TIMES = {"SGD": 1.0, "AdamW": 1.0, OURS: 3.0}


def record(score: float | None, loss: float = 1.0) -> dict:
    """What :func:`paper.training.train` returns."""
    return {
        "train": [[50, 2.0], [100, loss]],
        "validation": [[50, 2.0], [100, loss]],
        "scores": {"validation": score, "test": score},
        "diverged": score is None,
        "cpu_seconds": 1.0,
    }


@pytest.fixture
def invent(tmp_path):
    """An outcome in which every run has the score that a function of it says."""

    def made(score, extent=GRID_ONLY, **settings) -> Outcome:
        results = Results(tmp_path / "nmt.json", SETTINGS | settings)
        outline = type("Outline", (), results.settings)
        for _ in ("grid", "around its best"):
            for run in itertools.chain(*results.trials(outline, extent).values()):
                results.runs[run.key] = described(run, record(-run.lr))
        lrs = results.best_lrs(outline, extent)
        for table in comparisons(outline, lrs, extent):
            for run in table.runs():
                results.runs[run.key] = described(run, record(score(run)))
                options = run.setup.options
                cost = STEP_TIMES[run.setup.optimizer] if not options else nominal_cost(options)
                results.step_times[run.setup.key] = {"median": cost * 1e-3, "wall": cost * 1.1e-3}
        results.write()
        return Outcome(results.path, extent)

    return made


def described(run: Run, found: dict) -> dict:
    """As :meth:`Results.add` keeps it."""
    setup = {"optimizer": run.setup.optimizer, "options": dict(run.setup.options), "variant": run.setup.variant}
    return {**setup, "lr": run.lr, "steps": run.steps, "seed": run.seed, **found}


def test_results_are_kept_and_other_settings_refused(tmp_path):
    results = Results(tmp_path / "a.json", SETTINGS)
    run = Run(Setup(OURS, {"update_each": 2}), 0.1, 0, 100)
    other = replace(run, seed=1)
    results.add(run, record(1.0))
    again = Results(tmp_path / "a.json", SETTINGS)
    assert again.missing([run, other]) == [other]
    assert again.runs[run.key] == described(run, record(1.0))
    with pytest.raises(OtherSettingsError, match=r"other settings \(steps\).*--out"):
        Results(tmp_path / "a.json", SETTINGS | {"steps": 7})


def test_learning_rates_are_those_with_the_best_validation_score(tmp_path):
    results = Results(tmp_path / "a.json", SETTINGS)
    outline = type("Outline", (), SETTINGS)
    scores = {0.1: 3.0, 1.0: None, 0.01: 2.0, 0.3: 5.0}
    assert results.best_lrs(outline, GRID_ONLY) is None
    for run in itertools.chain(*results.trials(outline, GRID_ONLY).values()):
        results.add(run, record(scores[run.lr]))
    assert results.best_lrs(outline, GRID_ONLY) == {"SGD": 0.1, "AdamW": 0.1, OURS: 0.3}
    outline.higher_is_better = False
    assert results.best_lrs(outline, GRID_ONLY) == {"SGD": 0.1, "AdamW": 0.01, OURS: 0.1}

    outline.higher_is_better = True
    assert results.best_lrs(outline, FULL) is None
    around_them = {"SGD": (0.01, 0.32), "AdamW": (0.032, 1.0), OURS: (0.17, 0.9)}
    for name, runs in results.trials(outline, FULL).items():
        assert tuple(run.lr for run in runs[2:]) == around_them[name]
        for run in results.missing(runs):
            results.add(run, record(6.0 if run.lr in (0.32, 0.17) else 1.0))
    assert results.best_lrs(outline, FULL) == {"SGD": 0.32, "AdamW": 0.1, OURS: 0.17}


# ---- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ([1.0, 2.0, 3.0], "2.00 ± 1.00"),
        ([1.0, None, 3.0], "2.00 ± 1.41 (1 of 3 diverged)"),
        ([None] * 3, "diverged"),
        ([1.0], "1.00 (1 of 3 seeds)"),
        ([], "-"),
    ],
)
def test_cells(scores, text):
    assert cell(scores, 3) == text


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [((1.0, 1.1, 0.9), "better"), ((-1.0, -1.1, -0.9), "worse"), ((1.0, 1.1, -0.9), "even"), ((0.0,) * 3, "even")],
)
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_differences(gains, verdict, higher_is_better):
    sign = 1 if higher_is_better else -1
    base = [5.0, 7.0, 6.0]
    d = difference([b + sign * g for b, g in zip(base, gains, strict=True)], base, higher_is_better=higher_is_better)
    assert d.verdict == verdict


def test_student_interval():
    """Half the width is 4.303 standard errors for three seeds."""
    d = difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], higher_is_better=True)
    assert d.high - d.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)


def ours_minus_adamw(gap: float):
    """Scores with ours better by ``gap`` than AdamW, SGD far behind; seeds differ a little."""
    base = {"SGD": 10.0, "AdamW": 20.0, OURS: 20.0 + gap}
    return lambda run: base[run.setup.optimizer] + run.seed + (0.01 * run.seed if run.setup.optimizer == OURS else 0)


@pytest.mark.parametrize(("gap", "found"), [(2, "**shown**"), (-0.01, "**not shown**"), (-2, "**the opposite**")])
def test_the_report_says_whether_the_effect_is_shown(invent, gap, found):
    said = effects.optimizers(invent(ours_minus_adamw(gap)))
    assert said[0].startswith(f"translation: AdaHessian is better than AdamW: {found}")
    assert said[1].startswith("translation: SGD is behind AdamW: **shown**")


@pytest.mark.parametrize(
    ("limits", "found"), [((4, 20), "**shown**"), ((6, 6), "**not shown**"), ((10, 2), "**the opposite**")]
)
@pytest.mark.parametrize("fails_with", [1.0, None])
def test_largest_learning_rates(invent, limits, found, fails_with):
    limit = dict(zip(("AdamW", OURS), limits, strict=True))
    tuned = {"AdamW": 0.01, OURS: 0.1, "SGD": 0.1}

    def score(run: Run) -> float | None:
        scale = run.lr / tuned[run.setup.optimizer]
        return 20.0 if scale <= limit.get(run.setup.optimizer, 1) * 1.01 else fails_with

    (said,) = effects.scaling(invent(score))
    assert found in said
    assert f"AdamW up to {limits[0]} times" in said
    assert f"AdaHessian up to {limits[1]} times" in said


def test_block_sizes_that_matter_are_named(invent):
    outcome = invent(
        lambda run: 10.0 + run.seed if run.setup.options.get("block_size") == 64 else 20.0 + 1.1 * run.seed
    )
    little, adamw = effects.blocks(outcome)
    assert "**not shown**" in little
    assert "worst (b = 64)" in little
    assert "**not shown** for b = 64" in adamw


@pytest.mark.parametrize(("loss", "found"), [(0.0, "**shown**"), (3.0, "**not shown**")])
def test_frequency(invent, loss, found):
    outcome = invent(lambda run: 20.0 + run.seed * 1.1 - loss * (run.setup.options.get("update_each", 1) - 1))
    assert found in effects.frequencies(outcome)[0]
    lines = tables.frequencies([outcome]).splitlines()
    assert lines[0] == "| Hutchinson frequency | 1 | 2 | 3 | 4 | 5 |"
    measured = next(line for line in lines if "measured cost (x SGD)" in line)
    assert measured.endswith("| 3.00 | 2.00 | 1.67 | 1.50 | 1.40 |")


def test_pages(invent, tmp_path):
    invent(ours_minus_adamw(2))
    written = write(tmp_path, tmp_path / "docs", GRID_ONLY)
    assert [path.name for path in written] == ["paper.md", "when_does_it_pay.md"]
    paper, pays = ((tmp_path / "docs" / name).read_text() for name in ("paper.md", "when_does_it_pay.md"))
    assert "| AdaHessian | 23.01 ± 1.01 | 35.79 ± .06 |" in paper
    assert "The smallest or the largest that was tried" in paper
    assert "translation (" not in paper
    assert "**Not finished:** resnet20 (tuning)" in paper  # of the others there is no file
    for name in ("nmt", "nmt-sensitivity", "time"):
        assert (tmp_path / "docs" / "paper" / f"{name}.png").stat().st_size > 4_000
    assert "transformers (translation): **pays**: in AdamW's time" in pays
    assert "AdaHessian, every 5 steps, from 1/4" in pays


def test_when_it_does_not_pay(invent):
    def in_steps_only(run: Run) -> float:
        cheap = bool(run.setup.options) or run.steps < SETTINGS["steps"]
        return ours_minus_adamw(-2 if cheap else 2)(run)

    for score, found in (
        (in_steps_only, "**pays in steps, not in time**"),
        (ours_minus_adamw(-2), "**stay with AdamW**"),
    ):
        assert f"(translation): {found}" in pays_page.page([invent(score)])


def test_a_report_of_half_of_the_runs_says_so(invent):
    outcome = invent(ours_minus_adamw(2))
    for key in [key for key in outcome.results.runs if key.startswith(OURS) and not key.endswith(("=100", "seed=1"))]:
        del outcome.results.runs[key]
    paper = paper_page.page({"nmt": outcome})
    assert "**Not finished:** translation (" in paper
    assert "not decided: fewer than two seeds" in paper


def test_scores_are_compared_seed_by_seed(invent):
    """With the first seed of one side missing, the others are not paired with their neighbours."""
    outcome = invent(lambda run: 10.0 * run.seed + (run.setup.optimizer == OURS) * (1 + 0.1 * run.seed))
    ours, adamw = (outcome.tables["optimizers"].cells[name, "nmt"] for name in (OURS, "AdamW"))
    del outcome.results.runs[adamw[0].key]
    assert outcome.difference(ours, adamw).mean == pytest.approx(1.15)


# ---- the program -----------------------------------------------------------------------------------------------------


def test_every_experiment_has_data_of_its_own():
    args = program.parse(["--quick"])
    names = [spec.name for spec in program.specs(args)]
    assert names == ["resnet20", "resnet32", "nmt", "lm", *RULES, "recsys"]
    assert set(EXPERIMENTS) == {"cv", "nmt", "lm", "nlu", "recsys"}
    assert QUICK.steps < 10


def test_data_of_another_experiment(capsys):
    assert program.main(["lm", "--data", "cifar10"]) == 1
    assert "--data cifar10 is not for lm" in capsys.readouterr().err


def test_missing_data(tmp_path, capsys):
    assert program.main(["nmt", "--data", "iwslt14", "--root", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "has no train.de" in capsys.readouterr().err
