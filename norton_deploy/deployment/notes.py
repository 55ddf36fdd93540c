"""What a reader of a deployment's report must know before believing its figures."""

from typing import Any

from norton_deploy.cost.turns import Speedup
from norton_deploy.deployment.request import DeployRequest, EngineTarget

QUICK = "Quick run: AP was measured on {images} images, so that differences of some points are chance."
NOT_RUN = (
    "The engine was built, but not run on this machine: speed and AP are those of its graph in ONNX Runtime. On the "
    "target, in the artefact's folder, norton verify_engine --model model.engine compares it."
)
BLIND = (
    "The dense model finds next to nothing in these images. Was it trained on such data, and are its categories these, "
    "in this order ({names})? Otherwise give its own (--categories)."
)
BY_MACS = "The plan was made for MACs: the planner times ONNX Runtime and OpenVINO, not {target}."
NOT_BUILT = (
    "The engine was not built here ({reason}): the artefact is its graph, and speed and AP are the graph's in ONNX "
    "Runtime. On the target run, in the artefact's folder: {command}"
)
BY_ONNX_RUNTIME = "The plan was made for times measured in ONNX Runtime on this machine's CPU."


def quick_plan(request: DeployRequest) -> str:
    """Of a plan that was made in a hurry, and of what was left out after it."""
    effort = request.effort
    trained = f"fine-tuned for {effort.finetune_steps} steps only" if effort.finetune_steps else "not fine-tuned"
    if request.plan is not None:
        return f"The small model was {trained}."
    images = "1 image" if effort.plan_images == 1 else f"{effort.plan_images} images"
    made = "The plan was made for MACs, not for measured time, and its harm was measured on"
    return f"{made} {images}; the model was {trained}."


def why_missed(request: DeployRequest, found: dict[str, Any] | None, speedup: Speedup | None) -> str:
    """What kept the artefact from the speed-up that was asked for, and what to do.

    Args:
        request: what was asked for.
        found: of `FoundPlan.to_dict`.
        speedup: of the artefact.
    """
    missed, measured = "The speed-up asked for was missed", 1.0 if speedup is None else speedup.ratio
    if found is not None and "measured_speedup" in found:
        then = f"{found['measured_speedup']:.2f} times then, {measured:.2f} now"
        return f"{missed} by a plan for measured time: {then}. Repeat it on an idle machine, or ask for more."
    by_time = "leave --quick out, so that the plan is made for measured time, or "
    leave = by_time if request.quick and EngineTarget.parse(request.target).engine is None else ""
    more = f"To get it {leave}ask for more, such as --speedup {round(request.speedup**2 / measured, 1):g}."
    share = f"{100 / request.speedup:.0f} % of the MACs"
    return f"{missed}: the plan was made for {share}, but time does not fall as they do. {more}"
