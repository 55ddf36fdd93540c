"""Harm of a narrower detector's choices, taken over to the full-size one by shares."""

import pytest

from benchmarks.make_plans import shared_shares
from norton_deploy.errors import UserError
from norton_deploy.method.plan import DENSE, Decomposition
from norton_deploy.search.decisions import Decision


def tucker(first: int, last: int) -> Decomposition:
    return Decomposition("tucker", (first, last))


NARROW = [
    Decision("rpn.head.conv.0.0", ("a",), (DENSE, tucker(32, 32), tucker(8, 8), Decomposition("ranks", (1,))),
             (64, 32, 16), (("pyramid", 64),)),
    Decision("roi_heads.mask_head.0.0", ("b",), (DENSE, tucker(16, 16)), (64, 32), (("pyramid", 64),)),
]  # fmt: skip


def harm(group: str, form: Decomposition, keep: int) -> float:
    return 100 * len(group) + sum(form.numbers) + 1 / keep


def test_forms_and_widths_count_as_those_with_the_same_share() -> None:
    full = [
        Decision("rpn.head.conv.0.0", ("a",), (DENSE, tucker(128, 128), tucker(64, 64), tucker(32, 32),
                 Decomposition("ranks", (1,)), Decomposition("layer_cp", (64,))), (256, 128, 96), (("pyramid", 256),)),
        Decision("roi_heads.mask_head.3.0", ("c",), (DENSE, tucker(64, 64)), (256, 192), (("other", 256),)),
    ]  # fmt: skip
    decisions, full_harm = shared_shares(full, NARROW, harm)
    # a quarter of the channels was not measured, nor was layer CPD
    assert decisions[0].forms == (DENSE, tucker(128, 128), tucker(32, 32), Decomposition("ranks", (1,)))
    assert full_harm("rpn.head.conv.0.0", tucker(128, 128), 256) == harm("rpn.head.conv.0.0", tucker(32, 32), 64)
    assert full_harm("rpn.head.conv.0.0", DENSE, 96) == harm("rpn.head.conv.0.0", DENSE, 32)
    # the narrow head has one layer
    assert full_harm("roi_heads.mask_head.3.0", tucker(64, 64), 256) == harm(
        "roi_heads.mask_head.0.0", tucker(16, 16), 64
    )


def test_a_head_that_was_not_trained_is_named() -> None:
    full = [Decision("roi_heads.keypoint_head.0", (), (DENSE,), (512,), ())]
    with pytest.raises(UserError, match="no such head"):
        shared_shares(full, NARROW, harm)
