"""Errors of automatic differentiation, with the operator's name and the ways out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch.distributed as dist

_NOT_IMPLEMENTED = (
    r"derivative for '?(?:aten::)?(\w+)'? is not implemented",
    r"Trying to use forward AD with (?:aten::)?(\w+) that does not support it",
    r"Trying to backward through ([\w.]+) but no autograd formula was registered",  # an operator of somebody's own
)
# Other texts of torch, and what they are about.
_KNOWN = {
    "does not currently support double backward": "a model compiled with torch.compile",
    "compiled with non-empty donated buffers": "a model compiled with torch.compile",
    "Double backwards is not supported for CuDNN RNNs": "cuDNN's RNN",
    "use_reentrant=True, torch.utils.checkpoint is incompatible": "torch.utils.checkpoint with use_reentrant=True",
    "region computed under selective activation checkpoint": "torch.utils.checkpoint with a selective context_fn",
    "You must implement the jvp function": "a torch.autograd.Function without jvp (PyTorch's for full backward hooks)",
    "ZeroTensors are immutable": "an operator of the model or the loss (such as mse_loss)",
}
LACKS = {
    "autograd": "cannot be differentiated twice",
    "forward_over_reverse": "has no forward-mode derivative",
    "finite_difference": "cannot be differentiated",
}
_OTHER = {"autograd": "forward_over_reverse", "forward_over_reverse": "autograd"}
NO_GRAPH = "{}, whose backward leaves no graph of itself,"
HOOK_WITHOUT_GRAPH = "{}, which changes a gradient without a graph of how,"
HOOK_WITHOUT_TANGENT = "{}, which changes a gradient and drops its tangent,"
HIDDEN_NUMBERS = "{}, which keeps numbers for its backward that are no inputs and have no graph,"
WRONG_WEIGHT_NORM = "weight_norm, whose second derivative PyTorch has wrong,"
WRONG_NORM = "{} in a loss that holds a gradient, where PyTorch has its derivative wrong,"
GRAPH_THROUGH_DDP = (
    "loss.backward(create_graph=True) through DistributedDataParallel, whose hooks write to gradients in place and cut "
    "their graph; expected opt.backward(loss) or opt.step(closure), or opt.hook_backward() once before training and "
    "loss.backward()"
)
_WRITTEN_BY_DDP = "a leaf Variable that requires grad is being used in an in-place operation"  # in a backward pass
# What the mode has, or runs in another way.
_FRIENDLY = ("scaled_dot_product", "embedding_bag", "cuDNN", "torch.compile", "PyTorch has")


def operator_in(message: str) -> str | None:
    """Find the operator that an error of torch says cannot be differentiated; None if it says nothing of the kind."""
    for pattern in _NOT_IMPLEMENTED:
        found = re.search(pattern, message)
        if found is not None:
            return found[1]
    return next((what for text, what in _KNOWN.items() if text in message), None)


def explanation(operator: str, strategy: str) -> str:
    """Return what the operator lacks for a strategy, and what to do about it."""
    ways = [
        'AdaHessian(..., hvp="finite_difference"), which takes first-order gradients only, for a smooth model',
        f'hvp="{_OTHER[strategy]}", if that knows the operator',
    ]
    if "scaled_dot_product" in operator:
        ways.insert(0, "its math kernel, with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")
    elif operator == "flex_attention":
        ways.insert(0, "scaled_dot_product_attention, with attn_mask or is_causal, in curvature_friendly(model, opt)")
    elif "mse_loss" in operator:
        ways.insert(0, "(output - target).square().mean() in the place of mse_loss")
    elif "use_reentrant" in operator:
        ways.insert(0, "use_reentrant=False")
    elif "selective" in operator:
        ways.insert(0, "torch.utils.checkpoint without context_fn, which may be recomputed more than once")
    elif re.fullmatch(r"\w+\.\w+\.\w+", operator):  # namespace, name and overload
        ways.insert(0, "torch.library.register_autograd for it, by operators that have derivatives")
    elif "changes a gradient" in operator:
        ways.insert(0, "PyTorch's operators on the gradient in the hook, without detach(), .data, NumPy or no_grad()")
    elif "torch.autograd.Function" in operator:
        ways.insert(
            0,
            "a backward of PyTorch's operators on what ctx.save_for_backward() keeps of inputs and outputs, with all "
            "else computed from these again",
        )
        if "no inputs" in operator:
            ways.append("twice_differentiable = True in the class, if those numbers do not depend on its inputs")
    if strategy == "autograd" and any(name in operator for name in _FRIENDLY):
        ways.insert(
            0,
            "curvature_friendly(model, opt), once after making both, for every model that the loss goes through in "
            'training mode; in eval mode, and for compiled functions, "with curvature_friendly():" around the loss',
        )
    return (
        f'{operator} {LACKS[strategy]}, which hvp="{strategy}" needs. Ways out: {"; or ".join(ways)}. '
        "adahessian_fused.check_hvp(model, loss_fn, batch) tells which strategies a model allows"
    )


@contextlib.contextmanager
def naming_ddp() -> Iterator[None]:
    """Say what to write where a pass that keeps its graph fails in DistributedDataParallel, as all do."""
    try:
        yield
    except RuntimeError as error:
        if _WRITTEN_BY_DDP in str(error) and dist.is_available() and dist.is_initialized():
            raise RuntimeError(GRAPH_THROUGH_DDP) from error
        raise


class naming_the_operator:  # noqa: N801  a class costs every step less than a generator
    """Turn torch's error about an operator without the derivative a strategy needs into one that says what to do."""

    def __init__(self, strategy: str) -> None:
        self._strategy = strategy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        operator = operator_in(str(error)) if isinstance(error, RuntimeError) else None
        if operator is not None:
            raise RuntimeError(explanation(operator, self._strategy)) from error
