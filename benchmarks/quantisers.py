"""Which library quantises the graphs: onnxruntime.quantization, NNCF or NVIDIA ModelOpt, on box, mask and keypoint.

Each gets the same fp32 graph, the same drawn calibration scenes and the same list of layers to leave in float, and
chooses its ranges in its own way. AP is of the trained detectors that come with the package; the detector for boxes has
random weights: its errors say something, its AP would not. NNCF and ModelOpt are no dependencies of this package;
what is not installed is left out, so that each can be measured in an environment of its own:

    python -m benchmarks.quantisers --libraries nncf
"""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import helper
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, page, run, settings_of, tabulate
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.synthetic import draw_scene, write_dataset
from norton_deploy.evaluation.evaluate import evaluate_detector
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.equalise import equalised
from norton_deploy.export.graph_digest import signed
from norton_deploy.export.letterbox import letterboxed
from norton_deploy.export.onnx_export import STAGE_PREFIX, metadata_of
from norton_deploy.export.quantise import LAYERS, calibrate, quantisable_layers, quantised
from norton_deploy.inference.loading import load_predictor, packaged_detector
from norton_deploy.inference.predictor import Backend, Image
from norton_deploy.parity.checked_quantisation import FIRST_SCENE
from norton_deploy.parity.export_checked import ExportOptions, export_checked, open_detector
from norton_deploy.parity.gate import check_parity
from norton_deploy.structures import TASKS, Categories, Task

Library = Literal["onnxruntime", "nncf", "modelopt"]
DISTRIBUTIONS: dict[Library, str] = {"onnxruntime": "onnxruntime-gpu", "nncf": "nncf", "modelopt": "nvidia-modelopt"}
ENGINES: tuple[Backend, ...] = ("onnxruntime", "openvino")
DATA_SEED, GATE_SEED = 20_000, 30_000
RANDOM_SIZE = (192, 192)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of benchmarks/quantisers.py."""

    libraries: tuple[Library, ...] = ("onnxruntime",)
    """Which libraries; each must be installed."""
    tasks: tuple[Task, ...] = TASKS
    """Which detectors."""
    calibration: int = 64
    """Drawn scenes that ranges are taken from."""
    eval_images: int = 100
    """Drawn scenes that AP is measured on."""
    gate_images: int = 8
    """Drawn scenes that detections are compared on."""
    out: Path = RESULTS / "quantisers.json"
    """Results; a .md is written beside it."""
    work: Path = Path("runs/quantisers")
    """Folder for graphs and images."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    cells = {
        f"{task}, {library}": partial(measure, task, library, settings)
        for task in settings.tasks
        for library in settings.libraries
    }
    return ResultCells(settings.out, settings_of(settings, "libraries", "tasks"), report).measure_all(cells)


def measure(task: Task, library: Library, settings: Settings) -> Cell:
    """One library on one detector."""
    settings.work.mkdir(parents=True, exist_ok=True)
    model, categories = detector(task)
    fp32 = settings.work / f"{task}_fp32.onnx"
    contract = export_checked(model, task, categories, fp32, ExportOptions(image_size=RANDOM_SIZE)).contract
    size = contract.image_size
    batches = [
        letterboxed([draw_scene(FIRST_SCENE + index, size).image], size) for index in range(settings.calibration)
    ]
    out = settings.work / f"{task}_{library}.onnx"
    started = time.perf_counter()
    try:
        model_fp32 = onnx.load(fp32)
        stages = [value for value in model_fp32.graph.value_info if value.name.startswith(STAGE_PREFIX)]
        graph = QUANTISERS[library](model_fp32, batches)
    except Exception as error:  # whatever a library raises is a result
        return {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    seconds = time.perf_counter() - started
    write(graph, contract, stages, out)
    scenes = [draw_scene(GATE_SEED + index, size).image for index in range(settings.gate_images)]
    return {
        "version": importlib.metadata.version(DISTRIBUTIONS[library]),
        "quantise_s": seconds,
        "bytes": out.stat().st_size,
        "quantisers": sum(node.op_type == "QuantizeLinear" for node in graph.graph.node),
        "engines": {engine: in_engine(model, out, engine, scenes, task, categories, settings) for engine in ENGINES},
    }


def in_engine(
    model: GeneralizedRCNN,
    file: Path,
    engine: Backend,
    scenes: Sequence[Image],
    task: Task,
    categories: Categories,
    settings: Settings,
) -> Cell:
    """The gate's values and, of a trained detector, AP; or why the engine cannot run it."""
    try:
        predictor: Any = load_predictor(file, device="cpu", backend=engine)
        parity = check_parity(model, file, scenes, precision="int8", predictor=predictor)
    except Exception as error:  # whatever an engine raises is a result
        return {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    stages = parity.to_dict()["stages"]
    found: Cell = {"stages": stages, "passed": parity.passed}
    if task != "box":
        data = settings.work / f"coco_{settings.eval_images}"
        if not data.exists():
            write_dataset(data, 1, settings.eval_images, seed=DATA_SEED)
        metrics = evaluate_detector(predictor, CocoDetection(data, "val", task, categories=categories), progress=False)
        found["AP"] = {measure: float(values["AP"]) for measure, values in metrics.metrics.items()}
    return found


def detector(task: Task) -> tuple[GeneralizedRCNN, Categories]:
    """The packaged detector of a task; for boxes one with random weights, compressed by the same plan."""
    if task == "box":
        model, _, categories = open_detector(None, task, plan=PLANS / "fast.yaml", image_size=RANDOM_SIZE)
        return model, categories
    checkpoint = open_model(str(packaged_detector(task)))
    model = checkpoint.model.eval()  # type: ignore[assignment]  # what these files hold
    return model, checkpoint.header.categories


def write(graph: Any, contract: GraphContract, stages: Sequence[Any], out: Path) -> None:
    """A graph with the package's metadata, and its stages in the order that the gate compares them in."""
    others = [value for value in graph.graph.value_info if not value.name.startswith(STAGE_PREFIX)]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend([*others, *stages])
    helper.set_model_props(graph, metadata_of(replace(contract, precision="int8", weight_bits=8)))
    out.write_bytes(signed(graph.SerializeToString()))


def by_onnxruntime(model: Any, batches: Sequence[Any]) -> Any:
    """As `export_onnx --precision int8` does it."""
    model = equalised(model, batches)
    return quantised(model, calibrate(model, batches), cpu="vnni")


def by_nncf(model: Any, batches: Sequence[Any]) -> Any:
    """Its own choice for ONNX graphs: ranges from minima and maxima, biases corrected."""
    import nncf

    name = model.graph.input[0].name
    for node in model.graph.node:  # NNCF 3.4 drops a cast that changes nothing, and the graph's output with it
        if node.output[0] == "num_detections" and node.op_type == "Cast":
            node.op_type = "Identity"
            del node.attribute[:]
    dataset = nncf.Dataset([{name: batch} for batch in batches])
    ignored = nncf.IgnoredScope(names=left_in_float(model), validate=False)
    return nncf.quantize(model, dataset, subset_size=len(batches), ignored_scope=ignored)


def by_modelopt(model: Any, batches: Sequence[Any]) -> Any:
    """Its own choice for TensorRT: entropy, symmetric; everything else stays fp32."""
    import numpy as np
    from modelopt.onnx.quantization import quantize

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize(
            str(source),
            calibration_data={model.graph.input[0].name: np.concatenate(batches)},
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            op_types_to_quantize=list(LAYERS),
            nodes_to_exclude=[f"^{re.escape(name)}$" for name in left_in_float(model)],
            output_path=str(out),
        )
        return onnx.load(out)


QUANTISERS: dict[Library, Callable[[Any, Sequence[Any]], Any]] = {
    "onnxruntime": by_onnxruntime,
    "nncf": by_nncf,
    "modelopt": by_modelopt,
}


def left_in_float(model: Any) -> list[str]:
    """Names of the nodes outside the layers that this package quantises."""
    chosen = {node.name for nodes in quantisable_layers(model).values() for node in nodes}
    return [node.name for node in model.graph.node if node.name not in chosen]


def report(results: ResultCells) -> str:
    """One line for each detector, library and engine."""
    rows = [
        (name, cell, engine, found)
        for name, cell in results.cells.items()
        for engine, found in cell.get("engines", {"-": cell}).items()
    ]

    def value(found: Cell, measure: str) -> str:
        worst = [stage["worst"] for stage in found["stages"] if (stage["name"], stage["measure"]) == ("final", measure)]
        return f"{worst[0]:.3g}" if worst else "-"

    columns: dict[str, Callable[[tuple[str, Cell, str, Cell]], str]] = {
        "detector, library": lambda row: f"{row[0]} {row[1].get('version', '')}",
        "engine": lambda row: row[2],
        "AP": lambda row: row[3].get("failure") or ", ".join(f"{k} {v:.4f}" for k, v in row[3].get("AP", {}).items()),
        "unmatched": lambda row: value(row[3], "share of unmatched detections") if "stages" in row[3] else "-",
        "box px": lambda row: value(row[3], "box distance, px") if "stages" in row[3] else "-",
        "gate": lambda row: "-" if "passed" not in row[3] else "passed" if row[3]["passed"] else "refused",
        "s": lambda row: f"{row[1]['quantise_s']:.0f}" if "quantise_s" in row[1] else "-",
        "MB": lambda row: f"{row[1]['bytes'] / 1e6:.1f}" if "bytes" in row[1] else "-",
    }
    return page(tabulate("Libraries that quantise, on packaged detectors (box: random weights)", rows, columns))


if __name__ == "__main__":
    run(Settings, main)
