"""The report of a plan search: figures, layers, one line on how good the prediction was, and the picture: what speed
costs, with uniform plans beside the planned one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator

from norton_deploy.files import atomic_write
from norton_deploy.reporting.charts import DENSE, LOST, STAGE_COLOURS, chart, legend_above
from norton_deploy.reporting.provenance import provenance_table
from norton_deploy.reporting.report import Heading, Paragraph, Picture, Report, Table

AXES = {"macs": "reduction of MACs", "params": "reduction of parameters"}
COLOURS = STAGE_COLOURS
RATIOS = (1, 2, 3, 5, 10, 20, 30, 50, 100)
"""What the axis of costs is marked at."""


def write_plan_report(path: Path, record: dict[str, Any], picture: Path) -> None:
    """Write the report as Markdown, and the picture (PNG) that it shows; see `plan_report`."""
    draw_pareto(picture, record)
    with atomic_write(path, "w") as stream:
        stream.write(plan_report(record, picture).to_markdown(path.parent))


def plan_report(record: dict[str, Any], picture: Path | None) -> Report:
    """Tables and verdicts of one search.

    Args:
        record: of `FoundPlan.to_dict`, with "plan", "model", "command" and "provenance".
        picture: of `draw_pareto`.
    """
    height, width = record["image_size"]
    sensitivity = record["sensitivity"]
    predicted = "the predicted harm is their sum"
    if sensitivity["by_layer"]:
        predicted = (
            "the predicted harm is the sum of the roots of their relative squared errors at the layers' own outputs, "
            "on the images of the fit: it orders plans and is no prediction of the measured harm, since a classifier's "
            "later layers absorb much of a single error"
        )
    report = Report(f"Plan for {record['budget']}")
    report.blocks += [Paragraph(verdict(record)), figures_table(record)]
    report.blocks.append(
        Paragraph(
            f"One image of {height} x {width} pixels, {record['proposals']} proposals, {record['detections']} "
            f"detections. Harm is the squared error of the heads' outputs relative to the dense model's, after the "
            f"refit, on {sensitivity['images']} images with a short side of {sensitivity['short_side']} pixels; "
            f"{sensitivity['choices']} single choices, each fitted in closed form to {sensitivity['fit_images']} other "
            f"images, were measured, and {predicted}. The kept filters are chosen by {record['choose']}."
        )
    )
    if picture is not None:
        report.blocks.append(Picture(picture, f"{record['budget']}: harm against cost"))
    if len(record["marks"]) > 1:
        report.blocks += [Heading("Beside uniform plans"), marks_table(record["marks"])]
    report.blocks += [Heading("Layers"), layers_table(record["layers"])]
    dense = tuple((name, reason) for name, reason in record["stays_dense"].items())
    if dense:
        report.blocks += [Heading("What stays dense"), Table(("Layer", "Why"), dense)]
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in record["seconds"].items())
    report.blocks += [
        Heading("Machine and versions"),
        Paragraph(f"Command: `{record['command']}`. Time of the search: {parts}."),
        provenance_table(record["provenance"]),
    ]
    return report


def verdict(record: dict[str, Any]) -> str:
    """One line: what the plan costs, counted, or how far its predicted time was off."""
    if "measured_ms" not in record:
        kind = "parameters" if record["budget"].startswith("params") else "MACs"
        share = (
            record["params"] / record["dense_params"] if kind == "parameters" else record["macs"] / record["dense_macs"]
        )
        return f"the plan has {100 * share:.1f} % of the dense model's {kind}, counted."
    error = f"prediction off by {100 * abs(record['prediction_error']):.1f} %"
    low, high = record["measured_speedup_p10_p90"]
    return (
        f"{error}: predicted {record['predicted_ms']:.1f} ms ({record['predicted_speedup']:.2f} times dense), measured "
        f"{record['measured_ms']:.1f} ms ({record['measured_speedup']:.2f} times, 10th to 90th percentile {low:.2f} to "
        f"{high:.2f}, {record['rounds']} paired calls)."
    )


def figures_table(record: dict[str, Any]) -> Table:
    """Dense and planned, predicted and measured."""
    rows = [
        ("MACs", f"{record['dense_macs'] / 1e9:.2f} G", "", f"{record['macs'] / 1e9:.2f} G"),
        ("Parameters", f"{record['dense_params'] / 1e6:.2f} M", "", f"{record['params'] / 1e6:.2f} M"),
    ]
    if "measured_ms" in record:
        fast, slow = record["measured_ms_p10_p90"]
        rows += [
            (
                "End to end, ms",
                f"{record['dense_measured_ms']:.1f}",
                f"{record['predicted_ms']:.1f}",
                f"{record['measured_ms']:.1f} ({fast:.1f} to {slow:.1f})",
            ),
            ("Speed-up", "1", f"{record['predicted_speedup']:.2f}", f"{record['measured_speedup']:.2f}"),
        ]
    measured = record["measured_harm"]
    rows.append(("Harm", "0", f"{record['predicted_harm']:.3g}", "-" if measured is None else f"{measured:.3g}"))
    return Table(("", "Dense", "Plan, predicted", "Plan, counted or measured"), tuple(rows))


def marks_table(marks: Sequence[dict[str, Any]]) -> Table:
    """Uniform plans and the planner's plan at the same predicted cost; harm is measured."""
    rows = []
    for mark in marks[1:]:
        planned = mark["planned_at_equal_cost"]
        found = ("-", "-", "no plan considered is that cheap")
        if planned is not None:
            better = planned["measured_harm"] < mark["measured_harm"]
            found = (
                f"{planned['ratio']:.2f}",
                f"{planned['measured_harm']:.3g}",
                "the planner's harm is lower" if better else "the uniform plan's harm is lower",
            )
        rows.append((mark["label"], f"{mark['ratio']:.2f}", f"{mark['measured_harm']:.3g}", *found))
    header = ("Uniform plan", "Dense cost / its", "Harm", "Planner, dense cost / its", "Harm", "Verdict")
    return Table(header, tuple(rows))


def layers_table(layers: Sequence[dict[str, Any]]) -> Table:
    """Decomposition, width and measured form of every convolution above 1 x 1."""
    rows = tuple(
        (
            layer["name"],
            layer["decomposition"],
            f"{layer['keep']} of {layer['width']}",
            layer["form"] or "-",
            *(("-" if layer[key] is None else f"{layer[key]:.2f}") for key in ("original_ms", "form_ms")),
        )
        for layer in layers
    )
    return Table(("Layer", "Decomposition", "Filters", "Runs as", "Dense model's, ms", "Now, ms"), rows)


def draw_pareto(path: Path, record: dict[str, Any]) -> None:
    """Draw predicted harm along the front, and the measured harm of single plans, on a logarithmic axis.

    A uniform plan is joined by a dotted line to the planner's plan at the same cost, drawn hollow.

    Args:
        path: the .svg or .png file.
        record: of `FoundPlan.to_dict`.
    """
    front = [point for point in record["frontier"] if point["predicted_harm"] > 0]
    if record["sensitivity"]["by_layer"] and record["measured_harm"] is not None:
        front = []  # of another kind than what is measured
    chosen, *uniform = record["marks"]
    with chart(path, 4.2) as axes:
        axes.plot(
            [point["ratio"] for point in front], [point["predicted_harm"] for point in front],
            "-o", color=DENSE, markersize=3, label="planner's choices, predicted",
        )  # fmt: skip
        harm, how = chosen["measured_harm"], "measured"
        if harm is None:
            harm, how = chosen["predicted_harm"], "predicted"
        axes.plot(chosen["ratio"], harm, "*", color=LOST, markersize=15, label=f"this plan, {how}")
        for mark, symbol, colour in zip(uniform, "DsPXv" * len(uniform), COLOURS * len(uniform), strict=False):
            axes.plot(
                mark["ratio"], mark["measured_harm"], symbol, color=colour, markersize=8,
                label=f"uniform plan {mark['label']}, measured",
            )  # fmt: skip
            planned = mark["planned_at_equal_cost"]
            if planned is not None:
                joined = [mark["ratio"], planned["ratio"]], [mark["measured_harm"], planned["measured_harm"]]
                axes.plot(*joined, ":", color=colour, linewidth=1)
                axes.plot(
                    planned["ratio"], planned["measured_harm"], symbol, color=colour, markersize=8, fillstyle="none"
                )
        axes.set_xlabel(f"Predicted {AXES.get(record['budget'].partition('=')[0], 'speed-up')} over dense")
        axes.set_xscale("log")
        axes.set_xticks([ratio for ratio in RATIOS if ratio <= axes.get_xlim()[1]], minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("Harm (relative squared error)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the scale's own writes powers as TeX
        legend_above(axes, columns=1)
