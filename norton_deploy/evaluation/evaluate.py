"""Run a detector over a COCO split, or a classifier over a folder, on one process or many, and score what it finds."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from norton_deploy.compression.lowering import lower_model, quickest_forms
from norton_deploy.data.category_list import names_no_categories, read_categories
from norton_deploy.data.classification import ClassificationFolder
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.coco_index import annotation_file
from norton_deploy.data.resident_images import ResidentImages
from norton_deploy.errors import UserError, one_line_errors
from norton_deploy.evaluation.coco_metrics import (
    IOU_TYPES,
    IouType,
    MeasureScore,
    Metrics,
    primary_iou_type,
    results_of_type,
    score_coco,
    table3_scores,
)
from norton_deploy.files import atomic_write, sha256_of
from norton_deploy.inference.image_journal import SUFFIX, ImageJournal, Processes
from norton_deploy.inference.loading import load_predictor, model_files
from norton_deploy.inference.predictor import Backend, Image, Predictor
from norton_deploy.progress import progress_bar
from norton_deploy.structures import Categories, Detections, Task

# images: uint8 RGB [H, W, 3] of any sizes -> one Detections per image, in its pixels
Detector = Callable[[Sequence[Image]], Sequence[Detections]]


@dataclass(frozen=True)
class DetectorEvaluation:
    """What a detector found and how well.

    Attributes:
        scores: per measure (`score_coco`).
        results: COCO results entries of all images.
    """

    scores: dict[IouType, MeasureScore]
    results: list[dict[str, Any]]

    @property
    def metrics(self) -> dict[str, Metrics]:
        """Of each measure; see `score_coco`."""
        return {iou_type: score.metrics for iou_type, score in self.scores.items()}


@dataclass(frozen=True)
class FileEvaluation:
    """Attributes: the loaded model; the split; how many of its images were seen; what came out; the journal, to be
    removed when that is written."""

    predictor: Predictor
    dataset: CocoDetection
    images: int
    evaluation: DetectorEvaluation
    journal: ImageJournal | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the detections."""
        average_precision, average_recall = table3_scores(self.dataset.task, self.evaluation.metrics)
        return {
            "task": self.dataset.task,
            "model": self.predictor.name,
            "backend": self.predictor.backend,
            "device": self.predictor.device,
            "images": self.images,
            "table3": {"AP": average_precision, "AR": average_recall},
            "metrics": self.evaluation.metrics,
        }


class _Pixels(Dataset[tuple[int, Image]]):
    """Image id and untransformed pixels of every item."""

    def __init__(self, dataset: CocoDetection) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Image]:
        return self.dataset.image_ids[index], self.dataset.pixels(index)


def evaluate_detector(
    detect: Detector,
    dataset: CocoDetection,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    workers: int = 0,
    progress: bool = True,
    journal: ImageJournal | None = None,
) -> DetectorEvaluation:
    """Score a detector on a dataset's ground truth.

    Every process calls this with the same arguments; each sees every n-th image (none is padded or seen
    twice), then all hold all results and the same metrics. Detections of categories that the ground truth has not
    are left out with one warning.

    Args:
        dataset: the split, whose categories are the detector's; crowds, small objects and images without objects count
            as COCO's rules say.
        limit: evaluate the first so many images only.
        journal: gets the results of each image; what it has of a stopped run is not repeated.
    """
    # joins torchrun's processes, unless a trainer has done so before; without `cpu` it would not on CPUs
    state = PartialState(cpu=not torch.cuda.is_available())
    chosen = range(len(dataset))[:limit]
    done = {} if journal is None else journal.done
    left = [index for index in chosen if dataset.image_ids[index] not in done]
    indices = left[state.process_index :: state.num_processes]
    loader = DataLoader(_Pixels(dataset), batch_size, sampler=indices, num_workers=workers, collate_fn=list)
    own: list[dict[str, Any]] = []
    show = progress and state.is_main_process
    with progress_bar(desc="evaluating", total=len(indices), unit="image", show=show) as bar:
        for batch in one_line_errors(loader):
            found = detect([pixels for _, pixels in batch])
            for (image_id, _), detections in zip(batch, found, strict=True):
                entries = detections.to_coco_results(image_id, dataset.categories)
                own.extend(entries)
                if journal is not None:
                    journal.add(image_id, entries)
                bar.update()
    image_ids = [dataset.image_ids[index] for index in chosen]
    results = gather_object(own) + [entry for image_id in image_ids for entry in done.get(image_id, ())]
    known = set(dataset.coco.getCatIds())
    kept = [entry for entry in results if entry["category_id"] in known]
    if len(kept) < len(results) and state.is_main_process:
        warnings.warn(
            f"{len(results) - len(kept)} of {len(results)} detections are of categories that the ground truth has not; "
            "they are left out",
            stacklevel=2,
        )
    kept.sort(key=lambda entry: entry["image_id"])  # stable: an image's entries stay in descending score
    scores: list[Any] = [None]
    if state.is_main_process:
        scores = [score_coco(dataset.coco, dict.fromkeys(IOU_TYPES[dataset.task], kept), image_ids)]
    return DetectorEvaluation(broadcast_object_list(scores)[0], kept)


def evaluate_file(
    model: Path | Sequence[Path],
    data: Path,
    task: Task,
    *,
    split: Literal["train", "val"] = "val",
    backend: Backend | None = None,
    device: str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    workers: int = 0,
    skip_bad: bool = False,
    progress: bool = True,
    categories: Path | None = None,
    results: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> FileEvaluation:
    """Score a checkpoint, a graph or an engine on a dataset; on one process or many.

    Args:
        model, backend: see `load_predictor`.
        data: folder in COCO-2017's layout.
        task: that the model must be for.
        device: cpu, cuda or cuda:N; by default each process takes a GPU of its own if there are any.
        limit, batch_size, workers, progress: see `evaluate_detector`.
        skip_bad: leave out bad images and annotations with one counted warning instead of stopping.
        categories: of a .pth file, which names none (`read_categories`); by default the dataset's, where their number
            is the model's.
        results: file that the results will go to; beside it they are kept image by image.
        resume, overwrite: what to do with those of a stopped run (`ImageJournal`).

    Raises:
        UserError: a bad file or dataset, or a model of another task.
    """
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=use_cpu)
    chosen = device or ("cpu" if use_cpu else str(state.device))
    predictor = load_predictor(model, backend=backend, device=chosen, categories=categories)
    if predictor.task != task:
        raise UserError(f"{predictor.name}: a detector for task '{predictor.task}', --task is '{task}'")
    if categories is None and isinstance(model, Path) and names_no_categories(model):
        own = Categories.from_coco(read_categories(annotation_file(data, split, task)))
        if own.num_classes == predictor.categories.num_classes and own != predictor.categories:
            predictor.categories = own
            warnings.warn(
                f"{model}: names no categories; its {own.num_classes - 1} classes are taken as the data's, in their "
                f"order: {', '.join(own.names)}",
                stacklevel=2,
            )
    dataset = CocoDetection(data, split, task, categories=predictor.categories, skip_bad=skip_bad)
    journal = None
    if results is not None:
        journal = ImageJournal(
            results.with_suffix(SUFFIX),
            {
                "model": [sha256_of(file) for file in model_files(model)],
                "annotations": sha256_of(annotation_file(data, split, task)),
                "backend": predictor.backend,
                "batch_size": batch_size,
            },
            resume=resume,
            overwrite=overwrite,
            processes=Processes(state.process_index, state.num_processes, gather_object),
        )
    evaluation = evaluate_detector(
        predictor, dataset, limit=limit, batch_size=batch_size, workers=workers, progress=progress, journal=journal
    )
    return FileEvaluation(predictor, dataset, len(range(len(dataset))[:limit]), evaluation, journal)


def write_results(path: Path, results: Sequence[Mapping[str, Any]], dataset: CocoDetection) -> dict[IouType, Path]:
    """Write COCO results JSON in the format of COCO's evaluation server into `result_files`.

    Returns:
        measure -> file.
    """
    files = result_files(path, dataset.task)
    for iou_type, file in files.items():
        with atomic_write(file, "w") as stream:
            json.dump(results_of_type(results, iou_type), stream)
    return files


def result_files(path: Path, task: Task) -> dict[IouType, Path]:
    """measure -> file of its results, one measure a file.

    `path` gets the task's own measure (boxes, masks or keypoints); the boxes of a mask or keypoint detector
    go beside it as NAME.bbox.json. Masks and boxes do not share a file, because pycocotools would then sort
    the masks by the area of their boxes.
    """
    own = primary_iou_type(task)
    return {
        iou_type: path if iou_type == own else path.with_name(f"{path.stem}.{iou_type}.json")
        for iou_type in IOU_TYPES[task]
    }


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    dataset: ClassificationFolder | ResidentImages,
    device: torch.device,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Accuracy over a dataset; every process calls this and sees every n-th image, none of them twice.

    Args:
        model: images [N, 3, H, W] -> logits [N, K], in evaluation mode, on `device`. What runs is a copy with
            CPDBlocks and BatchNorm merged, which gives the same scores to rounding in less time.
        dataset: the images, which are not augmented.

    Returns:
        top1 and top5, 0..1. With fewer than five classes top5 is 1.
    """
    model = lower_model(model, forms=quickest_forms(model))
    state = PartialState(cpu=device.type == "cpu")
    own = range(state.process_index, len(dataset), state.num_processes)
    hits = torch.zeros(2, dtype=torch.int64)
    batches: Iterable[Sequence[torch.Tensor]]
    if isinstance(dataset, ResidentImages):
        parts = torch.arange(len(dataset))[own.start :: own.step].split(batch_size)
        batches = ((dataset.normalised(dataset.pixels[part]), dataset.labels[part].cpu()) for part in parts)
    else:
        batches = one_line_errors(DataLoader(Subset(dataset, own), batch_size, num_workers=workers))
    show = progress and state.is_main_process
    bar = progress_bar(batches, desc="evaluating", total=-(-len(own) // batch_size), unit="batch", show=show)
    for images, labels, *_ in bar:
        logits = model(images.to(device))
        ranking = logits.topk(min(5, logits.shape[1])).indices.cpu()
        correct = ranking == labels[:, None]
        hits += torch.stack([correct[:, 0].sum(), correct.sum()])
    top1, top5 = torch.tensor(gather_object([hits.tolist()])).sum(0).tolist()
    return {"top1": top1 / len(dataset), "top5": top5 / len(dataset)}
