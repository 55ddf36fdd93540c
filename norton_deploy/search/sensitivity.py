"""Harm of single choices: the error they cause where the model is judged, on real images, once they are fitted.

A layer's own reconstruction error says little about what a detector loses by it, and its loss before any repair little
about what is left after one. Here one group at a time is changed, coupled layers together. A decomposition is fitted in
closed form to the inputs of its layer; where channels go, their readers make up for them from those that stay. Then the
dense model's head outputs are compared with those that come out now, at the dense model's own proposals, on images that
the fit has not seen.

A classifier's logits do not tell: later layers absorb what one layer alone does, and not what all do together. Its
choices are judged where they are made, by the norm of the error relative to that of the outputs there; to first order
the sum of such norms bounds what all do together, but for the gain of the layers between.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norton_deploy.checkpoints.checkpoint import tensors_digest
from norton_deploy.compression.calibration import Probe, run_stages
from norton_deploy.compression.channel_groups import ChannelGroup, channel_groups
from norton_deploy.compression.channel_harm import (
    channel_loss,
    channel_moments,
    choose_by_harm,
    greedy_channels,
    reader_metric,
)
from norton_deploy.compression.compress import compress_with_kept
from norton_deploy.compression.frontier import Frontier
from norton_deploy.compression.normal_equations import NormalEquations
from norton_deploy.compression.refit import refit
from norton_deploy.method.plan import DENSE, CompressionPlan, Decomposition
from norton_deploy.result_file import ResultFile
from norton_deploy.search.decisions import Decision, form_macs
from norton_deploy.search.head_harm import Judge, total_harm
from norton_deploy.search.layer_fit import (
    absorbed,
    clustered,
    fitted_weight,
    input_moments,
    judged_filters,
    problem_of,
)

MOST_FORMS = 5
"""Decompositions of a group whose harm is measured."""


@dataclass(frozen=True)
class HarmImages:
    """What harm is measured on.

    Attributes:
        judged: images with boxes (`make_probes`) on which harm is measured.
        fitted: others, to which choices are fitted.
        digest: of the images as they were read and of how they are prepared. The resized pixels would not do:
            their last bits depend on the number of threads, and a measurement must go on under another one.
    """

    judged: tuple[Probe, ...]
    fitted: tuple[Probe, ...]
    digest: str


class Sensitivity:
    """Harm of each decomposition and each width of each decision, measured once and kept in a JSON file.

    First every candidate's relative error at the layer's own output is computed; only candidates that no other beats in
    both MACs and error are tried in the model. The harms of a group's decomposition and width are added, and so are
    those of different groups.

    """

    def __init__(
        self,
        dense: nn.Module,
        images: HarmImages,
        *,
        by_layer: bool = False,
        path: Path | None = None,
        resume: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            dense: in evaluation mode.
            images: on which harm is measured, and to which choices are fitted.
            by_layer: a choice's harm is the root of the relative squared error where it is made, on the images of the
                fit: at the outputs of the decomposed layers, or of those that read the kept channels.
            path: file that the results are kept in, with digests of what they depend on.
            resume: go on with the file's results.
            seed: of the decompositions and of the choice of positions.

        Raises:
            UserError: the file to go on with is about another model, other images or another seed.
        """
        self.dense, self.probes, self.fit_probes, self.seed = dense, images.judged, images.fitted, seed
        self.by_layer, self._judged_by = by_layer, "nmse" if by_layer else "harm"
        identity = {
            "weights": tensors_digest(dense.state_dict()), "images": images.digest, "seed": seed,
            "judged": len(images.judged), "fit_batches": len(images.fitted),
        }  # fmt: skip
        otherwise = "measured for another model, seed or other images: run without --resume"
        self._file = ResultFile(path, identity, resume=resume, otherwise=otherwise)
        with torch.no_grad():
            self._judges = [Judge(run_stages(dense, probe), probe.boxes) for probe in self.probes]
        self._energies = [judge.energies() for judge in self._judges]

    def measure(
        self, decisions: Sequence[Decision], progress: Callable[[int, int], None] = lambda done, count: None
    ) -> list[Decision]:
        """Measure what is missing; the file is written after every group.

        Args:
            decisions: about the dense model, with all candidates.
            progress: gets how many decisions are done, and how many there are.

        Returns:
            The decisions with those decompositions only whose harm is known.
        """
        order = {name: place for place, (name, _) in enumerate(self.dense.named_modules())}
        groups = channel_groups(self.dense)
        changed = {d.group: {*d.decomposed, *(reader.layer for reader in groups[d.group].readers)} for d in decisions}
        first = {group: min((order[name] for name in names), default=0) for group, names in changed.items()}
        narrowed: dict[str, Decision] = {}
        with torch.no_grad():
            moments = channel_moments(self.dense, self._narrowed_groups(decisions), self.fit_probes, self.seed)
            with Frontier(self.dense) as frontier:
                for decision in sorted(decisions, key=lambda d: first[d.group]):
                    rest = {name for d in decisions if d.group not in narrowed for name in changed[d.group]}
                    frontier.advance(rest, partial(self._run_all, frontier))
                    kept = self._measure_forms(decision, frontier)
                    narrowed[decision.group] = replace(decision, forms=(DENSE, *kept))
                    if decision.group in moments:
                        self._measure_widths(decision, moments.pop(decision.group), frontier)
                    self._file.save()
                    progress(len(narrowed), len(decisions))
        return [narrowed[decision.group] for decision in decisions]

    def of_option(self, group: str, form: Decomposition, keep: int) -> float:
        """Predicted harm of one group's option; what was not measured is untouched."""
        harms = [self._known(choice, self._judged_by, 0.0) for choice in (f"{group} {form}", f"{group} keep {keep}")]
        return sum(map(math.sqrt, harms)) if self.by_layer else sum(harms)

    @torch.no_grad()
    def of_plan(self, plan: CompressionPlan) -> float:
        """Measured harm of a plan, compressed and refitted on the images of the fit."""
        chosen = choose_by_harm(self.dense, plan, self.fit_probes, seed=self.seed) if plan.choose == "harm" else None
        small = compress_with_kept(self.dense, plan, seed=self.seed, starts=1, chosen=chosen)
        refit(small.model, self.dense, small.kept, self.fit_probes, seed=self.seed)
        return self._harm(small.model)

    def _narrowed_groups(self, decisions: Sequence[Decision]) -> dict[str, ChannelGroup]:
        """Groups with a width whose harm is not known."""
        groups = channel_groups(self.dense)
        return {
            d.group: groups[d.group]
            for d in decisions
            if any(self._known(f"{d.group} keep {width}", self._judged_by) is None for width in d.widths[1:])
        }

    def _measure_forms(self, decision: Decision, frontier: Frontier) -> list[Decomposition]:
        """The group's decompositions that no other beats, their harm measured."""
        group, layers = decision.group, {name: _convolution(self.dense, name) for name in decision.decomposed}
        candidates = decision.forms[1:]
        names = {form: f"{group} {form}" for form in candidates}
        nmse = {form: self._known(name, "nmse") for form, name in names.items()}
        if all(value is not None for value in nmse.values()):
            kept = undominated(layers, nmse, self._most_forms)
            if all(self._known(names[form], self._judged_by) is not None for form in kept):
                return kept
        moments = input_moments(
            self.dense, decision.decomposed, self._run_fit(frontier), len(self.fit_probes), self.seed
        )
        problems = {name: problem_of(conv, moments[name]) for name, conv in layers.items()}
        weights = {name: conv.weight.detach() for name, conv in layers.items()}
        fitted: dict[Decomposition, dict[str, Tensor]] = {}
        for form in candidates:
            nmse[form], fitted[form] = self._fitted(form, weights, problems, judged_only=True)
            self._file.cells[names[form]] = {"nmse": nmse[form]}
        kept = undominated(layers, nmse, self._most_forms)
        for form in () if self.by_layer else kept:
            if any(len(fitted[form][name]) < len(weight) for name, weight in weights.items()):
                _, fitted[form] = self._fitted(form, weights, problems)
            biases = {
                name: conv.bias + (conv.weight - fitted[form][name]).flatten(1) @ moments[name].mean.float()
                for name, conv in layers.items()
                if conv.bias is not None
            }
            with _changed(self.dense, fitted[form], biases):
                self._file.cells[names[form]]["harm"] = self._harm(self.dense, frontier)
        return kept

    def _fitted(
        self,
        form: Decomposition,
        weights: Mapping[str, Tensor],
        problems: Mapping[str, NormalEquations],
        *,
        judged_only: bool = False,
    ) -> tuple[float, dict[str, Tensor]]:
        """Relative squared error of a group's layers in a form, and their fitted weights; `judged_only` fits only
        `judged_filters`."""
        order = clustered(list(weights.values()), form) if form.form == "coupled" else None
        error, energy, fitted = 0.0, 0.0, {}
        for name, weight in weights.items():
            problem = problems[name]
            if judged_only and len(some := judged_filters(len(weight), form)) < len(weight):
                weight, problem = weight[some], problem.of_outputs(some)
            fitted[name] = fitted_weight(weight, problem, form, order, seed=self.seed)
            error += float(problem.squared_error(fitted[name].flatten(1)).sum())
            energy += float(problem.energy.sum())
        return error / max(energy, torch.finfo(torch.float32).tiny), fitted

    def _measure_widths(self, decision: Decision, moments: Tensor, frontier: Frontier) -> None:
        """Harm of each width of a group."""
        group = channel_groups(self.dense)[decision.group]
        metric = reader_metric(self.dense, group)
        order = greedy_channels(moments, metric, decision.widths[1])
        for width in decision.widths[1:]:
            kept = order[:width].sort().values
            cell = self._file.cells[f"{decision.group} keep {width}"] = {}
            if self.by_layer:
                cell["nmse"] = channel_loss(moments, metric, kept)
                continue
            with _changed(self.dense, absorbed(self.dense, group, moments.double(), kept), {}):
                cell["harm"] = self._harm(self.dense, frontier)

    @property
    def _most_forms(self) -> int:
        return sys.maxsize if self.by_layer else MOST_FORMS

    def _known(self, choice: str, what: str, otherwise: Any = None) -> Any:
        return self._file.cells.get(choice, {}).get(what, otherwise)

    def _harm(self, model: nn.Module, frontier: Frontier | None = None) -> float:
        errors = []
        for number, (probe, judge) in enumerate(zip(self.probes, self._judges, strict=True)):
            if frontier is not None:
                frontier.probe = number
            errors.append(judge.errors(run_stages(model, probe)))
        return total_harm(errors, self._energies)

    def _run_fit(self, frontier: Frontier) -> Callable[[int], None]:
        """Runs the dense model on one probe of the fit, whose numbers follow those of the others."""

        def run(number: int) -> None:
            frontier.probe = len(self.probes) + number
            run_stages(self.dense, self.fit_probes[number])

        return run

    def _run_all(self, frontier: Frontier) -> None:
        for number, probe in enumerate((*self.probes, *self.fit_probes)):
            frontier.probe = number
            run_stages(self.dense, probe)


def undominated(
    layers: Mapping[str, nn.Conv2d], nmse: Mapping[Decomposition, float], most: int = MOST_FORMS
) -> list[Decomposition]:
    """Decompositions of layers that no other beats in both MACs and error, at most so many, evenly spread; by falling
    MACs."""
    macs = {form: sum(form_macs(conv, form) for conv in layers.values()) for form in nmse}
    found: list[Decomposition] = []
    for form in sorted(nmse, key=lambda form: (macs[form], nmse[form])):
        if not found or nmse[form] < nmse[found[-1]]:
            found.append(form)
    if len(found) > most:
        found = [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]
    return found[::-1]


@contextmanager
def _changed(model: nn.Module, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights and biases of some layers, for the time being."""
    new = {f"{name}.weight": value for name, value in weights.items()}
    new |= {f"{name}.bias": value for name, value in biases.items()}
    parameters = {name: model.get_parameter(name) for name in new}
    old = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = new[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = old[name]


def _convolution(model: nn.Module, name: str) -> nn.Conv2d:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)  # a decision names convolutions only
    return layer
