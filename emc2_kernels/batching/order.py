"""An order of the items in which neighbours are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import checks
from .extra import extra

if TYPE_CHECKING:
    from scipy.sparse import csr_array


def consecutive_order(matrix: csr_array, *, seed: int = 0) -> np.ndarray:
    """(N,) int64 items, so that what the (N, N) graph joins lies close: reverse Cuthill-McKee of the symmetrised graph.

    The method narrows the graph's bandwidth, the farthest that two joined items lie apart; components follow one
    another. Items that nothing is joined to come last, shuffled by ``seed``: in the order of the data set, batches of
    them would have what that order has in common, such as the class.

    Raises:
        ValueError, TypeError: the matrix is not sparse or not square, or the seed is negative.
        ImportError: SciPy is missing.
    """
    sparse, csgraph = extra("scipy.sparse"), extra("scipy.sparse.csgraph")
    if not sparse.issparse(matrix):
        raise TypeError(f"matrix must be a sparse SciPy array, got {checks.describe(matrix)}")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must have shape (N, N), got {matrix.shape}")
    checks.at_least("seed", seed, 0)
    symmetric = matrix.maximum(matrix.T).tocsr()
    order = csgraph.reverse_cuthill_mckee(symmetric, symmetric_mode=True).astype(np.int64)
    alone = np.diff(symmetric.indptr)[order] == 0
    return np.concatenate([order[~alone], np.random.default_rng(seed).permutation(order[alone])])
