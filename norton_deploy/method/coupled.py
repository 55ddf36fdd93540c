"""Coupled decomposition: similar filters share their channel factor.

The filters of a layer are put into G clusters of equal size. Those of cluster g share one factor C_g [I, R], and each
has its own Kh x Kw kernel for every shared input: W_k[p, m, n] = sum_r C_g(k)[p, r] D_k[r, m, n]. G = 1 is the low-rank
layer (Tucker-1); with G = O every filter has its own C as in eq. 2, its kernels D_k[r] in place of A_k[:, r] outer
B_k[:, r]. After V.-T. Pham, Y. Zniyed, T. P. Nguyen: Coupled Tensor Decomposition for Compact Network Representation
(IEEE TNNLS, 2026), which shares C between filters of rank-one terms; in the grouped form that engines run, a free
kernel costs as many MACs as a rank-one kernel, and its least-squares factors are an SVD, closed-form.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.filter_selection import column_spaces
from norton_deploy.method.layer_factors import leading_left

ROUNDS = 20
STARTS, CONTINUED = 12, 3


@dataclass(frozen=True)
class CoupledFactors:
    """Factors of O filters in G clusters of O / G.

    Attributes:
        channels: [G, I, R] float32, orthonormal columns: C, what the filters of a cluster share.
        kernels: [O, R, Kh, Kw] float32, each filter's own kernels on its cluster's R shared inputs.
        cluster: [O] int64, 0..G-1, the cluster of every filter.
    """

    channels: Tensor
    kernels: Tensor
    cluster: Tensor

    @property
    def order(self) -> Tensor:
        """Filters [O] sorted by cluster, each cluster's ascending."""
        return self.cluster.argsort(stable=True)

    def reconstruct(self) -> Tensor:
        """The filters [O, I, Kh, Kw] that the factors stand for, in their own order."""
        return torch.einsum("oir,orhw->oihw", self.channels[self.cluster], self.kernels)


def decompose_coupled(weight: Tensor, rank: int, clusters: int, *, cluster: Tensor | None = None) -> CoupledFactors:
    """Least-squares factors of a layer whose filters share channel factors in clusters of equal size.

    Given the clusters, each one's factors are the truncated SVD of the [I, O / G * Kh * Kw] unfolding of its filters:
    the exact optimum. The clusters are those of `cluster_filters`. Deterministic.

    Args:
        weight: [O, I, Kh, Kw], any floating dtype, finite.
        rank: number of shared inputs R of a cluster, 1 <= R <= min(I, O / G * Kh * Kw).
        clusters: G, a divisor of O.
        cluster: [O] int64, clusters that are known already; None finds them.

    Returns:
        Float32 factors on the weight's device.

    Raises:
        UserError: the rank or the number of clusters is impossible, or the weight is not finite.
    """
    check_coupled(tuple(weight.shape), rank, clusters)
    if cluster is None:
        cluster = cluster_filters([weight], rank, clusters)
    unfolded = _unfolded(weight)
    bases = _bases(unfolded, cluster, clusters, rank)
    kernels = torch.einsum("oir,oik->ork", bases[cluster], unfolded)
    return CoupledFactors(bases.float(), kernels.unflatten(2, tuple(weight.shape[2:])).float(), cluster)


def cluster_filters(weights: Sequence[Tensor], rank: int, clusters: int) -> Tensor:
    """Clusters of equal size, of filters whose channel subspaces are close.

    The first centres are filters far from each other by the principal angles between the subspaces that their [I,
    Kh*Kw] unfoldings span: the sum of the squared sines. Then, in turn, filters go to the clusters whose R shared
    inputs lose least of them (an assignment problem, since clusters are equally large), and each cluster gets the best
    R inputs for its filters (an SVD). Every step lowers the squared error, so this ends; the best of several starts is
    taken.

    Args:
        weights: [O, I, Kh, Kw] of one or more layers that write the same channels and so share their clusters; each
            counts relative to its own energy.
        rank: R.
        clusters: G, a divisor of O.

    Returns:
        [O] int64 on the weights' device, 0..G-1; clusters are numbered by their first filter.
    """
    layers = [_unfolded(weight) for weight in weights]
    layers = [layer / layer.norm().clamp_min(torch.finfo(layer.dtype).tiny) for layer in layers]
    count = len(layers[0])
    if clusters == 1 or clusters == count:
        return torch.arange(count, device=layers[0].device) * (clusters > 1)
    distance = torch.stack([_subspace_distance(layer, rank) for layer in layers]).sum(dim=0)
    energy = torch.stack([layer.square().sum(dim=(1, 2)) for layer in layers]).sum(dim=0)

    def losses(cluster: Tensor) -> tuple[float, Tensor]:
        loss = torch.stack([_losses(layer, cluster, clusters, rank) for layer in layers]).sum(dim=0)
        return float(loss.gather(1, cluster[:, None]).sum()), loss

    begun = []
    for first in energy.argsort(descending=True, stable=True)[:STARTS].tolist():
        cluster = _assign(distance[:, _far_filters(distance * energy, first, clusters)], clusters)
        begun.append((*losses(cluster), cluster))
    best, least = None, float("inf")
    for error, loss, cluster in sorted(begun, key=lambda start: start[0])[:CONTINUED]:
        for _ in range(ROUNDS):
            following = _assign(loss, clusters)
            following_error, loss = losses(following)
            if following_error >= error:
                break
            error, cluster = following_error, following
        if error < least:
            best, least = cluster, error
    assert best is not None  # the weights are finite, so one start has a finite error
    return _numbered(best)


def check_coupled(shape: tuple[int, ...], rank: int, clusters: int) -> None:
    """Raise UserError unless filters [O, I, Kh, Kw] can be coupled with this rank in so many clusters."""
    count, in_channels, kernel_h, kernel_w = shape
    if not 1 <= clusters <= count or count % clusters:
        raise UserError(f"{count} filters in {clusters} clusters: choose a divisor of {count}")
    limit = min(in_channels, count // clusters * kernel_h * kernel_w)
    if not 1 <= rank <= limit:
        raise UserError(f"rank {rank} of clusters of {count // clusters} filters: choose 1 to {limit}")


def _unfolded(weight: Tensor) -> Tensor:
    unfolded = weight.detach().double().flatten(2)
    if not bool(torch.isfinite(unfolded).all()):
        raise UserError("the weight has NaN or infinite values: it cannot be decomposed")
    return unfolded


def _bases(unfolded: Tensor, cluster: Tensor, clusters: int, rank: int) -> Tensor:
    """Of every cluster the R leading left singular vectors of its filters beside each other, [G, I, R]."""
    order = cluster.argsort(stable=True)
    members = unfolded[order].unflatten(0, (clusters, -1))  # [G, O / G, I, K]
    left = leading_left(members.transpose(1, 2).flatten(2), rank)
    largest = left.gather(1, left.abs().argmax(dim=1, keepdim=True))
    return left * torch.where(largest < 0, -1.0, 1.0)


def _losses(unfolded: Tensor, cluster: Tensor, clusters: int, rank: int) -> Tensor:
    """What every filter would lose in every cluster as the clusters are now, [O, G]."""
    bases = _bases(unfolded, cluster, clusters, rank)
    count, channels, positions = unfolded.shape
    seen = bases.mT.flatten(0, 1) @ unfolded.transpose(0, 1).reshape(channels, count * positions)  # [G * R, O * K]
    kept = seen.view(clusters, rank, count, positions).square().sum(dim=(1, 3)).T
    return unfolded.square().sum(dim=(1, 2))[:, None] - kept


def _assign(cost: Tensor, clusters: int) -> Tensor:
    """The assignment [O] of least total cost [O, G] that fills all clusters equally."""
    places = cost.repeat_interleave(len(cost) // clusters, dim=1).cpu().numpy()
    _, place = linear_sum_assignment(places)
    return torch.from_numpy(place // (len(cost) // clusters)).to(cost.device)


def _subspace_distance(unfolded: Tensor, rank: int) -> Tensor:
    """Sum of the squared sines of the principal angles between the filters' channel subspaces, [O, O]."""
    basis = column_spaces(unfolded)[0][:, :, :rank]
    count, channels, directions = basis.shape
    wide = basis.transpose(0, 1).reshape(channels, count * directions)
    cosines = torch.cat(  # some filters at a time, which bounds the memory
        [(some.mT @ wide).view(-1, directions, count, directions).square().sum(dim=(1, 3)) for some in basis.split(1)]
    )
    return min(rank, basis.shape[2]) - cosines


def _far_filters(distance: Tensor, first: int, count: int) -> list[int]:
    """`count` filters, each the one that is farthest from those before it, from `first` on."""
    chosen = [first]
    nearest = distance[first].clone()
    while len(chosen) < count:
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return chosen


def _numbered(cluster: Tensor) -> Tensor:
    """The same clusters, numbered in the order of their first filters."""
    first: dict[int, int] = {}
    return torch.tensor([first.setdefault(label, len(first)) for label in cluster.tolist()], device=cluster.device)
