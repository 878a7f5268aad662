"""A function of tensors, captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3  # cuDNN and cuBLAS choose their kernels and get their workspaces before the capture


class Captured:
    """Replays a function from tensors to tensors.

    The first ``n_fixed`` inputs are read, and written to, where they are: the parameters and buffers of a module. The
    others are copied into buffers of the graph, unless they are in them already. The outputs are the graph's too, and
    overwritten by the next replay of this graph or of one that shares its pool.

    Args:
        function: what to capture; it must not wait for the device.
        tensors: its inputs, all on one CUDA device.
        n_fixed: how many of them stay at their addresses.
        n_owned: how many after those are the graph's buffers from now on.
        pool: of another captured function, to share its memory; both must never run at once.

    Attributes:
        pool: its memory.

    Raises:
        RuntimeError: the function does something that cannot be captured.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        n_fixed: int,
        n_owned: int = 0,
        pool: Any = None,
    ) -> None:
        elsewhere = [t for t in tensors if t.device.type != "cuda"]
        if elsewhere:
            raise RuntimeError(f"an input of shape {tuple(elsewhere[0].shape)} is on {elsewhere[0].device}")
        device = tensors[0].device
        self._n_fixed = n_fixed
        kept = n_fixed + n_owned
        self._inputs = [*tensors[:kept], *(t.detach().clone() for t in tensors[kept:])]
        # Warming up must not be felt: buffers (running statistics) and the random numbers go back to where they were.
        before = [t.clone() for t in tensors[:n_fixed]]
        random = torch.cuda.get_rng_state(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.no_grad():
            torch._foreach_copy_(list(tensors[:n_fixed]), before)
        torch.cuda.set_rng_state(random, device)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on using CUDA meanwhile: a loader that pins its batches does.
        with torch.cuda.device(device), torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = list(function(*self._inputs))
        self.pool = self._graph.pool()

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Replay with others in the place of the inputs that are not fixed."""
        pairs = zip(self._inputs[self._n_fixed :], tensors, strict=True)
        elsewhere = [(own, given) for own, given in pairs if own.data_ptr() != given.data_ptr()]
        if elsewhere:
            torch._foreach_copy_([own for own, _ in elsewhere], [given for _, given in elsewhere], non_blocking=True)
        self._graph.replay()
        return self._outputs
