"""The page of a deployment: the verdict first, then what it rests on, then how it was made."""

from pathlib import Path

from norton_deploy.files import atomic_write
from norton_deploy.reporting.deployment import Deployment, ModelRecord
from norton_deploy.reporting.provenance import provenance_table
from norton_deploy.reporting.report import Block, DetectorRow, Heading, Paragraph, Report, Table, detector_table


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
    """The blocks of the page."""
    blocks: list[Block] = [Paragraph(verdict(deployment)), *(Paragraph(note) for note in deployment.notes)]
    blocks.append(models_table(deployment))
    if deployment.steps:
        rows = tuple(
            (step.title, step.command, "-" if step.seconds is None else f"{step.seconds:.0f}")
            for step in deployment.steps
        )
        blocks += [Heading("Commands"), Table(("Step", "Command", "Seconds"), rows)]
    blocks += [Heading("Machine and versions"), provenance_table(deployment.provenance)]
    return Report(deployment.title, blocks)


def verdict(deployment: Deployment) -> str:
    """One sentence: speed-up with its interval, AP lost, size; what was not measured says so."""
    dense, small = deployment.dense, deployment.small
    parts = ["its speed was not measured"]
    if deployment.speedup is not None:
        parts = [deployment.speedup.verdict]
    before, after = dense.table3(deployment.task)[0], small.table3(deployment.task)[0]
    if before is None or after is None:
        parts.append("its AP was not measured")
    else:
        parts.append(f"AP {after:.3f} instead of {before:.3f} ({deployment.images} images)")
    if dense.file_bytes and small.file_bytes:
        parts.append(f"{small.file_bytes / 1e6:.1f} MB instead of {dense.file_bytes / 1e6:.1f} MB")
    return f"{small.name} against {dense.name}: {'; '.join(parts)}."


def models_table(deployment: Deployment) -> Table:
    """Table III's form for all models beside the paper's rows."""
    models = (deployment.dense, *deployment.others, deployment.small)
    return detector_table(
        [_row(model, deployment) for model in models], "The form of the paper's Table III", paper=deployment.task
    )


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
