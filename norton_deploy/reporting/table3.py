"""The report of `benchmarks/table3.py`: Table III with this machine's figures beside the paper's."""

from __future__ import annotations

from typing import Any

from benchmarks.lib.stage_split import STAGES
from norton_deploy.reporting.page import Heading, Paragraph, Report
from norton_deploy.reporting.tables import MODEL_NAMES, DetectorRow, Table, detector_table

DENSE_EAGER, DENSE_ORT = "dense, torch eager", "dense, ONNX Runtime"
NORTON_EAGER, NORTON_ORT = "NORTON, torch eager", "NORTON, ONNX Runtime"
AUTHORS_EAGER, AUTHORS_ORT = "NORTON, authors' block, torch eager", "NORTON, authors' block, ONNX Runtime"


def table3_report(results: dict[str, Any]) -> Report:
    """All measured tasks of a results file; see `benchmarks/table3.py` for its form."""
    settings = results["settings"]
    report = Report("Table III: dense and NORTON detectors, measured")
    report.blocks.append(
        Paragraph(
            f"Images of {settings['image_size']} pixels, {settings['rounds']} rounds in which all models take "
            f"turns, {settings['proposals']} proposals and {settings['detections']} detections per image for "
            "every model. Δ is the median end-to-end time of one image, decoding included; FPS = 1000 / Δ. "
            "MACs are counted without mask or keypoint head, as the paper's are. "
            "With random weights every (proposal, class) pair passes the score threshold of 0, so that eager mode "
            "runs NMS over some 90,000 boxes, which a trained detector does not; the stage tables show that time "
            "as postprocess, and the graphs' decoding keeps the best candidates only. "
            "The paper's rows were measured by its authors on an RTX 3060, not here."
        )
    )
    if settings["small"] == "True":
        report.blocks.append(Paragraph("Narrow heads (--small): a trial of the benchmark, not Table III's models."))
    for task, measured in results["tasks"].items():
        report.blocks.append(Heading(f"{MODEL_NAMES[task]} ({task})"))
        report.blocks.append(Paragraph(f"Weights: {measured['weights']}. Images: {measured['images']}."))
        complexity = measured["complexity"]
        dense = complexity["dense"]
        rows = []
        for name, latency in measured["latency"].items():
            own = dense if name in (DENSE_EAGER, DENSE_ORT) else complexity["norton"]
            rows.append(
                DetectorRow(
                    model=name,
                    runs_on=measured["device"][name],
                    macs=own["macs"],
                    params=own["params"],
                    dense_macs=dense["macs"],
                    dense_params=dense["params"],
                    fps=latency["fps"],
                    latency_ms=latency["p50_ms"],
                )
            )
        report.blocks.append(detector_table(rows, "Table III's form", paper=task))
        report.blocks += [latency_table(measured), stage_table(measured), verdict_table(measured)]
        report.blocks.append(provenance_table(measured["provenance"]))
    return report


def latency_table(measured: dict[str, Any]) -> Table:
    """Percentiles, spread and the number of detections of each model."""
    rows = tuple(
        (
            name,
            str(latency["samples"]),
            *(f"{latency[field]:.1f}" for field in ("p50_ms", "p90_ms", "p99_ms")),
            f"{100 * latency['spread']:.0f} %",
            f"{latency['fps']:.2f}",
            f"{latency['detections']:.1f}",
        )
        for name, latency in measured["latency"].items()
    )
    header = ("Model", "Calls", "p50 ms", "p90 ms", "p99 ms", "IQR / p50", "FPS", "Detections")
    return Table(header, rows, "Latency of one image, all models in turn")


def stage_table(measured: dict[str, Any]) -> Table:
    """Mean time of each stage of each model."""
    rows = tuple(
        (
            name,
            split["method"],
            *(f"{split['stages_ms'][stage]:.1f}" for stage in STAGES),
            "-" if split["proposals"] is None else f"{split['proposals']:.0f}",
        )
        for name, split in measured["stages"].items()
    )
    caption = "Stages in ms (runs of their own, which looking inside makes somewhat slower)"
    return Table(("Model", "Measured by", *STAGES, "Proposals"), rows, caption)


def verdict_table(measured: dict[str, Any]) -> Table:
    """Paired comparisons and what the saved MACs alone would allow."""
    ceilings = measured["macs_ceiling"]
    rows = tuple(
        (
            f"{row['baseline']} -> {row['candidate']}",
            row["verdict"],
            f"{ceilings[row['baseline']]:.2f}x" if row["baseline"] in ceilings else "-",
        )
        for row in measured["speedup"]
    )
    header = ("Comparison", "Verdict", "If time followed MACs (Amdahl)")
    return Table(header, rows, "Median of the paired ratios, bootstrap interval")


def provenance_table(values: dict[str, Any]) -> Table:
    """What `provenance()` recorded, one entry a row."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{key} {name}".strip(), str(entry)) for name, entry in entries]
    return Table(("What", "Value"), tuple(rows), "Machine and versions")
