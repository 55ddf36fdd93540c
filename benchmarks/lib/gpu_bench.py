"""What the cells of benchmarks/gpu.py work with: detectors, frames, CUDA graphs and clocks."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.lib.cells import PLANS
from norton_deploy.compression.calibration import calibrate_random_detector
from norton_deploy.compression.compress import apply_structure
from norton_deploy.compression.lowering import Form, lower_model
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.export.precision import to_fp16
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.inference.cuda_graph import capture
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import ImageSettings, RoiSettings, RpnSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import TASKS, Task

Precision = Literal["fp32", "tf32", "fp16"]
Layout = Literal["NCHW", "NHWC"]
Outputs = dict[str, Tensor]


class Skipped(Exception):  # noqa: N818 (not an error)
    """A cell that this machine cannot run; the text says why."""


@dataclass(frozen=True)
class Variant:
    """One static detector.

    Attributes:
        task: box, mask or keypoint.
        plan: "dense" or a plan of configs/plans.
        precision: fp32 has TF32 off everywhere.
        form: of the plan's CPDBlocks.
        layout: of feature maps and kernels.
        batch: frames per call.
    """

    task: Task
    plan: str
    precision: Precision = "fp16"
    form: Form = "grouped"
    layout: Layout = "NHWC"
    batch: int = 1

    def __str__(self) -> str:
        form = "" if self.plan == "dense" else f" {self.form}"
        return f"{self.plan}{form} {self.precision} {self.layout}"


@dataclass
class Bench:
    """State that the cells share.

    Attributes:
        device: where everything runs.
        smoke: everything tiny.
        prepared: folder of `--prepare`, or None.
        ends: when the running cell's time is up (`time.monotonic`).
        partial: what the running cell has found so far.
        rates: what the environment cell measured: GB/s of a copy, TFLOP/s of matrix products by precision.
    """

    device: torch.device
    smoke: bool
    prepared: Path | None = None
    ends: float = float("inf")
    rates: dict[str, float] = field(default_factory=dict)
    partial: dict[str, Any] = field(default_factory=dict)
    graphs: dict[Variant, Graph] = field(default_factory=dict)
    models: dict[tuple[Task, str], Future[nn.Module]] = field(default_factory=dict)
    calibrated: set[tuple[Task, str]] = field(default_factory=set)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(3))

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the frames of random detectors."""
        return (96, 96) if self.smoke else (800, 800)

    @property
    def proposals(self) -> int:
        """Proposals per frame, for every random detector."""
        return 40 if self.smoke else 1000

    @property
    def detections(self) -> int:
        """Detections per frame, likewise."""
        return 8 if self.smoke else 100

    @property
    def plans(self) -> tuple[str, ...]:
        """Plans beside the dense detector."""
        return ("fast",) if self.smoke else ("fast", "table3", "balanced")

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks of the random detectors."""
        return ("box",) if self.smoke else TASKS

    def need_gpu(self, why: str) -> None:
        """Skip the cell without a GPU."""
        if not self.on_gpu:
            raise Skipped(f"needs a CUDA GPU: {why}")

    def left(self) -> float:
        """Seconds that the running cell has left."""
        return self.ends - time.monotonic()

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def settings(self, task: Task) -> DetectorSettings:
        """Torchvision's detector at the frames' size."""
        count = (2 * self.proposals, self.proposals)
        return DetectorSettings(
            num_classes=2 if task == "keypoint" else 91,
            image=ImageSettings(min_size=min(self.image_size), max_size=max(self.image_size)),
            rpn=RpnSettings(pre_nms=count, post_nms=count),
            roi=RoiSettings(detections_per_image=self.detections),
        )

    def start(self, task: Task, plan: str) -> Future[nn.Module]:
        """Begin to build a random detector in the background."""
        key = (task, plan)
        if key not in self.models:
            dense = None if plan == "dense" else self.start(task, "dense")
            self.models[key] = self.pool.submit(self._build, task, plan, dense)
        return self.models[key]

    def _build(self, task: Task, plan: str, dense: Future[nn.Module] | None) -> nn.Module:
        if dense is None:
            return self.settings(task).build(task).eval()
        model = copy.deepcopy(dense.result())
        return apply_structure(model, CompressionPlan.load(PLANS / f"{plan}.yaml")).eval()

    def model(self, task: Task, plan: str) -> Any:
        """A detector with the plan's structure and random, calibrated weights, on the device."""
        model: Any = self.start(task, plan).result()
        if (task, plan) not in self.calibrated:
            torch.manual_seed(0)
            # A dense detector stays where the background thread may still copy it until all plans have theirs.
            for other in self.plans:
                if plan == "dense" and (task, other) in self.models:
                    self.models[task, other].result()
            model.to(self.device)
            with arithmetic("fp32"):
                planes = [frame.permute(2, 0, 1).float() / 255 for frame in self.frames(2)]
                calibrate_random_detector(model, planes, self.settings(task))
            model.requires_grad_(False)
            self.calibrated.add((task, plan))
        return model

    def host_frames(self, count: int, image_size: tuple[int, int] | None = None) -> list[npt.NDArray[np.uint8]]:
        """Frames uint8 [H, W, 3] with structure at several scales; the same everywhere."""
        height, width = image_size or self.image_size
        rng = np.random.default_rng(0)
        frames = []
        for _ in range(count):
            image = np.zeros((height, width, 3), np.float32)
            for cells in (4, 16, 50):
                noise = rng.random((cells, cells, 3), np.float32)
                image += noise[np.arange(height) * cells // height][:, np.arange(width) * cells // width]
            frames.append((image * (255 / 3)).astype(np.uint8))
        return frames

    def frames(self, count: int) -> Tensor:
        """`host_frames` as one tensor [count, H, W, 3] on the device."""
        return torch.from_numpy(np.stack(self.host_frames(count))).to(self.device)

    def static(self, variant: Variant) -> StaticRCNN:
        """The static module of a random detector, on the device."""
        model = self.model(variant.task, variant.plan)
        settings = GraphSettings(self.image_size, batch=variant.batch, target="tensorrt")
        return static_module(model, settings, variant, self.device)

    def forget(self, kept: Callable[[Variant], bool]) -> None:
        """Free the graphs that are not to be kept."""
        for variant in [one for one in self.graphs if not kept(one)]:
            del self.graphs[variant]
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def graph(self, variant: Variant) -> Graph:
        """A captured variant, made once."""
        if variant not in self.graphs:
            self.graphs[variant] = Graph(self, self.static(variant), self.frames(variant.batch), variant.precision)
        return self.graphs[variant]


@torch.no_grad()
def static_module(model: Any, settings: GraphSettings, variant: Variant, device: torch.device) -> StaticRCNN:
    """A static module in a variant's form, precision and layout; `model` is not changed."""
    with arithmetic(variant.precision):
        static = StaticRCNN(lower_model(model, variant.form), settings)
    if variant.precision == "fp16":
        to_fp16(static)
    static.to(device)
    if variant.layout == "NHWC":
        static.to(memory_format=torch.channels_last)
    else:  # frames are NHWC, and convolutions keep what they get
        static.backbone.body.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(),))
    return static


class Graph:
    """A static module as a CUDA graph; on a CPU, and where it cannot be captured, the module itself, called each time.

    Attributes:
        frames: uint8 [B, H, W, 3] on the device, what the graph reads.
        outputs: what it writes.
        error: why it could not be captured.
        seconds: what warming up (with cuDNN's search for algorithms) and capturing took.
    """

    def __init__(self, bench: Bench, static: Any, frames: Tensor, precision: Precision) -> None:
        self.bench, self.static, self.precision = bench, static, precision
        self.frames = frames.clone()
        if bench.on_gpu:
            torch.cuda.empty_cache()
        started = time.perf_counter()
        self.error = ""
        with torch.no_grad(), arithmetic(precision, search=True):
            try:
                self.captured, self.outputs = capture(lambda: static(self.frames), bench.device)
            except RuntimeError as error:
                self.error = explain(error)
                bench.synchronise()
                self.captured, self.outputs = None, static(self.frames)
        self.seconds = time.perf_counter() - started

    def replay(self) -> Outputs:
        """Run it on what is in `frames`; asynchronous on a GPU."""
        if self.captured is not None:
            self.captured.replay()
        else:
            with torch.no_grad(), arithmetic(self.precision, search=True):
                self.outputs = self.static(self.frames)
        return self.outputs


def explain(error: BaseException) -> str:
    """An error and what it followed: an operator that cannot be recorded, then a capture that cannot be ended."""
    cause = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {error}"[:600] + (f" <- {explain(cause)}" if cause is not None else "")


@contextmanager
def arithmetic(precision: Precision, search: bool = False) -> Iterator[None]:
    """Whether float32 products may be TF32, and whether cuDNN searches for its quickest algorithms."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    cudnn.benchmark = search
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def time_in_turn(
    bench: Bench, calls: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Milliseconds on the host's clock from an idle device to an idle device, all calls in turn.

    Whole rounds only; fewer than `rounds` when the cell's time is up, but at least two.
    """

    def finished(call: Callable[[], Any]) -> Callable[[int], None]:
        def run(_step: int) -> None:
            call()
            bench.synchronise()

        return run

    timed = {name: finished(call) for name, call in calls.items()}
    bench.synchronise()
    return time_in_turns(timed, rounds=rounds, warm_up=warm_up, enough=lambda: bench.left() < 0).to_dict()


def event_ms(bench: Bench, call: Callable[[], Any], repeats: int = 20) -> list[float]:
    """Milliseconds of a call between CUDA events, one by one; on a CPU by the host's clock."""
    if not bench.on_gpu:
        return time_in_turn(bench, {"": call}, 2, warm_up=1)[""]
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def spread(times_ms: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (float(value) for value in np.percentile(times_ms, [25, 50, 75]))
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "calls": len(times_ms)}


def eager_call(
    bench: Bench, model: Any, precision: Precision, *, autocast: bool = False, search: bool = False
) -> Callable[[], Any]:
    """A call of torchvision's own detector on one frame that is on the device already."""
    planes = [bench.frames(1)[0].permute(2, 0, 1).float().contiguous() / 255]

    def call() -> Any:
        with (
            torch.no_grad(),
            arithmetic(precision, search),
            torch.autocast(bench.device.type, torch.float16 if bench.on_gpu else torch.bfloat16, enabled=autocast),
        ):
            return model(planes)

    return call


def as_torchvision(model: Any) -> Any:
    """A copy with torchvision's own frozen BatchNorm, which gives float32 under autocast."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.__class__ = FrozenBatchNorm2d
    return plain


def without_pasting(model: Any) -> Any:
    """A copy whose masks stay in their boxes, as the static module's do."""
    bare = copy.deepcopy(model)
    bare.transform.postprocess = lambda result, *_: result
    return bare
