"""From a dense checkpoint to a compressed one: compress, recover without labels, say where it comes from."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from norton_deploy.checkpoints.checkpoint import Checkpoint
from norton_deploy.compression.calibration import make_probes, reestimate_batch_norm
from norton_deploy.compression.channel_groups import PYRAMID_GROUP
from norton_deploy.compression.channel_harm import choose_by_harm
from norton_deploy.compression.compress import compress_with_kept
from norton_deploy.compression.refit import refit
from norton_deploy.errors import UserError
from norton_deploy.method.filter_selection import AngleMeasure, choose_by_angles
from norton_deploy.method.plan import WHOLE_DETECTOR, Choice, CompressionPlan
from norton_deploy.models.detectors import DetectorSettings


def compress_checkpoint(
    dense: Checkpoint,
    plan: CompressionPlan,
    *,
    command: str,
    source: str | Path | None = None,
    seed: int = 0,
    starts: int = 4,
    measure: AngleMeasure = "largest",
    choose: Choice | None = None,
    refit_images: Iterable[Tensor] | None = None,
    refit_side: int | None = None,
    reestimate_images: Iterable[Tensor] | None = None,
    progress: Callable[[str, str, int], None] | None = None,
) -> Checkpoint:
    """Compress a checkpoint's model by a plan, then refit its layers and re-estimate its BatchNorm if asked.

    Args:
        dense: the dense model; it is not changed.
        plan: of its architecture, or of a whole detector.
        source: the file that `dense` comes from, for the lineage and for messages.
        seed: of the decomposition's random starts and of the refit's choice of positions.
        starts: starts per decomposition; the best is kept per filter.
        measure: how the principal angles of two factors become one distance (`pabs_distance`).
        choose: which filters are kept, in place of what the plan says (`CompressionPlan.choose`).
        refit_images: unlabelled images on which every layer is refitted to the dense one's outputs (`refit`);
            float [3, H, W], 0..1 RGB, of any sizes; they stay in memory. None leaves the refit out.
        refit_side: short side of those images in pixels, at most; None: the detector's own.
        reestimate_images: images for new BatchNorm statistics (`reestimate_batch_norm`); None leaves them.
        progress: gets ("compress" or "refit", layer or group, how many there are), and ("look at images", number, 0)
            for each batch of the refit's images.

    Returns:
        The compressed model and its header: the plan, one more lineage entry, and of a narrowed pyramid the dense
        pyramid's channels that are left.

    Raises:
        UserError: the model is compressed already, or the plan does not fit it.
    """
    settings = dense.header.settings
    if dense.header.plan is not None:
        raise UserError(f"{source or 'the model'}: is compressed already; start from its dense original")
    if plan.architecture not in (settings.architecture, WHOLE_DETECTOR):
        raise UserError(f"{plan.source}: a plan for {plan.architecture}, and the model is a {settings.architecture}")
    report = progress or (lambda stage, layer, layers: None)
    plan = plan if choose is None else replace(plan, choose=choose)
    if plan.choose == "harm" and plan.keep and refit_images is None:
        raise UserError(
            f"{plan.source}: its filters are chosen by harm on the images of the refit: give some (--refit FOLDER), "
            "or choose by angles (--choose angles)"
        )
    probes = []
    if refit_images is not None:
        seen = settings
        if refit_side is not None and isinstance(settings, DetectorSettings):
            seen = settings.with_short_side(refit_side)
        for probe in make_probes(dense.model, refit_images, seen):
            probes.append(probe)
            report("look at images", str(len(probes)), 0)
    compressed = compress_with_kept(
        dense.model,
        plan,
        seed=seed,
        starts=starts,
        choose=partial(choose_by_angles, measure=measure),
        chosen=choose_by_harm(dense.model, plan, probes, seed=seed) if plan.choose == "harm" and probes else None,
        progress=partial(report, "compress"),
    )
    small, kept = compressed.model, compressed.kept
    if probes:
        refit(small, dense.model, kept, probes, seed=seed, progress=partial(report, "refit"))
    if reestimate_images is not None:
        reestimate_batch_norm(small, reestimate_images, settings)
    pyramid = tuple(kept[PYRAMID_GROUP].tolist()) if PYRAMID_GROUP in kept else None
    return Checkpoint(small, dense.header.made_by(command, source, plan=plan, pyramid_channels=pyramid))
