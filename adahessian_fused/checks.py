"""Argument checks of the Python API: every message names the argument, what was found and what was expected."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZES = ("auto", "conv2d", "row", "tensor")
CHOICES = {
    "averaging": ("signed", "abs"),
    "off_step": ("hold", "stale"),
    "unmeasured": ("hold", "move"),
    "nonfinite": ("keep", "raise"),
    "probe": ("rademacher", "gaussian"),
    "hvp": ("autograd", "forward_over_reverse", "finite_difference"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_NOT_THE_USERS = (*(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__)), contextlib.__file__)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's code from which all this was called."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_one_of(value: Any, choices: Sequence[Any]) -> bool:
    """Tell whether a value is one of several; an array of more than one element is not, which ``in`` cannot tell."""
    return getattr(value, "ndim", 0) == 0 and value in choices


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not _is_one_of(value, choices):
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name}={value!r}; expected {expected}")


def check_flags(options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError unless the options of these names are true or false."""
    for name in names:
        if not _is_one_of(options[name], (True, False)):
            raise ValueError(f"{name}={options[name]!r}; expected True or False")


def plain(value: Any) -> Any:
    """Return a scalar of numpy's as Python's own, which every checkpoint can hold; anything else as it is."""
    is_scalar = getattr(value, "ndim", None) == 0 and not isinstance(value, Tensor)
    return value.item() if is_scalar and hasattr(value, "item") else value


def integer(value: Any) -> int | None:
    """Return the int that ``value`` is, numpy's and others that can be an index too; None for what is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_block_size(value: Any) -> None:
    """Raise ValueError unless ``value`` is one of ``BLOCK_SIZES`` or an int >= 1."""
    if (isinstance(value, str) and value in BLOCK_SIZES) or (integer(value) or 0) >= 1:
        return
    raise ValueError(f'block_size={value!r}; expected "auto", "conv2d", "row", "tensor" or an int >= 1')


def _check_number(
    name: str, value: Any, low: float, high: float, *, high_included: bool, low_included: bool = True
) -> None:
    signs = "<=" if low_included else "<", "<=" if high_included else "<"
    try:
        inside = (low <= value if low_included else low < value) and (value <= high if high_included else value < high)
    except (TypeError, ValueError, RuntimeError):  # no number at all, or several
        inside = False
    if not inside:  # also catches NaN
        raise ValueError(f"{name}={value!r}; expected {low} {signs[0]} {name} {signs[1]} {high}")


def fits(function: Any, count: int) -> bool:
    """Tell whether a function, or a module's forward, may be called with so many arguments, as far as can be told."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)
    except (TypeError, ValueError):  # it does not tell
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an int >= ``least``."""
    count = integer(value)
    if count is None or count < least:
        raise ValueError(f"{name}={value!r}; expected an int >= {least}")


def hessian_interval(every: Any, h: int) -> int:
    """Return how many steps a function ``update_each`` puts from Hessian step number h to the next one.

    Raises:
        TypeError: it cannot be called with a number.
        ValueError: it returns what is no number of steps.
    """
    try:
        length = every(h)
    except TypeError as error:
        raise TypeError(
            f"update_each({h}) failed: {error}; expected a function of the number of Hessian steps so far, such as "
            "lambda h: 1 if h < 100 else 10"
        ) from error
    check_count(f"update_each({h})", length)
    return length


def check_weight(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is finite and not negative."""
    _check_number(name, value, 0.0, float("inf"), high_included=False)


def check_seed(value: Any) -> None:
    """Raise ValueError unless ``value`` is an int of 64 bits."""
    seed = integer(value)
    if seed is None or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={value!r}; expected a 64-bit int")


def has_off_steps(group: Mapping[str, Any]) -> bool:
    """Tell whether a group may have steps without curvature."""
    return callable(group["update_each"]) or group["update_each"] > 1


def dense_steps(group: Mapping[str, Any]) -> int:
    """Return how many steps have curvature, from the first on, whatever ``update_each`` is."""
    return group["warmup"] if group["dense_steps"] is None else group["dense_steps"]


def check_lr(lr: Any) -> None:
    """Raise ValueError unless ``lr`` is a number that is not negative, or a tensor with one element."""
    if not isinstance(lr, Tensor):
        _check_number("lr", lr, 0.0, float("inf"), high_included=True)
    elif lr.numel() != 1:
        raise ValueError(f"lr has shape {tuple(lr.shape)}; expected a number or a tensor with one element")


def check_fraction(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a part of a mini-batch that is not empty."""
    _check_number(name, value, 0.0, 1.0, low_included=False, high_included=True)


def check_rule(group: dict[str, Any]) -> None:
    """Check the hyperparameters that the update computes with; numpy's scalars among them become Python's."""
    group.update({name: plain(value) for name, value in group.items()})
    check_lr(group["lr"])
    try:
        betas = tuple(map(plain, group["betas"]))
    except TypeError:  # nothing that has items
        betas = ()
    if len(betas) != 2:
        raise ValueError(f"betas={group['betas']!r}; expected a pair (beta1, beta2)")
    group["betas"] = betas
    for i, beta in enumerate(betas):
        _check_number(f"betas[{i}]", beta, 0.0, 1.0, high_included=False)
    _check_number("eps", group["eps"], 0.0, float("inf"), high_included=True)
    _check_number("weight_decay", group["weight_decay"], 0.0, float("inf"), high_included=True)
    _check_number("hessian_power", group["hessian_power"], 0.0, 1.0, high_included=True)
    if group["clip"] is not None:
        _check_number("clip", group["clip"], 0.0, float("inf"), low_included=False, high_included=True)
    check_weight("shrink", group["shrink"])
    check_flags(group, ("nesterov", "cautious", "maximize"))
    check_choice("unmeasured", group["unmeasured"], CHOICES["unmeasured"])


def check_group(group: dict[str, Any]) -> None:
    """Check all options of one parameter group; numpy's scalars among them become Python's."""
    check_rule(group)
    check_count("n_samples", group["n_samples"])
    check_count("warmup", group["warmup"], least=0)
    if group["dense_steps"] is not None:
        check_count("dense_steps", group["dense_steps"], least=0)
    if callable(group["update_each"]):
        with contextlib.suppress(NameError, AttributeError):  # it may look at what comes later
            hessian_interval(group["update_each"], max(dense_steps(group) - 1, 0))  # the first number it will be asked
    else:
        check_count("update_each", group["update_each"])
    check_flags(group, ("capturable", "master_weights", "probe_per_rank"))
    check_fraction("hessian_fraction", group["hessian_fraction"])
    if group["fd_epsilon"] is not None:
        _check_number("fd_epsilon", group["fd_epsilon"], 0.0, float("inf"), low_included=False, high_included=False)
        if group["hvp"] != "finite_difference":
            raise ValueError(
                f'fd_epsilon={group["fd_epsilon"]!r} with hvp="{group["hvp"]}"; expected fd_epsilon=None, or '
                'hvp="finite_difference"'
            )
    check_block_size(group["block_size"])
    for name, choices in CHOICES.items():
        check_choice(name, group[name], choices)
    check_seed(group["seed"])
    if group["capturable"] and group["probe"] == "gaussian":
        raise ValueError(
            'capturable=True with probe="gaussian"; expected probe="rademacher", whose counter can live on the GPU'
        )
    if group["capturable"] and group["shrink"]:
        raise ValueError(f"capturable=True with shrink={group['shrink']!r}; expected shrink=0")
    if group["capturable"] and group["nonfinite"] == "raise":
        raise ValueError('capturable=True with nonfinite="raise"; expected nonfinite="keep", which the GPU decides')
    if group["capturable"] and group["off_step"] == "stale" and has_off_steps(group):
        raise ValueError('capturable=True with off_step="stale"; expected off_step="hold"')


def check_hvp_dtype(value: Any, hvp: str, param_dtype: torch.dtype) -> None:
    """Raise ValueError unless the second differentiation can be in this precision."""
    if not _is_one_of(value, (None, torch.bfloat16, "tf32")):
        raise ValueError(f'hvp_dtype={value!r}; expected None, torch.bfloat16 or "tf32"')
    if value is not None and hvp != "autograd":
        raise ValueError(
            f'hvp_dtype={value!r} with hvp="{hvp}", which has no second differentiation; expected hvp="autograd", or '
            "hvp_dtype=None"
        )
    if value is not None and param_dtype == torch.float64:
        raise ValueError(f"hvp_dtype={value!r} with parameters in torch.float64; expected hvp_dtype=None")


# What decides how Hutchinson's estimate is made, and so has nothing to decide where there is a diagonal already.
_OF_THE_ESTIMATE = {"n_samples": 1, "probe": "rademacher", "hvp": "autograd", "hvp_dtype": None, "hessian_fraction": 1}


def check_given_diagonal(group: dict[str, Any]) -> None:
    """Refuse options that ``step(hessian=...)`` would leave without effect."""
    for name, neutral in _OF_THE_ESTIMATE.items():
        if group[name] != neutral:
            raise ValueError(
                f"{name}={group[name]!r} has no effect on a diagonal of your own, step(hessian=...); expected "
                f"{name}={neutral!r}"
            )


def check_state_dtype(value: Any) -> None:
    """Raise ValueError unless ``value`` is None or bfloat16."""
    if not _is_one_of(value, (None, torch.bfloat16)):
        raise ValueError(
            f"state_dtype={value!r}; expected None (float32, float64 for float64 parameters) or torch.bfloat16"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Tell whether elements of a tensor share memory, as those of an expanded one do."""
    if 0 in tensor.shape:
        return False
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach = 0  # largest offset that the dimensions so far lead to
    for stride, size in dims:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dims:
        offsets = (offsets[:, None] + stride * torch.arange(size, device="cpu")).flatten()
    return len(offsets.unique()) < len(offsets)


def check_param(param: Tensor, name: str) -> None:
    """Refuse parameters no backend can update."""
    if param.layout is not torch.strided:
        raise TypeError(f"{name} has layout {param.layout}; expected a dense tensor. AdaHessian has no sparse update")
    if param.dtype not in DTYPES:
        hint = "; keep a real parameter and use torch.view_as_complex of it" if param.is_complex() else ""
        raise TypeError(f"{name} is {param.dtype}; expected float32, bfloat16, float16 or float64{hint}")
    if _overlaps(param):
        raise ValueError(
            f"{name}, of shape {tuple(param.shape)} and strides {param.stride()}, has elements that share memory; "
            "expected a parameter without, such as its clone()"
        )


def check_apart(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that have memory in common: it would be updated twice."""
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, p in named:
        if type(p) in (Tensor, torch.nn.Parameter) and p.device.type != "meta" and p.numel() > 0:
            by_storage.setdefault(p.untyped_storage().data_ptr(), []).append((name, p))
    for members in by_storage.values():
        if len(members) == 1:
            continue
        ends = sorted((_first(p), _first(p) + _reach(p)) for _, p in members)
        if any(first < end for (_, end), (first, _) in itertools.pairwise(ends)):
            _check_elements_apart(members)


def _first(p: Tensor) -> int:
    return int(p.storage_offset()) * p.element_size()


def _reach(p: Tensor) -> int:
    return p.element_size() * (1 + sum(int(stride) * (n - 1) for stride, n in zip(p.stride(), p.shape, strict=True)))


def _check_elements_apart(members: Sequence[tuple[str, Tensor]]) -> None:
    unit = min(p.element_size() for _, p in members)
    owners = torch.zeros(members[0][1].untyped_storage().nbytes() // unit, dtype=torch.int32, device="cpu")
    for number, (name, p) in enumerate(members, 1):
        units = p.element_size() // unit
        strides = *(units * stride for stride in p.stride()), 1
        own = owners.as_strided((*p.shape, units), strides, p.storage_offset() * units)
        if taken := int(own.max()):
            raise ValueError(
                f"{name} shares memory with {members[taken - 1][0]}; expected each element in one parameter"
            )
        own.fill_(number)


def check_grad(grad: Tensor, name: str) -> None:
    """Refuse sparse gradients."""
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {name} has layout {grad.layout}; expected a dense gradient, for example from "
            "nn.Embedding(sparse=False)"
        )
