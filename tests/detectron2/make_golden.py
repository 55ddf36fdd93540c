"""Writes golden/: what the real Detectron2 gives for seeded weights and images.

Needs Detectron2 (docs/detectron2.md says how to build it):

    OMP_NUM_THREADS=1 python tests/detectron2/make_golden.py

golden/zoo_keys.json   names and shapes of the model zoo's Faster, Mask and Keypoint R-CNN R50-FPN
golden/TASK.npz        detections of each image of `seeded.IMAGE_SIZES`, seed 0 for the weights
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

sys.path.insert(0, str(Path(__file__).parent))
from seeded import GOLDEN, HERE, IMAGE_SIZES, TASKS, seeded_image, seeded_weights, zoo_shapes

ZOO = {
    "box": "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    "mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
    "keypoint": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml",
}


def write_keys() -> None:
    """Pin the zoo's keys; those that all three models share stand once."""
    shapes = {}
    for task, name in ZOO.items():
        config = model_zoo.get_config(name)
        config.MODEL.DEVICE = "cpu"
        shapes[task] = {key: list(tensor.shape) for key, tensor in build_model(config).state_dict().items()}
    common = {key: shape for key, shape in shapes["box"].items() if all(s.get(key) == shape for s in shapes.values())}
    own = {task: {key: shape for key, shape in s.items() if key not in common} for task, s in shapes.items()}
    sections = []
    for section, entries in {"common": common, **own}.items():
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(shape)}" for key, shape in entries.items())
        sections.append(f'  "{section}": {{\n{lines}\n  }}')
    (GOLDEN / "zoo_keys.json").write_text("{\n" + ",\n".join(sections) + "\n}\n")


def write_detections(task: str) -> None:
    """Detections of a task's seeded model."""
    config = get_cfg()
    config.merge_from_file(str(HERE / "configs" / f"{task}.yaml"))
    predictor = DefaultPredictor(config)
    weights = {name: torch.from_numpy(array) for name, array in seeded_weights(zoo_shapes(task), seed=0).items()}
    missing = predictor.model.load_state_dict(weights, strict=False).missing_keys
    assert not missing, missing
    arrays = {}
    for number, size in enumerate(IMAGE_SIZES):
        found = predictor(seeded_image(size, seed=number)[:, :, ::-1])["instances"]
        arrays[f"{number}.boxes"] = found.pred_boxes.tensor.numpy()
        arrays[f"{number}.scores"] = found.scores.numpy()
        arrays[f"{number}.classes"] = found.pred_classes.numpy()
        if task == "mask":
            arrays[f"{number}.masks"] = np.packbits(found.pred_masks.numpy(), axis=-1)
        elif task == "keypoint":
            arrays[f"{number}.keypoints"] = found.pred_keypoints.numpy()
        print(task, size, len(found), "detections, scores", np.round(arrays[f"{number}.scores"], 3).tolist())
        print(arrays[f"{number}.classes"].tolist(), np.round(arrays[f"{number}.boxes"][:4], 1).tolist())
    np.savez_compressed(GOLDEN / f"{task}.npz", **arrays)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    write_keys()
    for task in TASKS:
        write_detections(task)
