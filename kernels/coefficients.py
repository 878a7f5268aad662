"""The coefficients of a step, a row for each distinct pair of step counts and hyperparameters.

From tables on the host they are computed there, in float64; from tables on the device by a small kernel, so that the
host never waits (capturable).
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from adahessian_fused.segments import Hyper, Steps

from .adahessian_math import Coefficients, divide_rn
from .tile import kernel

_COLUMNS = tl.constexpr(len(Coefficients._fields))
_HYPERS = tl.constexpr(len(Hyper))


@triton.jit
def load_coefficients(table, pair, grad_scale, means, slot):
    """Load the row of the table of coefficients, with the scale of GradScaler taken out of g and D, and the mean in."""
    c = table + pair * _COLUMNS
    inv_scale = tl.load(c + 13)
    pull = tl.load(c + 7)
    if means is not None:
        pull *= tl.load(means + slot).to(pull.dtype)
    if grad_scale is not None:
        inv_scale = divide_rn(inv_scale, tl.load(grad_scale).to(inv_scale.dtype))
    return Coefficients(
        tl.load(c + 0),
        tl.load(c + 1),
        tl.load(c + 2),
        tl.load(c + 3),
        tl.load(c + 4),
        tl.load(c + 5),
        tl.load(c + 6),
        pull,
        tl.load(c + 8),
        tl.load(c + 9),
        tl.load(c + 10),
        tl.load(c + 11),
        tl.load(c + 12) * inv_scale,
        inv_scale,
        tl.load(c + 14),
        tl.load(c + 15),
        tl.load(c + 16),
    )


def host_coefficients(groups: np.ndarray, counts: np.ndarray, curvature: bool, has_means: bool) -> np.ndarray:
    """Compute a row of :class:`Coefficients` for each row of hyperparameters and step counts; float64."""
    lr, beta1, beta2, eps, weight_decay, power, maximize, holds, clip, shrink, nesterov, cautious = groups.T
    bias1 = 1 - beta1 ** (counts[:, Steps.STEP] + 1 + (nesterov != 0))
    h = counts[:, Steps.HESSIAN_STEP] + curvature
    n = (1 - beta2 ** np.maximum(h, 1)) / (1 - beta2)
    shrink = shrink * has_means
    columns = Coefficients(
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        decay=1 - lr * weight_decay,
        step_size=lr / bias1,
        scale=np.where(h > 0, 1 / ((1 - beta2) * (n + shrink)), 0),
        pull=np.where(h > 0, shrink / (n + shrink), 0),
        eps=eps,
        power=power,
        held=np.where((holds != 0) & (power != 0), 0, -1),
        clip=clip * bias1,
        grad_factor=np.where(maximize != 0, -1, 1),
        hessian_factor=np.ones_like(lr),
        moves=h > 0,
        nesterov=nesterov,
        stays=np.where(cautious != 0, 0, np.nan),
    )
    return np.stack(columns, 1)


@triton.jit
def power_of_count(beta, n):
    """Return beta^n in float64; exact for n = 1, where 1 - beta^n cancels most."""
    return tl.where(n == 1, beta, tl.exp2(n.to(tl.float64) * tl.log2(beta)))


@kernel
def coefficients_kernel(coefficients, pairs, groups, steps, curvature, has_means):
    """Compute host_coefficients on the device, a row a program: nothing waits for step counts or hyperparameters."""
    pair = tl.program_id(0)
    hyper = groups + tl.load(pairs + 2 * pair + 1) * _HYPERS
    lr = tl.load(hyper + 0)
    beta1 = tl.load(hyper + 1)
    beta2 = tl.load(hyper + 2)
    power = tl.load(hyper + 5)
    shrink = tl.load(hyper + 9) * has_means
    counts = steps + tl.load(pairs + 2 * pair) * 2
    nesterov = tl.load(hyper + 10)
    h = tl.load(counts + 1) + curvature
    bias1 = 1 - power_of_count(beta1, tl.load(counts) + 1 + (nesterov != 0))
    n = (1 - power_of_count(beta2, tl.maximum(h, 1))) / (1 - beta2)
    c = coefficients + pair * _COLUMNS
    tl.store(c + 0, beta1)
    tl.store(c + 1, 1 - beta1)
    tl.store(c + 2, beta2)
    tl.store(c + 3, 1 - beta2)
    tl.store(c + 4, 1 - lr * tl.load(hyper + 4))
    tl.store(c + 5, lr / bias1)
    tl.store(c + 6, tl.where(h > 0, 1 / ((1 - beta2) * (n + shrink)), 0))
    tl.store(c + 7, tl.where(h > 0, shrink / (n + shrink), 0))
    tl.store(c + 8, tl.load(hyper + 3))
    tl.store(c + 9, power)
    tl.store(c + 10, tl.where((tl.load(hyper + 7) != 0) & (power != 0), 0.0, -1.0))
    tl.store(c + 11, tl.load(hyper + 8) * bias1)
    tl.store(c + 12, tl.where(tl.load(hyper + 6) != 0, -1.0, 1.0))
    tl.store(c + 13, 1.0)
    tl.store(c + 14, tl.where(h > 0, 1.0, 0.0))
    tl.store(c + 15, nesterov)
    tl.store(c + 16, tl.where(tl.load(hyper + 11) != 0, 0.0, float("nan")))
