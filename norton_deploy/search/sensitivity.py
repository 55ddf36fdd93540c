"""Harm of single choices: the error they cause where the model is judged, on real images.

A layer's own reconstruction error says little about what a detector loses by it. Here one group at a time is
compressed, coupled layers together, and the dense model's feature pyramid and head outputs are compared with those
that come out now, at the same boxes.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from norton_deploy.checkpoints.checkpoint import tensors_digest
from norton_deploy.compression.calibration import Probe, run_stages
from norton_deploy.compression.channel_groups import PYRAMID_GROUP
from norton_deploy.compression.compress import compress_with_kept
from norton_deploy.files import ResultFile
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.search.planner import Decision


class Sensitivity:
    """Harm of each rank and each width of each decision, measured once and kept in a JSON file.

    The harm of outputs y' against the dense model's y is sum (y' - y)^2 / sum (y - mean y)^2, averaged over the
    kinds of output (pyramid, objectness, box deltas, class logits, masks or heatmaps). The harms of a group's rank
    and width are added, and so are those of different groups.
    """

    def __init__(
        self,
        dense: nn.Module,
        architecture: str,
        probes: Sequence[Probe],
        *,
        path: Path | None = None,
        resume: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            dense: in evaluation mode.
            architecture: of the plans, "rcnn" for a detector.
            probes: images with boxes (`make_probes`).
            path: file that the results are kept in, with digests of what they depend on.
            resume: go on with the file's results.
            seed: of the decompositions.

        Raises:
            UserError: the file to go on with is about another model, other images or another seed.
        """
        self.dense, self.architecture, self.probes, self.seed = dense, architecture, probes, seed
        identity = {
            "weights": tensors_digest(dense.state_dict()),
            "pixels": tensors_digest({str(number): probe.pixels for number, probe in enumerate(probes)}),
            "seed": seed,
        }
        otherwise = "measured for another model, seed or other images: run without --resume"
        self._file = ResultFile(path, identity, resume=resume, otherwise=otherwise)
        self.harm: dict[str, float] = self._file.cells
        with torch.no_grad():
            self._wanted = [run_stages(dense, probe) for probe in probes]

    def measure(self, decisions: Sequence[Decision], progress: Callable[[int], None] | None = None) -> None:
        """Measure what is missing; the file is written after every choice, and `progress` gets how many are done."""
        for done, (key, plan) in enumerate(self._single_choices(decisions), start=1):
            if key not in self.harm:
                self._file.add({key: self.of_plan(plan)})
            if progress is not None:
                progress(done)

    def of_option(self, group: str, rank: int, keep: int) -> float:
        """Predicted harm of one group's option; what was not measured is untouched."""
        return self.harm.get(f"{group} rank {rank}", 0.0) + self.harm.get(f"{group} keep {keep}", 0.0)

    @torch.no_grad()
    def of_plan(self, plan: CompressionPlan) -> float:
        """Measured harm of a plan."""
        small = compress_with_kept(self.dense, plan, seed=self.seed, starts=1)
        squared: dict[str, float] = {}
        energy: dict[str, float] = {}
        for probe, wanted in zip(self.probes, self._wanted, strict=True):
            for name, found in run_stages(small.model, probe).items():
                target = wanted[name]
                if found.shape != target.shape:  # A narrower pyramid is compared where it still exists.
                    target = target[:, small.kept[PYRAMID_GROUP]]
                kind = name.partition(".")[0]
                squared[kind] = squared.get(kind, 0.0) + float((found - target).square().sum())
                energy[kind] = energy.get(kind, 0.0) + float((target - target.mean()).square().sum())
        return sum(squared[kind] / energy[kind] for kind in squared) / len(squared)

    @staticmethod
    def count(decisions: Sequence[Decision]) -> int:
        """Number of single choices to measure."""
        return sum(len(decision.ranks) + len(decision.widths) - 2 for decision in decisions)

    def _single_choices(self, decisions: Sequence[Decision]) -> Iterator[tuple[str, CompressionPlan]]:
        for decision in decisions:
            for rank in decision.ranks[1:]:
                ranks = dict.fromkeys(decision.decomposed, rank)
                yield f"{decision.group} rank {rank}", CompressionPlan(self.architecture, ranks)
            for width in decision.widths[1:]:
                keep = {decision.group: width}
                yield f"{decision.group} keep {width}", CompressionPlan(self.architecture, {}, keep)
