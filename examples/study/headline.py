"""The README's figure, from what long_training.py has measured: nothing is trained.

python -m examples.study.headline
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from examples.study import long_training
from examples.study.cells import Row, grouped, read

# As the library calls them, and what the CSV calls them; with its colour.
SHOWN = {
    "SogCLR": ("SogCLR", "#0072b2"),
    "NT-Xent (SimCLR)": ("NT-Xent", "#000000"),
    "EMC², the paper's walk": ("EMC², cached", "#d55e00"),
    "EMC² (EMC2Loss)": ("i-SIR", "#009e73"),
}
ITEMS, BATCH, TEMPERATURE, STEPS = 400, 4, 0.2, 20_000
FIRST = 100  # steps: before these all methods are alike


def curve(rows: Sequence[Row], method: str) -> dict[int, float]:
    """By step, the mean over seeds of the exact loss at the method's best rate."""
    own = [row for row in rows if row["method"] == method and row["batch_size"] == BATCH]
    rate = long_training.best_rate([row for row in own if row["step"] == STEPS])[0]["rate"]
    points = grouped([row for row in own if row["rate"] == rate and row["step"] >= FIRST], "step")
    return {step: statistics.fmean(row["loss"] for row in at) for (step,), at in points.items()}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Labels stand at the curves' ends, so that the figure can be read at half its size."""
    alike = {"items": ITEMS, "temperature": TEMPERATURE, "steps": STEPS}
    rows = [row for row in rows if all(row[name] == value for name, value in alike.items())]
    floor = min(row["loss"] for row in rows if row["method"] == long_training.FLOOR)
    figure = Figure(figsize=(7.6, 4.0), layout="constrained")
    axis = figure.subplots()
    for label, (method, colour) in SHOWN.items():
        points = curve(rows, method)
        excess = [loss - floor for loss in points.values()]
        axis.loglog(list(points), excess, color=colour, linewidth=3 if method == "i-SIR" else 2)
        # The walk ends where NT-Xent does: one label above the other.
        above = {"EMC², cached": 8, "NT-Xent": -8}.get(method, 0)
        place = {"xytext": (6, above), "textcoords": "offset points"}
        axis.annotate(label, (STEPS, excess[-1]), color=colour, va="center", fontsize=13, **place)
    axis.set_xlim(FIRST, STEPS * 9)
    axis.set_xticks([100, 1000, 10_000], ["100", "1,000", "10,000"])
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axis.minorticks_off()
    axis.tick_params(labelsize=12)
    axis.set_xlabel("training steps of 4 pairs", fontsize=13)
    axis.set_ylabel("global loss above its minimum", fontsize=13)
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m examples.study.headline", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results"), help="folder of the CSV file (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/images/headline.png"), help="(%(default)s)")
    given = parser.parse_args(arguments)
    draw(read(given.results / long_training.FILE), given.out)
    print("written:", given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
