"""The cell of benchmarks/gpu.py about training steps: images a second and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.lib.gpu_bench import Bench, Precision, arithmetic, as_torchvision, explain, spread, time_in_turn
from norton_deploy.models.detectors import freeze_stages
from norton_deploy.training.detector_training import keep_boxes_in_float32

NormForward = Callable[[Any, Tensor], Tensor]


def cast_terms(norm: Any, x: Tensor) -> Tensor:
    """torchvision's forward with its two terms in the input's type, so that the result has it too."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


def training(bench: Bench) -> dict[str, Any]:
    """Steps of Mask R-CNN (of Faster R-CNN in --smoke), dense and `fast`, 4 images of the frames' size."""
    task = "box" if bench.smoke else "mask"
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
    wanted: list[tuple[str, str, str, NormForward | None, bool]] = [
        ("dense", "fp32", "torchvision's norm", None, False),
        ("dense", "bf16", "torchvision's norm", None, False),
        ("dense", "bf16", "norm's terms cast", cast_terms, False),
        ("dense", "bf16", "typed norm", None, False),
        ("dense", "bf16", "typed norm, NHWC", None, True),
        ("fast", "bf16", "torchvision's norm", None, False),
        ("fast", "bf16", "typed norm", None, False),
        ("fast", "bf16", "typed norm, NHWC", None, True),
        ("dense", "tf32", "torchvision's norm", None, False),
        ("dense", "tf32", "torchvision's norm, NHWC", None, True),
        ("fast", "fp32", "torchvision's norm", None, False),
        ("dense", "fp16", "typed norm, NHWC", None, True),
    ]
    results = bench.partial
    for plan, precision, what, norm, channels_last in wanted[1:3] if bench.smoke else wanted:
        name = f"{task} {plan}, {precision}, {what}"
        if bench.left() < 0:
            results[name] = "no time left"
            continue
        try:
            results[name] = steps(bench, task, plan, precision, autocast.get(precision), norm, channels_last, what)
        except Exception as error:
            results[name] = {"error": explain(error)}
        if bench.on_gpu:
            torch.cuda.empty_cache()
    return results


def steps(
    bench: Bench,
    task: Any,
    plan: str,
    precision: str,
    autocast: torch.dtype | None,
    norm: NormForward | None,
    channels_last: bool,
    what: str,
) -> dict[str, Any]:
    """Time and memory of a few steps."""
    batch = 1 if bench.smoke else 4
    model: Any = copy.deepcopy(bench.model(task, plan)).requires_grad_(True)
    freeze_stages(model.backbone.body, 3)
    keep_boxes_in_float32(model)
    if "torchvision" in what:
        model = as_torchvision(model)
    if norm is not None:
        for layer in model.modules():
            if isinstance(layer, FrozenBatchNorm2d):
                layer.forward = partial(norm, layer)  # type: ignore[method-assign]
    if channels_last:
        model.backbone.to(memory_format=torch.channels_last)
    model.train()
    frames = bench.frames(batch).permute(0, 3, 1, 2).float() / 255
    targets = [truth(bench, seed) for seed in range(batch)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, weight_decay=1e-4, foreach=True)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=autocast is torch.float16)
    losses = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            terms = model(list(frames), targets)
        loss = sum(term.float() for term in terms.values())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())

    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    exact: Precision = "tf32" if precision == "tf32" else "fp32"
    with arithmetic(exact, search=True):
        times = time_in_turn(bench, {"": step}, 2 if bench.smoke else 6, warm_up=1 if bench.smoke else 3)[""]
    found: dict[str, Any] = spread(times)
    found["images_per_s"] = batch * 1e3 / found["median_ms"]
    found["losses"] = [float(loss) for loss in (losses[0], losses[-1])]
    if bench.on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def truth(bench: Bench, seed: int) -> dict[str, Tensor]:
    """Eight objects as rectangles."""
    generator = torch.Generator().manual_seed(seed)
    height, width = bench.image_size
    low = torch.rand(8, 2, generator=generator) * torch.tensor([width, height]) * 0.6
    size = (0.1 + 0.3 * torch.rand(8, 2, generator=generator)) * torch.tensor([width, height])
    boxes = torch.cat([low, low + size], dim=1)
    masks = torch.zeros(8, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {"boxes": boxes, "labels": torch.randint(1, 91, (8,), generator=generator), "masks": masks}
    return {name: value.to(bench.device) for name, value in target.items()}
