"""State dicts: plain tensors for each parameter, loadable across backends, devices and other AdaHessians."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import recipes
from .bucket import MEAN, compute_dtype, stored_dtype
from .checks import plain, warn
from .distributed.sharded import part_of
from .layout import ParameterLayout
from .schedule import last_hessian_step


class Source(NamedTuple):
    """Where a state dict comes from, and how a run of its optimizer is to go on here.

    Attributes:
        name: of the optimizer; empty for one of this package.
        rules: options that it has built in, for groups that have left them at their defaults.
        unknown: what its state dict does not hold.
    """

    name: str = ""
    rules: Mapping[str, Any] = MappingProxyType({})
    unknown: str = ""


ADAM = Source("Adam's family")
_RULES = ("block_size", "averaging")
_DEFAULTS = {  # which a user may have left as they are
    "block_size": "auto",
    "averaging": "abs",
    "warmup": 20,
    "clip": 1.0,
    "nesterov": True,
    "cautious": True,
    "off_step": "hold",
}
_SOURCES = {
    "hessian_step": Source(),
    "hessian step": Source(
        "timm's or davda54's AdaHessian",
        {"block_size": 1, "averaging": "signed", "off_step": "stale"},
        'update_each, n_samples and the averaging over kernels (block_size="conv2d", averaging="abs")',
    ),
    "step": Source("the official code's or torch-optimizer's AdaHessian", {"block_size": "conv2d", "averaging": "abs"}),
    "exp_avg": Source(
        "pytorch-optimizer's AdaHessian", {"block_size": 1, "averaging": "signed"}, "update_each, n_samples and probe"
    ),
}


def check_state_dict(state_dict: Any) -> None:
    """Raise ValueError unless this is what an optimizer's ``state_dict()`` returns."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        found = f"has {[*state_dict]}" if isinstance(state_dict, Mapping) else f"is a {type(state_dict).__name__}"
        raise ValueError(f"the state dict {found}; expected what opt.state_dict() returns: state and param_groups")


def source_of(state_dict: Mapping[str, Any]) -> Source:
    """Return where a state dict comes from, by the keys of its states and groups.

    Raises:
        ValueError: none of the optimizers whose states could be gone on with here.
    """
    check_state_dict(state_dict)
    keys = {key for state in state_dict["state"].values() for key in state}
    ours = all("hessian_power" in group for group in state_dict["param_groups"])
    if "exp_hessian_diag_sq" in keys:
        return next(source for key, source in _SOURCES.items() if key in keys)
    if {"exp_avg", "step"} <= keys and not keys.isdisjoint(("exp_avg_sq", "exp_inf")):
        return ADAM
    if ours and keys <= {"hessian step"}:  # nothing has been stepped yet
        return Source()
    raise ValueError(
        f"the state dict has states with {sorted(keys) or 'nothing'} and groups with "
        f"{sorted(set(state_dict['param_groups'][0]) - {'params'})}; expected those of an AdaHessian, or of Adam, "
        "AdamW or Adamax, whose exp_avg and step can be gone on with"
    )


def normalized_state(
    state: Mapping[str, Any], group: Mapping[str, Any], param: Tensor, state_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Return the state of one parameter as an optimizer with this ``state_dtype`` keeps it.

    Understands its own state dicts and those of the official code, torch-optimizer, timm, davda54/ada-hessian (one
    ``step`` a parameter, v updated on every step) and pytorch-optimizer (``step`` in the group, v updated every
    ``update_each`` steps). Of Adam, AdamW and Adamax the average of the gradient and the count of steps are kept;
    that of the curvature begins with the next Hessian step. Moving averages are never cast to the parameter's
    dtype; where the optimizer keeps them in bfloat16 they are rounded to nearest.
    """
    if "exp_avg" not in state:
        return {}
    step = int(state.get("step", group.get("step", 0)))
    if "exp_hessian_diag_sq" not in state:  # of Adam's family: v is measured anew
        state = {"exp_avg": state["exp_avg"], "hessian_step": 0}
    every = group["update_each"]
    if "step" in state or step == 0:
        updates = step
    else:
        updates = last_hessian_step(group, step - 1)[1] + 1 if callable(every) else math.ceil(step / every)
    hessian_step = int(state.get("hessian_step", updates))
    result: dict[str, Any] = {"step": step, "hessian_step": hessian_step}
    dtypes = dict.fromkeys(("exp_avg", "exp_hessian_diag_sq"), stored_dtype(param.dtype, state_dtype))
    dtypes |= dict.fromkeys(("master_param", "hessian_diag"), compute_dtype(param.dtype)) | {MEAN: torch.float64}
    for key, dtype in dtypes.items():
        if isinstance(state.get(key), Tensor):
            result[key] = state[key].detach().to(param.device, dtype, copy=True)  # its owner may go on training
    return result


def _going_on(own: Mapping[str, Any], group: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Return the options of a group whose run comes from elsewhere."""
    if source is ADAM:
        return {**own, "params": group["params"]}
    rules = {name: value for name, value in recipes.published.items() if name != "averaging"} | dict(source.rules)
    if source.name:  # or else they are options that ours had not when it was saved
        chosen = {name for name in rules if own[name] != _DEFAULTS[name]}
        chosen |= set(_RULES) if chosen & set(_RULES) else set()
        rules = {name: value for name, value in rules.items() if name not in chosen}
    return {**own, **rules, **group}


def own_memory(states: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Return copies of states, none of which shares memory with the buffers."""
    return {
        key: {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        for key, state in states.items()
    }


@contextlib.contextmanager
def without_removed(opt: Optimizer) -> Iterator[None]:
    """Hide the state of parameters in no group, which PyTorch cannot number."""
    placed = {id(p) for group in opt.param_groups for p in group["params"]}
    removed = {p: opt.state.pop(p) for p in list(opt.state) if id(p) not in placed}
    try:
        yield
    finally:
        opt.state.update(removed)


def portable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return PyTorch's own state dict as any checkpoint can hold it, without functions, and anybody may keep it."""
    groups = [
        {name: plain(value) for name, value in group.items() if not callable(value)}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": own_memory(state_dict["state"]), "param_groups": groups}


def with_own_options(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], source: Source
) -> dict[str, Any]:
    """Return a state dict whose groups have the options that it does not know from an optimizer's own groups."""
    own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in groups]
    saved = [*state_dict["param_groups"]]
    if len(saved) == len(own):  # or else PyTorch says what is wrong
        saved = [_going_on(options, group, source) for options, group in zip(own, saved, strict=True)]
    return {**state_dict, "param_groups": saved}


def take_states(opt: Optimizer, state_dict: Mapping[str, Any], source: Source, state_dtype: torch.dtype | None) -> None:
    """Put the states of a state dict, whose groups are loaded, into an optimizer as it keeps them."""
    saved = state_dict["state"]
    ids = [(i, theirs) for theirs in state_dict["param_groups"] for i in theirs["params"]]
    placed = [(group, p) for group in opt.param_groups for p in group["params"]]
    opt.state.clear()
    for (i, theirs), (group, p) in zip(ids, placed, strict=True):
        loaded = normalized_state(saved[i], group, p, state_dtype) if i in saved else {}
        if loaded:
            if source is ADAM and bool(theirs.get("maximize")) != bool(group.get("maximize")):
                loaded["exp_avg"].neg_()  # of the gradient's negative there, or here
            opt.state[p] = loaded
    for group in opt.param_groups:
        steps = [opt.state[p]["step"] for p in group["params"] if p in opt.state]
        group["step"] = 0 if source is ADAM else int(group.get("step", max(steps, default=0)))


def warn_of_source(source: Source, options: Mapping[str, Any]) -> None:
    """Warn that a state dict is not from this class, and tell what was taken."""
    if source is ADAM:
        warn(
            "load_state_dict() took exp_avg and step of a state dict of Adam's family; exp_hessian_diag_sq begins "
            "anew, and lr, eps and all other options stay as they are here, for they mean something else there",
        )
    elif source.name:
        kept = {name: options[name] for name in (*_RULES, "update_each", "off_step", "n_samples")}
        warn(
            f"load_state_dict() took states and options of {source.name} and goes on with {kept}; its state dict "
            f"does not tell {source.unknown or 'update_each and n_samples, which are 1 there'}",
        )


def is_blank_step(layout: ParameterLayout) -> bool:
    """Tell whether a step only makes states, as torch.distributed.checkpoint's: the first, lr = 0, zero gradients."""
    grads = [(p, p.grad) for p in layout.trained() if p.grad is not None]
    first = all(group["step"] == 0 and float(group["lr"]) == 0 for group in layout.groups)
    return first and not any(g.requires_grad or bool(part_of(g, p).any()) for p, g in grads)
