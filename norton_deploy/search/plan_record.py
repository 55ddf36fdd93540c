"""A found plan as one JSON record: budget, workload, cost, latency, harm, layers and where other plans stand."""

from dataclasses import asdict
from typing import Any

import numpy as np

from norton_deploy.search.budget import Kind
from norton_deploy.search.plan_search import FoundPlan, PlanRequest


def plan_record(found: FoundPlan, request: PlanRequest) -> dict[str, Any]:
    """All figures of a found plan.

    `prediction_error` is predicted over measured milliseconds minus 1; for budgets of MACs and parameters it is
    predicted over counted, minus 1. Spreads are 10th to 90th percentile of the paired calls.
    """
    return {
        "budget": str(request.budget),
        "image_size": list(found.workload.image_size),
        "proposals": found.workload.proposals,
        "detections": found.workload.detections,
        "dense_macs": found.dense.macs,
        "macs": found.small.macs,
        "dense_params": found.dense.params,
        "params": found.small.params,
        **_cost(found, request.budget.kind),
        "predicted_harm": found.point.harm,
        "measured_harm": found.measured_harm,
        "sensitivity": {
            "images": request.images,
            "short_side": request.sensitivity_size,
            "choices": found.choices,
        },
        "layers": [asdict(layer) for layer in found.layers],
        "stays_dense": {layer.name: layer.dense_because for layer in found.layers if layer.dense_because is not None},
        "frontier": [{"ratio": found.dense_cost / point.cost, "predicted_harm": point.harm} for point in found.front],
        "marks": _marks(found),
        "seconds": {name: round(time, 1) for name, time in found.seconds.items()},
    }


def _cost(found: FoundPlan, kind: Kind) -> dict[str, Any]:
    latency = found.latency
    if latency is None:
        counted = found.small.macs if kind == "macs" else found.small.params
        return {"prediction_error": found.point.cost / counted - 1}
    p10, p90 = (float(value) for value in np.percentile(latency.speedups, [10, 90]))
    return {
        "dense_measured_ms": latency.dense_ms,
        "predicted_ms": latency.predicted_ms,
        "measured_ms": latency.measured_ms,
        "measured_ms_p10_p90": [latency.dense_ms / p90, latency.dense_ms / p10],
        "same_turns_median_ms": {name: latency.turns.summary(name).p50_ms for name in latency.turns.names},
        "rounds": len(latency.speedups),
        "predicted_speedup": latency.dense_ms / latency.predicted_ms,
        "measured_speedup": latency.dense_ms / latency.measured_ms,
        "measured_speedup_p10_p90": [p10, p90],
        "prediction_error": latency.predicted_ms / latency.measured_ms - 1,
    }


def _marks(found: FoundPlan) -> list[dict[str, Any]]:
    """Single plans with measured harm: this one, the uniform ones, and the planner's at their cost."""
    marks: list[dict[str, Any]] = [
        {
            "label": "this plan",
            "ratio": found.dense_cost / found.point.cost,
            "predicted_harm": found.point.harm,
            "measured_harm": found.measured_harm,
        }
    ]
    for rival in found.rivals:
        mark: dict[str, Any] = {
            "label": rival.label,
            "ratio": found.dense_cost / rival.cost,
            "measured_harm": rival.harm,
            "planned_at_equal_cost": None,
        }
        if rival.planned_cost is not None:
            mark["planned_at_equal_cost"] = {
                "ratio": found.dense_cost / rival.planned_cost,
                "predicted_harm": rival.planned_predicted_harm,
                "measured_harm": rival.planned_harm,
            }
        marks.append(mark)
    return marks
