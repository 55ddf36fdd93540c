"""A compressed ResNet-FPN as a backbone that Detectron2 trains. Importing this module registers it.

    MODEL:
      BACKBONE: {NAME: build_norton_resnet_fpn_backbone}
      NORTON: {WEIGHTS: compressed.safetensors, PLAN: ""}

WEIGHTS is a checkpoint of this project, a classifier or a detector; "" gives random weights. PLAN is a plan by
which a dense checkpoint (or random weights) is compressed first; a compressed checkpoint brings its own. Only the
backbone part of a plan (body and pyramid) is used: the heads are Detectron2's.
"""

import logging
from collections import OrderedDict
from dataclasses import replace
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.config.defaults import _C as DETECTRON2_DEFAULTS
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.compression.compress import apply_structure, compress
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.factored_conv import FactoredConv
from norton_deploy.compression.fit_plan import BODY
from norton_deploy.detectron2.checkpoint import backbone_structure
from norton_deploy.detectron2.config import NORTON_BACKBONE, STRIDES, Detectron2Config, config_of
from norton_deploy.detectron2.weights import swap_red_and_blue
from norton_deploy.models.detector_parts import FREEZING_ORDER, freeze_stages
from norton_deploy.training.initial_weights import load_backbone

LEVELS = ("p2", "p3", "p4", "p5", "p6")
# Below Detectron2's own logger, which its tools set up for printing.
logger = logging.getLogger("detectron2.norton_deploy")


class NortonBackbone(Backbone):  # type: ignore[misc]  # Detectron2 has no types
    """Body and pyramid of one of our detectors behind Detectron2's interface; tensors keep our names."""

    def __init__(self, backbone: BackboneWithFPN) -> None:
        """
        Args:
            backbone: dense or compressed; its layers are shared, not copied.
        """
        super().__init__()
        self.body = backbone.body
        self.fpn = backbone.fpn
        self.channels = int(backbone.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W], normalised -> feature maps "p2" to "p6", strides 4 to 64."""
        maps = self.fpn(OrderedDict(self.body(images)))
        return dict(zip(LEVELS, maps.values(), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every feature map."""
        return {
            level: ShapeSpec(channels=self.channels, stride=stride)
            for level, stride in zip(LEVELS, STRIDES, strict=True)
        }

    @property
    def size_divisibility(self) -> int:
        """Height and width of a batch are padded to multiples of this many pixels."""
        return STRIDES[3]


def build_norton_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> NortonBackbone:
    """The registered builder.

    Args:
        cfg: a Detectron2 configuration of Faster, Mask or Keypoint R-CNN with MODEL.NORTON.
        input_shape: of the images; three channels.

    Raises:
        UserError: a model that could not be imported again, files that do not fit the configuration, or a plan
            that does not fit the backbone.
    """
    assert input_shape.channels == 3
    config = config_of(cfg, "the configuration")
    model, trainable_layers = _detector_with_backbone(config)
    backbone = NortonBackbone(model.backbone)
    freeze_stages(backbone.body, trainable_layers)
    _fix_statistics(backbone.body, trainable_layers)
    count = sum(tensor.numel() for tensor in backbone.state_dict().values())
    logger.info("norton_deploy's backbone: %.2f M parameters, %d channels", count / 1e6, backbone.channels)
    return backbone


def _detector_with_backbone(config: Detectron2Config) -> tuple[Any, int]:
    """A detector of ours with the backbone that a configuration describes, and how many parts of it are trained."""
    settings, plan = backbone_structure(config)
    # The heads are Detectron2's; small ones here save memory.
    model: nn.Module = replace(settings, num_classes=2, roi=replace(settings.roi, box_features=1)).build("box")
    path = config["MODEL.NORTON.WEIGHTS"]
    source = load_checkpoint(path) if path else None
    if source is not None:
        if source.header.plan is not None and plan is not None:
            model = apply_structure(model, plan)
        load_backbone(model, source, path)
    if plan is not None and (source is None or source.header.plan is None):
        model = compress(model, plan)
    if config["INPUT.FORMAT"] == "BGR":
        _read_bgr(model.get_submodule(f"{BODY}conv1"))
    return model, settings.backbone.trainable_layers


def _read_bgr(stem: nn.Module) -> None:
    """Swap a stem's red and blue inputs."""
    first = {CPDBlock: "pointwise", FactoredConv: "entry"}.get(type(stem))
    conv = cast(nn.Conv2d, stem if first is None else stem.get_submodule(first))
    with torch.no_grad():
        conv.weight.copy_(swap_red_and_blue(conv.weight))


def _fix_statistics(body: nn.Module, trainable_layers: int) -> None:
    """Frozen parts keep their BatchNorm statistics too, as in Detectron2's own backbones."""
    frozen = [*FREEZING_ORDER[trainable_layers:], *(["bn1"] if trainable_layers < len(FREEZING_ORDER) else [])]
    for name in frozen:
        setattr(body, name, FrozenBatchNorm2d.convert_frozen_batchnorm(body.get_submodule(name)))


if "NORTON" not in DETECTRON2_DEFAULTS.MODEL:
    DETECTRON2_DEFAULTS.MODEL.NORTON = CfgNode({"PLAN": "", "WEIGHTS": ""})
if NORTON_BACKBONE not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_norton_resnet_fpn_backbone)
