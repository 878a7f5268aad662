"""What is measured: cases as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


def resnet20_shapes() -> list[Shape]:
    """Parameters of CIFAR ResNet-20 with batch norm: 65 tensors, 0.27 M numbers."""
    shapes: list[Shape] = [(16, 3, 3, 3), (16,), (16,)]
    for stage, width in enumerate((16, 32, 64)):
        for conv in range(6):
            inputs = width // 2 if stage > 0 and conv == 0 else width
            shapes += [(width, inputs, 3, 3), (width,), (width,)]
    return [*shapes, (10, 64), (10,)]


@dataclass(frozen=True)
class Case:
    """One problem: a list of parameters, a dtype, an averaging block length, and whether the step has curvature."""

    name: str
    shapes: tuple[Shape, ...]
    block: int | str = 1
    dtype: torch.dtype = torch.float32
    curvature: bool = True
    peers: tuple[str, ...] = ("floor", "AdamW fused")

    @property
    def numel(self) -> int:
        """Parameters in all."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """Least traffic of a step: read p, g, (Hz), m, v; write p, m, (v)."""
        p = torch.empty((), dtype=self.dtype).element_size()
        state = 8 if self.dtype == torch.float64 else 4
        return self.numel * ((4 * p + 4 * state) if self.curvature else (3 * p + 3 * state))

    @property
    def adamw_bytes(self) -> int:
        """The same for Adam, whose states have the parameter's dtype: read p, g, m, v; write p, m, v."""
        return self.numel * 7 * torch.empty((), dtype=self.dtype).element_size()


_ALL = ("AdamW fused", "AdamW foreach", "pytorch-optimizer foreach", "torch-optimizer")


def cases(device: str, quick: bool) -> list[Case]:
    """The cases for a device; `quick` takes smaller tensors."""
    million = 1_000_000
    large = (4 if quick else 25) * million if device == "cpu" else (25 if quick else 250) * million
    big = ((large,),)
    name = f"{large // million}M"
    many = tuple((1024,) for _ in range(2000))
    some = tuple((1024,) for _ in range(200))
    return [
        *[Case(f"{name} b={b}", big, b) for b in (1, 9, 32, 127, 1024, "tensor")],
        Case(f"{name} off-step", big, 1, curvature=False),
        *[Case(f"{name} bf16 b={b}", big, b, torch.bfloat16) for b in (1, 9)],
        Case("2,000 x 1,024", many, 1, peers=_ALL[:2]),
        Case("2,000 x 1,024 b=32", many, 32, peers=_ALL[:1]),
        Case("200 x 1,024", some, 1, peers=_ALL[:2]),
        Case("ResNet-20", tuple(resnet20_shapes()), "auto", peers=_ALL),
    ]
