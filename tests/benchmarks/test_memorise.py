"""The benchmark that learns photographs by heart: the same images in both splits, annotations as detections."""

from pathlib import Path

from pycocotools.coco import COCO

from benchmarks import memorise_real
from norton_deploy.data.coco import CocoDetection
from norton_deploy.evaluation.evaluate import evaluate_detector


def test_annotations_as_detections_score_one_on_the_training_images(tiny_coco: Path, tmp_path: Path) -> None:
    settings = memorise_real.Settings(data=tiny_coco, init=tmp_path / "none", work=tmp_path / "work")
    folder = memorise_real.same_images_twice(settings)
    assert memorise_real.same_images_twice(settings) == folder  # what is there stays
    train, val = (CocoDetection(folder, split, "mask") for split in ("train", "val"))
    assert list(train.image_ids) == list(val.image_ids)
    coco = COCO(str(folder / "annotations" / "instances_val2017.json"))
    ids = iter(val.image_ids)

    def perfect(images):  # type: ignore[no-untyped-def]
        return [memorise_real.annotated(coco, next(ids), image.shape[:2], val.categories) for image in images]

    metrics = evaluate_detector(perfect, val, batch_size=1, workers=0, progress=False).metrics
    assert metrics["segm"]["AP50"] == metrics["bbox"]["AP50"] == 1
