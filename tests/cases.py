"""Test cases as data: which parameters there are, how they are stored and averaged, and where they lie.

problem.py makes tensors of a :class:`Case`; :func:`any_case` draws cases for hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCKS = (1, 2, 9, 32, 49, 127, 1000, 4095, "row", "tensor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Spec(NamedTuple):
    """One parameter."""

    shape: tuple[int, ...]
    block: int | str = 1
    absolute: bool = False
    order: str = "contiguous"  # or "channels_last", "transposed" (the last two axes stored in the other order)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def block_length(self) -> int:
        named = {"row": self.shape[-1] if self.shape else 1, "tensor": self.numel}
        return max(1, named.get(self.block, self.block))

    def period_and_stride(self) -> tuple[int, int]:
        if self.order == "contiguous" or not self.numel:
            return 1, 1
        if self.order == "channels_last":
            return math.prod(self.shape[2:]), self.shape[1]
        return self.shape[-1], self.shape[-2]

    def strides(self) -> tuple[int, ...]:
        axes = list(range(len(self.shape)))
        stored = {"contiguous": axes, "channels_last": [*axes[:1], *axes[2:], *axes[1:2]]}
        stored["transposed"] = [*axes[:-2], *axes[-1:], *axes[-2:-1]]
        order = stored[self.order]
        strides = {axis: math.prod(self.shape[a] for a in order[i + 1 :]) for i, axis in enumerate(order)}
        return tuple(strides[axis] for axis in axes)


class Place(NamedTuple):
    """Where an arena's windows begin: at multiples of ``align`` plus ``shift``, at least ``gap`` elements apart."""

    align: int = 1
    shift: int = 0
    gap: int = 0

    def begins(self, lengths: list[int]) -> list[int]:
        begins, position = [], 0
        for length in lengths:
            begins.append(-(-position // self.align) * self.align + self.shift)
            position = begins[-1] + length + self.gap
        return begins


ALIGNED, MISALIGNED, PACKED = Place(64, 0, 1), Place(64, 1, 1), Place()
PLAIN = (1, math.inf, 0, 0, 0)  # the last columns of Hyper (holds, clip, shrink, ...) where no option is in use
GROUPS = (  # Hyper: lr, beta1, beta2, eps, weight_decay, hessian_power, maximize, ...
    (0.15, 0.9, 0.999, 1e-4, 0.0, 1.0, 0, *PLAIN),
    (0.01, 0.8, 0.99, 1e-8, 0.1, 0.5, 1, 0, 0.1, 5, 1, 0),
    (0.3, 0.95, 0.9, 1e-3, 0.01, 0.75, 0, 1, 0.3, 0.5, 0, 1),
    (0.05, 0.0, 0.98, 1e-2, 0.2, 0.0, 1, *PLAIN),
)
DEFAULTS = ((0.15, 0.9, 0.999, 1e-4, 0.0, 1.0, 0, 1, 1.0, 0, 1, 1), (0.3, 0.6, 0.9, 1e-4, 0.1, 1.0, 1, 1, 0.5, 0, 1, 1))
NOT_FINITE = (  # block, place of a value that is not finite, and that value
    *((1, 150, math.nan), (1, 299, math.inf), (7, 0, math.nan), (7, 150, math.inf), (7, 299, math.nan)),
    *((300, 0, math.inf), (300, 299, math.nan)),
)
MIXED_STEPS = ((0, 0), (9, 3), (4, 4), (5, 0))  # Steps: t - 1, h


@dataclass(frozen=True)
class Case:
    """A list of parameters with everything that decides how the ops reach them."""

    name: str
    specs: tuple[Spec, ...]
    dtype: torch.dtype = torch.float32
    groups: tuple[tuple[float, ...], ...] = GROUPS[:1]
    steps: tuple[tuple[int, int], ...] = MIXED_STEPS[1:2]
    gaussian: bool = False  # Hz of any value; otherwise multiples of 1/8, whose sums are exact in every order
    master: bool = False
    stored: torch.dtype | None = None  # bfloat16: m and v are rounded stochastically
    param_at: Place = ALIGNED
    grad_at: Place = ALIGNED
    hessian_at: Place = ALIGNED
    state_at: Place = PACKED

    @property
    def state_dtype(self) -> torch.dtype:
        """Of all arithmetic, and of the flat buffers but for m and v where ``stored`` is given."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        return self.name


# ---- the cases ------------------------------------------------------------------------------------------------------


def specs(*shapes: tuple[int, ...], block: int | str = 1, absolute: bool = False, order: str = "contiguous"):
    """Parameters that differ in their shape only."""
    return tuple(Spec(shape, block, absolute, order) for shape in shapes)


_SHAPES = ((3,), (7, 130), (), (16, 3, 3, 3))
_LAST_4D, _LAST_5D = ((6, 5, 3, 3), (4, 8, 1, 1), (3, 1, 2, 2), (16, 70, 1, 3)), ((3, 4, 2, 3, 2), (2, 130, 1, 2, 2))
_TRANSPOSED = ((5, 7), (64, 33), (1, 9), (9, 1), (3, 4, 5))
_EMPTY, _THREE = (0, 4), ((5, 3), (130,), (2, 65))


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LAYOUT_CASES = (
    *(Case(f"block_{b}", specs(*_SHAPES, (4097,), block=b)) for b in BLOCKS),
    *(Case(f"channels_last_block_{b}", specs(*_LAST_4D, block=b, order="channels_last")) for b in (1, 9, 100, "row")),
    Case("channels_last_5d", specs(*_LAST_5D, block=12, order="channels_last")),
    Case("channels_last_tensor", specs(*_LAST_5D, block="tensor", order="channels_last"), groups=GROUPS),
    *(Case(f"transposed_block_{b}", specs(*_TRANSPOSED, block=b, order="transposed")) for b in (1, 2, 9, "row")),
    Case("empty_first", specs(_EMPTY, *_THREE, block=9)),
    Case("empty_middle", specs(*_THREE[:2], _EMPTY, (0,), *_THREE[2:], block=2)),
    Case("empty_last", specs(*_THREE, _EMPTY, block="row")),
    Case("empty_only", specs(_EMPTY, (0,))),
    Case("no_parameters", ()),
    Case("one_element", specs((1,)), steps=((0, 0),)),
    Case("groups", specs(*_SHAPES, *_THREE, block=9), groups=GROUPS, steps=MIXED_STEPS),
    Case("first_step", specs(*_SHAPES, block=32), groups=GROUPS, steps=((0, 0),)),
    Case("defaults", specs(*_SHAPES, block=9), groups=DEFAULTS, steps=MIXED_STEPS),
    Case("late_step", specs(*_THREE, block=2), groups=GROUPS, steps=((100_000, 99_999), (2**31, 2**31 + 5))),
    Case("misaligned", specs(*_SHAPES, block=9), param_at=MISALIGNED, grad_at=Place(64, 3, 1)),
    Case("misaligned_states", specs(*_SHAPES, block=2), hessian_at=MISALIGNED, state_at=MISALIGNED),
    Case("misaligned_bfloat16", specs(*_SHAPES, block=9), torch.bfloat16, param_at=MISALIGNED, state_at=Place(64, 1)),
    Case("packed", specs(*_SHAPES, block=9), param_at=PACKED, grad_at=PACKED, hessian_at=PACKED),
    Case("padded", specs(*_SHAPES, block=9), state_at=Place(64, 0, 1)),
    Case("blocks_differ", tuple(Spec((40 + i,), b, bool(i % 2)) for i, b in enumerate((*BLOCKS, 4)))),
)
# Block lengths around the ones that are treated in their own way: short, odd, a vector, a row, a tile and more; sizes
# a little below and above a call of Philox and a tile; and other orders of storage, with whole kernels and cut ones.
_EDGES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 49, 64, 127, 128, 1000, 1024, 2047, 2048, 2049, 5000)
_RAGGED = [(n,) for n in (0, 1, 2, 127, 128, 129, 500, 2047, 2049, 6007)]
_KERNELS = ((4, 5, 3, 3), (1, 300, 3, 3), (3, 64, 7, 7), (2, 130, 1, 1), (1, 1, 130, 1))
_MATRICES = ((5, 7), (67, 65), (2051, 3))


def _edge_cases(block: int, number: int) -> list[Case]:
    kernels = specs(*_KERNELS, block=block, absolute=number % 2 == 0, order="channels_last")
    matrices = specs(*_MATRICES, block=block, order="transposed")
    options = {"dtype": DTYPES[number % 4], "groups": GROUPS, "steps": MIXED_STEPS}
    options["stored"] = torch.bfloat16 if number % 8 < 3 else None
    return [
        Case(f"ragged_block_{block}", specs(*_RAGGED, block=block, absolute=number % 2 == 1), **options),
        Case(f"permuted_block_{block}", kernels + matrices, **options),
    ]


LARGE_CASES = (
    *(case for number, block in enumerate(_EDGES) for case in _edge_cases(block, number)),
    Case("many_long_blocks", specs((66 * 4104 + 17,), block=4104)),  # so many that the step sums each as it comes to it
    Case("tiny_300", specs(*[(1 + i % 5,) for i in range(300)], block=2), groups=GROUPS, steps=MIXED_STEPS),
    *(Case(f"chunk_edges_block_{b}", specs((65535,), (65536,), (65537,), block=b)) for b in (1, 9, 32, 4095)),
    Case("primes", specs((65521,), (104729,), (127,), block=127), torch.bfloat16),
    *(Case(f"long_block_{b}", specs((100_001,), (5, 20_000), block=b)) for b in (5000, 100_000, "tensor")),
    Case("long_block_channels_last", specs((40, 500, 3, 3), block="tensor", order="channels_last")),
    Case("large_channels_last", specs((64, 300, 3, 3), block=9, order="channels_last"), torch.float16),
)
DTYPE_CASES = tuple(
    Case(f"{_label(d)}_block_{b}", specs(*_SHAPES, block=b, absolute=b != 9), d, GROUPS, MIXED_STEPS)
    for d in DTYPES
    for b in (1, 9, 127)
)
GAUSSIAN_CASES = tuple(
    Case(f"gaussian_{_label(d)}_block_{b}", specs((6, 500), (16, 3, 3, 3), block=b, absolute=a), d, gaussian=True)
    for d in DTYPES
    for b, a in ((1, False), (9, True), (1000, False))
)
SMALL_CASES = LAYOUT_CASES + DTYPE_CASES + GAUSSIAN_CASES
CASES = SMALL_CASES + LARGE_CASES

_HALF = torch.bfloat16
ROUNDED_CASES = (
    *(
        Case(f"rounded_{_label(d)}_block_{b}", specs(*_SHAPES, (4097,), block=b), d, GROUPS, MIXED_STEPS, stored=_HALF)
        for d in DTYPES[:3]
        for b in (1, 9, "tensor")
    ),
    *(
        Case(f"rounded_{name}", specs(*shapes, block=b, order=order), stored=_HALF, **places)
        for name, shapes, b, order, places in (
            ("channels_last", _LAST_4D, 9, "channels_last", {}),
            ("channels_last_tensor", _LAST_5D, "tensor", "channels_last", {}),
            ("transposed", _TRANSPOSED, 2, "transposed", {}),
            ("misaligned", _SHAPES, 9, "contiguous", {"state_at": MISALIGNED, "param_at": Place(64, 3, 1)}),
            ("long_block", ((9001,), (3, 5000)), 5000, "contiguous", {}),
        )
    ),
)

MIXED = Case(
    "mixed",
    (
        *(Spec((300,), 7), Spec((7, 40), "row", True), Spec((6, 5, 3, 3), 9, order="channels_last")),
        *(Spec((5,)), Spec((0,)), Spec((12,), 5)),
    ),
    groups=GROUPS,
    steps=MIXED_STEPS,
)

# What Triton's interpreter has the time for: a tenth of a second for each parameter and each 1024 elements.
_INTERPRETED = (
    *("block_1", "block_127", "block_4095", "block_tensor", "channels_last_block_9", "channels_last_5d"),
    *("transposed_block_2", "transposed_block_row", "empty_first", "empty_middle", "empty_last", "empty_only"),
    *("no_parameters", "groups", "late_step", "misaligned", "misaligned_bfloat16", "packed", "padded"),
    *("blocks_differ", "float16_block_9", "float64_block_127", "gaussian_bfloat16_block_9"),
)
_INTERPRETED_AGAIN = ("channels_last_block_row", "empty_first", "groups", "float64_block_9", "bfloat16_block_127")
_INTERPRETED_AGAIN += tuple(f"rounded_{name}" for name in ("bfloat16_block_1", "float32_block_9", "channels_last"))


def cases_for(backend: str, device: str, cases: tuple[Case, ...]) -> list[Case]:
    """The cases of a list that a backend has the time for."""
    if backend == "triton" and device == "cpu":
        wanted = _INTERPRETED if len(cases) == len(CASES) else _INTERPRETED_AGAIN
        return [case for case in cases if case.name in wanted]
    return [case for case in cases if backend != "reference" or case not in LARGE_CASES]


def _one_spec() -> st.SearchStrategy[Spec]:
    def orders(shape: tuple[int, ...]) -> list[str]:
        allowed = {"channels_last": len(shape) >= 3, "transposed": len(shape) >= 2}
        return ["contiguous", *(order for order, fits in allowed.items() if fits)]

    shapes = st.lists(st.integers(0, 9), max_size=4) | st.lists(st.integers(1, 140), min_size=1, max_size=2)
    blocks = st.sampled_from(("row", "tensor")) | st.integers(1, 60) | st.sampled_from((127, 128, 129, 5000))
    return shapes.map(tuple).flatmap(
        lambda shape: st.builds(Spec, st.just(shape), blocks, st.booleans(), st.sampled_from(orders(shape)))
    )


def any_case(max_params: int = 5) -> st.SearchStrategy[Case]:
    """Cases of every kind: shapes, strides, block lengths, groups, dtypes, alignment, padding, step counts."""
    place = st.builds(Place, st.sampled_from((1, 16, 64)), st.integers(0, 3), st.integers(0, 2))
    return st.builds(
        Case,
        name=st.just("hypothesis"),
        specs=st.lists(_one_spec(), max_size=max_params).map(tuple),
        dtype=st.sampled_from(DTYPES),
        groups=st.lists(st.sampled_from(GROUPS), min_size=1, max_size=3).map(tuple),
        steps=st.lists(st.sampled_from(MIXED_STEPS), min_size=1, max_size=3).map(tuple),
        param_at=place,
        grad_at=place,
        hessian_at=place,
        state_at=place,
    ).flatmap(lambda case: st.sampled_from(_stored_as(case)))


def _stored_as(case: Case) -> list[Case]:
    """The case, and the same with m and v in bfloat16 if it can be."""
    return [case] if case.dtype == torch.float64 else [case, replace(case, stored=_HALF)]


def for_any_case(backend, check: Callable[[Case], None]) -> None:
    """Check as many drawn cases as a backend has the time for."""

    @settings(max_examples=5 if backend.name == "triton" else 30, deadline=None, derandomize=True, database=None)
    @given(any_case())
    def check_drawn(case: Case) -> None:
        check(case)

    check_drawn()
