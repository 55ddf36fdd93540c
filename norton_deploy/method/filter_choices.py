"""Ways to choose which filters of a layer survive: the paper's (PABS, Algorithm 1) and those it is compared with.

A choice gets the filters of all layers that share one channel axis, so that coupled layers keep the same
channels, and the number to keep; it returns the kept indices, ascending. Filters are CP factors where a layer has
been decomposed, and vectors [O, F] (flattened) where it has not.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.cp import CPFactors
from norton_deploy.method.filter_selection import select_filters
from norton_deploy.method.subspace_angles import EQUAL_WEIGHTS, AngleMeasure, pabs_distance

Filters = CPFactors | Tensor
FilterChoice = Callable[[Sequence[Filters], int], Tensor]
SWITCHED_OFF = 1e-2
"""A filter whose norm is below this fraction of its layer's largest has been switched off by its training. No filter of
VGG-16-BN is after training as a dense network: its smallest are at 0.08 of the largest."""


def choose_by_angles(
    layers: Sequence[Filters],
    keep: int,
    *,
    weights: tuple[float, float, float] = EQUAL_WEIGHTS,
    measure: AngleMeasure = "largest",
) -> Tensor:
    """The paper's choice: Algorithm 1 on the principal angles between the factors (eq. 11), summed over the layers.

    Args:
        layers: filters of the coupled layers, O each.
        keep: number of filters O' to keep, 1 <= O' <= O.
        weights: alpha, beta, gamma of eq. 11.
        measure: how the principal angles become one distance (`pabs_distance`).

    Returns:
        Kept indices [O'], int64, ascending.
    """
    distance = torch.stack([pabs_distance(filters, weights=weights, measure=measure) for filters in layers]).sum(dim=0)
    return select_filters(distance, keep)


def choose_living_by_angles(layers: Sequence[Filters], keep: int) -> Tensor:
    """`choose_by_angles` among the filters that do something; those that were switched off go first.

    For filters that were trained as factors. Weight decay on the three factors of a filter shrinks their product three
    times as fast as decay of the product would, down to nothing where the loss does not resist. Angles do not see it:
    filters that do something become alike, those that do nothing keep their random directions, and Algorithm 1 would
    keep these. A channel is switched off if it is in all of the layers. If fewer than `keep` are left, the largest of
    the others are kept too.

    Args, Returns: see `choose_by_angles`.
    """
    norms = [_vectors([filters]).norm(dim=1) for filters in layers]
    size = torch.stack([norm / norm.max().clamp_min(torch.finfo(norm.dtype).tiny) for norm in norms]).amax(dim=0)
    living = (size >= SWITCHED_OFF).nonzero().flatten().cpu()
    if len(living) <= keep:
        return _largest(size, keep)
    parts = [
        filters.select_filters(living) if isinstance(filters, CPFactors) else filters[living.to(filters.device)]
        for filters in layers
    ]
    return living[choose_by_angles(parts, keep)]


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


def _vectors(layers: Sequence[Filters]) -> Tensor:
    """The filters of all layers side by side, [O, F] float64; of decomposed layers, as their factors rebuild them."""
    dense = [part.reconstruct().flatten(1) if isinstance(part, CPFactors) else part for part in layers]
    return torch.cat([part.detach().double() for part in dense], dim=1)


def _largest(score: Tensor, keep: int) -> Tensor:
    if not 1 <= keep <= len(score):
        raise UserError(f"keep={keep} filters of {len(score)}: choose 1 to {len(score)}")
    return score.argsort(descending=True, stable=True)[:keep].sort().values.cpu()
