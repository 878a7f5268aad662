"""AdaHessian and Hutchinson's estimator as functions, without an optimizer object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, hvp
from .bucket import MEAN, Entry, by_bucket, make_buckets
from .checks import (
    CHOICES,
    check_apart,
    check_block_size,
    check_choice,
    check_count,
    check_param,
    check_rule,
    check_seed,
)
from .curvature import Curvature, differentiate, initial_seed
from .layout import block_length
from .update import HyperTable, Parts, parts_of, prepared_update


def _entries(
    params: Sequence[Tensor],
    states: Sequence[dict[str, Any]] | None,
    block_size: int | str,
    averaging: str,
    state_dtype: torch.dtype | None = None,
    keep_means: bool = False,
) -> list[Entry]:
    check_block_size(block_size)
    check_choice("averaging", averaging, CHOICES["averaging"])
    entries = []
    for i, p in enumerate(params):
        check_param(p, f"params[{i}]")
        entry = Entry(p, f"params[{i}]", i, 0, {} if states is None else states[i])
        entry.describe(block_length(p.shape, block_size), averaging)
        entries.append(entry)
    check_apart((entry.name, entry.param) for entry in entries)
    make_buckets(entries, with_states=states is not None, state_dtype=state_dtype, keep_means=keep_means)
    return entries


def _state_dtype(exp_avgs: Sequence[Tensor], exp_hessian_diag_sqs: Sequence[Tensor]) -> torch.dtype | None:
    """Return AdaHessian's option for states like these: bfloat16 if they are, all of them."""
    dtypes = {tensor.dtype for tensor in (*exp_avgs, *exp_hessian_diag_sqs)}
    if torch.bfloat16 not in dtypes:
        return None
    if len(dtypes) > 1:
        found = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"exp_avgs and exp_hessian_diag_sqs are {found}; expected all of them in torch.bfloat16 or none"
        )
    return torch.bfloat16


@torch.no_grad()
def adahessian(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    hvps: Sequence[Tensor] | None,
    exp_avgs: Sequence[Tensor],
    exp_hessian_diag_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    hessian_steps: Sequence[Tensor],
    hessian_diag_sq_means: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    hessian_power: float = 1.0,
    block_size: int | str = "auto",
    averaging: str = "signed",
    maximize: bool = False,
    unmeasured: str = "hold",
    clip: float | None = None,
    shrink: float = 0.0,
    nesterov: bool = False,
    cautious: bool = False,
    seed: int = 0,
    sample: int = 0,
    is_hvp: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Perform one AdaHessian step on lists of tensors, in place, in the manner of ``torch.optim``'s functional forms.

    The optimizer keeps its states in flat buffers; here they are copied into such buffers and back, which costs time.

    Args:
        params: parameters.
        grads: gradients, shapes of ``params``.
        hvps: Hz for the probe that ``rademacher`` draws from (seed, hessian_steps, sample) for parameters numbered in
            this order; or D itself with ``is_hvp=False``; None for an off-step.
        exp_avgs: m, float32 (float64 for float64 parameters), shapes of ``params``; or all m and v in bfloat16, which
            are then rounded stochastically.
        exp_hessian_diag_sqs: v, likewise.
        state_steps: int64 scalars, steps so far; increased by one.
        hessian_steps: int64 scalars, Hessian updates so far; increased by one if ``hvps`` is given.
        hessian_diag_sq_means: for ``shrink``, float64 scalars: the mean of v / (1 - beta2^h) over each parameter after
            its last Hessian step, 0 before the first one; updated.
        lr: learning rate, a number or a tensor.
        beta1: decay rate of m.
        beta2: decay rate of v.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        hessian_power: k in [0, 1].
        block_size: as for :class:`~adahessian_fused.AdaHessian`.
        averaging: "signed" or "abs".
        maximize: ascend instead of descending.
        unmeasured: "hold": elements with v = 0 do not move; "move": they move by m / eps.
        clip: as for :class:`~adahessian_fused.AdaHessian`.
        shrink: likewise; needs ``hessian_diag_sq_means``.
        nesterov: as for :class:`~adahessian_fused.AdaHessian`.
        cautious: likewise.
        seed: key of the probe's generator, and of the one that rounds to bfloat16.
        sample: number of the probe.
        is_hvp: multiply ``hvps`` by the probe.
        grad_scale: divide gradients and curvature by it.
        found_inf: change nothing unless it is zero.
        backend: as for :class:`~adahessian_fused.AdaHessian`.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_hessian_diag_sqs": exp_hessian_diag_sqs}
    lists |= {"state_steps": state_steps, "hessian_steps": hessian_steps} | ({} if hvps is None else {"hvps": hvps})
    lists |= {} if hessian_diag_sq_means is None else {"hessian_diag_sq_means": hessian_diag_sq_means}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors; expected {len(params)}, one for each parameter")
        for i, (p, tensor) in enumerate(zip(params, tensors, strict=True)):
            if name in ("grads", "hvps") and tensor.shape != p.shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}; expected {tuple(p.shape)}")
    group: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    group |= {"hessian_power": hessian_power, "maximize": maximize, "unmeasured": unmeasured}
    group |= {"clip": clip, "shrink": shrink, "nesterov": nesterov, "cautious": cautious}
    check_rule(group)
    check_seed(seed)
    if shrink and hessian_diag_sq_means is None:
        raise ValueError(f"shrink={shrink!r} without hessian_diag_sq_means; expected a float64 scalar a parameter")
    if found_inf is not None and found_inf.item() != 0:
        return
    keys = ("exp_avg", "exp_hessian_diag_sq", "step", "hessian_step")
    given = list(zip(exp_avgs, exp_hessian_diag_sqs, state_steps, hessian_steps, strict=True))
    states = [dict(zip(keys, values, strict=True)) for values in given]
    means = list(hessian_diag_sq_means or ()) if shrink else []
    for state, mean in zip(states, means, strict=False):
        if mean != 0:
            state[MEAN] = mean
    state_dtype = _state_dtype(exp_avgs, exp_hessian_diag_sqs)
    entries = _entries(params, states, block_size, averaging, state_dtype, keep_means=shrink > 0)
    tools = backends.ByDevice(backend)
    table = torch.tensor([HyperTable.row(group, lr)], dtype=torch.float64, device="cpu")
    curvature = None
    if hvps is not None:
        curvature = Curvature(tools, seed)
        curvature.add({e: e.stored(h) for e, h in zip(entries, hvps, strict=True)}, sample=sample, is_hvp=is_hvp)
    updates = [
        prepared_update(
            bucket,
            members,
            [grads[entry.param_id] for entry in members],
            "hold" if curvature is None else "fresh",
            curvature,
            bucket.table_of(members),
            table,
            tools[bucket.device.type],
            seed=seed,
            rounding_seed=seed,
            grad_scale=grad_scale,
            found_inf=None,
        )
        for bucket, members in by_bucket(entries).items()
    ]
    Parts(parts_of(updates)).do()
    for entry, values in zip(entries, given, strict=True):
        for key, tensor in zip(keys, values, strict=True):
            tensor.copy_(entry.views[key])
    for entry, mean in zip(entries, means, strict=False):
        if MEAN in entry.views:
            mean.copy_(entry.views[MEAN])


def hutchinson_diagonal(
    loss_or_fn: Tensor | Callable[[], Tensor],
    params: Sequence[Tensor],
    *,
    n_samples: int = 1,
    block_size: int | str = 1,
    averaging: str = "signed",
    probe: str = "rademacher",
    seed: int | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Estimate the Hessian diagonal by Hutchinson's method, averaged over blocks (paper Eq. 6 and 7).

    Args:
        loss_or_fn: a scalar loss with its graph (which is freed), or a function that returns one.
        params: parameters to differentiate by.
        n_samples: probes to average; the variance falls as 1 / n_samples.
        block_size: as for :class:`~adahessian_fused.AdaHessian`.
        averaging: "signed" or "abs".
        probe: "rademacher" or "gaussian".
        seed: key of the probe's generator; None for ``torch.initial_seed()``.
        backend: as for :class:`~adahessian_fused.AdaHessian`.

    Returns:
        One tensor a parameter, of its shape; every element of a block has the block's mean. Zeros for parameters the
        loss does not depend on, or depends on linearly.

    Example:
        >>> import torch, adahessian_fused
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> adahessian_fused.hutchinson_diagonal((x**3).sum(), [x])
        [tensor([ 6., 12.])]
    """
    check_choice("probe", probe, CHOICES["probe"])
    check_count("n_samples", n_samples)
    seed = initial_seed() if seed is None else seed
    check_seed(seed)
    given: Any = params
    given = [given] if isinstance(given, torch.nn.Module) else list(given)
    if wrong := [type(p).__name__ for p in given if not isinstance(p, Tensor)]:
        raise TypeError(f"params has a value of type {wrong[0]}; expected tensors, such as model.parameters()")
    params = given
    tools = backends.ByDevice(backend)
    entries = _entries(params, None, block_size, averaging)
    with torch.enable_grad():
        loss = loss_or_fn() if callable(loss_or_fn) else loss_or_fn
        grads = hvp.first_order(loss, params, None)
    chosen = hvp.differentiable(grads)
    curvature = Curvature(tools, seed)
    with torch.no_grad():
        part = curvature, [entries[i] for i in chosen], [grads[i] for i in chosen], probe
        differentiate([part], n_samples=n_samples)
        curvature.fold()
        diags = {bucket: curvature.diag(bucket) for bucket in by_bucket(entries)}
        return [entry.bucket.spread(diags[entry.bucket], entry) for entry in entries]
