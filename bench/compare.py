"""What has become slower, or takes more memory, from one file of bench/throughput.py to another.

    python -m bench.compare old.json new.json

A time is a regression where its ratio to the matrix product, which stood beside it, is above the old one by more than
`--tolerance` and the quartiles of the two do not overlap; between files of one machine this holds for the time itself,
too. Exits with 1 where there is one. Files of unlike instruction sets (the core's, or torch's), or that do not say
which, are compared with `--across-instruction-sets` alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import machine

SCHEMA = 2
SAME_MACHINE = ("device", "usable_cores", "threads")
MEMORY_STEP = 4.0  # MB by which two measurements of one thing differ


class Change(NamedTuple):
    what: str
    unit: str
    old: float
    new: float
    regression: bool

    def line(self) -> str:
        mark = "SLOWER" if self.regression else "faster" if self.new < self.old else ""
        mark = mark.replace("SLOWER", "MORE").replace("faster", "less") if self.unit == "MB" else mark
        return f"{self.what:52}{self.old:12.4g}{self.new:12.4g} {self.unit:6}{self.new / self.old:7.2f} x  {mark}"


def read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"bench.compare: error: {path}: expected a file of bench.throughput --save: {error}") from None
    found = results.get("schema") if isinstance(results, dict) else None
    if found != SCHEMA:
        raise SystemExit(f"bench.compare: error: {path}: expected results of schema {SCHEMA}, got {found}")
    return results


def unlike_instruction_sets(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Both files' in words, where they differ or one does not say; None where they are alike, and of GPUs."""
    if any(results["machine"]["device_type"] != "cpu" for results in (old, new)):
        return None
    a, b = (machine.instruction_sets(results["machine"]) for results in (old, new))
    if machine.UNKNOWN not in a and a == b:
        return None
    unknown = " (written before files said which)" if machine.UNKNOWN in a + b else ""
    return f"old: {a}; new: {b}{unknown}"


def times(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By size and peer."""
    return {
        f"{one['kind']} {one['n']} x {one['m']} x {one['d']} {one['dtype']} {name}": peer
        for one in results["throughput"]
        for name, peer in one["peers"].items()
    }


def memory(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"memory {one['n']} x {one['m']} x {one['d']} {one['dtype']} {one['peer']}": one["peak_extra_mb"]
        for one in results["memory"]
    }


def changes(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> Iterator[Change]:
    """Of what both have measured, where it is a regression or an improvement by more than the tolerance."""
    fields = [("ratio_to_mm", "mm")]
    if all(old["machine"][name] == new["machine"][name] for name in SAME_MACHINE):
        fields.append(("time_ms", "ms"))
    before, after = times(old), times(new)
    for what in before.keys() & after.keys():
        for field, unit in fields:
            a, b = before[what][field], after[what][field]
            slower = a["upper_quartile"] < b["lower_quartile"] and b["median"] > a["median"] * (1 + tolerance)
            faster = b["upper_quartile"] < a["lower_quartile"] and a["median"] > b["median"] * (1 + tolerance)
            if slower or faster:
                yield Change(what, unit, a["median"], b["median"], slower)
    before, after = memory(old), memory(new)
    for what in before.keys() & after.keys():
        a, b = before[what], after[what]
        if abs(b - a) > max(tolerance * min(a, b), MEMORY_STEP):
            yield Change(what, "MB", a, b, b > a)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share (%(default)s)")
    across = "compare them where the instruction sets differ, or are unknown, all the same"
    parser.add_argument("--across-instruction-sets", action="store_true", help=across)
    options = parser.parse_args(arguments)
    old, new = read(options.old), read(options.new)
    unlike = unlike_instruction_sets(old, new)
    if unlike and not options.across_instruction_sets:
        advice = "measure both on one, or pass --across-instruction-sets"
        raise SystemExit(f"bench.compare: error: expected files of one instruction set, got {unlike}: {advice}")
    if unlike:
        print(f"ACROSS INSTRUCTION SETS, {unlike}")
    for label, results in (("old", old), ("new", new)):
        on = results["machine"]
        print(f"{label}: {on['device']}, {on['usable_cores']} cores, load {on['load_average']}, commit {on['commit']}")
    common = len(times(old).keys() & times(new).keys()) + len(memory(old).keys() & memory(new).keys())
    found = sorted(changes(old, new, options.tolerance), key=lambda change: change.old / change.new)
    for change in found:
        print(change.line())
    regressions = sum(change.regression for change in found)
    print(f"{common} measurements in both, {regressions} regressions, {len(found) - regressions} improvements")
    return 1 if regressions else 0


if __name__ == "__main__":
    raise SystemExit(main())
