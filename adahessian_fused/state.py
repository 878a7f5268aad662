"""State dicts: plain tensors for each parameter, loadable across backends, devices and other AdaHessians."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import plain
from .distributed.ranks import Ranks
from .layout import MEAN, compute_dtype, stored_dtype

_COUNTS = ("step", "hessian_step")


class Source(NamedTuple):
    """Where a state dict comes from, and how a run of its optimizer is to go on here.

    Attributes:
        name: of the optimizer; empty for one of this package.
        rules: options that it has built in, for groups that have left both to their defaults.
        unknown: what its state dict does not hold.
    """

    name: str = ""
    rules: Mapping[str, Any] = MappingProxyType({})
    unknown: str = ""


ADAM = Source("Adam's family")
_RULES = ("block_size", "averaging")
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


def source_of(state_dict: Mapping[str, Any]) -> Source:
    """Where a state dict comes from, by the keys of its states and groups.

    Raises:
        ValueError: none of the optimizers whose states could be gone on with here.
    """
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
    """State of one parameter as an optimizer with this ``state_dtype`` keeps it.

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
    updates = step if "step" in state else math.ceil(step / group["update_each"])
    hessian_step = int(state.get("hessian_step", updates))
    result: dict[str, Any] = {"step": step, "hessian_step": hessian_step}
    dtypes = dict.fromkeys(("exp_avg", "exp_hessian_diag_sq"), stored_dtype(param.dtype, state_dtype))
    dtypes |= dict.fromkeys(("master_param", "hessian_diag"), compute_dtype(param.dtype)) | {MEAN: torch.float64}
    for key, dtype in dtypes.items():
        if isinstance(state.get(key), Tensor):
            result[key] = state[key].detach().to(param.device, dtype, copy=True)  # its owner may go on training
    return result


def _going_on(own: Mapping[str, Any], group: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Options of a group whose run comes from elsewhere."""
    if source is ADAM:
        return {**own, "params": group["params"]}
    by_default = own["block_size"] == "auto" and own["averaging"] == "signed"
    return {**own, **(source.rules if by_default else {}), **group}


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class PortableState(Optimizer):
    """Optimizer whose state dict is independent of how the states are laid out in memory."""

    backend: str
    state_dtype: torch.dtype | None = None  # of what was pickled before there was such an option
    _ranks: Ranks | None = None
    _kernels: Mapping[Tensor, int] = MappingProxyType({})

    def _reset(self) -> None:
        raise NotImplementedError

    def _kernel_of(self, param: Tensor) -> int | None:
        """Spatial size of the convolution kernel that a parameter is, as far as it is known."""
        return self._kernels.get(param)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``; every tensor owns its memory.

        The state of parameters that are in no group any more, which PyTorch cannot number, is left out.
        """
        placed = {id(p) for group in self.param_groups for p in group["params"]}
        removed = {p: self.state.pop(p) for p in list(self.state) if id(p) not in placed}
        try:
            result = super().state_dict()
        finally:
            self.state.update(removed)
        result["state"] = {
            key: {name: _own(value) for name, value in state.items()} for key, state in result["state"].items()
        }
        for group in result["param_groups"]:
            group.update({name: plain(value) for name, value in group.items()})
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of another AdaHessian, or of Adam, AdamW or Adamax.

        Of another AdaHessian its options come along, and where this optimizer has left ``block_size`` and ``averaging``
        at their defaults, the averaging of its code as well. Of Adam's family ``exp_avg`` and the count of steps are
        taken, no options, and curvature is due at once. A warning tells what was taken and what is unknown.

        ``state_dtype`` stays as it is: float32 moving averages are rounded to nearest, bfloat16 ones widened.

        Raises:
            ValueError: the state dict has other groups or parameters than this optimizer, or is of another one.

        Warns:
            UserWarning: it is not from this class.
        """
        source, saved = source_of(state_dict), state_dict["state"]
        # Options that the state dict does not know keep the values they have here.
        own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in self.param_groups]
        groups = [*state_dict["param_groups"]]
        if len(groups) == len(own):
            groups = [_going_on(options, group, source) for options, group in zip(own, groups, strict=True)]
        super().load_state_dict({**state_dict, "param_groups": groups})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        groups = [group for group in self.param_groups for _ in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.clear()
        for i, group, p in zip(ids, groups, params, strict=True):
            loaded = normalized_state(saved[i], group, p, self.state_dtype) if i in saved else {}
            if loaded:
                self.state[p] = loaded
        for group in self.param_groups:
            steps = [self.state[p]["step"] for p in group["params"] if p in self.state]
            group["step"] = 0 if source is ADAM else int(group.get("step", max(steps, default=0)))
        self._reset()
        if source is ADAM:
            warnings.warn(
                "load_state_dict() took exp_avg and step of a state dict of Adam's family; exp_hessian_diag_sq begins "
                "anew, and lr, eps and all other options stay as they are here, for they mean something else there",
                stacklevel=2,
            )
        elif source.name:
            kept = {name: self.param_groups[0][name] for name in (*_RULES, "update_each", "off_step", "n_samples")}
            warnings.warn(
                f"load_state_dict() took states and options of {source.name} and goes on with {kept}; its state dict "
                f"does not tell {source.unknown or 'update_each and n_samples, which are 1 there'}",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: the state dict's content with the parameters themselves."""
        result = super().__getstate__()
        result["state"] = type(self.state)(
            self.state.default_factory,
            {p: {name: _own(value) for name, value in state.items()} for p, state in self.state.items()},
        )
        result |= {"backend": self.backend, "state_dtype": self.state_dtype, "_kernels": self._kernels}
        if self._ranks is not None:
            result["_ranks"] = self._ranks
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and give groups that another optimizer saved the options they lack."""
        super().__setstate__(state)
        self._reset()
        self.defaults.setdefault("hvp_dtype", None)  # pickled before there was such an option
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
