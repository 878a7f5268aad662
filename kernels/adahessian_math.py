"""The maths of AdaHessian (Yao et al. 2021, Algorithm 1) for one element, and the Philox generator behind the probe
and the rounding of states.

Same names and order as csrc/adahessian_math.h; adahessian_fused/reference.py is the specification. Which products are
fused with an addition is said here: a compiler that fuses as it likes may round two kernels differently.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_HAS_PTX = tl.constexpr(not _INTERPRETED.value and torch.version.hip is None)

# ---- Rademacher probe ------------------------------------------------------------------------------------------------

# One Philox call is 128 bits, the signs of 128 consecutive elements of a parameter.
SIGNS_PER_CALL = tl.constexpr(128)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr = 10):
    """Return four uint32 words from a counter and a key of uint32 by Philox4x32 (Salmon et al. 2011)."""
    for _ in tl.static_range(ROUNDS):
        product0_high = tl.umulhi(c0, 0xD2511F53)
        product1_high = tl.umulhi(c2, 0xCD9E8D57)
        product0_low = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)  # meant to wrap around
        product1_low = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = product1_high ^ c1 ^ k0
        c2 = product0_high ^ c3 ^ k1
        c1 = product1_low
        c3 = product0_low
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


class ProbeKey(NamedTuple):
    """Identifies the probe of one parameter: everything but the element's index. All uint32."""

    seed_low: Any
    seed_high: Any
    param_id: Any
    hessian_step: Any
    sample: Any


@triton.jit
def rademacher_words(key, call):
    """Return the signs of logical elements 128 * call ... 128 * call + 127.

    Element l reads bit l % 32 of word (l // 32) % 4; a set bit means -1.
    """
    return philox4x32(call, key.param_id, key.hessian_step, key.sample, key.seed_low, key.seed_high)


@triton.jit
def signs(bits, dtype: tl.constexpr):
    """Return +1 or, where the bit is set, -1: its sign bit and the bits of 1."""
    if dtype == tl.float32:
        z = ((bits << 31) | 0x3F800000).to(tl.float32, bitcast=True)
    elif dtype == tl.bfloat16:
        z = ((bits << 15) | 0x3F80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        z = ((bits << 15) | 0x3C00).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        z = (1 - 2 * bits).to(dtype)
    return z


# ---- stochastic rounding of states -----------------------------------------------------------------------------------

# One Philox call is 128 bits, 16 for each of 8 consecutive elements of a parameter, in storage order.
ROUNDINGS_PER_CALL = tl.constexpr(8)


class RoundingKey(NamedTuple):
    """Identifies the rounding of one parameter's states at one step: everything but the element's index. All uint32."""

    seed_low: Any
    seed_high: Any
    param_id: Any
    step: Any  # t, from 1


@triton.jit
def rounding_words(key, call):
    """Return the bits of stored elements 8 * call ... 8 * call + 7, two to a word, the lower half first.

    Seven rounds pass every test of randomness that ten do (Salmon et al. 2011, Table 2). The last word of the counter
    is one that no sample of a probe has.
    """
    return philox4x32(call, key.param_id, key.step, 0xFFFFFFFF, key.seed_low, key.seed_high, 7)


@triton.jit
def swap_bytes(bits):
    """Return what rounds v where ``bits`` round m: as uniform, dependent only where the first byte leaves it open."""
    return (bits & 0xFF) << 8 | bits >> 8


@triton.jit
def round_stochastically(x, bits):
    """Round a float32 to bfloat16: away from zero if the half that is cut off, plus 16 random bits, carries.

    A finite number stays finite: one beyond bfloat16's largest is cut off.
    """
    word = x.to(tl.uint32, bitcast=True)
    word = tl.where((word & 0x7FFFFFFF) < 0x7F7F0000, word + bits, word)
    return (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


# ---- the update ------------------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """What the update of an element needs, the same for all elements of a parameter: a row of a table."""

    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    decay: Any  # 1 - lr * weight_decay
    step_size: Any  # lr / (1 - beta1^t), with Nesterov's momentum t + 1
    scale: Any  # v_hat = scale v + pull: v / (1 - beta2^h), drawn to its mean over the parameter
    pull: Any  # the kernel multiplies it by the mean
    eps: Any
    power: Any
    held: Any  # the greatest v that holds its element where it is: 0, or -1 for none
    clip: Any  # of numerator / denominator; infinite if there is none
    grad_factor: Any  # -1 to maximize; the kernel divides it by grad_scale
    hessian_factor: Any  # 1; the kernel divides it by grad_scale
    moves: Any  # 0 until the parameter has seen curvature (h = 0)
    nesterov: Any
    stays: Any  # where momentum times gradient is no more, a cautious step is none: 0, or NaN where there are none


@triton.jit
def divide_rn(a, b):
    """Divide as IEEE has it; Triton's own is approximate in float32."""
    return tl.div_rn(a, b) if b.dtype == tl.float32 else a / b


@triton.jit
def square_root(x):
    """Take the square root as IEEE has it; Triton's own is approximate in float32."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def rough_divide(a, b):
    """Divide float32 numbers to two units in the last place: enough for a parameter of 16 bits."""
    if _HAS_PTX:
        b = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], tl.float32, is_pure=True, pack=1)
        q = a * b
    else:
        q = a / b
    return q


@triton.jit
def power_of(x, k):
    """Raise x >= 0 to the power k >= 0; 0^0 is 1."""
    zero = x == 0
    power = tl.exp2(k * tl.log2(tl.where(zero, 1.0, x)))
    return tl.where(zero, tl.where(k > 0, 0.0, 1.0), power)


@triton.jit
def update_exp_avg(m, g, c):
    """Compute Eq. 9's m <- beta1 m + (1 - beta1) g."""
    return tl.fma(c.beta1, m, c.one_minus_beta1 * (c.grad_factor * g))


@triton.jit
def numerator(m, g, c):
    """Return the numerator of Eq. 9: m, or with Nesterov's momentum m after the same gradient once more.

    As in NAdam (Dozat 2016). 0 where a cautious step would go against its gradient's descent (Liang et al. 2024).
    """
    added = c.one_minus_beta1 * (c.grad_factor * g)
    x = tl.where(c.nesterov != 0, tl.fma(c.beta1, m, added), m)
    return tl.where(x * added <= c.stays, 0.0, x)


@triton.jit
def square_of(ds, c):
    """Return Ds^2, of the block means (Eq. 7) of z * Hz (Eq. 6) in tile.py."""
    scaled = c.hessian_factor * ds
    return scaled * scaled


@triton.jit
def is_measured(square):
    """Tell whether v can take Ds^2 in: not where Ds is infinite or NaN, or too large to be squared."""
    return square < float("inf")


@triton.jit
def update_exp_hessian_diag_sq(v, square, c):
    """Compute Eq. 8's v <- beta2 v + (1 - beta2) Ds^2, where that is to be."""
    return tl.where(is_measured(square), tl.fma(c.beta2, v, c.one_minus_beta2 * square), v)


@triton.jit
def denominator(v, c, ROUGH: tl.constexpr):
    """Return sqrt(v_hat)^k + eps of Eq. 8 and 9; ROUGH as in :func:`rough_divide`."""
    v_hat = tl.fma(c.scale, v, c.pull)
    root = tl.sqrt(v_hat) if ROUGH else square_root(v_hat)
    if c.power == 1.0:
        denom = root
    elif c.power == 0.5:
        denom = square_root(root)
    else:
        denom = power_of(root, c.power)
    return denom + c.eps


@triton.jit
def quotient(m, denom, c, ROUGH: tl.constexpr):
    """Return numerator / denominator of Eq. 9, cut at +-clip."""
    q = rough_divide(m, denom) if ROUGH else divide_rn(m, denom)
    if q.dtype == tl.float32:  # one instruction, which there is not for float64
        q = tl.clamp(q, -c.clip, c.clip, propagate_nan=tl.PropagateNan.ALL)
    else:
        q = tl.where(q > c.clip, c.clip, tl.where(q < -c.clip, -c.clip, q))
    return q


@triton.jit
def update_param(p, q, v, c):
    """Compute Eq. 9's p <- p (1 - lr wd) - lr / (1 - beta1^t) * q, unless v has seen no curvature and holds p."""
    return tl.where(v <= c.held, p, tl.fma(-c.step_size, q, p * c.decay))


# ---- storage ---------------------------------------------------------------------------------------------------------


@triton.jit
def widen(x, dtype: tl.constexpr):
    """Convert x to the dtype of arithmetic: bfloat16, two to a word, by one instruction each."""
    if _HAS_PTX and x.dtype == tl.bfloat16 and dtype == tl.float32:
        asm: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        x = tl.inline_asm_elementwise(asm, "=f,=f,r", [x], tl.float32, is_pure=True, pack=2)
    return x.to(dtype)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Convert x to the dtype it is stored in, rounding to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates: round to a number that it converts exactly.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
