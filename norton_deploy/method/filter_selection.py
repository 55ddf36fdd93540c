"""Which filters of a layer survive (Algorithm 1)."""

import math

import numpy as np
import torch
from torch import Tensor

from norton_deploy.errors import UserError


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
