"""Plans for torchvision's widths on detectors with narrower or fewer layers: equal shares of filters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from norton_deploy.checkpoints.checkpoint import Checkpoint
from norton_deploy.checkpoints.compress_checkpoint import compress_checkpoint
from norton_deploy.compression.channel_groups import channel_groups, output_width
from norton_deploy.compression.fit_plan import fit_plan
from norton_deploy.data.image_folder import read_images
from norton_deploy.method.plan import Choice, CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.provenance import provenance


def narrow_plan(plan: CompressionPlan, model: nn.Module, full: nn.Module) -> CompressionPlan:
    """The same shares of filters for a detector with other widths.

    Args:
        plan: made for `full`; configs/plans/ holds plans for torchvision's widths.
        model: detector with the same backbone, but a narrower pyramid or heads with narrower or fewer layers.
        full: the detector that `plan` fits.

    Returns:
        The form of all layers that `model` has, Tucker-2 with equal shares of its channels; of every group the share
        of filters that `plan` keeps, rounded.

    Raises:
        UserError: the plan does not fit `full`.
    """
    fitted = fit_plan(full, plan)
    layers = dict(model.named_modules())
    groups, full_groups = channel_groups(model), channel_groups(full)
    keep = {}
    for name, count in fitted.keep.items():
        if name in groups:
            width = output_width(model.get_submodule(groups[name].producers[0]))
            share = count / output_width(full.get_submodule(full_groups[name].producers[0]))
            keep[name] = max(1, round(share * width))
    own = fitted.renamed(lambda name: name if name in layers or name in groups else None)
    tucker = {}
    for name, ranks in own.tucker.items():
        narrow, wide = (_widths(found.get_submodule(name)) for found in (model, full))
        scaled = [max(1, round(rank * new / old)) for rank, new, old in zip(ranks, narrow, wide, strict=True)]
        tucker[name] = scaled[0], scaled[1]
    return replace(own, keep=keep, tucker=tucker)


def _widths(layer: nn.Module) -> tuple[int, int]:
    assert isinstance(layer, nn.Conv2d)  # fit_plan has checked it.
    return layer.in_channels, layer.out_channels


def compress_narrow(
    dense: Checkpoint, source: Path, plan: CompressionPlan, images: Path, **recovery: Any
) -> Checkpoint:
    """A trained detector compressed by a plan for torchvision's widths; for the other arguments see the next."""
    full = DetectorSettings(num_classes=dense.header.detector.num_classes).build(dense.header.task)
    return compress_recovered(dense, source, narrow_plan(plan, dense.model, full), images, **recovery)


def compress_recovered(
    dense: Checkpoint,
    source: Path,
    plan: CompressionPlan,
    images: Path,
    *,
    refit: int = 64,
    reestimate: int = 256,
    choose: Choice | None = None,
) -> Checkpoint:
    """A trained detector compressed by a plan in its own widths, and recovered on so many unlabelled images.

    Args:
        dense: the detector.
        source: its file, for the lineage.
        plan: for this detector.
        images: folder of training images.
        refit: images of the layer-wise least squares; 0 leaves it out.
        reestimate: images of new BatchNorm statistics; 0 leaves them.
        choose: the filters that survive, in place of what the plan says.
    """
    return compress_checkpoint(
        dense,
        plan,
        command=provenance()["command"],
        source=source,
        choose=choose,
        refit_images=list(read_images(images, refit)) if refit else None,
        reestimate_images=list(read_images(images, reestimate)) if reestimate else None,
    )
