"""LSTM, GRU and plain recurrent layers, with a double backward whose products are of all time steps together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import recurrence
from .operator import Operator, Tensors, by_autograd, call


@dataclass
class Recurrence(Operator):
    """One layer in one direction, given what the inputs contribute: :mod:`.recurrence` has shapes and formulas."""

    kind: str
    sizes: Tensor | None
    reverse: bool

    def forward(self, a: Tensor, w: Tensor, b: Tensor | None, state: Tensor) -> tuple[tuple[Tensor, Tensor], Tensors]:
        recurrence.prepare(a.device.type)
        w = w.contiguous()
        given = a.contiguous(), w, b, state.contiguous()
        y, final, gates, previous = recurrence.run(self.kind, *given, self.sizes, self.reverse)
        return (y, final), (a, w, b, state, gates, previous)

    def backward(
        self,
        grad: Tensor | None,
        grad_final: Tensor | None,
        a: Tensor,
        w: Tensor,
        b: Tensor | None,
        state: Tensor,
        gates: Tensor,
        previous: Tensor,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        grad = None if grad is None else grad.contiguous()
        final = torch.zeros_like(state) if grad_final is None else grad_final.contiguous()
        found = recurrence.run_backward(self.kind, w, grad, final, gates, previous, self.sizes, self.reverse)
        d_gates, d_each, d_state = found
        d_u = d_gates.narrow(1, d_gates.shape[1] - len(w), len(w))
        d_w = d_u.T @ previous[0] if mask[1] else None
        d_b = d_u[:, -len(b) :].sum(0) if mask[2] else None
        return d_gates.narrow(1, 0, a.shape[1]), d_w, d_b, d_state, d_gates, d_each

    def double_backward(
        self,
        cotangents: Tensors,
        grad: Tensor | None,
        grad_final: Tensor | None,
        a: Tensor,
        w: Tensor,
        b: Tensor | None,
        state: Tensor,
        gates: Tensor,
        previous: Tensor,
        d_gates: Tensor,
        d_each: Tensor,
        *,
        mask: Sequence[bool],
    ) -> Tensors:
        if torch.is_grad_enabled():
            return by_autograd(self._plain, cotangents[:4], (grad, grad_final), (a, w, b, state), mask)
        v_a, v_w, v_b, v_state = cotangents[:4]
        width, d_u = d_gates.shape[1], d_gates[:, -len(w) :]
        terms = [] if v_a is None else [_padded_to(width, v_a, first=True)]
        if v_w is not None:
            terms.append(_padded_to(width, previous[0] @ v_w.T))
        if v_b is not None:
            terms.append(_padded_to(width, v_b).expand_as(d_gates))
        p = functools.reduce(torch.add, terms or [torch.zeros_like(d_gates)]).to(w.dtype).contiguous()
        v_state = torch.zeros_like(state) if v_state is None else v_state.contiguous()
        on_h = None if v_w is None else (d_u @ v_w).to(w.dtype)  # autocast may be on
        given = p, w, v_state, gates, previous, d_each, on_h
        found = recurrence.run_double_backward(self.kind, *given, self.sizes, self.reverse)
        t_h, t_final, t_before, t_gates, t_state = found
        t_u = t_gates.narrow(1, width - len(w), len(w))
        t_w = torch.addmm(t_u.T @ previous[0], d_u.T, t_before) if mask[3] else None
        t_b = t_u[:, -len(b) :].sum(0) if mask[4] else None
        return t_h, t_final, t_gates.narrow(1, 0, a.shape[1]), t_w, t_b, t_state

    def _plain(self, a: Tensor, w: Tensor, b: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        return recurrence.recurrence(self.kind, a, w, b, state, self.sizes, self.reverse)[:2]


def _padded_to(width: int, t: Tensor, *, first: bool = False) -> Tensor:
    """Return a tensor with zeros before or, if it comes first, behind what it has along its last axis."""
    lacking = width - t.shape[-1]
    return F.pad(t, (0, lacking) if first else (lacking, 0)) if lacking else t  # which would copy


def _direction(
    kind: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one layer in one direction: h of each step, and h and c after the last one.

    Args:
        kind: as in :func:`.recurrence.recurrence`.
        x: inputs of all steps, (rows, inputs).
        h: before the first step, (batch, H).
        c: likewise; None if there is none.
        weights: of the input and of h, their biases if any, and the projection if any.
        sizes: as in :func:`.recurrence.recurrence`.
        reverse: likewise.
    """
    (w_x, w), biases = weights[:2], weights[2:4] if len(weights) >= 4 else ()
    projection = weights[-1] if len(weights) % 2 else None
    width, b = len(w) // {"lstm": 4, "gru": 3}.get(kind, 1), None
    b_x = biases[0] + biases[1] if biases and kind != "gru" else None
    if kind == "gru":
        w_x = w_x.roll(width, 0)
        if biases:
            b_x, b = (biases[0] + F.pad(biases[1][:-width], (0, width))).roll(width), biases[1][-width:]
    a = F.linear(x, w_x, b_x)
    dtype, wide = a.dtype, torch.promote_types(a.dtype, torch.float32)
    if kind == "gru" and not x.is_cuda:  # what autocast makes of a mean of h and a 16-bit number
        dtype = torch.promote_types(dtype, h.dtype)
    a, w, h, b = (t if t is None else t.to(wide) for t in (a, w, h, b))
    if projection is not None:  # h = P u: a layer of u with the recurrent weight W P, but for the h that is given
        first = _first_rows(len(x), len(h), sizes, reverse).to(x.device)
        a, h = a.index_add(0, first, (h @ w.T).to(wide)), h.new_zeros(len(h), width)
        w = (w @ projection.to(wide)).to(wide)
    state = h.unsqueeze(0) if c is None else torch.stack([h, c.to(wide)])
    y, final = call(Recurrence(kind, sizes, reverse), a, w, b, state)
    y, h = y.to(dtype), final[0].to(dtype)
    if projection is not None:
        y, h = F.linear(y, projection), F.linear(h, projection)
    return y, h, None if c is None else final[1].to(dtype)


def _first_rows(n: int, batch: int, sizes: Tensor | None, reverse: bool) -> Tensor:
    """Return the rows of the first step of each sequence."""
    if sizes is None or not reverse:
        return torch.arange(n - batch, n) if reverse else torch.arange(batch)
    sequences = torch.arange(batch)
    last = (sizes > sequences[:, None]).sum(1) - 1  # step, by sequence
    return (sizes.cumsum(0) - sizes)[last] + sequences


def _layers(
    kind: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    params: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    sizes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    directions = 2 if bidirectional else 1
    n = len(params) // (num_layers * directions)
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            i = len(finals)
            given = h[i], None if c is None else c[i]
            y, *final = _direction(kind, x, *given, params[i * n : (i + 1) * n], sizes, bool(direction))
            outputs.append(y)
            finals.append(tuple(t for t in final if t is not None))
        x = torch.cat(outputs, 1) if bidirectional else outputs[0]
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    return x, *map(torch.stack, zip(*finals, strict=True))


def _padded(
    kind: str,
    input: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    h, c = hx if kind == "lstm" else (hx, None)
    steps = input.transpose(0, 1) if batch_first else input
    y, *final = _layers(kind, steps.flatten(0, 1), h, c, params, num_layers, dropout * train, bidirectional)
    y = y.unflatten(0, steps.shape[:2])
    return y.transpose(0, 1) if batch_first else y, *final


def _packed(
    kind: str,
    data: Tensor,
    batch_sizes: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    h, c = hx if kind == "lstm" else (hx, None)
    return _layers(kind, data, h, c, params, num_layers, dropout * train, bidirectional, batch_sizes)


def layers(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    """Stand in for torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu: of a padded batch, or of a packed one."""

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
        return (_packed if packed else _padded)(kind, *args, **kwargs)

    return run
