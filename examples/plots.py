"""Curves of one run, or of several side by side, as a PNG."""

from __future__ import annotations

import math
from pathlib import Path

from evaluate import FEW_LABELS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

History = list[dict[str, float]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # colour-blind readers can tell these apart, too

# The last panel shows what the runs have of their own, and the learning rate where they have nothing.
OWN_PANELS = (
    ({"acceptance": "accepted proposals", "carry_share": "samples carried from an earlier visit"}, "Share (%)", 100),
    ({"temperature": ""}, "Mean temperature of the batch's images", 1),
    ({"weight_sum": ""}, "Sum of an anchor's weights", 1),
    ({"lr": ""}, "Learning rate", 1),
)


def plot_curves(path: Path, runs: dict[str, History], title: str, untrained: float | None = None) -> None:
    """runs: name -> one row per epoch, with the columns of metrics.csv; untrained: few-label 1-NN before training."""
    # Figure instead of pyplot: it draws without a display and leaves the caller's backend alone.
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, similarity, last = figure.subplots(2, 2, sharex=True).flat
    _panel(loss, runs, {"ntxent": ""}, "In-batch NT-Xent (nats)")
    _panel(accuracy, runs, {"few_nearest_neighbour": ""}, f"1-NN accuracy, {FEW_LABELS} labels a class (%)", 100)
    if untrained is not None:
        accuracy.axhline(100 * untrained, color="grey", linestyle=":", label="untrained encoder")
        accuracy.legend(fontsize=9)
    pairs = {"positive_similarity": "two views of an image", "mean_cosine": "mean of all pairs"}
    _panel(similarity, runs, pairs, "Cosine similarity")
    columns, label, scale = next(panel for panel in OWN_PANELS if _has_any(runs, panel[0]))
    _panel(last, runs, columns, label, scale)
    for axis in (similarity, last):
        axis.set_xlabel("Epoch")
    figure.savefig(path, dpi=120)


def _has_any(runs: dict[str, History], columns: dict[str, str]) -> bool:
    return any(column in row for history in runs.values() for row in history for column in columns)


def _panel(axis: Axes, runs: dict[str, History], columns: dict[str, str], label: str, scale: float = 1.0) -> None:
    """columns: column -> what the legend calls it. The colour says which run it is, the line style which column."""
    for colour, (run, history) in zip(COLOURS, runs.items(), strict=False):
        for style, (column, name) in zip(("-", "--"), columns.items(), strict=False):
            if any(column in row for row in history):
                epochs = [row["epoch"] for row in history]
                values = [scale * row.get(column, math.nan) for row in history]
                text = f"{run}: {name}" if name else run
                axis.plot(epochs, values, style, marker=".", markersize=4, color=colour, label=text)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=9)
