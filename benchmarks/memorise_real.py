r"""Mask R-CNN, dense and compressed, learns a few real photographs by heart.

A detector that starts from one trained on drawn scenes is trained on the training images of a folder in COCO's layout
and scored on those same images: that says nothing about images it has not seen, and everything about whether real
annotations, sizes and categories go through training, compression and evaluation unharmed. The dense detector is
then compressed by every plan, and fine-tuned on the same images with the dense one as its teacher.

Beside the results file it writes a picture of outlines: the annotated objects and all models' detections of some
images, on grey. The photographs with detections on them are in --work; most photographs' licences are not ours to
publish under. Whatever is done already is not done again.

    python benchmarks/memorise_real.py --data COCO \
        --init runs/table3_accuracy/seed0/mask-trained/last.safetensors
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools.coco import COCO

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, page, run, settings_of, tabulate
from benchmarks.lib.narrow_plan import compress_narrow
from benchmarks.lib.training_runs import LAST, read_recipe, train_once
from norton_deploy.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from norton_deploy.cost.complexity import complexity_of
from norton_deploy.data.coco_index import annotation_file
from norton_deploy.data.image_file import read_image
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, path_below, path_component, sha256_of
from norton_deploy.inference.drawing import draw_detections
from norton_deploy.inference.loading import load_predictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.structures import Categories, Detections
from norton_deploy.training.detector_training import DetectorTrainingSettings

GOAL_AP50 = 0.5
GREY = 70
NOTES = """\
{images} photographs with {objects} annotated objects, crowds not counted. All scores are on these training images \
themselves: learning by heart is the point, they say nothing about other images. \
The goal was an AP50 of {goal} for all. Outlines of {shown} images, from left to right: annotated objects, {models} \
(score at least {draw_score}).

![outlines of annotated and detected objects]({picture})"""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/memorise_real.py."""

    data: Path
    """Folder in COCO-2017's layout; train2017 and its instances are used."""
    init: Path
    """Dense mask detector to start from; its backbone is taken (.safetensors)."""
    plans: tuple[Path, ...] = (PLANS / "table3.yaml", PLANS / "fast.yaml")
    """Plans, brought to the detector's widths."""
    dense_steps: int = 1600
    """Steps of 4 images of the dense detector."""
    finetune_steps: int = 1200
    """Steps of 4 images of each compressed one."""
    finetune_lr: float = 0.0015
    """Peak learning rate of the compressed ones."""
    precision: Literal["no", "bf16"] = "no"
    """Precision of all training: no (float32), or bf16 on a CPU with AMX. Evaluation is in float32."""
    short_side: int = 192
    """Images are resized so that their short side has this many pixels."""
    shown: int = 6
    """Images in the picture."""
    draw_score: float = 0.5
    """Detections below this score are not drawn."""
    seed: int = 0
    """Seed of the training."""
    out: Path = RESULTS / "memorise_real.json"
    """Results file; table and picture are written beside it."""
    work: Path = Path("runs/memorise_real")
    """Folder for the runs and the pictures."""


def main(settings: Settings) -> int:
    """Train what is missing and write the results."""
    data = same_images_twice(settings)
    annotations = annotation_file(data, "train", "mask")
    listed = COCO(str(annotations))
    contents = {
        "images": len(listed.getImgIds()),
        "objects": len(listed.getAnnIds(iscrowd=False)),
        "annotations_sha256": sha256_of(annotations),
    }
    dense = settings.work / "dense"
    folders = {"dense": dense, **{plan.stem: settings.work / plan.stem for plan in settings.plans}}
    results = ResultCells(settings.out, {**settings_of(settings, "data", "init", "plans"), **contents}, report)
    train = partial(train_cell, settings, data)
    results.measure("dense", lambda: train(dense, init=settings.init, steps=settings.dense_steps))
    for plan in settings.plans:
        start = settings.work / f"{plan.stem}-start" / LAST

        def finetuned(plan: Path = plan, start: Path = start) -> Cell:
            if not start.is_file():
                loaded = CompressionPlan.load(plan)
                small = compress_narrow(load_checkpoint(dense / LAST), dense / LAST, loaded, data / "train2017")
                save_checkpoint(start, small.model, small.header)
            recipe = {"steps": settings.finetune_steps, "lr": settings.finetune_lr}
            return train(folders[plan.stem], init=start, teacher=dense / LAST, **recipe)

        results.measure(plan.stem, finetuned)
    if all((folder / LAST).is_file() for folder in folders.values()):
        draw(settings, data, folders)
    return results.measure_all({})


def train_cell(settings: Settings, data: Path, out: Path, **given: Any) -> dict[str, Any]:
    """Scores, size and history of a detector trained in `out`."""
    side = settings.short_side
    recipe = read_recipe(
        DetectorTrainingSettings,
        "demo_mask",
        out=out,
        data=data,
        seed=settings.seed,
        precision=settings.precision,
        detector={"image": {"min_size": side, "max_size": 2 * side}},
        **given,
    )
    figures = train_once(recipe)
    loaded = load_checkpoint(out / LAST)
    counts = complexity_of(loaded.model, loaded.header.settings)
    commands = [entry["command"] for entry in loaded.header.lineage if "command" in entry]
    return {**figures, "macs": counts.macs, "params": counts.params, "commands": commands}


def report(results: ResultCells) -> str:
    """Table and notes."""

    def score(kind: str, measure: str) -> Callable[[tuple[str, Cell]], str]:
        return lambda row: f"{row[1]['metrics'][kind][measure]:.3f}"

    table = tabulate(
        "Real photographs learnt by heart: scores on the training images",
        results.cells.items(),
        {
            "Mask R-CNN": lambda row: row[0],
            "Steps": lambda row: str(row[1]["steps"]),
            "Box AP": score("bbox", "AP"),
            "Box AP50": score("bbox", "AP50"),
            "Mask AP": score("segm", "AP"),
            "Mask AP50": score("segm", "AP50"),
            "MACs": lambda row: f"{row[1]['macs'] / 1e9:.2f}G",
            "Params": lambda row: f"{row[1]['params'] / 1e6:.2f}M",
        },
    )
    picture = results.path.with_suffix(".png").name
    notes = NOTES.format(**results.settings, goal=GOAL_AP50, models=", ".join(results.cells), picture=picture)
    return page(table, notes)


def same_images_twice(settings: Settings) -> Path:
    """A folder whose val2017 is the train2017 of the data."""
    data = settings.work / "data"
    given = annotation_file(settings.data, "train", "mask")
    if not data.is_dir():
        unfinished = settings.work / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            (unfinished / f"{split}2017").symlink_to((settings.data / "train2017").resolve())
            shutil.copy(given, unfinished / "annotations" / f"instances_{split}2017.json")
        unfinished.rename(data)
    own = annotation_file(data, "train", "mask")
    if sha256_of(own) != sha256_of(given):
        raise UserError(f"{given}: is not what {own} was copied from; choose another --work")
    return data


def draw(settings: Settings, data: Path, folders: dict[str, Path]) -> None:
    """The outlines of some images as one picture, and the photographs with detections in the work folder."""
    coco = COCO(str(annotation_file(data, "train", "mask")))
    models = {name: load_predictor(folder / "last.safetensors") for name, folder in folders.items()}
    categories = next(iter(models.values())).categories
    rows = []
    for image_id in sorted(coco.getImgIds())[: settings.shown]:
        entry = coco.loadImgs([image_id])[0]
        image = read_image(path_below(data / "train2017", entry["file_name"]))
        found = [annotated(coco, image_id, image.shape[:2], categories)]
        for model in models.values():
            detections = model([image])[0]
            found.append(detections[detections.scores >= settings.draw_score])
        photographs = [draw_detections(image, detections, categories) for detections in found]
        target = settings.work / "pictures" / f"{path_component(Path(entry['file_name']).stem)}.jpg"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(np.hstack(photographs)).save(target, quality=88)
        rows.append([draw_detections(np.full_like(image, GREY), detections, categories) for detections in found])
    with atomic_write(settings.out.with_suffix(".png")) as stream:
        Image.fromarray(sheet(rows)).save(stream, format="PNG")


def annotated(coco: COCO, image_id: int, image_size: tuple[int, int], categories: Categories) -> Detections:
    """The annotations of an image that are no crowds, in the form of detections."""
    entries = coco.loadAnns(coco.getAnnIds(imgIds=[image_id], iscrowd=False))
    boxes = np.array([entry["bbox"] for entry in entries], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([categories.label_of_id[entry["category_id"]] for entry in entries], np.int64)
    masks = np.array([coco.annToMask(entry) for entry in entries], bool).reshape(-1, *image_size)
    return Detections(boxes, np.ones(len(entries), np.float32), labels, image_size, masks)


def sheet(rows: list[list[npt.NDArray[np.uint8]]], width: int = 320) -> npt.NDArray[np.uint8]:
    """Pictures in rows, each `width` pixels wide."""
    lines = []
    for row in rows:
        height = round(width * row[0].shape[0] / row[0].shape[1])
        lines.append(np.hstack([np.array(Image.fromarray(panel).resize((width, height))) for panel in row]))
    return np.vstack(lines)


if __name__ == "__main__":
    run(Settings, main)
