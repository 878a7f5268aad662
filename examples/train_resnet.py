"""Train a CIFAR ResNet with SGD, AdamW and AdaHessian, and compare accuracy, time per step and memory.

    python examples/train_resnet.py                                            # 8x8 digits, a few minutes on a CPU
    python examples/train_resnet.py --data cifar10 --root DIR --device cuda    # the paper's experiment

Every optimizer starts from the same weights and sees the same batches; they take turns, an epoch each, so that what
else the machine does falls on all of them. Before any time is reported, the first update of every AdaHessian is
compared with the reference's.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

try:
    import data
    import measure
    import report
    from contestants import CONTESTANTS, DEFAULT, Contestant, Run, Settings
    from resnet import MODELS
    from rich.console import Console

    from adahessian_fused import LongStepWarning
except ImportError as error:
    sys.exit(f"{error}. The demo needs the packages of the extra: pip install 'adahessian_fused[demo]'")

EPOCHS = {"digits": 12, "cifar10": 160}
BATCH_SIZE = {"digits": 64, "cifar10": 256}


class Stop(Exception):  # noqa: N818 - not an error of the program
    """The program cannot go on; the message says why."""


# ---- arguments -------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """Parse an int of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments, with the defaults of the data set filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=EPOCHS, default="digits")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of CIFAR-10's binary files")
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--epochs", type=positive, help=f"default: {EPOCHS}")
    parser.add_argument("--batch-size", type=positive, help=f"default: {BATCH_SIZE}")
    parser.add_argument("--batches", type=positive, help="of each epoch, for a quick look; default: all")
    parser.add_argument("--optimizers", nargs="+", choices=CONTESTANTS, default=list(DEFAULT), metavar="NAME",
                        help=f"of {', '.join(CONTESTANTS)}; fusedN computes the Hessian every N steps")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results.json and training.png")
    parser.add_argument("--threads", type=positive, help="of PyTorch on the CPU; default: PyTorch's choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=positive, default=15, help="of the interleaved timing")
    for field in fields(Settings):
        if field.name != "seed":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    args = parser.parse_args(argv)
    args.epochs = args.epochs or EPOCHS[args.data]
    args.batch_size = args.batch_size or BATCH_SIZE[args.data]
    args.optimizers = list(dict.fromkeys(args.optimizers))
    return args


def writable(folder: Path) -> Path:
    """Return the folder, made if it is not there; an error now rather than after the training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise Stop(f"cannot write to --out {folder}: {error.strerror}") from error


def usable(name: str) -> torch.device:
    """Return the device, if it works."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Stop(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load(args: argparse.Namespace, device: torch.device) -> data.Dataset:
    """Return the data, on the device."""
    dataset = data.load_digits() if args.data == "digits" else data.load_cifar10(args.root)
    if args.batch_size > len(dataset.train_y):
        raise Stop(f"--batch-size {args.batch_size} is more than the {len(dataset.train_y)} training images")
    return dataset.to(device)


# ---- training --------------------------------------------------------------------------------------------------------


class Trainer:
    """A run with its schedule (x0.1 after half and three quarters of the epochs) and its curves."""

    def __init__(self, run: Run, args: argparse.Namespace, dataset: data.Dataset) -> None:
        self.run, self.args, self.dataset = run, args, dataset
        milestones = [math.ceil(args.epochs / 2), math.ceil(args.epochs * 3 / 4)]
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(run.optimizer, milestones, gamma=0.1)
        self.compile_seconds = 0.0
        self.curves: dict[str, list[float]] = {
            key: [] for key in ("train_loss", "test_accuracy", "seconds", "learning_rate")
        }

    def epoch(self, epoch: int, display: report.Display) -> None:
        """One epoch, timed without the test after it, and without the first step of what is compiled then."""
        self.run.model.train()
        losses = []
        self.curves["learning_rate"].append(self.schedule.get_last_lr()[0])
        start = time.perf_counter()
        batches = self.dataset.batches(self.args.batch_size, self.args.seed, epoch)
        for x, y in itertools.islice(batches, self.args.batches):
            losses.append(self.run.step(x, y).item())
            if self.run.contestant.compiled and epoch == 0 and len(losses) == 1:
                self.compile_seconds = time.perf_counter() - start
                start = time.perf_counter()
            display.step(self.run.contestant, losses[-1])
        self.schedule.step()
        before = self.curves["seconds"][-1] if self.curves["seconds"] else 0.0
        self.curves["seconds"].append(before + time.perf_counter() - start)
        self.curves["train_loss"].append(sum(losses) / len(losses))
        self.curves["test_accuracy"].append(self.test())
        display.epoch(self.run.contestant, epoch + 1, self.args.epochs, self.curves)

    @torch.no_grad()
    def test(self) -> float:
        """Per cent of the test images that are classified correctly."""
        self.run.model.eval()
        right = sum((self.run.model(x).argmax(1) == y).sum().item() for x, y in self.dataset.test_batches())
        return 100 * right / len(self.dataset.test_y)


def train(trainers: list[Trainer], args: argparse.Namespace, dataset: data.Dataset, console: Console) -> None:
    """Every optimizer in turn, epoch by epoch."""
    in_epoch = dataset.batches_per_epoch(args.batch_size)
    steps = args.epochs * min(in_epoch, args.batches or in_epoch)
    with report.Display(console, [t.run.contestant for t in trainers], steps) as display:
        for epoch in range(args.epochs):
            for trainer in trainers:
                trainer.epoch(epoch, display)


# ---- measuring -------------------------------------------------------------------------------------------------------


def check_agreement(contestants, model, settings, batch, backend: str, console: Console) -> list[dict[str, Any]]:
    """Print how the first updates compare with the reference's; stop if one is further off than rounding explains."""
    chosen = [c for c in contestants if c.frequency]
    found = measure.agreement(chosen, model, settings, *batch) if chosen else []
    for contestant, result in zip(chosen, found, strict=True):
        ours = f" ({backend})" if contestant.name.startswith("fused") else ""
        console.print(
            f"check: {contestant.label}{ours}, first update against the reference: largest difference "
            f"{result.difference:.1e} of the update, {result.of_tolerance:.2f} of what float32 rounding allows: "
            f"{'ok' if result.ok else 'WRONG'}",
            highlight=False,
            soft_wrap=True,
        )
    wrong = [result.name for result in found if not result.ok]
    if wrong:
        raise Stop(f"first update of {', '.join(wrong)}: further from the reference's than rounding explains")
    return [{"name": r.name, "max_relative_difference": r.difference, "of_tolerance": r.of_tolerance} for r in found]


def measure_times(runs: list[Run], batch, args: argparse.Namespace, console: Console) -> dict[str, list[float]]:
    """Milliseconds a step of every run, in its rounds."""
    with report.progress_of(console, "measuring the time per step, interleaved", args.rounds + 1) as on_round:
        return measure.time_steps(runs, *batch, args.rounds, on_round)


def measure_memory(contestants, args, settings, shape, device: torch.device, console: Console) -> dict[str, Any]:
    """Peak memory of every optimizer in 10^6 bytes, and what that is."""
    out: dict[str, Any] = {
        "what": "not measured",
        "over": f"{measure.MEMORY_STEPS} steps, less the level before the first, in a process of its own",
        "mb": {},
    }
    with report.progress_of(console, "measuring the peak memory", len(contestants)) as on_item:
        for contestant in contestants:
            try:
                found = measure.peak_memory(
                    contestant.name, args.model, shape, settings, str(device), torch.get_num_threads()
                )
                out["mb"][contestant.name], out["what"] = found["mb"], found["what"]
            except RuntimeError as error:
                console.print(f"[yellow]no memory figure:[/] {error}", highlight=False)
            on_item()
    return out


def collect(trainers: list[Trainer], times: dict, memory: dict, model: str) -> dict[str, Any]:
    """All figures of every optimizer."""
    rows = {}
    for trainer in trainers:
        contestant = trainer.run.contestant
        ms = times[contestant.name]
        ratios = [a / b for a, b in zip(ms, times["sgd"], strict=True)] if "sgd" in times else None
        rows[contestant.name] = {
            "label": contestant.label,
            "hutchinson_frequency": contestant.frequency,
            "final_train_loss": trainer.curves["train_loss"][-1],
            "test_accuracy": trainer.curves["test_accuracy"][-1],
            "compile_seconds": trainer.compile_seconds,
            "training_seconds": trainer.curves["seconds"][-1],
            "step_ms": measure.quantiles(ms),
            "step_ms_rounds": ms,
            "cost_x_sgd": measure.quantiles(ratios) if ratios else None,
            "paper_cost_x_sgd": report.paper_cost(model, contestant),
            "peak_memory_mb": memory["mb"].get(contestant.name),
            "curves": trainer.curves,
        }
    return rows


# ---- the program -----------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, console: Console) -> None:
    """Run the whole demo."""
    start = time.perf_counter()
    out, device = writable(args.out), usable(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    dataset, settings = load(args, device), Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    contestants: list[Contestant] = [CONTESTANTS[name] for name in args.optimizers]
    torch.manual_seed(args.seed)
    model = MODELS[args.model](dataset.image_shape[0], dataset.n_classes).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    host = report.machine(device)
    console.print(
        f"{args.model}, {parameters:,} parameters; {args.data}, {len(dataset.train_y):,} training and "
        f"{len(dataset.test_y):,} test images; {report.where(host)}, backend {host['backend']}",
        highlight=False,
        soft_wrap=True,
    )
    batch = next(dataset.batches(args.batch_size, args.seed, 0))
    checks = check_agreement(contestants, model, settings, batch, host["backend"], console)

    trainers = [Trainer(Run(c, model, settings), args, dataset) for c in contestants]
    train(trainers, args, dataset, console)
    times = measure_times([Run(c, model, settings) for c in contestants], batch, args, console)
    memory = measure_memory(contestants, args, settings, batch[0].shape, device, console)

    results = {
        "arguments": {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()},
        "machine": host,
        "parameters": parameters,
        "images": {"train": len(dataset.train_y), "test": len(dataset.test_y), "shape": list(dataset.image_shape)},
        "check": checks,
        "memory": memory,
        "optimizers": collect(trainers, times, memory, args.model),
        "seconds": time.perf_counter() - start,
    }
    console.print(report.table(results))
    report.write_json(results, out / "results.json")
    report.draw(results, out / "training.png")
    console.print(
        f"{results['seconds']:.0f} s in all; figures in {out / 'results.json'}, curves in {out / 'training.png'}",
        highlight=False,
        soft_wrap=True,
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 cannot or must not go on, 130 interrupted."""
    args = parse(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    # The checks and the timing begin at the full rate with the paper's rules; training raises it.
    warnings.simplefilter("ignore", LongStepWarning)
    try:
        compare(args, console)
    except (Stop, data.DataError) as error:
        print(f"train_resnet.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain_resnet.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
