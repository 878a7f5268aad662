"""The AdaHessian of pytorch-optimizer (4.1.0)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bucket import Entry
from ..checks import CHOICES, check_choice, check_count
from ..state import ADAM, source_of
from ..update import HyperTable, Part
from .base import DropIn, Option


def _in_kernel(group: Mapping[str, Any]) -> bool:
    """Tell whether the weight decay of a group is the one the kernels know."""
    return group["weight_decouple"] and not group["fixed_decay"]


class _Table(HyperTable):
    """Hyperparameters without the weight decay that is applied before the kernels run."""

    @staticmethod
    def row(group: Mapping[str, Any], lr: float | Tensor) -> list[float]:
        """Return the numbers of one group."""
        return HyperTable.row(group if _in_kernel(group) else {**group, "weight_decay": 0.0}, lr)


class AdaHessian(DropIn):
    """``pytorch_optimizer.AdaHessian`` on fused kernels.

    No averaging; curvature every ``update_period`` steps, v stays as it is between; state keys ``exp_avg`` and
    ``exp_hessian_diag_sq``, the step in the group. Called as the original, with ``loss.backward(create_graph=True)``
    or ``opt.step(hessian=[...])``, and in every other way of :class:`~adahessian_fused.AdaHessian`.

    What the original gets wrong and this class does not: with ``update_period`` > 1 its bias correction of v counts
    all steps, although v is updated on Hessian steps only, which makes the steps too long by about the root of the
    period; a parameter that joins later is corrected for steps it has not seen; moving averages of 16-bit parameters
    have 16 bits. Here a parameter the loss is linear in has zero curvature instead of being an error, GradScaler's
    factor is taken out of the curvature too, and groups added later start their own period. The last diagonal is not
    kept in ``state[p]["hessian"]``: see :meth:`hessian_diag`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moving averages of the gradient and the squared diagonal.
        weight_decay: weight decay.
        weight_decouple: decay the weights; otherwise add ``weight_decay * p`` to the gradient. Per group.
        fixed_decay: decoupled decay that is not multiplied by lr. Per group.
        hessian_power: k in [0, 1].
        update_period: Hutchinson frequency.
        num_samples: probes averaged in a Hessian step.
        hessian_distribution: "rademacher" or "gaussian".
        eps: added to the denominator.
        maximize: ascend instead of descending.
        foreach: accepted and ignored.
        faithful: count steps, correct the bias of v, and move elements that have had no curvature by m / eps, as the
            original does.
        backend: as for :class:`~adahessian_fused.AdaHessian`.
        kwargs: nothing but ``adam_debias=False``, the original's default.

    Raises:
        ValueError, TypeError: as for :class:`~adahessian_fused.AdaHessian`, or an option this class does not have.
    """

    step_in_group = True
    table_type = _Table
    attributes: ClassVar[dict[str, str]] = {
        "update_period": "update_period",
        "num_samples": "num_samples",
        "hessian_distribution": "distribution",
        "maximize": "maximize",
        "foreach": "foreach",
    }
    update_period = Option("update_each")
    num_samples = Option("n_samples")
    distribution = Option("probe")
    maximize = Option("maximize")
    foreach = Option("foreach")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-1,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        weight_decouple: bool = True,
        fixed_decay: bool = False,
        hessian_power: float = 1.0,
        update_period: int = 1,
        num_samples: int = 1,
        hessian_distribution: str = "rademacher",
        eps: float = 1e-16,
        maximize: bool = False,
        foreach: bool | None = None,
        *,
        faithful: bool = False,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        check_count("update_period", update_period)
        check_count("num_samples", num_samples)
        check_choice("hessian_distribution", hessian_distribution, CHOICES["probe"])
        unknown = sorted(kwargs.keys() - {"adam_debias"})
        if unknown:
            raise TypeError(
                f"unknown option {unknown[0]}={kwargs[unknown[0]]!r}; expected those of pytorch_optimizer.AdaHessian. "
                "The options of this package are those of adahessian_fused.AdaHessian"
            )
        self._check_debias(kwargs)
        super().__init__(
            params,
            theirs={
                "weight_decouple": weight_decouple,
                "fixed_decay": fixed_decay,
                "foreach": foreach,
                "faithful": faithful,
                **kwargs,
            },
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            hessian_power=hessian_power,
            block_size=1,
            update_each=update_period,
            n_samples=num_samples,
            probe=hessian_distribution,
            maximize=maximize,
            faithful=faithful,
            backend=backend,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; checked as a whole, and not added if anything is wrong with it."""
        self._check_debias(param_group)
        super().add_param_group(param_group)

    @staticmethod
    def _check_debias(options: Mapping[str, Any]) -> None:
        if options.get("adam_debias", False):
            raise ValueError(
                "adam_debias=True; expected False. The kernels always correct the bias of the gradient's average; "
                "leave the option out, or stay with pytorch_optimizer"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of the original, or one that :class:`~adahessian_fused.AdaHessian` takes.

        Raises:
            ValueError: the state dict has other groups or parameters than this optimizer, or is of another one.
        """
        if source_of(state_dict) is ADAM and self.param_groups[0]["faithful"]:
            raise ValueError(
                "faithful=True with a state dict of Adam's family; expected faithful=False, since the original has one "
                "count of steps for both averages, and that of the curvature begins anew"
            )
        super().load_state_dict(state_dict)

    def _counts(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[int, int]:
        step = int(group["step"])
        return step, step if group["faithful"] else math.ceil(step / group["update_each"])

    def _before_update(self, entries: Sequence[Entry], grads: Sequence[Tensor], due: Sequence[bool]) -> Iterator[Part]:
        for number, group in enumerate(self.param_groups):
            members = [i for i, entry in enumerate(entries) if entry.group == number]
            if members and group["weight_decay"] and not _in_kernel(group):
                yield partial(self._decay, group, [entries[i].param for i in members], [grads[i] for i in members])
        if self.param_groups[0]["faithful"]:
            yield partial(self._as_counted, entries, due)

    def _as_counted(self, entries: Sequence[Entry], due: Sequence[bool]) -> None:
        for entry in entries:
            # The kernels correct by the Hessian updates so far, this step's included.
            step = self.param_groups[entry.group]["step"]
            entry.state["step"].fill_(step)
            entry.state["hessian_step"].fill_(step if due[entry.group] else step + 1)

    def _decay(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Apply the decays of the original that the kernels do not know."""
        if group["weight_decouple"]:
            torch._foreach_mul_(params, 1 - group["weight_decay"])
            return
        scale = getattr(self, "grad_scale", None)  # the gradients still carry GradScaler's factor
        alpha = group["weight_decay"] * (-1 if group["maximize"] else 1) * (1 if scale is None else scale.item())
        torch._foreach_add_(grads, params, alpha=alpha)
