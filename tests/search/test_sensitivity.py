"""Harm of single choices: fits against brute force, and the error of the heads against the compressed model's."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from norton_deploy.checkpoints.checkpoint import Checkpoint, CheckpointHeader, class_categories
from norton_deploy.compression import channel_harm
from norton_deploy.compression.calibration import Probe, make_probes, run_stages
from norton_deploy.compression.channel_groups import channel_groups, cut_inputs, cut_outputs
from norton_deploy.compression.channel_harm import channel_moments, greedy_channels, reader_metric
from norton_deploy.compression.normal_equations import NormalEquations
from norton_deploy.errors import UserError
from norton_deploy.method.plan import DENSE, CompressionPlan, Decomposition
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.search import layer_fit
from norton_deploy.search import sensitivity as module
from norton_deploy.search.decisions import Decision, list_decisions
from norton_deploy.search.head_harm import Judge, total_harm
from norton_deploy.search.layer_fit import absorbed, fitted_weight, input_moments, problem_of
from norton_deploy.search.plan_search import PlanRequest, harm_images
from norton_deploy.search.sensitivity import HarmImages, Sensitivity, undominated

SETTINGS = DetectorSettings(
    num_classes=3,
    backbone=BackboneSettings("resnet18", fpn_channels=32),
    roi=RoiSettings(box_features=32, mask_channels=(32,)),
    image=ImageSettings(64, 64),
)
RPN = "rpn.head.conv.0.0"


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return SETTINGS.build("mask").eval()


@pytest.fixture(scope="module")
def probes(dense: nn.Module) -> list[Probe]:
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return list(make_probes(dense, images, SETTINGS, batch=2, boxes=8))


def images_of(judged: list[Probe], fitted: list[Probe], digest: str = "drawn") -> HarmImages:
    return HarmImages(tuple(judged), tuple(fitted), digest)


def moments_of(conv: nn.Conv2d, x: Tensor) -> NormalEquations:
    patches = nn.functional.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    found = NormalEquations.empty(patches.shape[1], 0)
    rows = patches.mT.flatten(0, 1)
    found.add(rows, rows[:, :0])
    return found


def output_error(conv: nn.Conv2d, weight: Tensor, x: Tensor) -> float:
    return float((nn.functional.conv2d(x, weight - conv.weight, padding=1)).square().sum())


@pytest.mark.parametrize(
    "form",
    [Decomposition("tucker", (3, 4)), Decomposition("coupled", (2, 2)), Decomposition("layer_cp", (5,)),
     Decomposition("ranks", (1,))],
    ids=str,
)  # fmt: skip
def test_forms_fitted_to_inputs_lose_less_of_the_outputs_than_forms_of_bare_weights(form: Decomposition) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(6, 8, 3, padding=1, bias=False).requires_grad_(False)
    mix = torch.randn(6, 6) * torch.tensor([3, 1, 1, 0.3, 0.1, 0.1])
    x = torch.einsum("ij,njhw->nihw", mix, torch.randn(4, 6, 9, 9))
    weight = fitted_weight(conv.weight, problem_of(conv, moments_of(conv, x)), form)
    bare = fitted_weight(conv.weight, problem_of(conv, moments_of(conv, torch.randn(64, 6, 9, 9))), form)
    # of a filter's own CPD only C is fitted
    assert output_error(conv, weight, x) < (1 if form.form == "ranks" else 0.9) * output_error(conv, bare, x)


def test_some_filters_judge_a_form_without_shared_factors() -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(6, 256, 3, padding=1, bias=False).requires_grad_(False)
    problem, cpd = problem_of(conv, moments_of(conv, torch.randn(4, 6, 9, 9))), Decomposition("ranks", (1,))
    some = layer_fit.judged_filters(256, cpd)
    assert len(some) == layer_fit.JUDGED_FILTERS
    assert len(layer_fit.judged_filters(256, Decomposition("tucker", (2, 2)))) == 256

    def error(filters: Tensor) -> float:
        part = problem.of_outputs(filters)
        weight = fitted_weight(conv.weight[filters], part, cpd)
        return float(part.squared_error(weight.flatten(1)).sum() / part.energy.sum())

    assert error(some) == pytest.approx(error(torch.arange(256)), rel=0.1)


def test_with_full_ranks_nothing_is_lost() -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(6, 8, 3, padding=1).requires_grad_(False)
    problem = problem_of(conv, moments_of(conv, torch.randn(4, 6, 9, 9)))
    for form in (Decomposition("tucker", (6, 8)), Decomposition("coupled", (6, 2))):
        assert torch.allclose(fitted_weight(conv.weight, problem, form), conv.weight, atol=1e-4)


def test_moments_are_those_of_every_call(dense: nn.Module, probes: list[Probe]) -> None:
    """The RPN's convolution is called on every level of the pyramid; all positions are taken, so nothing is random."""
    found = input_moments(dense, [RPN], lambda number: run_stages(dense, probes[number]), len(probes))[RPN]
    conv, expected = dense.get_submodule(RPN), 0
    with torch.no_grad():
        for probe in probes:
            for level in dense.backbone(probe.pixels).values():  # type: ignore[operator, union-attr]
                expected = expected + moments_of(conv, level).gram  # type: ignore[arg-type]
    assert torch.allclose(found.gram, expected, rtol=1e-4, atol=1e-6)


def test_readers_make_up_for_the_channels_that_go(dense: nn.Module, probes: list[Probe]) -> None:
    group = channel_groups(dense)["backbone.body.layer1.0.conv1"]
    moments = channel_moments(dense, {group.name: group}, probes, 0)[group.name].double()
    kept = torch.arange(0, 64, 2)
    (reader,) = group.readers
    weight = absorbed(dense, group, moments, kept)[reader.layer]
    assert not weight[:, 1::2].any()
    # least squares of the channels that go by those that stay; some are always zero, so with a ridge
    moments = moments + 1e-6 * moments.diagonal().mean() * torch.eye(len(moments))
    conv = dense.get_submodule(reader.layer)
    predict = torch.linalg.lstsq(moments[kept][:, kept], moments[kept][:, 1::2]).solution.float()
    expected = conv.weight[:, ::2] + torch.einsum("kc,ochw->okhw", predict, conv.weight[:, 1::2])  # type: ignore[index, union-attr]
    assert torch.allclose(weight[:, ::2], expected, atol=1e-4)


def test_candidates_that_others_beat_are_left_out() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1)
    forms = [Decomposition("tucker", (rank, rank)) for rank in (8, 16, 24, 32, 40, 48)]
    errors = dict(zip(forms, (0.5, 0.4, 0.45, 0.2, 0.2, 0.1), strict=True))
    assert undominated({"": conv}, errors) == [forms[5], forms[3], forms[1], forms[0]]
    assert undominated({"": conv}, dict(zip(forms, (0.6, 0.5, 0.4, 0.3, 0.2, 0.1), strict=True))) == [
        forms[index] for index in (5, 4, 2, 1, 0)
    ]


def test_harm_is_the_weighted_relative_error_of_the_heads() -> None:
    """Two boxes with known classes; each kind by hand."""
    boxes = [torch.zeros(1, 4), torch.zeros(1, 4)]
    logits = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    deltas, masks, objectness = (
        torch.randn(*shape, generator=generator) for shape in ((2, 12), (2, 3, 4, 4), (1, 1, 2, 2))
    )
    wanted = {"class_logits": logits, "box_deltas": deltas, "masks": masks, "rpn_logits.0": objectness,
              "rpn_deltas.0": torch.randn(1, 4, 2, 2, generator=generator), "fpn.0": torch.zeros(1)}  # fmt: skip
    judge = Judge(wanted, boxes)
    unseen = {**wanted, "masks": masks.clone(), "box_deltas": deltas.clone(), "fpn.0": torch.ones(1)}
    unseen["masks"][0, 2] += 9  # of classes that the boxes are not
    unseen["box_deltas"][1, 4:8] += 9
    assert total_harm([judge.errors(unseen)], [judge.energies()]) == 0
    found = {name: value.clone() for name, value in wanted.items()}
    found["masks"][0, 1, 0, 0] += 1
    found["box_deltas"][1, 8] += 2
    found["rpn_deltas.0"][0, 3, 1, 1] += 1
    scores = torch.tensor([logits[0].softmax(0)[1], logits[1].softmax(0)[2]])
    own = torch.stack([masks[0, 1], masks[1, 2]])
    mask_share = scores[0] / ((own - own.mean()).square() * scores[:, None, None]).sum()
    picked = torch.stack([deltas[0, 4:8], deltas[1, 8:]])
    box_share = 4 * scores[1] / ((picked - picked.mean()).square() * scores[:, None]).sum()
    weight, moved = objectness.sigmoid(), wanted["rpn_deltas.0"]
    rpn_share = weight[0, 0, 1, 1] / ((moved - moved.mean()).square() * weight).sum()
    expected = float((box_share + rpn_share) / 4 + mask_share)
    assert total_harm([judge.errors(found)], [judge.energies()]) == pytest.approx(expected, rel=1e-5)


def test_heatmaps_that_are_shifted_as_a_whole_say_the_same() -> None:
    heatmaps = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = {"class_logits": torch.tensor([[0.0, 1.0]]), "heatmaps": heatmaps}
    judge = Judge(wanted, [torch.zeros(1, 4)])
    shifted = {**wanted, "heatmaps": heatmaps + torch.tensor([3.0, -1.0])[None, :, None, None]}
    assert total_harm([judge.errors(shifted)], [judge.energies()]) == pytest.approx(0, abs=1e-6)
    assert total_harm([judge.errors({**wanted, "heatmaps": heatmaps * 0})], [judge.energies()]) == pytest.approx(
        1, rel=0.1
    )


def some(dense: nn.Module) -> list[Decision]:
    wanted = ("backbone.body.layer2.1.conv1", RPN, "roi_heads.mask_head.0.0")
    decisions = list_decisions(dense, fractions=(0.5,))
    return [
        replace(d, forms=(DENSE, *(form for form in d.forms if form.form in ("tucker", "ranks"))))
        for d in decisions
        if d.group in wanted
    ]


def with_form(dense: nn.Module, decision: Decision, form: Decomposition, fit: list[Probe]) -> nn.Module:
    """A copy with the group's layers in a form, fitted to all positions of the fit's images."""
    small = copy.deepcopy(dense)
    moments = input_moments(dense, decision.decomposed, lambda number: run_stages(dense, fit[number]), len(fit))
    for name in decision.decomposed:
        conv, found = small.get_submodule(name), moments[name]
        assert isinstance(conv, nn.Conv2d)
        weight = fitted_weight(conv.weight, problem_of(conv, found), form)
        with torch.no_grad():
            if conv.bias is not None:  # the mean output stays what it was
                conv.bias += (conv.weight - weight).flatten(1) @ (found.input_sum / found.samples).float()
            conv.weight.copy_(weight)
    return small


def narrowed(dense: nn.Module, decision: Decision, width: int, fit: list[Probe]) -> nn.Module:
    """A copy whose group is cut to a width, the readers' weights made up for it."""
    small, group = copy.deepcopy(dense), channel_groups(dense)[decision.group]
    moments = channel_moments(dense, {group.name: group}, fit, 0)[group.name].double()
    kept = greedy_channels(moments, reader_metric(dense, group), width).sort().values
    for name, weight in absorbed(dense, group, moments, kept).items():
        small.get_submodule(name).weight.data = weight  # type: ignore[union-attr]
    for name in (*group.producers, *group.norms):
        small.set_submodule(name, cut_outputs(small.get_submodule(name), kept))
    for reader in group.readers:
        small.set_submodule(reader.layer, cut_inputs(small.get_submodule(reader.layer), kept, reader.columns))
    return small


def test_harm_of_a_choice_is_that_of_the_model_with_it(
    dense: nn.Module, probes: list[Probe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_harm, "POSITIONS", 10**6)  # all, so that nothing is random
    monkeypatch.setattr(layer_fit, "JUDGED_FILTERS", 8)  # fewer than there are, and the harm is of all
    path, decisions, fit = tmp_path / "harm.json", some(dense), probes[1:]
    sensitivity = Sensitivity(dense, images_of(probes[:1], fit), path=path)
    seen: list[tuple[int, int]] = []
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    found = sensitivity.measure(decisions, lambda done, count: seen.append((done, count)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in before.items())
    assert all(1 < len(decision.forms) <= 6 for decision in found)
    judge = Judge(run_stages(dense, probes[0]), probes[0].boxes)

    def harm_of(model: nn.Module) -> float:
        with torch.no_grad():
            return total_harm([judge.errors(run_stages(model, probes[0]))], [judge.energies()])

    for decision in found:
        form, (whole, width) = decision.forms[-1], decision.widths
        harm = sensitivity.of_option(decision.group, form, whole)
        assert harm == pytest.approx(harm_of(with_form(dense, decision, form, fit)), rel=1e-3)
        less = sensitivity.of_option(decision.group, DENSE, width)
        assert less == pytest.approx(harm_of(narrowed(dense, decision, width, fit)), rel=1e-3)
        assert sensitivity.of_option(decision.group, form, width) == pytest.approx(harm + less)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("what is known is not fitted again")

    monkeypatch.setattr(module, "fitted_weight", never)
    again = Sensitivity(dense, images_of(probes[:1], fit), path=path, resume=True)
    assert again.measure(decisions) == found
    with pytest.raises(UserError, match="another model"):
        Sensitivity(dense, images_of(probes[:1], fit), path=path, resume=True, seed=1)
    with pytest.raises(UserError, match="other images"):
        Sensitivity(dense, images_of(fit, probes[:1], "others"), path=path, resume=True)


def test_harm_by_layer_is_the_root_of_the_error_where_the_choice_is_made(
    dense: nn.Module, probes: list[Probe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_harm, "POSITIONS", 10**6)
    monkeypatch.setattr(layer_fit, "JUDGED_FILTERS", 10**6)
    monkeypatch.setattr(layer_fit, "SHRINKAGE", 1e-5)
    path, fit = tmp_path / "harm.json", probes[1:]
    decisions = [decision for decision in some(dense) if decision.group != RPN]  # its layer is called on several maps
    sensitivity = Sensitivity(dense, images_of(probes[:1], fit), by_layer=True, path=path)
    monkeypatch.setattr(Sensitivity, "_harm", None)  # the heads are not asked
    found = sensitivity.measure(decisions)
    for decision in found:
        form, (whole, width) = decision.forms[-1], decision.widths
        (layer,) = decision.decomposed
        (reader,) = (reader.layer for reader in channel_groups(dense)[decision.group].readers)
        small = with_form(dense, decision, form, fit)
        error = share_lost(dense, small, layer, fit, centred=dense.get_submodule(layer).bias is not None)
        # a call's moments are those of some positions
        assert sensitivity.of_option(decision.group, form, whole) == pytest.approx(error**0.5, rel=0.05)
        less = share_lost(dense, narrowed(dense, decision, width, fit), reader, fit)
        # the errors at a kernel's positions are taken for independent
        assert sensitivity.of_option(decision.group, DENSE, width) == pytest.approx(less**0.5, rel=0.2)
        assert sensitivity.of_option(decision.group, form, width) == pytest.approx(error**0.5 + less**0.5, rel=0.2)
    again = Sensitivity(dense, images_of(probes[:1], fit), by_layer=True, path=path, resume=True)
    monkeypatch.setattr(module, "fitted_weight", None)
    assert again.measure(decisions) == found


def share_lost(dense: nn.Module, small: nn.Module, layer: str, fit: list[Probe], *, centred: bool = False) -> float:
    """Squared error of one layer's outputs relative to their own squares, each model run as a whole."""
    outputs: list[list[Tensor]] = []
    for model in (dense, small):
        seen: list[Tensor] = []
        hook = model.get_submodule(layer).register_forward_hook(lambda *call, to=seen: to.append(call[2]))
        with torch.no_grad():
            for probe in fit:
                run_stages(model, probe)
        hook.remove()
        outputs.append(seen)
    wanted, got = (torch.cat([each.movedim(1, -1).flatten(0, -2) for each in seen]) for seen in outputs)
    mean = wanted.mean(0) if centred else 0.0
    return float((wanted - got).square().sum() / (wanted - mean).square().sum())


def test_images_are_known_again_whatever_resizing_does_to_the_last_bits(
    dense: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint(dense, CheckpointHeader("mask", SETTINGS, None, class_categories(["cat", "dog"])))
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 120, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels)
    request = PlanRequest(budget="macs=0.5", data=tmp_path, images=1, fit_images=3, sensitivity_size=48)
    prepare, path = DetectorSettings.prepare, tmp_path / "harm.json"

    def prepared_elsewhere(settings: DetectorSettings, images: Sequence[Tensor]) -> ImageList:
        found = prepare(settings, images)
        return ImageList(found.tensors * (1 + 2**-20), found.image_sizes)  # as with another number of threads

    with torch.no_grad():
        first = harm_images(source, request)
        Sensitivity(dense, first, path=path).measure(some(dense)[:1])
        monkeypatch.setattr(DetectorSettings, "prepare", prepared_elsewhere)
        again = harm_images(source, request)
        assert not torch.equal(again.judged[0].pixels, first.judged[0].pixels)
        Sensitivity(dense, again, path=path, resume=True)
        for other in (replace(request, sensitivity_size=40), replace(request, images=2, fit_images=2)):
            assert harm_images(source, other).digest != first.digest
        cv2.imwrite(str(tmp_path / "0.png"), pixels)
        with pytest.raises(UserError, match="other images"):
            Sensitivity(dense, harm_images(source, request), path=path, resume=True)


def test_harm_of_a_plan_is_that_of_the_refitted_model(dense: nn.Module, probes: list[Probe]) -> None:
    sensitivity = Sensitivity(dense, images_of(probes[:1], probes[1:]))
    assert sensitivity.of_plan(CompressionPlan("rcnn")) == 0
    (rpn,) = (replace(d, forms=(DENSE, Decomposition("tucker", (8, 8)))) for d in some(dense) if d.group == RPN)
    sensitivity.measure([rpn])
    single = sensitivity.of_option(RPN, rpn.forms[1], 32)
    # one layer, fitted in closed form to the same images either way
    assert sensitivity.of_plan(CompressionPlan("rcnn", tucker={RPN: (8, 8)})) == pytest.approx(single, rel=0.3)
