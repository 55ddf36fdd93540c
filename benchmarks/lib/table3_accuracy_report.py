"""The tables of benchmarks/table3_accuracy.py: what compressed detectors keep of the dense one's accuracy."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lib.cells import ResultCells
from benchmarks.lib.training_runs import PRECISION_NAMES
from norton_deploy.evaluation.coco_metrics import primary_iou_type, table3_scores
from norton_deploy.reporting.detector_table import MODEL_NAMES, PAPER_ROWS, reduction_percent
from norton_deploy.reporting.report import Heading, Paragraph, Report, Table
from norton_deploy.structures import Task

Cell = Mapping[str, Any]
Way = tuple[str, int, float | None, str]
DENSE, TRAINED = "dense", "dense before"
LATENCY = "latency, "
"""Cells of this name and a task hold times, all others a trained detector."""
METHOD = """\
Embedded data, drawn by a program; not COCO: outline, inner drawing and, nine times in ten, a favourite hue carry the \
class. One ResNet-50 per seed is pretrained on object crops and starts every detector of that seed. The dense detector \
of a task is trained ("dense before"); compressed detectors are compressed from it, recovered without labels (refit: \
least squares on 64 training images; re-estimation: BatchNorm on 256; the paper does neither; rows with fine-tuning \
"none" stop there) and fine-tuned, and the dense one is trained on for as many steps with the same recipe ("dense"), \
so it has seen as many images as the others with its number of steps. With distillation the better of the two is the \
teacher (the column is the weight of the pyramid's imitation, "heads" that of the heads' answers). Retention is a \
row's AP over that of the best dense detector, before or with as many steps, seed by seed. With more than one seed a \
figure is the mean, the seeds' own in brackets. \
Plans are brought to the detectors' widths: equal shares of filters; after "-harm" the filters that survive are \
chosen by what the next layers lose on the refit's images, not by the plan. FPS: ONNX Runtime, one image at a time, \
all models of a task in turn on the same images; a distilled detector is the same graph as its twin. Speed-up: median \
of the paired ratios with its 95 % interval. MACs without detections, as in Table III."""


def accuracy_report(results: ResultCells) -> Report:
    """All tables of a results file, as far as it is filled."""
    settings = results.settings
    trained = [cell for name, cell in results.cells.items() if not name.startswith(LATENCY)]
    report = Report("Table III's accuracy on the embedded data")
    report.blocks += [
        Paragraph(METHOD),
        Paragraph(
            f"{settings['train_images']} training images; {settings['pretrain_steps']} steps of 32 crops; "
            f"{_scale(settings)}recovery: {settings['recovery']}; "
            f"precision of the training: {_precisions(trained)}."
        ),
    ]
    for task, name in MODEL_NAMES.items():
        if own := [cell for cell in trained if cell["task"] == task]:
            latency = results.cells.get(f"{LATENCY}{task}", {}).get("models", {})
            report.blocks += [Heading(name), accuracy_table(own, latency, task)]
    return report


def _scale(settings: Mapping[str, Any]) -> str:
    side = settings.get("full_width")
    width = f"torchvision's widths, {side} px; " if side else ""
    sampled = settings.get("sampled_rois")
    rois = f", {sampled} sampled proposals an image" if sampled else ""
    return f"{width}training and fine-tuning in steps of {settings.get('batch_size', 4)} images{rois}; "


def _precisions(cells: Sequence[Cell]) -> str:
    """The precision of most cells, then the tasks and seeds that had another."""
    usual = Counter(cell["precision"] for cell in cells).most_common(1)[0][0]
    others = {(MODEL_NAMES[cell["task"]], cell["seed"], cell["precision"]) for cell in cells} - {
        (MODEL_NAMES[cell["task"]], cell["seed"], usual) for cell in cells
    }
    exceptions = [f"{model} with seed {seed} {PRECISION_NAMES[precision]}" for model, seed, precision in sorted(others)]
    return "; ".join([PRECISION_NAMES[usual], *exceptions])


def accuracy_table(cells: Sequence[Cell], latency: Mapping[str, Any], task: Task) -> Table:
    """One row per way of training a task's detectors: means over the seeds, the seeds' own values in brackets; then
    the paper's rows."""
    training = ("Model", "Fine-tuning", "Peak lr", "Distillation")
    boxes = () if task == "box" else ("Box AP / AP50",)
    figures = ("AP", "AP50", "AR", *boxes, "Retention", "MACs (CR)", "Params (CR)", "FPS", "Speed-up")
    ways = sorted({_way(cell) for cell in cells}, key=lambda way: _place(way, cells))
    rows = [_row([cell for cell in cells if _way(cell) == way], cells, latency, task) for way in ways]
    dense, norton = PAPER_ROWS[task]
    for line, kept in ((dense, "1.00"), (norton, f"{float(norton[2]) / float(dense[2]):.2f}")):
        ap, ar, counts = line[2], line[3], line[4:7]
        rows.append((f"{line[0]} ({line[1]})", "-", "-", "-", ap, "-", ar, *["-"] * len(boxes), kept, *counts, "-"))
    images = ", ".join(map(str, sorted({cell["images"] for cell in cells})))
    caption = f"AP and AR of {primary_iou_type(task)} on {images} held-out images"
    return Table((*training, *figures), tuple(rows), caption)


def best_dense(cells: Sequence[Cell], seed: int, steps: int) -> Cell:
    """Of a task's cells the seed's dense detector of highest AP: before any fine-tuning, or after so many steps."""
    forms = ((TRAINED, 0), (DENSE, steps))
    dense = [cell for cell in cells if cell["seed"] == seed and (cell["model"], cell["finetune_steps"]) in forms]
    return max(dense, key=lambda cell: table3_scores(cell["task"], cell["metrics"])[0])


def _way(cell: Cell) -> Way:
    """How a detector came about, whatever its seed: model, fine-tuning steps and rate, distillation."""
    return cell["model"], cell["finetune_steps"], cell["finetune_lr"], _taught(cell)


def _taught(cell: Cell) -> str:
    """What was imitated: the pyramid by its weight, the heads by name, whose if not the control's; "-" for nothing."""
    if cell["distillation_weight"] is None:
        return "-"
    weight = f"{cell['distillation_weight']:g}"
    part = {"pyramid": weight, "heads": "heads", "both": f"{weight} and heads"}[cell.get("distill") or "pyramid"]
    return f"{part}, by {TRAINED}" if cell.get("teacher") == TRAINED else part


def _place(way: Way, cells: Sequence[Cell]) -> tuple[int, float, float, str, float, bool, str]:
    """Order of the rows: by steps of fine-tuning, larger models first, then by name, by learning rate, without
    distillation first."""
    model, steps, lr, taught = way
    first = next(cell for cell in cells if cell["model"] == model)
    return steps, -first["macs"], -first["params"], model, lr or 0.0, taught != "-", taught


def _row(own: Sequence[Cell], cells: Sequence[Cell], latency: Mapping[str, Any], task: Task) -> tuple[str, ...]:
    model, steps, lr, taught = _way(own[0])
    scores = {cell["seed"]: table3_scores(task, cell["metrics"]) for cell in own}
    control = (DENSE, steps) if steps or model == TRAINED else (TRAINED, 0)
    controls = {cell["seed"] for cell in cells if (cell["model"], cell["finetune_steps"]) == control}
    best = {seed: table3_scores(task, best_dense(cells, seed, steps)["metrics"])[0] for seed in controls}
    kept = [ap / best[seed] for seed, (ap, _) in scores.items() if best.get(seed, 0.0) > 0]
    boxes = [_mean([cell["metrics"]["bbox"][measure] for cell in own]) for measure in ("AP", "AP50")]
    large = max(cells, key=lambda cell: cell["macs"])
    speed = latency.get(model)
    speedup = None if speed is None else speed.get("speedup")
    return (
        model,
        f"{steps} steps" if steps else f"- (trained for {own[0]['steps']})" if model == TRAINED else "none",
        "-" if lr is None else f"{lr:g}",
        taught,
        _mean([ap for ap, _ in scores.values()]),
        _mean([cell["metrics"][primary_iou_type(task)]["AP50"] for cell in own]),
        _mean([ar for _, ar in scores.values()]),
        *(() if task == "box" else (" / ".join(boxes),)),
        _mean(kept, digits=2) if kept else "-",
        f"{own[0]['macs'] / 1e9:.2f}G ({reduction_percent(own[0]['macs'], large['macs'])})",
        f"{own[0]['params'] / 1e6:.2f}M ({reduction_percent(own[0]['params'], large['params'])})",
        "-" if speed is None else f"{speed['latency']['fps']:.1f}",
        "-" if speedup is None else f"{speedup['ratio']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})",
    )


def _mean(values: Sequence[float], digits: int = 3) -> str:
    own = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{own}"
