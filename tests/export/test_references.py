"""What the gate takes for eager mode's detections is what torchvision's own forward finds."""

import numpy as np
import pytest
from reduced_detectors import IMAGE_SIZE, blobs, reduced_detector

from norton_deploy.parity.eager_stages import EagerStages
from norton_deploy.parity.references import compare_detections
from norton_deploy.parity.report import TOLERANCES, ParityReport
from norton_deploy.structures import TASKS, Task


@pytest.mark.parametrize("task", TASKS)
def test_references_are_what_the_whole_model_finds(task: Task) -> None:
    eager = EagerStages(reduced_detector(task), IMAGE_SIZE, 20)
    images = blobs(2, seed=5).numpy()
    references, whole = eager.references(images, TOLERANCES["fp32"]), eager.whole(images)
    for reference, found in zip(references, whole, strict=True):
        np.testing.assert_array_equal(reference.detections.boxes, found.boxes)
        np.testing.assert_array_equal(reference.detections.labels, found.labels)
        if task == "mask":
            assert reference.masks is not None and found.masks is not None
            np.testing.assert_array_equal(reference.masks, found.masks[reference.sample])
    report = ParityReport("eager", "fp32")
    compare_detections(report, "final", references, whole, TOLERANCES["fp32"], **eager.cuts)
    report.require_enough("boxes", *{"box": [], "mask": ["masks"], "keypoint": ["keypoints"]}[task])
    report.require()
