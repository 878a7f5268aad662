"""A function of tensors, traced and compiled by TorchInductor."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .surroundings import described

FILE_FOR_EACH_KERNEL_FROM = 4  # threads of the compiler


class Compiled:
    """Forward pass, backward pass and double backward as one graph of operators.

    The function is traced below autograd, with tensors that have no data, and so runs once only, without effect on
    buffers or random numbers. Tensors that it holds itself stay where they are, and what is written to them counts.
    torch.compile of the function itself would have to capture the calls of autograd, and cannot differentiate twice
    through a model it has compiled.

    Args:
        function: what to compile; it may write to its inputs.
        tensors: its inputs.
        check: called with the ids of the tensors that the function holds itself, before anything is compiled.

    Attributes:
        held: those tensors.

    Raises:
        Exception: whatever ``check``, the model, make_fx or TorchInductor object to.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], check: Callable[[set[int]], None]
    ) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        held = _as_inputs(graph)
        check(set(map(id, held)))
        self.held, self._described = held, list(map(described, held))
        inputs: list[Any] = [*(tensor.detach() for tensor in held), *tensors]
        in_one_file = _may_be_one_file({t.device.type for t in inputs})
        try:
            self._function = _compiled(graph, inputs, cpp_wrapper=in_one_file)
        except Exception:  # some operators have no way to be called from C++
            if not in_one_file:
                raise
            self._function = _compiled(graph, inputs, cpp_wrapper=False)
        del graph
        _give_back()

    def fits(self) -> bool:
        """Tell whether the tensors that the function holds are what they were, but for their numbers."""
        return list(map(described, self.held)) == self._described

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Run with other inputs of the same shapes and strides."""
        with torch.no_grad():
            return self._function(*(tensor.detach() for tensor in self.held), *tensors)


def _compiled(graph: torch.fx.GraphModule, inputs: list[Any], *, cpp_wrapper: bool) -> Callable[..., Sequence[Tensor]]:
    # In autograd's order. TorchInductor would put operators off until their results are used, and those of the
    # second pass then keep the first one's gradients alive: a fifth of a transformer's memory.
    # What calls the kernels is a file of its own, hardly optimised: with them it took twice the time in six layers.
    how = {"reorder_for_locality": False, "cpp_wrapper": cpp_wrapper, "cpp_wrapper_build_separate": cpp_wrapper}
    with torch.no_grad(), torch._inductor.config.patch(how):
        return torch._inductor.compile(graph, inputs)


def _may_be_one_file(devices: set[str]) -> bool:
    """Tell whether all kernels shall be one C++ file: half the compiler's work, but no cores can share it."""
    wanted = torch._inductor.config.compile_threads
    return devices == {"cpu"} and isinstance(wanted, int) and wanted < FILE_FOR_EACH_KERNEL_FROM


def _give_back() -> None:
    """Free what the compiler has left, which would lie beside the activations: 230 MB after a transformer's graph."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # for the C library of Linux; others do so by themselves
        ctypes.CDLL(None).malloc_trim(0)


def _as_inputs(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Make inputs, the first ones, of the tensors that the function held itself: their numbers may change."""
    held: dict[int, tuple[Tensor, torch.fx.Node]] = {}
    begin = next(iter(graph.graph.nodes))
    for node in list(graph.graph.nodes):
        tensor = getattr(graph, node.target, None) if node.op == "get_attr" else None
        literal = any("lift_fresh" in str(user.target) for user in node.users)  # as in torch.tensor(3.0)
        if not isinstance(tensor, Tensor) or literal:
            continue
        if id(tensor) not in held:
            with graph.graph.inserting_before(begin):
                held[id(tensor)] = tensor, graph.graph.placeholder(f"held_{len(held)}")
            held[id(tensor)][1].meta = node.meta
        node.replace_all_uses_with(held[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.graph.lint()
    graph.graph.set_codegen(torch.fx.graph.CodeGen())
    graph.recompile()
    return [tensor for tensor, _ in held.values()]
