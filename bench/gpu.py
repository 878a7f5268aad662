"""The first minutes on a GPU, in stages: the most instructive first, each with a limit of its own.

    python -m bench.gpu --out results                      # everything, some eight minutes on 16 cores
    python -m bench.gpu --stages 1,2 --out results
    python -m bench.gpu --device cpu --small --out results # a rehearsal, on any machine

A stage that fails or runs out of time does not end the others. Two files tell what happened, and grow as the stages
end: ``gpu.json`` (what was measured, with card, driver, versions and commit) and ``gpu.log`` (all that was printed).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import display, instructions, table
from .cases import ADAMW

ROOT = Path(__file__).resolve().parent.parent
GRACE = 6  # seconds for a program that is out of time to say what it has found
OP_TESTS = (
    *("adahessian_step", "rademacher", "hessian_diag", "perturb", "op_properties"),
    *("optimizer_capture", "norm_double_backward"),
)
# Files whose tests never touch a device, or that need what the machine of a benchmark does not have.
ELSEWHERE = (
    *("docs", "packaging", "installation", "paper", "paper_data", "trainers", "migration"),
    *("demo", "bench", "overhead", "scale", "log_to_tensorboard", "distributed", "instruction_sets"),
    *("cuda_inspect", "triton_inspect"),
)
SANITIZED = (
    "native and (reference or products) and (misaligned or channels_last_block_9 or tiny_300 or chunk_edges_block_9 or "
    "long_block_5000)"
)


@dataclass(frozen=True)
class Setting:
    """Where the stages run: on which device, in small for a rehearsal, with how many processes and which backends."""

    device: str
    small: bool
    workers: int
    backends: tuple[str, ...] = ("native", "reference")

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to be used."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Stage:
    """One part of the whole.

    Attributes:
        name: of the stage, with its number in front.
        budget: seconds it may take on a GPU machine of 16 cores; where the number comes from is said beside it.
        commands: what is run, one after the other, given the setting and a folder for results.
    """

    name: str
    budget: int
    commands: Callable[[Setting, Path], list[list[str]]]


def _python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def _build(_: Setting, __: Path) -> list[list[str]]:
    return [_python("-m", "adahessian_fused", "info")]


def _pytest(setting: Setting, out: Path, files: Sequence[str], *options: str) -> list[str]:
    limit = ("--timeout=120",) if find_spec("pytest_timeout") else ()
    several = ("-n", setting.workers, "--dist", "worksteal") if find_spec("xdist") else ()
    # -v: a line for each test as it ends, whatever becomes of the rest.
    return _python(
        *("-m", "pytest", "-v", "--tb=short", *several, "--maxfail=50", *limit, "--device", setting.device),
        *("--require", ",".join(setting.backends), f"--junitxml={out / 'tests.xml'}", *options),
        *(f"tests/test_{name}.py" for name in files),
    )


def _ops(setting: Setting, out: Path) -> list[list[str]]:
    return [_pytest(setting, out, OP_TESTS, *(("-k", "channels_last_block_9") if setting.small else ()))]


def _bench(suite: str, setting: Setting, out: Path) -> list[list[str]]:
    small = ("--seconds", "0.05", "--filter", "b=9" if suite == "update" else "1 x 1,024") if setting.small else ()
    seconds = small or ("--seconds", "1")
    return [_python("-m", "bench.run", "--device", setting.device, "--suite", suite, "--out", out, *seconds)]


def _update(setting: Setting, out: Path) -> list[list[str]]:
    commands = _bench("update", setting, out)
    profiler = _tool("ncu")
    if setting.cuda and profiler is not None:  # registers, occupancy, bytes: printed into the log
        sections = [
            f"--section={name}" for name in ("LaunchStats", "Occupancy", "SpeedOfLight", "MemoryWorkloadAnalysis")
        ]
        chosen = ("--kernel-name", "regex:tile_kernel|adahessian_step", "--launch-count", "4")
        for case in ("100M b=1", "100M b=9"):
            run = ("-m", "bench.run", "--device", "cuda", "--suite", "update", "--seconds", "0.01", "--filter", case)
            commands.append([profiler, *chosen, *sections, *_python(*run, "--out", out / "profiled")])
    return commands


def _tool(name: str) -> str | None:
    """Return a program of the CUDA toolkit; None if it is not here."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def _steps(setting: Setting, out: Path) -> list[list[str]]:
    run = ("-m", "bench.overhead", "--device", setting.device, "--out", out)
    if setting.small:
        return [_python(*run, "--models", "MLP", "--batch", 8, "--rounds", 2, "--no-memory", "--ways", "ours, closure")]
    # Parts of the rows' names; the closure and the quarter also with Hz in bfloat16.
    eager = ("captured", "ours, closure", "ours, finite", "ours, 1/4", "plain PyTorch")
    rows = ("--rounds", 10, "--no-memory", "--ways", *eager)
    return [
        _python(*run, "--models", "ResNet-20", *rows),
        _python(*run, "--models", "GPT-2 124M", *rows),
        _python(*run, "--models", "ResNet-20", "--batch", 256, *rows),
    ]


def _compiled(setting: Setting, out: Path) -> list[list[str]]:
    run = ("-m", "bench.overhead", "--device", setting.device, "--out", out, "--no-memory")
    if setting.small:
        return []
    return [_python(*run, "--models", "GPT", "--rounds", 10, "--ways", "SGD compiled", "AdamW compiled", "TrainStep")]


def _tests(setting: Setting, out: Path) -> list[list[str]]:
    names = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py"))
    files = [name for name in names if name not in (*ELSEWHERE, *OP_TESTS)]
    if setting.small:
        files = ["hutchinson"]
    return [_pytest(setting, out, files)]


def _sanitize(setting: Setting, _: Path) -> list[list[str]]:
    tool = _tool("compute-sanitizer")
    if not setting.cuda or tool is None:
        return []
    tests = [f"tests/test_{name}.py" for name in OP_TESTS[:4]]
    return [
        [
            *(
                "env",
                "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
                tool,
                "--tool",
                check,
                "--error-exitcode",
                "1",
                "--kernel-name",
                "kernel_substring=tile_kernel",
            ),
            *_python("-m", "pytest", "-q", "--device", "cuda", "-k", SANITIZED, *tests),
        ]
        for check in ("memcheck", "racecheck")
    ]


# Most instructive first, eight minutes in all; a stage may also take what those before it have left. The build is a
# step of its own (make gpu-build), a minute on 16 cores: its longest file decides.
STAGES = (
    Stage("0 what is here", 20, _build),
    # Some 700 tests for two backends; Triton compiles 102 variants of 1 to 3 s, in 12 processes.
    Stage("1 every op", 90, _ops),
    # 12 cases of 1 s for each of two backends, floor and peer; allocating and checking take about as long.
    Stage("2 the update", 80, _update),
    Stage("3 host time", 25, lambda s, out: _bench("host", s, out)),
    # 11 rows of 3 models: a second of timing and three of start, check and capture for each.
    Stage("4 whole steps", 90, _steps),
    # The rest of the tests take 6 minutes on 2 cores; a GPU's launches are slower than a core on tensors this small.
    Stage("5 tests", 75, _tests),
    Stage("6 sanitizers", 40, _sanitize),
    # What compiles: 20 s for each of two kinds of step of a four-layer transformer. Last, for it teaches least.
    Stage("7 compiled steps", 60, _compiled),
)


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_stage(stage: Stage, setting: Setting, limit: float, log: Path) -> dict[str, Any]:
    """Run a stage's commands within its limit; what it found, whatever happened."""
    found: dict[str, Any] = {"stage": stage.name, "budget": stage.budget, "exit": [], "results": []}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, log.open("a") as stream:
        for command in stage.commands(setting, Path(folder)):
            if limit <= 0:
                found["exit"].append("no time left")
                break
            print(f"\n==== {stage.name}: {' '.join(command)}", file=stream, flush=True)
            left = limit - (time.perf_counter() - start)
            # A session of its own: what the command has started ends with it. A shell's "&" has us ignore Ctrl-C.
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True, preexec_fn=_hear_interrupts
            )
            try:
                found["exit"].append(process.wait(timeout=max(left, 0.1)))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # pytest then says what it has found
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE)
                found["exit"].append("out of time")
                print(f"==== {stage.name}: out of time after {limit:.0f} s", file=stream, flush=True)
                break
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                found["results"] = [*filter(None, map(_loaded, sorted(Path(folder).glob("*.json"))))]
        report = Path(folder, "tests.xml")
        with contextlib.suppress(ET.ParseError):  # it was being written
            found |= {"tests": test_report(report)} if report.exists() else {}
    found["seconds"] = round(time.perf_counter() - start, 1)
    return found


def _loaded(path: Path) -> Any:
    """Return a file of results; None if it was being written when its program ended."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def test_report(path: Path) -> dict[str, Any]:
    """Counts and the names and messages of what is red in a JUnit file."""
    suite = ET.parse(path).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    red = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": (bad.get("message") or "")[:500]}
        for case in suite.iter("testcase")
        for bad in (*case.findall("failure"), *case.findall("error"))
    ]
    return counts | {"red": red}


def summary(found: dict[str, Any]) -> list[str]:
    """One row of the table at the end."""
    if not found["exit"]:
        how = "nothing to do here"
    else:
        how = "ok" if all(code == 0 for code in found["exit"]) else ", ".join(map(str, found["exit"]))
    what = []
    if "tests" in found:
        counts = found["tests"]
        bad = counts["failures"] + counts["errors"]
        what.append(f"{counts['tests']} tests, {bad} red, {counts['skipped']} skipped")
    for data in found["results"]:
        modelled = data.get("machine", {}).get("device") == "cuda"
        for result in data.get("results", ()):
            what.append(f"{result['case']}: {_update_of(result, modelled)}")
        for model in data.get("models", ()):
            costs = [f"{row['way']} {row['cost']:.2f}" for row in model["rows"] if "cost" in row]
            what.append(f"{model['model']}, x SGD: {'; '.join(costs)}")
    return [found["stage"], how, f"{found['seconds']:.0f} of {found['budget']} s", "\n".join(what)]


def _update_of(result: dict[str, Any], modelled: bool) -> str:
    """Each backend's time over the floor's, the host's time where it is known, and on a GPU what is to be expected."""
    times = result["seconds"]
    if "floor" not in times:
        return result.get("skipped", "wrong")
    found = []
    loops = json.loads(instructions.RESULTS.read_text())["loops"] if modelled else {}
    for name in (*result["backends"], ADAMW):
        if name in times:
            host = f", host {table.seconds(times[name]['host'])}" if times[name]["host"] else ""
            found.append(f"{name} {times[name]['median'] / times['floor']['median']:.2f} x floor{host}")
            if modelled and name != ADAMW:
                expected = instructions.predicted(result, name, loops)
                found[-1] += f", {table.seconds(times[name]['median'])} (model: {table.seconds(expected)})"
    return "; ".join(found) or "wrong"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", default=",".join(stage.name[0] for stage in STAGES), metavar="0,1,...")
    parser.add_argument("--small", action="store_true", help="a few cases of each stage: to find mistakes, not figures")
    parser.add_argument("--seconds", type=float, default=480, help="for all of them together")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    args = parser.parse_args(arguments)
    args.stages = args.stages.split(",")
    unknown = set(args.stages) - {stage.name[0] for stage in STAGES}
    if unknown:
        parser.error(f"--stages {','.join(sorted(unknown))}; expected some of {parser.get_default('stages')}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if all of them did."""
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + args.seconds
    log, path = args.out / "gpu.log", args.out / "gpu.json"
    log.write_text("")
    data: dict[str, Any] = {"machine": facts(args.device), "stages": []}
    path.write_text(json.dumps(data, indent=1) + "\n")
    missing = data["machine"].get("missing", {})
    able = tuple(name for name, reason in missing.items() if reason is None) or Setting.backends
    setting = Setting(args.device, args.small, min(12, os.cpu_count() or 1), able)
    saved = 0.0
    for stage in (stage for stage in STAGES if stage.name[0] in args.stages):
        print(f"{stage.name} ...", file=sys.stderr, flush=True)
        limit = min(stage.budget + saved, end - time.perf_counter()) if setting.cuda else 20 * stage.budget
        data["stages"].append(run_stage(stage, setting, limit, log))
        saved = max(limit - data["stages"][-1]["seconds"], 0)
        path.write_text(json.dumps(data, indent=1) + "\n")
    display.table("On this machine", ["stage", "", "time", "found"], [summary(found) for found in data["stages"]], 4)
    for name, reason in missing.items():
        if reason is not None:
            print(f"{name} cannot run: {reason}")
    print(f"written to {path} and {log}")
    return int(any(code != 0 for found in data["stages"] for code in found["exit"]))


FACTS = """
import json, sys
from adahessian_fused.backends import available_backends
from bench.machine import machine
print(json.dumps(machine(sys.argv[1]) | {"missing": available_backends(sys.argv[1])}))
"""


def facts(device: str) -> dict[str, Any]:
    """Return what the figures depend on; empty where not even that can be told."""
    command = _python("-c", FACTS, device)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"failed": f"{error} {getattr(error, 'stderr', '')}"[-2000:]}


if __name__ == "__main__":
    sys.exit(main())
