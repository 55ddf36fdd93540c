"""The tables of benchmarks/table3_accuracy.py: what compressed detectors keep of the dense one's accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

from norton_deploy.evaluation.coco_metrics import primary_iou_type, table3_scores
from norton_deploy.reporting.html import Heading, Paragraph, Report
from norton_deploy.reporting.tables import MODEL_NAMES, PAPER_ROWS, Table, reduction_percent
from norton_deploy.structures import Task

DENSE, TRAINED = "dense", "dense before"
DISTILLED = ", distilled"
METHOD = """\
Embedded data, drawn by a program; not COCO: outline, inner drawing and, nine times in ten, a favourite hue carry the \
class. One ResNet-50 per seed is pretrained on object crops and starts every detector of that seed. The dense detector \
of a task is trained ("dense before"); compressed detectors are compressed from it, recovered without labels (refit: \
least squares on 64 training images; re-estimation: BatchNorm on 256; the paper does neither) and fine-tuned, and the \
dense one is trained on for as many steps with the same recipe ("dense"), so every row but the first has seen equally \
many images. With distillation, "dense" is the teacher. Retention is a row's AP over that of "dense", seed by seed. \
Plans are brought to the detectors' widths: equal shares of filters. FPS: ONNX Runtime, one image at a time, all \
models of a task in turn on the same images; a distilled detector is the same graph as its twin. Speed-up: median of \
the paired ratios with its 95 % interval. MACs without detections, as in Table III."""


def cell_name(task: str, seed: int, model: str) -> str:
    """Key of one trained detector in the results."""
    return f"{task}, seed {seed}, {model}"


def accuracy_report(results: Mapping[str, Any]) -> Report:
    """All tables of a results file, as far as it is filled."""
    report = Report("Table III's accuracy on the embedded data")
    report.blocks.append(Paragraph(METHOD))
    settings = results["settings"]
    steps = ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in settings if name.endswith("steps"))
    drawn, recovery = settings["train_images"], settings["recovery"]
    report.blocks.append(Paragraph(f"{drawn} training images; {steps}; batch 4 (crops: 32); recovery: {recovery}."))
    for task in MODEL_NAMES:
        models = _models(results["cells"], task)
        if models:
            report.blocks += [Heading(MODEL_NAMES[task]), accuracy_table(results, task, models)]
    return report


def accuracy_table(results: Mapping[str, Any], task: Task, models: Sequence[str]) -> Table:
    """One row per model: means over the seeds, the seeds' own values in brackets; then the paper's two rows."""
    header = ("Model", "AP", "AP50", "AR", "Retention", "MACs (CR)", "Params (CR)", "FPS", "Speed-up")
    latency = results["latency"].get(task, {})
    rows = [_row(results["cells"], latency, task, model) for model in models]
    dense, norton = PAPER_ROWS[task]
    for line, kept in ((dense, "1.00"), (norton, f"{float(norton[2]) / float(dense[2]):.2f}")):
        rows.append((f"{line[0]} ({line[1]})", line[2], "-", line[3], kept, line[4], line[5], line[6], "-"))
    images = {cell["images"] for name, cell in results["cells"].items() if name.startswith(f"{task}, ")}
    kind = primary_iou_type(task)
    return Table(header, tuple(rows), f"AP and AR of {kind} on {', '.join(map(str, sorted(images)))} held-out images")


def _models(cells: Mapping[str, Any], task: str) -> list[str]:
    """Names of the task's models, in the order of their cells."""
    parts = [name.split(", ", 2) for name in cells]
    return list(dict.fromkeys(model for found, _, model in parts if found == task))


def _of_seeds(cells: Mapping[str, Any], task: str, model: str) -> dict[str, Mapping[str, Any]]:
    """Seed -> cell of one model."""
    parts = {name: name.split(", ", 2) for name in cells}
    return {seed: cells[name] for name, (found, seed, kind) in parts.items() if (found, kind) == (task, model)}


def _row(cells: Mapping[str, Any], latency: Mapping[str, Any], task: Task, model: str) -> tuple[str, ...]:
    own, dense = _of_seeds(cells, task, model), _of_seeds(cells, task, DENSE)
    scores = {seed: table3_scores(task, cell["metrics"]) for seed, cell in own.items()}
    baseline = {seed: table3_scores(task, cell["metrics"])[0] for seed, cell in dense.items()}
    kept = [scores[seed][0] / baseline[seed] for seed in scores if baseline.get(seed, 0) > 0]
    first = next(iter(own.values()))
    large = next(iter(dense.values()), first)
    speed = latency.get("models", {}).get(model.removesuffix(DISTILLED))
    speedup = None if speed is None else speed.get("speedup")
    return (
        model,
        _mean([ap for ap, _ in scores.values()]),
        _mean([cell["metrics"][primary_iou_type(task)]["AP50"] for cell in own.values()]),
        _mean([ar for _, ar in scores.values()]),
        _mean(kept, digits=2) if kept else "-",
        f"{first['macs'] / 1e9:.2f}G ({reduction_percent(first['macs'], large['macs'])})",
        f"{first['params'] / 1e6:.2f}M ({reduction_percent(first['params'], large['params'])})",
        "-" if speed is None else f"{speed['latency']['fps']:.1f}",
        "-" if speedup is None else f"{speedup['ratio']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})",
    )


def _mean(values: Sequence[float], digits: int = 3) -> str:
    own = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{own}"
