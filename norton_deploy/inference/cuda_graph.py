"""A call of fixed shapes on a device: page-locked memory around it, a stream of its own, launches recorded once.

A CUDA graph is a recording of kernels at fixed addresses; replaying it costs the host some microseconds, launching
the thousand kernels of a detector some milliseconds. Without a GPU the call itself runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WARM_UP_CALLS = 3


def capture(call: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph | None, Any]:
    """Warm a call up on a stream of its own and record it there; without a GPU only call it.

    `torch.cuda.graph` records everything on one stream, whose cuBLAS workspace all graphs then share: two of them could
    not run at the same time. It also collects garbage each time, which takes longer than a small graph.

    Returns:
        The graph, None without a GPU, and what the call returned: on a GPU each replay writes there.

    Raises:
        RuntimeError: something in the call cannot be recorded.
    """
    if device.type != "cuda":
        return None, call()
    torch.cuda.synchronize(device)
    side = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            call()
        torch.cuda.synchronize(device)
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            outputs = call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize(device)
    return graph, outputs


class FixedCall:
    """A module of fixed shapes, from a frame in the host's memory to its outputs there.

    Two of them around one module are two frames in flight: `submit` both, then `wait` for each.

    Attributes:
        device: where it runs.
    """

    def __init__(
        self,
        module: Callable[[Tensor], dict[str, Tensor]],
        shape: tuple[int, ...],
        device: torch.device,
        *,
        dtype: torch.dtype = torch.uint8,
        record: bool = True,
    ) -> None:
        """Record the module on frames of `shape` and `dtype`; without `record` it is called each time.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        self.device = device
        self._module = module
        self._frames = torch.zeros(shape, dtype=dtype, device=device)
        if record:
            self._graph, self._outputs = capture(lambda: module(self._frames), device)
        else:
            self._graph, self._outputs = None, module(self._frames)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        self._pinned_frames = self._pinned(self._frames)
        self._pinned_outputs = {name: self._pinned(value) for name, value in self._outputs.items()}

    def _pinned(self, like: Tensor) -> Tensor:
        """Host memory for a device's tensor."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self.device.type == "cuda")

    def submit(self, frames: npt.NDArray[np.generic]) -> None:
        """Frames over, module, outputs back; on a GPU it returns at once. `wait` before the next."""
        self._pinned_frames.numpy()[...] = frames
        with torch.cuda.stream(self._stream):
            self._frames.copy_(self._pinned_frames, non_blocking=True)
            if self._graph is None:
                self._outputs = self._module(self._frames)
            else:
                self._graph.replay()
            for name, value in self._outputs.items():
                self._pinned_outputs[name].copy_(value, non_blocking=True)
            if self._done is not None:
                self._done.record()

    def wait(self) -> dict[str, npt.NDArray[Any]]:
        """The outputs of the last `submit`, the caller's own."""
        if self._done is not None:
            self._done.synchronize()
        return {name: value.numpy().copy() for name, value in self._pinned_outputs.items()}
