"""A call of fixed shapes on a device: page-locked memory around it, streams of its own, launches recorded once.

A CUDA graph is a recording of kernels at fixed addresses; replaying it costs the host some microseconds, launching
the thousand kernels of a detector some milliseconds. Without a GPU the call itself runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WARM_UP_CALLS = 3
FRAMES_IN_FLIGHT = 2
Arrays = dict[str, npt.NDArray[Any]]


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


@dataclass
class _Place:
    """What one call in flight has to itself: memory on the host and the device and, on a GPU, events."""

    host_frames: Tensor
    device_frames: Tensor
    host_outputs: dict[str, Tensor]
    copied: torch.cuda.Event | None
    done: torch.cuda.Event | None
    taken: bool = False


class InFlight:
    """Calls under way on fixed memory: while one computes, the next one's frames cross to the device on another stream.

    The call reads and writes the same addresses each time, so frames cannot cross straight to them: each call in flight
    has a place, from which the computing stream takes them when their copy is done. A place is used again only when its
    outputs were waited for, so nothing is overwritten that is still to be read. Leaving the context waits for the rest.
    """

    def __init__(
        self,
        frames: Tensor,
        outputs: Mapping[str, Tensor],
        launch: Callable[[], Mapping[str, Tensor]],
        stream: torch.cuda.Stream | None,
        places: int = FRAMES_IN_FLIGHT,
    ) -> None:
        """
        Args:
            frames: what the call reads, on its device.
            outputs: like what it writes.
            launch: puts the call on the current stream and returns its outputs.
            stream: where it computes; None on a CPU.
            places: calls in flight.
        """
        self._frames, self._launch, self._stream = frames, launch, stream
        on_gpu = stream is not None
        self._copies = torch.cuda.Stream(frames.device) if on_gpu else None

        def on_host(like: Tensor) -> Tensor:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=on_gpu)

        def make() -> _Place:
            host = on_host(frames)
            device = torch.empty_like(frames) if on_gpu else host
            events = (torch.cuda.Event(), torch.cuda.Event()) if on_gpu else (None, None)
            return _Place(host, device, {name: on_host(value) for name, value in outputs.items()}, *events)

        self._places = [make() for _ in range(places)]
        self._next = cycle(self._places)
        if self._copies is not None:  # that memory may have been another tensor's, whose last kernel still runs
            self._copies.wait_stream(torch.cuda.current_stream(frames.device))

    def submit(self, frames: npt.NDArray[np.generic]) -> Callable[[], Arrays]:
        """Frames over, call, outputs back; on a GPU it returns at once.

        Returns:
            What waits for the outputs, which are the caller's own; to be called once.

        Raises:
            RuntimeError: all places are taken by calls that nobody has waited for.
        """
        place = next(self._next)
        if place.taken:
            raise RuntimeError(f"{len(self._places)} calls are in flight; wait for the first one")
        place.taken = True
        place.host_frames.numpy()[...] = frames
        if self._copies is not None and place.copied is not None:
            with torch.cuda.stream(self._copies):
                place.device_frames.copy_(place.host_frames, non_blocking=True)
                place.copied.record(self._copies)
        with torch.cuda.stream(self._stream):
            if self._stream is not None and place.copied is not None:
                self._stream.wait_event(place.copied)
            self._frames.copy_(place.device_frames, non_blocking=True)
            for name, value in self._launch().items():
                place.host_outputs[name].copy_(value, non_blocking=True)
            if place.done is not None:
                place.done.record(self._stream)
        return partial(self._outputs, place)

    def _outputs(self, place: _Place) -> Arrays:
        if place.done is not None:
            place.done.synchronize()
        place.taken = False
        return {name: value.numpy().copy() for name, value in place.host_outputs.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place in self._places:
            if place.taken:
                self._outputs(place)


class FixedCall:
    """A module of fixed shapes, from frames in the host's memory to its outputs there.

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
        self._alone = self.in_flight(places=1)

    def in_flight(self, places: int = FRAMES_IN_FLIGHT) -> InFlight:
        """For several calls under way; any number of these and of `__call__` may be used side by side in one thread."""
        return InFlight(self._frames, self._outputs, self._launch, self._stream, places)

    def _launch(self) -> dict[str, Tensor]:
        if self._graph is None:
            return self._module(self._frames)
        self._graph.replay()
        return self._outputs

    def __call__(self, frames: npt.NDArray[np.generic]) -> Arrays:
        """Frames over, module, outputs back: the caller's own."""
        with self._alone as flight:
            return flight.submit(frames)()
