"""COCO-2017 (or anything in its layout) as a detection dataset for torchvision's detectors."""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from norton_deploy.data.coco_entries import NUM_KEYPOINTS, SMALLEST_BOX_SIDE, Entry, clipped_box, is_degenerate
from norton_deploy.data.coco_index import Split, annotation_file, image_folder, read_annotations, read_pixels
from norton_deploy.data.run_lengths import decode_segmentation
from norton_deploy.data.transforms import DetectionTransform, Target, generator_for
from norton_deploy.errors import UserError
from norton_deploy.files import path_below
from norton_deploy.structures import Categories, Task


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images and targets of one split.

    The targets leave out, as torchvision's reference training does, crowds (`iscrowd`), boxes less than 1 px
    wide or high inside the image (one warning with the count) and, for task "keypoint", people without a
    labelled keypoint. The ground truth for evaluation, `coco`, has all of them.

    Pictures are upright, as their EXIF orientation says, and annotations are taken to belong to the upright picture.
    Item i is (image uint8 [3, H, W] RGB, or float32 0..1 where a transform makes it so, target) with
        boxes     float32 [N, 4], xyxy in pixels
        labels    int64 [N], model labels (`categories` translates)
        area      float32 [N], the annotation's area in square pixels
        iscrowd   int64 [N], all 0
        image_id  int
        masks     uint8 [N, H, W] of 0 and 1, only for task "mask"
        keypoints float32 [N, 17, 3], x, y, v, only for task "keypoint"
    An image without objects has N = 0.

    Args:
        root: folder with train2017/, val2017/ and annotations/.
        task: "box", "mask" (instances_*.json) or "keypoint" (person_keypoints_*.json).
        categories: labels to use, for example those of a checkpoint; by default those of the file.
        transforms: changes image and target, seeded by (seed, epoch, image id).
        keep_empty: keep images that have nothing to learn a box from, as negatives.
        skip_bad: leave out bad images and annotations with one counted warning.

    Attributes:
        image_ids: COCO image ids in the order of the items.

    Raises:
        UserError: see `read_annotations`; or the file has categories that `categories` lacks, or
            has them under other ids.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        task: Task,
        *,
        categories: Categories | None = None,
        transforms: DetectionTransform | None = None,
        seed: int = 0,
        keep_empty: bool = True,
        skip_bad: bool = False,
    ) -> None:
        self.root, self.split, self.task = Path(root), split, task
        self.transforms, self.seed, self.epoch = transforms, seed, 0
        images, annotations, category_entries = read_annotations(root, split, task, skip_bad=skip_bad)
        source = annotation_file(root, split, task)
        self._category_entries = category_entries
        self.categories = Categories.from_coco(category_entries) if categories is None else categories
        unknown = [entry for entry in category_entries if entry["id"] not in self.categories.label_of_id]
        if unknown:
            raise UserError(
                f"{source}: category {unknown[0]['id']} ({unknown[0]['name']}) is unknown to the model, which has "
                + ", ".join(self.categories.names)
            )
        names = dict(zip(self.categories.ids, self.categories.names, strict=True))
        renamed = [entry for entry in category_entries if entry["name"] != names[entry["id"]]]
        elsewhere = [entry for entry in renamed if entry["name"] in self.categories.names]
        if elsewhere:
            entry = elsewhere[0]
            own = self.categories.ids[self.categories.names.index(entry["name"])]
            raise UserError(
                f"{source}: category {entry['id']} is '{entry['name']}' here, and to the model "
                f"'{names[entry['id']]}'; '{entry['name']}' is its {own} ({len(elsewhere)} such in all): give the "
                "categories in the order in which the model has them"
            )
        if renamed:
            warnings.warn(
                f"{source}: category {renamed[0]['id']} is '{renamed[0]['name']}' here and '{names[renamed[0]['id']]}' "
                f"to the model ({len(renamed)} such in all); are these the same objects?",
                stacklevel=2,
            )
        degenerate = sum(
            not entry["iscrowd"] and is_degenerate(entry, image)
            for image, entries in zip(images, annotations, strict=True)
            for entry in entries
        )
        if degenerate:
            warnings.warn(
                f"{source}: {degenerate} boxes are less than {SMALLEST_BOX_SIDE:g} px wide or high and are not "
                "trained on",
                stacklevel=2,
            )
        pairs = [
            (image, entries)
            for image, entries in zip(images, annotations, strict=True)
            if keep_empty or any(self._is_target(entry, image) for entry in entries)
        ]
        if not pairs:
            raise UserError(f"{source}: no image has an object to train on")
        self.image_ids = [int(image["id"]) for image, _ in pairs]
        self._image_sizes = np.array([(image["height"], image["width"]) for image, _ in pairs], np.int64)
        # One flat buffer instead of a million Python objects: worker processes share it, whereas reading
        # objects changes their reference counts and so copies their memory in every worker.
        records = [pickle.dumps(pair, pickle.HIGHEST_PROTOCOL) for pair in pairs]
        self._offsets = np.cumsum([0, *map(len, records)])
        self._records = np.frombuffer(b"".join(records), np.uint8)

    def __len__(self) -> int:
        return len(self.image_ids)

    def _record(self, index: int) -> tuple[Entry, list[Entry]]:
        start, end = self._offsets[index], self._offsets[index + 1]
        record: tuple[Entry, list[Entry]] = pickle.loads(self._records[start:end].tobytes())
        return record

    def _is_target(self, entry: Entry, image: Entry) -> bool:
        if entry["iscrowd"] or is_degenerate(entry, image):
            return False
        return self.task != "keypoint" or any(visibility > 0 for visibility in entry["keypoints"][2::3])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that seeds the transforms; call it before the epoch's DataLoader starts workers."""
        self.epoch = epoch

    def image_sizes(self) -> npt.NDArray[np.int64]:
        """(height, width) in pixels of every image, [len(self), 2], from the annotation file."""
        return self._image_sizes

    @cached_property
    def coco(self) -> COCO:
        """The ground truth of these images for pycocotools' evaluation; built at first use."""
        pairs = [self._record(index) for index in range(len(self))]
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [image for image, _ in pairs],
            "annotations": [entry for _, entries in pairs for entry in entries],
            "categories": self._category_entries,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth

    def pixels(self, index: int) -> npt.NDArray[np.uint8]:
        """Item `index` untransformed, uint8 [H, W, 3] RGB.

        Raises:
            UserError: the file is missing, truncated or not of the size that the annotations say.
        """
        height, width = (int(side) for side in self._image_sizes[index])
        path = path_below(image_folder(self.root, self.split), self._record(index)[0]["file_name"])
        return read_pixels(path, self.image_ids[index], (height, width))

    def target(self, index: int) -> Target:
        """Target of item `index`, untransformed; the image is not read."""
        image, entries = self._record(index)
        entries = [entry for entry in entries if self._is_target(entry, image)]
        label_of_id = self.categories.label_of_id
        target: Target = {
            "boxes": torch.tensor([clipped_box(entry, image) for entry in entries]).float().reshape(-1, 4),
            "labels": torch.tensor([label_of_id[entry["category_id"]] for entry in entries], dtype=torch.int64),
            "area": torch.tensor([float(entry["area"]) for entry in entries], dtype=torch.float32),
            "iscrowd": torch.zeros(len(entries), dtype=torch.int64),
            "image_id": int(image["id"]),
        }
        image_size = (int(image["height"]), int(image["width"]))
        if self.task == "mask":
            masks = [decode_segmentation(entry["segmentation"], image_size) for entry in entries]
            target["masks"] = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *image_size), np.uint8))
        if self.task == "keypoint":
            points = torch.tensor([entry["keypoints"] for entry in entries], dtype=torch.float32)
            target["keypoints"] = points.reshape(-1, NUM_KEYPOINTS, 3)
        return target

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image = torch.from_numpy(self.pixels(index)).permute(2, 0, 1).contiguous()
        target = self.target(index)
        if self.transforms is not None:
            rng = generator_for(self.seed, self.epoch, self.image_ids[index])
            image, target = self.transforms(image, target, rng)
        return image, target
