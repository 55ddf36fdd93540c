"""The page of a deployment: the verdict first, then what it rests on, then how it was made."""

from pathlib import Path
from typing import Any

from norton_deploy.cost.turns import FEWEST_PAIRS
from norton_deploy.evaluation.coco_metrics import CategoryScore, primary_iou_type
from norton_deploy.files import atomic_write
from norton_deploy.reporting.charts import (
    draw_categories,
    draw_learning,
    draw_precision_recall,
    draw_stages,
    draw_training,
)
from norton_deploy.reporting.deployment import Deployment, ModelRecord
from norton_deploy.reporting.detector_table import DetectorRow, detector_table
from norton_deploy.reporting.plan_report import draw_pareto
from norton_deploy.reporting.plan_report import verdict as plan_verdict
from norton_deploy.reporting.provenance import provenance_table
from norton_deploy.reporting.report import (
    Block,
    Command,
    Figures,
    Gallery,
    Heading,
    Paragraph,
    Picture,
    Report,
    Table,
)
from norton_deploy.structures import Task

MEASURES: dict[Task, str] = {"box": "box AP", "mask": "mask AP", "keypoint": "keypoint AP"}
MOST_CATEGORIES = 20
NEXT_TO_NOTHING = 0.005
"""A model with less AP finds next to nothing: shares of that are chance."""
PAPER = """\
The last two rows are the paper's own (Pham, Zniyed, Nguyen: Table III, COCO-2017, images of 800 pixels, an RTX 3060) \
as they are printed there. They are another model, other data and another machine, and were not measured here."""
BEFORE_EXPORT = """\
The model before its export runs in torch, which knows where each picture ends; a graph takes the picture with its \
padding for one whole image. Their AP may differ by this although the graph is the same model (see Fidelity)."""
COMPARED = """\
An object counts as found where a detection of its category with a score of at least 0.5 overlaps its box by an IoU of \
at least 0.5; only such detections are drawn. {which}"""
DIFFERING = """\
Of all{images} images these are the ones with the largest losses, and at the end those with the smallest losses or the \
largest gains: they show where the models differ, not how they do on average."""
ALIKE = "In each of these images both models find equally many objects."
PARITY = """\
The exported graph's own tensors, stage by stage, against the model in eager mode, which is given the graph's input to \
that stage: {images} images, {detections} detections, {precision}."""


def write_report(folder: Path, deployment: Deployment) -> Path:
    """Write report.html, report.md and report.json into `folder`, and the charts into its `pictures`.

    Args:
        folder: that holds the compared pictures already.
        deployment: what to show.

    Returns:
        Path of report.html.
    """
    report = deployment_report(folder, deployment)
    contents = {"json": deployment.to_json(), "md": report.to_markdown(folder), "html": report.to_html()}
    for suffix, text in contents.items():
        with atomic_write(folder / f"report.{suffix}", "w") as stream:
            stream.write(text)
    return folder / "report.html"


def deployment_report(folder: Path, deployment: Deployment) -> Report:
    """The blocks of the page; the charts among them are drawn into `folder`/pictures."""
    pictures = folder / "pictures"
    models = (deployment.dense, *deployment.others, deployment.small)
    blocks: list[Block] = [
        Paragraph(verdict(deployment), "lead"),
        *([Figures(tiles)] if (tiles := first_figures(deployment)) else []),
        *(Paragraph(note, "note") for note in deployment.notes),
        Heading("Beside the paper"),
        models_table(deployment),
        *([Paragraph(BEFORE_EXPORT)] if deployment.parity and deployment.others else []),
        Paragraph(PAPER),
        *_accuracy(deployment, pictures),
        *_compared(deployment, folder),
        *_speed(models, pictures),
        *_plan(deployment.plan, pictures),
        *_parity(deployment.parity),
        *_training(deployment, pictures),
        Heading("How it was made"),
    ]
    for step in deployment.steps:
        time = "" if step.seconds is None else f" ({step.seconds:.0f}\u00a0s)"
        blocks.append(Command(step.title + time, step.command))
    if deployment.artefact:
        whole = ", with its whole folder: the README.md there says how to run it"
        more = whole if deployment.artefact.startswith("artefact/") else ""
        blocks.append(Paragraph(f"What to ship: {deployment.artefact}{more}."))
    return Report(deployment.title, [*blocks, provenance_table(deployment.provenance)])


def verdict(deployment: Deployment) -> str:
    """One sentence: speed-up with its interval, AP lost, size; what was not measured or not shown says so."""
    dense, small = deployment.dense, deployment.small
    parts = [_speed_verdict(deployment, dense, small), _accuracy_verdict(deployment)]
    if dense.file_bytes and small.file_bytes:
        parts.append(f"takes {_megabytes(small.file_bytes)} instead of {_megabytes(dense.file_bytes)}")
    sentence = f"{small.name} {', '.join(parts[:-1])} and {parts[-1]}."
    if deployment.parity is not None and not deployment.parity["passed"]:
        sentence += " Beware: its graph does not compute what the model computes (see Fidelity)."
    return sentence


def _speed_verdict(deployment: Deployment, dense: ModelRecord, small: ModelRecord) -> str:
    speedup = deployment.speedup
    if speedup is None:
        return "was not timed"
    where = small.runs_on if small.runs_on == dense.runs_on else f"{small.runs_on}; {dense.name}: {dense.runs_on}"
    few = ", too few to tell" if speedup.pairs < FEWEST_PAIRS else ""
    basis = f"95 % interval {speedup.low:.2f} to {speedup.high:.2f}, {speedup.pairs} paired calls{few}, {where}"
    if speedup.pairs >= FEWEST_PAIRS and speedup.low > 1:
        missed = f", not the {deployment.asked:g} times asked for" if misses(deployment) else ""
        return f"is {speedup.ratio:.2f} times as fast as {dense.name}{missed} ({basis})"
    if speedup.pairs >= FEWEST_PAIRS and speedup.high < 1:
        return f"is slower than {dense.name}, {speedup.ratio:.2f} times as fast ({basis})"
    return f"is not shown to be faster than {dense.name} ({speedup.ratio:.2f} times, {basis})"


def misses(deployment: Deployment) -> bool:
    """Whether the small model is shown to be slower than asked."""
    asked, speedup = deployment.asked, deployment.speedup
    return asked is not None and speedup is not None and speedup.high < asked


def _accuracy_verdict(deployment: Deployment) -> str:
    before, after = (model.table3(deployment.task)[0] for model in (deployment.dense, deployment.small))
    measure = MEASURES[deployment.task]
    if before is None or after is None:
        return f"has an unknown {measure} (not measured)"
    images = f"{deployment.images} images"
    if before < NEXT_TO_NOTHING:
        known = f"has a {measure} of {after:.3f} where {deployment.dense.name} has {before:.3f}"
        return f"{known}, which says nothing about losses ({images})"
    if round(before, 3) == round(after, 3):
        return f"keeps the {measure} of {before:.3f} unchanged ({images})"
    if after > before:
        return f"gains {_change(before, after):.3f} {measure} over {before:.3f} ({images})"
    lost = -_change(before, after)
    return f"loses {lost:.3f} of {before:.3f} {measure} ({100 * after / before:.1f} % kept, {images})"


def first_figures(deployment: Deployment) -> tuple[tuple[str, str, str], ...]:
    """The verdict's figures as tiles; what was not measured has none."""
    dense, small, speedup = deployment.dense, deployment.small, deployment.speedup
    tiles = []
    if speedup is not None:
        tiles.append((f"{speedup.ratio:.2f}×", "Speed-up", f"95 % interval {speedup.low:.2f} to {speedup.high:.2f}"))
    before, after = (model.table3(deployment.task)[0] for model in (dense, small))
    if before is not None and after is not None:
        note = f"{dense.name} {before:.3f}: {_signed(_change(before, after))}"
        tiles.append((f"{after:.3f}", _capital(MEASURES[deployment.task]), note))
    if dense.file_bytes and small.file_bytes:
        change = f"{100 * (small.file_bytes / dense.file_bytes - 1):+.0f} %".replace("-", "−").replace("−0 %", "+0 %")
        tiles.append((_megabytes(small.file_bytes), "File", f"{dense.name} {_megabytes(dense.file_bytes)}: {change}"))
    return tuple(tiles)


def models_table(deployment: Deployment) -> Table:
    """All models in Table III's form, and the paper's two rows."""
    data = f": {deployment.data}, {deployment.images} held-out images" if deployment.images else ""
    rows = [_row(model, deployment) for model in (deployment.dense, *deployment.others, deployment.small)]
    return detector_table(rows, f"The form of the paper's Table III{data}", paper=deployment.task)


def _row(model: ModelRecord, deployment: Deployment) -> DetectorRow:
    average_precision, average_recall = model.table3(deployment.task)
    return DetectorRow(
        model=model.name,
        runs_on=model.runs_on,
        macs=model.macs,
        params=model.params,
        dense_macs=deployment.dense.macs,
        dense_params=deployment.dense.params,
        fps=None if model.latency is None else model.latency.fps,
        latency_ms=None if model.latency is None else model.latency.p50_ms,
        ap=average_precision,
        ar=average_recall,
    )


def _accuracy(deployment: Deployment, pictures: Path) -> list[Block]:
    """Charts, every category and every measure of the two models."""
    dense, small = (model.score(deployment.task) for model in (deployment.dense, deployment.small))
    if dense is None or small is None:
        return []
    names, measure = (deployment.dense.name, deployment.small.name), _capital(MEASURES[deployment.task])
    after = {category.id: category for category in small.categories}
    pairs = [(category, after[category.id]) for category in dense.categories if category.id in after]
    scored = sorted((pair for pair in pairs if None not in (pair[0].ap, pair[1].ap)), key=_difference)
    charts = []
    if scored:
        chart, shown = pictures / "categories.svg", scored[:MOST_CATEGORIES]
        draw_categories(chart, shown, names)
        which = f"the {len(shown)} largest losses of {len(scored)}" if len(shown) < len(scored) else "all"
        charts.append(Picture(chart, f"{measure} of each category ({which}), largest loss first"))
    if all(score.precision.get("0.50") for score in (dense, small)):
        chart = pictures / "precision-recall.svg"
        overlap = "OKS" if deployment.task == "keypoint" else "IoU"
        draw_precision_recall(chart, dict(zip(names, (dense, small), strict=True)), overlap)
        charts.append(Picture(chart, "Precision and recall, mean of the categories"))
    rows = [
        (pair[0].name, str(pair[0].objects), *(f"{category.ap:.3f}" for category in pair), _signed(_difference(pair)))
        for pair in scored
    ]
    rows += [(pair[0].name, str(pair[0].objects), "-", "-", "-") for pair in pairs if pair not in scored]
    header = ("Category", "Objects", *names, "Difference")
    return [
        Heading("Accuracy"),
        *([Gallery(tuple(charts))] if charts else []),
        Table(header, tuple(rows), f"{measure} of each category, largest loss first"),
        _measures_table(deployment),
    ]


def _difference(pair: tuple[CategoryScore, CategoryScore]) -> float:
    return _change(pair[0].ap or 0.0, pair[1].ap or 0.0)


def _measures_table(deployment: Deployment) -> Table:
    """Every measure of both models."""
    dense, small = deployment.dense, deployment.small
    kinds = [kind for kind in dense.scores if kind in small.scores]
    found = [(dense.scores[kind].metrics, small.scores[kind].metrics) for kind in kinds]
    measures = dict.fromkeys(measure for before, _ in found for measure in before)
    rows = tuple(
        (measure, *(_score(metrics.get(measure)) for pair in found for metrics in pair)) for measure in measures
    )
    header = ("Measure", *(f"{kind}: {model.name}" for kind in kinds for model in (dense, small)))
    return Table(header, rows, f"COCO's measures (Table III's AP and AR: {primary_iou_type(deployment.task)})")


def _score(value: float | None) -> str:
    """pycocotools says -1 where there are no objects of a size."""
    return "-" if value is None or value < 0 else f"{value:.3f}"


def _compared(deployment: Deployment, folder: Path) -> list[Block]:
    if not deployment.compared:
        return []
    names = deployment.dense.name, deployment.small.name, "annotated"
    alike = all(image.dense_found == image.small_found for image in deployment.compared)
    which = ALIKE if alike else DIFFERING.format(images=f" {deployment.images}" if deployment.images else "")
    text = COMPARED.format(which=which)
    blocks: list[Block] = [Heading("Pictures"), Paragraph(text)]
    for image in deployment.compared:
        files = (image.dense, image.small, image.annotated)
        counts = (
            f"{image.dense_found} found",
            f"{image.small_found} found",
            f"{image.objects} object{'s' * (image.objects != 1)}",
        )
        pictures = (
            Picture(folder / file, f"{name}: {count}") for file, name, count in zip(files, names, counts, strict=True)
        )
        blocks.append(Gallery(tuple(pictures), image.name))
    return blocks


def _speed(models: tuple[ModelRecord, ...], pictures: Path) -> list[Block]:
    """Percentiles and stages of every model that was timed."""
    timed = {model.name: model.latency for model in models if model.latency is not None}
    if not timed:
        return []
    chart = pictures / "stages.svg"
    draw_stages(chart, {name: latency.stages_ms for name, latency in timed.items()})
    percentiles = tuple(
        (
            name,
            str(latency.samples),
            *(f"{time:.1f}" for time in (latency.p50_ms, latency.p90_ms, latency.p99_ms)),
            f"{100 * latency.spread:.0f} %",
            f"{latency.fps:.1f}",
            "-" if latency.throughput_fps is None else f"{latency.throughput_fps:.1f}",
            f"{latency.detections:.1f}",
        )
        for name, latency in timed.items()
    )
    stages = list(next(iter(timed.values())).stages_ms)
    means = tuple((name, *(f"{latency.stages_ms[stage]:.1f}" for stage in stages)) for name, latency in timed.items())
    header = (
        "Model",
        "Calls",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "IQR / p50",
        "FPS, one alone",
        "FPS, stream",
        "Detections",
    )
    return [
        Heading("Speed"),
        Picture(chart, "Where the time of one image goes, from file to detections"),
        Table(header, percentiles, "Latency of one image, all models in turn; and a stream, where images overlap"),
        Table(("Model", *(stage.removesuffix("_ms") for stage in stages)), means, "Stages, mean ms an image"),
    ]


def _plan(plan: dict[str, Any] | None, pictures: Path) -> list[Block]:
    if plan is None:
        return []
    chart = pictures / "plans.svg"
    draw_pareto(chart, plan)
    text = f"Made for {plan['budget']}: {plan_verdict(plan)}"
    picture = Picture(chart, "What speed costs: the plans that were considered, this one marked")
    return [Heading("The plan"), Paragraph(text), picture]


def _parity(parity: dict[str, Any] | None) -> list[Block]:
    if parity is None:
        return []
    rows = tuple(
        (
            stage["name"],
            stage["measure"],
            f"{stage['worst']:.0f}" if stage["measure"].startswith("pairs of") else f"{stage['worst']:.3g}",
            *_verdict(stage),
        )
        for stage in parity["stages"]
    )
    blocks: list[Block] = [
        Heading("Fidelity"),
        Paragraph(PARITY.format(**{key: parity[key] for key in ("images", "detections", "precision")})),
        Table(("Stage", "Measure", "Worst", "Allowed", "Within"), rows, "The export against its model"),
    ]
    if not parity["detections"]:
        blocks.insert(2, Paragraph("Nothing was detected in these images, so that little was compared.", "note"))
    return blocks


def _verdict(stage: dict[str, Any]) -> tuple[str, str]:
    """What is allowed of a stage, and whether it keeps to it."""
    if stage["limit"] is None:
        return "reported, not judged", "-"
    return f"{'≥' if stage['is_lower_bound'] else '≤'}\u00a0{stage['limit']:g}", "yes" if stage["passed"] else "NO"


def _training(deployment: Deployment, pictures: Path) -> list[Block]:
    losses = [record for record in deployment.training if record["section"] == "train"]
    measure = primary_iou_type(deployment.task)
    evaluated = [record for record in deployment.training if measure in record]
    charts = []
    if len(losses) > 1:
        draw_training(pictures / "loss.svg", losses)
        charts.append(Picture(pictures / "loss.svg", "Loss of the fine-tuning"))
    if len(evaluated) > 1:
        points = [(record["step"], record[measure]["AP"]) for record in evaluated]
        draw_learning(pictures / "learning.svg", points, deployment.dense.table3(deployment.task)[0])
        charts.append(
            Picture(pictures / "learning.svg", f"{_capital(MEASURES[deployment.task])} during the fine-tuning")
        )
    return [Heading("Fine-tuning"), Gallery(tuple(charts))] if charts else []


def _change(before: float, after: float) -> float:
    """The difference of two figures as they are shown, with three decimals."""
    return round(round(after, 3) - round(before, 3), 3)


def _signed(difference: float) -> str:
    return f"{difference:+.3f}".replace("-", "−") if difference else "±0.000"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
