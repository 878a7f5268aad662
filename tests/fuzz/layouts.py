"""Parameters anywhere in memory, in groups of any options: the optimizer's update against Algorithm 1 in float64."""

from __future__ import annotations

import math
import random
import warnings

import torch
from published import AdaHessian
from torch import Tensor, nn

from . import oracle

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
UNITS = 64  # roundings of m, v and p in a step, at most, but for those that storage in 16 bits adds


def shape(r: random.Random) -> tuple[int, ...]:
    kind = r.random()
    if kind < 0.1:
        return ()
    if kind < 0.11:
        return r.choice([(5000,), (3, 4097), (2, 2, 1100), (66_000,)])
    if kind < 0.25:
        return (r.choice([0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000]),)
    return tuple(r.choice([0, 1, 1, 2, 3, 3, 4, 5, 7, 8, 9]) for _ in range(r.randint(1, 5)))


def tensor(r: random.Random, generator: torch.Generator, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers of this shape, with strides and an offset of some kind."""
    kind = r.choice(["plain", "plain", "plain", "offset", "permuted", "sliced", "channels_last", "padded"])
    order = list(range(len(size)))
    if kind == "permuted":
        r.shuffle(order)
    elif kind == "channels_last" and len(size) > 2:
        order = [0, *range(2, len(size)), 1]
    steps = [r.choice([1, 2, 3]) if kind == "sliced" else 1 for _ in size]
    more = [r.choice([0, 0, 3]) if kind == "padded" else 0 for _ in size]
    stored = [size[axis] * steps[axis] + more[axis] for axis in order]
    shift = r.choice([1, 2, 3, 7]) if kind == "offset" else 0
    flat = torch.randn(math.prod(stored) + shift, generator=generator, dtype=torch.float64).to(dtype)
    view = flat[shift:].view(stored).permute([order.index(axis) for axis in range(len(size))])
    return view[tuple(slice(0, n * step, step) for n, step in zip(size, steps, strict=True))] if size else view


def options(r: random.Random) -> dict:
    return {
        "lr": r.choice([0.0, 1e-3, 0.1]), "betas": (r.choice([0.0, 0.5, 0.9]), r.choice([0.0, 0.9, 0.999])),
        "eps": r.choice([1e-2, 1e-4]), "weight_decay": r.choice([0.0, 0.0, 0.1]),
        "hessian_power": r.choice([1.0, 1.0, 0.5, 0.0, 0.7]), "maximize": r.random() < 0.2,
        "block_size": r.choice([1, 1, 2, 3, 9, 16, 17, 32, 100, 5000, "row", "tensor", "auto"]),
        "averaging": r.choice(["signed", "abs"]), "unmeasured": r.choice(["hold", "move"]),
        "clip": r.choice([None, None, 0.5]), "update_each": r.choice([1, 1, 2]),
        "nesterov": r.random() < 0.3, "cautious": r.random() < 0.3,
    }  # fmt: skip


def length(p: Tensor, block: int | str) -> int:
    named = {"row": p.shape[-1] if p.dim() else 1, "tensor": p.numel()}
    named["auto"] = math.prod(p.shape[2:]) if p.dim() in (4, 5) else 1
    return named.get(block, block)


def case(seed: int) -> str:
    """One optimizer of up to six parameters, three steps."""
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtypes = [r.choice(DTYPES)] if r.random() < 0.6 else DTYPES
    groups = []
    for _ in range(r.choice([1, 1, 2, 3])):
        params = [nn.Parameter(tensor(r, generator, shape(r), r.choice(dtypes))) for _ in range(r.randint(1, 4))]
        groups.append({"params": params, **options(r)})
    opt = AdaHessian(groups, backend=r.choice(["native", "native", "reference"]))
    frozen = [p for group in groups for p in group["params"] if r.random() < 0.1]
    for step in range(3):
        for group in opt.param_groups:
            for p in group["params"]:
                p.requires_grad_(all(p is not other for other in frozen) or r.random() < 0.5)
                p.grad = tensor(r, generator, p.shape, p.dtype) if p.requires_grad and r.random() < 0.9 else None
                if p.grad is not None and p.numel() and r.random() < 0.1:
                    p.grad = p.grad.reshape(-1)[0].expand(p.shape)
                if r.random() < 0.1:
                    p.data = tensor(r, generator, p.shape, p.dtype)
        given = None if step and r.random() < 0.3 and not opt.needs_hessian else []
        if given is not None:
            given = [
                None if p.grad is None else tensor(r, generator, p.shape, p.dtype)
                for group in opt.param_groups for p in group["params"]
            ]  # fmt: skip
        take(opt, given)
    return "right"


def beside(p: Tensor) -> Tensor:
    """What a parameter's memory holds, with zeros in the place of its own elements."""
    memory = torch.empty(0, dtype=p.dtype).set_(p.detach().untyped_storage().clone())
    memory.as_strided(p.shape, p.stride(), p.storage_offset()).zero_()
    return memory


def take(opt: AdaHessian, given: list[Tensor | None] | None) -> None:
    """A step, with this diagonal or without any."""
    params = [(group, p) for group in opt.param_groups for p in group["params"]]
    before = [(p.detach().double().clone(), {k: v.clone() for k, v in opt.state.get(p, {}).items()}) for _, p in params]
    neighbours = [beside(p) for _, p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(hessian=given)
    for i, ((group, p), (value, state)) in enumerate(zip(params, before, strict=True)):
        what = f"parameter {i}: {p.dtype} {tuple(p.shape)} strides {p.stride()} of group {group_of(group)}"
        assert torch.equal(beside(p), neighbours[i]), f"{what}: wrote beside it"
        if p.grad is None:
            assert torch.equal(value, p.double()), f"{what} has moved without a gradient"
            continue
        unit = torch.finfo(torch.float64 if p.dtype == torch.float64 else torch.float32).eps
        zeros = torch.zeros_like(value)
        m, v = (state.get(name, zeros).double() for name in ("exp_avg", "exp_hessian_diag_sq"))
        t, h = (int(state.get(name, 0)) for name in ("step", "hessian_step"))
        g = p.grad.double() * (-1 if group["maximize"] else 1)
        d = size = None
        if given is not None:
            raw = given[i].double().abs() if group["averaging"] == "abs" else given[i].double()
            d, size = (oracle.block_means(x, length(p, group["block_size"])) for x in (raw, raw.abs()))
        m, v = oracle.averages(m, v, g, d, group["betas"])
        t, h = t + 1, h + (given is not None)
        now = opt.state[p]
        found = now["exp_avg"].double(), now["exp_hessian_diag_sq"].double()
        assert (int(now["step"]), int(now["hessian_step"])) == (t, h), what
        close(found[0], m, UNITS * unit * (m.abs() + g.abs()), f"m of {what}")
        off = 0 if d is None else (p.numel() + 8) * unit * size * (2 * d.abs() + (p.numel() + 8) * unit * size)
        close(found[1], v, UNITS * unit * v + off, f"v of {what}")
        names = ("lr", "betas", "eps", "weight_decay", "hessian_power", "unmeasured")
        chosen = {name: group[name] for name in names} | {"clip": group["clip"] or math.inf}
        chosen |= {name: group[name] for name in ("nesterov", "cautious")}
        expected = oracle.moved(value, *found, t, h, **chosen, g=g)
        whole = chosen | {"cautious": False, "weight_decay": 0.0}  # of what Nesterov's two terms may cancel in
        reach = oracle.moved(torch.zeros_like(value), found[0].abs(), found[1], t, h, **whole, g=g.abs()).abs()
        stored = torch.finfo(p.dtype).eps / 2 if torch.finfo(p.dtype).bits == 16 else 0.0
        tiny = torch.finfo(p.dtype).smallest_normal
        step = (expected - value).abs() + reach * group["nesterov"]
        close(p, expected, (2 * UNITS * unit + stored) * (value.abs() + step + expected.abs()) + tiny, what)


def group_of(group: dict) -> dict:
    return {name: group[name] for name in ("lr", "betas", "hessian_power", "block_size", "averaging", "clip")}


def close(found: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    off = (found.detach().double() - expected).abs()
    wrong = ~(off <= bound)
    assert not wrong.any(), (
        f"{what} is off by {off[wrong].max():.3g}: found {found.detach()[wrong][:4].tolist()}, expected "
        f"{expected[wrong][:4].tolist()}"
    )
