"""What a run writes down after each epoch: metrics.csv, and the same for TensorBoard where asked for."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from plots import History

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# What every loss reports, and what one method's does alone; the rest of that is not written.
STATS = ("ntxent", "positive_similarity", "negative_similarity", "mean_cosine")
OWN_STATS = ("acceptance", "carry_share", "cache_age", "weight_sum", "temperature")
COLUMNS = ("epoch", "step", "loss", *STATS, *OWN_STATS, "lr", "images_per_second", "few_nearest_neighbour")


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
