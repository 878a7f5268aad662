"""The tensors of a test case, and the four ops on them.

All tensors of one kind (parameters, gradients, m, ...) are windows of one flat arena that holds NaN everywhere else, so
that a stray read or write shows.
"""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

import torch
from cases import Case
from torch import Tensor

from adahessian_fused.segments import Hyper, Segment, Steps, n_blocks, segment_table

SEED = 0x1234_5678_9ABC_DEF0
ROUNDING_SEED = -0x0FED_CBA9_8765_4321


@dataclass
class Problem:
    """The tensors of a case: one arena a kind, and the windows in it that belong to the parameters."""

    case: Case
    arenas: dict[str, Tensor]
    begins: dict[str, list[int]]
    segments: Tensor
    steps: Tensor
    groups: Tensor
    means: Tensor  # of v_hat, for each slot
    missed: Tensor

    def window(self, kind: str, i: int) -> Tensor:
        spec, begin = self.case.specs[i], self.begins[kind][i]
        length = n_blocks(spec.numel, spec.block_length) if kind == "diag" else spec.numel
        return self.arenas[kind][begin : begin + length]

    def windows(self, kind: str) -> list[Tensor]:
        """The parameters' parts of an arena, flat, in storage order."""
        return [self.window(kind, i) for i in range(len(self.case.specs))]

    def tensors(self, kind: str) -> list[Tensor]:
        """The same with the parameters' shapes and strides."""
        return [w.as_strided(s.shape, s.strides()) for s, w in zip(self.case.specs, self.windows(kind), strict=True)]

    def outside(self, kind: str) -> Tensor:
        """The bits of everything in an arena that belongs to no parameter."""
        mask = torch.ones(self.arenas[kind].numel(), dtype=torch.bool, device=self.arenas[kind].device)
        for begin, window in zip(self.begins[kind], self.windows(kind), strict=True):
            mask[begin : begin + window.numel()] = False
        return bits(self.arenas[kind])[mask]

    def copy(self, dtype: torch.dtype | None = None) -> Problem:
        arenas = {kind: arena.to(dtype or arena.dtype, copy=True) for kind, arena in self.arenas.items()}
        tables = {name: getattr(self, name).clone() for name in ("steps", "groups", "means", "missed")}
        return dataclasses.replace(self, arenas=arenas, **tables)

    # The four ops on these tensors, in place; ``only`` picks parameters.

    def _lists(self, kinds: tuple[str, ...], only: list[int] | None) -> tuple[list[list[Tensor]], Tensor]:
        chosen = list(range(len(self.case.specs))) if only is None else only
        lists = [[tensors[i] for i in chosen] for tensors in map(self.tensors, kinds)]
        return lists, self.segments[chosen].contiguous()

    def run_rademacher(self, backend, only: list[int] | None = None, seed: int = SEED, sample: int = 0) -> None:
        backend.rademacher(self.arenas["z"], self._lists((), only)[1], self.steps, seed, sample)

    def run_perturb(self, backend, only: list[int] | None = None, scale: float = 0.25, save: bool = True, **options):
        (params,), segments = self._lists(("param",), only)
        options = {"seed": SEED, "sample": 0, "scale": scale, "save": save} | options
        backend.perturb(params, self.arenas["saved"], segments, self.steps, **options)

    def run_hessian_diag(self, backend, only: list[int] | None = None, **options) -> None:
        (hessians,), segments = self._lists(("hessian",), only)
        options = {"seed": SEED, "sample": 0, "is_hvp": True, "scale": 1.0, "accumulate": False} | options
        backend.hessian_diag(hessians, self.arenas["diag"], segments, self.steps, **options)

    def run_step(self, backend, curvature: str = "hessian", only: list[int] | None = None, **options) -> None:
        """One step with the curvature from "hessian", from "diag" or from nowhere ("none")."""
        (params, grads, hessians), segments = self._lists(("param", "grad", "hessian"), only)
        hessians = hessians if curvature == "hessian" else []
        diag = self.arenas["diag"] if curvature == "diag" else None
        states = self.arenas["exp_avg"], self.arenas["exp_hessian_diag_sq"], self.arenas.get("master")
        tables = {"means": self.means, "missed": self.missed, "rounding_seed": ROUNDING_SEED}
        options = {"seed": SEED, "sample": 0, "is_hvp": True, "grad_scale": None, "found_inf": None, **tables} | options
        backend.adahessian_step(params, grads, hessians, diag, *states, segments, self.steps, self.groups, **options)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, for comparisons in which NaN equals itself and +0 differs from -0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().reshape(-1).view(integers[tensor.element_size()])


def _values(case: Case) -> dict[str, list[Tensor]]:
    """Contents of the windows; they depend on the case's name and specs, not on where the windows lie."""
    random = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    kinds = ("param", "grad", "hessian", "z", "exp_avg", "exp_hessian_diag_sq", "master", "diag")
    values = {kind: [] for kind in kinds}
    for i, spec in enumerate(case.specs):
        t, h = case.steps[i % len(case.steps)]
        draws = torch.randn(6, spec.numel, generator=random, dtype=torch.float64)
        eighths = torch.randint(-128, 129, (spec.numel,), generator=random) / 8
        new = {"master": draws[0], "param": draws[0], "grad": draws[1], "z": draws[5]}
        new["hessian"] = draws[2] if case.gaussian else eighths
        new["exp_avg"] = 0.1 * draws[3] if t else torch.zeros(spec.numel)
        new["exp_hessian_diag_sq"] = draws[4] ** 2 if h else torch.zeros(spec.numel)
        new["diag"] = 4 * torch.randn(n_blocks(spec.numel, spec.block_length), generator=random, dtype=torch.float64)
        for kind in kinds:
            values[kind].append(new[kind])
    return values if case.master else {kind: values[kind] for kind in kinds if kind != "master"}


def build(case: Case, device: str = "cpu") -> Problem:
    """The tensors of a case, the same on every device."""
    places = {"param": case.param_at, "grad": case.grad_at, "hessian": case.hessian_at}
    arenas, begins = {}, {}
    for kind, windows in _values(case).items():
        dtype = case.dtype if kind in places else case.state_dtype
        if case.stored is not None and kind in ("exp_avg", "exp_hessian_diag_sq"):
            dtype = case.stored
        begins[kind] = places.get(kind, case.state_at).begins([w.numel() for w in windows])
        ends = [b + w.numel() for b, w in zip(begins[kind], windows, strict=True)]
        arena = torch.full((max(ends, default=0) + 5,), torch.nan, dtype=dtype)
        for begin, end, window in zip(begins[kind], ends, windows, strict=True):
            arena[begin:end] = window
        arenas[kind] = arena.to(device)
    arenas["saved"] = torch.full_like(arenas["z"], torch.nan, dtype=case.dtype)
    begins["saved"] = begins["z"]
    rows = []
    for i, spec in enumerate(case.specs):
        row = dict.fromkeys(Segment, 0)
        row |= {Segment.OFFSET: begins["exp_avg"][i], Segment.NUMEL: spec.numel, Segment.BLOCK: spec.block_length}
        row[Segment.PERIOD], row[Segment.STRIDE] = spec.period_and_stride()
        row |= {Segment.DIAG_OFFSET: begins["diag"][i], Segment.PARAM_ID: 7 * i + 3, Segment.ABSOLUTE: spec.absolute}
        row |= {Segment.GROUP: i % len(case.groups), Segment.SLOT: i % len(case.steps)}
        rows.append(tuple(int(row[column]) for column in Segment))
    steps = torch.tensor(case.steps, dtype=torch.int64).reshape(-1, len(Steps))
    groups = torch.tensor(case.groups, dtype=torch.float64).reshape(-1, len(Hyper))
    means = torch.linspace(0.1, 3, len(steps), dtype=torch.float64, device=device)
    missed = torch.arange(len(steps), device=device)
    return Problem(case, arenas, begins, segment_table(rows), steps, groups, means, missed)
