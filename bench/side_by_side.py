"""Results files of bench/throughput.py side by side, as a table in Markdown: a column a file.

    python -m bench.side_by_side avx512.json avx2.json
    python -m bench.side_by_side avx512.json avx2.json --peers mh_step gumbel mm

Each cell has the median time of a call, and the median and quartiles of its ratio to the matrix product in the same
round. What was too slow to take part in rounds has the time of its only call.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.compare import read
from bench.harness import machine, report

Row = tuple[str, str]  # size, peer
PARTS = ("median", "lower_quartile", "upper_quartile")


def column_title(on: dict[str, Any]) -> str:
    """By its instruction sets, machine and commit."""
    sets = f"{machine.instruction_sets(on)}: " if on["device_type"] == "cpu" else ""
    return f"{sets}{on['device']}, {on['usable_cores']} cores, {on['threads']} threads, commit {on['commit'][:7]}"


def digits(value: float) -> str:
    """Three, or all before the point."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def cells(results: dict[str, Any]) -> dict[Row, str]:
    found = {}
    for record in results["throughput"]:
        n, m, d = (f"{record[name]:,}" for name in "nmd")
        size = f"{record['kind']}, {n} x {m} x {d}, {record['dtype']}"
        for name, peer in record["peers"].items():
            ratio, low, high = (digits(peer["ratio_to_mm"][part]) for part in PARTS)
            time_ms = f"{digits(peer['time_ms']['median'])} ms"
            found[size, name] = time_ms if name == "mm" else f"{time_ms}, {ratio} x ({low} to {high})"
        for name, seconds in record["left_out"].items():
            found[size, name] = f"{digits(1e3 * seconds)} ms, one call"
    return found


def markdown(files: Sequence[dict[str, Any]], peers: Sequence[str] = ()) -> str:
    """The table; of all peers, or of those that are named. A dash: not measured there."""
    columns = [cells(results) for results in files]
    rows = list(dict.fromkeys(row for column in columns for row in column if not peers or row[1] in peers))
    lines = [["size", "", *(column_title(results["machine"]) for results in files)], ["---"] * (2 + len(files))]
    before = None
    for size, peer in rows:
        label = report.LOOKS[peer][0] if peer in report.LOOKS else peer
        lines.append([size if size != before else "", label, *(column.get((size, peer), "-") for column in columns)])
        before = size
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--peers", nargs="+", default=(), metavar="NAME", help=f"of {', '.join(report.LOOKS)} (all)")
    options = parser.parse_args(arguments)
    print(markdown([read(path) for path in options.files], options.peers))


if __name__ == "__main__":
    main()
