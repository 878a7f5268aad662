r"""The double backward of every normalisation, in plain PyTorch: the specification of the fused kernels.

With the statistics :math:`\mu` and s (1 / standard deviation) of n numbers, and :math:`\hat x = s (x - \mu)`, a layer
:math:`y = w \hat x + b` has the gradients

.. math:: g_x = P(w g), \quad g_w = \textstyle\sum g \hat x, \quad g_b = \sum g, \qquad
          P(u) = s \big(u - \bar u - \hat x \, \overline{u \hat x}\big)

where bars are means over these n numbers (Ioffe and Szegedy 2015, section 3). P is symmetric, and the transposed
Jacobian of :math:`\hat x`. For cotangents :math:`v, v_w, v_b` of the three, with :math:`u = w g`, differentiate

.. math:: \langle v, P(u) \rangle + v_w \textstyle\sum g \hat x + v_b \sum g, \qquad \langle v, P(u) \rangle =
          s \big( \textstyle\sum v u - n \bar v \bar u - n \, \overline{v \hat x} \, \overline{u \hat x} \big):

.. math::
    g &: \quad w P(v) + v_w \hat x + v_b \\
    w &: \quad \textstyle\sum g P(v) \\
    x &: \quad P\big(v_w g - s (\overline{v \hat x} \, u + \overline{u \hat x} \, v)\big)
               - s \hat x \, \overline{u P(v)}

The last follows from :math:`ds / dx = -s^2 \hat x / n` and from :math:`P` as the transposed Jacobian of
:math:`\hat x`. Without centring (RMS norm) the terms :math:`\mu, \bar u, \bar v` are absent. With fixed statistics
(batch norm in eval mode) :math:`P(u) = s u`, and the gradient of x is :math:`P(v_w g)`.

Where gradients are enabled the statistics are taken as the functions of x that they are, so that autograd can go on
from here to derivatives of any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]


def norm_double_backward(
    v: Tensor,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    *,
    over: list[int],
    shared: list[int],
    fixed: bool = False,
) -> Gradients:
    """Return the gradients of ``grad``, x and the weight.

    Args:
        v: cotangent of the input's gradient, shape of x.
        v_weight: cotangent of the weight's gradient, broadcasts to x; None is 0.
        v_bias: cotangent of the bias's gradient, likewise.
        grad: gradient of the output.
        x: input.
        weight: weight, broadcasts to x; None is 1.
        mean: mean, broadcasts to x; None is 0 and not subtracted (RMS norm).
        invstd: 1 / standard deviation, likewise. Its dtype is that of arithmetic.
        over: dimensions the statistics were taken over.
        shared: dimensions that share a weight.
        fixed: the statistics are constants.

    Returns:
        The gradients in the dtype of arithmetic: two in the shape of x, one with ``shared`` dimensions of length 1.
    """
    s = invstd
    v, grad, x = (t.to(s.dtype) for t in (v, grad, x))

    def average(t: Tensor) -> Tensor:
        return t.mean(over, keepdim=True)

    def project(t: Tensor) -> Tensor:
        if fixed:
            return s * t
        centred = t if mean is None else t - average(t)
        return s * (centred - x_hat * average(t * x_hat))

    if torch.is_grad_enabled() and not fixed:
        mean = None if mean is None else average(x)
        variance = average((x if mean is None else x - mean).square())
        s = (s**-2 + variance - variance.detach()).rsqrt()
    x_hat = s * (x if mean is None else x - mean)
    p = project(v)
    d_weight = (grad * p).sum(shared, keepdim=True)
    d_grad = p if weight is None else weight * p
    u = grad if weight is None else weight * grad
    if v_weight is not None:
        d_grad = d_grad + v_weight * x_hat
    if v_bias is not None:
        d_grad = d_grad + v_bias
    inner = torch.zeros_like(x) if v_weight is None else v_weight * grad
    if fixed:
        return d_grad, project(inner), d_weight
    inner = inner - s * (average(v * x_hat) * u + average(u * x_hat) * v)
    return d_grad, project(inner) - s * x_hat * average(u * p), d_weight


def batch_norm_double_backward(
    v: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    fixed: bool,
) -> Gradients:
    """Return :func:`norm_double_backward` of batch norm.

    Shapes:
        v, grad, x: (N, C, ...), contiguous or channels_last, all in the same way.
        v_weight, v_bias, weight, mean, invstd: (C,).

    ``fixed``: the statistics are constants (eval mode).
    """
    numbers = (t if t is None else t.view(-1, *[1] * (x.dim() - 2)) for t in (v_weight, v_bias, weight, mean, invstd))
    v_weight, v_bias, w, mean, invstd = numbers
    others = [i for i in range(x.dim()) if i != 1]
    return norm_double_backward(v, v_weight, v_bias, grad, x, w, mean, invstd, over=others, shared=others, fixed=fixed)


def row_norm_double_backward(
    v: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    groups: int,
) -> Gradients:
    """Return :func:`norm_double_backward` of layer, RMS and group norm.

    Shapes:
        v, grad, x: (rows, channels, pixels), contiguous; each row has statistics of its own.
        v_weight, v_bias, weight: (groups * channels,).
        mean, invstd: (rows,).

    ``groups``: row r has the weights of channels (r % groups) * channels and on.
    """
    shape = (-1, groups, *x.shape[1:])
    v, grad, y = (t.reshape(shape) for t in (v, grad, x))
    v_weight, v_bias, w = (t if t is None else t.reshape(groups, -1, 1) for t in (v_weight, v_bias, weight))
    mean, invstd = (t if t is None else t.reshape(-1, groups, 1, 1) for t in (mean, invstd))
    return norm_double_backward(v, v_weight, v_bias, grad, y, w, mean, invstd, over=[2, 3], shared=[0, 3])
