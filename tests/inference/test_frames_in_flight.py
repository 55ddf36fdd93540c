"""Frames in flight on a simulated GPU, whose streams run in any order that events allow; and in engines' streams."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from norton_deploy.inference import cuda_graph
from norton_deploy.inference.cuda_graph import FixedCall, InFlight
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.package_backend import PackagePredictor
from norton_deploy.inference.static_graph import StaticGraphPredictor
from norton_deploy.inference.tensorrt_backend import TensorRTPredictor


class Gpu:
    """Streams of operations; which of those that may run next does is left to chance.

    Attributes:
        heeds: waits that are heeded, those of streams for events and those of the host.
    """

    def __init__(self, seed: int, heeds: tuple[str, ...] = ("stream", "host")) -> None:
        self.rng, self.heeds = np.random.default_rng(seed), heeds
        self.streams: list[Any] = []
        self.current: Any = None

    def step(self) -> bool:
        """Run one operation; False where none can."""
        ready = [stream for stream in self.streams if stream.queue and stream.queue[0][0]()]
        if ready:
            ready[self.rng.integers(len(ready))].queue.pop(0)[1]()
        return bool(ready)

    def enqueue(self, run: Callable[[], Any], stream: Any = None, ready: Callable[[], bool] = lambda: True) -> None:
        (stream or self.current).queue.append((ready, run))

    def stream(self, _device: Any) -> Any:
        def wait_event(event: Any) -> None:
            mark = event.marks
            self.enqueue(lambda: None, made, lambda: mark in event.reached or "stream" not in self.heeds)

        made = SimpleNamespace(queue=[], wait_stream=lambda _other: None, wait_event=wait_event)
        self.streams.append(made)
        return made

    def event(self) -> Any:
        event = SimpleNamespace(marks=0, reached=set())

        def record(stream: Any) -> None:
            event.marks += 1
            self.enqueue(lambda mark=event.marks: event.reached.add(mark), stream)

        def synchronize() -> None:
            while "host" in self.heeds and event.marks not in event.reached:
                assert self.step(), "waits for ever"

        event.record, event.synchronize = record, synchronize
        return event

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def tensor(self, shape: Any, **_: Any) -> Any:
        array = np.zeros(shape, np.int64)

        def copy_(source: Any, *, non_blocking: bool) -> None:
            self.enqueue(lambda: array.__setitem__(..., source.array))

        return SimpleNamespace(array=array, shape=shape, dtype=None, device="gpu", numpy=lambda: array, copy_=copy_)

    def torch(self) -> Any:
        """What `cuda_graph` uses of torch."""
        cuda = SimpleNamespace(
            Stream=self.stream, Event=self.event, stream=self.on, current_stream=lambda _device: None
        )
        return SimpleNamespace(cuda=cuda, empty=self.tensor, empty_like=lambda like: self.tensor(like.shape))


def right_results(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, count: int = 8) -> bool:
    """Whether each of some calls gave what its own frames give."""
    monkeypatch.setattr(cuda_graph, "torch", gpu.torch())
    frames, outputs = gpu.tensor((4,)), {"first": gpu.tensor((1,)), "last": gpu.tensor((1,))}

    def launch() -> dict[str, Any]:  # reads and writes again and again while it runs
        for name, index in (("first", 0), ("last", 3)):
            gpu.enqueue(lambda name=name, index=index: outputs[name].array.__setitem__(0, frames.array[index]))
        return outputs

    found: list[list[int]] = []
    with InFlight(frames, outputs, launch, gpu.stream(None)) as flight:
        running: list[Callable[[], Any]] = []
        for number in range(1, count + 1):
            running.append(flight.submit(np.full(4, number)))
            for _ in range(gpu.rng.integers(6)):
                gpu.step()
            if len(running) == 2:
                found.append([int(value[0]) for value in running.pop(0)().values()])
        found.append([int(value[0]) for value in running.pop()().values()])
    return found == [[number, number] for number in range(1, count + 1)]


def test_no_memory_is_used_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(right_results(monkeypatch, Gpu(seed)) for seed in range(100))
    # and the simulation notices where it is
    for heeds in (("stream",), ("host",)):
        assert not all(right_results(monkeypatch, Gpu(seed, heeds)) for seed in range(20))


def test_who_leaves_early_waits_and_places_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(0)
    monkeypatch.setattr(cuda_graph, "torch", gpu.torch())
    with InFlight(gpu.tensor((1,)), {}, dict, gpu.stream(None)) as flight:
        flight.submit(np.ones(1)), flight.submit(np.ones(1))
        with pytest.raises(RuntimeError, match="2 calls are in flight"):
            flight.submit(np.ones(1))
        assert any(stream.queue for stream in gpu.streams)
    assert not any(stream.queue for stream in gpu.streams)
    flight.submit(np.ones(1))()


@pytest.mark.parametrize("engine", [PackagePredictor, TensorRTPredictor])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_engines_stream_finds_what_calls_find(engine: type[StaticGraphPredictor], batch: int, graph, lamp) -> None:
    """The rectangle finder computes for both engines; the streams are those of a CPU."""
    images = [lamp((32, 48), (3 + index, 4, 20, 15)) for index in range(5)]
    finder: Any = load_predictor(graph(batch=batch), device="cpu")
    expected = finder(images)

    def module(frames: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value) for name, value in finder.run(frames.numpy()).items()}

    made: Any = engine.__new__(engine)
    StaticGraphPredictor.__init__(made, "made", finder.contract, None)
    shape = finder.contract.input_shape
    if engine is PackagePredictor:
        made._call, made._exact = FixedCall(module, shape, torch.device("cpu")), nullcontext
    else:
        frames = torch.zeros(shape, dtype=torch.uint8)
        made._stream, made._on_device = None, {"images": frames, **module(frames)}
        made._execute = lambda: [made._on_device[name].copy_(value) for name, value in module(frames).items()]
    for found, wanted in zip(made.stream(iter(images)), expected, strict=True):
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
    assert made.timing.infer_ms > 0
