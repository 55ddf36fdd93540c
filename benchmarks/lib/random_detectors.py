"""Detectors with random weights that do equal work: enough for time, MACs and parameters; they say nothing about AP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.lib.cells import PLANS
from norton_deploy.compression.compress import compress
from norton_deploy.cost.complexity import Complexity, count_complexity
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.data.image_file import read_image
from norton_deploy.data.image_folder import find_images
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.export.letterbox import Letterbox
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.provenance import machine_values, provenance
from norton_deploy.search.form_tuning import TimingTable
from norton_deploy.search.latency_budget import Workload
from norton_deploy.structures import Categories, Task

SYNTHETIC_IMAGES = 8
SGEMM_SIDE, SGEMM_CALLS = 2048, 6


@dataclass(frozen=True, kw_only=True)
class WorkSettings:
    """What the benchmarks of random detectors have in common."""

    image_size: tuple[int, int] = (800, 800)
    """Height and width; every image is letterboxed to it, for every model."""
    proposals: int = 1000
    """Proposals per image, for every model."""
    detections: int = 100
    """Detections per image, for every model."""
    images: Path | None = None
    """Folder of photographs; without it synthetic scenes are drawn (and the results say so)."""

    @property
    def workload(self) -> Workload:
        """One image of these settings."""
        return Workload(self.image_size, self.proposals, self.detections)

    def prepare_images(self, work: Path) -> tuple[list[Path], str]:
        """Image files below `work` of exactly `image_size` (so that no model resizes), and what they are, in words."""
        if self.images is None:
            arrays = [draw_scene(seed, self.image_size).image for seed in range(SYNTHETIC_IMAGES)]
            what = f"{len(arrays)} synthetic scenes, not photographs"
        else:
            arrays = []
            for file in find_images(self.images):
                image = read_image(file)
                canvas = np.empty((*self.image_size, 3), np.uint8)
                Letterbox.fit((image.shape[0], image.shape[1]), self.image_size).place(image, canvas)
                arrays.append(canvas)
            what = f"{len(arrays)} images of {self.images}"
        folder = work / "images_{}x{}".format(*self.image_size)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"image_{index:03d}.jpg" for index in range(len(arrays))]
        for path, array in zip(paths, arrays, strict=True):
            cv2.imwrite(str(path), cv2.cvtColor(array, cv2.COLOR_RGB2BGR))
        return paths, what

    def equalise(self, model: Any) -> None:
        """Give a detector the same image size, proposals and detections as all others, in place."""
        model.transform.min_size, model.transform.max_size = (min(self.image_size),), max(self.image_size)
        for counts in (model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n):
            counts["testing"] = self.proposals
        model.roi_heads.score_thresh = 0.0
        model.roi_heads.detections_per_img = self.detections

    def random_detector(
        self, task: Task, images: Sequence[Path], shape: DetectorSettings | None = None
    ) -> tuple[nn.Module, Categories]:
        """A dense detector with seeded random weights, calibrated and equalised, and its categories."""
        classes = 2 if task == "keypoint" else 91
        torch.manual_seed(0)
        model = replace(shape or DetectorSettings(), num_classes=classes).build(task)
        labels = tuple(range(1, classes))
        categories = Categories(labels, labels, tuple(f"class {label}" for label in labels))
        return self._made_equal(model, images), categories

    def compressed(self, dense: nn.Module, plan: CompressionPlan, images: Sequence[Path]) -> nn.Module:
        """What a plan makes of a random detector, calibrated and equalised."""
        return self._made_equal(compress(dense, plan, starts=1), images)

    def _made_equal(self, model: nn.Module, images: Sequence[Path]) -> nn.Module:
        self.equalise(model)
        calibrate(model, images)
        return model

    def complexity(self, model: nn.Module, detections: int | None = None) -> Complexity:
        """MACs and parameters with these proposals and detections."""
        found = self.detections if detections is None else detections
        return count_complexity(model, self.image_size, proposals=self.proposals, detections=found)


class RandomDetectors:
    """Random detectors by task and plan, each made once, since compressing one takes as long as measuring it, and
    calibrated on the first images that it is asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[Task, str], tuple[nn.Module, Categories]] = {}

    def get(
        self, task: Task, name: str, settings: WorkSettings, images: Sequence[Path]
    ) -> tuple[nn.Module, Categories]:
        """ "dense", or what the plan `name` of configs/plans makes of it, equalised; and its categories."""
        if (task, name) not in self._made:
            if name == "dense":
                self._made[task, name] = settings.random_detector(task, images)
            else:
                dense, categories = self.get(task, "dense", settings, images)
                plan = CompressionPlan.load(PLANS / f"{name}.yaml")
                self._made[task, name] = settings.compressed(dense, plan, images), categories
        settings.equalise(self._made[task, name][0])
        return self._made[task, name]


def calibrate(model: Any, images: Sequence[Path]) -> None:
    """Set every frozen normalisation's statistics to those of its input for two images, front to back, so that
    activations keep their scale; leaves the model in evaluation mode."""

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norm.running_mean = inputs[0].mean(dim=(0, 2, 3))
        norm.running_var = inputs[0].var(dim=(0, 2, 3)).clamp(min=1e-6)

    norms = [layer for layer in model.modules() if isinstance(layer, FrozenBatchNorm2d)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    batch = [torch.from_numpy(read_image(path)).permute(2, 0, 1).float() / 255 for path in images[:2]]
    with torch.no_grad():
        model.eval().backbone(model.transform(batch)[0].tensors)
    for handle in handles:
        handle.remove()


def timing_table(work: Path) -> TimingTable:
    """This machine's layer times, kept below `work` for the next cells."""
    return TimingTable(work / "layer_times.json", machine_values(provenance()))


def sgemm_gmacs_per_s() -> list[float]:
    """10^9 multiply-accumulates per second of float32 matrix products of 2048 x 2048, call by call."""
    left, right = torch.rand(2, SGEMM_SIDE, SGEMM_SIDE)
    turns = time_in_turns({"sgemm": lambda _: torch.mm(left, right)}, rounds=SGEMM_CALLS, warm_up=1)
    rates: list[float] = (SGEMM_SIDE**3 / turns.of("sgemm") / 1e6).tolist()
    return rates
