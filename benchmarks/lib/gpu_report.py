"""The tables of benchmarks/gpu.py, from its result file alone; what was not measured is left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.lib.cells import ResultCells, interval, page, tabulate
from norton_deploy.reporting.detector_table import MODEL_NAMES
from norton_deploy.reporting.report import Table
from norton_deploy.structures import TASKS

Found = dict[str, Any]
BASELINE = "eager dense fp32"
VARIANTS = {
    BASELINE: BASELINE,
    "eager dense fp16 autocast": "eager dense fp16",
    "eager dense fp32, masks not pasted": "eager dense fp32, masks not pasted",
    **{
        f"{plan}{form} {precision}": f"{plan} {precision}"
        for precision in ("fp32 NCHW", "fp16 NHWC")
        for plan, form in (("dense", ""), ("table3", " grouped"), ("balanced", " grouped"), ("fast", " grouped"))
    },
}
"""Row of a result -> what it is called here; the other rows (forms, layouts, TF32) stand in the JSON file."""
KERNELS = 8
METHOD = f"""\
Frames of 800 x 800 pixels, 1000 proposals and 100 detections for every model, all variants of a task in turn, from an \
idle device to an idle device on the host's clock. Ratios are those of paired calls to `{BASELINE}`, with a 95 % \
interval. Weights are random: these are times, not accuracies. Eager models are torchvision's own and do all that they \
do, pasting each mask into the frame included; the others are static graphs, replayed as CUDA graphs, whose masks stay \
28 x 28. CPDBlocks run as grouped convolutions."""


def report(results: ResultCells) -> str:
    """What was measured, as Markdown; failures first."""
    found = {name: cell.get("result") or cell.get("partial") or {} for name, cell in results.cells.items()}
    failed = [f"- {name}: {cell['why'][:200]}" for name, cell in results.cells.items() if cell["status"] == "failed"]
    parts: list[Table | str] = ["\n".join(failed)] if failed else []
    card = found.get("environment", {})
    if "card" in card:
        parts.append(f"{card['card']}, {card['memory_gib']:.0f} GiB; torch {card['torch']}, cuDNN {card['cudnn']}.")
    parts.append(METHOD)
    rows = [(task, found[f"table3 {task}"]["rows"]) for task in TASKS if found.get(f"table3 {task}", {}).get("rows")]
    if rows:
        parts.append(latencies(dict(rows)))
    parts += [table for table in others(found) if table.rows]
    return page(*parts)


def latencies(rows: dict[str, Found]) -> Table:
    """Table III: median and ratio of each variant, a column a task."""

    def cell(task: str, name: str) -> str:
        row = rows[task].get(name)
        if row is None:
            return "-"
        ms = f"{row['median_ms']:.2f}"
        return ms if name == BASELINE else f"{ms}: {interval(row[f'speedup over {BASELINE}'])}"

    names = [name for name in VARIANTS if any(name in row for row in rows.values())]
    lines = [(VARIANTS[name], *(cell(task, name) for task in rows)) for name in names]
    header = ("ms a frame: ratio", *(MODEL_NAMES[task] for task in rows))  # type: ignore[index]
    return Table(header, tuple(lines), "Table III on the GPU")


def others(found: dict[str, Found]) -> Iterator[Table]:
    """Everything but Table III."""
    yield verdicts(dict(entries(found.get("correctness", {}), "stages")))
    flying = {
        "Detector, frames a call": lambda entry: entry[0],
        "ms to outputs": lambda entry: f"{entry[1]['latency_to_outputs']['median_ms']:.2f}",
        "ms to detections, masks pasted": lambda entry: f"{entry[1]['latency_to_pasted_detections']['median_ms']:.2f}",
        "frames/s, one call at a time": lambda entry: f"{entry[1]['frames_per_s_1_in_flight']:.0f}",
        "two at a time": lambda entry: f"{entry[1]['frames_per_s_2_in_flight']:.0f}",
        "both equal to the bit": lambda entry: "yes" if entry[1]["both_in_flight_agree"] else "no",
    }
    ends = list(entries(found.get("end to end", {}), "latency_to_outputs"))
    if all("frames_per_s_copy_stream" in end for _, end in ends):
        flying["two at a time, one graph and a stream for copies"] = lambda entry: (
            f"{entry[1]['frames_per_s_copy_stream']:.0f}"
        )
    if all("latency_to_detections" in end for _, end in ends):
        flying["ms to detections, masks in boxes"] = lambda entry: (
            f"{entry[1]['latency_to_detections']['median_ms']:.2f}"
        )
    yield tabulate("End to end in fp16: a frame in the host's memory to detections there", ends, flying)
    engines = {
        "Predictor": lambda entry: entry[0],
        "ms": milliseconds,
        "Ratio to eager": lambda entry: interval(entry[1]["speedup over eager"]),
        "frames/s streamed": lambda entry: f"{entry[1]['frames_per_s_streamed']:.0f}",
    }
    yield tabulate("`load_predictor` of a checkpoint", list(entries(found.get("engine", {}), "median_ms")), engines)
    packages = list(entries(found.get("package", {}).get("times", {}), "median_ms"))
    yield tabulate("AOTInductor", packages, {"Graph": lambda entry: entry[0], "ms": milliseconds})
    masks = [entry for entry in entries(found.get("operators", {}), "median_ms") if entry[0].startswith("masks")]
    yield tabulate("Masks of a frame", masks, {"Where": lambda entry: entry[0], "ms": milliseconds})
    yield suppression(dict(entries(found.get("operators", {}), "median_ms")))
    compiled = list(entries(found.get("compiled", {}).get("times", {}), "median_ms"))
    yield tabulate("`torch.compile`, fp16", compiled, {"Graph": compiled_name, "ms": milliseconds})
    training = {
        "Model": lambda entry: entry[0],
        "ms a step": lambda entry: f"{entry[1]['median_ms']:.0f}",
        "images/s": lambda entry: f"{entry[1]['images_per_s']:.1f}",
    }
    yield tabulate("Training steps", list(entries(found.get("training", {}), "images_per_s")), training)
    yield busiest(found.get("kernels", {}))


def verdicts(graphs: dict[str, Found]) -> Table:
    """A line a detector, a column a precision."""
    precisions = ("fp32", "tf32", "fp16")
    lines = []
    for name in dict.fromkeys(graph.rpartition(" ")[0] for graph in graphs):
        own = {precision: graphs.get(f"{name} {precision}") for precision in precisions}
        first = next(entry for entry in own.values() if entry)
        said = ("-" if entry is None else "passed" if entry["passed"] else "FAILED" for entry in own.values())
        lines.append((name, *(str(first[key]) for key in ("images", "detections")), str(len(first["stages"])), *said))
    header = ("Static detector", "Images", "Detections", "Comparisons", *precisions)
    return Table(header, tuple(lines), "The parity gate on this card, stage by stage against eager mode on a CPU")


def suppression(operators: dict[str, Found]) -> Table:
    """NMS alone, a column a stage of the detector."""
    stages = {stage: f"nms {stage}, " for stage in ("rpn", "box head")}
    names = dict.fromkeys(
        name.removeprefix(prefix) for name in operators for prefix in stages.values() if name.startswith(prefix)
    )

    def ms(name: str) -> str:
        return f"{operators[name]['median_ms']:.2f}" if name in operators else "-"

    lines = [(name, *(ms(prefix + name) for prefix in stages.values())) for name in names]
    return Table(("NMS alone, ms", *stages), tuple(lines))


def busiest(kernels: Found) -> Table:
    """The operators of `fast` in fp16 that take longest, of the first task that was profiled."""
    by_task = {
        task: {entry["name"]: entry for entry in kernels.get(f"{task} operators", [])} for task in ("box", "mask")
    }
    by_task = {task: listed for task, listed in by_task.items() if listed}
    names = next(iter(by_task.values()), {})

    def cell(entry: Found | None) -> str:
        us = entry and f"{entry['us_a_call']:.0f} ({100 * entry['share']:.1f} %), {entry['launches_a_call']:.0f}"
        return us or "-"

    shown = [name for name in names if name != "all"][:KERNELS] + ["all"][: len(names)]
    lines = [(name.removeprefix("aten::"), *(cell(listed.get(name)) for listed in by_task.values())) for name in shown]
    caption = "Operators of `fast` in fp16: microseconds a frame (share), kernels launched"
    return Table(("Operator", *by_task), tuple(lines), caption)


def entries(found: Found, key: str) -> Iterable[tuple[str, Found]]:
    """Those that were measured: they have this key."""
    return ((name, entry) for name, entry in found.items() if isinstance(entry, dict) and key in entry)


def milliseconds(entry: tuple[str, Found]) -> str:
    """The median."""
    return f"{entry[1]['median_ms']:.2f}"


def compiled_name(entry: tuple[str, Found]) -> str:
    """A compiled graph's name ends with its mode: "box fast default"."""
    task, plan, *mode = entry[0].split()
    return f"{task} {plan}" + (f", compiled ({mode[0]})" if mode else "")
