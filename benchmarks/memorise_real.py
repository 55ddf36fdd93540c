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

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools.coco import COCO

from benchmarks.lib.narrow_plan import narrow_plan
from norton_deploy import commands
from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.commands.demo import Steps
from norton_deploy.config import parse_settings
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.data.coco_index import annotation_file
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, sha256_of
from norton_deploy.inference.drawing import draw_detections
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.predictor import read_image
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table
from norton_deploy.structures import Categories, Detections

RESULTS = Path(__file__).parent / "results"
CONFIG = Path("configs/train/demo_mask.yaml")
GOAL_AP50 = 0.5
GREY = 70
NOTES = """\
{images} photographs with {objects} annotated objects, crowds not counted. All scores are on these training images \
themselves: learning by heart is the point, they say nothing about other images. \
The goal was an AP50 of {goal} for all. Outlines of {shown} images, from left to right: annotated objects, {models} \
(score at least {score}).

![outlines of annotated and detected objects]({picture})"""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/memorise_real.py."""

    data: Path
    """Folder in COCO-2017's layout; train2017 and its instances are used."""
    init: Path
    """Dense mask detector to start from; its backbone is taken (.safetensors)."""
    plans: tuple[Path, ...] = (Path("configs/plans/table3.yaml"), Path("configs/plans/fast.yaml"))
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


def main() -> int:
    """Run what is missing and write the results."""
    settings = parse_settings(Settings, prog="memorise_real", description=__doc__ or "")
    if not CONFIG.is_file():
        raise UserError(f"{CONFIG}: not found; run the benchmark from the repository's root folder")
    data = same_images_twice(settings)
    sizes = (
        "--detector.image.min_size",
        str(settings.short_side),
        "--detector.image.max_size",
        str(2 * settings.short_side),
    )
    run = ("--seed", str(settings.seed), "--precision", settings.precision)
    shape = ("--config", str(CONFIG), "--data", str(data), *run, *sizes)
    dense = settings.work / "dense"
    steps = Steps(settings.work)
    length = ("--steps", str(settings.dense_steps))
    steps.train("train_det", (*shape, "--init", str(settings.init), *length), dense)
    folders = {"dense": dense}
    write(settings, data, folders)
    for plan in settings.plans:
        start, small = settings.work / f"{plan.stem}-start", settings.work / plan.stem
        compress(steps, settings, plan, dense / "last.safetensors", start)
        recipe = ("--steps", str(settings.finetune_steps), "--lr", str(settings.finetune_lr))
        taught = ("--init", str(start / "last.safetensors"), "--teacher", str(dense / "last.safetensors"))
        steps.train("train_det", (*shape, *taught, *recipe), small)
        folders[plan.stem] = small
        write(settings, data, folders)
    return 0


def write(settings: Settings, data: Path, folders: dict[str, Path]) -> None:
    """The results of the models so far, as JSON, table and picture."""
    cells = {name: read_cell(folder) for name, folder in folders.items()}
    given = {name: value for name, value in asdict(settings).items() if not isinstance(value, Path)}
    annotations = annotation_file(data, "train", "mask")
    listed = COCO(str(annotations))
    contents = {
        "images": len(listed.getImgIds()),
        "objects": len(listed.getAnnIds(iscrowd=False)),
        "annotations_sha256": sha256_of(annotations),
    }
    result = {
        "settings": {**given, "plans": list(folders)[1:]},
        "data": contents,
        "cells": cells,
        "provenance": provenance(),
    }
    picture = settings.out.with_suffix(".png")
    draw(settings, data, folders, picture)
    commands.write_json(result, settings.out)
    with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
        stream.write(markdown(result, picture.name))


def markdown(result: dict[str, Any], picture: str) -> str:
    """Table and notes of a results file and the name of its picture."""
    notes = NOTES.format(
        **result["data"],
        goal=GOAL_AP50,
        models=", ".join(result["cells"]),
        shown=result["settings"]["shown"],
        score=result["settings"]["draw_score"],
        picture=picture,
    )
    return f"{table(result['cells']).to_markdown()}\n\n{notes}\n"


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
            shutil.copy(
                annotation_file(settings.data, "train", "mask"),
                unfinished / "annotations" / f"instances_{split}2017.json",
            )
        unfinished.rename(data)
    own = annotation_file(data, "train", "mask")
    if sha256_of(own) != sha256_of(given):
        raise UserError(f"{given}: is not what {own} was copied from; choose another --work")
    return data


def compress(steps: Steps, settings: Settings, plan: Path, dense: Path, out: Path) -> None:
    """The dense detector by the plan in its widths, refitted on the images without their labels."""
    loaded = load_checkpoint(dense)
    full = DetectorSettings(num_classes=loaded.header.settings.num_classes).build("mask")
    narrow_plan(CompressionPlan.load(plan), loaded.model, full).save(out / "plan.yaml")
    images = str(settings.data / "train2017")
    argv = ["--model", str(dense), "--plan", str(out / "plan.yaml"), "--refit", images, "--reestimate", images]
    steps.run("compress", [*argv, "--out", str(out / "last.safetensors")], out / "last.safetensors")


def read_cell(folder: Path) -> dict[str, Any]:
    """Scores and size of a trained detector."""
    figures = json.loads((folder / "metrics.json").read_text())
    loaded = load_checkpoint(folder / "last.safetensors")
    found = loaded.header.settings
    counts = count_complexity(loaded.model, found.input_size, proposals=found.proposals)
    return {
        "steps": figures["steps"],
        "metrics": figures["metrics"],
        "macs": counts.macs,
        "params": counts.params,
        "commands": [entry["command"] for entry in loaded.header.lineage if "command" in entry],
    }


def table(cells: dict[str, dict[str, Any]]) -> Table:
    """One row a model."""
    rows = tuple(
        (
            name,
            str(cell["steps"]),
            *(f"{cell['metrics'][kind][measure]:.3f}" for kind in ("bbox", "segm") for measure in ("AP", "AP50")),
            f"{cell['macs'] / 1e9:.2f}G",
            f"{cell['params'] / 1e6:.2f}M",
        )
        for name, cell in cells.items()
    )
    header = ("Mask R-CNN", "Steps", "Box AP", "Box AP50", "Mask AP", "Mask AP50", "MACs", "Params")
    return Table(header, rows, "Real photographs learnt by heart: scores on the training images")


def draw(settings: Settings, data: Path, folders: dict[str, Path], picture: Path) -> None:
    """The outlines of some images as one picture, and the photographs with detections in the work folder."""
    coco = COCO(str(annotation_file(data, "train", "mask")))
    models = {name: load_predictor(folder / "last.safetensors") for name, folder in folders.items()}
    categories = next(iter(models.values())).categories
    rows = []
    for image_id in sorted(coco.getImgIds())[: settings.shown]:
        entry = coco.loadImgs([image_id])[0]
        image = read_image(data / "train2017" / entry["file_name"])
        found = [annotated(coco, image_id, image.shape[:2], categories)]
        for model in models.values():
            detections = model([image])[0]
            found.append(detections[detections.scores >= settings.draw_score])
        photographs = [draw_detections(image, detections, categories) for detections in found]
        target = settings.work / "pictures" / f"{Path(entry['file_name']).stem}.jpg"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(np.hstack(photographs)).save(target, quality=88)
        rows.append([draw_detections(np.full_like(image, GREY), detections, categories) for detections in found])
    with atomic_write(picture) as stream:
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
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
