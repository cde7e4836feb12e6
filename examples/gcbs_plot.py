"""The figure of gcbs.py: similarities before and after the permutation, gap and retrieval over the epochs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plots import COLOURS
from torch import Tensor
from torch.nn.functional import normalize

from emc2_kernels.batching import consecutive_order, similarity_graph

if TYPE_CHECKING:
    from gcbs import Epoch

PIXELS = 256


def plot(path: Path, title: str, rows: Sequence[Epoch], embeddings: tuple[Tensor, Tensor], quantile: float) -> None:
    """embeddings: (n, d) of both sides, whose similarities are shown as they lie and in the order of `quantile`."""
    x, y = (normalize(side, dim=1) for side in embeddings)
    order = consecutive_order(similarity_graph(x, y, quantile=quantile, progress=False).matrix)
    figure = Figure(figsize=(11, 9), layout="constrained")
    figure.suptitle(title)
    before, after, gap, rank = figure.subplots(2, 2).flat
    images = [_means(x, y), _means(x[order], y[order])]
    low, high = (bound(float(bound(image.flatten())) for image in images) for bound in (min, max))
    for axis, image, name in zip(
        (before, after), images, ("as the data lie", f"permuted, q = {quantile:g}"), strict=True
    ):
        shown = axis.imshow(image, vmin=low, vmax=high, cmap="viridis", extent=(0, len(x), len(x), 0))
        axis.set_title(f"Similarity of left (rows) and right sides, {name}", fontsize=10)
    figure.colorbar(shown, ax=after, label=f"cosine, means over blocks of {len(x) // PIXELS or 1} items")
    _curves(gap, rows, "gap", "Global minus in-batch loss (nats)")
    _curves(rank, rows, "reciprocal_rank", "Mean reciprocal rank")
    figure.savefig(path, dpi=110)


def _means(x: Tensor, y: Tensor) -> Tensor:
    """Mean similarities of blocks, at most PIXELS a side: the product of the blocks' means."""
    size = -(-len(x) // PIXELS)
    means = [side[: len(side) // size * size].view(-1, size, side.shape[1]).mean(1) for side in (x, y)]
    return means[0] @ means[1].T


def _curves(axis: Axes, rows: Sequence[Epoch], field: str, label: str) -> None:
    """Mean over seeds, and the span of all of them, before each epoch."""
    for colour, batching in zip(COLOURS, dict.fromkeys(row.batching for row in rows), strict=False):
        by_epoch: dict[int, list[float]] = {}
        for row in rows:
            if row.batching == batching:
                by_epoch.setdefault(row.epoch, []).append(getattr(row, field))
        epochs, values = list(by_epoch), list(by_epoch.values())
        axis.plot(epochs, [statistics.fmean(found) for found in values], color=colour, label=batching)
        axis.fill_between(
            epochs, [min(found) for found in values], [max(found) for found in values], color=colour, alpha=0.2
        )
    axis.set_xlabel("Epochs trained")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
