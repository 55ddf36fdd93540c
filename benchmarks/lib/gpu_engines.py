"""Cells of benchmarks/gpu.py about torch as an engine: checkpoints as CUDA graphs, packages compiled ahead of time."""

from __future__ import annotations

import copy
import tempfile
import time
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch

from benchmarks.lib.gpu_bench import Bench, Graph, Variant, arithmetic, explain, spread, time_in_turn
from norton_deploy.cost.turns import paired_speedup
from norton_deploy.inference.predictor import Image
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.structures import Categories


def engine(bench: Bench) -> dict[str, Any]:
    """`load_predictor(checkpoint)` as a user has it, a frame on the host to its detections: eager, recorded, fp16."""
    results = bench.partial
    for task in bench.tasks:
        model = bench.model(task, "fast")
        labels = tuple(range(1, model.roi_heads.box_predictor.cls_score.out_features))
        categories = Categories(labels, labels, tuple(map(str, labels)))
        options: dict[str, dict[str, Any]] = {"eager": {"graphs": False}, "recorded": {"graphs": True}}
        if bench.on_gpu:
            options["recorded, fp16"] = {"graphs": True, "float_type": "fp16"}
        frames = bench.host_frames(2, (3 * bench.image_size[0] // 4, bench.image_size[1]))
        calls: dict[str, Any] = {}
        for name, chosen in options.items():
            predictor = TorchPredictor(copy.deepcopy(model), task, categories, device=str(bench.device), **chosen)
            calls[name] = partial(predictor, frames[:1])
        found = {name: (call(), call())[1][0] for name, call in calls.items()}  # recorded at the second
        times = time_in_turn(bench, calls, 2 if bench.smoke else 20)
        for name, values in times.items():
            same = len(found[name]) == len(found["eager"])
            results[f"{task} {name}"] = spread(values) | {
                "detections": len(found[name]),
                "speedup over eager": paired_speedup(times["eager"], values).to_dict(),
                "frames_per_s_streamed": streamed(calls[name].func, frames[0], 4 if bench.smoke else 60),
                "box_px": float(np.abs(found[name].boxes - found["eager"].boxes).max(initial=0)) if same else None,
            }
    return results


def streamed(predictor: TorchPredictor, frame: Image, count: int) -> float:
    """Frames a second of `Predictor.stream`; a call's own are 1000 over its milliseconds."""
    started = time.perf_counter()
    found = sum(1 for _ in predictor.stream(repeat(frame, count)))
    return found / (time.perf_counter() - started)


def package(bench: Bench) -> dict[str, Any]:
    """An AOTInductor package: compiled here, loaded, captured, beside the module as it is."""
    results = bench.partial
    calls: dict[str, Any] = {}
    for task, plan in (("box", "fast"), ("mask", "fast")):
        variant = Variant(task, plan, "fp16" if bench.on_gpu else "fp32")  # type: ignore[arg-type]  # plain names
        if bench.smoke or bench.left() < 60:
            results[f"{task} {plan}"] = "not in --smoke: minutes" if bench.smoke else "no time left"
            continue
        started = time.perf_counter()
        try:
            plain = bench.graph(variant)
            with torch.no_grad(), tempfile.TemporaryDirectory() as folder, arithmetic(variant.precision):
                program = torch.export.export(bench.static(variant), (plain.frames,), strict=False)
                file = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
                graph = Graph(bench, torch._inductor.aoti_load_package(file), plain.frames, variant.precision)
            gap = {n: float((v.float() - plain.replay()[n].float()).abs().max()) for n, v in graph.replay().items()}
            results[f"{task} {plan}"] = {
                "compile_s": time.perf_counter() - started, "difference": gap, "not_captured": graph.error
            }  # fmt: skip
            calls |= {f"{task} {plan}": plain.replay, f"{task} {plan} package": graph.replay}
            results["times"] = {name: spread(values) for name, values in time_in_turn(bench, calls, 20).items()}
        except Exception as error:
            results[f"{task} {plan}"] = {"error": explain(error)}
    return results
