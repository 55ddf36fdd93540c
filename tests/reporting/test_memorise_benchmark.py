"""The benchmark that learns photographs by heart: the same images in both splits, annotations as detections."""

import importlib.util
import sys
from pathlib import Path

from pycocotools.coco import COCO

from norton_deploy.data.coco import CocoDetection
from norton_deploy.evaluation.detector_evaluation import evaluate_detector

ROOT = Path(__file__).parents[2]


def test_annotations_as_detections_score_one_on_the_training_images(tiny_coco: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("memorise_real", ROOT / "benchmarks" / "memorise_real.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    settings = benchmark.Settings(data=tiny_coco, init=tmp_path / "none", work=tmp_path / "work")
    folder = benchmark.same_images_twice(settings)
    assert benchmark.same_images_twice(settings) == folder  # what is there stays
    train, val = (CocoDetection(folder, split, "mask") for split in ("train", "val"))
    assert list(train.image_ids) == list(val.image_ids)
    coco = COCO(str(folder / "annotations" / "instances_val2017.json"))
    ids = iter(val.image_ids)

    def perfect(images):  # type: ignore[no-untyped-def]
        return [benchmark.annotated(coco, next(ids), image.shape[:2], val.categories) for image in images]

    metrics = evaluate_detector(perfect, val, batch_size=1, workers=0, progress=False).metrics
    assert metrics["segm"]["AP50"] == metrics["bbox"]["AP50"] == 1
