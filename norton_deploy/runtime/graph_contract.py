"""What an exported graph says about itself: the JSON that export writes beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast, get_args

from norton_deploy.errors import UserError
from norton_deploy.structures import METADATA_KEY, TASKS, Categories, MaskPaste, Task

FORMAT = 1
# Whether the graph's two shortcuts (unrolled NMS, limited candidates) were exact for a batch.
FLAGS = ("nms_converged", "candidates_complete")
TASK_OUTPUT: dict[Task, str | None] = {"box": None, "mask": "masks", "keypoint": "keypoints"}


@dataclass(frozen=True)
class GraphContract:
    """The interface of an exported detector.

    Attributes:
        task: box, mask or keypoint.
        image_size: (height, width) that the graph was built for.
        batch: images per run, fixed.
        max_detections: D, rows of every output per image.
        categories: labels, COCO ids and names.
        input_name: name of the only input.
        input_dtype: "uint8" ([B, H, W, 3] RGB) or "float32" ([B, 3, H, W] RGB, 0..1).
        letterbox: whether images of another size may be letterboxed; otherwise they must fit exactly.
        weights_sha256: digest of the weights that the graph was made from, "" if not recorded.
        score_threshold: the graph drops detections below this score; None if not recorded.
        flags: which of `FLAGS` the graph returns.
        mask_paste: how its masks come into the image.
    """

    task: Task
    image_size: tuple[int, int]
    batch: int
    max_detections: int
    categories: Categories
    input_name: str
    input_dtype: str
    letterbox: bool
    weights_sha256: str
    score_threshold: float | None
    flags: tuple[str, ...]
    mask_paste: MaskPaste = "whole_pixels"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of the input tensor."""
        height, width = self.image_size
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
            threshold = fields.get("score_threshold")
            contract = cls(
                task=cast(Task, fields["task"]),
                image_size=(int(image_size[0]), int(image_size[1])),
                batch=int(fields["batch"]),
                max_detections=int(fields["max_detections"]),
                categories=Categories.from_list(fields["categories"]),
                input_name=str(fields["input"]["name"]),
                input_dtype=str(fields["input"]["dtype"]),
                letterbox=str(fields["resize"]) == "letterbox",
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
        if min(*contract.image_size, contract.batch, contract.max_detections) < 1:
            raise UserError(f"{source}: metadata: image_size, batch and max_detections must be positive")
        return contract
