"""The classifiers that can be compressed: torchvision's ResNets and the VGG-16-BN of CIFAR-10.

The normalisation of a ResNet is a stated policy:

frozen: BatchNorm with fixed statistics and affine terms. For a pretrained backbone: a detector's batch is
    too small (1-4 images a device) to estimate statistics better than the pretraining did.
batch: live BatchNorm. For a backbone that starts from nothing, or is compressed and not yet re-estimated.
sync: live BatchNorm with statistics over all processes. As batch, when each process sees few images.
group: GroupNorm. Independent of the batch; for training from nothing with one image a device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet, vgg
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2.functional import normalize, resize

from norton_deploy.errors import UserError, shown
from norton_deploy.structures import LARGEST_LABEL, ModelTask

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "vgg16_bn"]
Norm = Literal["frozen", "batch", "sync", "group"]
VGG16_STAGES: list[str | int] = [64, 64, "M", 128, 128, "M", *([256] * 3), "M", *([512] * 3), "M", *([512] * 3)]
GROUPS = 32
LARGEST_SIDE = 8192
"""Pixels of an image or an anchor."""


@dataclass(frozen=True)
class ClassifierSettings:
    """Everything that shapes a classifier and its input."""

    architecture: Architecture = "resnet50"
    """resnet18, resnet34, resnet50, resnet101, or vgg16_bn for CIFAR-10."""
    num_classes: int = 1000
    """Number of classes."""
    norm: Norm = "batch"
    """Normalisation of a ResNet."""
    zero_init_residual: bool = False
    """Start residual branches at zero; helps training from nothing."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels that the classifier is trained and evaluated at."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the RGB channels, 0..1."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels, 0..1."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= LARGEST_LABEL:
            raise UserError(f"num_classes: expected 1 to {LARGEST_LABEL}, got {shown(self.num_classes)}")
        if not all(1 <= side <= LARGEST_SIDE for side in self.image_size):
            raise UserError(f"image_size: expected 1 to {LARGEST_SIDE} pixels, got {self.image_size}")
        if not all(1e-6 <= value <= 100 for value in self.image_std):
            raise UserError(f"image_std: expected numbers above 0, got {self.image_std}")

    @property
    def pixels(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation."""
        return self.image_mean, self.image_std

    @property
    def input_size(self) -> tuple[int, int]:
        """The (height, width) in pixels at which a model's complexity is stated."""
        return self.image_size

    @property
    def proposals(self) -> int:
        """Regions per image: a classifier has none."""
        return 0

    def build(self, task: ModelTask = "cls") -> nn.Module:
        """A dense classifier with random weights: images [N, 3, H, W], normalised -> class scores [N, classes].

        Raises:
            UserError: unknown architecture, or a detector's task.
        """
        if task != "cls":
            raise UserError(f"task '{task}': {self.architecture} is a classifier")
        if self.architecture == "vgg16_bn":
            return Vgg16Bn(self.num_classes)
        return build_resnet(
            self.architecture, self.num_classes, norm=self.norm, zero_init_residual=self.zero_init_residual
        )

    def prepare(self, images: Sequence[Tensor]) -> ImageList:
        """Images as the model takes them: resized to the input size, normalised, one batch.

        Args:
            images: float [3, H, W], 0..1 RGB, of any sizes.

        Returns:
            `tensors` [N, 3, *input_size]; `image_sizes`, all the same.
        """
        resized = torch.stack([resize(image, list(self.image_size), antialias=True) for image in images])
        pixels = normalize(resized, list(self.image_mean), list(self.image_std))
        return ImageList(pixels, [self.image_size] * len(images))


class Vgg16Bn(nn.Module):
    """VGG-16 with BatchNorm for 32 x 32 images: 13 convolutions and two linear layers (paper, Table I).

    Input [N, 3, 32, 32]; output [N, num_classes]. 14,991,946 parameters with 10 classes. The last pooling
    averages over whatever is left, so that larger images are accepted too.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = vgg.make_layers(VGG16_STAGES, batch_norm=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, num_classes)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None  # make_layers gives its convolutions one.
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [N, num_classes] of images [N, 3, H, W]."""
        return self.classifier(self.pool(self.features(images)).flatten(1))


class TypedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """`FrozenBatchNorm2d` whose result has its input's type.

    torchvision's gives float32 for half-precision inputs, so that under autocast twice the bytes go through every
    activation and residual sum after it. PyTorch's BatchNorm with the same fixed statistics computes in float32
    too, but in one pass and without changing the type.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape and type; in the layer's own type exactly torchvision's result."""
        if x.dtype == self.weight.dtype:
            result: Tensor = super().forward(x)
            return result
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm with as many of 32 groups as divide the channels (pruned widths are seldom multiples)."""
    return nn.GroupNorm(gcd(GROUPS, channels), channels, eps)


NORM_LAYERS: dict[Norm, Callable[..., nn.Module]] = {
    "frozen": TypedFrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": group_norm,
}


def build_resnet(
    architecture: str,
    num_classes: int,
    *,
    norm: Norm = "batch",
    norm_eps: float = 1e-5,
    zero_init_residual: bool = False,
) -> nn.Module:
    """torchvision's ResNet with random weights.

    Raises:
        UserError: unknown architecture.
    """
    known = [name for name in get_args(Architecture) if name.startswith("resnet")]
    if architecture not in known:
        raise UserError(f"architecture '{architecture}': expected one of {', '.join(known)}")
    network: nn.Module = getattr(resnet, architecture)(
        num_classes=num_classes,
        norm_layer=partial(NORM_LAYERS[norm], eps=norm_eps),
        # FrozenBatchNorm2d has buffers where torchvision's zero initialisation expects parameters.
        zero_init_residual=zero_init_residual and norm != "frozen",
    )
    return network
