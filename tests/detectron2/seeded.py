"""Weights and images that a seed determines, for Detectron2 and for the imported model alike."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
TASKS = ("box", "mask", "keypoint")
# (height, width): one that Detectron2 leaves as it is, and ones that it enlarges, shrinks, and limits by its width
IMAGE_SIZES = ((160, 224), (133, 170), (301, 260), (90, 200))

# Gain of the weights over He's rule, by the end of the name; tuned so that random models detect something, with
# scores, sizes and masks that vary.
GAINS = {
    "stem.conv1.weight": 1 / 60,
    "fpn_lateral2.weight": 0.25,
    "fpn_lateral3.weight": 0.25,
    "fpn_lateral4.weight": 0.25,
    "fpn_lateral5.weight": 0.25,
    "anchor_deltas.weight": 0.25,
    "cls_score.weight": 1.0,
    "bbox_pred.weight": 0.45,
    "mask_head.predictor.weight": 2.0,
    "score_lowres.weight": 2.0,
}
MASK_BIAS = 1.5
"""Added to the mask predictor's bias, so that about half of a mask is set."""


def zoo_shapes(task: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model zoo's R50-FPN model of a task."""
    pinned = json.loads((GOLDEN / "zoo_keys.json").read_text())
    return {name: tuple(shape) for name, shape in (pinned["common"] | pinned[task]).items()}


def seeded_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Random weights of a Detectron2 model, float32, by name; the same everywhere (NumPy's frozen generator)."""
    generator = np.random.RandomState(seed)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        values = generator.standard_normal(shape)
        if name.endswith("running_var"):
            values = 1 + 0.2 * np.tanh(values)
        elif name.endswith("norm.weight"):
            values = (0.35 if ".conv3." in name else 0.9) * (1 + 0.2 * np.tanh(values))
        elif len(shape) == 1:
            values = 0.1 * values + (MASK_BIAS if name.endswith("mask_head.predictor.bias") else 0)
        else:
            gain = next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0)
            values = values * gain * np.sqrt(2 / np.prod(shape[1:]))
        weights[name] = values.astype(np.float32)
    return weights


def seeded_image(size: tuple[int, int], seed: int) -> npt.NDArray[np.uint8]:
    """An RGB image [H, W, 3] of coloured blocks with some noise."""
    generator = np.random.RandomState(seed)
    side = 20
    blocks = generator.randint(0, 256, (-(-size[0] // side), -(-size[1] // side), 3))
    image = np.kron(blocks, np.ones((side, side, 1)))[: size[0], : size[1]]
    return (image + 12 * generator.standard_normal(image.shape)).clip(0, 255).astype(np.uint8)
