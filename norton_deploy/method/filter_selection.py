"""Which filters of a layer survive: Algorithm 1 on the principal angles between decomposed filters (section II-B).

A. Bjorck, G. H. Golub: Numerical methods for computing angles between linear subspaces, 1973.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.cp import CPFactors

AngleMeasure = Literal["largest", "norm"]
EQUAL_WEIGHTS = (1 / 3, 1 / 3, 1 / 3)
# Singular values below this fraction of the largest are noise: the factors are float32.
RANK_TOLERANCE = 1e-6
# Below this angle (radians) the sine is used. Bjorck & Golub switch at pi/4, where the two are equally good; the
# cosine's angle is off by about 1e-15 / angle, which in float64 is still 1e-10 here, far below the rounding of
# float32 factors, and sines take the full length of the columns for every pair.
SMALL_ANGLE = 1e-5
# Upper bound on the numbers held at once for one block of pairs (float64: 8 MiB).
BLOCK_NUMBERS = 2**20
DEAD = 1e-6
"""A filter whose norm is below this fraction of its layer's largest contributes nothing."""
Filters = CPFactors | Tensor
FilterChoice = Callable[[Sequence[Filters], int], Tensor]


def principal_angles(X: Tensor, Y: Tensor) -> Tensor:
    """Principal angles between the column spaces of every X_i and every Y_j.

    Cosines are the singular values of Qx^T Qy, sines those of (I - Qx Qx^T) Qy; small angles come from the sine,
    because the cosine loses digits there (Bjorck & Golub, section 3).

    Subspaces count with their numerical dimension: columns that are zero or depend on others add nothing, and a
    zero factor spans {0}. Where the dimensions of a pair differ, each dimension that has no partner counts as an
    angle of pi/2; unused places hold 0. So equal subspaces have all angles 0, {0} against {0} too.

    Args:
        X: [N, n, R].
        Y: [M, n, R].

    Returns:
        [N, M, min(n, R)] float64 radians in [0, pi/2], ascending.
    """
    basis_X, dimension_X = _orthonormal_bases(X)
    basis_Y, dimension_Y = _orthonormal_bases(Y)
    return _angles(basis_X, dimension_X, basis_Y, dimension_Y)


def pabs_distance(
    factors: CPFactors | Tensor, weights: Sequence[float] = EQUAL_WEIGHTS, measure: AngleMeasure = "largest"
) -> Tensor:
    """Distances between all filters of a layer: D = alpha D^A + beta D^B + gamma D^C (eq. 11).

    The filters of a 1x1 convolution are vectors, and their distance is the angle between the lines they span.
    Angles ignore scale, sign and the order of the columns. A mode whose factors all span the whole space (R >= Kh
    for A) contributes 0 to every distance.

    Args:
        factors: factors of O filters, or the vectors [O, I] of a 1x1 convolution.
        weights: (alpha, beta, gamma) >= 0 with sum 1; not used for vectors.
        measure: phi of a pair of factors: the "largest" principal angle (radians, 0 to pi/2), the plainest reading
            of the paper, or the 2-"norm" of all of them (0 to sqrt(R) pi/2); at rank 1 they are the same. MATLAB's
            `subspace` is the largest too, but counts no missing dimensions.

    Returns:
        D [O, O] float64, symmetric, zero diagonal.

    Raises:
        UserError: weights that are negative or do not sum to 1, an unknown measure, values that are not finite.
    """
    if measure not in ("largest", "norm"):
        raise UserError(f"measure {measure!r}: expected 'largest' or 'norm'")
    if len(weights) != 3 or min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(f"weights {tuple(weights)}: expected three numbers >= 0 whose sum is 1 (eq. 11)")
    if isinstance(factors, Tensor):
        if factors.ndim != 2:
            raise ValueError(f"vectors of shape {tuple(factors.shape)}: expected [O, I]")
        return _mode_distance(factors[:, :, None], measure)
    modes = zip(weights, (factors.A, factors.B, factors.C), strict=True)
    terms = [weight * _mode_distance(factor, measure) for weight, factor in modes if weight > 0]
    return torch.stack(terms).sum(dim=0)


def _mode_distance(factor: Tensor, measure: AngleMeasure) -> Tensor:
    """phi between all pairs of one mode: [O, n, R] -> [O, O]."""
    count = len(factor)
    basis, dimension = _orthonormal_bases(factor)
    distance = torch.zeros(count, count, dtype=torch.float64, device=factor.device)
    if bool((dimension == factor.shape[1]).all()):
        return distance
    rows = max(1, BLOCK_NUMBERS // (count * basis.shape[2] ** 2))
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        # D is symmetric: every pair is computed once, from the row of the smaller index.
        angles = _angles(basis[block], dimension[block], basis[start:], dimension[start:])
        reduced = angles[..., -1] if measure == "largest" else torch.linalg.vector_norm(angles, dim=-1)
        distance[block, start:] = reduced
    distance = distance.triu(diagonal=1)
    return distance + distance.mT


def _orthonormal_bases(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Bases [N, n, min(n, R)] float64 of the column spaces, zero beyond their numerical dimensions [N]."""
    if not bool(torch.isfinite(factor).all()):
        raise UserError("factors with NaN or infinite values have no subspace: decompose the layer again")
    columns = factor.detach().double()
    # The lengths of the columns say nothing about their span, so they must not decide what counts as noise.
    length = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    return column_spaces(columns / torch.where(length > 0, length, 1))


def column_spaces(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column spaces of a stack of matrices.

    Args:
        columns: [N, n, m].

    Returns:
        The left singular vectors [N, n, min(n, m)] by falling singular value, zero where that is noise; their number
        without those, [N].
    """
    left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    present = singular > RANK_TOLERANCE * singular[:, :1]
    return left * present[:, None], present.sum(dim=1)


def _angles(basis_X: Tensor, dimension_X: Tensor, basis_Y: Tensor, dimension_Y: Tensor) -> Tensor:
    """Principal angles [N, M, L] of zero-padded orthonormal bases [N, n, L], [M, n, L] of dimensions [N], [M]."""
    length = basis_X.shape[2]
    product = torch.einsum("xnr,yns->xyrs", basis_X, basis_Y)
    cosine = _singular_values(product).clamp(max=1)
    low = torch.minimum(dimension_X[:, None], dimension_Y)
    high = torch.maximum(dimension_X[:, None], dimension_Y)
    place = torch.arange(length, device=basis_X.device)
    angles = cosine.acos()
    small = ((angles < SMALL_ANGLE) & (place < low[..., None])).any(dim=-1).nonzero()
    for x, y in (part.unbind(1) for part in small.split(max(1, BLOCK_NUMBERS // basis_X[0].numel()))):
        # The residual of the smaller subspace against the larger one.
        swap = (dimension_X[x] < dimension_Y[y])[:, None, None]
        larger = torch.where(swap, basis_Y[y], basis_X[x])
        smaller = torch.where(swap, basis_X[x], basis_Y[y])
        sine = _singular_values(smaller - larger @ (larger.mT @ smaller)).clamp(max=1)
        # Sines fall while angles rise, and the padding's zeros come last: angle k has sine low - 1 - k.
        rising = (low[x, y][:, None] - 1 - place).clamp_min(0)
        from_sine = sine.take_along_dim(rising, dim=1).asin()
        angles[x, y] = torch.where(from_sine < SMALL_ANGLE, from_sine, angles[x, y])
    angles = torch.where(place < low[..., None], angles, math.pi / 2)
    return torch.where(place < high[..., None], angles, 0.0).sort(dim=-1).values


def _singular_values(matrices: Tensor) -> Tensor:
    """Singular values [..., L] of [..., n, L], descending."""
    if matrices.shape[-1] == 1:
        return torch.linalg.vector_norm(matrices, dim=-2)
    return torch.linalg.svdvals(matrices)


def select_filters(distance: Tensor, keep: int) -> Tensor:
    """Algorithm 1: drop one filter of the closest pair, again and again, until `keep` are left.

    Of the closest pair (i, j), i < j, filter i goes if the sum of its distances to all filters still present is
    at most that of j, otherwise j goes. Among equally close pairs the lowest (i, j) in row-major order is taken.
    Sums are rounded once (`math.fsum`), so the answer does not depend on the order of summation.

    Args:
        distance: D [O, O], finite, symmetric; the diagonal is not used.
        keep: number of filters O' to keep, 1 <= O' <= O.

    Returns:
        Indices of the kept filters, [O'] int64, ascending, on the CPU.

    Raises:
        UserError: `keep` is out of range.
    """
    D = distance.detach().cpu().double().numpy().copy()
    if D.ndim != 2 or D.shape[0] != D.shape[1]:
        raise ValueError(f"distance of shape {D.shape}: expected [O, O]")
    count = len(D)
    if not 1 <= keep <= count:
        raise UserError(f"keep={keep} filters of {count}: choose 1 to {count}")
    np.fill_diagonal(D, 0)
    if not np.isfinite(D).all() or not np.array_equal(D, D.T):
        raise ValueError("distance: expected a symmetric matrix of finite numbers")

    # `upper` holds the pairs (row < column) still present, `nearest[i]` the first smallest entry of row i.
    upper = np.where(np.triu(np.ones((count, count), dtype=bool), k=1), D, np.inf)
    present = np.ones(count, dtype=bool)
    nearest = upper.argmin(axis=1)
    shortest = upper[np.arange(count), nearest]
    for _ in range(count - keep):
        i = int(shortest.argmin())
        j = int(nearest[i])
        dropped = i if math.fsum(D[i, present]) <= math.fsum(D[j, present]) else j
        present[dropped] = False
        upper[dropped, :] = np.inf
        upper[:, dropped] = np.inf
        stale = np.flatnonzero((nearest == dropped) & present)
        nearest[stale] = upper[stale].argmin(axis=1)
        shortest[stale] = upper[stale, nearest[stale]]
        shortest[dropped] = np.inf
    return torch.from_numpy(np.flatnonzero(present))


def choose_by_angles(
    layers: Sequence[Filters],
    keep: int,
    *,
    measure: AngleMeasure = "largest",
    dead: float = DEAD,
) -> Tensor:
    """The paper's choice: Algorithm 1 on the principal angles between the factors (eq. 11), summed over the layers.

    Filters that do nothing go first. Angles do not see them: a filter that is zero is farther from every other than any
    two that do something, and Algorithm 1 would keep it. A channel is dead if it is in all of the layers. If at most
    `keep` live, the largest are kept.

    Args:
        layers: filters of the coupled layers, O each.
        keep: number of filters O' to keep, 1 <= O' <= O.
        measure: how the principal angles become one distance (`pabs_distance`).
        dead: norm, as a fraction of the largest of its layer, below which a filter does nothing.

    Returns:
        Kept indices [O'], int64, ascending.
    """
    dense = [part.reconstruct() if isinstance(part, CPFactors) else part for part in layers]
    norms = [filters.detach().double().flatten(1).norm(dim=1) for filters in dense]
    size = torch.stack([norm / norm.max().clamp_min(torch.finfo(norm.dtype).tiny) for norm in norms]).amax(dim=0)
    living = (size >= dead).nonzero().flatten()
    if len(living) <= keep and len(living) < len(size):
        return size.argsort(descending=True, stable=True)[:keep].sort().values.cpu()
    if len(living) < len(size):
        layers = [part.select_filters(living) if isinstance(part, CPFactors) else part[living] for part in layers]
    distance = torch.stack([pabs_distance(filters, measure=measure) for filters in layers]).sum(dim=0)
    return living.cpu()[select_filters(distance, keep)]
