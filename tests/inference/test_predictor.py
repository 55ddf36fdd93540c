"""The call that every backend shares, on graphs whose answer is known."""

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch

from norton_deploy.cost.session import provider_options
from norton_deploy.data.image_file import read_image
from norton_deploy.errors import UserError
from norton_deploy.inference.loading import SizeBucketPredictor, load_predictor
from norton_deploy.inference.onnxruntime_backend import with_cuda_graph
from norton_deploy.inference.torch_backend import TorchPredictor, choose_device
from norton_deploy.structures import Categories


def test_box_in_the_graphs_own_size_is_exact(graph, lamp):
    predictor = load_predictor(graph())
    [found] = predictor([lamp((32, 48), (5, 6, 20, 30))])
    np.testing.assert_array_equal(found.boxes, [[5, 6, 20, 30]])
    assert found.image_size == (32, 48)
    assert found.labels.tolist() == [1] and found.scores.tolist() == [1.0]
    assert predictor.input_size == (32, 48) and predictor.backend == "onnxruntime"


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("image_size", [(64, 96), (320, 200), (16, 24), (31, 200)])
def test_box_is_mapped_back_from_the_letterbox(graph, lamp, dtype, image_size):
    height, width = image_size
    box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    [found] = load_predictor(graph(dtype=dtype))([lamp(image_size, box)])
    # The graph sees whole pixels of its own grid, so one of them in image pixels is the error to expect.
    pixel = max(height / 32, width / 48, 1)
    np.testing.assert_allclose(found.boxes[0], box, atol=pixel)


def test_any_number_of_images_of_any_size_keeps_its_order(graph, lamp):
    predictor = load_predictor(graph(batch=2, dtype="float32"))
    sizes = [(32, 48), (64, 96), (32, 48), (96, 144), (32, 48)]
    boxes = [(3 * i, 2 * i, 3 * i + 12, 2 * i + 6) for i in range(5)]
    images = [lamp(size, box) for size, box in zip(sizes, boxes, strict=True)]
    images.append(np.zeros((40, 40, 3), np.uint8))  # nothing to find in this one
    found = predictor(images)
    assert [len(one) for one in found] == [1, 1, 1, 1, 1, 0]
    for one, size, box in zip(found, sizes, boxes, strict=False):
        np.testing.assert_allclose(one.boxes[0], box, atol=size[0] / 32)
        assert one.image_size == size
    assert predictor([]) == []


def test_masks_are_pasted_at_the_images_size(graph, lamp):
    [found] = load_predictor(graph(task="mask"))([lamp((64, 96), (20, 10, 60, 50))])
    assert found.masks.shape == (1, 64, 96)
    # The left half of the box, up to the soft edge of one mask cell.
    assert found.masks[0, 12:48, 22:38].all()
    outside = found.masks[0].copy()
    outside[9:51, 19:42] = False
    assert not outside.any()


def test_keypoints_are_mapped_with_the_boxes(graph, lamp):
    [found] = load_predictor(graph(task="keypoint"))([lamp((64, 96), (20, 10, 60, 50))])
    assert found.keypoints.shape == (1, 2, 3)
    np.testing.assert_allclose(found.keypoints[0, 0, :2], found.boxes[0, :2])
    np.testing.assert_allclose(found.keypoints[0, 1, :2], found.boxes[0, 2:])
    np.testing.assert_array_equal(found.keypoints[0, :, 2], 1)


def test_timing_covers_the_stages_of_the_last_call(graph, lamp, tmp_path):
    predictor = load_predictor(graph())
    predictor([lamp((32, 48), (5, 6, 20, 30))])
    timing = predictor.timing
    assert timing.decode_ms == 0
    assert min(timing.preprocess_ms, timing.copy_ms, timing.infer_ms, timing.postprocess_ms) > 0
    cv2.imwrite(str(tmp_path / "lamp.png"), lamp((32, 48), (5, 6, 20, 30)))
    [(image, found)] = predictor.predict_files([tmp_path / "lamp.png"])
    assert image.shape == (32, 48, 3) and len(found) == 1
    assert predictor.timing.decode_ms > 0
    stages = vars(predictor.timing).values()
    assert predictor.timing.total_ms == pytest.approx(sum(stages))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((4, 4), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        ("lamp.png", "str"),
    ],
)
def test_wrong_images_are_named(graph, image, message):
    with pytest.raises(UserError, match=f"image 2 of 2.*{message}"):
        load_predictor(graph())([np.zeros((4, 4, 3), np.uint8), image])


def test_a_graph_without_letterboxing_takes_its_own_size_only(graph, lamp):
    predictor = load_predictor(graph(resize="none"))
    assert len(predictor([lamp((32, 48), (5, 6, 20, 30))])[0]) == 1
    with pytest.raises(UserError, match=r"exactly 32x48.*got 64x96"):
        predictor([lamp((64, 96), (5, 6, 20, 30))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": 1}, "format 1"),
        ({"task": "pose"}, "'task': .*'pose'"),
        ({"metadata": {"image_size": None}}, "image_size"),
        ({"metadata": {"image_size": [64, 48], "input_size": [64, 48]}}, "contradict"),
        ({"graph_dtype": "float32"}, "contradict"),
        ({"skip_output": "scores"}, "lacks the outputs scores"),
        ({"categories": {"labels": [], "ids": [], "names": []}}, "categor"),
        ({"metadata": {"batch": 0}}, "positive"),
    ],
)
def test_graphs_that_contradict_their_metadata_are_refused(graph, options, message):
    path = graph(**options)
    with pytest.raises(UserError, match=message):
        load_predictor(path)


def test_foreign_and_broken_files_are_refused(graph, tmp_path):
    path = graph()
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:200])
    for name in ("model.pt", "model.bin"):
        (tmp_path / name).write_bytes(b"")
    for name, message in [
        ("foreign.onnx", "no 'norton_deploy' metadata"),
        ("cut.onnx", "cannot load"),
        ("absent.onnx", "no such model file"),
        ("model.pt", "not a file of plain tensors"),
        ("model.bin", "unknown kind"),
    ]:
        with pytest.raises(UserError, match=message):
            load_predictor(tmp_path / name)


def test_device_and_provider_mistakes(graph):
    path = graph()
    with pytest.raises(UserError, match="NoSuchProvider"):
        load_predictor(path, providers=["NoSuchProvider"])
    with pytest.raises(UserError, match=r"TensorrtExecutionProvider: needs TensorRT 10.*norton export_trt"):
        load_predictor(path, providers=["TensorrtExecutionProvider", "CUDAExecutionProvider"])
    with pytest.raises(UserError, match="contradicts"):
        load_predictor(path, device="cuda", providers=["CPUExecutionProvider"])
    with pytest.raises(UserError, match="expected cpu, cuda"):
        load_predictor(path, device="tpu")
    with pytest.raises(UserError, match="score_threshold"):
        load_predictor(path, score_threshold=2.0)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"0 CUDA GPU|ONNX Runtime has no"):
            load_predictor(path, device="cuda")
        with pytest.raises(UserError, match="0 CUDA GPU"):
            choose_device("cuda:1")


def test_on_a_gpu_standard_operators_become_a_cuda_graph(graph, caplog):
    contract = load_predictor(graph(), device="cpu").contract
    assert with_cuda_graph("plain", contract, lambda: pytest.fail("opened")) == (
        "plain",
        "no CUDA graph (NonMaxSuppression)",
    )
    assert "export_onnx --target tensorrt" in caplog.text
    standard = replace(contract, target="tensorrt")
    assert with_cuda_graph("plain", standard, lambda: "recorded") == ("recorded", "CUDA graph")

    def refused() -> None:
        raise UserError("a node is on the CPU")

    assert with_cuda_graph("plain", standard, refused) == ("plain", "no CUDA graph (a node is on the CPU)")
    told = provider_options("CUDAExecutionProvider", 1, cuda_graph=True)
    assert told == {"device_id": "1", "use_tf32": "0", "enable_cuda_graph": "1"}
    assert provider_options("CUDAExecutionProvider", 0)["enable_cuda_graph"] == "0"


def test_results_are_the_callers_own(graph, lamp):
    predictor = load_predictor(graph(), device="cpu")
    first = predictor.run(lamp((32, 48), (5, 6, 20, 30))[None])
    kept = {name: value.copy() for name, value in first.items()}
    predictor.run(lamp((32, 48), (1, 2, 9, 9))[None])
    for name, value in kept.items():
        np.testing.assert_array_equal(first[name], value)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_finds_what_calls_find(graph, lamp, batch):
    sizes = [(32, 48), (64, 96), (31, 200), (16, 24), (32, 48)]
    images = [lamp(size, (3 + index, 4, 20, 15)) for index, size in enumerate(sizes)]
    predictor = load_predictor(graph(batch=batch), device="cpu")
    expected = predictor(images)
    ahead: list[int] = []
    frames = (ahead.append(index) or image for index, image in enumerate(images))
    for index, found in enumerate(predictor.stream(frames)):
        assert max(ahead) <= index + 2 * batch
        np.testing.assert_array_equal(found.boxes, expected[index].boxes)
        assert found.image_size == sizes[index]
    assert index == 4 and list(predictor.stream([])) == []
    with pytest.raises(UserError, match="uint8"):
        list(predictor.stream([images[0], images[1].astype(float)]))


def test_score_threshold(graph, lamp):
    image = lamp((32, 48), (5, 6, 20, 30))
    assert len(load_predictor(graph(), score_threshold=1.0)([image])[0]) == 1
    with pytest.raises(UserError, match=r"below 0\.3"):
        load_predictor(graph(score_threshold=0.3), score_threshold=0.1)


def test_buckets_choose_the_nearest_aspect_ratio(graph, lamp, tmp_path):
    graph("landscape.onnx", image_size=(32, 64))
    graph("portrait.onnx", image_size=(64, 32))
    predictor = load_predictor(tmp_path)
    assert isinstance(predictor, SizeBucketPredictor) and predictor.input_size is None
    for size, name in [((30, 60), "landscape"), ((100, 99), "portrait"), ((99, 100), "landscape")]:
        assert Path(predictor.bucket_of(size).name).stem == name
    images = [lamp((64, 32), (4, 8, 20, 40)), lamp((32, 64), (8, 4, 40, 20)), lamp((64, 32), (0, 0, 9, 9))]
    found = predictor(images)
    np.testing.assert_array_equal([one.boxes[0] for one in found], [[4, 8, 20, 40], [8, 4, 40, 20], [0, 0, 9, 9]])
    assert predictor.timing.infer_ms > 0


def test_buckets_must_be_one_model(graph, tmp_path):
    first = graph("a.onnx", image_size=(32, 64))
    for name, options, message in [
        ("b.onnx", {"image_size": (64, 32), "weights_sha256": "1" * 64}, "different weights"),
        ("c.onnx", {"image_size": (64, 32), "task": "mask"}, "not one model"),
        ("d.onnx", {"image_size": (64, 128)}, "same aspect ratio"),
    ]:
        with pytest.raises(UserError, match=message):
            load_predictor([first, graph(name, **options)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.onnx"):
        load_predictor(tmp_path / "empty")
    with pytest.raises(UserError, match="empty"):
        load_predictor([])


class FakeDetector(torch.nn.Module):
    """Returns one box per image, as large as the image, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rpn, self.roi_heads = torch.nn.Module(), torch.nn.Module()
        self.rpn.head, self.roi_heads.box_predictor = torch.nn.Identity(), torch.nn.Identity()
        self.batches: list[list[tuple[int, ...]]] = []

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.batches.append([tuple(image.shape) for image in images])
        outputs = []
        for image in images:
            height, width = image.shape[1:]
            masks = torch.full((2, 1, height, width), 0.6)
            masks[:, :, : height // 2] = 0.4
            outputs.append(
                {
                    "boxes": torch.tensor([[0.0, 0.0, width, height]] * 2),
                    "scores": torch.stack([image.max(), image.min()]),
                    "labels": torch.tensor([1, 12]),
                    "masks": masks,
                }
            )
        return outputs


def test_torch_batches_only_equal_neighbours_and_drops_unknown_labels():
    model = FakeDetector()
    predictor = TorchPredictor(model, "mask", Categories((1,), (7,), ("lamp",)), score_threshold=0.2, device="cpu")
    sizes = [(8, 6)] * 9 + [(4, 6), (8, 6)]
    images = [np.full((*size, 3), 51 * (index % 5), np.uint8) for index, size in enumerate(sizes)]
    found = predictor(images)
    assert [len(batch) for batch in model.batches] == [8, 1, 1, 1]
    assert [one.image_size for one in found] == sizes
    assert [len(one) for one in found] == [1] * 11  # label 12 has no category
    np.testing.assert_allclose([one.scores[0] for one in found], [0.2 * (i % 5) for i in range(11)], atol=1e-6)
    assert found[0].masks[0, 4:].all() and not found[0].masks[0, :4].any()
    assert model.roi_heads.score_thresh == 0.2
    assert math.isclose(predictor.timing.total_ms, sum(vars(predictor.timing).values()))


def test_read_image_is_rgb_and_names_bad_files(tmp_path):
    red = np.zeros((4, 5, 3), np.uint8)
    red[..., 2] = 255  # OpenCV writes BGR
    cv2.imwrite(str(tmp_path / "red.png"), red)
    np.testing.assert_array_equal(read_image(tmp_path / "red.png")[0, 0], [255, 0, 0])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("text.jpg", "empty.jpg", "absent.jpg"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)


def test_inexact_shortcuts_are_counted_and_reported_once(graph, lamp, caplog):
    image = lamp((32, 48), (5, 6, 20, 30))
    exact = load_predictor(graph("exact.onnx", flag=True))
    exact([image])
    assert exact.inexact_batches == 0 and not caplog.records
    inexact = load_predictor(graph("inexact.onnx", flag=False))
    inexact([image, image])
    assert inexact.inexact_batches == 2
    assert [record.message.split(": ")[1] for record in caplog.records] == ["nms_converged is false"]
