"""Runs checks on several ranks: one process that imports torch once and forks the ranks, a group for each check.

``python ranks.py A.py B.py 2 3 1`` runs the functions ``check_*(ranks)`` of these files in a world of 2 ranks, of 3 and
of 1, each with the checks that are for it, and prints a JSON object: world -> check -> error of each rank, or null.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 20  # seconds a rank waits for another


@dataclass
class Ranks:
    """What a check is given."""

    rank: int
    size: int
    group: Any
    folder: Path  # the same for all ranks and worlds, empty at first

    def share(self, n: int) -> slice:
        """This rank's part of n examples."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


def worlds(*sizes: int, kills: bool = False) -> Callable:
    """A check for these worlds and not for three ranks; with ``kills`` the last rank does not come back from it."""

    def mark(check: Callable) -> Callable:
        check.worlds, check.kills = sizes, kills
        return check

    return mark


def checks_of(paths: Sequence[Path]) -> dict[str, Callable]:
    """The functions ``check_*`` of some files, in their order."""
    checks = {}
    for path in paths:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        checks |= {name: value for name, value in vars(module).items() if name.startswith("check_")}
    return checks


def _run_rank(rank: int, size: int, checks: dict[str, Callable], folder: Path, files: Path) -> None:
    import seeds
    import torch
    import torch.distributed as dist

    seeds.shift()
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size, timeout=wait)
    errors = {}
    for name, check in checks.items():
        (files / name).mkdir(exist_ok=True)
        torch.manual_seed(0)
        if getattr(check, "kills", False) and rank == size - 1:
            errors[name] = None
            (folder / f"errors-{rank}.json").write_text(json.dumps(errors))
        try:
            check(Ranks(rank, size, dist.new_group(timeout=wait), files / name))
            errors[name] = None
        except BaseException:
            errors[name] = traceback.format_exc()
        (folder / f"errors-{rank}.json").write_text(json.dumps(errors))
        if errors[name]:  # the other ranks wait for this one until the timeout
            break
    os._exit(0)  # a group with a dead rank could not be left in any other way


def run_here(paths: Sequence[Path], sizes: list[int]) -> dict[str, dict[str, list[str | None]]]:
    """Fork the ranks of every world and collect their errors; nothing of torch has run in this process before."""
    import torch._dynamo  # noqa: F401  what the first step would import on each rank

    results, every = {}, checks_of(paths)
    gc.freeze()  # the garbage of a rank is its own, not what it has from here
    files = tempfile.TemporaryDirectory()
    for size in sizes:
        checks = {name: check for name, check in every.items() if size in getattr(check, "worlds", (3,))}
        with tempfile.TemporaryDirectory() as folder:
            ranks = []
            for rank in range(size):
                pid = os.fork()
                if pid == 0:
                    _run_rank(rank, size, checks, Path(folder), Path(files.name))
                ranks.append(pid)
            for pid in ranks:
                os.waitpid(pid, 0)
            found = [json.loads(p.read_text()) if p.exists() else {} for p in _reports(Path(folder), size)]
        results[str(size)] = {
            name: [errors.get(name, "did not get here, or crashed") for errors in found] for name in checks
        }
    files.cleanup()
    return results


def _reports(folder: Path, size: int) -> Iterator[Path]:
    return (folder / f"errors-{rank}.json" for rank in range(size))


def run(paths: Sequence[Path], sizes: list[int]) -> dict[str, dict[str, list[str | None]]]:
    """The same in a fresh process, for tests."""
    here, search = Path(__file__), os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(here), *map(str, [*paths, *sizes])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    files = [Path(argument) for argument in sys.argv[1:] if argument.endswith(".py")]
    print(json.dumps(run_here(files, [int(argument) for argument in sys.argv[1 + len(files) :]])))
