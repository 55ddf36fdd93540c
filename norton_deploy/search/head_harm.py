"""How far a changed model's outputs are from the dense one's, where it is judged: logits, or the outputs of all heads.

Of a detector every output counts by what it is used for: box deltas, masks and heatmaps of the class that the dense
model gives the region, by the score that it gives; deltas of anchors by their objectness. Masks and heatmaps have a
harm of their own beside the mean of RPN and box head, so cutting their heads is never free.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from norton_deploy.compression.calibration import HEAD_BOXES_PER_IMAGE

OWN = ("masks", "heatmaps")
"""Outputs of heads for a task of their own."""
Outputs = dict[str, Tensor]


class Judge:
    """Compares outputs of `run_stages` with the dense model's, of one probe.

    The squared error of a kind of outputs y' against y is sum w (y' - y)^2, its energy sum w (y - mean y)^2.
    """

    def __init__(self, wanted: Outputs, boxes: Sequence[Tensor] = ()) -> None:
        """
        Args:
            wanted: the dense model's outputs.
            boxes: of the probe, [K, 4] per image; empty for a classifier.
        """
        self.weights: Outputs = {}
        self.labels = self.few = torch.zeros(0, dtype=torch.int64)
        if "class_logits" in wanted:
            scores, self.labels = wanted["class_logits"].softmax(1)[:, 1:].max(1)
            self.labels = self.labels + 1  # the background is 0
            starts = torch.tensor([0, *map(len, boxes)]).cumsum(0)
            counts = [min(len(found), HEAD_BOXES_PER_IMAGE) for found in boxes]
            self.few = torch.cat([start + torch.arange(n) for start, n in zip(starts[:-1], counts, strict=True)])
            self.weights["box_deltas"] = scores[:, None]
            self.weights |= dict.fromkeys(OWN, scores[self.few, None, None])
            for name, logits in wanted.items():
                if name.startswith("rpn_logits"):
                    deltas = name.replace("logits", "deltas")
                    self.weights[deltas] = logits.sigmoid().repeat_interleave(4, dim=1)
        self.wanted = self._judged(wanted)

    def _judged(self, outputs: Outputs) -> Outputs:
        """The outputs that count: all but the pyramid, and of the heads those of the regions' classes."""
        found = {name: value for name, value in outputs.items() if not name.startswith("fpn.")}
        if "box_deltas" in found:
            deltas = found["box_deltas"].unflatten(1, (-1, 4))
            found["box_deltas"] = deltas[torch.arange(len(deltas)), self.labels]
        if "masks" in found:
            found["masks"] = found["masks"][torch.arange(len(self.few)), self.labels[self.few]]
        if "heatmaps" in found:  # a softmax over the positions follows
            maps = found["heatmaps"]
            found["heatmaps"] = (maps - maps.mean(dim=(2, 3), keepdim=True)).flatten(2)
        return found

    def errors(self, outputs: Outputs) -> dict[str, float]:
        """Squared error of each kind of outputs; kinds that are not there have none."""
        errors: dict[str, float] = {}
        for name, value in self._judged(outputs).items():
            error = (value - self.wanted[name]).square() * self.weights.get(name, 1.0)
            kind = name.partition(".")[0]
            errors[kind] = errors.get(kind, 0.0) + float(error.sum())
        return errors

    def energies(self) -> dict[str, float]:
        """Energy of each kind of the dense model's outputs."""
        energies: dict[str, float] = {}
        for name, value in self.wanted.items():
            kind = name.partition(".")[0]
            spread = (value - value.mean()).square() * self.weights.get(name, 1.0)
            energies[kind] = energies.get(kind, 0.0) + float(spread.sum())
        return energies


def total_harm(errors: Sequence[dict[str, float]], energies: Sequence[dict[str, float]]) -> float:
    """Harm over all probes: the mean relative error of the outputs that make boxes (or of a classifier's logits), plus
    that of masks or heatmaps; 0 if nothing has changed."""
    shares = {}
    for kind in energies[0]:
        energy = sum(found[kind] for found in energies)
        shares[kind] = sum(found.get(kind, 0.0) for found in errors) / max(energy, torch.finfo(torch.float32).tiny)
    boxes = [share for kind, share in shares.items() if kind not in OWN]
    return sum(boxes) / len(boxes) + sum(shares.get(kind, 0.0) for kind in OWN)
