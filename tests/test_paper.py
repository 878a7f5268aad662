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
from paper.cautious_adamw import CautiousAdamW  # noqa: E402
from paper.optimizers import CHEAP, EXACT, OURS, SETUPS, SIGNED, SOPHIA, make, stepper  # noqa: E402
from paper.plan import FULL, QUICK, Extent, Planner, runs_of  # noqa: E402
from paper.report import judged, paper, pays, write  # noqa: E402
from paper.report.outcome import Outcome  # noqa: E402
from paper.results import OtherSettingsError, Results  # noqa: E402
from paper.run import Run, Setup  # noqa: E402
from paper.tasks import MAKERS, Spec  # noqa: E402
from paper.tasks import make as make_task  # noqa: E402
from paper.training import train  # noqa: E402

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


def test_the_peer_with_our_momentum_takes_adamws_steps_by_our_two_rules():
    lr, beta1, beta2, decay = 0.1, 0.9, 0.98, 0.01
    p = torch.randn(50, dtype=torch.float64).requires_grad_()
    expected, m, v = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
    opt = CautiousAdamW([p], lr, (beta1, beta2), weight_decay=decay)
    for t in range(1, 9):
        g = torch.randn_like(p)
        p.grad = g.clone()
        opt.step()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        numerator = (beta1 * m + (1 - beta1) * g) / (1 - beta1 ** (t + 1))
        update = numerator / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        expected = (1 - lr * decay) * expected - lr * torch.where(numerator * g > 0, update, 0)
    assert (p - expected).abs().max() < 1e-12


def test_divergence_is_recorded_and_ends_the_run(task):
    record = train(task("recsys"), Run(Setup("SGD"), 1e30, seed=0, steps=20))
    assert record["diverged"]
    assert record["scores"] == {"validation": None, "test": None}
    assert len(record["train"]) < 20
    assert "NaN" not in json.dumps(record)


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


def test_cost_in_first_order_steps():
    assert SETUPS["AdamW"].cost(100) == 100
    assert SETUPS[OURS].cost(100) == 300
    assert SETUPS[CHEAP].cost(100) == 100 + 2 * (5 + 4)
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
GRID_ONLY = replace(FULL, refine=False, seeds=(0, 1, 2), more_seeds=())
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


def test_a_report_of_half_of_the_runs_says_so(invent):
    outcome = invent(gaining(exact=2))
    for key in [key for key in outcome.results.runs if key.startswith(OURS) and not key.endswith(("=100", "seed=1"))]:
        del outcome.results.runs[key]
    said = paper({"nmt": outcome})
    assert "**Not finished:** translation (" in said
    assert "not decided: fewer than two seeds" in said


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
