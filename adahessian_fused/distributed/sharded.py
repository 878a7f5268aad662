"""Sharded parameters (FSDP2, tensor parallelism, any DTensor): every rank updates its part."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import has_off_steps

EXACT_IS_REFUSED = (
    'hvp="{}" with sharded parameters (DTensor): their curvature cannot come from a graph, in which they are not '
    'themselves under FSDP2, and which has no tangents with tensor parallelism; expected hvp="finite_difference" with '
    'opt.step(closure) or opt.backward(function), or with tensor parallelism hvp="autograd"'
)
# Where a DTensor's own attributes are looked at, it is typed Any: importing its class is slow.
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _dtensor() -> Any:
    from torch.distributed.tensor import DTensor  # slow to import, and not everywhere

    return DTensor


def any_sharded(tensors: Sequence[Any]) -> bool:
    """Tell whether one of them is a DTensor."""
    kinds = set(map(type, tensors)) - _PLAIN
    return bool(kinds) and torch.distributed.is_available() and any(issubclass(kind, _dtensor()) for kind in kinds)


def is_sharded(tensor: Any) -> bool:
    """Tell whether it is a DTensor."""
    return any_sharded((tensor,))


def gathering(modules: Iterable[Any]) -> list[Any]:
    """Return those of the modules for which FSDP2 gathers weights."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded by what has not been imported
    return [] if fsdp is None else [module for module in modules if isinstance(module, fsdp.FSDPModule)]


def param_dtype(module: Any) -> torch.dtype | None:
    """Return the dtype in which FSDP2's policy has a module compute; None if it is the parameters' own."""
    return module._get_fsdp_state()._mp_policy.param_dtype


def local(tensor: Any) -> Tensor:
    """Return the part of a DTensor that is in this rank's memory, that memory itself; other tensors as they are."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


@functools.cache
def make_twice_differentiable() -> None:
    """Have ``DTensor.from_local`` keep the graph of its gradient, from now on; ``to_local`` and ``redistribute``, too.

    The first one's backward redistributes the gradient, where it must, without a graph; those of the others left none
    in PyTorch 2.11. Between two blocks with tensor parallelism that would cut the second derivative. Gradients stay
    what they are.
    """
    from torch.distributed.tensor import DTensor, Replicate, _api, _redistribute

    def from_local(original: Any, ctx: Any, grad: Any) -> Any:
        if grad is not None and grad.requires_grad and torch.is_grad_enabled():
            came = getattr(ctx, "forward_input_placements", None) or ctx.previous_placement
            wanted = getattr(ctx, "grad_placements", None) or [Replicate() if p.is_partial() else p for p in came]
            grad = grad.redistribute(placements=wanted)
        return original(ctx, grad)

    def is_cut(result: Any, grad: Any) -> bool:
        return result is not None and result.grad_fn is None and grad.requires_grad and torch.is_grad_enabled()

    def to_local(original: Any, ctx: Any, grad: Any) -> Any:
        result, *others = original(ctx, grad)
        if is_cut(result, grad):
            placed = result.device_mesh, result.placements
            result = DTensor.from_local(grad, *placed, run_check=False, shape=result.shape, stride=result.stride())
        return result, *others

    def redistribute(original: Any, ctx: Any, grad: Any) -> Any:
        result, *others = original(ctx, grad)
        if is_cut(result, grad):
            result = grad.redistribute(placements=result.placements).to(result.dtype)
        return result, *others

    functions: Any = {
        _api._FromTorchTensor: from_local,
        _api._ToTorchTensor: to_local,
        _redistribute.Redistribute: redistribute,
    }
    for function, backward in functions.items():
        function.backward = staticmethod(
            functools.wraps(function.backward)(functools.partial(backward, function.backward))
        )


def groups_of(params: Iterable[Any]) -> list[Any]:
    """Return the process groups along every axis of the meshes that DTensors among the parameters are cut over."""
    params = list(params)
    meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p)) if any_sharded(params) else ()
    return [mesh.get_group(axis) for mesh in meshes for axis in range(mesh.ndim)]


def part_of(tensor: Any, param: Any) -> Tensor:
    """Return this rank's part of a tensor that belongs to a parameter, cut like the parameter's own.

    Args:
        tensor: a DTensor in any placement, or a plain tensor: that part already, or the whole.
        param: the parameter.
    """
    if not is_sharded(param):
        return tensor
    if is_sharded(tensor):
        same = tensor.placements == param.placements and tensor.device_mesh == param.device_mesh
        return local(tensor if same else tensor.redistribute(param.device_mesh, param.placements))
    mine = local(param)
    if tensor.shape == param.shape != mine.shape:
        axis, size, number = _cut(param)
        return tensor.narrow(axis, min(size * number, param.shape[axis]), mine.shape[axis])
    return tensor


def joined(tensor: Tensor, param: Any) -> Tensor:
    """Return a DTensor like the parameter whose part on this rank is ``tensor``, of which it shares the memory."""
    if not is_sharded(param) or is_sharded(tensor):
        return tensor
    options = {"run_check": False, "shape": param.shape, "stride": param.stride()}
    return _dtensor().from_local(tensor, param.device_mesh, param.placements, **options)


def whole(parts: Sequence[tuple[Tensor, Any]]) -> list[Tensor]:
    """Turn numbers that are sums over this rank's part of a parameter into sums over all ranks' parts.

    Every rank has to call it. Numbers of sharded parameters are added up on the way.

    Args:
        parts: the numbers, each with its parameter.

    Returns:
        Each parameter's number, the same on every rank that has a part of it.
    """
    result = [number for number, _ in parts]
    by_group: dict[tuple[Any, int], list[int]] = {}
    for n, (_, param) in enumerate(parts):
        axes = [i for i, placement in enumerate(getattr(param, "placements", ())) if not placement.is_replicate()]
        if axes:
            by_group.setdefault((param.device_mesh, axes[0]), []).append(n)
    for (mesh, axis), numbers in by_group.items():
        total = torch.stack([result[n].double() for n in numbers])
        torch.distributed.all_reduce(total, group=mesh.get_group(axis))
        for n, number in zip(numbers, total, strict=True):
            result[n] = number
    return result


def _cut(param: Any) -> tuple[int, int, int]:
    """Return the axis that the parameter is cut along, the size of a full part, and this rank's number among them."""
    shards = [(i, placement) for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    if not shards:
        return 0, max(param.shape[0] if param.ndim else 1, 1), 0
    (mesh_axis, placement), *others = shards
    if others or type(placement).__name__ != "Shard":
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has placements {param.placements}; expected one Shard, and "
            "Replicate() on further axes of the mesh"
        )
    axis = placement.dim % param.ndim
    return axis, -(-param.shape[axis] // param.device_mesh.size(mesh_axis)), param.device_mesh.get_local_rank(mesh_axis)


def first_element(param: Tensor) -> int | None:
    """Return the index, in the whole parameter, of the first element that this rank has; 0 if it is not sharded.

    None if what it has is no range of elements, since the parameter is cut along another axis than the first.

    Raises:
        ValueError: the parameter is cut more than once.
    """
    if not is_sharded(param):
        return 0
    axis, size, number = _cut(param)
    if axis:
        return None
    return min(size * number, param.shape[0] if param.ndim else 1) * math.prod(param.shape[1:])


def check_blocks(param: Tensor, block: int, name: str) -> None:
    """Refuse averaging blocks (Eq. 7) that lie on two ranks; every rank finds the same.

    Raises:
        ValueError: a cut goes through a block.
    """
    if not is_sharded(param):
        return
    axis, size, _ = _cut(param)
    if not param.ndim or size >= param.shape[axis]:
        return
    # What lies between two cuts, and where it begins anew behind an axis before.
    lengths = [n * math.prod(param.shape[axis + 1 :]) for n in ((size, param.shape[axis]) if axis else (size,))]
    if any(length % block for length in lengths):
        otherwise = '"auto" or 1' if param.ndim == 1 or axis else '"auto", "row" or 1'
        where = "rows" if axis == 0 else f"of axis {axis}"
        raise ValueError(
            f"a cut after every {size} {where}, or {lengths[0]} elements, of {name}, of shape {tuple(param.shape)}, "
            f"goes through averaging blocks of {block}; expected block_size={otherwise} for it, in a group of its own"
        )


def check_options(group: dict[str, Any], *, has_group: bool) -> None:
    """Refuse options of a parameter group that do not work with sharded parameters.

    Args:
        group: the parameter group.
        has_group: whether the optimizer has a process group.

    Raises:
        ValueError: an option is out of the question.
    """
    if not any_sharded(group["params"]):
        return
    if has_group:
        raise ValueError(
            "process_group is given for sharded parameters (DTensor); expected None: FSDP averages their gradients, "
            "and with tensor parallelism all ranks have the same batch"
        )
    if group["probe"] == "gaussian":
        raise ValueError('probe="gaussian" with sharded parameters; expected "rademacher", drawn for each element')
    if group["off_step"] == "stale" and has_off_steps(group):
        raise ValueError('off_step="stale" with sharded parameters; expected "hold"')
