"""State dicts: plain tensors for each parameter, loadable across backends, devices and other AdaHessians."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import plain
from .distributed.ranks import Ranks
from .layout import compute_dtype, stored_dtype

_COUNTS = ("step", "hessian_step")


def normalized_state(
    state: Mapping[str, Any], group: Mapping[str, Any], param: Tensor, state_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """State of one parameter as an optimizer with this ``state_dtype`` keeps it.

    Understands its own state dicts and those of the official code, torch-optimizer, timm, davda54/ada-hessian (one
    ``step`` a parameter, v updated on every step) and pytorch-optimizer (``step`` in the group, v updated every
    ``update_each`` steps). Moving averages are never cast to the parameter's dtype; where the optimizer keeps them in
    bfloat16 they are rounded to nearest.
    """
    if "exp_avg" not in state:
        return {}
    step = int(state.get("step", group.get("step", 0)))
    updates = step if "step" in state else math.ceil(step / group["update_each"])
    hessian_step = int(state.get("hessian_step", updates))
    result: dict[str, Any] = {"step": step, "hessian_step": hessian_step}
    dtypes = dict.fromkeys(("exp_avg", "exp_hessian_diag_sq"), stored_dtype(param.dtype, state_dtype))
    dtypes |= dict.fromkeys(("master_param", "hessian_diag"), compute_dtype(param.dtype))
    for key, dtype in dtypes.items():
        if isinstance(state.get(key), Tensor):
            result[key] = state[key].detach().to(param.device, dtype)
    return result


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class PortableState(Optimizer):
    """Optimizer whose state dict is independent of how the states are laid out in memory."""

    backend: str
    state_dtype: torch.dtype | None = None  # of what was pickled before there was such an option
    _ranks: Ranks | None = None

    def _reset(self) -> None:
        raise NotImplementedError

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
        """Load a state dict of this class or of another AdaHessian (see :func:`normalized_state`).

        ``state_dtype`` stays as it is: float32 moving averages are rounded to nearest, bfloat16 ones widened.

        Raises:
            ValueError: the state dict has other groups or parameters than this optimizer.
        """
        saved = state_dict["state"]
        # Options that the state dict does not know keep the values they have here.
        own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in self.param_groups]
        groups = [*state_dict["param_groups"]]
        if len(groups) == len(own):
            groups = [options | group for options, group in zip(own, groups, strict=True)]
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
            group["step"] = int(group.get("step", max(steps, default=0)))
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: the state dict's content with the parameters themselves."""
        result = super().__getstate__()
        result["state"] = type(self.state)(
            self.state.default_factory,
            {p: {name: _own(value) for name, value in state.items()} for p, state in self.state.items()},
        )
        result |= {"backend": self.backend, "state_dtype": self.state_dtype}
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
