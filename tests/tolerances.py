"""How far a result may be from the right one: rounding errors, counted or measured, never tuned until a test passes.

**One step, counted.** The float64 reference (reference.py) gets the same, already rounded, inputs. Notation: S is the
type of the states and of all arithmetic, u = eps(S) / 2 its unit roundoff; every +, *, / and sqrt, and every
hyperparameter rounded to S, contributes one relative error of at most u. A term that has passed through n of them is
off by at most n u of its magnitude, whatever the order of the operations and with or without fused multiply-adds. What
counts is the magnitude of what was added, not that of a sum in which it cancelled. The reference's own error counts
only when S is float64, which doubles u. Inputs are far from overflow and underflow.

    D    = z Hz                 exact
    Ds   = mean of b values     4 u |Ds| for the division (or 1 / b rounded, and a product) and for the factor on it
                                (rounded, and a product), plus the sum: exact in any order for multiples of 1/8 up to
                                16 and b < 2^17; otherwise 4 sqrt(b) u mean|D| (Higham and Mary 2019, Theorem 2.4, with
                                lambda = 4; for plain summation, so with room to spare for pairwise and vector sums)
    m                           beta1 m: 3, (1 - beta1) g / scale: 6
    v                           beta2 v: 3, (1 - beta2) (Ds / scale)^2: 8, plus 2 |Ds| e + e^2 for an error e in Ds
    v_hat = scale v + pull      two more for each term and one for the sum; five in reference.py, which divides twice
    root = sqrt(v_hat)          half of v's 8 and of 5, 1 for sqrt; an error e in Ds moves sqrt(v) by at most
                                sqrt(1 - beta2) e, since v is the square of a 2-norm, and root by sqrt(scale) as much
    root^k                      the power of both ends of root's interval (no derivative: there is none at 0); k = 1
                                adds nothing, k = 1/2 one u, a general power 8 + |k log2 root| units (CUDA's powf is
                                off by up to 4 ulp; in exp2(k log2 x) the product's rounding becomes a relative error)
    q = m / denominator         the errors of both; cut, it is off by no more, plus 2 for the bound
    p                           decay p: 4, the update: 6, plus the error of q
    storage                     half a unit in the last place of a 16-bit parameter; a whole one of m and v in bfloat16,
                                which are rounded up or down after p has been moved by them
    norms                       squares and their sum have one sign: (n / 2 + 2) u of the norm of n numbers

**Derivatives of models, measured.** g and Hz are sums over paths through the network whose magnitudes nobody knows. But
a rounding of an operator's result is like one of its operands, so that the effect of nudging each weight by a relative
2^-30 says what a relative u does to what was added up, cancellation included. ``strategies.BOUND`` (512 u in the 2-norm
of all parameters) is UNITS times that for every model there: test_tolerances.py, for several seeds. Where u is that of
a smaller dtype (test_zoo.py, test_hvp_dtype.py), the nudge is measured along with what is expected.

**Trajectories, measured.** Two right ways to take several steps differ by ROUNDINGS u a step, multiplied on the way by
what the optimizer does with it: where D is nearly 0, m / (|D| + eps) turns a rounding of D into much more. The
comparisons with other AdaHessians (originals.py) and with one process (distributed_problem.py) measure the growth of a
nudge along with the expected numbers; for others it is at most GROWS, which test_tolerances.py tries on several seeds.
With an eps of 10^-2 that holds by far, and is 10^-8 of a weight after ten steps, and nothing that is wrong is as small.

**Equal bits.** ``torch.equal`` and ``assert_same`` are for the same operators on the same shapes and strides, in one
process: MKL and oneDNN then add in the same order for any instruction set and number of threads. They are also for
what has no rounding: numbers of few bits, copies, probes, and the native kernels for any grouping, place or threads.

``make test-everywhere`` runs all of them with the instruction sets, libraries and threads of other machines and with
other data (TEST_SEED), and lets errors take a half of every bound (TEST_SHARE) but those of the kernels, which are
counted to the last rounding and which correct rounding may reach.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence

import torch
from problem import Problem
from torch import Tensor, nn

from adahessian_fused.reference import block_mean, to_logical, to_stored
from adahessian_fused.segments import Segment, Steps

SHARE = float(os.environ.get("TEST_SHARE", "1"))  # of every bound, that errors may take: 0.5 where luck is looked for
ROUNDINGS = 128  # of a step: forward, both backward passes, the update
UNITS = 4  # of Hz, for each unit by which a nudge of the weights moves it
GROWS = 1e5  # of trajectories whose growth is not measured
largest: list[tuple[float, str]] = []  # share of a bound so far, and the test


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff, doubled where the expected values are no more precise than the results."""
    eps = torch.finfo(dtype).eps
    return eps if dtype == torch.float64 else eps / 2


def storage_rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place at ``value`` in a 16-bit dtype; in the others it is counted already."""
    if torch.finfo(dtype).bits > 16:
        return torch.zeros_like(value)
    info = torch.finfo(dtype)
    return (value.abs() * info.eps / 2).clamp_min(info.smallest_normal * info.eps / 2)


def diag_bound(problem: Problem, ds: Tensor, i: int) -> Tensor:
    """Error of the block means ``ds`` of parameter i, before any accumulation."""
    row = problem.segments[i].tolist()
    u = unit(problem.case.state_dtype)
    bound = 4 * u * ds.abs()
    if problem.case.gaussian:
        d = to_logical(problem.window("hessian", i).double().abs(), row[Segment.PERIOD], row[Segment.STRIDE])
        bound = bound + 4 * min(row[Segment.BLOCK], row[Segment.NUMEL]) ** 0.5 * u * block_mean(d, row[Segment.BLOCK])
    return bound


def _spread(means: Tensor, row: list[int]) -> Tensor:
    """Every block's number to its elements, in storage order."""
    elements = means.repeat_interleave(min(row[Segment.BLOCK], row[Segment.NUMEL]))[: row[Segment.NUMEL]]
    return to_stored(elements, row[Segment.PERIOD], row[Segment.STRIDE])


def update_bounds(
    u: float, hyper: Sequence[float], t: int, h: int, before: Sequence[Tensor], after: Sequence[Tensor],
    d_and_error: Sequence[Tensor] | None, mean: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Errors of m, v and p in one step of some elements.

    Args:
        u: unit roundoff of the arithmetic.
        hyper: a row of the table of hyperparameters.
        t: number of this step, from 1.
        h: number of Hessian steps, this one included.
        before: p and m before the step, and g.
        after: m and v after it, exactly.
        d_and_error: Ds, for every element, and its error; None where v does not change.
        mean: what v_hat is drawn to.
    """
    lr, beta1, beta2, eps, weight_decay, k, maximize, holds, clip, c, nesterov, cautious = hyper
    (p0, m0, g), (m1, v1) = before, after
    m_error = u * (3 * beta1 * m0.abs() + 6 * (1 - beta1) * g.abs())
    v_error, root_shift = torch.zeros_like(v1), torch.zeros_like(v1)
    if d_and_error is not None:
        taken = d_and_error[0] ** 2 < torch.inf
        d, e = (torch.where(taken, x, 0.0) for x in d_and_error)
        v_error = taken * (8 * u * v1 + (1 - beta2) * (2 * d.abs() * e + e**2))
        root_shift = (1 - beta2) ** 0.5 * e
    if h == 0:  # the parameter does not move at all
        return m_error, v_error, torch.zeros_like(p0)
    n = (1 - beta2**h) / (1 - beta2)
    scale, pull = 1 / ((1 - beta2) * (n + c)), c / (n + c) * mean
    root = (scale * v1 + pull).sqrt()
    root_error = 8 * u * root + root_shift * scale**0.5
    power, low, high = root**k, (root - root_error).clamp_min(0) ** k, (root + root_error) ** k
    units = {1.0: 0.0, 0.5: 1.0, 0.0: 0.0}.get(k, 8 + k * root.clamp_min(1e-300).log2().abs())
    denom_error = torch.maximum(high - power, power - low) + units * u * high + 2 * u * (power + eps)
    x, x_error = m1, m_error  # the numerator
    g = -g if maximize else g
    if nesterov:
        x = beta1 * m1 + (1 - beta1) * g
        x_error = beta1 * m_error + u * (3 * beta1 * m1.abs() + 6 * (1 - beta1) * g.abs())
    is_sure = x.abs() > x_error  # of its sign
    opposed = ((g == 0) | ((x < 0) != (g < 0))) & bool(cautious)
    x, x_error = torch.where(opposed, 0.0, x), torch.where(opposed & (is_sure | (g == 0)), 0.0, x_error)
    if cautious:
        x_error = torch.where(is_sure, x_error, 2 * x_error)  # as much as x may be, left out or in
    q, bias1 = x.abs() / (power + eps), 1 - beta1 ** (t + bool(nesterov))
    q_error = (x_error + q * denom_error) / (low + eps)
    q, low, high = (x.clamp(-clip * bias1, clip * bias1) for x in (q, q - q_error, q + q_error))
    q_error = torch.maximum(high - q, q - low) + (6 + 2 * (clip < torch.inf)) * u * q
    p_error = lr / bias1 * q_error + 4 * u * (p0 * (1 - lr * weight_decay)).abs()
    return m_error, v_error, torch.where((v1 == 0) & (holds * k != 0), 0.0, p_error)


def step_bounds(before: Problem, after: Problem, ds: list[Tensor] | None, unscale: float) -> dict[str, list[Tensor]]:
    """Errors of one step for each kind of result and each parameter, in storage order.

    Args:
        before: the inputs, as given to the backend.
        after: the float64 reference's results.
        ds: float64 block means of every parameter; None on an off-step.
        unscale: 1 / grad_scale.
    """
    bounds = {"exp_avg": [], "exp_hessian_diag_sq": [], "param": [], "master": []}
    u = unit(before.case.state_dtype)
    for i, row in enumerate(before.segments.tolist()):
        hyper = before.groups[row[Segment.GROUP]].tolist()
        t = before.steps[row[Segment.SLOT], Steps.STEP].item() + 1
        h = before.steps[row[Segment.SLOT], Steps.HESSIAN_STEP].item() + (ds is not None)
        p0 = before.window("master" if before.case.master else "param", i).double()
        m0, g = before.window("exp_avg", i).double(), before.window("grad", i).double() * unscale
        m1, v1, p1 = (after.window(kind, i) for kind in ("exp_avg", "exp_hessian_diag_sq", "param"))

        d_and_error = None
        if ds is not None:
            d_and_error = [_spread(means, row) * unscale for means in (ds[i], diag_bound(before, ds[i], i))]
        mean = before.means[row[Segment.SLOT]].item()
        m_error, v_error, p_error = update_bounds(u, hyper, t, h, (p0, m0, g), (m1, v1), d_and_error, mean)
        stored = before.case.stored or before.case.state_dtype
        bounds["exp_avg"].append(m_error + 2 * storage_rounding(m1.abs() + m_error, stored))
        v_changes = ds is not None
        bounds["exp_hessian_diag_sq"].append(v_error + v_changes * 2 * storage_rounding(v1 + v_error, stored))
        bounds["master"].append(p_error)
        rounded = h > 0 or before.case.master
        bounds["param"].append(p_error + rounded * storage_rounding(p1.abs() + p_error, before.case.dtype))
    return bounds


def assert_share(excess: float, message: str) -> None:
    """An error in units of its bound is at most SHARE; the largest one is remembered for the summary."""
    largest.append((excess, os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]))
    largest.sort(reverse=True)
    del largest[1:]
    assert excess <= SHARE, message


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str, *, counted: bool = False) -> None:
    """|actual - expected| <= bound everywhere, NaN where NaN is expected; the message names the worst element.

    An error may take the whole of a bound that is ``counted`` to the last rounding: a number in 16 bits is off by half
    a unit in the last place at its worst, and no machine does more.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    excess = torch.where(same, 0.0, (actual - expected).abs() / bound).nan_to_num(torch.inf).flatten()
    if not excess.numel():
        return
    i = int(excess.argmax())
    found, wanted = actual.flatten()[i], expected.expand_as(actual).flatten()[i]
    message = (
        f"{what}[{i}] of {excess.numel()}: found {found:.9g}, expected {wanted:.9g} ({excess[i]:.4g} times the bound; "
        f"{int((excess > (1 if counted else SHARE)).sum())} elements are outside)"
    )
    if counted:
        assert excess[i] <= 1, message
    else:
        assert_share(float(excess[i]), message)


def norm_bound(x: Tensor) -> float:
    """Error of the 2-norm of n numbers: squares and their sum, of one sign, halved by the root."""
    return (x.numel() / 2 + 2) * unit(x.dtype) * float(x.double().norm())


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|found - expected| / |expected| in the 2-norm of all tensors together."""
    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


def assert_error(found: Sequence[Tensor], expected: Sequence[Tensor], bound: float, what: str = "") -> None:
    """The relative error is at most ``bound``."""
    error = relative_error(found, expected)
    assert_share(error / bound if error else 0.0, f"{what} is off by {error:.2g} of its norm; expected {bound:.2g}")


# ---- trajectories ----------------------------------------------------------------------------------------------------

NUDGE = 2.0**-30


def nudge(model: nn.Module) -> nn.Module:
    """The model with each weight off by NUDGE of itself, up or down."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + NUDGE * (2 * torch.randint_like(p, 2) - 1))
    return model


def effect(of: Callable[[nn.Module], Sequence[Tensor]], model: nn.Module, exact: Sequence[Tensor]) -> Tensor:
    """What a rounding of one in each weight does to the norm of each result ``exact``: the mean of several nudges."""
    found = [of(nudge(copy.deepcopy(model))) for _ in range(4)]
    moved = [torch.stack([(a - b).norm() for a, b in zip(results, exact, strict=True)]) for results in found]
    return torch.stack(moved).square().mean(0).sqrt() / NUDGE


def growth(nudged: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """By how much a computation multiplies relative errors of the weights it starts from."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(nudged, expected, strict=True) if b.any()]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs) / NUDGE


def assert_trajectory(
    found: Sequence[Tensor], expected: Sequence[Tensor], steps: int, grows: float = GROWS, roundings: float = ROUNDINGS
) -> None:
    """Both are right up to so many roundings in each step, whose errors grow like those of a nudge before the first."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not b.numel():
            continue
        eps = torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0  # counts of batches
        bound = roundings * steps * eps * max(grows, 1) * b.detach().abs().max()
        assert_within(a, b, bound, f"tensor {i}")
