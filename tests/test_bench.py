"""The benchmark measures what it says: results are checked, inputs rotate, page and comparison follow the JSON."""

from __future__ import annotations

import itertools
import json
import shlex
import signal
import sys
import time

import pages
import pytest
import torch

from adahessian_fused import available_backends
from bench import (
    cases,
    check,
    compare,
    contestants,
    display,
    gpu,
    instructions,
    machine,
    measure,
    report,
    run,
    table,
)
from bench.cases import Case
from bench.problem import Problem

TINY = Case("tiny", ((40, 3, 3, 3), (7,), (1,)), "auto", peers=(cases.ADAMW, cases.SGD, cases.TORCH_OPTIMIZER))
VARIANTS = [
    TINY,
    Case("block 9", ((100,),), 9),
    Case("tensor", ((1000,),), "tensor"),
    Case("row", ((30, 17),), "row", shift=1),
    Case("bf16", ((300,), (5, 7)), 32, torch.bfloat16),
    Case("off-step", ((300,),), curvature=False),
    Case("groups", ((10,),) * 7, groups=3),
]


def need_native() -> None:
    reason = available_backends("cpu")["native"]
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def run_tiny(monkeypatch, tmp_path):
    """A function that runs the benchmark on the tiny case; returns its exit code and what it wrote."""
    monkeypatch.setattr(run, "cases", lambda device, suite: [TINY])
    monkeypatch.setattr(run, "rotations", lambda case, device: 2)

    def call() -> tuple[int, dict]:
        code = run.main(["--seconds", "0.01", "--backends", "reference", "--out", str(tmp_path)])
        (path,) = tmp_path.glob("*.json")
        return code, json.loads(path.read_text())

    return call


@pytest.mark.parametrize("name", [cases.REFERENCE, "native", cases.COMPILED])
@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_first_steps_agree_with_float64(monkeypatch, name, case):
    if name == "native":
        need_native()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the formulas, not the compiler
    problem = Problem(case, "cpu")
    _, error = run.enter(name, [problem], check.Expected(problem))
    assert 0 <= error <= 1


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_a_small_error_is_found(case):
    problem = Problem(case, "cpu")
    expected = check.Expected(problem)
    contestant = contestants.ours(problem, "reference")
    step = contestant.step

    def wrong():
        step()
        with torch.no_grad():
            contestant.params[0].flatten()[-1:].add_(3e-2 if case.dtype == torch.bfloat16 else 1e-4)

    contestant.step = wrong
    assert check.first_step(contestant, expected) > 1


def test_a_wrong_backend_is_not_timed_and_said(monkeypatch, run_tiny, capsys):
    monkeypatch.setattr(check.Expected, "largest_error", lambda self, params: 7.0)
    code, data = run_tiny()
    assert code == 1
    assert "reference" not in data["results"][0]["seconds"]
    assert "WRONG: error is 7 x tolerance" in capsys.readouterr().out


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_run(monkeypatch, run_tiny, capsys, with_rich):
    if with_rich:
        pytest.importorskip("rich")
    monkeypatch.setattr(display, "HAS_RICH", with_rich)
    monkeypatch.setitem(sys.modules, "torch_optimizer", None)  # not installed
    code, data = run_tiny()
    (result,) = data["results"]
    assert code == 0
    assert set(result["seconds"]) == {"reference", "floor", cases.ADAMW, cases.SGD}
    assert "torch_optimizer" in result["missing_peers"][cases.TORCH_OPTIMIZER]
    assert all(t["p20"] <= t["median"] <= t["p80"] and t["samples"] >= 7 for t in result["seconds"].values())
    assert {"device", "cpu", "cores", "caches", "torch", "commit", "threads"} <= set(data["machine"])
    shown = capsys.readouterr().out
    assert "tiny" in shown
    assert "not measured: torch-optimizer" in shown


def test_launches_and_host_time(native, device):
    problem = Problem(TINY, device)
    entrants = {"native": [contestants.ours(problem, "native")], "floor": [contestants.floor(problem)]}
    timings = measure.interleaved(entrants, device=device, seconds=0.01)
    assert timings["native"].launches == 1
    assert timings["native"].host > 0
    assert timings["floor"].launches is None


def test_a_case_without_the_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda device: 1000)
    result = run.run_case(TINY, "cpu", ["native"], 0.01)
    assert "needs" in result["skipped"]
    assert result["skipped"] in table.rows([result])[0][2]


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "hessian_step", "off_step"),
    [
        (torch.float32, None, 32, 24),
        (torch.bfloat16, None, 24, 18),
        (torch.float32, torch.bfloat16, 24, 18),
        (torch.bfloat16, torch.bfloat16, 16, 12),
    ],
    ids=str,
)
def test_the_floor_moves_the_bytes_of_the_step(dtype, state_dtype, hessian_step, off_step):
    for curvature, per_parameter in ((True, hessian_step), (False, off_step)):
        case = Case("x", ((64, 10), (2,)), dtype=dtype, state_dtype=state_dtype, curvature=curvature)
        assert case.bytes == case.numel * per_parameter
        contestants.floor(Problem(case, "cpu")).step()


# ---- the page and the comparison -------------------------------------------------------------------------------------


def results(**medians: float) -> dict:
    timings = {name: {"median": median, "p20": median, "p80": median} for name, median in medians.items()}
    result = {"case": "x", "bytes": 8, "adamw_bytes": 7, "seconds": timings, "error_over_tolerance": {"native": 0.1}}
    result["backends"] = ["native"]
    return {"machine": {"device": "cpu", "cpu": "a CPU"}, "results": [result]}


def test_the_committed_page_shows_the_committed_results():
    results = (report.load(folder) for folder in (report.OVERHEAD, report.WIDER))
    text = report.page(report.load(report.RESULTS), report.plots_on(report.PAGE.parent), *results)
    assert report.PAGE.read_text() == text + report.programs(report.PROGRAMS), "run python -m bench.report"


def test_what_was_measured_stays_if_a_later_case_fails(tmp_path, monkeypatch):
    done = []

    def fail_at_the_second(case, *_):
        if done:
            raise RuntimeError("out of memory")
        done.append(case.name)
        return {"case": case.name}

    monkeypatch.setattr(run, "run_case", fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.main(["--quick", "--out", str(tmp_path)])
    [path] = tmp_path.glob("*.json")
    assert [result["case"] for result in json.loads(path.read_text())["results"]] == done


@pytest.mark.parametrize(
    ("new", "code"),
    [
        (results(native=1.0, floor=1.0, peer=2.0), 0),
        (results(native=3.0, floor=3.0, peer=6.0), 0),  # a slower machine
        (results(native=1.3, floor=1.0, peer=2.0), 1),
        (results(native=1.1, floor=1.0, peer=2.0), 0),  # below the threshold
        (results(native=1.0, floor=1.0, peer=1.5), 1),  # the peer became faster
        (results(floor=1.0, peer=2.0), 2),
    ],
    ids=["same", "slower_machine", "slower", "a_little", "peer", "nothing_in_common"],
)
def test_compare(tmp_path, new, code):
    for name, data in (("old", results(native=1.0, floor=1.0, peer=2.0)), ("new", new)):
        (tmp_path / name).write_text(json.dumps(data))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new"), "--threshold", "0.2"]) == code


def test_compare_notices_results_that_became_wrong(tmp_path, capsys):
    new = results(floor=1.0)
    new["results"][0]["error_over_tolerance"]["native"] = 2.0
    for name, data in (("old", results(native=1.0, floor=1.0)), ("new", new)):
        (tmp_path / name).write_text(json.dumps(data))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "wrong now" in capsys.readouterr().out


def test_what_refuses_to_be_watched_is_timed_all_the_same():
    """Compiled code does not run under a dispatch mode."""

    def step():
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("a dispatch mode is present")

    peer = contestants.Contestant(step, watched=False)
    timing = measure.interleaved({"peer": [peer]}, device="cpu", seconds=0.0, samples=3)["peer"]
    assert timing.samples >= 3
    assert timing.launches is None


# ---- the first minutes on a GPU --------------------------------------------------------------------------------------


def test_every_file_a_stage_names_exists():
    tests = {path.stem.removeprefix("test_") for path in (gpu.ROOT / "tests").glob("test_*.py")}
    assert {*gpu.OP_TESTS, *gpu.ELSEWHERE} <= tests


def test_stages_take_eight_minutes_and_what_others_have_left(monkeypatch, tmp_path):
    limits = []

    def run_stage(stage, setting, limit, log):
        limits.append(round(limit))
        return {"stage": stage.name, "budget": stage.budget, "exit": [0], "results": [], "seconds": 15.0}

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.setattr(gpu, "facts", lambda device: {})
    assert gpu.main(["--device", "cuda", "--out", str(tmp_path)]) == 0
    budgets = [stage.budget for stage in gpu.STAGES]
    assert sum(budgets) <= 480
    assert limits == [sum(budgets[: i + 1]) - 15 * i for i in range(len(budgets))]


@pytest.mark.parametrize("compiler", ["native", "triton"])
def test_the_model_of_the_machine_expects_what_a_gpu_can_do(compiler):
    """No more than its bandwidth gives, at least a half of that, or the host's time."""
    loops = json.loads(instructions.RESULTS.read_text())["loops"]
    assert set(loops) == set(instructions.LOOPS)
    for case in (case for suite in ("update", "host") for case in cases.cases("cuda", suite)):
        result = {
            "bytes": case.bytes,
            "numel": case.numel,
            "tensors": len(case.shapes),
            "block": case.block,
            "curvature": case.curvature,
            "seconds": {"floor": {"launches": None}},
        }
        found, floor = instructions.predicted(result, compiler, loops), case.bytes / instructions.H200.bandwidth
        assert floor < found < 2 * floor + 5e-6 or found <= 30e-6 + 1.5e-6 * len(case.shapes), case.name


def test_the_summary_sets_the_model_beside_the_measured_times():
    times = {name: {"median": 1e-3, "host": None, "launches": 1} for name in ("native", "floor")}
    result = {"case": "100M b=1", "bytes": 3.2e9, "numel": 1e8, "tensors": 1, "block": 1, "curvature": True}
    result |= {"seconds": times, "backends": ["native"]}
    found = {"stage": "2", "exit": [0], "seconds": 1, "budget": 2, "results": [{"machine": {"device": "cuda"}}]}
    found["results"][0]["results"] = [result]
    assert "native 1.00 x floor, 1 ms (model: 8" in gpu.summary(found)[-1]


def stages(*commands: str) -> tuple[gpu.Stage, ...]:
    programs = [[sys.executable, "-c", command] for command in commands]
    return tuple(
        gpu.Stage(f"{i} stage", 20, lambda setting, out, c=c: [[*c, str(out)]]) for i, c in enumerate(programs)
    )


def test_a_stage_that_fails_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    result = "import json, sys; json.dump({'results': []}, open(sys.argv[1] + '/found.json', 'w')); print('written')"
    monkeypatch.setattr(gpu, "STAGES", stages("raise SystemExit(3)", result))
    monkeypatch.setattr(gpu, "facts", lambda device: {"device": device})
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["exit"] for stage in data["stages"]] == [[3], [0]]
    assert data["stages"][1]["results"] == [{"results": []}]
    assert data["machine"]["device"] == "cpu"
    assert "written" in (tmp_path / "gpu.log").read_text()
    assert "1 stage" in capsys.readouterr().out


def test_a_stage_that_hangs_is_ended_with_all_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1)
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    (stage,) = stages(hangs)
    start = time.perf_counter()
    found = gpu.run_stage(stage, gpu.Setting("cpu", small=True, workers=1), 0.5, tmp_path / "log")
    assert time.perf_counter() - start < 20
    assert found["exit"] == ["out of time"]


def test_a_stage_without_time_is_not_begun(tmp_path):
    (stage,) = stages("open(sys.argv[1] + '/begun', 'w')")
    found = gpu.run_stage(stage, gpu.Setting("cpu", small=True, workers=1), -1.0, tmp_path / "log")
    assert (found["exit"], (tmp_path / "log").read_text()) == (["no time left"], "")


def test_a_stage_that_is_out_of_time_says_what_it_has_found(tmp_path, monkeypatch):
    """Also where it was writing it, where it does not end by itself, and where a shell has begun it with "&"."""
    monkeypatch.setattr(gpu, "GRACE", 1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    writes = """if True:
        import sys, time
        open(sys.argv[1] + '/a.json', 'w').write('[7]')
        open(sys.argv[1] + '/b.json', 'w').write('[7')
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            open(sys.argv[1] + '/tests.xml', 'w').write(
                '<a><testsuite tests="1" failures="0" errors="0" skipped="0"/></a>'
            )
            time.sleep(60)
    """
    (stage,) = stages(writes)
    found = gpu.run_stage(stage, gpu.Setting("cpu", small=True, workers=1), 2.0, tmp_path / "log")
    signal.signal(signal.SIGINT, before)
    assert (found["exit"], found["results"], found["tests"]["tests"]) == (["out of time"], [[7]], 1)


def test_backends_that_cannot_run_are_told_and_not_required(monkeypatch, tmp_path, capsys):
    missing = {"native": "built without CUDA", "triton": None, "reference": None}
    monkeypatch.setattr(gpu, "facts", lambda device: {"missing": missing})
    seen = []
    stage = gpu.Stage("0 stage", 20, lambda setting, out: seen.append(setting) or [])
    monkeypatch.setattr(gpu, "STAGES", (stage,))
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert seen[0].backends == ("triton", "reference")
    assert "native cannot run: built without CUDA" in capsys.readouterr().out
    assert "triton,reference" in gpu._pytest(seen[0], tmp_path, ["ops"])


def test_what_is_red_is_named(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0"><testcase classname="a" name="b">'
        '<failure message="off by 2"/></testcase><testcase classname="a" name="c"/></testsuite></testsuites>'
    )
    found = gpu.test_report(path)
    assert found["red"] == [{"test": "a::b", "message": "off by 2"}]
    assert (found["tests"], found["failures"]) == (2, 1)


def test_a_stage_runs_without_a_gpu_and_all_have_options_that_there_are(tmp_path):
    need_native()
    assert gpu.main(["--device", "cpu", "--small", "--stages", "0", "--out", str(tmp_path)]) == 0
    assert "native" in (tmp_path / "gpu.log").read_text()
    for small, stage in itertools.product((True, False), gpu.STAGES):
        for _, *command in stage.commands(gpu.Setting("cuda", small, 1), tmp_path):
            if command[0] == "-m":
                assert not list(pages.problems(shlex.join(["python", *map(str, command)]))), command


def test_a_case_that_runs_out_of_memory_does_not_end_the_others(monkeypatch, run_tiny):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory for this")

    monkeypatch.setattr(run, "enter", fails)
    code, data = run_tiny()
    assert code == 1
    assert data["results"][0]["skipped"] == "OutOfMemoryError: no memory for this"
