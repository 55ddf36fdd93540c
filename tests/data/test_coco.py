"""CocoDetection against a hand-written dataset, and its complaints."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.run_lengths import decode_segmentation
from norton_deploy.errors import UserError
from norton_deploy.structures import Categories, Task

pytestmark = pytest.mark.filterwarnings("ignore:.*px wide or high")


def test_targets_are_what_the_file_says(hand_made: Any) -> None:
    dataset = CocoDetection(hand_made.write(), "train", "mask")
    assert dataset.image_ids == [3, 5, 7]
    assert dataset.image_sizes().tolist() == [[40, 60]] * 3
    assert dataset.categories.names == ("person", "sports ball")
    image, target = dataset[0]
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    assert image[0, 20, 0] < 13 and image[0, 20, -1] > 242  # red rises to the right: RGB
    assert image[1, 20, 0] > 242 and abs(float(image[2].float().mean()) - 100) < 5
    assert target["boxes"].tolist() == [[10, 10, 30, 20], [0, 0, 2, 40]]  # the crowd is left out
    assert target["labels"].tolist() == [1, 2]
    assert target["area"].tolist() == [200, 80]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["image_id"] == 3
    expected = np.zeros((2, 40, 60), np.uint8)
    expected[0, 10:20, 10:30] = 1
    expected[1, :, :2] = 1
    assert target["masks"].dtype == torch.uint8
    assert np.array_equal(target["masks"].numpy(), expected)


@pytest.mark.parametrize("task", ["box", "mask"])
def test_missing_areas_are_computed_of_masks_or_boxes(hand_made: Any, task: Task) -> None:
    del hand_made.annotations[0]["area"]
    hand_made.annotations[1].update(area=None, segmentation={"counts": [0, 40, 2360], "size": [40, 60]})
    if task == "box":
        del hand_made.annotations[1]["segmentation"]
    with pytest.warns(UserWarning, match=r"2 annotations have no 'area', it was computed .* the first is id 1"):
        dataset = CocoDetection(hand_made.write(), "train", task)
    assert dataset.target(0)["area"].tolist() == [200, 80 if task == "box" else 40]
    assert [entry["area"] for entry in dataset.coco.loadAnns([1, 2])] == [200, 80 if task == "box" else 40]


def test_boxes_are_clipped_and_degenerate_ones_dropped_with_one_count(hand_made: Any) -> None:
    with pytest.warns(UserWarning, match=r"1 boxes are less than 1 px") as caught:
        dataset = CocoDetection(hand_made.write(), "train", "box")
    assert len(caught) == 1
    target = dataset.target(2)
    assert target["boxes"].tolist() == [[50, 30, 60, 40]]
    assert "masks" not in target and "keypoints" not in target
    assert len(dataset.coco.anns) == 5  # evaluation sees all of them


def test_image_without_objects(hand_made: Any) -> None:
    root = hand_made.write()
    target = CocoDetection(root, "train", "mask").target(1)
    assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, 40, 60)
    assert CocoDetection(root, "train", "mask", keep_empty=False).image_ids == [3, 7]


def test_keypoint_task_keeps_people_with_a_labelled_keypoint(hand_made: Any) -> None:
    dataset = CocoDetection(hand_made.write(), "val", "keypoint")
    assert dataset.categories.names == ("person",) and dataset.categories.num_classes == 2
    target = dataset.target(0)
    assert target["keypoints"].shape == (1, 17, 3)
    assert target["keypoints"][0, 0].tolist() == [15, 12, 2]
    assert target["keypoints"][0, 5].tolist() == [20, 15, 1]
    assert target["keypoints"][0, 1].tolist() == [0, 0, 0]
    assert dataset.target(2)["keypoints"].shape == (0, 17, 3)
    assert sorted(dataset.coco.anns) == [1, 3, 4]


@pytest.mark.parametrize("form", ["polygon", "counts", "compressed"])
def test_every_form_of_segmentation(form: str) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 6:16] = 1
    forms: dict[str, Any] = {
        "polygon": [[6, 4, 16, 4, 16, 9, 6, 9]],
        "counts": {"counts": [124, *[5, 15] * 9, 5, 600 - 124 - 9 * 20 - 5], "size": [20, 30]},
        "compressed": coco_mask.encode(np.asfortranarray(mask)),
    }
    assert np.array_equal(decode_segmentation(forms[form], (20, 30)), mask)


def test_compressed_run_lengths_are_pycocotools_own() -> None:
    rng = np.random.default_rng(0)
    for size in [(1, 1), (3, 7), (64, 50), (300, 999)]:
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = (rng.random(size) < share).astype(np.uint8)
            encoded = coco_mask.encode(np.asfortranarray(mask))
            assert np.array_equal(decode_segmentation(encoded, size), mask)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
def test_other_colour_modes_become_rgb(hand_made: Any, mode: str) -> None:
    root = hand_made.write()
    picture = Image.new("RGB", (60, 40), (200, 200, 200)).convert(mode)
    picture.save(root / "train2017/3.jpg", "PNG" if mode == "RGBA" else "JPEG")
    image, _ = CocoDetection(root, "train", "box")[0]
    assert image.shape == (3, 40, 60)
    assert torch.allclose(image.float(), torch.tensor(200.0), atol=5)


def test_pictures_are_read_upright_and_annotations_for_the_stored_picture_are_named(hand_made: Any) -> None:
    root = hand_made.write()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 60)).save(root / "train2017/3.jpg", exif=exif)
    assert CocoDetection(root, "train", "box")[0][0].shape == (3, 40, 60)
    Image.new("RGB", (60, 40)).save(root / "train2017/3.jpg", exif=exif)
    with pytest.raises(UserError, match=r"40 x 60 pixels upright, the annotations say 60 x 40, as the file is stored"):
        CocoDetection(root, "train", "box")[0]
    with pytest.warns(UserWarning, match="skipped 1 bad images; the first was image id 3: .*upright"):
        assert CocoDetection(root, "train", "box", skip_bad=True).image_ids == [5, 7]


def _break(index: int, **changes: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        data.annotations[index].update(changes)

    return change


def _remove(where: str, index: int, field: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        del getattr(data, where)[index][field]

    return change


def _replace(where: str, index: int) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        getattr(data, where)[index] = None

    return change


BROKEN: list[tuple[Task, Callable[[Any], None], str]] = [
    ("box", _break(0, image_id=99), "annotation id 1: points to image id 99"),
    ("box", _break(1, category_id=99), "annotation id 2: points to category id 99"),
    ("box", _break(0, id=2), "annotation id 2: there is another"),
    ("box", _break(0, id=0), "annotation id 0"),
    ("box", _break(3, bbox=[1, 2, 3]), "annotation id 4: 'bbox' must be four numbers"),
    ("box", _break(3, bbox=[1, 2, 3, float("nan")]), "annotation id 4: 'bbox'"),
    ("box", _remove("annotations", 3, "bbox"), "annotation id 4: the field 'bbox' is missing"),
    ("box", _remove("images", 0, "height"), "image id 7: the field 'height' is missing"),
    ("box", _remove("images", 0, "file_name"), "image id 7: the field 'file_name' is missing"),
    ("box", lambda data: data.images[0].update(id=3), "image id 3: there is another"),
    ("box", _break(0, id=10**400), "'id' must be an integer from 1 to"),
    ("box", _break(3, area=-1), "annotation id 4: 'area'"),
    ("box", _break(3, area=10**400), "annotation id 4: 'area'"),
    ("box", _break(3, bbox=[0, 0, -1, 5]), "annotation id 4: 'bbox' has a negative"),
    ("box", _break(3, bbox=[0, 0, 1e10, 5]), "annotation id 4: 'bbox': x from 0 to 1"),
    (
        "box",
        _break(3, bbox=[0, -41, 1, 5]),
        "'bbox': y from -41 to -36: expected finite numbers, at most 1 image sides outside 0..40",
    ),
    ("box", _break(3, iscrowd=None), "annotation id 4: 'iscrowd'"),
    ("box", lambda data: data.images[0].update(height=10**9), "image id 7: 'height' x 'width' is more than"),
    ("box", lambda data: data.images[0].update(height=-40), "image id 7: 'height' must be a positive"),
    ("box", lambda data: data.images[0].update(width=True), "image id 7: 'width' must be a positive"),
    (
        "box",
        lambda data: data.images[0].update(file_name="../val2017/7.jpg"),
        "expected a relative path that stays",
    ),
    ("box", lambda data: data.images[0].update(file_name="/etc/passwd"), "expected a relative path that stays"),
    ("box", lambda data: data.images[0].update(file_name="a\0b"), "expected a relative path that stays"),
    ("keypoint", _break(0, keypoints=[1e9] * 51), "annotation id 1: 'keypoints': x"),
    ("keypoint", _break(0, keypoints=[7] * 51), "annotation id 1: 'keypoints': v"),
    ("keypoint", _break(0, num_keypoints=None), "annotation id 1: 'num_keypoints'"),
    ("mask", _break(3, segmentation=[[float("nan"), 1, 2, 3, 4, 5]]), "annotation id 4: 'segmentation': x"),
    ("mask", _break(3, segmentation=[[1, float("-inf"), 2, float("inf"), 4, 5]]), "annotation id 4: 'segmentation': y"),
    ("mask", _break(3, segmentation=[[2**31, 1, 2, 3, 4, 5]]), "annotation id 4: 'segmentation': x"),
    ("mask", _break(3, segmentation=[[1, 10**400, 2, 3.5, 4, 5]]), "annotation id 4: 'segmentation': y"),
    (
        "mask",
        _break(3, segmentation=[[0, 0, 60, 40] * 10000]),
        "annotation id 4: 'segmentation': its outline is 2000000",
    ),
    ("mask", _break(1, segmentation={"counts": "", "size": [40, 60]}), "annotation id 2: its RLE"),
    ("mask", _break(1, segmentation={"counts": "0", "size": [40, 60]}), "annotation id 2: its RLE covers 0 of"),
    ("mask", _break(1, segmentation={"counts": "11111111", "size": [40, 60]}), "annotation id 2: its RLE"),
    (
        "mask",
        _break(1, segmentation={"counts": "PPPP", "size": [40, 60]}),
        "annotation id 2: its RLE's 'counts' is",
    ),
    (
        "mask",
        _break(1, segmentation={"counts": "é", "size": [40, 60]}),
        "annotation id 2: its RLE's 'counts' is no",
    ),
    ("mask", _break(1, segmentation={"counts": [-80, 80, 2400], "size": [40, 60]}), "annotation id 2: its RLE"),
    ("mask", _break(1, segmentation={"counts": [2400], "size": None}), "annotation id 2: its RLE"),
    ("mask", _break(3, segmentation=[]), "annotation id 4: 'segmentation'"),
    ("mask", _break(3, segmentation=[[1, 2, 3]]), "annotation id 4: 'segmentation'"),
    ("mask", _break(1, segmentation={"counts": [2400], "size": [60, 40]}), "annotation id 2: its RLE"),
    ("mask", _break(1, segmentation={"counts": [2399], "size": [40, 60]}), "annotation id 2: its RLE"),
    ("mask", _break(3, segmentation=[[1, 2, "x", 4, 5, 6]]), "annotation id 4: 'segmentation'"),
    ("mask", _break(3, segmentation=[[None] * 6]), "annotation id 4: 'segmentation'"),
    ("mask", _break(1, segmentation={"counts": None, "size": [40, 60]}), "annotation id 2: its RLE needs 'counts'"),
    ("box", _break(3, iscrowd="no"), "annotation id 4: 'iscrowd' must be 0 or 1"),
    ("box", _break(3, image_id=[1]), "annotation id 4: 'image_id' must be an integer from 0 to 2**53 - 1, got [1]"),
    ("box", _replace("annotations", 3), "annotation id (entry 3): expected an object"),
    ("box", _replace("images", 0), "image id (entry 0): expected an object"),
    ("box", lambda data: data.images[0].update(id="abc"), "image id 'abc': 'id' must be an integer"),
    ("box", lambda data: data.images[0].update(file_name=5), "image id 7: 'file_name' must be a string"),
    ("keypoint", _break(3, keypoints=[0] * 48), "annotation id 4: 'keypoints' must be 51 numbers"),
]


@pytest.mark.parametrize(("task", "change", "message"), BROKEN, ids=[case[2] for case in BROKEN])
def test_bad_entries_are_named_or_skipped(
    hand_made: Any, task: Task, change: Callable[[Any], None], message: str
) -> None:
    change(hand_made)
    root = hand_made.write()
    with pytest.raises(UserError) as caught:
        CocoDetection(root, "train", task)
    assert message in str(caught.value)
    assert str(root / "annotations") in str(caught.value)
    with pytest.warns(UserWarning, match="skipped") as warned:
        dataset = CocoDetection(root, "train", task, skip_bad=True)
    assert sum("skipped" in str(warning.message) for warning in warned) == 1
    for index in range(len(dataset)):
        dataset[index]


def test_missing_image_file(hand_made: Any) -> None:
    root = hand_made.write()
    (root / "train2017/5.jpg").unlink()
    with pytest.raises(UserError, match=r"image id 5: its file .*5\.jpg is missing"):
        CocoDetection(root, "train", "box")
    with pytest.warns(UserWarning, match="skipped 1 bad images"):
        assert CocoDetection(root, "train", "box", skip_bad=True).image_ids == [3, 7]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-300])


def _wrong_size(file: Path) -> None:
    Image.new("RGB", (61, 40)).save(file)


def _no_image(file: Path) -> None:
    file.write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize("damage", [_truncate, _wrong_size, _no_image])
def test_damaged_image_file(hand_made: Any, damage: Callable[[Path], None]) -> None:
    root = hand_made.write()
    damage(root / "train2017/3.jpg")
    with pytest.raises(UserError, match=r"3\.jpg: .* \(image id 3; --skip-bad"):
        CocoDetection(root, "train", "box")[0]
    with pytest.warns(UserWarning, match="skipped 1 bad images; the first was image id 3"):
        dataset = CocoDetection(root, "train", "box", skip_bad=True)
    assert dataset.image_ids == [5, 7]
    assert {entry["image_id"] for entry in dataset.coco.anns.values()} == {7}


def test_missing_layout_says_what_is_expected(hand_made: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"instances_train2017\.json: not found; expected COCO's layout"):
        CocoDetection(tmp_path, "train", "box")
    root = hand_made.write(pictures=False)
    (root / "train2017").rmdir()
    with pytest.raises(UserError, match="train2017: not found"):
        CocoDetection(root, "train", "box")
    (root / "annotations/instances_train2017.json").write_text('{"images": [')
    with pytest.raises(UserError, match="not valid JSON"):
        CocoDetection(root, "train", "box")
    (root / "annotations/instances_train2017.json").write_text("[]")
    with pytest.raises(UserError, match="no COCO annotation file"):
        CocoDetection(root, "train", "box")


def test_a_broken_category_is_named(hand_made: Any) -> None:
    hand_made.categories[0] = None
    with pytest.raises(UserError, match=r"category id \(entry 0\): expected an object with fields, got None"):
        CocoDetection(hand_made.write(), "train", "box")


def test_another_name_for_a_known_category_is_remarked_upon(hand_made: Any) -> None:
    root = hand_made.write()
    own = CocoDetection(root, "train", "box").categories
    theirs = Categories(own.labels, own.ids, ("cup", *own.names[1:]))
    with pytest.warns(UserWarning, match=f"category {own.ids[0]} is '{own.names[0]}' here and 'cup' to the model"):
        CocoDetection(root, "train", "box", categories=theirs)


def test_given_categories_decide_the_labels(hand_made: Any) -> None:
    root = hand_made.write()
    theirs = Categories((4, 9), (1, 37), ("person", "sports ball"))
    assert CocoDetection(root, "val", "box", categories=theirs).target(0)["labels"].tolist() == [4, 9]
    with pytest.raises(UserError, match=r"category 37 \(sports ball\) is unknown"):
        CocoDetection(root, "val", "box", categories=Categories((1,), (1,), ("person",)))
    with pytest.raises(UserError, match="1 is 'person' here, and to the model 'sports ball'; 'person' is its 37"):
        CocoDetection(root, "val", "box", categories=Categories((1, 2), (1, 37), ("sports ball", "person")))


def test_ground_truth_scores_one_against_itself(tiny_coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.cocoeval import COCOeval

    truth = CocoDetection(tiny_coco, "train", "mask").coco
    assert capsys.readouterr().out == ""
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0,
         "segmentation": truth.annToRLE(a)}
        for a in truth.anns.values() if not a["iscrowd"]
    ]  # fmt: skip
    for measure in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes(perfect), measure)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)


def test_workers_and_epochs_repeat_exactly(tiny_coco: Path) -> None:
    from torch.utils.data import DataLoader

    from norton_deploy.data.transforms import training_transform

    transform = training_transform(photometric=True)
    dataset = CocoDetection(tiny_coco, "train", "mask", transforms=transform, seed=4)
    dataset.set_epoch(2)
    alone = [dataset[index][0] for index in range(len(dataset))]
    torch.rand(5)
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    for image, (worker_image, _) in zip(alone, loader, strict=True):
        # A worker has one thread, so sums may be rounded otherwise; other random numbers differ by far more.
        torch.testing.assert_close(image, worker_image, atol=1e-5, rtol=0)
    dataset.set_epoch(3)
    assert any(not torch.equal(dataset[i][0], alone[i]) for i in range(len(dataset)))


def test_no_warning_on_a_sound_dataset(tiny_coco: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for task in ("box", "mask", "keypoint"):
            CocoDetection(tiny_coco, "val", task, skip_bad=True)[0]  # type: ignore[arg-type]


def test_file_without_iscrowd_means_no_crowd(hand_made: Any) -> None:
    for annotation in hand_made.annotations:
        annotation.pop("iscrowd")
    dataset = CocoDetection(hand_made.write(), "train", "box")
    assert len(dataset.target(0)["boxes"]) == 3
    assert all(entry["iscrowd"] == 0 for entry in dataset.coco.anns.values())


def test_spawned_workers_receive_the_same_dataset(tiny_coco: Path) -> None:
    dataset = CocoDetection(tiny_coco, "train", "box")
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3][0], dataset[3][0])
    assert torch.equal(copy.target(3)["boxes"], dataset.target(3)["boxes"])
