"""Measures what the papers claim, on data that is at hand, and prints tables.

python -m examples.study --out runs/study
python -m examples.study --parts c e --quick

Parts: a, accuracy over batch sizes; b, exact loss and gradient on fixed views; c, the chains' law beside the softmax;
d, EMC²'s options; e, time to an accuracy. Finished cells are in the folder's CSV files and are not measured again: an
interrupted study goes on, and one that is finished prints its tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.study import accuracy, figures, lag, options, sampler, speed, subset, tables


def part_a(folder: Path, pictures: Path, quick: bool) -> str:
    rows = accuracy.run(folder, quick)
    figures.accuracy(rows, pictures / "study_accuracy.png")
    return tables.accuracy(rows)


def part_b(folder: Path, pictures: Path, quick: bool) -> str:
    rows = subset.run(folder, quick)
    figures.subset(rows, pictures / "study_subset.png")
    return tables.subset(rows) + "\n\n" + tables.lag(lag.run(folder, quick))


def part_c(folder: Path, pictures: Path, quick: bool) -> str:
    rows = sampler.run(folder, quick)
    figures.sampler(rows, pictures / "study_sampler.png")
    return tables.sampler(rows)


def part_d(folder: Path, pictures: Path, quick: bool) -> str:
    bias, trained = options.run(folder, quick)
    figures.options(bias, trained, pictures / "study_options.png")
    return tables.options(bias, trained)


def part_e(folder: Path, pictures: Path, quick: bool) -> str:
    """Needs the training curves of part a, which it finishes first."""
    trained = [row for row in accuracy.run(folder, quick) if row["lr"] == accuracy.LR]
    timed = speed.run(folder, quick)
    figures.speed(timed, trained, pictures / "study_speed.png")
    return tables.speed(timed, trained)


# What stands above each part's tables: a title, what is measured, and the columns that do not say it themselves.
ABOUT = {
    "a": """accuracy over batch sizes

Features of all methods after equally many epochs: accuracy on held-out images, in %, of a linear probe and of the
nearest neighbour (1-NN), each with 10 labels a class. A column a batch size, b; of several seeds mean ± deviation.""",
    "b": """exact loss and gradient on fixed views

Two views an image, drawn in advance, so that the global loss and its gradient can be computed. At the end of training:
the exact loss, the squared gradient norm and the same as a mean over the last three tenths (late), the mean cosine of
all pairs (1: collapse). Of the method's own gradient there, relative to the exact one: error of an epoch's mean (bias),
error of one batch (bias and noise), scale (1: as long as the exact one). Encodings: over two an image and step.
*: the learning rate at which the method's exact loss is lowest. Then scale and error of the mean again, after
epochs held: the parameters stand still and what the method keeps catches up; an error that falls there was its age.""",
    "c": """the chains' law beside the softmax

Total variation distance to the softmax over all views, 0 to 1, after the most proposals: of as many draws from the
exact law of the chains (draws), which is noise and what is not forgotten yet, and of the chains; items: the same with
the two views of an item counted as one. z: how far the two differ, in deviations of the noise, at all points; a
sampler that does as the theory says stays within a few.""",
    "d": """options of the walk

First at fixed parameters, relative to the exact gradient's norm: bias of the mean gradient, error of the mean with its
noise, deviation of one gradient. Then after training, as in part a: probe and 1-NN with 10 labels a class, the share
of proposals that are accepted (acceptance), of samples that are carried from an earlier batch (carried), and the
mean cosine (1: collapse). "-": has none.""",
    "e": """time to an accuracy

A step's time over SimCLR's (median and quartiles, methods taken in turns), final 1-NN of part a, and the time until
the curve of 1-NN gets to SimCLR's final value and to a point less, over all of SimCLR's. "-": not reached.""",
}

PARTS: dict[str, Callable[[Path, Path, bool], str]] = {
    "a": part_a,
    "b": part_b,
    "c": part_c,
    "d": part_d,
    "e": part_e,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m examples.study", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--quick", action="store_true", help="the same with little of everything: a minute or two")
    parser.add_argument("--out", type=Path, help="folder of CSV files (default: runs/study, runs/study-quick)")
    parser.add_argument("--figures", type=Path, help="folder of figures (default: that of the CSV files)")
    given = parser.parse_args(arguments)
    folder = given.out or Path("runs/study-quick" if given.quick else "runs/study")
    pictures = given.figures or folder
    try:
        for needed in (folder, pictures):
            needed.mkdir(parents=True, exist_ok=True)
        for part in given.parts:
            print(f"\n## {part}. {ABOUT[part]}\n\n{PARTS[part](folder, pictures, given.quick)}", flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {os.fspath(folder)} holds the finished cells: the same command goes on", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    print("\nwritten: " + ", ".join(dict.fromkeys(map(os.fspath, (folder, pictures)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
