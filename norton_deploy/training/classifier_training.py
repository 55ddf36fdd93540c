"""Train a classifier on folders of images: CIFAR-10, ImageNet, or crops of a detection dataset."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, class_categories, save_checkpoint
from norton_deploy.data.classification import ClassificationFolder, classification_transform, list_class_files
from norton_deploy.data.resident_images import ResidentImages, read_class_names, read_resident_images
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_classifier
from norton_deploy.files import atomic_write
from norton_deploy.models.classifiers import Architecture, ClassifierSettings, Norm
from norton_deploy.training.batches import (
    Batch,
    EpochLoader,
    GroupedBatchSampler,
    ResidentBatches,
    SampledBatches,
    collate_classes,
)
from norton_deploy.training.distillation import DistilledClassification, open_classifier_teacher
from norton_deploy.training.forms import use_cpu_forms
from norton_deploy.training.initial_weights import InitialModel, initial_classifier
from norton_deploy.training.run_folder import seed_step
from norton_deploy.training.settings import TrainingSettings, build_accelerator
from norton_deploy.training.trainer import Evaluation, LossTerms, Trainer, TrainingResult


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainingSettings(TrainingSettings):
    """Settings of a classifier's training run."""

    arch: Architecture = "resnet50"
    """Architecture of the classifier."""
    data: Path
    """Folder with train/CLASS/*.jpg and val/CLASS/*.jpg (or test/); or CIFAR-10's original binary version."""
    init: Path | None = None
    """Checkpoint to start from, dense or compressed (.safetensors, or torchvision's .pth)."""
    plan: Path | None = None
    """Compression plan that gives random weights their structure (without --init)."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels that images are brought to."""
    style: Literal["imagenet", "cifar"] = "imagenet"
    """imagenet: files are read when they are wanted, random resized crops. cifar, for small images: all are decoded
    once and stay in memory (a GPU's, where there is one), crops shifted by up to an eighth."""
    cutout: int = 0
    """With cifar: side in pixels of a square that is cut out of every training image; 0: none."""
    norm: Norm = "batch"
    """Normalisation of a ResNet."""
    zero_init_residual: bool = False
    """Start residual branches at zero; helps training from nothing."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, 0..1."""
    teacher: Path | None = None
    """Classifier (.safetensors) whose class scores are learned too, usually the dense original."""
    distillation_weight: float = 0.5
    """With --teacher: weight of its scores, 0..1; the labels have the rest."""
    temperature: float = 4.0
    """With --teacher: temperature that softens the scores of both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutout < 0 or (self.cutout and self.style != "cifar"):
            raise UserError(f"cutout: expected 0 or more, with style cifar, got {self.cutout} with {self.style}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing: expected 0..1, got {self.label_smoothing}")
        if not 0 < self.distillation_weight <= 1:
            raise UserError(f"distillation_weight: expected above 0 and up to 1, got {self.distillation_weight}")
        if self.temperature <= 0:
            raise UserError(f"temperature: expected a positive number, got {self.temperature}")

    def identity(self) -> dict[str, Any]:
        """As for every run; how to distil counts only where there is a teacher."""
        without_effect = () if self.teacher else ("teacher", "distillation_weight", "temperature")
        return {name: value for name, value in super().identity().items() if name not in without_effect}


def classification_loss(smoothing: float, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Cross-entropy with label smoothing, the mean over the batch."""
    logits = model(batch.images)
    return {"classification": functional.cross_entropy(logits, batch.targets, label_smoothing=smoothing)}


def save_plain_weights(path: Path, model: nn.Module) -> None:
    """Write a model's tensors without a header, whole or not at all."""
    with atomic_write(path) as stream:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        stream.write(safetensors.torch.save(tensors))


def _save_checkpoint(header: CheckpointHeader, path: Path, model: nn.Module) -> None:
    save_checkpoint(path, model, header)


def train_classifier(
    settings: ClassifierTrainingSettings,
    *,
    command: str,
    announce: Callable[[str], None] = lambda message: None,
    start: InitialModel | None = None,
) -> TrainingResult:
    """Train, evaluate and save a classifier; every process of a run calls this with the same settings.

    Args:
        announce: called on the main process with what the run starts from and how.
        start: a model whose structure no checkpoint can name (instead of `settings.init`); its weights are then
            saved as plain safetensors.

    Raises:
        UserError: settings, data, initial weights or the run's folder are wrong, or the loss is not finite.
    """
    accelerator = build_accelerator(settings)
    classes = read_class_names(settings.data)
    seed_step(settings.seed, 0, 0)  # random weights are the same on all processes
    model_settings = ClassifierSettings(
        architecture=settings.arch,
        num_classes=len(classes),
        norm=settings.norm,
        zero_init_residual=settings.zero_init_residual,
        image_size=settings.image_size,
    )
    save: Callable[[Path, nn.Module], None] = save_plain_weights
    if start is None:
        start = initial_classifier(model_settings, init=settings.init, plan=settings.plan)
        header = CheckpointHeader("cls", start.settings, start.plan, class_categories(classes))
        save = partial(_save_checkpoint, header.made_by(command, settings.init))
    start.model.to(memory_format=torch.channels_last)
    loss_terms: LossTerms = partial(classification_loss, settings.label_smoothing)
    if settings.teacher is not None:
        teacher = open_classifier_teacher(settings.teacher, classes, start.settings).to(accelerator.device)
        teacher.to(memory_format=torch.channels_last)
        if settings.cpu_forms:
            use_cpu_forms(teacher)
        loss_terms = DistilledClassification(
            teacher,
            weight=settings.distillation_weight,
            temperature=settings.temperature,
            smoothing=settings.label_smoothing,
        )

    how_read: Any = {
        "image_size": start.settings.image_size,
        "mean": start.settings.image_mean,
        "std": start.settings.image_std,
    }
    train: ClassificationFolder | ResidentImages
    val: ClassificationFolder | ResidentImages
    loader: EpochLoader
    if settings.style == "cifar":
        how_read["workers"] = settings.workers
        train, val = (
            read_resident_images(settings.data, split, classes=classes, **how_read).to(accelerator.device)
            for split in ("train", "val")
        )
        loader = ResidentBatches(train, settings, accelerator, cutout=settings.cutout)
    else:
        train, val = (
            ClassificationFolder(
                list_class_files(settings.data, split, classes),
                classification_transform(split, **how_read),
                seed=settings.seed,
            )
            for split in ("train", "val")
        )
        sampler = GroupedBatchSampler.of(len(train), settings, accelerator)
        loader = SampledBatches(train, sampler, collate_classes, settings.workers)

    def evaluate(model: nn.Module) -> Evaluation:
        how: Any = {"batch_size": settings.batch_size, "workers": settings.workers, "progress": settings.progress}
        metrics = evaluate_classifier(model, val, accelerator.device, **how)
        return Evaluation({"classification": metrics}, metrics["top1"])

    trainer = Trainer(
        accelerator=accelerator,
        model=start.model,
        loss_terms=loss_terms,
        loader=loader,
        settings=settings,
        evaluate=evaluate,
        save_model=save,
        identity={"classifier": asdict(start.settings), "training_images": len(train)},
        announce=announce,
    )
    return trainer.start(start.origin)
