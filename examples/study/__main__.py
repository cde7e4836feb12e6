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
            print(f"\n## {part}\n\n{PARTS[part](folder, pictures, given.quick)}", flush=True)
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
