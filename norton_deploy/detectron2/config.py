"""Detectron2's YAML files, with `_BASE_`, and what a detector of ours must be set to for the same results."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from norton_deploy.config import flatten, from_mapping, read_yaml
from norton_deploy.errors import UserError, shown
from norton_deploy.models.classifiers import LARGEST_SIDE, Norm
from norton_deploy.models.detector_parts import LONGEST_LIST
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Task

NORTON_BACKBONE = "build_norton_resnet_fpn_backbone"
BASE_KEY = "_BASE_"
NORMS: dict[str, Norm] = {"FrozenBN": "frozen", "BN": "batch", "SyncBN": "sync", "GN": "group"}
POOLERS = {"ROIAlign": False, "ROIAlignV2": True}
STRIDES = (4, 8, 16, 32, 64)


def _values(text: str) -> dict[str, Any]:
    """Nested sections in YAML as "SECTION.KEY" -> value."""
    return {name: _plain(value) for name, value in flatten(yaml.safe_load(text)).items()}


def _plain(value: Any) -> Any:
    """Lists as tuples; texts that stand for a Python literal, as `("a", "b")`, as that literal (yacs's rule)."""
    if isinstance(value, str):
        try:
            return _plain_sequence(ast.literal_eval(value))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value
    return _plain_sequence(value)


def _plain_sequence(value: Any) -> Any:
    return tuple(_plain_sequence(entry) for entry in value) if isinstance(value, list | tuple) else value


# The values that hold where a file says nothing (Detectron2 0.6), of all keys that are read.
DEFAULTS = _values("""
INPUT: {FORMAT: BGR, MAX_SIZE_TEST: 1333, MIN_SIZE_TEST: 800, MIN_SIZE_TRAIN: [800], MIN_SIZE_TRAIN_SAMPLING: choice}
TEST: {DETECTIONS_PER_IMAGE: 100}
MODEL:
  KEYPOINT_ON: false
  LOAD_PROPOSALS: false
  MASK_ON: false
  META_ARCHITECTURE: GeneralizedRCNN
  PIXEL_MEAN: [103.53, 116.28, 123.675]
  PIXEL_STD: [1.0, 1.0, 1.0]
  ANCHOR_GENERATOR:
    {ASPECT_RATIOS: [[0.5, 1.0, 2.0]], NAME: DefaultAnchorGenerator, OFFSET: 0.0, SIZES: [[32, 64, 128, 256,
     512]]}
  BACKBONE: {FREEZE_AT: 2, NAME: build_resnet_backbone}
  FPN: {FUSE_TYPE: sum, IN_FEATURES: [], NORM: "", OUT_CHANNELS: 256}
  NORTON: {PLAN: "", WEIGHTS: ""}
  PROPOSAL_GENERATOR: {MIN_SIZE: 0, NAME: RPN}
  RESNETS:
    {DEFORM_ON_PER_STAGE: [false, false, false, false], DEPTH: 50, NORM: FrozenBN, NUM_GROUPS: 1, OUT_FEATURES:
     [res4], RES2_OUT_CHANNELS: 256, RES5_DILATION: 1, STEM_OUT_CHANNELS: 64, STRIDE_IN_1X1: true,
     WIDTH_PER_GROUP: 64}
  ROI_BOX_HEAD:
    {BBOX_REG_WEIGHTS: [10.0, 10.0, 5.0, 5.0], CLS_AGNOSTIC_BBOX_REG: false, FC_DIM: 1024, NAME: "", NUM_CONV: 0,
     NUM_FC: 0, POOLER_RESOLUTION: 14, POOLER_SAMPLING_RATIO: 0, POOLER_TYPE: ROIAlignV2, USE_SIGMOID_CE: false}
  ROI_HEADS:
    {BATCH_SIZE_PER_IMAGE: 512, IN_FEATURES: [res4], NAME: Res5ROIHeads, NMS_THRESH_TEST: 0.5, NUM_CLASSES: 80,
     POSITIVE_FRACTION: 0.25, SCORE_THRESH_TEST: 0.05}
  ROI_KEYPOINT_HEAD:
    {CONV_DIMS: [512, 512, 512, 512, 512, 512, 512, 512], NAME: KRCNNConvDeconvUpsampleHead, NUM_KEYPOINTS: 17,
     POOLER_RESOLUTION: 14, POOLER_SAMPLING_RATIO: 0, POOLER_TYPE: ROIAlignV2}
  ROI_MASK_HEAD:
    {CLS_AGNOSTIC_MASK: false, CONV_DIM: 256, NAME: MaskRCNNConvUpsampleHead, NORM: "", NUM_CONV: 0,
     POOLER_RESOLUTION: 14, POOLER_SAMPLING_RATIO: 0, POOLER_TYPE: ROIAlignV2}
  RPN:
    {BATCH_SIZE_PER_IMAGE: 256, BBOX_REG_WEIGHTS: [1.0, 1.0, 1.0, 1.0], CONV_DIMS: [-1], HEAD_NAME:
     StandardRPNHead, IN_FEATURES: [res4], NMS_THRESH: 0.7, POST_NMS_TOPK_TEST: 1000, POST_NMS_TOPK_TRAIN: 2000,
     PRE_NMS_TOPK_TEST: 6000, PRE_NMS_TOPK_TRAIN: 12000}
""")
# What must stand there: the structure of Faster, Mask and Keypoint R-CNN with an FPN over a plain ResNet.
REQUIRED = _values("""
MODEL:
  LOAD_PROPOSALS: false
  META_ARCHITECTURE: GeneralizedRCNN
  ANCHOR_GENERATOR: {NAME: DefaultAnchorGenerator}
  FPN: {FUSE_TYPE: sum, IN_FEATURES: [res2, res3, res4, res5], NORM: ""}
  PROPOSAL_GENERATOR: {NAME: RPN}
  RESNETS:
    {DEFORM_ON_PER_STAGE: [false, false, false, false], NUM_GROUPS: 1, RES5_DILATION: 1, STEM_OUT_CHANNELS: 64,
     WIDTH_PER_GROUP: 64}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_CONV: 0, NUM_FC: 2, POOLER_RESOLUTION: 7, USE_SIGMOID_CE: false}
  ROI_HEADS: {IN_FEATURES: [p2, p3, p4, p5], NAME: StandardROIHeads}
  RPN:
    {BBOX_REG_WEIGHTS: [1.0, 1.0, 1.0, 1.0], CONV_DIMS: [-1], HEAD_NAME: StandardRPNHead, IN_FEATURES: [p2, p3,
     p4, p5, p6]}
""")
REQUIRED_OF_TASK = {
    "box": {},
    "mask": _values("MODEL: {ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, NORM: '', POOLER_RESOLUTION: 14}}"),
    "keypoint": _values("MODEL: {ROI_KEYPOINT_HEAD: {NAME: KRCNNConvDeconvUpsampleHead, POOLER_RESOLUTION: 14}}"),
}


@dataclass(frozen=True)
class Detectron2Config:
    """The part of a Detectron2 configuration that decides what a model computes.

    Attributes:
        values: "SECTION.KEY" -> value, of the keys in `DEFAULTS`; lists are tuples.
    """

    values: Mapping[str, Any]
    source: str

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def task(self) -> Task:
        """The task that the configuration is of.

        Raises:
            UserError: masks and keypoints in one model.
        """
        if self["MODEL.MASK_ON"] and self["MODEL.KEYPOINT_ON"]:
            raise UserError(f"{self.source}: MASK_ON and KEYPOINT_ON: one detector here has masks or keypoints")
        return "mask" if self["MODEL.MASK_ON"] else "keypoint" if self["MODEL.KEYPOINT_ON"] else "box"

    @property
    def is_norton(self) -> bool:
        """Whether the backbone is this project's, registered in Detectron2."""
        return bool(self["MODEL.BACKBONE.NAME"] == NORTON_BACKBONE)

    def settings(self) -> DetectorSettings:
        """A detector's settings that make it compute what Detectron2 computes.

        Raises:
            UserError: the configuration is of a model that cannot be expressed; the message names the key.
        """
        self._check_structure()
        smallest = np.nextafter(np.float32(self["MODEL.PROPOSAL_GENERATOR.MIN_SIZE"]), np.float32(np.inf))
        order = -1 if self["INPUT.FORMAT"] == "BGR" else 1
        heads = {"mask": "MASK", "keypoint": "KEYPOINT"}
        pools = ["BOX", *([heads[self.task]] if self.task in heads else [])]
        values = {
            "num_classes": self["MODEL.ROI_HEADS.NUM_CLASSES"] + 1,
            "num_keypoints": self["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"],
            "backbone": {
                "architecture": f"resnet{self['MODEL.RESNETS.DEPTH']}",
                "norm": self._one_of("MODEL.RESNETS.NORM", NORMS),
                "trainable_layers": 5 - self["MODEL.BACKBONE.FREEZE_AT"],
                "fpn_channels": self["MODEL.FPN.OUT_CHANNELS"],
            },
            "rpn": {
                "anchor_sizes": self._anchor_sizes(),
                "anchor_ratios": self._anchor_ratios(),
                "pre_nms": (self["MODEL.RPN.PRE_NMS_TOPK_TRAIN"], self["MODEL.RPN.PRE_NMS_TOPK_TEST"]),
                "post_nms": (self["MODEL.RPN.POST_NMS_TOPK_TRAIN"], self["MODEL.RPN.POST_NMS_TOPK_TEST"]),
                "nms_threshold": self["MODEL.RPN.NMS_THRESH"],
                "batch_per_image": self["MODEL.RPN.BATCH_SIZE_PER_IMAGE"],
            },
            "roi": {
                "box_features": self["MODEL.ROI_BOX_HEAD.FC_DIM"],
                "mask_channels": (self["MODEL.ROI_MASK_HEAD.CONV_DIM"],) * self["MODEL.ROI_MASK_HEAD.NUM_CONV"],
                "keypoint_channels": self["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS"],
                "batch_per_image": self["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"],
                "positive_fraction": self["MODEL.ROI_HEADS.POSITIVE_FRACTION"],
                "score_threshold": self["MODEL.ROI_HEADS.SCORE_THRESH_TEST"],
                "nms_threshold": self["MODEL.ROI_HEADS.NMS_THRESH_TEST"],
                "detections_per_image": self["TEST.DETECTIONS_PER_IMAGE"],
            },
            "image": {
                "min_size": self["INPUT.MIN_SIZE_TEST"],
                "max_size": self["INPUT.MAX_SIZE_TEST"],
                "train_short_sides": self._train_short_sides(),
                "mean": [value / 255 for value in self["MODEL.PIXEL_MEAN"]][::order],
                "std": [value / 255 for value in self["MODEL.PIXEL_STD"]][::order],
            },
            "detectron2": {
                # This project's backbone strides in its 3x3 convolutions.
                "stride_in_1x1": self["MODEL.RESNETS.STRIDE_IN_1X1"] and not self.is_norton,
                "level_strides": STRIDES,
                "anchor_rounding": False,
                "anchor_offset": self["MODEL.ANCHOR_GENERATOR.OFFSET"],
                "roi_align_aligned": self._agreed([f"MODEL.ROI_{head}_HEAD.POOLER_TYPE" for head in pools], POOLERS),
                "roi_sampling_ratio": self._agreed([f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO" for head in pools]),
                "box_delta_weights": self["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"],
                # Detectron2 keeps what is strictly larger. Subnormal numbers may be flushed to zero.
                "proposal_min_size": max(float(smallest), float(np.finfo(np.float32).tiny)),
                "image_resize": "antialiased",
                "mask_paste": "subpixel",
                "keypoint_score": "probability",
            },
        }
        return from_mapping(DetectorSettings, values, self.source)

    def _check_structure(self) -> None:
        required = REQUIRED | REQUIRED_OF_TASK[self.task]
        if self["MODEL.RESNETS.DEPTH"] >= 50:
            required["MODEL.RESNETS.RES2_OUT_CHANNELS"] = 256
        for key, expected in required.items():
            if self[key] != expected:
                raise UserError(
                    f"{self.source}: {key} is {shown(self[key])}, expected {expected!r}: only Faster, Mask, Keypoint "
                    "R-CNN with a ResNet-FPN backbone can be imported"
                )
        layers = self["MODEL.ROI_MASK_HEAD.NUM_CONV"]
        if type(layers) is not int or not 0 <= layers <= LONGEST_LIST:
            raise UserError(
                f"{self.source}: MODEL.ROI_MASK_HEAD.NUM_CONV is {shown(layers)}, expected 0 to {LONGEST_LIST} layers"
            )
        self._one_of("MODEL.BACKBONE.NAME", {"build_resnet_fpn_backbone": 0, NORTON_BACKBONE: 0})
        self._one_of("INPUT.FORMAT", {"BGR": 0, "RGB": 0})
        if self["INPUT.MIN_SIZE_TEST"] < 1:
            raise UserError(f"{self.source}: INPUT.MIN_SIZE_TEST is 0 (no resizing), expected a short side in pixels")

    def _one_of(self, key: str, known: Mapping[str, Any]) -> Any:
        if self[key] not in known:
            raise UserError(f"{self.source}: {key} is {shown(self[key])}, expected one of {', '.join(known)}")
        return known[self[key]]

    def _agreed(self, keys: list[str], known: Mapping[str, Any] | None = None) -> Any:
        """The value that keys of several heads have in common."""
        found = {self[key] for key in keys}
        if len(found) > 1:
            raise UserError(f"{self.source}: {' and '.join(keys)} differ; one detector here pools in one way")
        return self[keys[0]] if known is None else self._one_of(keys[0], known)

    def _train_short_sides(self) -> tuple[int, ...]:
        given = self["INPUT.MIN_SIZE_TRAIN"]
        sides: tuple[int, ...] = (given,) if isinstance(given, int) else given
        if self["INPUT.MIN_SIZE_TRAIN_SAMPLING"] == "range":
            if len(sides) != 2 or not 1 <= sides[0] <= sides[1] <= LARGEST_SIDE:
                raise UserError(
                    f"{self.source}: INPUT.MIN_SIZE_TRAIN is {sides!r}, expected a range of sides in pixels"
                )
            return tuple(range(sides[0], sides[1] + 1))
        return sides

    def _anchor_sizes(self) -> tuple[int, ...]:
        sizes = self["MODEL.ANCHOR_GENERATOR.SIZES"]
        if len(sizes) != len(STRIDES) or any(len(level) != 1 or level[0] != int(level[0]) for level in sizes):
            raise UserError(
                f"{self.source}: MODEL.ANCHOR_GENERATOR.SIZES is {sizes!r}, expected one whole number for each of "
                f"{len(STRIDES)} levels"
            )
        return tuple(int(level[0]) for level in sizes)

    def _anchor_ratios(self) -> tuple[float, ...]:
        ratios = self["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"]
        if len(set(ratios)) != 1:
            raise UserError(
                f"{self.source}: MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS differ between the levels: {ratios!r}"
            )
        return tuple(ratios[0])


def config_of(tree: Mapping[str, Any], source: str) -> Detectron2Config:
    """The configuration in nested sections, as a YAML file or Detectron2's own node has them."""
    known = {name: _plain(value) for name, value in flatten(tree).items() if name in DEFAULTS}
    for name, value in known.items():
        single = name == "INPUT.MIN_SIZE_TRAIN" and type(value) is int
        if not single and not _is_like(value, DEFAULTS[name]):
            raise UserError(f"{source}: {name} is {shown(value)}, expected something like {DEFAULTS[name]!r}")
    return Detectron2Config(DEFAULTS | known, source)


def _is_like(value: Any, example: Any) -> bool:
    """Whether a value is of the example's kind: a finite number, a text, or a sequence of such."""
    if isinstance(example, tuple):
        first = example[0] if example else ""
        return isinstance(value, tuple) and len(value) > 0 and all(_is_like(entry, first) for entry in value)
    if isinstance(example, bool | str):
        return type(value) is type(example)
    return type(value) in (int, float) and abs(value) < 2**53


def read_config(path: str | Path) -> Detectron2Config:
    """Read a Detectron2 YAML file and the files that it is based on.

    Raises:
        UserError: a file is missing, is not plain YAML, or includes itself.
    """
    return config_of(_merged(Path(path), ()), str(path))


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's mapping over that of its `_BASE_`."""
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: is based on itself, through {BASE_KEY}")
    content = read_yaml(path)
    base = content.pop(BASE_KEY, None)
    if base is None:
        return content
    if not isinstance(base, str) or "://" in base:
        raise UserError(f"{path}: {BASE_KEY} {base!r}: expected one file on this machine")
    return _merge(_merged(path.parent / Path(base).expanduser(), (*seen, resolved)), content)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        mine = merged.get(key)
        merged[key] = _merge(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return merged
