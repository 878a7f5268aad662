"""Writes docs/scale.md, what a step costs on many GPUs: ``python -m bench.scale``.

Formulae, the same formulae against counts of small steps, and tables; no figure of the page is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adahessian_fused import AdaHessian

from .overhead.problems import SIZES, Gpt, problem

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
PARAMETERS = (1e9, 7e9, 30e9, 100e9)
GPUS = (8, 64, 256, 1024)
TOKENS = 2**22  # of the joint batch, whatever the number of GPUs
FREQUENCIES = (1, 10)

# Cost of a step with curvature in first-order ones: matrix products, see docs/design.md.
EXACT, DIFFERENCE = 3.0, 2.0

# What one GPU is taken to do; the estimates of time rest on it, the tables of bytes and FLOPs do not.
FLOPS_PER_SECOND, NETWORK, MEMORY = 400e12, 40e9, 2.5e12


def first_order_flops(matrix_parameters: float, tokens: float, attention: float = 0.0) -> float:
    """FLOPs of forward and backward pass: three matrix products a layer, two FLOPs a multiplication.

    Args:
        matrix_parameters: numbers in the matrices (no embeddings, norms, biases).
        tokens: tokens of the batch.
        attention: 2 L s d for L layers of width d and sequences of s: multiplications a token in QK^T and AV.
    """
    return 3 * 2 * (matrix_parameters + attention) * tokens


def multiple(cost: float, frequency: int = 1, fraction: float = 1.0) -> float:
    """FLOPs of the average step over those of a first-order step.

    Args:
        cost: of a step with curvature of the whole batch.
        frequency: f, ``update_each``.
        fraction: r, the part of the batch that curvature comes from.
    """
    return 1 + (cost - 1) * fraction / frequency


def reduced_bytes(parameters: float, blocks: float, frequency: int = 1, size: int = 4) -> float:
    """Bytes that each rank puts into all-reduces in the average step: gradients, and block means in float32.

    Args:
        parameters: d.
        blocks: d / b.
        frequency: f.
        size: bytes of a gradient's number.
    """
    return size * parameters + 4 * blocks / frequency


def ring(nbytes: float, gpus: int, passes: int) -> float:
    """Bytes that each rank sends in a ring: an all-reduce is 2 passes, an all-gather or a reduce-scatter 1."""
    return passes * (gpus - 1) / gpus * nbytes


def fsdp_bytes(parameters: float, gpus: int, frequency: int | None, size: int = 2) -> float:
    """Bytes that each rank sends in the average step under FSDP: two all-gathers and a reduce-scatter a pass.

    Args:
        parameters: d.
        gpus: W.
        frequency: f with finite differences, which make two passes; None for a first-order optimizer.
        size: bytes of a number on the wire.
    """
    return ring(size * parameters, gpus, 3) * (1 if frequency is None else multiple(DIFFERENCE, frequency))


def update_bytes(parameters: float, frequency: int | None) -> float:
    """Bytes of memory traffic of the update (float32): 28 a parameter for AdamW, 24 and on Hessian steps 32 here."""
    return parameters * (28 if frequency is None else 24 + 8 / frequency)


# ---- counts of small steps -------------------------------------------------------------------------------------------


def counted_flops(way: str) -> float:
    """FLOPs that PyTorch counts in one step of a small GPT with "first order", or a strategy's or fraction's name."""
    task = problem("GPT", batch=4)
    options = {"hvp": way} if way == "finite_difference" else {}
    options |= {"hessian_fraction": 0.25} if way == "quarter" else {}
    opt = AdaHessian(task.model.parameters(), **options)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if way == "first order":
            task.loss(task.model, *task.batch).backward()
        elif way == "quarter":
            opt.backward_split(lambda x, y: task.loss(task.model, x, y), *task.batch)
        else:
            opt.backward(lambda: task.loss(task.model, *task.batch))
    return counter.get_total_flops()


def expected_flops(way: str) -> float:
    """The same by the formulae."""
    task = problem("GPT", batch=4)
    layers, width, _, length, _ = SIZES["GPT"]
    matrices = sum(p.numel() for m in task.model.modules() if isinstance(m, torch.nn.Linear) for p in [m.weight])
    flops = first_order_flops(matrices, task.batch[0].numel(), attention=2 * layers * length * width)
    cost = {"first order": 1.0, "finite_difference": DIFFERENCE}.get(way, EXACT)
    return flops * multiple(cost, fraction=0.25 if way == "quarter" else 1.0)


WAYS = ("first order", "autograd", "finite_difference", "quarter")


def counted_bytes() -> tuple[list[float], list[float]]:
    """Bytes in all-reduces of a step with curvature and one without, for the small GPT: counted, and by formula."""
    model, found, all_reduce = Gpt(*SIZES["GPT"][:4]), [], dist.all_reduce
    params = list(model.parameters())
    total = 0

    def counting(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        nonlocal total
        total += tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        opt = AdaHessian(params, process_group=dist.group.WORLD, update_each=2, block_size="row")
        task = problem("GPT", batch=1)
        dist.all_reduce = counting
        try:
            for _ in range(2):
                total = 0
                opt.zero_grad()
                with sdpa_kernel(SDPBackend.MATH):
                    opt.backward(task.loss(model, *task.batch))
                opt.step()
                found.append(total)
        finally:
            dist.all_reduce = all_reduce
            dist.destroy_process_group()
    d, blocks = sum(p.numel() for p in params), sum(p.numel() // p.shape[-1] for p in params)
    per_tensor = 4 * len(params)  # beside each tensor travels the number of ranks that have it
    first_order = reduced_bytes(d, 0) + per_tensor
    return found, [first_order + reduced_bytes(0, blocks) + per_tensor, first_order]


# ---- the page --------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _billions(parameters: float) -> str:
    return f"{parameters / 1e9:g}B"


def _bytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes < 999.5e9 else f"{nbytes / 1e12:.3g} TB"


def _checks() -> str:
    rows = []
    for way in WAYS:
        counted, expected = counted_flops(way), expected_flops(way)
        rows.append([f"FLOPs, {way}", f"{counted:,.0f}", f"{expected:,.0f}", f"{counted / expected:.3f}"])
    for name, counted, expected in zip(("Hessian step", "off-step"), *counted_bytes(), strict=True):
        rows.append(
            [f"bytes in all-reduces, {name}", f"{counted:,.0f}", f"{expected:,.0f}", f"{counted / expected:.3f}"]
        )
    return _table(["", "counted", "formula", "ratio"], rows)


def _per_gpu(first: str, cell) -> str:
    header = [first, *(f"{gpus} GPUs" for gpus in GPUS)]
    return _table(header, [[_billions(d), *(cell(d, gpus) for gpus in GPUS)] for d in PARAMETERS])


def _multiples() -> str:
    ways = {
        "exact (double backward)": (EXACT, 1.0),
        "exact, a quarter of the batch": (EXACT, 0.25),
        "finite difference": (DIFFERENCE, 1.0),
        "finite difference, 1 of 8 micro-batches": (DIFFERENCE, 1 / 8),
    }
    rows = [
        [name, *(f"{multiple(cost, f, fraction):.3g}" for f in (1, 2, 5, 10))]
        for name, (cost, fraction) in ways.items()
    ]
    return _table(["FLOPs over AdamW's", "f=1", "f=2", "f=5", "f=10"], rows)


def _ddp() -> str:
    rows = []
    for d in PARAMETERS[:2]:
        adamw = ring(reduced_bytes(d, 0), 64, 2)
        cells = [ring(reduced_bytes(d, d / b, f), 64, 2) for b, f in ((1, 1), (1, 10), (9, 1), (32, 1), (4096, 1))]
        rows.append([_billions(d), _bytes(adamw), *(f"{_bytes(c)} ({c / adamw:.2f})" for c in cells)])
    return _table(["64 GPUs", "AdamW", "b=1, f=1", "b=1, f=10", "b=9, f=1", "b=32, f=1", "b=4096, f=1"], rows)


def _times(frequency: int) -> str:
    def cell(d: float, gpus: int) -> str:
        def seconds(f: int | None) -> tuple[float, float]:
            work = first_order_flops(d, TOKENS / gpus) * (1 if f is None else multiple(DIFFERENCE, f))
            compute = work / FLOPS_PER_SECOND + update_bytes(d / gpus, f) / MEMORY
            return compute, fsdp_bytes(d, gpus, f) / NETWORK

        ours, theirs = seconds(frequency), seconds(None)
        return f"{max(ours):.3g} s ({max(ours) / max(theirs):.2f})"

    return _per_gpu(f"f={frequency}", cell)


def page() -> str:
    """The text of docs/scale.md."""
    return f"""# What a step costs on many GPUs

Written by `python -m bench.scale`: formulae, the formulae beside what PyTorch counts in small steps, and tables from
the formulae. d is the number of parameters, W of GPUs, b the length of averaging blocks, f the Hutchinson frequency
(`update_each`), r the part of the batch that curvature comes from. AdamW stands for any first-order optimizer.

| | AdamW | AdaHessian, average step |
|---|---|---|
| FLOPs for n tokens | 6 d n | 6 d n (1 + 2 r / f) exact, 6 d n (1 + r / f) with finite differences |
| replicas: bytes each GPU sends | 2 (W - 1) / W x 4 d | 2 (W - 1) / W x (4 d + 4 d / (b f)) |
| FSDP: bytes each GPU sends, 2 a number | 3 (W - 1) / W x 2 d | 3 (W - 1) / W x 2 d (1 + 1 / f), finite differences |
| update: bytes of memory a parameter | 28 | 24 + 8 / f |

Replicas all-reduce gradients and block means of the diagonal; `averaging="abs"` with b > 1 sends D itself, so b = 1
counts. Under FSDP every pass gathers the parameters twice and scatters the gradients once, a finite difference is two
passes, and the curvature of a shard needs no communication at all. A ring sends (W - 1) / W of the bytes in each
all-gather and each reduce-scatter; an all-reduce is both. Attention adds 12 L s d' n FLOPs (L layers of width d',
sequences of s), at the same multiples.

## The formulae against counts

One step of the GPT of [`bench/overhead`](../bench/overhead/problems.py), FLOPs by `torch.utils.flop_counter`, bytes
where they are handed to `torch.distributed` (`block_size="row"`). "quarter" is `hessian_fraction=0.25`. The tests
repeat the comparison, and count the collectives of FSDP.

{_checks()}

## FLOPs

PFLOP per GPU of a first-order step, {TOKENS / 2**20:g} Mi tokens in the joint batch:

{_per_gpu("d", lambda d, gpus: f"{first_order_flops(d, TOKENS / gpus) / 1e15:.3g}")}

{_multiples()}

## Bytes between GPUs

Replicas (DDP, or `process_group=` alone), float32 gradients, sent by each GPU in an average step; in brackets over
AdamW's:

{_ddp()}

FSDP, 16-bit parameters and gradients on the wire, AdamW / AdaHessian with finite differences at f=1 / at f=10:

{_per_gpu("d", lambda d, gpus: " / ".join(_bytes(fsdp_bytes(d, gpus, f)) for f in (None, 1, 10)))}

## An estimate of time

FSDP with finite differences, seconds a step and, in brackets, over AdamW's, if a GPU does
{FLOPS_PER_SECOND / 1e12:g} TFLOP/s and has {NETWORK / 1e9:g} GB/s to the others and {MEMORY / 1e12:g} TB/s to
its memory, and if communication hides behind computation as far as there is any. These three numbers are assumptions,
not measurements; where the network is the limit, both optimizers wait for it.

{_times(1)}

{_times(10)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__).parse_args(arguments)
    PAGE.write_text(page())
    print(f"written to {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
