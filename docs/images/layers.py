"""Draws docs/images/layers.svg, the package's layers: `python docs/images/layers.py`.

`tests/tools/test_docs.py` holds the names against the layers that `tests/tools/test_layers.py` enforces.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

# From the top. A layer is a row, its modules the row's boxes: name, what it is.
ROWS = [
    [("__main__", "python -m emc2_kernels")],
    [("machine", "what is here: processor, compilers, cache, backends")],
    [("emc2_kernels", "the public names")],
    [("adapters", "under the calls of open_clip, sentence-transformers, pytorch-metric-learning")],
    [("batching", "GCBS: graph, order, sampler")],
    [("losses", "one file a method; anchors and in-batch parts shared")],
    [("stores", "chains, embeddings, queue: here or sharded; loaded whole or refused")],
    [("distributed", "keys of all ranks, gathered or round a ring; agreement")],
    [("isir", "all candidates at once")],
    [("mh", "walks"), ("lse", "log-sum-exp"), ("gumbel", "exact draws")],
    [("ops", "operators of torch.library, made from the parameters")],
    [("backends", "reference, cpu, triton, cuda: one table of what runs where")],
    [("transition", "clamps that compose"), ("data", "items' numbers")],
    [("checks", "errors that name the argument"), ("checkpoint", "whole or refused")],
    [
        ("dispatch", "operators"),
        ("files", "replaced whole"),
        ("rng", "random numbers"),
        ("autograd", "no 2nd derivative"),
    ],
]
NATIVE = [("python_bindings", "addresses in, nothing computed"), ("csrc", "C++ and CUDA; no torch")]
WIDTH, HEIGHT, GAP = 10.0, 0.62, 0.16
INK, EDGE, FILL, NATIVE_FILL = "#1f2937", "#94a3b8", "#eef2ff", "#fef3c7"


def draw_box(axes: plt.Axes, x: float, y: float, width: float, name: str, text: str, fill: str) -> None:
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, HEIGHT, boxstyle=shape, facecolor=fill, edgecolor=EDGE, linewidth=0.8))
    middle = x + width / 2
    axes.text(middle, y + HEIGHT * 0.66, name, ha="center", va="center", size=9, weight="bold", color=INK)
    axes.text(middle, y + HEIGHT * 0.28, text, ha="center", va="center", size=7, color=INK)


def draw_row(axes: plt.Axes, y: float, boxes: list[tuple[str, str]], fill: str) -> None:
    width = (WIDTH - GAP * (len(boxes) - 1)) / len(boxes)
    for number, (name, text) in enumerate(boxes):
        draw_box(axes, number * (width + GAP), y, width, name, text, fill)


def main(target: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "layers"  # the same file from the same script
    step, rows = HEIGHT + GAP, [*ROWS, NATIVE]
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(rows)), facecolor="white")
    for number, boxes in enumerate(rows):
        below = 0.36 if boxes is NATIVE else 0.0  # beside Python's layers, not one of them
        draw_row(axes, -number * step - below, boxes, NATIVE_FILL if boxes is NATIVE else FILL)
    bottom = -(len(rows) - 1) * step - 0.36
    lowest = -(len(ROWS) - 1) * step
    axes.text(WIDTH / 2, lowest - 0.24, "loaded by backends cpu and cuda", ha="center", va="center", size=7, color=INK)
    axes.annotate("", (-0.3, lowest), (-0.3, HEIGHT), arrowprops={"arrowstyle": "->", "color": EDGE, "linewidth": 1.2})
    axes.text(-0.55, (lowest + HEIGHT) / 2, "imports", rotation=90, ha="center", va="center", size=8, color=INK)
    axes.set(xlim=(-0.8, WIDTH + 0.1), ylim=(bottom - 0.1, HEIGHT + 0.1))
    axes.axis("off")
    metadata = {"Date": None} if target.suffix == ".svg" else None
    figure.savefig(target, bbox_inches="tight", dpi=130, metadata=metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("layers.svg"))
