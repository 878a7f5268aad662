"""``make paper``: a step of every experiment, results that are kept, the plan and the report."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

for module in ("sklearn", "scipy", "matplotlib", "rich", "sacrebleu"):
    pytest.importorskip(module)

from paper import __main__ as program  # noqa: E402 - without its packages there is nothing to test
from paper import schedules  # noqa: E402
from paper.optimizers import CHEAP, EXACT, OURS, SETUPS, SIGNED, SOPHIA, make, stepper  # noqa: E402
from paper.plan import FULL, QUICK, Extent, Planner, around, runs_of  # noqa: E402
from paper.report import judged, paper, pays, tables, write  # noqa: E402
from paper.report.outcome import Outcome, difference  # noqa: E402
from paper.results import OtherSettingsError, Results  # noqa: E402
from paper.run import Run, Setup  # noqa: E402
from paper.tasks import MAKERS, Spec  # noqa: E402
from paper.tasks import make as make_task  # noqa: E402
from paper.training import thin, train  # noqa: E402

TASKS = ("resnet20", "nmt", "lm", "acceptability", "recsys")


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
    record = train(task(name), Run(SETUPS[OURS], 0.01, seed=0, steps=1))
    assert all(math.isfinite(score) for score in record["scores"].values())
    assert [step for step, _ in record["train"]] == [1]
    assert [step for step, _ in record["validation"]] == [1]
    json.dumps(record)


def test_the_gpt_begins_with_a_guess_among_all_bytes(task):
    gpt = task("gpt")
    loss = gpt.loss(gpt.model(), *next(gpt.batches(0)))
    assert loss.item() == pytest.approx(math.log(256), rel=0.2)


@pytest.mark.parametrize("name", [*SETUPS, "from a quarter"])
def test_every_setting_learns(task, name):
    """The loss of one and the same batch falls; the same run again gives the same losses."""
    setup = SETUPS.get(name, Setup(OURS, {**EXACT, "update_each": 5, "hessian_fraction": 0.25}))
    recsys = task("recsys")
    batch = next(recsys.batches(0))

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = recsys.model()
        lr = 0.1 if setup.optimizer in ("SGD", OURS) else 0.01
        step = stepper(make(setup, lr, 0, recsys, model.parameters()), lambda *b: recsys.loss(model, *b))
        return [float(step(batch)) for _ in range(12)]

    found = losses()
    assert found[-1] < 0.97 * found[0]
    assert found == losses()


@pytest.mark.parametrize("name", [SIGNED, OURS, CHEAP, SOPHIA])
def test_plans_count_the_curvature_that_is_computed(task, name):
    """The Hessian steps that a plan counts on are those that the optimizer makes."""
    recsys = task("recsys")
    model = recsys.model()
    opt = make(SETUPS[name], 0.01, 0, recsys, model.parameters())
    step, batches = stepper(opt, lambda *b: recsys.loss(model, *b)), recsys.batches(0)
    for _ in range(32):
        step(next(batches))
    assert opt.statistics().hessian_step == SETUPS[name].hessian_steps(32)


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


@pytest.mark.parametrize("name", [*TASKS, "gpt"])
def test_every_setting_has_as_many_trials(task, name):
    planner = Planner(task(name), FULL)
    for table in task(name).tables:
        trials = {}
        for setting, setup in planner.settings(table).items():
            grid = planner.trials(setting, setup)
            trials[setting] = [*grid, *planner.trials(setting, setup, grid[0].lr)]
        assert {len(runs) for runs in trials.values()} == {6}
        assert not {run.seed for runs in trials.values() for run in runs} & set(FULL.seeds)


@pytest.mark.parametrize(("best", "expected"), [(0.1, (0.033, 0.17)), (0.3, (0.17, 0.55)), (1.0, (0.55, 3.3))])
def test_trials_around_the_best_of_a_grid(best, expected):
    assert around(best, (0.1, 0.3, 1.0)) == expected


def test_cost_in_first_order_steps():
    assert SETUPS["AdamW"].cost(100) == 100
    assert SETUPS[OURS].cost(100) == 300
    assert SETUPS[CHEAP].cost(100) == 100 + 2 * (20 + 8)
    assert Setup(OURS, {**EXACT, "update_each": 5, "warmup": 0, "hessian_fraction": 0.25}).cost(100) == 110


SETTINGS = {
    "name": "nmt",
    "title": "translation",
    "data": "invented",
    "metric": "BLEU",
    "higher_is_better": True,
    "parameters": 7,
    "steps": 100,
    "tuning_steps": 100,
    "block_size": 32,
    "tables": ["optimizers", "lr_scaling", "block_size", "frontier"],
    "learning_rates": {"SGD": [0.1, 1.0], "AdamW": [0.01, 0.1], **{name: [0.1, 0.3] for name in (SIGNED, OURS, CHEAP)}},
}
GRID_ONLY = replace(FULL, refine=False, seeds=(0, 1, 2))
STEP_TIMES = {"SGD": 1.0, "AdamW": 1.0, "without curvature": 1.0} | {
    f"curvature, r = {r:g}": 1 + 2 * r for r in FULL.fractions
}


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

    def made(score, extent: Extent = GRID_ONLY, **settings) -> Outcome:
        results = Results(tmp_path / "nmt.json", SETTINGS | settings)
        planner = Planner(type("Outline", (), results.settings), extent)
        for table in results.settings["tables"]:
            for run in itertools.chain(*results.trials(planner, table).values()):
                results.runs[run.key] = described(run, record(-run.lr))
            lrs = results.best_lrs(planner, table)
            for run in runs_of([Planner(planner.task, extent, lrs).table(table)]):
                results.runs[run.key] = described(run, record(score(run)))
        results.step_times = {name: {"median": t * 1e-3, "wall": t * 1.1e-3} for name, t in STEP_TIMES.items()}
        results.write()
        return Outcome(results.path, extent)

    return made


def described(run: Run, found: dict) -> dict:
    """As :meth:`Results.add` keeps it."""
    setup = {"optimizer": run.setup.optimizer, "options": dict(run.setup.options)}
    return {**setup, "lr": run.lr, "steps": run.steps, "seed": run.seed, "commit": "abc", **found}


def test_results_are_kept_and_other_settings_refused(tmp_path):
    results = Results(tmp_path / "a.json", SETTINGS)
    results.machine = {"commit": "abc"}
    run = Run(Setup(OURS, {"update_each": 2}), 0.1, 0, 100)
    other = replace(run, seed=1)
    results.add(run, record(1.0))
    again = Results(tmp_path / "a.json", SETTINGS)
    assert again.missing([run, other]) == [other]
    assert again.runs[run.key] == described(run, record(1.0))
    with pytest.raises(OtherSettingsError, match=r"other settings \(steps\).*--out"):
        Results(tmp_path / "a.json", SETTINGS | {"steps": 7})


def test_learning_rates_are_those_with_the_best_validation_score(tmp_path):
    results = Results(tmp_path / "a.json", SETTINGS | {"tables": ["lr_scaling"]})
    outline = type("Outline", (), results.settings)
    grid, full = Planner(outline, GRID_ONLY), Planner(outline, FULL)
    scores = {0.1: 3.0, 0.01: None, 0.3: 5.0}
    assert results.best_lrs(grid, "lr_scaling") == {}
    for run in itertools.chain(*results.trials(grid, "lr_scaling").values()):
        results.add(run, record(scores[run.lr]))
    assert results.best_lrs(grid, "lr_scaling") == {"AdamW": 0.1, OURS: 0.3}
    outline.higher_is_better = False
    assert results.best_lrs(grid, "lr_scaling") == {"AdamW": 0.1, OURS: 0.1}

    outline.higher_is_better = True
    assert results.best_lrs(full, "lr_scaling") == {}
    around_them = {"AdamW": (0.032, 1.0), OURS: (0.17, 0.9)}
    for name, runs in results.trials(full, "lr_scaling").items():
        assert tuple(run.lr for run in runs[2:]) == around_them[name]
        for run in results.missing(runs):
            results.add(run, record(6.0 if run.lr in (0.032, 0.17) else 1.0))
    assert results.best_lrs(full, "lr_scaling") == {"AdamW": 0.032, OURS: 0.17}
    outline.tuning_steps = 10  # trials that are shorter than runs: the grid alone
    assert {run.steps for runs in results.trials(Planner(outline, FULL), "lr_scaling").values() for run in runs} == {10}


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
def test_cells(invent, scores, text):
    outcome = invent(lambda run: scores[run.seed] if run.seed < len(scores) else 0.0)
    runs = outcome.tables["optimizers"]["AdamW", ""]
    for run in runs[len(scores) :]:
        del outcome.results.runs[run.key]
    assert outcome.cell(runs) == text


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [((1.0, 1.1, 0.9), "better"), ((-1.0, -1.1, -0.9), "worse"), ((1.0, 1.1, -0.9), "even"), ((0.0,) * 3, "even")],
)
def test_differences(gains, verdict):
    assert difference(gains).verdict == verdict


def test_student_interval():
    """Half the width is 4.303 standard errors for three seeds."""
    d = difference([1.0, 2.0, 3.0])
    assert d.high - d.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert difference([1.0]) is None


def gaining(**gaps: float):
    """Scores of 20, SGD's of 10, with a gap to it; seeds differ a little.

    ``exact``, ``cheap`` and ``signed`` are gaps of settings, ``short`` one more of runs with fewer steps.
    """

    def score(run: Run) -> float:
        options = run.setup.options
        kind = (
            "signed"
            if options.get("averaging") == "signed"
            else "cheap"
            if options.get("update_each", 1) > 1
            else "exact"
        )
        gap = gaps.get(kind, 0) if options else 0
        gap += gaps.get("short", 0) if run.steps < SETTINGS["steps"] else 0
        return (10.0 if run.setup.optimizer == "SGD" else 20.0) + gap + run.seed + (0.01 * run.seed if options else 0)

    return score


@pytest.mark.parametrize(("gap", "found"), [(2, "**shown**"), (-0.01, "**not shown**"), (-2, "**the opposite**")])
def test_the_report_says_whether_the_effect_is_shown(invent, gap, found):
    ours, average, sgd = judged.optimizers(invent(gaining(exact=gap)))
    assert ours.startswith(f"translation: AdaHessian is better than AdamW: {found}")
    assert ("**the opposite**" in average) == (gap < 0)
    assert sgd.startswith("translation: SGD is behind AdamW: **shown**")


@pytest.mark.parametrize(("higher", "found"), [(True, "better"), (False, "worse")])
def test_smaller_is_better_for_some_scores(invent, higher, found):
    outcome = invent(gaining(exact=2), higher_is_better=higher)
    cells = outcome.tables["optimizers"]
    assert outcome.difference(cells[OURS, ""], cells["AdamW", ""]).verdict == found


@pytest.mark.parametrize(
    ("limits", "found"), [((2, 10), "**shown**"), ((4, 4), "**not shown**"), ((10, 2), "**the opposite**")]
)
@pytest.mark.parametrize("fails_with", [1.0, None])
def test_largest_learning_rates(invent, limits, found, fails_with):
    limit = dict(zip(("AdamW", OURS), limits, strict=True))
    tuned = {"AdamW": 0.01, OURS: 0.1}

    def score(run: Run) -> float | None:
        scale = run.lr / tuned.get(run.setup.optimizer, run.lr)
        return 20.0 if scale <= limit.get(run.setup.optimizer, 1) * 1.01 else fails_with

    said = judged.scaling(invent(score))
    assert found in said
    assert f"AdamW up to {limits[0]} times" in said
    assert f"AdaHessian up to {limits[1]} times" in said


def test_block_sizes_that_matter_are_named(invent):
    outcome = invent(lambda run: 9.0 + run.seed if run.setup.options.get("block_size") == 4 else 20.0 + 1.1 * run.seed)
    ours, signed = judged.blocks(outcome)
    assert "worst b = 4): **not shown**" in ours
    assert "worst b = 4): **not shown**" in signed
    assert "**shown**" in judged.blocks(invent(gaining()))[0]
    assert tables.blocks(outcome).splitlines()[0] == "| block size | 1 | 4 | 32 | 128 |"


def test_frontier(invent):
    lines = tables.frontier(invent(gaining(cheap=-3))).splitlines()
    assert lines[0] == "| translation; f = | 1 | 2 | 5 | 10 | 20 |"
    assert lines[2].startswith("| r = 1: BLEU | 21.01 ± 1.01 | 18.01 ± 1.01 |")
    # 100 steps, the first 20 of them and every f-th with curvature.
    assert lines[3] == "| against AdamW | even, +0.01 | worse, -2.99 | worse, -2.99 | worse, -2.99 | worse, -2.99 |"
    assert lines[4] == "| time / AdamW's | 3.00 | 2.20 | 1.72 | 1.56 | 1.48 |"


@pytest.mark.parametrize(
    ("gap", "times", "found"),
    [
        (2, {}, "20 better, 0 even, 0 worse; 3 in AdamW's time, better of them: f = 5, r = 0.125 (+2.01); f = 10,"),
        (-2, {}, "0 better, 0 even, 20 worse; 3 in AdamW's time, better of them: none. The best"),
        (2, {"without curvature": 2.0}, "20 better, 0 even, 0 worse; 0 in AdamW's time, better of them: none."),
    ],
)
def test_what_the_grid_over_frequency_and_fraction_shows(invent, gap, times, found):
    outcome = invent(gaining(exact=gap, cheap=gap))
    outcome.results.step_times |= {name: {"median": 1e-3 * t, "wall": 1e-3 * t} for name, t in times.items()}
    task, both = judged.frontier([outcome, outcome])[::2]
    assert task.startswith(f"translation: of 20 settings {found}")
    assert both.startswith(f"Better in AdamW's time in two tasks or more: {'f = 5' if ': f = 5' in found else 'none'}")


def test_pages(invent, tmp_path):
    invent(gaining(exact=2, cheap=2))
    written = write(tmp_path, tmp_path / "docs", GRID_ONLY)
    assert [path.name for path in written] == ["paper.md", "when_does_it_pay.md"]
    paper_page, pays_page = (path.read_text() for path in written)
    assert "| AdaHessian | 23.01 ± 1.01 | 35.79 ± .06 |" in paper_page
    assert "The smallest or the largest that was tried" in paper_page
    assert "**Not finished:** lm, acceptability" in paper_page  # there is no file of the others
    for name in ("frontier", "time"):
        assert (tmp_path / "docs" / "paper" / f"{name}.png").stat().st_size > 4_000
    assert "translation: **pays**: " in pays_page
    assert "Better than AdamW in AdamW's time: translation, of 1 tasks." in pays_page


@pytest.mark.parametrize(
    ("gaps", "found"),
    [
        ({"exact": 2, "cheap": 2}, "**pays**"),
        ({"exact": 2, "short": -4}, "**pays in steps, not in time**"),
        ({}, "**even"),
        ({"exact": -2, "cheap": -2}, "**stay with AdamW**"),
    ],
)
def test_when_it_pays(invent, gaps, found):
    assert f"translation: {found}" in pays({"nmt": invent(gaining(**gaps))})


def test_divergence_is_named(invent):
    assert "Worse than AdamW in AdamW's time: translation." in pays({"nmt": invent(gaining(short=-4))})
    said = pays({"nmt": invent(lambda run: None if run.setup.options.get("update_each") == 10 else 20.0 + run.seed)})
    assert "Diverged in more seeds than AdamW: translation." in said
    assert "AdaHessian, cheap (3 of 3 seeds)" in said


def test_a_perplexity_without_bound_is_not_averaged(invent):
    outcome = invent(gaining(), metric="perplexity", higher_is_better=False)
    runs = outcome.tables["optimizers"]["SGD", ""]
    outcome.results.runs[runs[0].key] |= {"diverged": True, "scores": {"validation": 1e43, "test": 1e43}}
    assert outcome.cell(runs) == "11.5 ± 0.7 (1 of 3 diverged)"


def test_a_report_of_half_of_the_runs_says_so(invent):
    outcome = invent(gaining(exact=2))
    for key in [key for key in outcome.results.runs if key.startswith(OURS) and not key.endswith(("=100", "seed=1"))]:
        del outcome.results.runs[key]
    said = paper({"nmt": outcome})
    assert "**Not finished:** translation (" in said
    assert "not decided: fewer than two seeds" in said


def test_a_report_of_half_of_the_trials_says_so(invent):
    outcome = invent(gaining())
    block = Planner(outcome.task, GRID_ONLY).settings("block_size")[f"{OURS}, b = 4"]
    keys = [key for key in outcome.results.runs if key.startswith(f"{block.key} lr") and key.endswith("=100")]
    for key in keys:
        del outcome.results.runs[key]
    outcome.results.write()
    found = Outcome(outcome.results.path, GRID_ONLY)
    assert found.done() == f"tuning of {OURS}, b = 4"
    assert f"| {OURS} | 21.01 ± 1.01 | - | 21.01 ± 1.01 |" in tables.blocks(found)
    assert "not decided" in judged.blocks(found)[0]


def test_scores_are_compared_seed_by_seed(invent):
    """With the first seed of one side missing, the others are not paired with their neighbours."""
    outcome = invent(lambda run: 10.0 * run.seed + (run.setup.optimizer == OURS) * (1 + 0.1 * run.seed))
    ours, adamw = (outcome.tables["optimizers"][name, ""] for name in (OURS, "AdamW"))
    del outcome.results.runs[adamw[0].key]
    assert outcome.difference(ours, adamw).mean == pytest.approx(1.15)


def test_the_committed_pages_are_those_of_the_committed_results(tmp_path):
    """``make paper ARGS=--report-only`` changes nothing."""
    for path in write(program.ROOT / "paper/results", tmp_path, FULL):
        assert path.read_text() == (program.ROOT / "docs" / path.name).read_text(), path.name


# ---- the program -----------------------------------------------------------------------------------------------------


def test_every_experiment_has_data_of_its_own():
    args = program.parse(["--quick"])
    assert [spec.stem for spec in program.specs(args)] == list(MAKERS)
    assert QUICK.steps < 10


def test_data_of_another_experiment(capsys):
    assert program.main(["lm", "--data", "cifar10"]) == 1
    assert "--data cifar10 is not for lm" in capsys.readouterr().err


def test_missing_data(tmp_path, capsys):
    assert program.main(["nmt", "--data", "iwslt14", "--root", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "has no train.de" in capsys.readouterr().err
