"""The report of `benchmarks/table3.py`: Table III with this machine's figures beside the paper's."""

from __future__ import annotations

from typing import Any

from benchmarks.lib.cells import ResultCells, tabulate
from benchmarks.lib.stages import STAGES
from norton_deploy.reporting.detector_table import MODEL_NAMES, DetectorRow, detector_table
from norton_deploy.reporting.provenance import provenance_table
from norton_deploy.reporting.report import Heading, Paragraph, Report, Table

DENSE_EAGER, DENSE_ORT = "dense, torch eager", "dense, ONNX Runtime"
NORTON_EAGER, NORTON_ORT = "NORTON, torch eager", "NORTON, ONNX Runtime"
AUTHORS_EAGER, AUTHORS_ORT = "NORTON, authors' block, torch eager", "NORTON, authors' block, ONNX Runtime"
METHOD = """\
Images of {image_size} pixels, {rounds} rounds in which all models take turns, {proposals} proposals and {detections} \
detections per image for every model. Δ is the median end-to-end time of one image, decoding included; FPS = 1000 / Δ. \
MACs are counted without mask or keypoint head, as the paper's are. With random weights every (proposal, class) pair \
passes the score threshold of 0, so that eager mode runs NMS over some 90,000 boxes, which a trained detector does \
not; the stage tables show that time as postprocess, and the graphs' decoding keeps the best candidates only. The \
paper's rows were measured by its authors on an RTX 3060, not here."""


def report(results: ResultCells) -> Report:
    """All measured tasks."""
    settings = results.settings
    made = Report("Table III: dense and NORTON detectors, measured")
    made.blocks.append(Paragraph(METHOD.format(**{**settings, "image_size": tuple(settings["image_size"])})))
    if settings["small"]:
        made.blocks.append(Paragraph("Narrow heads (--small): a trial of the benchmark, not Table III's models."))
    for task, cell in results.cells.items():
        made.blocks += [
            Heading(f"{MODEL_NAMES[task]} ({task})"),  # type: ignore[index]
            Paragraph(f"Weights: {cell['weights']}. Images: {cell['images']}."),
            detector_table(detector_rows(cell), "Table III's form", paper=task),  # type: ignore[arg-type]
            latency_table(cell),
            stage_table(cell),
            verdict_table(cell),
            provenance_table(cell["provenance"]),
        ]
    return made


def detector_rows(cell: dict[str, Any]) -> list[DetectorRow]:
    """The measured lines in Table III's form."""
    complexity = cell["complexity"]
    dense = complexity["dense"]
    rows = []
    for name, latency in cell["latency"].items():
        own = dense if name in (DENSE_EAGER, DENSE_ORT) else complexity["norton"]
        rows.append(
            DetectorRow(
                model=name,
                runs_on=cell["device"][name],
                macs=own["macs"],
                params=own["params"],
                dense_macs=dense["macs"],
                dense_params=dense["params"],
                fps=latency["fps"],
                latency_ms=latency["p50_ms"],
            )
        )
    return rows


def latency_table(cell: dict[str, Any]) -> Table:
    """Percentiles, spread and the number of detections of each model."""
    return tabulate(
        "Latency of one image, all models in turn",
        cell["latency"].items(),
        {
            "Model": lambda row: row[0],
            "Calls": lambda row: str(row[1]["samples"]),
            "p50 ms": lambda row: f"{row[1]['p50_ms']:.1f}",
            "p90 ms": lambda row: f"{row[1]['p90_ms']:.1f}",
            "p99 ms": lambda row: f"{row[1]['p99_ms']:.1f}",
            "IQR / p50": lambda row: f"{100 * row[1]['spread']:.0f} %",
            "FPS": lambda row: f"{row[1]['fps']:.2f}",
            **(
                {"FPS, stream": lambda row: f"{row[1]['throughput_fps']:.2f}"}
                if all("throughput_fps" in latency for latency in cell["latency"].values())
                else {}
            ),
            "Detections": lambda row: f"{row[1]['detections']:.1f}",
        },
    )


def stage_table(cell: dict[str, Any]) -> Table:
    """Mean time of each stage of each model."""
    rows = tuple(
        (
            name,
            split["method"],
            *(f"{split['stages_ms'][stage]:.1f}" for stage in STAGES),
            "-" if split["proposals"] is None else f"{split['proposals']:.0f}",
        )
        for name, split in cell["stages"].items()
    )
    caption = "Stages in ms (runs of their own, which looking inside makes somewhat slower)"
    return Table(("Model", "Measured by", *STAGES, "Proposals"), rows, caption)


def verdict_table(cell: dict[str, Any]) -> Table:
    """Paired comparisons and what the saved MACs alone would allow."""
    ceilings = cell["macs_ceiling"]
    return tabulate(
        "Median of the paired ratios, bootstrap interval",
        cell["speedup"],
        {
            "Comparison": lambda row: f"{row['baseline']} -> {row['candidate']}",
            "Verdict": lambda row: row["verdict"],
            "If time followed MACs (Amdahl)": lambda row: (
                f"{ceilings[row['baseline']]:.2f}x" if row["baseline"] in ceilings else "-"
            ),
        },
    )
