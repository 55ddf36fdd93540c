"""Cells of benchmarks/gpu.py about whole detectors: do they run, are they right, how fast are they."""

from __future__ import annotations

import copy
import subprocess
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch

from benchmarks.lib.gpu_bench import (
    Bench,
    Graph,
    Outputs,
    Precision,
    Skipped,
    Variant,
    arithmetic,
    as_torchvision,
    eager_call,
    event_ms,
    explain,
    spread,
    time_in_turn,
    without_pasting,
)
from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.cost.turns import paired_speedup
from norton_deploy.inference.cuda_graph import FixedCall
from norton_deploy.structures import TASKS, Task

QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def environment(bench: Bench) -> dict[str, Any]:
    """The card and its own ceilings: a copy in memory (bytes read and written), matrix products."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    if bench.on_gpu:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name,
            "compute_capability": [card.major, card.minor],
            "multiprocessors": card.multi_processor_count,
            "memory_gib": card.total_memory / 2**30,
            "l2_mib": getattr(card, "L2_cache_size", 0) / 2**20,
            "cudnn": torch.backends.cudnn.version(),
        }
    side, count = (256, 2**20) if bench.smoke else (8192, 2**30)
    source = torch.empty(count, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    bench.rates["copy_gb_per_s"] = 2 * count / float(np.median(event_ms(bench, lambda: target.copy_(source)))) / 1e6
    kinds: dict[str, tuple[torch.dtype, Precision]] = {
        "bf16": (torch.bfloat16, "fp32"),
        "fp16": (torch.float16, "fp32"),
        "tf32": (torch.float32, "tf32"),
        "fp32": (torch.float32, "fp32"),
    }
    for name, (dtype, precision) in kinds.items():
        left, right = torch.randn(2, side, side, device=bench.device).to(dtype)
        with arithmetic(precision):
            ms = float(np.median(event_ms(bench, partial(torch.matmul, left, right), repeats=7)))
        bench.rates[f"{name}_tflop_per_s"] = 2 * side**3 / ms / 1e9
    if bench.on_gpu:  # after the products, while the clocks are up
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        try:
            found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            found["nvidia_smi"] = str(error)
    return found | {"rates": dict(bench.rates)}


def captures(bench: Bench) -> dict[str, Any]:
    """A CUDA graph of every static module: is it recorded, and does its replay give what the module gives?"""
    bench.need_gpu("CUDA graphs")
    results = bench.partial
    order = [(task, plan) for task in TASKS for plan in ("fast", "dense")]
    for precision in ("fp16", "fp32"):
        for task, plan in order:
            variant = Variant(task, plan, precision, layout="NHWC" if precision == "fp16" else "NCHW")
            name = f"{task} {variant}"
            if bench.left() < 0:
                results[name] = "no time left"
                continue
            try:
                results[name] = check_capture(bench.graph(variant))
            except Exception as error:
                results[name] = {"error": explain(error)}
    if not any(isinstance(entry, dict) and "error" not in entry for entry in results.values()):
        raise RuntimeError(f"no static module was captured: {results}")
    return results


def check_capture(graph: Graph) -> dict[str, Any]:
    """Replay on another frame than the graph was captured with, against the module's direct call."""
    frames = graph.bench.frames(4)[4 - len(graph.frames) :]
    before = graph.frames.clone()
    graph.frames.copy_(frames)
    replayed = {name: value.clone() for name, value in graph.replay().items()}
    with torch.no_grad(), arithmetic(graph.precision, search=True):
        direct = graph.static(graph.frames)
    graph.frames.copy_(before)
    worst = {name: float((replayed[name].float() - direct[name].float()).abs().max()) for name in direct}
    if graph.error:
        return {"error": graph.error, **state(replayed)}
    return {"warm_up_and_capture_s": graph.seconds, "difference_from_direct_call": worst, **state(replayed)}


def state(outputs: Outputs) -> dict[str, Any]:
    """Detections found and the graph's flags."""
    names = ("num_detections", "nms_converged", "candidates_complete")
    return {name: outputs[name].tolist() for name in names} | {
        "finite": all(bool(value.isfinite().all()) for value in outputs.values() if value.is_floating_point())
    }


def correctness(bench: Bench) -> dict[str, Any]:
    """The project's parity gate, its graph run on this device: every stage and the detections, fp32, TF32 and fp16."""
    from benchmarks.lib.gpu_parity import Subject, compare
    from norton_deploy.inference.loading import PACKAGED_TASKS, packaged_detector

    subjects = [
        Subject(f"packaged {task}", load_checkpoint(packaged_detector(task)).model, (192, 256), task)
        for task in PACKAGED_TASKS
    ]
    results = bench.partial
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "tf32") if bench.on_gpu else ("fp32",)
    for precision in precisions:
        for subject in subjects:
            compare(bench, subject, precision, results)
    for task, plan in (("box", "dense"), ("box", "fast"), ("mask", "fast"), ("mask", "dense")):
        if task not in bench.tasks or bench.left() < 0:
            results[f"random {task} {plan}"] = "not in --smoke" if bench.smoke else "no time left"
            continue
        model = copy.deepcopy(bench.model(task, plan)).cpu()
        subject = Subject(f"random {task} {plan}", model, bench.image_size, None)
        for precision in precisions[: 1 if bench.smoke else 2]:
            compare(bench, subject, precision, results)
    return results


def table3(bench: Bench, task: Task) -> dict[str, Any]:
    """One row of Table III: static modules in CUDA graphs and torchvision's eager detector, all in turn."""
    if task not in bench.tasks:
        raise Skipped("left out of --smoke")
    dense = as_torchvision(bench.model(task, "dense"))
    calls: dict[str, Any] = {"eager dense fp32": eager_call(bench, dense, "fp32", search=True)}
    calls["eager dense tf32"] = eager_call(bench, dense, "tf32", search=True)
    calls["eager dense fp16 autocast"] = eager_call(bench, dense, "fp32", autocast=True, search=True)
    if not bench.smoke:
        last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        calls["eager dense fp16 autocast NHWC"] = eager_call(bench, last, "fp32", autocast=True, search=True)
    if task == "mask":
        bare = without_pasting(dense)
        calls["eager dense fp32, masks not pasted"] = eager_call(bench, bare, "fp32", search=True)
        calls["eager dense fp16 autocast, masks not pasted"] = eager_call(
            bench, bare, "fp32", autocast=True, search=True
        )
    shadow = {name: len(call()[0]["boxes"]) for name, call in calls.items()}
    bench.synchronise()
    graphs: dict[str, Graph] = {}
    failed: dict[str, str] = {}
    reserved = 0.25 * bench.left()
    for variant in table3_variants(bench, task):
        if bench.left() < reserved and len(graphs) > 1:
            failed[str(variant)] = "no time left"
            continue
        try:
            graphs[str(variant)] = bench.graph(variant)
        except Exception as error:
            failed[str(variant)] = explain(error)
    calls |= {name: graph.replay for name, graph in graphs.items()}
    times = time_in_turn(bench, calls, 2 if bench.smoke else 25)
    macs = {
        plan: count_complexity(
            bench.model(task, plan), bench.image_size, proposals=bench.proposals, detections=bench.detections
        )
        for plan in ("dense", *bench.plans)
    }
    rows: dict[str, Any] = {}
    for name, values in times.items():
        rows[name] = spread(values)
        for baseline in ("eager dense fp32", "eager dense fp16 autocast"):
            rows[name][f"speedup over {baseline}"] = paired_speedup(times[baseline], values).to_dict()
        plan = "dense" if name.startswith("eager") else name.split()[0]
        rate = bench.rates.get(f"{'fp16' if 'fp16' in name else 'tf32' if 'tf32' in name else 'fp32'}_tflop_per_s")
        tflop_per_s = 2 * macs[plan].macs / rows[name]["median_ms"] / 1e9
        rows[name] |= {"tflop_per_s": tflop_per_s, "share_of_matmul": tflop_per_s / rate if rate else None}
        if name in graphs:
            rows[name] |= state(graphs[name].outputs) | {
                "warm_up_and_capture_s": graphs[name].seconds,
                "captured": graphs[name].captured is not None,
            }
        else:
            rows[name]["num_detections"] = [shadow[name]]
    bench.forget(lambda one: one.precision == "fp16" and one.form == "grouped" and one.plan in ("dense", "fast"))
    complexity = {plan: {"macs": c.macs, "params": c.params} for plan, c in macs.items()}
    return {"rows": rows, "not_measured": failed, "complexity": complexity}


def table3_variants(bench: Bench, task: Task) -> list[Variant]:
    """In order of worth."""
    half = [Variant(task, "dense"), Variant(task, "fast"), Variant(task, "fast", form="dense")]
    single = [Variant(task, plan, "fp32", layout="NCHW") for plan in ("dense", "fast")]
    if bench.smoke:
        return [Variant(task, "dense", "fp32", layout="NCHW"), Variant(task, "fast", "fp16")]
    return [
        *half,
        *single,
        Variant(task, "table3"),
        Variant(task, "balanced"),
        Variant(task, "table3", form="dense"),
        Variant(task, "balanced", form="dense"),
        Variant(task, "table3", "fp32", layout="NCHW"),
        Variant(task, "balanced", "fp32", layout="NCHW"),
        Variant(task, "fast", "fp32", layout="NHWC"),
        Variant(task, "dense", layout="NCHW"),
        Variant(task, "fast", layout="NCHW"),
        Variant(task, "fast", form="separable"),
        Variant(task, "dense", "tf32", layout="NCHW"),
        Variant(task, "fast", "tf32", layout="NCHW"),
    ]


def end_to_end(bench: Bench) -> dict[str, Any]:
    """A frame in the host's memory to detections there: latency of one call, and throughput with two in flight."""
    results = bench.partial
    wanted = [
        (task, plan, batch)
        for batch, plans in ((1, ("fast", "dense")), (8, ("fast", "dense")), (4, ("fast",)))
        for task in bench.tasks
        for plan in plans
        if not (task == "keypoint" and plan == "dense" and batch > 1)
    ]
    for task, plan, batch in wanted[: 1 if bench.smoke else None]:
        name = f"{task} {plan}, batch {batch}"
        if bench.left() < 0:
            results[name] = "no time left"
            continue
        try:
            results[name] = run_end_to_end(bench, Variant(task, plan, batch=batch))
        except Exception as error:
            results[name] = {"error": explain(error)}
    return results


def run_end_to_end(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Latency and throughput of one variant at its batch.

    Two calls in flight are two graphs, whose kernels may run side by side; or one graph, which computes while the next
    frames cross on a stream of their own (`Predictor.stream` of the engines).
    """
    from norton_deploy.export.letterbox import Letterbox
    from norton_deploy.inference.static_graph import decode_outputs

    frames = np.stack(bench.host_frames(variant.batch))
    with torch.no_grad(), arithmetic(variant.precision, search=True):
        module, shape = bench.static(variant), tuple(frames.shape)
        calls = [FixedCall(module, shape, bench.device) for _ in range(2)]
        labels = (1,) if variant.task == "keypoint" else tuple(range(1, 91))
        letterbox = Letterbox.fit(bench.image_size, bench.image_size)
        to_outputs, to_detections, to_masks = [], [], []
        for _ in range(2 if bench.smoke else 20):
            started = time.perf_counter()
            arrays = calls[0](frames)
            to_outputs.append((time.perf_counter() - started) * 1e3)
            found = [decode_outputs(arrays, index, letterbox, labels, "whole_pixels") for index in range(variant.batch)]
            to_detections.append((time.perf_counter() - started) * 1e3)
            pasted = [one.masks for one in found]
            to_masks.append((time.perf_counter() - started) * 1e3)
        count = 4 if bench.smoke else 60
        forms = {"1_in_flight": (1, 1), "2_in_flight": (2, 1), "copy_stream": (1, 2)}
        flying = {
            f"frames_per_s_{name}": count * variant.batch / seconds_in_flight(calls[:graphs], places, frames, count)
            for name, (graphs, places) in forms.items()
        }
        other = calls[1](frames)
    differ = {
        name: float(np.abs(value.astype(float) - other[name]).max())
        for name, value in arrays.items()
        if not np.array_equal(value, other[name])
    }
    del calls, module
    bench.forget(lambda _: True)
    return {
        "both_in_flight_agree": not differ,
        "both_in_flight_differ": differ,
        "latency_to_outputs": spread(to_outputs[1:]),
        "latency_to_detections": spread(to_detections[1:]),
        "latency_to_pasted_detections": spread(to_masks[1:]),
        "detections": [len(one) for one in found],
        "masks": [None if masks is None else list(masks.shape) for masks in pasted],
        **flying,
    }


def seconds_in_flight(calls: list[FixedCall], places: int, frames: Any, count: int) -> float:
    """What so many calls take, from page-locked frames to outputs, with `places` of each graph in flight."""
    with ExitStack() as stack:
        flights = cycle([stack.enter_context(call.in_flight(places)) for call in calls])
        running: deque[Callable[[], Any]] = deque()
        started = time.perf_counter()
        for _ in range(count):
            if len(running) == places * len(calls):
                running.popleft()()
            running.append(next(flights).submit(frames))
        while running:
            running.popleft()()
        return time.perf_counter() - started


def kernels(bench: Bench) -> dict[str, Any]:
    """Where the time of `fast` goes: kernels of a replay, operators of a direct call."""
    from torch.profiler import ProfilerActivity, profile

    results = bench.partial
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    for task in ("box", "mask"):
        if task not in bench.tasks or bench.left() < 0:
            continue
        graph = bench.graph(Variant(task, "fast"))
        replays = 2 if bench.smoke else 10
        for what, call in (("replay", graph.replay), ("operators", lambda g=graph: g.static(g.frames))):
            with torch.no_grad(), arithmetic("fp32", search=True):
                call()
                bench.synchronise()
                with profile(activities=activities) as profiler:
                    for _ in range(replays):
                        call()
                    bench.synchronise()
            results[f"{task} {what}"] = busiest(profiler.key_averages(), what == "operators", bench.on_gpu, replays)
    return results


def busiest(events: Any, operators: bool, on_gpu: bool, calls: int) -> list[dict[str, Any]]:
    """The 25 entries with the most own time; kernels, or the operators that launched them."""
    found = []
    for event in events:
        is_operator = "CPU" in str(event.device_type)
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own_us > 0 and (is_operator == operators or not on_gpu):
            found.append((own_us, event.key, event.count))
    total = sum(entry[0] for entry in found)
    return [
        {"name": name[:160], "us_a_call": own / calls, "share": own / total, "launches_a_call": count / calls}
        for own, name, count in sorted(found, reverse=True)[:25]
    ] + [{"name": "all", "us_a_call": total / calls, "share": 1.0, "launches_a_call": sum(e[2] for e in found) / calls}]
