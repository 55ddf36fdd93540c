"""Other ways to choose which filters of a layer survive, which Algorithm 1 is compared with (`FilterChoice`s)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.cp import CPFactors
from norton_deploy.method.filter_selection import Filters, choose_by_angles

SWITCHED_OFF = 1e-2
"""A filter whose norm is below this fraction of its layer's largest has been switched off by its training. No filter of
VGG-16-BN is after training as a dense network: its smallest are at 0.08 of the largest."""


def choose_by_l1_norm(layers: Sequence[Filters], keep: int) -> Tensor:
    """The filters with the largest L1 norms (Li et al., ICLR 2017), summed over the layers; ties to the first."""
    return _largest(_vectors(layers).abs().sum(dim=1), keep)


def choose_by_geometric_median(layers: Sequence[Filters], keep: int) -> Tensor:
    """FPGM (He et al., CVPR 2019): the filters whose Euclidean distances to all others sum highest.

    Those nearest to the layer's geometric median, which the others can replace best, go. Coupled layers' filters
    are joined to one vector. Ties go to the first.
    """
    vectors = _vectors(layers)
    # Not by way of the Gram matrix: equal filters must have the distance 0.
    distance = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    return _largest(distance.sum(dim=1), keep)


def choose_at_random(layers: Sequence[Filters], keep: int, *, generator: torch.Generator) -> Tensor:
    """`keep` filters, all sets equally likely; the control."""
    return _largest(torch.rand(len(_vectors(layers)), generator=generator), keep)


def choose_living_by_angles(layers: Sequence[Filters], keep: int) -> Tensor:
    """`choose_by_angles` for filters that were trained as factors, where those that were switched off go first.

    Weight decay on the three factors of a filter shrinks their product three times as fast as decay of the product
    would, down to nothing where the loss does not resist.
    """
    return choose_by_angles(layers, keep, dead=SWITCHED_OFF)


def _vectors(layers: Sequence[Filters]) -> Tensor:
    """The filters of all layers side by side, [O, F] float64; of decomposed layers, as their factors rebuild them."""
    dense = [part.reconstruct().flatten(1) if isinstance(part, CPFactors) else part for part in layers]
    return torch.cat([part.detach().double() for part in dense], dim=1)


def _largest(score: Tensor, keep: int) -> Tensor:
    if not 1 <= keep <= len(score):
        raise UserError(f"keep={keep} filters of {len(score)}: choose 1 to {len(score)}")
    return score.argsort(descending=True, stable=True)[:keep].sort().values.cpu()
