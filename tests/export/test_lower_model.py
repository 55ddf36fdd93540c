import copy

import pytest
import torch
from reduced_detectors import as_model_input, blobs, compressed_detector, reduced_detector
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.factored_conv import ChainShape, FactoredConv
from norton_deploy.compression.lowering import Form, lower_model, multiply_out, quickest_forms
from norton_deploy.errors import UserError


@pytest.mark.parametrize("form", ["grouped", "dense", "separable"])
@torch.no_grad()
def test_compressed_detector_keeps_its_outputs_and_loses_its_blocks(form: Form) -> None:
    model = compressed_detector("box")
    lowered = lower_model(model, form)
    kinds = {type(module) for module in lowered.modules()}
    assert not kinds & {CPDBlock, FactoredConv, nn.BatchNorm2d, FrozenBatchNorm2d}
    assert any(isinstance(module, CPDBlock) for module in model.modules())
    groups = {module.groups for module in lowered.modules() if isinstance(module, nn.Conv2d)}
    assert (groups == {1}) == (form == "dense")
    images = as_model_input(blobs(2))
    batch = model.transform(images)[0].tensors
    for expected, found in zip(model.backbone(batch).values(), lowered.backbone(batch).values(), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_frozen_norm_is_folded_and_the_original_untouched() -> None:
    model = reduced_detector("box", frozen=True)
    before = copy.deepcopy(model.state_dict())
    lowered = lower_model(model)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in lowered.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_form_for_each_block_and_mistakes() -> None:
    model = compressed_detector("box")
    name = "backbone.body.layer4.1.conv2"
    lowered = lower_model(model, "grouped", {name: "dense"})
    assert isinstance(lowered.get_submodule(name), nn.Conv2d)
    assert isinstance(lowered.get_submodule("backbone.body.layer4.1.conv1"), nn.Sequential)
    with pytest.raises(UserError, match="not a CPDBlock"):
        lower_model(model, "grouped", {"backbone.body.conv1": "dense"})
    with pytest.raises(UserError, match="training mode"):
        lower_model(copy.deepcopy(model).train())


def test_forms_for_speed_follow_rank_and_width() -> None:
    model = nn.ModuleDict({"thin": CPDBlock(64, 8, 3, 2), "wide": CPDBlock(256, 8, 3, 2), "plain": nn.Conv2d(8, 8, 3)})
    assert quickest_forms(model) == {"thin": "dense", "wide": "grouped"}


@torch.no_grad()
def test_multiplied_out_a_block_counts_as_the_convolution_that_it_equals() -> None:
    model = nn.Sequential(CPDBlock(16, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    dense, image = multiply_out(model), torch.rand(1, 16, 6, 5)
    torch.testing.assert_close(dense(image), model(image))
    assert sum(parameter.numel() for parameter in dense.parameters()) == (16 * 8 * 9 + 8) + 2 * 8 + (8 * 4 + 4)
    assert isinstance(model[0], CPDBlock) and isinstance(dense[1], nn.BatchNorm2d)


@torch.no_grad()
@pytest.mark.parametrize(
    "shape",
    [ChainShape(6, 5), ChainShape(6, 6, 6), ChainShape(6, 8, 2, has_exit=False)],
    ids=["tucker", "cp", "coupled"],
)
def test_multiplied_out_a_chain_counts_as_the_convolution_that_it_equals(shape: ChainShape) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    norm = nn.BatchNorm2d(8)
    norm.running_mean.copy_(torch.rand(8))
    norm.running_var.copy_(torch.rand(8) + 0.5)
    model = nn.Sequential(FactoredConv.shaped_like(conv, shape, 16, 8), norm).eval()
    image = torch.rand(1, 16, 7, 9)
    for dense in (multiply_out(model), lower_model(model, "dense")):
        assert type(dense[0]) is nn.Conv2d
        torch.testing.assert_close(dense(image), model(image))
    assert isinstance(lower_model(model, "grouped")[0], nn.Sequential)
