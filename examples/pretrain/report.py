"""What a run writes down: metrics.csv, the same for TensorBoard where asked for, curves as a PNG, and tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.pretrain.evaluate import FEW_LABELS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

History = list[dict[str, float]]
# NT-Xent, EMC² and others as in the study; colour-blind readers can tell these apart, too.
COLOURS = ("#000000", "#009e73", "#0072b2", "#d55e00", "#cc79a7")

# The last panel shows what the runs have of their own, and the learning rate where they have nothing.
OWN_PANELS = (
    ({"carried_weight": "weight of what chains carry"}, "Share (%)", 100),
    ({"acceptance": "accepted proposals", "carry_share": "samples carried from an earlier visit"}, "Share (%)", 100),
    ({"temperature": ""}, "Mean temperature of the batch's images", 1),
    ({"weight_sum": ""}, "Sum of an anchor's weights", 1),
    ({"lr": ""}, "Learning rate", 1),
)
# What every loss reports, and what one method's does alone; the rest of that is not written.
STATS = ("ntxent", "positive_similarity", "negative_similarity", "mean_cosine")
OF_CHAINS = ("acceptance", "carry_share", "carried_weight", "staleness", "log_partition")
OWN_STATS = (*OF_CHAINS, "cache_age", "weight_sum", "temperature")
# NT-Xent first, which compares methods. The method's own loss is on a scale of its own, and below 0 for some: the
# positive is no term of EMC²'s denominator, and the walk's and the cache's are surrogates.
COLUMNS = ("epoch", "step", *STATS, *OWN_STATS, "method_loss", "lr", "images_per_second", "few_nearest_neighbour")


def write_metrics(path: Path, history: History) -> None:
    """The whole file each time: it then never disagrees with the checkpoint, whenever the run was cut off."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(history)


def check_tensorboard() -> None:
    """Raises:
    ImportError: TensorBoard is missing; with the command that installs it.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--tensorboard: expected the package tensorboard: pip install tensorboard; {error}"
        ) from error


class TensorBoard:
    """Rows of metrics.csv as scalars over steps, in an event file of their own for each start."""

    def __init__(self, directory: Path, step: int) -> None:
        """step: where the run goes on; what an earlier start has written beyond it is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer: SummaryWriter = SummaryWriter(directory, purge_step=step + 1)

    def write(self, row: dict[str, float]) -> None:
        for name in COLUMNS[2:]:
            if name in row:
                self.writer.add_scalar(name, row[name], row["step"])
        self.writer.flush()


def plot_curves(path: Path, runs: dict[str, History], title: str, untrained: float | None = None) -> None:
    """runs: name -> one row per epoch, with the columns of metrics.csv; untrained: few-label 1-NN before training."""
    # Figure instead of pyplot: it draws without a display and leaves the caller's backend alone.
    figure = Figure(figsize=(8.2, 5.8), layout="constrained")  # fits a page: its letters stay legible
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


def table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)
