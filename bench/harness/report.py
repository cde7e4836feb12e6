"""A benchmark's results as files, and those of throughput.py as a table, as lines of CSV, and as figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import CHECKOUT, machine
from emc2_kernels import files

RESULTS = CHECKOUT / "bench" / "results"
REHEARSAL = CHECKOUT / "build" / "rehearsal.json"  # never among the results
COLUMNS = ("kind", "n", "m", "d", "dtype", "peer", "median_ms", "lower_quartile_ms", "upper_quartile_ms", "rounds")
COLUMNS += ("ratio_to_mm", "speedup_of_mh_step", "samples_per_second", "peak_extra_mb")
MACHINE = (
    "device",
    "usable_cores",
    "threads",
    "cpu_capability",
    "core_instruction_set",
    "load_average",
    "torch",
    "triton",
    "python",
    "emc2_kernels",
    "commit",
    "dirty",
)
LOOKS = {  # name in a legend, and a colour that is the peer's in every figure
    "mh_step": ("mh_step", "#0072b2"),
    "mm": ("torch.mm alone", "#000000"),
    "naive": ("softmax, torch.multinomial", "#d55e00"),
    "race": ("softmax, exponential race", "#e69f00"),
    "gumbel": ("gumbel_sample", "#56b4e9"),
    "column_loop": ("column loop, as EMC²'s code", "#cc79a7"),
    "lean_loop": ("leanest column loop", "#f0a3d0"),
    "ntxent": ("NT-Xent, forward and backward", "#009e73"),
}


def results_path(described: dict[str, object], ending: str = ".json") -> Path:
    """Where the results of a machine lie by default."""
    return RESULTS / f"{machine.slug(described)}{ending}"


def write_json(results: dict[str, Any], path: Path) -> None:
    """Whole or not at all: a process that is killed meanwhile leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(results, indent=2) + "\n")


def shape(record: dict[str, Any]) -> str:
    """`n x m x d` of a record."""
    return f"{record['n']} x {record['m']} x {record['d']}"


def table(records: Sequence[dict[str, Any]], *, head: bool = True) -> str:
    """The results as lines of text, one peer a line."""
    titles = f"{'':>8}{'n x m x d':>22}  {'peer':<18}{'rounds':>6}{'median ms':>11}{'quartiles ms':>20}{'/ mm':>9}"
    lines = [titles + f"{'speed-up':>10}{'samples/s':>11}"] if head else []
    for record in records:
        for name, peer in record["peers"].items():
            time_ms, rate = peer["time_ms"], peer["samples_per_second"]
            quartiles = f"{time_ms['lower_quartile']:.4g} .. {time_ms['upper_quartile']:.4g}"
            row = f"{record['kind']:>8}{shape(record):>22}  {name:<18}{time_ms['count']:>6}{time_ms['median']:>11.4g}"
            row += f"{quartiles:>20}{peer['ratio_to_mm']['median']:>9.2f}{peer['speedup_of_mh_step']['median']:>10.2f}"
            lines.append(row + f"{'-' if rate is None else format(rate, '.3g'):>11}")
    return "\n".join(lines)


def notes(records: Sequence[dict[str, Any]]) -> str:
    """How to read the table, which peers were given fewer rounds, and which none."""
    lines = [
        "/ mm: time over that of the matrix product. speed-up: of mh_step over this peer. Both are medians over rounds",
        "of the ratio within one round, not ratios of medians. samples/s counts what a call returns for all rows:",
        "naive, race and gumbel independent samples, mh_step and the loops states of walks (correlated).",
    ]
    for record in records:
        where = f"at {shape(record)} ({record['kind']})"
        for name, peer in record["peers"].items():
            taken = peer["time_ms"]["count"]
            if taken < record["rounds"]:
                lines.append(f"{name} {where} is slow and took part in {taken} of {record['rounds']} rounds.")
        for name, seconds in record["left_out"].items():
            lines.append(f"{name} {where} was left out: a call takes {seconds:.2g} s.")
        if mixing := record.get("mixing"):
            law, needed = mixing["total_variation"]["largest"], mixing["proposals_to_near"]["largest"]
            lines += [
                f"mh_step {where}: new chains are {law:.3f} from the softmax after {mixing['proposals']} proposals,",
                f"and need {needed} to come within {mixing['near']} (total variation, exact, {mixing['rows']} rows).",
            ]
    return "\n".join(lines)


def format_csv(results: dict[str, Any]) -> str:
    """A line for each size and peer; each says by itself on what it was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *MACHINE], restval="", lineterminator="\n")
    writer.writeheader()
    on = {name: results["machine"][name] for name in MACHINE}
    for record in results["throughput"]:
        case = {name: record[name] for name in ("kind", "n", "m", "d", "dtype")}
        for name, peer in record["peers"].items():
            time_ms = peer["time_ms"]
            times = {f"{part}_ms": time_ms[part] for part in ("median", "lower_quartile", "upper_quartile")}
            rates = {part: peer[part]["median"] for part in ("ratio_to_mm", "speedup_of_mh_step")}
            rates["samples_per_second"] = peer["samples_per_second"] or ""
            writer.writerow({**case, "peer": name, "rounds": time_ms["count"], **times, **rates, **on})
    for record in results["memory"]:
        case = {name: record[name] for name in ("n", "m", "d", "dtype", "peer", "peak_extra_mb")}
        writer.writerow({"kind": "memory", **case, **on})
    return text.getvalue()


def plot_all(results: dict[str, Any], stem: Path) -> list[Path]:
    """Time against n, time against the number of keys of a bank, memory against n: <stem>-time.png, -bank.png and
    -memory.png; none where matplotlib is missing or there are fewer than two points."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no figures: pip install matplotlib")
        return []
    dim = _most_frequent(one["d"] for one in results["throughput"] if one["kind"] == "sweep")
    sweeps = [
        one for one in results["throughput"] if one["kind"] == "sweep" and one["n"] == one["m"] and one["d"] == dim
    ]
    banks = [one for one in results["throughput"] if one["kind"] == "uniform"]
    on = results["machine"]
    measured_on = f"{on['device']}, {on['usable_cores']} cores"
    if on["device_type"] == "cpu":
        measured_on += f"; {machine.instruction_sets(on)}"
    paths = []
    for name, records, across, title in (
        ("time", sweeps, "n", f"One sweep of n rows over n keys, d = {dim}"),
        (
            "bank",
            banks,
            "m",
            f"Samples from a bank of N keys, {banks[0]['n']} rows, d = {banks[0]['d']}" if banks else "",
        ),
    ):
        curves = _curves(records, across)
        if len(records) > 1:
            label = "n = m" if across == "n" else "keys in the bank, N"
            paths.append(_plot(stem, name, curves, label, "ms a call (median, quartiles)", f"{title}\n{measured_on}"))
    if len({one["n"] for one in results["memory"]}) > 1:
        curves: dict[str, list[tuple[float, float, float, float]]] = {}
        for one in results["memory"]:
            curves.setdefault(one["peer"], []).append((one["n"], *3 * (max(one["peak_extra_mb"], 0.1),)))
        title = f"Peak memory of one call beyond its operands\n{measured_on}"
        paths.append(_plot(stem, "memory", curves, "n = m", "MB (10⁶ bytes)", title))
    return paths


def _most_frequent(values: Iterable[int]) -> int:
    values = list(values)
    return max(values, key=values.count, default=0)


def _curves(records: list[dict[str, Any]], across: str) -> dict[str, list[tuple[float, ...]]]:
    """By peer (x, median, quartiles)."""
    curves: dict[str, list[tuple[float, ...]]] = {}
    for record in records:
        for name, peer in record["peers"].items():
            times = (peer["time_ms"][part] for part in ("median", "lower_quartile", "upper_quartile"))
            curves.setdefault(name, []).append((record[across], *times))
    return curves


def _plot(stem: Path, name: str, curves: dict[str, list[tuple[float, ...]]], x: str, y: str, title: str) -> Path:
    from matplotlib.figure import Figure  # draws without a display

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for peer, points in curves.items():
        known, colour = LOOKS.get(peer, (peer, LOOKS["mh_step"][1]))  # mh_step on a backend of that name
        where, median, lower, upper = zip(*sorted(points), strict=True)
        width, style = 2.5 if peer == "mh_step" else 1.2, ".-" if peer in LOOKS else ".:"
        axes.plot(where, median, style, color=colour, linewidth=width, label=known)
        axes.fill_between(where, lower, upper, color=colour, alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    ticks = sorted({point[0] for points in curves.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    path = stem.with_name(f"{stem.name}-{name}.png")
    figure.savefig(path, dpi=110)
    return path
