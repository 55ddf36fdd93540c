"""Small detectors with random weights that nevertheless find something, for the export tests."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.factored_conv import FactoredConv
from norton_deploy.method.coupled import decompose_coupled
from norton_deploy.method.cp import decompose_filters
from norton_deploy.method.layer_factors import Tucker2, decompose_layer
from norton_deploy.structures import Task

IMAGE_SIZE = (120, 150)
LEVELS = ["0", "1", "2", "3"]


def blobs(count: int, image_size: tuple[int, int] = IMAGE_SIZE, seed: int = 0) -> Tensor:
    """uint8 [count, H, W, 3]: smooth random images with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(count, 3, *image_size)
    for cells in (3, 7, 19, 53):
        noise = torch.rand(count, 3, cells, cells, generator=generator) - 0.5
        image += nn.functional.interpolate(noise, size=image_size, mode="bicubic")
    low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
    return ((image - low) / (high - low) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def as_model_input(images: Tensor) -> list[Tensor]:
    """uint8 [B, H, W, 3] -> the list of float [3, H, W] that torchvision's models take."""
    return list(images.permute(0, 3, 1, 2).to(torch.float32) / 255)


@cache
def reduced_detector(task: Task, num_classes: int = 6, frozen: bool = False, **changes: Any) -> FasterRCNN:
    """A ResNet-18-FPN detector of `task` in eval mode whose resize does nothing at `IMAGE_SIZE`."""
    torch.manual_seed(7)
    norm: dict[str, Any] = {} if frozen else {"norm_layer": nn.BatchNorm2d}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5, **norm)
    backbone = BackboneWithFPN(backbone.body, dict(backbone.body.return_layers), [64, 128, 256, 512], 48)
    settings: dict[str, Any] = {
        "min_size": min(IMAGE_SIZE),
        "max_size": max(IMAGE_SIZE),
        "rpn_anchor_generator": AnchorGenerator(
            ((16, 24), (32, 48), (56, 72), (88, 104), (120, 140)), ((0.5, 1.0, 2.0),) * 5
        ),
        "box_roi_pool": MultiScaleRoIAlign(LEVELS, 5, 2, canonical_scale=56),
        "box_head": TwoMLPHead(48 * 25, 64),
        "box_predictor": FastRCNNPredictor(64, num_classes),
        "rpn_pre_nms_top_n_test": 150,
        "rpn_post_nms_top_n_test": 160,
        "box_detections_per_img": 20,
        **changes,
    }
    if task == "box":
        model = FasterRCNN(backbone, **settings)
    elif task == "mask":
        model = MaskRCNN(
            backbone,
            **settings,
            mask_roi_pool=MultiScaleRoIAlign(LEVELS, 8, 2, canonical_scale=56),
            mask_head=MaskRCNNHeads(48, (32, 32), 1),
            mask_predictor=MaskRCNNPredictor(32, 32, num_classes),
        )
    else:
        model = KeypointRCNN(
            backbone,
            **settings,
            keypoint_roi_pool=MultiScaleRoIAlign(LEVELS, 8, 2, canonical_scale=56),
            keypoint_head=KeypointRCNNHeads(48, (32, 32)),
            keypoint_predictor=KeypointRCNNPredictor(32, 5),
        )
    calibrate(model)
    return model


@cache
def compressed_detector(task: Task) -> FasterRCNN:
    """`reduced_detector` with the 3x3 convolutions of its body's last three stages decomposed.

    Those of the first of the three share their factors.
    """
    torch.manual_seed(7)
    model = copy.deepcopy(reduced_detector(task))
    for stage in ("layer3", "layer4"):
        for block in model.backbone.body[stage]:
            block.conv1 = CPDBlock.from_factors(decompose_filters(block.conv1.weight, 2, starts=1), block.conv1)
            block.conv2 = CPDBlock.from_factors(decompose_filters(block.conv2.weight, 2, starts=1), block.conv2)
    cluster = torch.arange(8).repeat_interleave(16)
    for block in model.backbone.body.layer2:
        tucker = decompose_layer(block.conv1.weight, "tucker2", (32, 24))
        assert isinstance(tucker, Tucker2)
        block.conv1 = FactoredConv.from_factors(tucker, block.conv1)
        coupled = decompose_coupled(block.conv2.weight, 8, 8, cluster=cluster)
        block.conv2 = FactoredConv.from_factors(coupled, block.conv2)
    calibrate(model)
    return model


def calibrate(model: FasterRCNN) -> None:
    """Estimate BatchNorm on random images and scale the heads so that scores and boxes spread usefully."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    images = as_model_input(blobs(4))
    with torch.no_grad():
        padded = model.transform(images)[0]
        model.train()
        model.backbone(padded.tensors)
        model.eval()
        features = list(model.backbone(padded.tensors).values())
        # The same gain for every map, so that levels compete; heads then see unit variance.
        spread = torch.cat([feature.flatten() for feature in features]).std()
        for block in model.backbone.fpn.layer_blocks:
            block[0].weight /= spread
            block[0].bias /= spread
        for name, parameter in model.rpn.head.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.08 if "conv" in name else 0.02))
        model.rpn.head.cls_logits.weight *= 20
        predictor = model.roi_heads.box_predictor
        predictor.cls_score.weight *= 25
        predictor.bbox_pred.weight *= 10
        if model.roi_heads.has_mask():
            model.roi_heads.mask_predictor.mask_fcn_logits.weight *= 4
