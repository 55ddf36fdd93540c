"""A detector that knows the answers; as a script it is evaluated by several processes.

`torchrun oracle.py DATA OUT` writes OUT/<process>.json with what each process did and got.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState

from norton_deploy.data.coco import CocoDetection
from norton_deploy.evaluation.evaluate import Image, evaluate_detector
from norton_deploy.structures import Detections


class Oracle:
    """Knows an image of a dataset by its pixels; answers with its ground truth, moved by `shift` pixels."""

    def __init__(self, dataset: CocoDetection, shift: float = 0.0) -> None:
        self.images_seen = 0
        self.answers: dict[bytes, Detections] = {}
        for index in range(len(dataset)):
            image, target = dataset.pixels(index), dataset.target(index)
            self.answers[image.tobytes()] = Detections(
                boxes=target["boxes"].numpy() + np.float32(shift),
                scores=np.linspace(0.9, 0.5, len(target["boxes"]), dtype=np.float32),
                labels=target["labels"].numpy(),
                image_size=image.shape[:2],
                masks=target["masks"].numpy().astype(bool) if "masks" in target else None,
                keypoints=target["keypoints"].numpy() + np.float32(shift) if "keypoints" in target else None,
            )

    def __call__(self, images: Sequence[Image]) -> list[Detections]:
        self.images_seen += len(images)
        return [self.answers[image.tobytes()] for image in images]


def main() -> None:
    dataset = CocoDetection(sys.argv[1], "train", "box")
    oracle = Oracle(dataset, shift=1.5)
    evaluation = evaluate_detector(oracle, dataset, limit=5, progress=False)
    report = {"calls": oracle.images_seen, "metrics": evaluation.metrics, "results": evaluation.results}
    Path(sys.argv[2], f"{PartialState().process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
