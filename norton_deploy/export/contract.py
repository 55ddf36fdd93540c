"""What an exported graph says about itself: the JSON that export writes beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from norton_deploy.config import from_mapping
from norton_deploy.errors import UserError, shown
from norton_deploy.files import check_tree, parse_json
from norton_deploy.masks import MaskPaste
from norton_deploy.structures import METADATA_KEY, Categories, Task

FORMAT = 2
LARGEST_INPUT = 2**28
"""Pixels in a graph's input."""
INPUT_NAME = "images"
# Whether the graph's two shortcuts (unrolled NMS, limited candidates) were exact for a batch.
FLAGS = ("nms_converged", "candidates_complete")
Target = Literal["onnxruntime", "tensorrt"]
InputDtype = Literal["uint8", "float32"]
Precision = Literal["fp32", "fp16", "tf32", "int8"]
Resize = Literal["letterbox", "none", "graph"]
TASK_OUTPUT: dict[Task, tuple[str, ...]] = {"box": (), "mask": ("masks",), "keypoint": ("keypoints",)}


@dataclass(frozen=True)
class OutputTensor:
    """Attributes: an output's name, ONNX's name of its type ("float", "int32", "bool") and its fixed shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphContract:
    """The interface of an exported detector.

    Attributes:
        task: box, mask or keypoint.
        image_size: (height, width) of the image that the detector sees.
        input_size: (height, width) of the graph's input; boxes are in its pixels. Another one than `image_size`
            only where the graph resizes.
        max_detections: D, rows of every output per image.
        categories: labels, COCO ids and names.
        input_dtype: "uint8" ([B, H, W, 3] RGB) or "float32" ([B, 3, H, W] RGB, 0..1).
        outputs: its outputs, in the graph's order.
        target: the engine that it was made for.
        precision: fp32, fp16, int8, or tf32: a graph in fp32 whose engine may round factors to 10 bits of mantissa.
        resize: "letterbox": images of another size may be letterboxed by the caller; "graph": they must have
            `input_size`, which the graph letterboxes into `image_size`; "none": they must have `image_size`.
        weights_sha256: digest of the weights that the graph was made from, "" if not recorded.
        score_threshold: the graph drops detections below this score.
        mask_paste: how its masks come into the image.
        float_layers: of an int8 graph, the layers that were left in float although they could be quantised.
        weight_bits: of an int8 graph, 8, or 7 where it is for CPUs that would overflow.
    """

    task: Task
    image_size: tuple[int, int]
    input_size: tuple[int, int]
    batch: int
    max_detections: int
    categories: Categories
    input_dtype: InputDtype
    outputs: tuple[OutputTensor, ...]
    target: Target
    precision: Precision
    resize: Resize
    weights_sha256: str
    score_threshold: float
    mask_paste: MaskPaste = "whole_pixels"
    input_name: str = INPUT_NAME
    float_layers: tuple[str, ...] = ()
    weight_bits: int = 8

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of the input tensor."""
        height, width = self.input_size
        return (self.batch, height, width, 3) if self.input_dtype == "uint8" else (self.batch, 3, height, width)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs that this task needs, then the flags."""
        return ("num_detections", "boxes", "scores", "labels", *TASK_OUTPUT[self.task], *self.flags)

    @property
    def flags(self) -> tuple[str, ...]:
        """Which of `FLAGS` the graph returns."""
        return tuple(output.name for output in self.outputs if output.name in FLAGS)

    def to_json(self) -> dict[str, Any]:
        """The fields and the format's number, for JSON; `from_json` reads them."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def parse(cls, text: str, source: str) -> GraphContract:
        """Read the metadata entry of a graph.

        Raises:
            UserError: not JSON, or see `from_json`.
        """
        return cls.from_json(parse_json(text, f"{source}: metadata '{METADATA_KEY}'"), source)

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> GraphContract:
        """Inverse of `to_json`.

        Raises:
            UserError: another format, or a missing or impossible field; names `source`.
        """
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        if found != FORMAT:
            raise UserError(
                f"{source}: metadata format {shown(found)}, this version reads {FORMAT}; export the model again"
            )
        check_tree(values, f"{source}: metadata")
        contract = from_mapping(cls, {name: values[name] for name in values if name != "format"}, f"{source}: metadata")
        if contract.resize != "graph" and contract.input_size != contract.image_size:
            raise UserError(f"{source}: metadata: input_size differs from image_size, but resize is not 'graph'")
        if min(*contract.image_size, *contract.input_size, contract.batch, contract.max_detections) < 1:
            raise UserError(f"{source}: metadata: sizes, batch and max_detections must be positive")
        if contract.batch * contract.input_size[0] * contract.input_size[1] > LARGEST_INPUT:
            raise UserError(f"{source}: metadata: batch x input_size is more than {LARGEST_INPUT} pixels")
        if not 0 <= contract.score_threshold <= 1:
            raise UserError(f"{source}: metadata: score_threshold must be 0 to 1, got {contract.score_threshold}")
        return contract
