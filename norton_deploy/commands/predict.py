"""norton predict: detect in images; writes annotated images and one COCO JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from norton_deploy.commands import write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.image_folder import find_images
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, check_output_file
from norton_deploy.inference.drawing import draw_detections
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.predictor import Image


@dataclass
class Settings:
    """Settings of predict."""

    model: Path
    """Checkpoint, .onnx, .engine or a folder of graphs."""
    images: tuple[Path, ...]
    """Image files and folders of images."""
    out: Path
    """Folder for the annotated images and detections.json."""
    device: str | None = None
    """cpu, cuda or cuda:N; a GPU if there is one."""
    score_threshold: float = 0.05
    """Detections below this score are left out of the JSON."""
    draw_threshold: float = 0.5
    """Detections below this score are not drawn."""
    json: Path | None = None
    """Also write counts and mean stage times as JSON here ("-": stdout)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Detect in all images; 1 if some of them could not be read (the others' detections are written)."""
    settings = parse_settings(Settings, argv, prog="predict", description=__doc__ or "")
    files = [file for path in settings.images for file in find_images(path)]
    if not files:
        raise UserError("--images: expected image files or folders after it")
    result_file = settings.out / "detections.json"
    if result_file.exists():
        raise UserError(f"{result_file}: is there already; choose another --out, or remove that folder")
    check_output_file(result_file, "--out")
    check_output_file(settings.json, "--json")
    predictor = load_predictor(settings.model, score_threshold=settings.score_threshold, device=settings.device)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    stages_ms: list[dict[str, float]] = []
    bad: list[UserError] = []
    try:
        for image_id, file in zip(image_ids(files), tqdm(files, unit="image", file=sys.stderr), strict=True):
            try:
                [(image, detections)] = predictor.predict_files([file])
            except UserError as error:
                bad.append(error)
                continue
            stages_ms.append(asdict(predictor.timing))
            height, width = detections.image_size
            images.append({"id": image_id, "file_name": str(file), "height": height, "width": width})
            for entry in detections.to_coco_results(image_id, predictor.categories):
                _, _, box_width, box_height = entry["bbox"]
                annotations.append({"id": len(annotations) + 1, "area": box_width * box_height, "iscrowd": 0, **entry})
            drawn = detections[detections.scores >= settings.draw_threshold]
            picture = draw_detections(image, drawn, predictor.categories)
            write_image(settings.out / f"{image_id:06d}_{file.stem}.jpg", picture)
    finally:  # Ctrl-C keeps what was found until then
        if images:
            categories = [
                {"id": category_id, "name": name}
                for category_id, name in zip(predictor.categories.ids, predictor.categories.names, strict=True)
            ]
            result = {"images": images, "annotations": annotations, "categories": categories}
            write_json(result, result_file)
            print(f"{settings.out}: {len(images)} images, {len(annotations)} detections", file=sys.stderr)
    if not images:
        raise bad[0]
    summary = {
        "images": len(images),
        "bad_images": len(bad),
        "detections": len(annotations),
        "model": predictor.name,
        "device": predictor.device,
        "mean_ms": {stage: sum(row[stage] for row in stages_ms) / len(stages_ms) for stage in stages_ms[0]},
    }
    write_json(summary, settings.json)
    if bad:
        raise UserError(f"{len(bad)} of {len(files)} images were left out, the first because: {bad[0]}")
    return 0


def image_ids(files: Sequence[Path]) -> list[int]:
    """COCO's own ids where all files are named by distinct numbers (000000000139.jpg), else 1, 2, 3, ..."""
    stems = [file.stem for file in files]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(files):
        return [int(stem) for stem in stems]
    return list(range(1, len(files) + 1))


def write_image(path: Path, image: Image) -> None:
    """Write uint8 RGB [H, W, 3] as JPEG, whole or not at all."""
    encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    with atomic_write(path) as stream:
        stream.write(encoded.tobytes())
