"""The native operators as torch sees them: schema, fake kernels, torch.compile, and the checks at the boundary."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cases import GROUPS, MIXED_STEPS, Case, Spec
from problem import Problem, bits, build

from adahessian_fused.segments import Segment

SPECS = (Spec((5, 3), 4), Spec((130,), "tensor"), Spec((0,)), Spec((4, 3, 2, 2), 9, order="channels_last"))
CASE = Case("ops", SPECS, groups=GROUPS[:2], steps=MIXED_STEPS[1:3])
OPS = ("rademacher", "perturb", "hessian_diag", "adahessian_step")
DTYPES = ((torch.float32, False), (torch.bfloat16, True), (torch.float16, False), (torch.float64, False))
OPTIONS = [  # every pair of them
    {"curvature": curvature, "master": master, "grad_scale": scaler, "found_inf": scaler, "dtype": dtype}
    for i, curvature in enumerate(("hessian", "diag", "none"))
    for j, (dtype, master) in enumerate(DTYPES)
    for scaler in [(i + j) % 2 == 0]
]


def apart(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors, each in a storage of its own."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in tensors]


def arguments(op: str, problem: Problem, curvature: str = "hessian", grad_scale=False, found_inf=False, **unused):
    """Every argument of an op by name, in the order of its schema."""
    arenas, device = problem.arenas, problem.arenas["z"].device
    tables = {"segments": problem.segments, "steps": problem.steps}
    probe, hessians = {"seed": 7, "sample": 1}, apart(problem.tensors("hessian"))
    if op == "rademacher":
        return {"z": arenas["z"], **tables, **probe}
    if op == "perturb":
        moved = {"params": apart(problem.tensors("param")), "saved": arenas["z"].to(problem.case.dtype)}
        return {**moved, **tables, **probe, "scale": 0.1, "save": True}
    if op == "hessian_diag":
        options = {"is_hvp": True, "scale": 0.5, "accumulate": True}
        return {"hessians": hessians, "diag": arenas["diag"], **tables, **probe, **options}
    return {
        "params": apart(problem.tensors("param")),
        "grads": apart(problem.tensors("grad")),
        "hessians": hessians if curvature == "hessian" else [],
        "diag": arenas["diag"] if curvature == "diag" else None,
        "exp_avg": arenas["exp_avg"],
        "exp_hessian_diag_sq": arenas["exp_hessian_diag_sq"],
        "master": arenas.get("master"),
        **tables,
        "groups": problem.groups,
        **probe,
        "is_hvp": True,
        "rounding_seed": 9,
        "grad_scale": torch.tensor(4.0, device=device) if grad_scale else None,
        "found_inf": torch.tensor(0.0, device=device) if found_inf else None,
        "means": problem.means,
        "missed": problem.missed,
    }


def call(op, arguments: dict) -> None:
    """By position where the schema has positions."""
    names = list(arguments)
    keyword_only = {"seed", "sample", "is_hvp", "scale", "save", "accumulate", "grad_scale", "found_inf"}
    keyword_only = (keyword_only | {"rounding_seed", "means", "missed"}) & set(names)
    keyword_only = set() if "z" in names else keyword_only
    op(*(arguments[n] for n in names if n not in keyword_only), **{n: arguments[n] for n in keyword_only})


def flat(arguments: dict) -> torch.Tensor:
    """The bits of everything that an op may change, or must not."""
    tensors = [t for a in arguments.values() for t in (a if isinstance(a, list) else [a]) if torch.is_tensor(t)]
    return torch.cat([bits(t.cpu()).to(torch.int64) for t in tensors])


def check_registration(op, arguments: dict) -> None:
    names = list(arguments)
    positional = names if "z" in names else names[: names.index("seed")]
    keywords = {n: arguments[n] for n in names if n not in positional}
    assert set(torch.library.opcheck(op, [arguments[n] for n in positional], keywords).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS[:3])
def test_registration(native, op, dtype, device):
    check_registration(getattr(native, op), arguments(op, build(dataclasses.replace(CASE, dtype=dtype), device)))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_registration_of_the_step(native, options, device):
    case = dataclasses.replace(CASE, dtype=options["dtype"], master=options["master"])
    check_registration(native.adahessian_step, arguments("adahessian_step", build(case, device), **options))


@pytest.mark.parametrize("curvature", ["hessian", "none"])
def test_registration_of_the_step_with_states_in_bfloat16(native, curvature, device):
    case = dataclasses.replace(CASE, stored=torch.bfloat16)
    check_registration(native.adahessian_step, arguments("adahessian_step", build(case, device), curvature))


@pytest.mark.parametrize("op", OPS)
def test_compiled_like_eager(native, op, device):
    torch.compiler.reset()
    eager, compiled = (arguments(op, build(CASE, device)) for _ in range(2))
    before = flat(eager)
    call(getattr(native, op), eager)
    torch.compile(lambda a: call(getattr(native, op), a), backend="aot_eager", fullgraph=True)(compiled)
    assert not torch.equal(flat(eager), before)
    assert torch.equal(flat(compiled), flat(eager))


def test_compiled_code_sees_the_mutation(native, device):
    def step_then_read(a):
        call(native.adahessian_step, a)
        return a["params"][0] * 2, a["exp_avg"] + 1

    eager, compiled = (arguments("adahessian_step", build(CASE, device)) for _ in range(2))
    expected, found = step_then_read(eager), torch.compile(step_then_read, backend="aot_eager")(compiled)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(bits(a), bits(b))


# ---- the checks at the boundary -------------------------------------------------------------------------------------


def with_column(column: int, value: int, row: int = 0):
    """A change to a table that puts a value into one column."""

    def change(table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        table[row, column] = value
        return table

    return change


def with_huge_matrix(table: torch.Tensor) -> torch.Tensor:
    """Period times stride is 2^64, which is 0 in 64 bits."""
    return with_column(Segment.PERIOD, 2**32)(with_column(Segment.STRIDE, 2**32)(table))


def first(change):
    """A change to the first tensor of a list."""
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


def spaced(flat: torch.Tensor) -> torch.Tensor:
    return flat.repeat_interleave(2)[::2]


LISTS = {
    "first_dtype": first(lambda t: t.to(torch.float64)),
    "last_dtype": lambda tensors: [*tensors[:-1], tensors[-1].to(torch.bfloat16)],
    "integers": first(lambda t: t.to(torch.int32)),
    "numel": first(lambda t: t[:-1].clone()),
    "one_too_few": lambda tensors: tensors[:-1],
    "one_too_many": lambda tensors: [*tensors, tensors[0].clone()],
    "transposed": first(lambda t: t.t().contiguous().t()),
    "not_dense": first(lambda t: torch.stack([t, t], 2)[..., 0]),
    "expanded": first(lambda t: t[:1].expand(5, 3)),
    "contiguous": lambda tensors: [*tensors[:-1], tensors[-1].contiguous()],
}
FLATS = {
    "dtype": lambda flat: flat.to(torch.float16 if flat.dtype != torch.float16 else torch.float32),
    "integers": lambda flat: torch.zeros_like(flat, dtype=torch.int64),
    "two_dimensions": lambda flat: flat[None],
    "not_contiguous": spaced,
    "too_short": lambda flat: flat[:-6].clone(),
    "empty": lambda flat: flat[:0].clone(),
}
TABLES = {
    "dtype": lambda table: table.to(torch.float32),
    "columns": lambda table: table[:, :-1].contiguous(),
    "one_dimension": lambda table: table.reshape(-1),
    "not_contiguous": lambda table: table.t().contiguous().t(),
}
CELLS = {
    "negative_offset": ("segments", with_column(Segment.OFFSET, -1)),
    "offset_beyond": ("segments", with_column(Segment.OFFSET, 2**40)),
    "offset_overflows": ("segments", with_column(Segment.OFFSET, 2**63 - 1)),
    "negative_numel": ("segments", with_column(Segment.NUMEL, -15)),
    "no_block": ("segments", with_column(Segment.BLOCK, 0)),
    "negative_block": ("segments", with_column(Segment.BLOCK, -4)),
    "no_period": ("segments", with_column(Segment.PERIOD, 0)),
    "no_stride": ("segments", with_column(Segment.STRIDE, 0)),
    "period_times_stride_overflows": ("segments", with_huge_matrix),
    "period_does_not_divide": ("segments", with_column(Segment.PERIOD, 4)),
    "negative_slot": ("segments", with_column(Segment.SLOT, -1)),
    "slot_beyond": ("segments", with_column(Segment.SLOT, 2)),
}
DIAG_CELLS = {
    "negative_diag_offset": ("segments", with_column(Segment.DIAG_OFFSET, -1)),
    "diag_offset_beyond": ("segments", with_column(Segment.DIAG_OFFSET, 10**6)),
    "diag_offset_overflows": ("segments", with_column(Segment.DIAG_OFFSET, 2**63 - 1)),
}
GROUP_CELLS = {
    "negative_group": ("segments", with_column(Segment.GROUP, -1)),
    "group_beyond": ("segments", with_column(Segment.GROUP, 2)),
    "group_overflows": ("segments", with_column(Segment.GROUP, 2**32)),
    "no_groups": ("groups", lambda groups: groups[:0]),
    "no_steps": ("steps", lambda steps: steps[:0]),
}
PER_SLOT = {
    "dtype": lambda numbers: numbers.to(torch.float32),
    "too_short": lambda numbers: numbers[:-1].clone(),
    "too_long": lambda numbers: numbers.repeat(2),
    "two_dimensions": lambda numbers: numbers[None],
}
SCALARS = {"two_numbers": torch.ones(2), "float64": torch.ones((), dtype=torch.float64), "bool": torch.tensor(True)}


def _changes(names: tuple[str, ...], changes: dict) -> list[tuple]:
    return [(name, label, change) for name, (label, change) in itertools.product(names, changes.items())]


def _cells(cells: dict) -> list[tuple]:
    return [(name, label, change) for label, (name, change) in cells.items()]


BAD = {
    "rademacher": [
        *(bad for bad in _changes(("z",), FLATS) if bad[1] != "dtype"),  # z may have any floating dtype
        *_changes(("segments", "steps"), TABLES),
        *_cells(CELLS),
    ],
    "perturb": [
        *(bad for bad in _changes(("params",), LISTS) if bad[1] != "first_dtype"),
        ("params", "none_at_all", lambda tensors: []),
        *_changes(("saved",), FLATS),
        *_changes(("segments", "steps"), TABLES),
        *_cells(CELLS),
    ],
    "hessian_diag": [
        *(bad for bad in _changes(("hessians",), LISTS) if bad[1] != "first_dtype"),
        ("hessians", "none_at_all", lambda tensors: []),
        *_changes(("diag",), FLATS),
        *_changes(("segments", "steps"), TABLES),
        *_cells({k: v for k, v in CELLS.items() if "offset" not in k} | DIAG_CELLS),
    ],
    "adahessian_step": [
        *_changes(("params", "grads", "hessians"), LISTS),
        ("params", "none_at_all", lambda tensors: []),
        ("grads", "none_at_all", lambda tensors: []),
        *_changes(("exp_avg", "exp_hessian_diag_sq"), FLATS),
        *_changes(("segments", "steps", "groups"), TABLES),
        *_cells(CELLS | GROUP_CELLS),
        *_changes(("means", "missed"), PER_SLOT),
        *(("grad_scale", label, lambda _, t=t: t) for label, t in SCALARS.items()),
        *(("found_inf", label, lambda _, t=t: t) for label, t in SCALARS.items()),
    ],
}
ALL_BAD = [(op, *bad) for op, bads in BAD.items() for bad in bads]


# Where two arguments disagree, the message may take either side.
ALSO_NAMED = dict.fromkeys(("params", "grads", "hessians"), "(params|grads|hessians)")
ALSO_NAMED |= {"segments": "(segments|z|saved|diag|exp_avg|params|hessians)", "groups": "(groups|segments)"}
ALSO_NAMED["steps"] = "(steps|segments)"


def check_refused(native, op: str, given: dict, name: str) -> None:
    """An error that names the op and the argument, and nothing written."""
    before = flat(given)
    with pytest.raises((RuntimeError, TypeError), match=rf"(?s){op}.*{name}"):
        call(getattr(native, op), given)
    assert torch.equal(flat(given), before), "half updated"


@pytest.mark.parametrize(("op", "name", "label", "change"), ALL_BAD, ids=[f"{o}-{n}-{b}" for o, n, b, _ in ALL_BAD])
def test_refused(native, op, name, label, change, device):
    given = arguments(op, build(CASE, device))
    given[name] = change(given[name])
    check_refused(native, op, given, ALSO_NAMED.get(name, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_states_in_bfloat16_are_refused_beside_others_and_for_float64(native, dtype, device):
    given = arguments("adahessian_step", build(dataclasses.replace(CASE, dtype=dtype), device))
    given["exp_avg"] = given["exp_avg"].to(torch.bfloat16)
    wrong = "exp_avg is bfloat16; expected float64" if dtype == torch.float64 else "sq is float32; expected bfloat16"
    check_refused(native, "adahessian_step", given, wrong)


ELSEWHERE = [("rademacher", "segments"), ("perturb", "params"), ("perturb", "segments")]
ELSEWHERE += [("hessian_diag", "hessians"), ("hessian_diag", "segments")]
ELSEWHERE += [("adahessian_step", name) for name in ("grads", "hessians", "exp_hessian_diag_sq", "segments", "groups")]


@pytest.mark.parametrize(("op", "name"), ELSEWHERE)
def test_refused_on_another_device(native, op, name, device):
    if device == "cpu":
        pytest.skip("there is only one device")
    given = arguments(op, build(CASE, device))
    target = "cpu" if name in ("params", "grads", "hessians", "exp_hessian_diag_sq") else device
    given[name] = [t.to(target) for t in given[name]] if isinstance(given[name], list) else given[name].to(target)
    check_refused(native, op, given, name)
