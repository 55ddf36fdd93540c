"""What a run starts from: a checkpoint, a classifier's body in a detector's backbone, or random weights."""

from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from torch import nn

from norton_deploy.checkpoints.checkpoint import Checkpoint, load_weights, read_header
from norton_deploy.checkpoints.open_model import open_for_data, open_model
from norton_deploy.compression.compress import apply_structure
from norton_deploy.config import flatten
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import freeze_stages
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Categories, Task

CLASSIFICATION_LAYER = "fc."
NAMED = 5
"""So many of a checkpoint's categories are named in a message."""
S = TypeVar("S", ClassifierSettings, DetectorSettings)


@dataclass(frozen=True)
class InitialModel(Generic[S]):
    """Attributes: the model to train; its settings, plan and pyramid channels, for its checkpoints; its origin,
    in words."""

    model: nn.Module
    settings: S
    plan: CompressionPlan | None
    origin: str
    pyramid_channels: tuple[int, ...] | None = None


def training_categories(task: Task, data: Categories, init: Path | None, named: Path | None = None) -> Categories:
    """The labels to train with: the checkpoint's own when it detects the data's categories, so that its heads fit.

    Models of torchvision label COCO's categories by their ids, those of other frameworks 1 to 80.

    Args:
        task, data: task and categories of the training data.
        init: a checkpoint or a .pth file, or None.
        named: the categories of a .pth file (`read_categories`).

    Raises:
        UserError: `named` without a .pth file, or of another number of classes.
    """
    if named is not None and (init is None or init.suffix == ".safetensors"):
        raise UserError("--categories: goes with a .pth file in --init; a checkpoint has its own")
    if init is None or (init.suffix != ".safetensors" and named is None):
        return data
    header = read_header(init) if named is None else open_model(str(init), categories=named).header
    # an id alone says little: every data set of one's own begins at 1
    own, theirs = (set(zip(found.ids, found.names, strict=True)) for found in (header.categories, data))
    return header.categories if header.task == task and own == theirs else data


def initial_detector(
    task: Task,
    categories: Categories,
    settings: DetectorSettings,
    *,
    init: Path | None = None,
    plan: Path | None = None,
    named: Path | None = None,
) -> InitialModel[DetectorSettings]:
    """Build the detector that a run starts from; random weights come from torch's global generator.

    From a detector's checkpoint all weights are taken when task and categories are the same, otherwise its
    backbone (body and pyramid) only. The file's own settings hold, except for those fields of `settings` that
    differ from their defaults. From a classifier's checkpoint the body is taken. The plan is the file's. A .pth file
    without `named` categories, of the same task and with as many classes, is taken to detect the data's.

    Args:
        task, categories: of the training data; the categories decide the number of classes.
        init: a checkpoint (.safetensors), or torchvision's .pth.
        plan: structure of a detector that starts from random weights; not with `init`.
        named: the categories of a .pth file (`read_categories`).

    Raises:
        UserError: the file does not fit, `plan` is given with `init`, or a frozen backbone would be random.
    """
    if settings.num_classes not in (DetectorSettings.num_classes, categories.num_classes):
        raise UserError(
            f"detector.num_classes is {settings.num_classes}, but the data has {categories.num_classes} with the "
            "background; leave it out, the data decide"
        )
    if init is None:
        return _random_detector(task, replace(settings, num_classes=categories.num_classes), plan)
    _refuse_plan(plan, init)
    source, assumed = open_for_data(init, task, categories, named)
    if source.header.task == "cls":
        final = replace(
            settings,
            num_classes=categories.num_classes,
            backbone=replace(settings.backbone, architecture=source.header.settings.architecture),
        )
    else:
        final = replace(_with_changes(source.header.detector, settings), num_classes=categories.num_classes)
    model = final.build(task)
    if source.header.plan is not None:
        model = apply_structure(model, source.header.plan)
    origin = _take_weights(model, task, categories, source, init) + assumed + _kept_settings(final, settings)
    freeze_stages(model.get_submodule("backbone.body"), final.backbone.trainable_layers)
    return InitialModel(model, final, source.header.plan, origin, source.header.pyramid_channels)


def _random_detector(task: Task, settings: DetectorSettings, plan: Path | None) -> InitialModel[DetectorSettings]:
    if settings.backbone.norm == "frozen":
        raise UserError(
            "detector.backbone.norm frozen goes with a pretrained backbone: give --init FILE, or train from random "
            "weights with --detector.backbone.norm batch (or group, or sync on several GPUs)"
        )
    start = _random(settings.build(task), settings, plan)
    freeze_stages(start.model.get_submodule("backbone.body"), settings.backbone.trainable_layers)
    return start


def _random(model: nn.Module, settings: S, plan: Path | None) -> InitialModel[S]:
    structure = None if plan is None else CompressionPlan.load(plan)
    if structure is not None:
        apply_structure(model, structure)
    return InitialModel(model, settings, structure, "RANDOM weights: no --init was given")


def _with_changes(own: DetectorSettings, given: DetectorSettings) -> DetectorSettings:
    """The file's settings, with those of `given` that are not the defaults."""
    default, changes = DetectorSettings(), {}
    for group in fields(DetectorSettings):
        mine, asked, usual = (getattr(settings, group.name) for settings in (own, given, default))
        if is_dataclass(asked):
            names = [field.name for field in fields(asked)]
            changed = {name: getattr(asked, name) for name in names if getattr(asked, name) != getattr(usual, name)}
            changes[group.name] = replace(mine, **changed)
        elif asked != usual:
            changes[group.name] = asked
    return replace(own, **changes)


def _kept_settings(final: DetectorSettings, given: DetectorSettings) -> str:
    """In words, the settings that are not as given: the file's, where `given` has a default. Empty without any."""
    ours, asked = flatten(asdict(final)), flatten(asdict(given))
    kept = [f"{name} {value}" for name, value in ours.items() if value != asked[name] and name != "num_classes"]
    return f"; the file's own settings where none but a default is given: {', '.join(kept)}" if kept else ""


def _take_weights(model: nn.Module, task: Task, categories: Categories, source: Checkpoint, init: Path) -> str:
    """Load what fits of the source's weights, strictly; returns what was taken, in words."""
    if source.header.task == task and source.header.categories == categories:
        load_weights(model, source.model.state_dict(), str(init))
        return f"{init}: all weights"
    load_backbone(model, source, str(init))
    if source.header.task == "cls":
        return f"{init}: backbone body of a classifier; pyramid and heads are random"
    theirs = ", ".join(source.header.categories.names[:NAMED]) if source.header.task == task else source.header.task
    return f"{init}: backbone and pyramid; the heads are random (the file's detect something else: {theirs})"


def load_backbone(model: nn.Module, source: Checkpoint, path: str) -> None:
    """Load the backbone (body and pyramid) of another detector, or a classifier's body, strictly; `path` is its file.

    Raises:
        UserError: names or shapes differ.
    """
    tensors = source.model.state_dict()
    if source.header.task == "cls":
        body = {name: t for name, t in tensors.items() if not name.startswith(CLASSIFICATION_LAYER)}
        load_weights(model.get_submodule("backbone.body"), body, path)
    else:
        backbone = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
        load_weights(model.get_submodule("backbone"), backbone, path)


def initial_classifier(
    settings: ClassifierSettings, *, init: Path | None = None, plan: Path | None = None
) -> InitialModel[ClassifierSettings]:
    """Build the classifier that a run starts from; random weights come from torch's global generator.

    From a checkpoint with as many classes all weights are taken, otherwise all but the last layer's. The
    architecture, the plan and how colours are normalised are the file's.

    Args:
        settings: of the classifier, its number of classes being that of the data.
        init: a classifier's checkpoint (.safetensors), or torchvision's .pth.
        plan: structure of a classifier that starts from random weights; not with `init`.

    Raises:
        UserError: the file does not fit, or `plan` is given with `init`.
    """
    if init is None:
        return _random(settings.build(), settings, plan)
    _refuse_plan(plan, init)
    source = open_model(str(init))
    found = source.header.settings
    if source.header.task != "cls" or found.architecture != settings.architecture:
        name = found.architecture if source.header.task == "cls" else f"a {source.header.task} detector"
        raise UserError(f"{init}: holds {name}, expected a checkpoint of the classifier {settings.architecture}")
    colours = source.header.classifier
    settings = replace(settings, image_mean=colours.image_mean, image_std=colours.image_std)
    model = settings.build()
    if source.header.plan is not None:
        apply_structure(model, source.header.plan)
    tensors, origin = source.model.state_dict(), f"{init}: all weights"
    if found.num_classes != settings.num_classes:
        own = model.state_dict()
        last = list(own)[-1].rpartition(".")[0] + "."
        tensors |= {name: tensor for name, tensor in own.items() if name.startswith(last)}
        origin = f"{init}: all weights but the last layer's, which are random ({settings.num_classes} classes)"
    load_weights(model, tensors, str(init))
    return InitialModel(model, settings, source.header.plan, origin)


def _refuse_plan(plan: Path | None, init: Path) -> None:
    if plan is not None:
        raise UserError(f"--plan {plan}: a plan gives random weights their structure; compress {init} by it first")
