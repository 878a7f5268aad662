"""What is measured: cases as data, in three suites."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from . import shapes
from .shapes import Shape

ADAMW, FOREACH, SGD = "AdamW fused", "AdamW foreach", "SGD fused"
TORCH_OPTIMIZER, PYTORCH_OPTIMIZER = "torch-optimizer", "pytorch-optimizer foreach"
REFERENCE, COMPILED = "reference", "reference compiled"
EVERYBODY = (ADAMW, FOREACH, SGD, TORCH_OPTIMIZER, PYTORCH_OPTIMIZER, REFERENCE, COMPILED)
MILLION = 1_000_000


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        name: unique, and what --filter looks at.
        shapes: of the parameters.
        block: averaging block length, or one of AdaHessian's names for it.
        dtype: of parameters, gradients and Hessian-vector products.
        state_dtype: AdaHessian's option.
        curvature: False for an off-step.
        groups: number of parameter groups.
        shift: elements by which the heads of all tensors are misaligned.
        cached: one set of tensors, which small ones find in the cache; otherwise sets rotate.
        peers: who is timed beside ours and the floor.
    """

    name: str
    shapes: tuple[Shape, ...]
    block: int | str = 1
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    curvature: bool = True
    groups: int = 1
    shift: int = 0
    cached: bool = False
    peers: tuple[str, ...] = (ADAMW,)

    @property
    def numel(self) -> int:
        """Parameters in all."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """Least traffic of a step: read p, g, (Hz), m, v; write p, m, (v)."""
        return self.numel * (4 if self.curvature else 3) * (self.dtype.itemsize + self.state_bytes)

    @property
    def state_bytes(self) -> int:
        """Bytes of an element of m, or of v."""
        return (self.state_dtype or (torch.float64 if self.dtype == torch.float64 else torch.float32)).itemsize

    @property
    def adamw_bytes(self) -> int:
        """The same for Adam, whose states have the parameter's dtype: read p, g, m, v; write p, m, v."""
        return self.numel * 7 * self.dtype.itemsize

    @property
    def footprint(self) -> int:
        """Bytes that a step touches: p, g, Hz, m, v."""
        return self.numel * (3 * self.dtype.itemsize + 2 * self.state_bytes)

    def block_length(self, shape: Shape) -> int:
        """Length of the averaging blocks of a parameter."""
        named = {"auto": math.prod(shape[2:]), "row": shape[-1] if shape else 1, "tensor": math.prod(shape)}
        return min(named.get(self.block, self.block), max(math.prod(shape), 1))

    def memory(self, contestants: int, rotations: int) -> int:
        """About how many bytes it takes: shared g, Hz and starting points, p, m and v of each contestant."""
        size = self.dtype.itemsize
        return self.numel * rotations * (3 * size + contestants * (size + 8))


def _large(millions: int, **options: object) -> Case:
    """One tensor; square if blocks are rows."""
    side = math.isqrt(millions * MILLION)
    shape = (side, side) if options.get("block") == "row" else (millions * MILLION,)
    halves = options.get("dtype") == torch.bfloat16, options.get("state_dtype") == torch.bfloat16
    kinds = {(True, True): ["bf16 everything"], (True, False): ["bf16"], (False, True): ["bf16 states"]}
    label = [f"{millions}M", *kinds.get(halves, [])]
    label.append("off-step" if options.get("curvature") is False else f"b={options.get('block', 1)}")
    return Case(" ".join(label), (shape,), **options)


def _models(device: str, full: bool) -> list[Case]:
    resnet20, resnet50 = tuple(shapes.resnet20()), tuple(shapes.resnet50())
    found = [
        Case("ResNet-20", resnet20, "auto", peers=EVERYBODY if full or device == "cuda" else EVERYBODY[:6]),
        Case("ResNet-20 cached", resnet20, "auto", cached=True, peers=EVERYBODY[:3]),
        Case("ResNet-50", resnet50, "auto", peers=EVERYBODY[:5]),
    ]
    if device == "cuda" or full:
        found.append(Case("GPT-2 small", tuple(shapes.gpt2(12, 768)), 1, peers=EVERYBODY[:3]))
        found.append(Case("GPT-2 medium", tuple(shapes.gpt2(24, 1024)), 1, peers=EVERYBODY[:3]))
        found.append(Case("GPT-2 small bf16 b=row", tuple(shapes.gpt2(12, 768)), "row", torch.bfloat16))
    return found


def _lists() -> list[Case]:
    many, some = ((1024,),) * 2000, ((1024,),) * 200
    return [
        Case("2,000 x 1,024", many, 1, peers=EVERYBODY[:3]),
        Case("2,000 x 1,024 b=32", many, 32),
        Case("2,000 x 1,024, 50 groups", many, 1, groups=50, peers=EVERYBODY[:3]),
        Case("200 x 1,024", some, 1, peers=EVERYBODY[:3]),
        Case("awkward sizes b=9", tuple(shapes.awkward()), 9),
        Case("awkward sizes b=9, odd heads", tuple(shapes.awkward()), 9, shift=1),
    ]


BLOCKS = (1, 9, 32, 49, 64, 127, 1024, "row", "tensor")


def _quick(device: str) -> list[Case]:
    size = 4 if device == "cpu" else 25
    return [
        _large(1),
        *[_large(size, block=b) for b in (1, 9, 32, "tensor")],
        _large(size, curvature=False),
        _large(size, dtype=torch.bfloat16),
        _large(size, dtype=torch.bfloat16, state_dtype=torch.bfloat16),
        Case("ResNet-20", tuple(shapes.resnet20()), "auto", peers=(*EVERYBODY[:3], PYTORCH_OPTIMIZER)),
        Case("200 x 1,024", ((1024,),) * 200, 1, peers=EVERYBODY[:3]),
    ]


def _update(device: str) -> list[Case]:
    """One tensor, far larger than any cache, in every way that changes what a kernel does."""
    size, half = (4 if device == "cpu" else 100), torch.bfloat16
    return [
        *[_large(size, block=b, peers=(ADAMW, COMPILED) if b in (1, 9) else (ADAMW,)) for b in (1, 9)],
        _large(size, dtype=half),
        *[_large(size, block=b) for b in (32, "row", "tensor")],
        _large(size, curvature=False),
        _large(size, state_dtype=half),
        *[_large(size, block=b, dtype=half, state_dtype=half) for b in (1, 9)],
        *[_large(size, block=b, dtype=half) for b in (9, "row")],
    ]


def _host() -> list[Case]:
    """Return what a launch and a parameter cost: from one tensor to thousands."""
    peers = EVERYBODY[:2]
    return [
        Case("1 x 1,024", ((1024,),), 1, cached=True, peers=peers),
        Case("ResNet-20", tuple(shapes.resnet20()), "auto", cached=True, peers=peers),
        Case("GPT-2 small", tuple(shapes.gpt2(12, 768)), 1, peers=peers),
        Case("2,000 x 1,024", ((1024,),) * 2000, 1, peers=peers),
        Case("2,000 x 1,024, 50 groups", ((1024,),) * 2000, 1, groups=50, peers=peers),
    ]


SUITES = ("quick", "default", "full", "update", "host")


def cases(device: str, suite: str = "default") -> list[Case]:
    """Return the cases of one of ``SUITES``.

    "quick" takes a minute, "default" some minutes, "full" as long as it takes; "update" and "host" are what is looked
    at first on a new GPU, the most instructive cases first.
    """
    if suite in ("quick", "update", "host"):
        return {"quick": _quick, "update": _update, "host": lambda _: _host()}[suite](device)
    full, half = suite == "full", torch.bfloat16
    size = 25 if device == "cpu" else 100
    sizes = (1, 4, 25, 100, 1000) if full or device == "cuda" else (1, 4, 25)
    found = [
        *[_large(n, peers=EVERYBODY if n == 25 else (ADAMW,)) for n in sizes],
        *[_large(size, block=b, peers=(ADAMW, COMPILED) if b in (9, 32) else (ADAMW,)) for b in BLOCKS[1:]],
        _large(size, curvature=False),
        *[_large(n, dtype=half) for n in sizes],
        *[_large(size, block=b, dtype=half) for b in (BLOCKS[1:] if full or device == "cuda" else (9, 32))],
        _large(size, dtype=half, curvature=False),
        _large(size, state_dtype=half),
        *[_large(size, block=b, dtype=half, state_dtype=half) for b in (1, 9)],
        _large(size, dtype=half, state_dtype=half, curvature=False),
        *_models(device, full),
        *_lists(),
    ]
    by_name = {case.name: case for case in found}
    return [replace(case, peers=EVERYBODY) for case in by_name.values()] if full else list(by_name.values())
