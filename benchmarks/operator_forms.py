"""Forms of what a graph does between its convolutions, in ONNX Runtime on the CPU: RoIAlign, TopK, suppression.

The forms of one operation take turns on the same inputs, and are compared; `benchmarks/gpu.py` has the same on a GPU.
RoIAlign is gathered from one table (standard operators, what graphs have), or ONNX's own: for every RoI on every level,
or for each level's RoIs alone, whose number depends on the data.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.lib.cells import RESULTS, ResultCells, interval, run, settings_of, tabulate
from benchmarks.lib.gpu_operators import nms_blocked
from norton_deploy.cost.session import make_session
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.export.onnx_export import OPSET, simplify
from norton_deploy.export.static_boxes import DEFAULT_ITERATIONS, nms_unrolled
from norton_deploy.export.static_roi_align import StaticRoIAlign

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/operator_forms.py."""

    out: Path = RESULTS / "operator_forms.json"
    """Results file; a Markdown table is written beside it."""
    image_size: int = 800
    """Side of the image in pixels."""
    channels: int = 256
    """Of the pyramid."""
    proposals: int = 1000
    """RoIs of the box head, and boxes of a suppression."""
    rounds: int = 8
    """Timed calls of each form, by the processor's time of one thread, which other work changes little."""


class Call(nn.Module):
    """A function as a module, which the exporter wants."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        """Its result, a single tensor."""
        return self.function(*inputs)


def main(settings: Settings) -> int:
    """Measure what is missing."""
    cells: dict[str, Callable[[], dict[str, Any]]] = {
        "RoIAlign of the box head": partial(roi_align, settings, settings.proposals, 7),
        "RoIAlign of the mask head": partial(roi_align, settings, settings.proposals // 10, 14),
        "TopK of 120,000 anchors": partial(top_k, settings),
        "Suppression of proposals": partial(suppression, settings),
    }
    return ResultCells(settings.out, settings_of(settings), report).measure_all(cells)


def report(results: ResultCells) -> str:
    """Milliseconds of each form, and the paired ratio to the first, which graphs have."""
    rows = [(name, form, found) for name, cell in results.cells.items() for form, found in cell["forms"].items()]
    return tabulate(
        "Forms of an operation in ONNX Runtime on a CPU, one thread, processor time; above 1: quicker than what graphs "
        "have (the first form)",
        rows,
        {
            "Operation": lambda row: row[0],
            "Form": lambda row: row[1],
            "ms": lambda row: f"{row[2]['p50_ms']:.2f}",
            "Ratio": lambda row: interval(row[2]["speedup"]) if "speedup" in row[2] else "-",
            "Largest difference": lambda row: f"{row[2]['difference']:.1e}" if "difference" in row[2] else "-",
        },
    ).to_markdown()


def compare(settings: Settings, forms: Mapping[str, bytes], inputs: Arrays) -> dict[str, Any]:
    """All forms in turn on the same inputs."""
    sessions = {name: make_session(model, "cpu", threads=1) for name, model in forms.items()}
    outputs = {name: session.run(None, inputs)[0].astype(np.float32) for name, session in sessions.items()}
    calls = {name: lambda _, session=session: session.run(None, inputs) for name, session in sessions.items()}
    turns = time_in_turns(calls, rounds=settings.rounds, clock=time.process_time)
    first = next(iter(forms))
    found: dict[str, Any] = {name: turns.summary(name).to_dict() for name in forms}
    for name in list(forms)[1:]:
        found[name] |= {
            "speedup": turns.speedup(first, name).to_dict(),
            "difference": float(np.abs(outputs[name] - outputs[first]).max()),
        }
    return {"forms": found}


def exported(function: Callable[..., Any], inputs: Arrays) -> bytes:
    """A function of tensors as an ONNX model."""
    example = tuple(torch.from_numpy(value) for value in inputs.values())
    program = torch.onnx.export(
        Call(function).eval(), example, dynamo=True, input_names=list(inputs), verbose=False, opset_version=OPSET,
        optimize=False,
    )  # fmt: skip
    assert program is not None
    simplify(program.model)
    return program.model_proto.SerializeToString()


def roi_align(settings: Settings, count: int, side: int) -> dict[str, Any]:
    """The RoIs of one frame, large and small."""
    image, generator = (settings.image_size,) * 2, torch.Generator().manual_seed(0)
    sizes = {str(level): (image[0] // (4 << level),) * 2 for level in range(4)}
    pool = StaticRoIAlign(MultiScaleRoIAlign(list(sizes), side, 2), sizes, image)
    low = torch.rand(count, 2, generator=generator) * 0.75 * image[0]
    size = torch.exp(torch.rand(count, 2, generator=generator) * 4.2 + 2.2)
    maps = {name: torch.randn(1, settings.channels, *shape, generator=generator) for name, shape in sizes.items()}
    boxes = torch.cat([low, (low + size).clamp(max=image[0])], 1)[None]
    inputs = {"boxes": boxes.numpy(), **{f"map{name}": value.numpy() for name, value in maps.items()}}
    return compare(
        settings,
        {
            "gathered": exported(lambda boxes, *maps: pool(dict(zip(sizes, maps, strict=True)), boxes), inputs),
            "ONNX's, every level": native_roi_align(pool, inputs, by_level=False),
            "ONNX's, by level": native_roi_align(pool, inputs, by_level=True),
        },
        inputs,
    )


def native_roi_align(pool: StaticRoIAlign, inputs: Arrays, *, by_level: bool) -> bytes:
    """ONNX's RoIAlign over a pyramid, each RoI's own level chosen as `pool` chooses it; channels last, as `pool`'s."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: dict[str, np.ndarray] = {}

    def node(operator: str, sources: Sequence[str | np.ndarray], **attributes: Any) -> str:
        names = []
        for source in sources:
            if isinstance(source, np.ndarray):
                constants[f"constant{len(constants)}"] = source
                source = f"constant{len(constants) - 1}"
            names.append(source)
        nodes.append(helper.make_node(operator, names, [f"value{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def aligned(level: int, boxes: str, image: str | np.ndarray) -> str:
        height, width = pool.output_size
        return node(
            "RoiAlign", [f"map{pool.levels[level]}", boxes, image], mode="avg", output_height=height,
            output_width=width, sampling_ratio=pool.samples, spatial_scale=float(pool.level_scale[level]),
            coordinate_transformation_mode="output_half_pixel",
        )  # fmt: skip

    count = inputs["boxes"].shape[1]
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    boxes = node("Squeeze", ["boxes", zero])
    low, high = (node("Slice", [boxes, zero + at, zero + at + 2, one]) for at in (0, 2))
    side = node("Sqrt", [node("ReduceProd", [node("Sub", [high, low]), one], keepdims=0)])
    above = [
        node("Cast", [node("GreaterOrEqual", [side, np.array([limit], np.float32)])], to=TensorProto.INT64)
        for limit in pool.thresholds
    ]
    level = node("Sum", [node("Cast", [part], to=TensorProto.FLOAT) for part in above])
    own = [node("Equal", [level, np.array([index], np.float32)]) for index in range(len(pool.levels))]
    if by_level:
        chosen = [node("Squeeze", [node("NonZero", [mask]), zero]) for mask in own]
        image = node("Mul", [node("Cast", [level], to=TensorProto.INT64), zero])
        parts = [
            aligned(index, node("Gather", [boxes, rows]), node("Gather", [image, rows]))
            for index, rows in enumerate(chosen)
        ]
        order = node("Concat", chosen, axis=0)
        place = node("ScatterElements", [np.zeros(count, np.int64), order, np.arange(count)], axis=0)
        pooled = node("Gather", [node("Concat", parts, axis=0), place], axis=0)
    else:
        images = np.zeros(count, np.int64)
        pooled = aligned(0, boxes, images)
        for index in range(1, len(pool.levels)):
            mask = node("Unsqueeze", [own[index], np.array([1, 2, 3])])
            pooled = node("Where", [mask, aligned(index, boxes, images), pooled])
    result = node("Transpose", [pooled], perm=[0, 2, 3, 1])
    graph = helper.make_graph(
        nodes,
        "roi_align",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return bytes(model.SerializeToString())


def top_k(settings: Settings) -> dict[str, Any]:
    """The best anchors of the finest level."""
    anchors = 3 * (settings.image_size // 4) ** 2 // 16 * 16
    count = min(settings.proposals, anchors // 16)
    inputs = {"scores": np.random.default_rng(0).random((1, anchors), np.float32)}

    def in_two(scores: Tensor) -> Tensor:
        parts = scores.reshape(16, -1).topk(count, dim=1).values
        return parts.reshape(1, -1).topk(count, dim=1).values

    forms = {"in one": lambda scores: scores.topk(count, dim=1).values, "in two stages": in_two}
    return compare(settings, {name: exported(form, inputs) for name, form in forms.items()}, inputs)


def suppression(settings: Settings) -> dict[str, Any]:
    """Five levels of proposals, unrolled."""
    rng = np.random.default_rng(0)
    low = rng.random((5, settings.proposals, 2), np.float32) * 0.75 * settings.image_size
    boxes = np.concatenate([low, low + 30 + 150 * rng.random(low.shape, np.float32)], -1)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    half = {"counts": torch.float16}
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "unrolled": lambda boxes: nms_unrolled(boxes, valid, None, 0.7, DEFAULT_ITERATIONS)[0],
        "unrolled, counts in fp16": lambda boxes: nms_unrolled(boxes, valid, None, 0.7, DEFAULT_ITERATIONS, **half)[0],
        "blocks of 128": lambda boxes: nms_blocked(boxes, valid, None, 0.7, 8, dtype=torch.float32)[0],
        "blocks of 256": lambda boxes: nms_blocked(boxes, valid, None, 0.7, 8, block=256, dtype=torch.float32)[0],
    }
    inputs = {"boxes": boxes}
    return compare(settings, {name: exported(form, inputs) for name, form in forms.items()}, inputs)


if __name__ == "__main__":
    run(Settings, main)
