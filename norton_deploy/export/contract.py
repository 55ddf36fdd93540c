"""What an exported graph says about itself: the JSON that export writes beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from norton_deploy.errors import UserError
from norton_deploy.structures import METADATA_KEY, TASKS, Categories, MaskPaste, Task

FORMAT = 1
# Whether the graph's two shortcuts (unrolled NMS, limited candidates) were exact for a batch.
FLAGS = ("nms_converged", "candidates_complete")
Resize = Literal["letterbox", "none", "graph"]
TASK_OUTPUT: dict[Task, str | None] = {"box": None, "mask": "masks", "keypoint": "keypoints"}


@dataclass(frozen=True)
class GraphContract:
    """The interface of an exported detector.

    Attributes:
        task: box, mask or keypoint.
        image_size: (height, width) of the image that the detector sees.
        input_size: (height, width) of the graph's input; boxes are in its pixels. Another one than `image_size`
            only where the graph resizes.
        batch: images per run, fixed.
        max_detections: D, rows of every output per image.
        categories: labels, COCO ids and names.
        input_name: name of the only input.
        input_dtype: "uint8" ([B, H, W, 3] RGB) or "float32" ([B, 3, H, W] RGB, 0..1).
        resize: "letterbox": images of another size may be letterboxed by the caller; "graph": they must have
            `input_size`, which the graph letterboxes into `image_size`; "none": they must have `image_size`.
        weights_sha256: digest of the weights that the graph was made from, "" if not recorded.
        score_threshold: the graph drops detections below this score; None if not recorded.
        flags: which of `FLAGS` the graph returns.
        mask_paste: how its masks come into the image.
    """

    task: Task
    image_size: tuple[int, int]
    input_size: tuple[int, int]
    batch: int
    max_detections: int
    categories: Categories
    input_name: str
    input_dtype: str
    resize: Resize
    weights_sha256: str
    score_threshold: float | None
    flags: tuple[str, ...]
    mask_paste: MaskPaste = "whole_pixels"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of the input tensor."""
        height, width = self.input_size
        if self.input_dtype == "uint8":
            return self.batch, height, width, 3
        return self.batch, 3, height, width

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs that this task needs, then the flags."""
        task_output = TASK_OUTPUT[self.task]
        names = ("num_detections", "boxes", "scores", "labels")
        return (*names, *self.flags) if task_output is None else (*names, task_output, *self.flags)

    @classmethod
    def from_json(cls, text: str, source: str) -> GraphContract:
        """Parse the metadata entry of a graph or of an engine's manifest.

        Raises:
            UserError: not JSON, another format, or a missing or impossible field; names `source`.
        """
        try:
            return cls.from_dict(json.loads(text), source)
        except json.JSONDecodeError as error:
            raise UserError(f"{source}: metadata '{METADATA_KEY}' is not JSON; export the model again") from error

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str) -> GraphContract:
        """As `from_json`, from the parsed mapping."""
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            found = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
            raise UserError(f"{source}: metadata format {found!r}, this version reads {FORMAT}; export the model again")
        try:
            image_size = fields["image_size"]
            input_size: Any = fields.get("input_size", image_size)
            threshold = fields.get("score_threshold")
            contract = cls(
                task=cast(Task, fields["task"]),
                image_size=(int(image_size[0]), int(image_size[1])),
                input_size=(int(input_size[0]), int(input_size[1])),
                batch=int(fields["batch"]),
                max_detections=int(fields["max_detections"]),
                categories=Categories.from_list(fields["categories"]),
                input_name=str(fields["input"]["name"]),
                input_dtype=str(fields["input"]["dtype"]),
                resize=cast(Resize, fields["resize"]),
                weights_sha256=str(fields.get("weights_sha256", "")),
                score_threshold=None if threshold is None else float(threshold),
                mask_paste=fields.get("mask_paste", "whole_pixels"),
                flags=tuple(name for name in FLAGS if name in [entry["name"] for entry in fields["outputs"]]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{source}: metadata '{METADATA_KEY}' has no valid field {error}; export the model again"
            ) from error
        if contract.task not in TASKS:
            raise UserError(f"{source}: metadata: task '{contract.task}' is none of {', '.join(TASKS)}")
        if contract.mask_paste not in get_args(MaskPaste):
            raise UserError(f"{source}: metadata: mask_paste '{contract.mask_paste}', expected {get_args(MaskPaste)}")
        if contract.input_dtype not in ("uint8", "float32"):
            raise UserError(f"{source}: metadata: input dtype '{contract.input_dtype}', expected uint8 or float32")
        if contract.resize not in get_args(Resize):
            raise UserError(f"{source}: metadata: resize '{contract.resize}', expected {get_args(Resize)}")
        if contract.resize != "graph" and contract.input_size != contract.image_size:
            raise UserError(f"{source}: metadata: input_size differs from image_size, but resize is not 'graph'")
        if min(*contract.image_size, *contract.input_size, contract.batch, contract.max_detections) < 1:
            raise UserError(f"{source}: metadata: sizes, batch and max_detections must be positive")
        return contract
