"""The imported models against outputs of the real Detectron2 (golden/, written by make_golden.py)."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
from seeded import GOLDEN, HERE, IMAGE_SIZES, TASKS, seeded_image, seeded_weights, zoo_shapes

from norton_deploy.checkpoints.checkpoint import Checkpoint
from norton_deploy.detectron2.checkpoint import import_detectron2
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.structures import Detections

BOX_TOLERANCE_PX = 0.1
SCORE_TOLERANCE = 1e-3
SMALLEST_MASK_IOU = 0.98
KEYPOINT_TOLERANCE_PX = 1.0


@pytest.fixture(scope="module", params=TASKS)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Checkpoint]:
    """A seeded model in the form of the model zoo's .pkl, imported."""
    task = request.param
    weights = tmp_path_factory.mktemp("zoo") / "model_final.pkl"
    model = OrderedDict(seeded_weights(zoo_shapes(task), seed=0))
    weights.write_bytes(pickle.dumps({"model": model, "__author__": "a model zoo"}))
    return task, import_detectron2(HERE / "configs" / f"{task}.yaml", weights)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(IMAGE_SIZES)))
def test_outputs_equal_detectron2(imported: tuple[str, Checkpoint], number: int) -> None:
    task, checkpoint = imported
    header = checkpoint.header
    assert header.task == task
    predictor = TorchPredictor(checkpoint.model, header.task, header.categories, device="cpu")
    (found,) = predictor([seeded_image(IMAGE_SIZES[number], seed=number)])
    golden = np.load(GOLDEN / f"{task}.npz")
    boxes, scores = golden[f"{number}.boxes"], golden[f"{number}.scores"]
    assert len(boxes) == 12 == len(found)
    order = matching(found, boxes, golden[f"{number}.classes"] + 1)
    assert np.abs(found.boxes[order] - boxes).max() <= BOX_TOLERANCE_PX
    assert np.abs(found.scores[order] - scores).max() <= SCORE_TOLERANCE
    if task == "mask":
        masks = np.unpackbits(golden[f"{number}.masks"], axis=-1, count=IMAGE_SIZES[number][1]).astype(bool)
        assert found.masks is not None
        both = (found.masks[order] & masks).sum(axis=(1, 2))
        either = (found.masks[order] | masks).sum(axis=(1, 2))
        assert (either > 0).all()
        assert (both / either).min() >= SMALLEST_MASK_IOU
    elif task == "keypoint":
        assert found.keypoints is not None
        expected = golden[f"{number}.keypoints"]
        assert np.abs(found.keypoints[order][:, :, :2] - expected[:, :, :2]).max() <= KEYPOINT_TOLERANCE_PX
        # a probability over cells; the peak between the cells may exceed 1
        assert np.allclose(found.keypoints[order][:, :, 2], expected[:, :, 2], rtol=1e-2)


def matching(found: Detections, boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Index into `found` of each expected detection; scores that tie may change places."""
    distance = np.abs(found.boxes[None] - boxes[:, None]).max(axis=-1) + 1e6 * (found.labels[None] != labels[:, None])
    order = distance.argmin(axis=1)
    assert len(set(order.tolist())) == len(order)
    return order
