"""What to look at while training: the diagonal, and the norms that people plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bucket import Bucket, Entry, compute_dtype
from .checks import DTYPES, warn
from .curvature import Curvature
from .distributed import sharded
from .layout import ParameterLayout
from .looks import any_counted
from .segments import Hyper, Steps
from .update import HyperTable
from .warmup import LEAST

FIRST_STEPS = 2  # of a group, that are looked at where nothing bounds them


class LongStepWarning(UserWarning):
    """A first step has moved a parameter by more than its own length, where ``warmup=0`` bounds nothing.

    Rules that mean it, as ``recipes.published``: ``warnings.simplefilter("ignore", LongStepWarning)``.
    """


@dataclasses.dataclass(frozen=True)
class Statistics:
    r"""Where an optimizer stands after a step: of one parameter group, or of all of them.

    Scalar tensors, on the parameters' device if they had to be computed; reading one (``float(x)``) waits for the
    device, holding it does not. None where there is nothing to tell. Norms are Euclidean, over all elements, so that
    norm / sqrt(numel) is the root mean square.

    Attributes:
        lr: learning rate of the last step; None for several groups together.
        step: steps taken, :math:`t`; the largest of any parameter.
        hessian_step: updates of the diagonal, :math:`h`; likewise.
        numel: elements of all parameters, an int.
        param_norm: of the parameters, those without numbers (on the meta device) left out.
        grad_norm: of ``p.grad`` as it is now: after clipping; times the loss scale if GradScaler has not unscaled it;
            None after ``zero_grad()``.
        update_norm: of :math:`\frac{\text{lr}}{1 - \beta_1^t} \frac{m}{(\sqrt v / \sqrt{1 - \beta_2^h})^k + \epsilon}`,
            cut, by which the last step that was not skipped moved its parameters, m and t as ``nesterov`` and
            ``cautious`` have them; weight decay and the rounding of 16-bit parameters come on top. None before the
            first step, and after loading a state or moving parameters to other groups; with ``nesterov`` or
            ``cautious``, whose steps follow ``p.grad`` too, also once that has been zeroed or written to, and NaN where
            ``capturable`` has skipped a step.
        hessian_diag_norm: of the root-mean-square diagonal, :math:`\sqrt{v / (1 - \beta_2^h)}`.
        nonfinite: share of the elements whose m or v is infinite or NaN, which lasts: restore a checkpoint. An
            averaging block shares its v, so this is the share of bad blocks too.
        clipped: share of the elements whose update the last step has cut (``clip``, ``warmup``). None where nothing is
            cut, or ``update_norm`` is None.
        missed: elements that Hessian steps have left as they were because their curvature was infinite or NaN, or too
            large to be squared, summed over all steps since this optimizer was made or a state loaded.
        missed_in: how many of them each parameter has, by its name; of a sharded one, this rank's part of it.
        groups: the same for each parameter group; empty for a group.
    """

    lr: Tensor | None
    step: Tensor | None
    hessian_step: Tensor | None
    numel: int
    param_norm: Tensor | None
    grad_norm: Tensor | None
    update_norm: Tensor | None
    hessian_diag_norm: Tensor | None
    nonfinite: Tensor | None
    clipped: Tensor | None
    missed: Tensor | None
    missed_in: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    groups: tuple[Statistics, ...] = ()

    def as_dict(self) -> dict[str, float]:
        """Return Python numbers for ``wandb.log`` or TensorBoard's ``add_scalar``, read with one wait for the device.

        Returns:
            All tensors among the attributes, by their names; those of several groups as ``"group0/lr"`` and so on.
        """
        named = dict(self._scalars())
        if len(self.groups) > 1:
            named |= {f"group{i}/{name}": x for i, group in enumerate(self.groups) for name, x in group._scalars()}
        return dict(zip(named, _stacked([x.double() for x in named.values()]).tolist(), strict=True))

    def _scalars(self) -> Iterator[tuple[str, Tensor]]:
        named = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return ((name, x) for name, x in named if isinstance(x, Tensor))


def statistics(layout: ParameterLayout, table: HyperTable) -> Statistics:
    """Return where an optimizer stands, see :meth:`AdaHessian.statistics`.

    Args:
        layout: of its parameters.
        table: the hyperparameters of its last step.
    """
    entries = layout.with_state()
    stepped = [[e for e in layout.stepped if e.group == n] for n in range(len(layout.groups))]
    has_gradients = layout.left is not None and not layout.left.changed()
    groups = tuple(
        _of_group(group, [e for e in entries if e.group == n], stepped[n], table, has_gradients=has_gradients)
        for n, group in enumerate(layout.groups)
    )
    numel = sum(group.numel for group in groups)
    is_known = all(group.update_norm is not None for group, moved in zip(groups, stepped, strict=True) if moved)
    return Statistics(
        lr=groups[0].lr if len(groups) == 1 else None,
        step=_largest(group.step for group in groups),
        hessian_step=_largest(group.hessian_step for group in groups),
        numel=numel,
        param_norm=_joint(group.param_norm for group in groups),
        grad_norm=_joint(group.grad_norm for group in groups),
        update_norm=_joint(group.update_norm for group in groups if is_known),
        hessian_diag_norm=_joint(group.hessian_diag_norm for group in groups),
        nonfinite=_share([x.nonfinite * x.numel for x in groups if x.nonfinite is not None], numel),
        clipped=_share([x.clipped * x.numel for x in groups if is_known and x.clipped is not None], numel),
        missed=_sum(group.missed for group in groups),
        missed_in={name: count for group in groups for name, count in group.missed_in.items()},
        groups=groups,
    )


def _of_group(
    group: Mapping[str, Any],
    entries: Sequence[Entry],
    stepped: Sequence[Entry],
    table: HyperTable,
    *,
    has_gradients: bool,
) -> Statistics:
    def row(entry: Entry) -> Tensor:
        """Return the hyperparameters of a parameter's last step."""
        return table.last(entry.bucket.steps.device)[entry.group] if entry.hyper is None else entry.hyper

    numel = sum(p.numel() for p in group["params"])
    grads = {entry: _gradient(entry, group, table) for entry in stepped}
    is_known = not _follows_gradient(group) or (has_gradients and None not in grads.values())
    known = stepped if is_known else []
    cut = [entry for entry in known if entry.hyper is not None or group["clip"] is not None]
    skipped = table.found_inf if _follows_gradient(group) else None
    return Statistics(
        lr=row(stepped[0])[Hyper.LR].clone() if stepped else None,
        step=_largest(entry.views["step"] for entry in entries),
        hessian_step=_largest(entry.views["hessian_step"] for entry in entries),
        numel=numel,
        param_norm=_norm((_norm_of(p), p) for p in group["params"]),
        grad_norm=_norm((_norm_of(p.grad), p) for p in group["params"] if p.grad is not None),
        update_norm=_unless(
            skipped, _norm((_update_norm(entry, row(entry), grads[entry]), entry.owner) for entry in known)
        ),
        hessian_diag_norm=_norm((_diag_norm(entry, group["betas"][1]), entry.owner) for entry in entries),
        nonfinite=_share(sharded.whole([(_nonfinite(entry), entry.owner) for entry in entries]), numel),
        clipped=_unless(
            skipped,
            _share(sharded.whole([(_clipped(entry, row(entry), grads[entry]), entry.owner) for entry in cut]), numel),
        ),
        missed=_sum(sharded.whole([(entry.missed.clone(), entry.owner) for entry in entries])),
        missed_in={entry.name: entry.missed.clone() for entry in entries},
    )


def hessian_diag(opt: Optimizer, param: Tensor) -> Tensor:
    """Return the root-mean-square Hessian diagonal of a parameter, see :meth:`AdaHessian.hessian_diag`."""
    if not isinstance(param, Tensor):
        raise TypeError(f"param is of type {type(param).__name__}; expected one of the optimizer's parameters")
    group = next((group for group in opt.param_groups if any(p is param for p in group["params"])), None)
    if group is None:
        raise ValueError(f"a tensor of shape {tuple(param.shape)}; it is not a parameter of this optimizer")
    state = opt.state.get(param, {})
    h = int(state.get("hessian_step", 0))
    if h == 0:
        raise RuntimeError("this parameter has not seen any curvature yet; call step() first")
    beta2 = group["betas"][1]
    return (state["exp_hessian_diag_sq"].to(compute_dtype(param.dtype)) / (1 - beta2**h)).sqrt()


# ---- curvature that is not finite ------------------------------------------------------------------------------------


def refuse_nonfinite(curvature: Curvature, entries: Sequence[Entry], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise if the curvature of a parameter is not finite that is asked for with nonfinite="raise"."""
    strict = [entry for entry in entries if groups[entry.group]["nonfinite"] == "raise"]
    names = [entry.name for entry in curvature.nonfinite(strict)] if strict else []
    if names:
        raise RuntimeError(
            f"the curvature of {_listed(names)} is infinite or NaN, and nothing has been changed; expected a loss "
            'whose second derivative is finite (add eps inside roots and norms), or nonfinite="keep", which goes '
            "on with the curvature of the steps before"
        )


def warn_of_nonfinite(entries: Mapping[Bucket, Sequence[Entry]], warned: set[str]) -> None:
    """Warn of parameters whose curvature was not finite for the first time.

    What a GPU has counted is looked at in a parameter's Hessian steps number 1, 2, 4, 8 and so on, because looking
    waits for it, and with ``capturable`` never.

    Args:
        entries: the parameters of each bucket.
        warned: the names of those that have been warned of; becomes more.
    """
    for bucket, members in entries.items():
        counts_on_host = bucket.steps.device.type == "cpu"
        is_due = bucket.device.type == "cpu" or (
            counts_on_host and int(bucket.steps[members[0].row, Steps.HESSIAN_STEP]).bit_count() == 1
        )
        if not is_due or not any_counted(bucket.missed):
            continue
        names = [entry.name for entry in members if entry.missed > 0 and entry.name not in warned]
        if names:
            warned.update(names)
            warn(
                f"the curvature of {_listed(names)} is infinite or NaN; these elements go on with the curvature of the "
                "steps before, see statistics().missed_in. Where the gradient is finite, look for norms, roots and "
                "divisions at zero, and add eps inside them; where it is not, for what made the loss so",
            )


# ---- steps that are too long -----------------------------------------------------------------------------------------


def warn_of_long_steps(layout: ParameterLayout, entries: Sequence[Entry], table: HyperTable) -> bool:
    """Warn of parameters that one of their group's first steps has moved by more than their own length.

    Groups with a ``warmup`` have no such steps. A GPU is waited for in the first steps, and with ``capturable`` never.

    Args:
        layout: of the optimizer's parameters.
        entries: those that have been stepped.
        table: the hyperparameters of the last step.

    Returns:
        Whether there was something to tell.
    """
    groups = layout.groups
    new = {n for n, group in enumerate(groups) if group["warmup"] == 0 and 0 < group["step"] <= FIRST_STEPS}
    if not new or groups[0]["capturable"]:
        return False
    names: list[str] = []
    for bucket, members in layout.by_bucket(entries).items():
        rows = table.last(bucket.steps.device)
        known = [e for e in members if e.group in new and e.param.numel() and not e.param.is_meta]
        flags = [_is_long(e, rows[e.group], _gradient(e, groups[e.group], table)) for e in known]
        found = torch.stack(flags).tolist() if flags else []
        names += [e.name for e, is_long in zip(known, found, strict=True) if is_long]
    if names:
        warn(
            f"a first step was longer than the parameter itself: {_listed(names)}. Little is known of the curvature "
            "yet; expected adahessian_fused.AdaHessian's default, warmup=20, which cuts such steps, or an lr that "
            "begins lower",
            LongStepWarning,
        )
    return bool(names)


def _is_long(entry: Entry, hyper: Tensor, grad: Tensor | None) -> Tensor:
    """Tell whether the last update of a parameter was longer than what it was then, or than zeros count."""
    update = _update(entry, hyper, grad)
    before = entry.param.detach().to(update.dtype) + update
    least = LEAST * math.sqrt(before.numel())
    return torch.linalg.vector_norm(update) > torch.linalg.vector_norm(before).clamp_min(least)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _counts(entry: Entry) -> Any:
    """Return a parameter's counts: Python numbers, which go with any device, or a tensor on its own device."""
    steps = entry.bucket.steps[entry.row]
    return steps.tolist() if steps.device.type == "cpu" else steps.double()


def _follows_gradient(group: Mapping[str, Any]) -> bool:
    """Tell whether a step depends on its gradient by more than m."""
    return group["nesterov"] or group["cautious"]


def _gradient(entry: Entry, group: Mapping[str, Any], table: HyperTable) -> Tensor | None:
    """Return what the last step took for a parameter's gradient, if it is still there and has to be known."""
    if not _follows_gradient(group) or entry.owner.grad is None:
        return None
    g = sharded.part_of(entry.owner.grad, entry.owner).to(entry.bucket.compute_dtype)
    g = g if table.grad_scale is None else g / table.grad_scale.to(g.device)
    return -g if group["maximize"] else g


def _numerator(entry: Entry, row: Any, t: Any, g: Tensor | None) -> Tensor:
    """Compute the numerator of a parameter's last step (Eq. 9), its weights divided by their sum."""
    m = entry.views["exp_avg"].to(entry.bucket.compute_dtype)  # the view may be bfloat16
    beta1, nesterov, cautious = (row[column] for column in (Hyper.BETA1, Hyper.NESTEROV, Hyper.CAUTIOUS))
    if g is None:
        return m / _bias_correction(beta1, t)
    m = m + nesterov * (1 - beta1) * (g - m)
    return torch.where((m * g.sign() <= 0) & (cautious != 0), 0.0, m) / _bias_correction(beta1, t + nesterov)


def _quotient(entry: Entry, row: Any, g: Tensor | None) -> Tensor:
    """Compute numerator / denominator of a parameter's last step (Eq. 8, 9), not cut; 0 where it stayed."""
    counts, computed = _counts(entry), entry.bucket.compute_dtype  # the views may be bfloat16
    t, h = counts[Steps.STEP], counts[Steps.HESSIAN_STEP]
    v = entry.views["exp_hessian_diag_sq"].to(computed)
    c, mean = (0.0, 0.0) if entry.used_mean is None else (row[Hyper.SHRINK], entry.used_mean)
    n = _bias_correction(row[Hyper.BETA2], h) / (1 - row[Hyper.BETA2])
    d = ((v / (1 - row[Hyper.BETA2]) + c * mean) / (n + c)).sqrt()
    q = _numerator(entry, row, t, g) / (d ** row[Hyper.HESSIAN_POWER] + row[Hyper.EPS])
    holds = row[Hyper.HOLDS] * row[Hyper.HESSIAN_POWER] != 0
    return torch.where((v == 0) & holds, 0.0, q) * (h > 0)


def _update(entry: Entry, hyper: Tensor, g: Tensor | None) -> Tensor:
    """Return what was taken from a parameter in its last step, from its state and its gradient after it."""
    row = hyper.tolist() if hyper.device.type == "cpu" else hyper
    return _quotient(entry, row, g).clamp(-row[Hyper.CLIP], row[Hyper.CLIP]) * row[Hyper.LR]


def _update_norm(entry: Entry, hyper: Tensor, g: Tensor | None) -> Tensor:
    """Return the norm of the last update of a parameter."""
    return torch.linalg.vector_norm(_update(entry, hyper, g))


def _unless(skipped: Tensor | None, x: Tensor | None) -> Tensor | None:
    """Return what is told of a step, NaN if it was skipped and its gradient is not that of the last one taken."""
    return x if x is None or skipped is None else torch.where(skipped.to(x.device) != 0, math.nan, x)


def _clipped(entry: Entry, hyper: Tensor, g: Tensor | None) -> Tensor:
    """Return how many elements of the last update of a parameter were cut."""
    row = hyper.tolist() if hyper.device.type == "cpu" else hyper
    return (_quotient(entry, row, g).abs() > row[Hyper.CLIP]).sum()


def _diag_norm(entry: Entry, beta2: float) -> Tensor:
    """Return the norm of sqrt(v / (1 - beta2^h)); 0 before any curvature was seen."""
    v = entry.views["exp_hessian_diag_sq"].sum(dtype=entry.bucket.compute_dtype)
    return (v / _bias_correction(beta2, _counts(entry)[Steps.HESSIAN_STEP])).sqrt()


def _nonfinite(entry: Entry) -> Tensor:
    """Return how many elements have a state that is infinite or NaN."""
    finite = entry.views["exp_avg"].isfinite() & entry.views["exp_hessian_diag_sq"].isfinite()
    return finite.logical_not_().sum()


def _bias_correction(beta: Any, count: Any) -> Any:
    """Return 1 - beta^count, for numbers or tensors; 1 for a count of 0."""
    return 1 - beta**count + (count == 0)


def _norm_of(x: Any) -> Tensor | None:
    """Return the norm of this rank's part of a tensor, of whatever dtype and layout; None on the meta device."""
    x = sharded.local(x)
    if x.layout is not torch.strided:
        x = x.coalesce().values() if x.is_sparse else x.values()
    x = torch.view_as_real(x) if x.is_complex() else x.dequantize() if x.is_quantized else x
    x = x if x.dtype in DTYPES else x.float()
    return None if x.is_meta else torch.linalg.vector_norm(x, dtype=compute_dtype(x.dtype))


def _norm(norms: Iterable[tuple[Tensor | None, Tensor]]) -> Tensor | None:
    """Return the norm of all elements from this rank's norms, each with its parameter; None if there is none."""
    norms = [(x, p) for x, p in norms if x is not None]
    if not sharded.any_sharded([p for _, p in norms]):
        return _joint(x for x, _ in norms)
    return _joint(x.sqrt() for x in sharded.whole([(x.double().square(), p) for x, p in norms]))


def _joint(norms: Iterable[Tensor | None]) -> Tensor | None:
    """Return the norm of several tensors' elements together, from their norms."""
    norms = [x for x in norms if x is not None]
    return torch.linalg.vector_norm(_stacked(norms)) if norms else None


def _share(parts: Sequence[Tensor], whole: int) -> Tensor | None:
    """Return the sum of numbers over ``whole``."""
    return _stacked([x.double() for x in parts]).sum() / whole if parts and whole else None


def _sum(counts: Iterable[Tensor | None]) -> Tensor | None:
    counts = [count for count in counts if count is not None]
    return _stacked(counts).sum() if counts else None


def _largest(counts: Iterable[Tensor | None]) -> Tensor | None:
    counts = [count for count in counts if count is not None]
    return _stacked(counts).amax() if counts else None


def _stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Put scalars in one tensor, on an accelerator if any of them is there: no wait for one."""
    device = next((x.device for x in scalars if x.device.type != "cpu"), scalars[0].device)
    return torch.stack([x.to(device) for x in scalars])
