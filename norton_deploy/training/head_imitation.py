"""Distillation of a detector's heads: student and teacher answer about the same proposals.

A compressed detector loses most in its heads, which a pyramid's imitation does not reach. In every step the teacher's
own heads look at the student's sampled proposals on the teacher's own pyramid; the student is to give the same class
scores, box deltas, masks and heatmaps. Nothing is matched, since both answer about the same boxes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_iou

HEAD_KINDS = ("box", "mask", "keypoint")


def class_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), the mean over proposals.

    Args:
        student, teacher: class logits [N, K], the background first.
    """
    log_student, log_teacher = (functional.log_softmax(logits.float(), dim=1) for logits in (student, teacher))
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def delta_distance(student: Tensor, teacher: Tensor, teacher_logits: Tensor) -> Tensor:
    """Smooth L1 of the box deltas, each class weighed by the teacher's score of it, the mean over proposals.

    A class that the teacher does not see has deltas that nobody ever trained, hence the weights; background has none.

    Args:
        student, teacher: box deltas [N, 4 K].
        teacher_logits: class logits [N, K], the background first.
    """
    distance = functional.smooth_l1_loss(student.float(), teacher.float(), beta=1 / 9, reduction="none")
    distance = distance.unflatten(1, (-1, 4)).sum(dim=2)
    weights = teacher_logits.float().softmax(dim=1)
    return (weights[:, 1:] * distance[:, 1:]).sum() / len(distance)


def mask_divergence(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL divergence of the mask's Bernoulli probabilities in each proposal's class, the mean over proposals and cells.

    Args:
        student, teacher: mask logits [P, K, H, W].
        labels: class of each proposal, int64 [P].
    """
    rows = torch.arange(len(labels), device=labels.device)
    own, wanted = student[rows, labels].float(), teacher[rows, labels].float()
    target = wanted.sigmoid()
    cross = functional.binary_cross_entropy_with_logits(own, target)
    entropy = functional.binary_cross_entropy_with_logits(wanted, target)
    return cross - entropy


def heatmap_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of each keypoint's distribution over the heatmap's cells, the mean over proposals and keypoints.

    Args:
        student, teacher: heatmap logits [P, J, H, W].
    """
    log_student, log_teacher = (functional.log_softmax(m.float().flatten(2), dim=2) for m in (student, teacher))
    divergence = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.sum(dim=2).mean()


def proposal_labels(proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """Class of the annotated box that each proposal overlaps most, as torchvision's matcher gives it, int64 [P].

    Args:
        proposals: boxes [P_i, 4] of each image, every one of which was matched.
        targets: boxes [T_i, 4] and labels [T_i] of each image, in the same pixels.
    """
    found = []
    for boxes, target in zip(proposals, targets, strict=True):
        if len(boxes):
            found.append(target["labels"][box_iou(target["boxes"].to(boxes.dtype), boxes).argmax(dim=0)])
        else:
            found.append(boxes.new_zeros(0, dtype=torch.int64))
    return torch.cat(found)


class HeadImitation:
    """What the heads of a student saw and answered in one step, and how far that is from its teacher's answers.

    Args:
        teacher: dense detector of the same task and categories on the same device, in evaluation mode.

    Attributes:
        targets: what the heads of the remembered step were to find, boxes in the pixels that the backbone saw.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student: Any = student.get_submodule("roi_heads")
        self.teacher: Any = teacher.get_submodule("roi_heads")
        self.kinds = [kind for kind in HEAD_KINDS if getattr(self.student, f"{kind}_predictor", None) is not None]
        self._proposals: dict[str, list[Tensor]] = {}
        self._answers: dict[str, Any] = {}
        self._shapes: list[tuple[int, int]] = []
        self.targets: list[dict[str, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it is entered, one step of the student is remembered: its proposals and its heads' answers."""

        def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            _, _, self._shapes, self.targets = inputs

        handles = [self.student.register_forward_pre_hook(enter)]
        for kind in self.kinds:

            def pooled(_module: nn.Module, inputs: tuple[Any, ...], kind: str = kind) -> None:
                self._proposals[kind] = inputs[1]

            def answered(_module: nn.Module, _inputs: Any, outputs: Any, kind: str = kind) -> None:
                self._answers[kind] = outputs

            handles.append(getattr(self.student, f"{kind}_roi_pool").register_forward_pre_hook(pooled))
            handles.append(getattr(self.student, f"{kind}_predictor").register_forward_hook(answered))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def losses(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How far the remembered answers are from the teacher's, scalars: "class_imitation" and "box_imitation",
        "mask_imitation" or "keypoint_imitation".

        Args:
            maps: the teacher's pyramid of the same images.
        """
        losses = {}
        for kind in self.kinds:
            own, proposals = self._answers[kind], self._proposals[kind]
            with torch.no_grad():
                pooled = getattr(self.teacher, f"{kind}_roi_pool")(maps, proposals, self._shapes)
                wanted = getattr(self.teacher, f"{kind}_predictor")(getattr(self.teacher, f"{kind}_head")(pooled))
            if kind == "box":
                losses["class_imitation"] = class_divergence(own[0], wanted[0])
                losses["box_imitation"] = delta_distance(own[1], wanted[1], wanted[0])
            elif not len(own):  # no positive proposal: nothing to imitate, and the mean of nothing is not a number
                losses[f"{kind}_imitation"] = own.sum() * 0.0
            elif kind == "mask":
                losses["mask_imitation"] = mask_divergence(own, wanted, proposal_labels(proposals, self.targets))
            else:
                losses["keypoint_imitation"] = heatmap_divergence(own, wanted)
        self._proposals, self._answers, self._shapes, self.targets = {}, {}, [], []
        return losses
