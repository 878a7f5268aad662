"""What the drop-ins share: their state dicts have the original's keys, their attributes the original's names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from .. import recipes
from ..layout import ParameterLayout
from ..optimizer import AdaHessian
from ..state import check_state_dict

# Options every original has in its parameter groups; the seed has to be in a checkpoint that resumes exactly.
_SHARED = {"params", "lr", "betas", "eps", "weight_decay", "hessian_power", "seed"}
_OURS_ONLY = set(inspect.signature(AdaHessian).parameters) - _SHARED

# Key, next to the original's in a parameter's state, of what a checkpoint needs that the original has no key for.
EXTRA = "adahessian_fused"


class Option:
    """An attribute of the original that is an option of all parameter groups here."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, opt: AdaHessian | None, owner: type | None = None) -> Any:
        return self if opt is None else opt.param_groups[0][self.name]

    def __set__(self, opt: AdaHessian, value: Any) -> None:
        opt.defaults[self.name] = value
        for group in opt.param_groups:
            group[self.name] = value


class DropIn(AdaHessian):
    """AdaHessian with the constructor, the rules and the state dict of another implementation.

    Args:
        params: parameters or parameter groups.
        theirs: defaults of options that only the original has.
        faithful: move parameters that have had no curvature by m / eps, as every original does.
        ours: options of :class:`~adahessian_fused.AdaHessian`.
    """

    step_in_group: ClassVar[bool] = False  # whether the original counts steps in its groups, not for each parameter
    attributes: ClassVar[Mapping[str, str]] = {}  # constructor argument -> the original's attribute that remembers it

    def __init__(
        self, params: Any, theirs: Mapping[str, Any] | None = None, *, faithful: bool = False, **ours: Any
    ) -> None:
        super().__init__(params, **{**recipes.published, "unmeasured": "move" if faithful else "hold", **ours})
        self.defaults.update(theirs or {})
        for group in self.param_groups:
            for name, value in (theirs or {}).items():
                group.setdefault(name, value)

    def _check_given_diagonal(self) -> None:
        """Pass: the originals take a diagonal between estimates of their own."""

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def _counts(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[int, int]:
        """Return the steps and the Hessian updates of a parameter, as far as the original's keys tell."""
        return int(state["step"]), int(state["step"])

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict for the original; where its keys cannot tell all, ``"adahessian_fused"`` has the rest."""
        result = super().state_dict()
        hidden = _OURS_ONLY | {"faithful"} | (set() if self.step_in_group else {"step"})
        groups = result["param_groups"]
        result["param_groups"] = [{k: v for k, v in group.items() if k not in hidden} for group in groups]
        for group in groups:
            for i in group["params"]:
                if "exp_avg" in result["state"].get(i, {}):
                    result["state"][i] = self._exported(result["state"][i], group)
        return result

    def _exported(self, state: dict[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        counts = int(state.pop("step")), int(state.pop("hessian_step"))
        diag = {"hessian_diag": state.pop("hessian_diag")} if "hessian_diag" in state else {}
        if not self.step_in_group:
            state["step"] = counts[0]
        told = self._counts(state, group)
        if diag or told != counts:
            # An original that goes on from here carries this along; its own step count then tells that it is old.
            state[EXTRA] = {"at": told[0], "step": counts[0], "hessian_step": counts[1], **diag}
        return state

    def _imported(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        if "exp_hessian_diag_sq" not in state or "hessian_step" in state:  # nothing of the original's
            return dict(state)
        step, hessian_step = self._counts(state, group)
        extra = state.get(EXTRA, {})
        current = extra if extra.get("at") == step else {}
        return {**state, "step": step, "hessian_step": hessian_step, **current}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of the original, or one that :class:`~adahessian_fused.AdaHessian` takes.

        Raises:
            ValueError: the state dict has other groups or parameters than this optimizer, or is of another one.
        """
        check_state_dict(state_dict)
        state = dict(state_dict["state"])
        for group, own in zip(state_dict["param_groups"], self.param_groups, strict=False):  # super checks the lengths
            for i in group["params"]:
                if i in state:
                    state[i] = self._imported(state[i], own | group)
        super().load_state_dict({**state_dict, "state": state})

    # ---- live instances of the original ------------------------------------------------------------------------------

    @classmethod
    def from_original(cls, original: Optimizer, **options: Any) -> DropIn:
        """Make one of this class with the parameters, options and state of a live instance of the original."""
        arguments = {name: getattr(original, a) for name, a in cls.attributes.items() if hasattr(original, a)}
        opt = cls([dict(group) for group in original.param_groups], **arguments, **options)
        state_dict = original.state_dict()
        state = dict(state_dict["state"])
        params = [p for group in original.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, params, strict=True):
            diag = opt._stale_diag(p)
            if diag is not None and "exp_avg" in state.get(i, {}):
                step = opt._counts(state[i], {})[0]
                state[i] = {**state[i], EXTRA: {"at": step, "step": step, "hessian_step": step, "hessian_diag": diag}}
        opt.load_state_dict({**state_dict, "state": state})
        return opt

    def _stale_diag(self, param: Tensor) -> Tensor | None:
        """Return the block means of the last diagonal, if the original keeps them outside its state."""
        return None


class _KernelsByShape(ParameterLayout):
    """Layout that takes every parameter of three or more axes for a kernel: whatever follows the first two."""

    def kernel_of(self, param: Tensor) -> int:
        return math.prod(param.shape[2:])


class AveragesSpatialAxes(DropIn):
    """Drop-in for an original that knows kernels by their shape: whatever follows the first two axes is averaged."""

    layout_type = _KernelsByShape
