r"""A recurrent layer in one direction: what happens step by step, as operators that fused kernels implement.

With previous states h' (and c' of an LSTM), what the input contributes :math:`a` and :math:`u = W h' + b`, a step is

.. math::
    \text{LSTM} &: \quad i, f, o = \sigma(a + u), \; g = \tanh(a + u), \quad c = f c' + i g, \quad h = o \tanh c \\
    \text{GRU} &: \quad r, z = \sigma(a + u), \; n = \tanh(a_n + r u_n), \quad h = (1 - z) n + z h' \\
    \text{others} &: \quad h = \tanh(a + u), \; \max(a + u, 0)

Of its gates' arguments, side by side in the order (i, f, g, o) or (n, r, z, :math:`u_n`), a step's tangent is linear:

.. math:: \dot a = p + \dot h' W^T, \qquad \dot c = \phi \dot c' + \textstyle\sum_j k_j \dot a_j, \qquad
          \dot h = \kappa \dot c + k_o \dot a_o

where a GRU has one state, :math:`h = c`, and all four gates in the sum; :func:`coefficients` has k, :math:`\phi` and
:math:`\kappa`, elementwise functions of what the forward pass has left. Its adjoint runs the other way:

.. math::
    \bar h &= \bar y + \bar h_+, \qquad \bar c = \bar c_+ + \kappa \bar h + s_c, \qquad
    \bar a_j = k_j \bar c + s_j, \; \bar a_o = k_o \bar h + s_o \\
    \bar h'_+ &= \bar a W + s_h, \qquad \bar c'_+ = \phi \bar c + s_\phi

Without the sources s it is the backward pass. The double backward is, for cotangents v of its results, the tangent pass
with :math:`p = v_a + h' v_W^T + v_b`, which also gives how the coefficients change (:func:`changes`), and the adjoint
pass with the sources that this change makes, :math:`s_j = \dot k_j \bar c, s_c = \dot\kappa \bar h, s_\phi =
\dot\phi \bar c, s_h = \bar a v_W`. All products but :math:`h' W^T` and :math:`\bar a W` are of all steps together.

Rows of all steps lie one after the other, as in ``torch.nn.utils.rnn.PackedSequence``: ``sizes`` says how many of the
``batch`` sequences still run, None that all do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends

Pair = tuple[Tensor, Tensor | None, Tensor | None]
NAMESPACE = "adahessian_fused"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_ROWS = "Tensor? sizes, bool reverse"
_library.define(
    f"recurrence(str kind, Tensor a, Tensor w, Tensor? b, Tensor state, {_ROWS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"recurrence_backward(str kind, Tensor w, Tensor? grad, Tensor final, Tensor gates, Tensor previous, {_ROWS}) -> "
    "(Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "recurrence_double_backward(str kind, Tensor p, Tensor w, Tensor state, Tensor gates, Tensor previous, "
    f"Tensor d_each, Tensor? on_h, {_ROWS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _steps(n: int, batch: int, sizes: Tensor | None, reverse: bool) -> list[slice]:
    """Return the rows of each step, in the order of the steps."""
    lengths = [batch] * (n // batch) if sizes is None else sizes.tolist()
    found = [slice(end - k, end) for end, k in zip(itertools.accumulate(lengths), lengths, strict=True)]
    return found[::-1] if reverse else found


def _lstm(a: Tensor, u: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (a + u).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    t = c.tanh()
    return torch.stack([o * t, c]), torch.cat([i, f, g, o, t], 1)


def _gru(a: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    (n, r, z), (u_r, u_z, q) = a.chunk(3, 1), u.chunk(3, 1)
    r, z = (r + u_r).sigmoid(), (z + u_z).sigmoid()
    n = (n + r * q).tanh()
    return (n + z * (h - n)).unsqueeze(0), torch.cat([n, r, z, q], 1)


def _tanh(a: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y = (a + u).tanh()
    return y.unsqueeze(0), y


def _relu(a: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y = (a + u).relu()
    return y.unsqueeze(0), y


CELLS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"lstm": _lstm, "gru": _gru, "tanh": _tanh, "relu": _relu}


def recurrence(
    kind: str, a: Tensor, w: Tensor, b: Tensor | None, state: Tensor, sizes: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run all steps, by operators that have derivatives of every order.

    Args:
        kind: ``"lstm"``, ``"gru"``, ``"tanh"`` or ``"relu"``.
        a: what the inputs contribute, (rows, 4 H) of an LSTM, (rows, 3 H) of a GRU in the order n, r, z, or (rows, H).
        w: recurrent weight in PyTorch's order, (4 H, H), (3 H, H) or (H, H).
        b: what is added to u_n of a GRU, (H,).
        state: h, and of an LSTM c, before the first step, (states, batch, H).
        sizes: number of rows of each step, int64 on the CPU; None: ``batch`` each.
        reverse: take the last step first.

    Returns:
        h of all steps (rows, H), the states after the last one (states, batch, H), and for the backward passes the
        gates (rows, 5 H: i, f, g, o, tanh c), (rows, 4 H: n, r, z, u_n) or (rows, H), and the states before each step
        (states, rows, H).
    """
    taken = []
    for rows in _steps(len(a), state.shape[1], sizes, reverse):
        n = rows.stop - rows.start
        previous = state[:, :n]
        u = previous[0] @ w.T
        if b is not None:
            u = torch.cat([u[:, : -len(b)], u[:, -len(b) :] + b], 1)
        new, gates = CELLS[kind](a[rows], u, *previous)
        state = torch.cat([new, state[:, n:]], 1)
        taken.append((new[0], gates, previous))
    y, all_gates, befores = zip(*(taken[::-1] if reverse else taken), strict=True)
    return torch.cat(y), state.clone(), torch.cat(all_gates), torch.cat(befores, 1)


def tangent(
    p: Tensor,
    k: Tensor,
    carry: Tensor | None,
    out: Tensor | None,
    w: Tensor,
    state: Tensor,
    sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the tangent of all steps.

    Args:
        p: tangent of the gates' arguments as far as it does not come from the states, (rows, gates * H).
        k: coefficients of these.
        carry: coefficient of the previous state, (rows, H); None: 0.
        out: coefficient of c in h of an LSTM, (rows, H); None: h is c.
        w: as in :func:`recurrence`, of the last gates.
        state: tangent of the states before the first step.
        sizes: as there.
        reverse: as there.

    Returns:
        Tangents of the gates' arguments (rows, gates * H), of the states after each step and before each step, both
        (states, rows, H), and of those after the last one.
    """
    a, state, width = p.clone(), state.clone(), w.shape[1]
    after, before = (p.new_empty(len(state), len(p), width) for _ in range(2))
    for rows in _steps(len(p), state.shape[1], sizes, reverse):
        s = state[:, : rows.stop - rows.start]
        before[:, rows] = s
        a[rows, -len(w) :] += s[0] @ w.T
        terms = (k[rows] * a[rows]).unflatten(1, (-1, width))
        c = terms[:, : terms.shape[1] - (out is not None)].sum(1)
        if carry is not None:
            c += carry[rows] * s[-1]
        s[-1] = c
        if out is not None:
            s[0] = terms[:, -1] + out[rows] * c
        after[:, rows] = s
    return a, after, before, state


def adjoint(
    k: Tensor,
    carry: Tensor | None,
    out: Tensor | None,
    w: Tensor,
    grad: Tensor | None,
    final: Tensor,
    on_cell: Tensor | None,
    on_gates: Tensor | None,
    on_previous: Tensor | None,
    sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the adjoint of all steps, the last one first.

    Args:
        k: as in :func:`tangent`.
        carry: likewise.
        out: likewise.
        w: likewise.
        grad: gradient of h of all steps, (rows, H); None: 0.
        final: gradient of the states after the last step, (states, batch, H).
        on_cell: source of c, (rows, H); None: 0.
        on_gates: source of the gates' arguments, (rows, gates * H); None: 0.
        on_previous: source of the states before each step, (states, rows, H); None: 0.
        sizes: as in :func:`recurrence`.
        reverse: as there.

    Returns:
        Gradients of the gates' arguments (rows, gates * H), of the states after each step (states, rows, H), and of
        those before the first one (states, batch, H).
    """
    state, width = final.clone(), w.shape[1]
    gates, each = torch.empty_like(k), k.new_empty(len(state), len(k), width)
    for rows in reversed(_steps(len(k), state.shape[1], sizes, reverse)):
        s = state[:, : rows.stop - rows.start]
        if grad is not None:
            s[0] += grad[rows]
        if out is not None:
            s[1] += out[rows] * s[0]
        if on_cell is not None:
            s[-1] += on_cell[rows]
        each[:, rows] = s
        gates[rows] = spread(k[rows], s)
        if on_gates is not None:
            gates[rows] += on_gates[rows]
        carried = 0 if carry is None else carry[rows] * s[-1]
        if len(s) == 1:
            s[0] = gates[rows, -len(w) :] @ w + carried
        else:
            s[0], s[1] = gates[rows, -len(w) :] @ w, carried
        if on_previous is not None:
            s += on_previous[:, rows]
    return gates, each, state


def spread(k: Tensor, states: Tensor) -> Tensor:
    """Return coefficients times gates (rows, gates * H), and what each is for: h for o of an LSTM, else c."""
    parts = k.unflatten(1, (-1, states.shape[2]))
    terms = parts * states[-1].unsqueeze(1)
    if len(states) == 2:
        terms = torch.cat([terms[:, :-1], parts[:, -1:] * states[0].unsqueeze(1)], 1)
    return terms.flatten(1)


def coefficients(kind: str, gates: Tensor, previous: Tensor) -> Pair:
    """Compute the coefficients k, carry and out of a step's tangent, for all steps."""
    if kind == "lstm":
        i, f, g, o, t = gates.chunk(5, 1)
        slopes = _slope(gates[:, : 4 * f.shape[1]])
        s_i, s_f, _, s_o = slopes.chunk(4, 1)
        k = torch.cat([g * s_i, previous[1] * s_f, torch.addcmul(i, i, g * g, value=-1), t * s_o], 1)
        return k, f, torch.addcmul(o, o, t * t, value=-1)
    if kind == "gru":
        n, r, z, q = gates.chunk(4, 1)
        k_n = (1 - z) * (1 - n * n)
        k_q = k_n * r
        return torch.cat([k_n, k_q * q * (1 - r), (previous[0] - n) * _slope(z), k_q], 1), z, None
    return (1 - gates * gates if kind == "tanh" else (gates > 0).to(gates.dtype)), None, None


def changes(
    kind: str, gates: Tensor, previous: Tensor, d_arguments: Tensor, d_state: Tensor, d_previous: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the tangents of :func:`coefficients`; None: 0.

    Args:
        kind: as in :func:`recurrence`.
        gates: what it returns.
        previous: likewise.
        d_arguments: tangents of the gates' arguments.
        d_state: of the states after each step.
        d_previous: of the states before each step.
    """
    if kind == "lstm":
        i, f, g, o, t = gates.chunk(5, 1)
        s_i, s_f, _, s_o = _slope(gates[:, : 4 * f.shape[1]]).chunk(4, 1)
        s_g, s_t = 1 - g * g, 1 - t * t
        d_i, d_f, d_g, d_o = d_arguments.chunk(4, 1)
        d_i, d_f, d_g, d_o, d_t = s_i * d_i, s_f * d_f, s_g * d_g, s_o * d_o, s_t * d_state[1]
        k = [
            d_g * s_i + g * (1 - 2 * i) * d_i,
            d_previous[1] * s_f + previous[1] * (1 - 2 * f) * d_f,
            d_i * s_g - 2 * i * g * d_g,
            d_t * s_o + t * (1 - 2 * o) * d_o,
        ]
        return torch.cat(k, 1), d_f, d_o * s_t - 2 * o * t * d_t
    if kind == "gru":
        n, r, z, q = gates.chunk(4, 1)
        s_n, s_r, s_z = 1 - n * n, _slope(r), _slope(z)
        d_n, d_r, d_z, d_q = d_arguments.chunk(4, 1)
        d_r, d_z = s_r * d_r, s_z * d_z
        d_n = s_n * (d_n + r * d_q + q * d_r)
        k_n, d_k_n = (1 - z) * s_n, -d_z * s_n - 2 * n * d_n * (1 - z)
        d_k_r = d_k_n * q * s_r + k_n * (d_q * s_r + q * (1 - 2 * r) * d_r)
        d_k_z = (d_previous[0] - d_n) * s_z + (previous[0] - n) * (1 - 2 * z) * d_z
        return torch.cat([d_k_n, d_k_r, d_k_z, d_k_n * r + k_n * d_r], 1), d_z, None
    return (-2 * gates * d_state[0] if kind == "tanh" else None), None, None


def _slope(sigmoid: Tensor) -> Tensor:
    return sigmoid * (1 - sigmoid)


def backward(
    kind: str,
    w: Tensor,
    grad: Tensor | None,
    final: Tensor,
    gates: Tensor,
    previous: Tensor,
    sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward pass: :func:`adjoint` with the coefficients of ``gates``, ``previous`` and no sources."""
    return adjoint(*coefficients(kind, gates, previous), w, grad, final, None, None, None, sizes, reverse)


def double_backward(
    kind: str,
    p: Tensor,
    w: Tensor,
    state: Tensor,
    gates: Tensor,
    previous: Tensor,
    d_each: Tensor,
    on_h: Tensor | None,
    sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the double backward but for the products that are of all steps together.

    Args:
        kind: as in :func:`recurrence`.
        p: as in :func:`tangent`.
        w: likewise.
        state: likewise.
        gates: what :func:`recurrence` returns.
        previous: likewise.
        d_each: gradients of the states after each step, from :func:`backward`.
        on_h: source of h before each step, (rows, H); None: 0.
        sizes: as in :func:`recurrence`.
        reverse: as there.

    Returns:
        Gradients of the gradients of h of all steps (rows, H) and of the states after the last one, the tangent of h
        before each step (rows, H), and gradients of the gates' arguments and of the states before the first step.
    """
    linear = coefficients(kind, gates, previous)
    t_arguments, after, before, t_final = tangent(p, *linear, w, state, sizes, reverse)
    k, carry, out = changes(kind, gates, previous, t_arguments, after, before)
    on_cell = None if out is None else out * d_each[0]
    on_gates = None if k is None else spread(k, d_each)
    on_previous = torch.zeros_like(d_each)
    if on_h is not None:
        on_previous[0] += on_h
    if carry is not None:
        on_previous[-1] += carry * d_each[-1]
    sources = None, torch.zeros_like(state), on_cell, on_gates, on_previous
    t_gates, _, t_state = adjoint(*linear, w, *sources, sizes, reverse)
    return after[0].clone(), t_final, before[0].clone(), t_gates, t_state


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_library)


@_fake("recurrence")
def _(kind: str, a: Tensor, w: Tensor, b: Tensor | None, state: Tensor, *rows: Any) -> tuple[Tensor, ...]:
    n, width = len(a), w.shape[1]
    gates = {"lstm": 5, "gru": 4}.get(kind, 1) * width
    return a.new_empty(n, width), torch.empty_like(state), a.new_empty(n, gates), a.new_empty(len(state), n, width)


@_fake("recurrence_backward")
def _(kind: str, w: Tensor, grad: Any, final: Tensor, gates: Tensor, previous: Tensor, *_: Any) -> tuple[Tensor, ...]:
    d_gates = gates[:, : 4 * w.shape[1]].contiguous()
    return torch.empty_like(d_gates), torch.empty_like(previous), torch.empty_like(final)


@_fake("recurrence_double_backward")
def _(kind: str, p: Tensor, w: Tensor, state: Tensor, *_: Any) -> tuple[Tensor, ...]:
    h = p.new_empty(len(p), w.shape[1])
    return h, torch.empty_like(state), torch.empty_like(h), torch.empty_like(p), torch.empty_like(state)


def _one_by_one(operator: Any, info: Any, dims: tuple, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Take a batch under vmap one by one."""
    found = [
        operator(*(t if d is None else t.select(d, i).contiguous() for t, d in zip(arguments, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])


run, run_backward, run_double_backward = (
    getattr(torch.ops.adahessian_fused, name).default
    for name in ("recurrence", "recurrence_backward", "recurrence_double_backward")
)
_PLAIN = {run: recurrence, run_backward: backward, run_double_backward: double_backward}
for _operator, _plain in _PLAIN.items():
    _library.impl(_operator, _plain, "CompositeExplicitAutograd")
    torch.library.register_vmap(_operator, functools.partial(_one_by_one, _operator), lib=_library)


@functools.cache
def prepare(device_type: str) -> None:
    """Have the operators' kernels for this kind of device, if there are any; without, they are the plain versions."""
    if device_type == "cpu":
        backends.unavailable_reason("native")  # loads the library that has them
