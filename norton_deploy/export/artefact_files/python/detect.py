"""Detect in a picture: python detect.py PICTURE. Needs onnxruntime and NumPy; Pillow only reads the picture."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Detector:
    """An exported graph. `contract` is what it says about itself, see contract.json."""

    def __init__(self, model: str | Path, providers: tuple[str, ...] = ("CPUExecutionProvider",)) -> None:
        self.session = onnxruntime.InferenceSession(str(model), providers=list(providers))
        self.contract = json.loads(self.session.get_modelmeta().custom_metadata_map["norton_deploy"])
        self.names = dict(zip(self.contract["categories"]["labels"], self.contract["categories"]["names"], strict=True))

    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """Image uint8 RGB [H, W, 3] -> boxes [N, 4] (xyxy, its pixels), scores [N], names, best first; by task also
        masks [N, M, M] (0..1, each over its box `mask_boxes`, which is not clipped) or keypoints [N, K, 3]."""
        (height, width), size = self.contract["input_size"], image.shape[:2]
        if self.contract["resize"] != "letterbox" and size != (height, width):
            raise SystemExit(f"the graph takes pictures of {height} x {width} only, this one has {size[0]} x {size[1]}")
        scale = min(height / size[0], width / size[1])
        rows, columns = (max(round(side * scale), 1) for side in size)
        canvas = np.full((self.contract["batch"], height, width, 3), (124, 116, 104), np.uint8)
        canvas[0, :rows, :columns] = resize(image, rows, columns)
        if self.contract["input_dtype"] == "float32":
            canvas = canvas.transpose(0, 3, 1, 2).astype(np.float32) / 255
        outputs = [output.name for output in self.session.get_outputs()]
        found = dict(zip(outputs, self.session.run(outputs, {self.contract["input_name"]: canvas}), strict=True))
        factors = np.array([size[1] / columns, size[0] / rows], np.float32)
        unclipped = found["boxes"][0] * np.tile(factors, 2)
        boxes = unclipped.clip(0, np.array([size[1], size[0]] * 2, np.float32))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1) & np.isin(found["labels"][0], list(self.names))
        kept &= np.arange(len(boxes)) < found["num_detections"][0]
        names = [self.names[label] for label in found["labels"][0][kept].tolist()]
        result = {"boxes": boxes[kept], "scores": found["scores"][0][kept], "names": names}
        if "masks" in found:
            result |= {"masks": found["masks"][0][kept], "mask_boxes": unclipped[kept]}
        if "keypoints" in found:
            result["keypoints"] = found["keypoints"][0][kept] * np.append(factors, np.float32(1))
        return result


def resize(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bilinear, pixel centres at half integers: [H, W, 3] -> [rows, columns, 3]."""
    pixels = image.astype(np.float32)
    for axis, size in enumerate((rows, columns)):
        last = image.shape[axis] - 1
        position = ((np.arange(size) + 0.5) * (image.shape[axis] / size) - 0.5).clip(0, last)
        low = np.floor(position).astype(int)
        weight = (position - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        pixels = pixels.take(low, axis) * (1 - weight) + pixels.take(np.minimum(low + 1, last), axis) * weight
    return np.floor(pixels + 0.5).astype(np.uint8)


if __name__ == "__main__":
    from PIL import Image, ImageOps

    picture = np.array(ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB"))
    detections = Detector(Path(__file__).parents[1] / "model.onnx")(picture)
    for name, score, box in zip(detections["names"], detections["scores"], detections["boxes"], strict=True):
        print(f"{score:.3f} {name} " + " ".join(f"{side:.1f}" for side in box))
