"""AdaHessian in plain PyTorch: the executable specification (Yao et al. 2021, Algorithm 1).

The four ops have the same names and signatures in every backend. Everything else is tested against this file, run in
float64. Equation numbers are the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import Segment, Steps, n_blocks

_MASK32 = 0xFFFFFFFF
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32 bits of the product of two uint32 numbers held in int64."""
    low = b * (a & 0xFFFF)
    high = b * (a >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Tensor, ...], seed: int | Tensor, rounds: int = 10) -> tuple[Tensor, ...]:
    """Compute Philox4x32 (Salmon et al. 2011): four int64 tensors of uint32 words; the key is the 64-bit ``seed``."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(_PHILOX_M0, c0)
        hi1, lo1 = _mul_hi_lo(_PHILOX_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def rademacher_signs(numel: int, param_id: int, hessian_step: Tensor, seed: int, sample: int, first: int = 0) -> Tensor:
    """Draw the probe z of ``numel`` elements of a parameter, in logical order: +1 and -1, int64, where hessian_step is.

    Philox call number l // 128 of the parameter gives the signs of elements 128 (l // 128) ... + 127: element l reads
    bit l % 32 of word (l // 32) % 4, and a set bit means -1. The elements begin with number ``first``.
    """
    device = hessian_step.device
    call = torch.arange(first // 128, n_blocks(first + numel, 128), device=device)
    constant = torch.ones_like(call)
    words = philox4x32((call, constant * param_id, constant * (hessian_step & _MASK32), constant * sample), seed)
    bits = (torch.stack(words, 1)[..., None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits).reshape(-1)[first % 128 :][:numel]


def rounding_bits(numel: int, param_id: int, step: Tensor, seed: int) -> Tensor:
    """Draw 16 bits for each element 0 ... numel - 1 of a parameter, in STORAGE order: int64, where ``step`` is.

    Philox4x32-7 call number j // 8 of the parameter's step t gives the bits of elements 8 (j // 8) ... + 7: element j
    reads half j % 2 of word (j // 2) % 4. The last word of the counter is one that no sample of a probe has.
    """
    call = torch.arange(n_blocks(numel, 8), device=step.device)
    constant = torch.ones_like(call)
    counter = (call, constant * param_id, constant * (step & _MASK32), constant * _MASK32)
    halves = torch.stack(philox4x32(counter, seed, rounds=7), 1)[..., None] >> torch.tensor([0, 16], device=step.device)
    return (halves & 0xFFFF).reshape(-1)[:numel]


def swap_bytes(bits: Tensor) -> Tensor:
    """Exchange the bytes of 16-bit numbers: what rounds v where ``bits`` round m."""
    return (bits & 0xFF) << 8 | bits >> 8


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Round a float32 tensor to bfloat16: away from zero if the 16 bits cut off, plus 16 random ones, carry.

    The mean over the random bits is x. A finite number stays finite: one beyond bfloat16's largest is cut off.
    """
    word = x.view(torch.int32)
    below_largest = (word & 0x7FFFFFFF) < 0x7F7F0000
    word = torch.where(below_largest, word + bits.to(torch.int32), word)
    return (word >> 16).to(torch.int16).view(torch.bfloat16)


def block_mean(values: Tensor, block: int) -> Tensor:
    """Average each block of ``block`` consecutive elements (Eq. 7); the last block averages what it has.

    Shapes: ``(n,)`` to ``(ceil(n / block),)``.
    """
    whole = values.numel() // block * block
    means = values[:whole].reshape(-1, block).mean(1)
    rest = values[whole:]
    return torch.cat([means, rest.mean(0, keepdim=True)]) if rest.numel() else means


def to_logical(stored: Tensor, period: int, stride: int) -> Tensor:
    """Reorder a flat tensor from storage order to logical order (see :class:`Segment`)."""
    return stored if period == 1 else stored.reshape(-1, period, stride).transpose(1, 2).reshape(-1)


def to_stored(logical: Tensor, period: int, stride: int) -> Tensor:
    """Reorder a flat tensor from logical order to storage order: the inverse of :func:`to_logical`."""
    return to_logical(logical, stride, period) if period > 1 else logical


def _storage(tensor: Tensor) -> Tensor:
    """Return a dense tensor as the flat view of its storage order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def rademacher(z: Tensor, segments: Tensor, steps: Tensor, seed: int, sample: int) -> None:
    """Write the Rademacher probe of every segment into the flat buffer ``z``, each in its parameter's storage order.

    Args:
        z: flat buffer, any floating dtype; elements outside the segments stay as they are.
        segments: :class:`Segment` table.
        steps: :class:`Steps` table; the hessian_step column numbers the probe.
        seed: 64-bit Philox key.
        sample: number of the probe within the step.
    """
    for row in segments.tolist():
        offset, numel = row[Segment.OFFSET], row[Segment.NUMEL]
        hessian_step = steps[row[Segment.SLOT], Steps.HESSIAN_STEP].to(z.device)
        signs = rademacher_signs(numel, row[Segment.PARAM_ID], hessian_step, seed, sample)
        z[offset : offset + numel] = to_stored(signs, row[Segment.PERIOD], row[Segment.STRIDE]).to(z.dtype)


def perturb(
    params: list[Tensor],
    saved: Tensor,
    segments: Tensor,
    steps: Tensor,
    *,
    seed: int,
    sample: int,
    scale: float,
    save: bool,
) -> None:
    """Move every parameter along its probe, p = saved + scale * z, for a finite difference of gradients.

    The probe is that of :func:`rademacher`. With ``scale=0`` the saved values are put back bit for bit.

    Args:
        params: parameters, overwritten; dense, in the storage order their segments declare.
        saved: flat buffer of their dtype; elements outside the segments stay as they are.
        segments: :class:`Segment` table, one row a parameter.
        steps: :class:`Steps` table.
        seed: 64-bit Philox key.
        sample: number of the probe within the step.
        scale: length of the move in every element, rounded to the precision of the states.
        save: first copy the parameters into ``saved``.
    """
    for param, row in zip(params, segments.tolist(), strict=True):
        p, old = _storage(param), saved[row[Segment.OFFSET] : row[Segment.OFFSET] + row[Segment.NUMEL]]
        if save:
            old.copy_(p)
        if scale == 0:
            p.copy_(old)
            continue
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        hessian_step = steps[row[Segment.SLOT], Steps.HESSIAN_STEP].to(p.device)
        signs = rademacher_signs(p.numel(), row[Segment.PARAM_ID], hessian_step, seed, sample)
        z = to_stored(signs, row[Segment.PERIOD], row[Segment.STRIDE]).to(dtype)
        p.copy_(old.to(dtype) + torch.tensor(scale, dtype=dtype, device=p.device) * z)


def _averaged(
    hessian: Tensor, row: list[int], steps: Tensor, seed: int, sample: int, is_hvp: bool, dtype: torch.dtype
) -> Tensor:
    """Compute D = z * Hz (Eq. 6), then its block means (Eq. 7): shape ``(n_blocks,)``, logical order."""
    d = to_logical(_storage(hessian), row[Segment.PERIOD], row[Segment.STRIDE]).to(dtype)
    if is_hvp:
        hessian_step = steps[row[Segment.SLOT], Steps.HESSIAN_STEP].to(d.device)
        d = d * rademacher_signs(d.numel(), row[Segment.PARAM_ID], hessian_step, seed, sample)  # Eq. 6
    return block_mean(d.abs() if row[Segment.ABSOLUTE] else d, row[Segment.BLOCK])  # Eq. 7


def hessian_diag(
    hessians: list[Tensor],
    diag: Tensor,
    segments: Tensor,
    steps: Tensor,
    *,
    seed: int,
    sample: int,
    is_hvp: bool,
    scale: float,
    accumulate: bool,
) -> None:
    """Compute the block-averaged Hutchinson diagonal Ds (Eq. 6 and 7) into the compact buffer ``diag``.

    Args:
        hessians: Hz of every segment in its parameter's shape and storage order, or D itself if not ``is_hvp``.
        diag: flat float32 (float64 for float64 parameters) buffer with one number a block.
        segments: :class:`Segment` table, one row a tensor of ``hessians``.
        steps: :class:`Steps` table.
        seed: 64-bit Philox key.
        sample: number of the probe within the step.
        is_hvp: draw z again and multiply by it.
        scale: factor on the result, for example 1 / n_samples.
        accumulate: add to ``diag`` instead of overwriting it.
    """
    for hessian, row in zip(hessians, segments.tolist(), strict=True):
        means = _averaged(hessian, row, steps, seed, sample, is_hvp, diag.dtype) * scale
        begin = row[Segment.DIAG_OFFSET]
        target = diag[begin : begin + means.numel()]
        target.add_(means) if accumulate else target.copy_(means)


def adahessian_step(
    params: list[Tensor],
    grads: list[Tensor],
    hessians: list[Tensor],
    diag: Tensor | None,
    exp_avg: Tensor,
    exp_hessian_diag_sq: Tensor,
    master: Tensor | None,
    segments: Tensor,
    steps: Tensor,
    groups: Tensor,
    *,
    seed: int,
    sample: int,
    is_hvp: bool,
    rounding_seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    means: Tensor | None,
    missed: Tensor | None,
) -> None:
    """Perform one AdaHessian step (Eq. 6-9) on every segment, in place.

    The curvature comes from ``hessians`` (Hz; z is drawn again) or, already averaged, from ``diag``. With neither this
    is an off-step: exp_hessian_diag_sq and its bias correction stay as they are. So does exp_hessian_diag_sq of an
    element whose Ds is infinite or NaN, or too large to be squared. A parameter that has not seen any curvature yet
    (h = 0), and in groups with ``HOLDS`` an element that has not (v = 0), collects momentum but does not move. The step
    counts are not advanced here.

    With ``NESTEROV`` the numerator of Eq. 9 is what m would be after the same gradient again, as in NAdam (Dozat 2016),
    its weights divided by their sum 1 - beta1^(t + 1). With ``CAUTIOUS`` it is 0 where its sign is not the gradient's
    (Liang et al. 2024, without their factor).

    Args:
        params: parameters, updated in place; dense, in the storage order their segments declare.
        grads: gradients, same shapes, strides and dtypes as ``params``.
        hessians: Hz (or D, if not ``is_hvp``) like ``grads``; empty if there is none or ``diag`` is given.
        diag: compact block-averaged diagonal of :func:`hessian_diag`.
        exp_avg: flat buffer of m, float32 (float64 for float64 parameters), updated in place; or bfloat16, which m is
            rounded to stochastically after the parameter has been moved by it.
        exp_hessian_diag_sq: flat buffer of v, likewise.
        master: flat buffer of float32 weights that 16-bit parameters are rounded from, updated in place.
        segments: :class:`Segment` table, one row a parameter.
        steps: :class:`Steps` table before this step.
        groups: :class:`Hyper` table.
        seed: 64-bit Philox key.
        sample: number of the probe within the step.
        is_hvp: ``hessians`` are Hz and have to be multiplied by z.
        rounding_seed: 64-bit Philox key of the bits that round to bfloat16.
        grad_scale: gradients and curvature are divided by this scalar tensor (GradScaler).
        found_inf: scalar tensor; nothing at all changes if it is not zero.
        means: float64, for each row of ``steps`` the mean of v / (1 - beta2^h) over the whole parameter, which
            ``SHRINK`` draws its elements to; None: they are not.
        missed: int64, increased for each row of ``steps`` by the number of elements whose Ds v could not take in.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    rounds = exp_avg.dtype == torch.bfloat16
    dtype = torch.float32 if rounds else exp_avg.dtype
    unscale = 1.0 if grad_scale is None else 1.0 / grad_scale.to(exp_avg.device, dtype)
    for i, row in enumerate(segments.tolist()):
        hyper = groups[row[Segment.GROUP]]
        lr, beta1, beta2, eps, weight_decay, power, maximize, holds, clip, shrink, nesterov, cautious = hyper.unbind()
        t, h = (steps[row[Segment.SLOT]] + torch.tensor([1, 0], device=steps.device)).unbind()
        span = slice(row[Segment.OFFSET], row[Segment.OFFSET] + row[Segment.NUMEL])
        m, v = exp_avg[span].to(dtype), exp_hessian_diag_sq[span].to(dtype)
        param = _storage(params[i])
        p = (param if master is None else master[span]).to(dtype)
        g = _storage(grads[i]).to(dtype) * unscale
        g = torch.where(maximize != 0, -g, g)
        m = beta1 * m + (1 - beta1) * g  # Eq. 9

        ds = None
        if diag is not None:
            begin = row[Segment.DIAG_OFFSET]
            ds = diag[begin : begin + n_blocks(row[Segment.NUMEL], row[Segment.BLOCK])]
        elif hessians:
            ds = _averaged(hessians[i], row, steps, seed, sample, is_hvp, dtype)
        if ds is not None:
            h = h + 1
            width = min(row[Segment.BLOCK], row[Segment.NUMEL])  # a block may be longer than its parameter
            spread = (ds * unscale).repeat_interleave(width)[: row[Segment.NUMEL]]
            square = to_stored(spread, row[Segment.PERIOD], row[Segment.STRIDE]) ** 2
            measured = square < torch.inf
            v = torch.where(measured, beta2 * v + (1 - beta2) * square, v)  # Eq. 8
            if missed is not None:
                missed[row[Segment.SLOT]] += (~measured).sum()

        n, c = (1 - beta2**h) / (1 - beta2), shrink if means is not None else 0.0
        mean = means[row[Segment.SLOT]].to(dtype) if means is not None else 0.0
        v_hat = (v / (1 - beta2) + c * mean) / (n + c)  # Eq. 8; with c = 0 it is v / (1 - beta2^h)
        denom = v_hat.sqrt() ** power + eps  # Eq. 8 and 9
        numerator, bias1 = m, 1 - beta1**t
        if nesterov != 0:
            numerator, bias1 = beta1 * m + (1 - beta1) * g, 1 - beta1 ** (t + 1)
        if cautious != 0:
            numerator = torch.where(numerator * g.sign() <= 0, 0.0, numerator)
        bound = clip * bias1
        moved = p * (1 - lr * weight_decay) - lr / bias1 * (numerator / denom).clamp(-bound, bound)  # Eq. 9
        stays = (h == 0) | ((holds != 0) & (power != 0) & (v == 0))
        p = torch.where(stays, p, moved)
        if rounds:
            bits = rounding_bits(row[Segment.NUMEL], row[Segment.PARAM_ID], t.to(m.device), rounding_seed)
            m = round_stochastically(m, bits)
            v = round_stochastically(v, swap_bytes(bits)) if ds is not None else v
        exp_avg[span], exp_hessian_diag_sq[span] = m, v
        if master is not None:
            master[span] = p
        param.copy_(p)
