"""Train Faster, Mask or Keypoint R-CNN on data in COCO's layout."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, save_checkpoint
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.dataset_check import check_layout
from norton_deploy.data.transforms import training_transform
from norton_deploy.errors import UserError, require_least
from norton_deploy.evaluation.coco_metrics import table3_scores
from norton_deploy.evaluation.evaluate import evaluate_detector
from norton_deploy.files import sha256_of
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Task
from norton_deploy.training.batches import Batch, GroupedBatchSampler, SampledBatches, collate_detections
from norton_deploy.training.distillation import DetectorImitation, open_detector_teacher
from norton_deploy.training.initial_weights import initial_detector, training_categories
from norton_deploy.training.rounding import round_layers
from norton_deploy.training.run_folder import seed_step
from norton_deploy.training.settings import TrainingSettings, build_accelerator
from norton_deploy.training.trainer import Evaluation, LossTerms, Trainer, TrainingResult

Distill = Literal["pyramid", "heads", "both"]
HEADS = ("rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor")


@dataclass(frozen=True, kw_only=True)
class DetectorTrainingSettings(TrainingSettings):
    """Settings of a detector's training run."""

    task: Task
    """box (Faster R-CNN), mask (Mask R-CNN) or keypoint (Keypoint R-CNN)."""
    data: Path
    """Folder in COCO-2017's layout: train2017/, val2017/, annotations/."""
    init: Path | None = None
    """Checkpoint to start from: a detector, or a classifier whose body becomes the backbone (.safetensors,
    or torchvision's .pth). Without it the weights are random."""
    categories: Path | None = None
    """Categories of a .pth in --init (and --teacher): a COCO annotation file or a list of names; by default the data's,
    where they are as many."""
    plan: Path | None = None
    """Compression plan that gives random weights their structure (without --init)."""
    teacher: Path | None = None
    """Detector that the trained one imitates: the dense one that it was compressed from, or one of its own plan."""
    distill: Distill = "both"
    """What is imitated (with --teacher): the feature pyramid, the heads' answers about the same proposals, or both."""
    distillation_weight: float = 0.5
    """Weight of the pyramid's imitation, for each of its four levels."""
    head_weight: float = 1.0
    """Weight of the heads' imitation, for each of their losses."""
    quantise: bool = False
    """Train for int8: weights and layers' inputs are rounded to 8 bits as in an int8 graph; the float detector itself
    (--init) can be the --teacher."""
    flip: float = 0.5
    """Probability of mirroring a training image."""
    photometric: bool = False
    """Jitter brightness, contrast, saturation and hue of training images."""
    keep_empty: bool = True
    """Train on images without objects too."""
    evaluation_images: int | None = None
    """Evaluate on the first so many images of val only."""
    skip_bad: bool = False
    """Leave out bad images and annotations with one counted warning instead of stopping."""
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    """The detector; its number of classes is that of the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("distillation_weight", "head_weight"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.quantise and (self.cpu_forms or self.recompose_blocks):
            raise UserError("quantise: gives the layers forms of its own; leave cpu_forms and recompose_blocks out")
        require_least(1, evaluation_images=self.evaluation_images)

    def identity(self) -> dict[str, Any]:
        """As of every run; the teacher counts by its contents too, and what is not imitated has no weight."""
        values = super().identity()
        unused = {"heads": {"distillation_weight"}, "both": set()}.get(self.distill, {"head_weight"})
        if self.teacher is None:
            unused = {"teacher", "distill", "distillation_weight", "head_weight"}
        values = {name: value for name, value in values.items() if name not in unused}
        if self.teacher is None:
            return values
        return {**values, "teacher_sha256": sha256_of(self.teacher)}


def detection_losses(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """torchvision's losses of a detector in training mode, each a scalar."""
    losses: Mapping[str, Tensor] = model(batch.images, batch.targets)
    return losses


def train_detector(
    settings: DetectorTrainingSettings,
    *,
    command: str,
    announce: Callable[[str], None] = lambda message: None,
) -> TrainingResult:
    """Train, evaluate and save a detector; every process of a run calls this with the same settings.

    Mask and keypoint losses are means over each process's own positives, as in torchvision; box and RPN losses equal
    those of one process with all their images when every image gives its full sample.

    Args:
        command: the command line, for the checkpoints' lineage.
        announce: called on the main process with what the run starts from and how.

    Raises:
        UserError: settings, data, initial weights or the run's folder are wrong, or the loss is not finite.
    """
    accelerator = build_accelerator(settings)
    if settings.detector.backbone.norm == "sync" and accelerator.device.type == "cpu":
        raise UserError("detector.backbone.norm sync needs GPUs; use --detector.backbone.norm group (or batch) on CPUs")
    check_layout(settings.data, settings.task)  # before minutes of reading the first split
    train = CocoDetection(
        settings.data,
        "train",
        settings.task,
        transforms=training_transform(flip=settings.flip, photometric=settings.photometric),
        seed=settings.seed,
        keep_empty=settings.keep_empty,
        skip_bad=settings.skip_bad,
    )
    train.categories = training_categories(settings.task, train.categories, settings.init, settings.categories)
    val = CocoDetection(settings.data, "val", settings.task, categories=train.categories, skip_bad=settings.skip_bad)
    seed_step(settings.seed, 0, 0)  # random weights are the same on all processes
    start = initial_detector(
        settings.task,
        train.categories,
        settings.detector,
        init=settings.init,
        plan=settings.plan,
        named=settings.categories,
    )
    # Quicker steps on a CPU in informal trials (no result file). Not the heads: torchvision's keypoint loss views maps
    # as contiguous.
    start.model.get_submodule("backbone").to(memory_format=torch.channels_last)
    keep_boxes_in_float32(start.model)
    loss_terms: LossTerms = detection_losses
    notes = []
    if settings.quantise:
        round_layers(start.model)
        notes.append("weights and inputs of layers are rounded to 8 bits")
    if settings.teacher is not None:
        teacher, channels = open_detector_teacher(
            settings.teacher,
            start.model,
            start.settings,
            start.plan,
            start.pyramid_channels,
            task=settings.task,
            categories=train.categories,
            named=settings.categories,
        )
        teacher = teacher.to(accelerator.device)
        teacher.get_submodule("backbone").to(memory_format=torch.channels_last)
        pyramid = settings.distillation_weight if settings.distill != "heads" else 0.0
        heads = settings.head_weight if settings.distill in ("heads", "both") else 0.0
        loss_terms = DetectorImitation(start.model, teacher, channels, pyramid_weight=pyramid, head_weight=heads)
        weights = ", ".join(f"{part} {weight:g}" for part, weight in (("pyramid", pyramid), ("heads", heads)) if weight)
        notes.append(f"imitate {settings.teacher}, weights: {weights}")
    header = CheckpointHeader(
        settings.task, start.settings, start.plan, train.categories, pyramid_channels=start.pyramid_channels
    ).made_by(command, settings.init)

    def evaluate(model: nn.Module) -> Evaluation:
        evaluation = evaluate_detector(
            TorchPredictor(model, settings.task, train.categories, device=str(accelerator.device)),
            val,
            limit=settings.evaluation_images,
            batch_size=settings.batch_size,
            workers=settings.workers,
            progress=settings.progress,
        )
        return Evaluation(evaluation.metrics, table3_scores(settings.task, evaluation.metrics)[0])

    sampler = GroupedBatchSampler.of(len(train), settings, accelerator, image_sizes=train.image_sizes())
    trainer = Trainer(
        accelerator=accelerator,
        model=start.model,
        loss_terms=loss_terms,
        loader=SampledBatches(train, sampler, collate_detections, settings.workers),
        settings=settings,
        evaluate=evaluate,
        save_model=lambda path, model: save_checkpoint(path, model, header),
        identity={"detector": asdict(start.settings), "training_images": len(train)},
        announce=announce,
    )
    return trainer.start(start.origin, *notes)


def keep_boxes_in_float32(detector: nn.Module) -> None:
    """Make the last layers of torchvision's detector return float32 whatever they compute in; in place.

    Proposals, regression targets and losses follow. Nothing changes without autocast. torchvision decodes boxes, and
    rounds the annotated ones, in the type of its heads' outputs. Under autocast that type is half: bfloat16 has 8
    significant bits, so a coordinate of 700 px would be known to 4 px.
    """
    for name, module in detector.named_modules():
        if name in HEADS:
            module.register_forward_hook(lambda _module, _inputs, outputs: _in_float32(outputs))


def _in_float32(outputs: Any) -> Any:
    """Tensors in float32, also within lists and tuples."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_in_float32(entry) for entry in outputs)
