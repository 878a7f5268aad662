"""Draw cases until the time is over: ``make fuzz ARGS='--seed 1 --minutes 5'``. One line tells how to see one again."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections import Counter

import torch

KINDS = ("models", "sequences", "layouts", "failures", "kills")


def main() -> int:
    """Run; 1 if any case failed."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; others follow")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--cases", type=int, default=None, help="of each kind, whatever the time")
    parser.add_argument("--kinds", default=",".join(KINDS), help="%(default)s")
    parser.add_argument("--only", type=int, default=None, help="one case, with its traceback")
    parser.add_argument("--failures", type=int, default=3, help="after how many to stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {name: importlib.import_module(f"fuzz.{name}").case for name in options.kinds.split(",")}
    if options.only is not None:
        for case in kinds.values():
            print(case(options.only))
        return 0
    end, failed = time.monotonic() + 60 * options.minutes, 0
    for name, case in kinds.items():
        until = time.monotonic() + (end - time.monotonic()) / (len(kinds) - list(kinds).index(name))
        results, number = Counter(), options.seed
        while number - options.seed < options.cases if options.cases else time.monotonic() < until:
            try:
                results[str(case(number)).partition(":")[0]] += 1
            except Exception:
                print(traceback.format_exc(limit=-4)[-6000:])
                print(f"again: make fuzz ARGS='--kinds {name} --only {number}'", flush=True)
                results["wrong"] += 1
                failed += 1
                if failed >= options.failures:
                    break
            number += 1
        print(name, f"from {options.seed}:", dict(results), flush=True)
    return int(failed > 0)


sys.exit(main())
