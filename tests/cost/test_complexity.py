"""The counter against closed forms and against the figures of the paper's models."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.compress import apply_structure
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Task

TABLE3 = CompressionPlan.load(Path(__file__).parents[2] / "configs" / "plans" / "table3.yaml")


def test_closed_forms() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), stride=2, padding=(1, 2)),  # 8 x 8 outputs from 16 x 16
        FrozenBatchNorm2d(8),
        nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=False),  # 16 x 16 outputs
        nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 16 * 16, 10),
    )
    count = count_complexity(model, (16, 16))
    macs = [8 * 8 * 8 * 3 * 15, 0, 8 * 8 * 8 * 6 * 16, 16 * 16 * 6 * 2 * 9, 1536 * 10]
    assert [layer.macs for layer in count.layers] == macs
    assert count.macs == sum(macs)
    assert count.params == (8 * 45 + 8) + 16 + 8 * 6 * 16 + 6 * 2 * 9 + 15370


def test_an_unknown_layer_is_an_error() -> None:
    with pytest.raises(TypeError, match="Bilinear"):
        count_complexity(_Odd(), (4, 4))


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[0, 0], x[0, 0])


def test_resnet50_at_224() -> None:
    dense = ClassifierSettings("resnet50").build()
    before = count_complexity(dense, (224, 224))
    assert (before.macs, before.params) == (4_089_184_256, 25_557_032)
    after = count_complexity(apply_structure(dense, TABLE3), (224, 224))
    assert (after.macs, after.params) == (899_619_808, 5_885_736)


@pytest.mark.parametrize(
    ("task", "dense_macs", "macs", "dense_params", "params"),
    [
        ("box", 134_379_721_216, 93_034_741_216, 41_808_406, 22_012_182),
        ("mask", 134_379_721_216, 93_034_741_216, 44_454_513, 24_658_289),
        ("keypoint", 133_924_041_216, 92_579_061_216, 59_190_378, 39_394_154),
    ],
)
def test_detectors_at_800(task: Task, dense_macs: int, macs: int, dense_params: int, params: int) -> None:
    model = DetectorSettings(num_classes=2 if task == "keypoint" else 91).build(task)
    before = count_complexity(model, (800, 800))
    assert (before.macs, before.params) == (dense_macs, dense_params)
    after = count_complexity(apply_structure(model, TABLE3), (800, 800))
    assert (after.macs, after.params) == (macs, params)


def test_keypoint_head_of_a_hundred_people() -> None:
    model = DetectorSettings(num_classes=2).build("keypoint")
    extra = count_complexity(model, (320, 320), detections=100).macs - count_complexity(model, (320, 320)).macs
    head = 14 * 14 * 9 * 512 * (256 + 7 * 512)
    transposed = 14 * 14 * 512 * 17 * 16
    assert extra == 100 * (head + transposed)


@pytest.mark.parametrize(
    ("rank", "macs_reduction", "params_reduction"),
    [
        *((1, 88.03, 87.06), (2, 76.44, 75.98), (3, 64.85, 64.91), (4, 53.27, 53.84)),
        *((5, 41.69, 42.76), (6, 30.10, 31.69), (7, 18.51, 20.61), (8, 6.93, 9.54)),
    ],
)
def test_table_iv_reductions(rank: int, macs_reduction: float, params_reduction: float) -> None:
    dense = ClassifierSettings("vgg16_bn", 10, image_size=(32, 32)).build()
    before = count_complexity(dense, (32, 32))
    convs = [name for name, layer in dense.named_modules() if isinstance(layer, nn.Conv2d)]
    plan = CompressionPlan("vgg16_bn", dict.fromkeys(convs, rank))
    after = count_complexity(apply_structure(dense, plan), (32, 32))
    assert 100 * (1 - after.macs / before.macs) == pytest.approx(macs_reduction, abs=0.3)
    assert 100 * (1 - after.params / before.params) == pytest.approx(params_reduction, abs=0.02)
