"""Which items are alike: the largest similarities of a data set as a sparse graph, never as an N x N array."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import checks

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SCOPES = ("global", "row")
MAX_PER_ROW = 1024
MAX_ENTRIES = 1 << 30  # symmetrised, they are up to twice as many, and SciPy's orderings count in int32
PROGRESS_ABOVE = 50_000  # items: from here on it takes long enough to be watched
TILE_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}  # similarities held at a time: 128 MiB and 1 GiB
# Of the threshold's sample. Rows are few where the data set is large; by these, they are 256 at least.
SAMPLE_ELEMENTS, SAMPLE_COLUMNS = 1 << 25, 1 << 17
EQUAL = 1e-6  # relative difference that rounding makes of equal similarities


class GraphFacts(NamedTuple):
    """What a graph was made by. Levels are shares of the N (N - 1) similarities off the diagonal.

    Attributes:
        threshold: similarities from here on up are entries; None with scope "row".
        level: share that is not an entry by its quantile, counted.
        level_error: standard error of the threshold's level, where it was estimated; 0 where it is exact.
        entries: kept, before symmetrising.
        capped_rows: rows that had more than max_per_row of them.
    """

    threshold: float | None
    level: float
    level_error: float
    entries: int
    capped_rows: int


class SimilarityGraph(NamedTuple):
    """Which items are alike, and how that was found.

    Attributes:
        matrix: (N, N) bool, sparse; nothing on the diagonal, not symmetric.
        facts: what it was made by.
    """

    matrix: csr_array
    facts: GraphFacts


def similarity_graph(
    x: Tensor,
    y: Tensor | None = None,
    *,
    quantile: float = 0.999,
    scope: str = "global",
    max_per_row: int = MAX_PER_ROW,
    normalize: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> SimilarityGraph:
    """The entries of x yᵀ at or above their quantile, without the diagonal (GCBS, arXiv 2210.12874).

    Time is O(N² d); memory O(N (d + max_per_row)) and what is held at a time of similarities, a tile or a sample.

    Args:
        x: (N, d) embeddings, N >= 2, floating point.
        y: (N, d) of the other tower; None: x.
        quantile: share of the similarities that are no entries, 0 <= quantile < 1.
        scope: "global": one threshold for all rows, exact for up to 5,792 items; above that it is estimated on rows
            drawn by ``seed``, and the facts say how well. Similarities that equal it up to rounding are entries.
            "row": of each row as many of the largest as its own quantile leaves, exact.
        max_per_row: rows that have more entries keep the largest. It bounds the memory.
        normalize: cosine similarities, which the losses have by default.
        seed: of the rows by which a threshold is estimated.
        progress: whether a bar is shown; None: above 50,000 items.

    Raises:
        ValueError, TypeError: an argument is wrong, or no order could come of it: NaN, infinity, a row of zeros, which
            has no direction, similarities that are all equal or overflow.
        ImportError: SciPy is missing, or tqdm where a bar is to be shown.
    """
    sparse = extra("scipy.sparse")
    checks.number_in("quantile", quantile, 0, 1, open_high=True)
    checks.one_of("scope", scope, SCOPES)
    checks.at_least("max_per_row", max_per_row, 1)
    checks.counter("seed", checks.integer("seed", seed), 64, torch.device("cpu"))
    if progress is not None:
        checks.boolean("progress", progress)
    x, y = _embeddings(x, y, normalize)
    n = x.shape[0]
    most = min(max_per_row, n - 1)
    threshold, level_error = _estimate_threshold(x, y, quantile, seed)
    if scope == "row":  # each row's largest, as many as its quantile says: a cap, and no threshold
        wanted = max(1, round((1 - quantile) * (n - 1)))
        rows = _largest(x, y, -torch.inf, min(most, wanted), progress)
        facts = GraphFacts(None, 1 - wanted / (n - 1), 0.0, rows.columns.size, n if wanted > most else 0)
    else:
        rows = _largest(x, y, threshold, most, progress)
        level = 1 - int(rows.found.sum()) / (n * (n - 1))
        facts = GraphFacts(threshold, level, level_error, rows.columns.size, int((rows.found > most).sum()))
    return SimilarityGraph(
        sparse.csr_array((np.ones(rows.columns.size, bool), rows.columns, rows.starts), (n, n)), facts
    )


def _embeddings(x: Any, y: Any, normalize: bool) -> tuple[Tensor, Tensor]:
    """Checked, in float32; the second is the first where there is one tower."""
    checks.boolean("normalize", normalize)
    x_rows = _tower("x", x, normalize)
    if y is None or y is x:
        return x_rows, x_rows
    checks.tensor("y", y)
    if y.shape != x.shape or y.device != x.device:
        raise ValueError(f"y must have shape {tuple(x.shape)} on {x.device}, as x, got {checks.describe(y)}")
    return x_rows, _tower("y", y, normalize)


def _tower(name: str, value: Any, normalize: bool) -> Tensor:
    checks.matrix(name, value)
    if value.shape[0] < 2 or value.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, d), N >= 2, d >= 1, got {checks.describe(value)}")
    rows = value.detach().float()
    largest = rows.abs().amax(1)
    _no_row(name, "finite", ~largest.isfinite(), rows)
    if not normalize:
        return rows
    _no_row(name, "nonzero, to have a direction", largest == 0, rows)
    rows = rows / largest[:, None]  # else a square could overflow, or all of a row's vanish
    return rows / rows.norm(dim=1, keepdim=True)


def _no_row(name: str, expected: str, bad: Tensor, rows: Tensor) -> None:
    if bad.any():
        count, first = int(bad.sum()), int(bad.nonzero()[0])
        what = f"{count} that are not, of {len(rows)}; the first is row {first}, {rows[first, :3].tolist()} ..."
        raise ValueError(f"{name}'s rows must be {expected}, got {what}")


def _estimate_threshold(x: Tensor, y: Tensor, quantile: float, seed: int) -> tuple[float, float]:
    """The quantile of the similarities off the diagonal, and the standard error of its level; of all rows where they
    are few, else of a sample of rows, against a sample of the columns where those are many."""
    n = x.shape[0]
    num_columns = min(n, SAMPLE_COLUMNS)
    num_rows = min(n, SAMPLE_ELEMENTS // num_columns)
    generator = torch.Generator("cpu").manual_seed(seed)
    rows, columns = (
        torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")[:count].sort().values.to(x.device)
        for count in (num_rows, num_columns)
    )
    sample = x[rows] @ y[columns].T
    diagonal = rows[:, None] == columns
    low = float(sample.masked_fill_(diagonal, torch.inf).min())
    high = float(sample.masked_fill_(diagonal, -torch.inf).max())  # stays so: the diagonal comes first in order
    if not (math.isfinite(low) and math.isfinite(high)):  # NaN where products of both signs have overflowed
        raise ValueError(f"x and y must have finite similarities, got values from {low} to {high}")
    rounding = EQUAL * max(abs(low), abs(high))
    if not high - low > rounding:
        expected = "similarities that differ, for items to be ordered by them"
        raise ValueError(f"x and y must have {expected}, got {low:.7g} to {high:.7g}: has the encoder collapsed?")
    uncounted = int(diagonal.sum())
    kth = uncounted + int(quantile * (sample.numel() - uncounted)) + 1
    threshold = float(sample.view(-1).kthvalue(kth).values) - rounding  # of equal similarities, all are entries
    entries = sample >= threshold
    variance = 0.0
    # Of the mean over the drawn rows of what each has, and over the columns. The latter are many more, but in two
    # towers they may be what differs. A similarity's own part is counted in both, which errs on the safe side.
    for drawn, axis in ((num_rows, 1), (num_columns, 0)):
        if drawn < n:
            shares = entries.sum(axis, dtype=torch.float64) / entries.shape[axis]
            variance += float(shares.var()) * (1 - drawn / n) / drawn
    return threshold, variance**0.5


class _Rows(NamedTuple):
    found: np.ndarray  # (n,) entries that each row has, kept or not
    starts: np.ndarray  # (n + 1,) where the kept ones of each row start
    columns: np.ndarray  # int32, of the kept ones, ascending in each row


def _largest(x: Tensor, y: Tensor, threshold: float, most: int, progress: bool | None) -> _Rows:
    """Of each row of x yᵀ, what is at or above the threshold off the diagonal, and of that the ``most`` largest."""
    found, kept, columns, entries = [], [], [], 0
    mask = None
    for scores in _row_blocks(x, y, progress):
        # One for all blocks: freed between what is kept of two of them, each would leave a hole that the next misses.
        mask = torch.empty_like(scores, dtype=torch.bool) if mask is None else mask[: len(scores)]
        places, counts = _block_entries(scores, threshold, most, mask)
        entries += len(places)
        if entries > MAX_ENTRIES:
            advice = "take a higher quantile or a lower max_per_row"
            raise ValueError(f"the graph must have at most 2^30 entries, got more: {advice}")
        found.append(counts.cpu().numpy())
        kept.append(counts.clamp_max(most).cpu().numpy())
        columns.append((places % scores.shape[1]).to("cpu", torch.int32).numpy())
    starts = np.concatenate([[0], *kept]).cumsum(dtype=np.int32)
    return _Rows(np.concatenate(found), starts, np.concatenate(columns))


def _block_entries(scores: Tensor, threshold: float, most: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Places of what is kept, in the flattened block, ascending; and how much each row has. Writes to ``chosen``."""
    rows, n = scores.shape
    if threshold == -torch.inf:  # everything is above it: do not list that
        first = torch.arange(rows, dtype=torch.int64, device=scores.device)[:, None] * n
        places = scores.topk(most).indices.sort(1).values + first
        return places.view(-1), places.new_full((rows,), n - 1)
    torch.ge(scores, threshold, out=chosen)
    places = chosen.view(-1).nonzero().squeeze(1)
    counts = torch.bincount(places // n, minlength=rows)  # the mask's sum takes four times as long
    over = (counts > most).nonzero().squeeze(1)
    if len(over):
        largest = scores[over].topk(most).indices
        chosen[over] = torch.zeros_like(chosen[over]).scatter_(1, largest, True)
        places = chosen.view(-1).nonzero().squeeze(1)
    return places, counts


def _row_blocks(x: Tensor, y: Tensor, progress: bool | None) -> Iterator[Tensor]:
    """Rows of x yᵀ in blocks, in order, with -inf on the diagonal. A block is gone with the next."""
    n = x.shape[0]
    rows = min(n, max(1, TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["cpu"]) // n))
    buffer = x.new_empty(rows, n)
    shown = n > PROGRESS_ABOVE if progress is None else progress
    options = {"total": n, "desc": "similarities", "unit": " rows", "leave": False}
    with extra("tqdm").tqdm(**options) if shown else nullcontext() as bar:
        for first in range(0, n, rows):
            some = x[first : first + rows]
            scores = torch.mm(some, y.T, out=buffer[: len(some)])
            scores.diagonal(first).fill_(-torch.inf)
            yield scores
            if bar is not None:
                bar.update(len(some))


def consecutive_order(matrix: csr_array, *, seed: int = 0) -> np.ndarray:
    """(N,) int64 items, so that what the (N, N) graph joins lies close: reverse Cuthill-McKee of the symmetrised graph.

    The method narrows the graph's bandwidth, the farthest that two joined items lie apart; components follow one
    another. Items that nothing is joined to come last, shuffled by ``seed``: in the order of the data set, batches of
    them would have what that order has in common, such as the class.

    Args:
        matrix: (N, N), sparse; symmetrised here.
        seed: at least 0.

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


def extra(name: str, group: str = "batching") -> ModuleType:
    """The module, or an ImportError that says which of setup.py's extras has it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        message = f'emc2_kernels.batching: expected the package {package}: pip install "emc2_kernels[{group}]"; {error}'
        raise ImportError(message) from error
