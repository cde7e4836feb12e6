"""What the study prints: Markdown tables for each part, narrow enough for a page's column of text."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from examples.study.cells import Row, grouped
from examples.study.gradient_bias import named
from examples.study.speed import BASE, ratios, reached

MAX_COLUMNS = 6


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, or several one below the other where it would be too wide; the first column stands in each."""
    values = len(header) - 1
    width = math.ceil(values / math.ceil(values / (MAX_COLUMNS - 1)))
    parts = []
    for start in range(1, len(header), width):
        lines = [[line[0], *line[start : start + width]] for line in (header, ["---"] * len(header), *rows)]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def spread(rows: Sequence[Row], column: str, digits: int = 1) -> str:
    """Mean and standard deviation over rows that have the column; "-" where none has."""
    values = [row[column] for row in rows if row[column] is not None]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def last_epochs(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["probe"] is not None]


COLLAPSED = 0.99  # mean cosine of an epoch's batches


def accuracy(rows: Sequence[Row]) -> str:
    """Also which runs ended at one point."""
    parts = []
    for (data, epochs, lr), found in grouped(last_epochs(rows), "data", "epochs", "lr").items():
        sizes = sorted({row["batch_size"] for row in found})
        seeds = len({row["seed"] for row in found})
        cells = grouped(found, "method", "batch_size")
        methods = dict.fromkeys(row["method"] for row in found)
        title = f"{data}, {epochs} epochs, learning rate {lr:g}, {seeds} seeds"
        for column, name in (("few_probe", "linear probe"), ("few_nearest", "1-NN")):
            table = [[named(method), *(spread(cells[method, size], column) for size in sizes)] for method in methods]
            part = markdown(["", *(f"b = {size}" for size in sizes)], table)
            parts.append(f"{title}: {name}, 10 labels a class, %\n\n{part}")
        counts = {case: sum(row["mean_cosine"] > COLLAPSED for row in runs) for case, runs in cells.items()}
        collapsed = [f"{named(method)}, b = {size}: {count}" for (method, size), count in counts.items() if count]
        if collapsed:
            parts.append(f"Runs whose last epoch has a mean cosine above {COLLAPSED}: " + "; ".join(collapsed))
    return "\n\n".join(parts)


def subset(rows: Sequence[Row]) -> str:
    """At the end, a learning rate after the other; of several, the mark is on each method's best one by its loss. Late:
    over the last 3 tenths, as the gradient's norm jumps from step to step."""
    last = max(row["step"] for row in rows)
    parts = []
    for (data, size), found in grouped(rows, "data", "batch_size").items():
        ends = grouped([row for row in found if row["step"] == last], "method", "lr")
        means = {case: statistics.fmean(row["loss"] for row in case_rows) for case, case_rows in ends.items()}
        late = grouped([row for row in found if row["step"] >= 0.7 * last], "method", "lr")
        columns = {"mean_cosine": 2, "common_error": 2, "batch_error": 1, "scale": 2, "encodings": 1}
        for rate in sorted({lr for _, lr in ends}):
            table = []
            for method in (method for method, lr in ends if lr == rate):
                end = ends[method, rate]
                others = [mean for case, mean in means.items() if case[0] == method]
                best = len(others) > 1 and means[method, rate] == min(others)
                seeds = grouped(late[method, rate], "seed").values()
                smooth = [{"late": statistics.fmean(row["squared_gradient"] for row in seed)} for seed in seeds]
                cells = [spread(end, "loss", 2), spread(end, "squared_gradient"), spread(smooth, "late")]
                cells += [spread(end, column, digits) for column, digits in columns.items()]
                table.append([named(method) + (" *" if best else ""), *cells])
            header = ["", "exact loss", "squared gradient norm", "late", "mean cosine"]
            header += ["error of an epoch's mean", "error of one batch", "scale", "encodings"]
            seeds = len({row["seed"] for row in end})
            title = f"{data}, b = {size}, learning rate {rate:g}, after {last} steps, {seeds} seeds"
            parts.append(f"{title}:\n\n{markdown(header, table)}")
    return "\n\n".join(parts)


def lag(rows: Sequence[Row]) -> str:
    """Scale and error of an epoch's mean gradient after so many epochs with the parameters held."""
    epochs = sorted({row["epochs_held"] for row in rows})
    parts = []
    for column, name in (("scale", "scale"), ("common_error", "error")):
        table = []
        for (method,), found in grouped(rows, "method").items():
            held = grouped(found, "epochs_held")
            table.append([named(method), *(spread(held[count,], column, 2) for count in epochs)])
        parts.append(markdown([f"{name} after epochs held", *map(str, epochs)], table))
    return "\n\n".join(parts)


def sampler(rows: Sequence[Row]) -> str:
    """z: how far the chains' distance is from that of as many draws from the exact law, in standard deviations."""
    parts = []
    for (data,), of_data in grouped(rows, "data").items():
        table = []
        for (temperature, kind), found in grouped(of_data, "temperature", "proposals").items():
            z = [(row["chains_distance"] - row["expected_distance"]) / row["deviation"] for row in found]
            most = max(row["after"] for row in found)
            end = [row for row in found if row["after"] == most]
            columns = ("expected_distance", "chains_distance", "expected_distance_items", "chains_distance_items")
            cells = [f"{statistics.fmean(row[column] for row in end):.3f}" for column in columns]
            table.append([f"{temperature:g}, {kind}", *cells, f"{min(z):.1f} to {max(z):.1f}"])
        header = ["temperature, proposals", "draws", "chains", "draws, items", "chains, items", "z, all points"]
        parts.append(f"{data}:\n\n{markdown(header, table)}")
    return "\n\n".join(parts)


def options(bias: Sequence[Row], trained: Sequence[Row]) -> str:
    columns = {"bias": ("bias", 3), "error": ("error of the mean", 3), "deviation": ("deviation", 2)}
    parts = [_columns("", grouped(bias, "options"), columns)]
    columns = {"few_probe": ("probe, %", 1), "few_nearest": ("1-NN, %", 1), "acceptance": ("acceptance", 2)}
    columns |= {"carry_share": ("carried", 2), "mean_cosine": ("mean cosine", 2)}
    for (data, epochs, size), found in grouped(trained, "data", "epochs", "batch_size").items():
        parts.append(_columns(f"{data}, {epochs} epochs, b = {size}", grouped(found, "options"), columns))
    return "\n\n".join(parts)


def _columns(title: str, found: Mapping[tuple, Sequence[Row]], columns: Mapping[str, tuple[str, int]]) -> str:
    """columns: of the rows -> what it is called, and digits."""
    table = [
        [*case, *(spread(rows, column, digits) for column, (_, digits) in columns.items())]
        for case, rows in found.items()
    ]
    return markdown([title, *(name for name, _ in columns.values())], table)


def curves(rows: Sequence[Row]) -> dict[tuple, list[tuple[float, float]]]:
    """(data, batch_size, method) -> (step, 1-NN with few labels, mean over the seeds)."""
    found = {}
    for (data, size, method), runs in grouped(rows, "data", "batch_size", "method").items():
        steps = grouped(runs, "step")
        found[data, size, method] = [
            (step, statistics.fmean(row["few_nearest"] for row in at)) for (step,), at in steps.items()
        ]
    return found


def speed(timed: Sequence[Row], trained: Sequence[Row]) -> str:
    """Times relative to all of SimCLR's training; "-": not reached."""
    costs, found = ratios(timed), curves(trained)
    methods = list(dict.fromkeys(row["method"] for row in trained))
    cases = sorted(costs.keys() & found.keys(), key=lambda case: (*case[:2], methods.index(case[2])))
    parts = []
    header = ["", "step's time", "quartiles", "final 1-NN, %", "to SimCLR's final", "to a point less"]
    for (data, size), of_size in itertools.groupby(cases, lambda case: case[:2]):
        table = []
        for case in of_size:
            cost, base, curve = costs[case], found[data, size, BASE], found[case]
            cells = [f"{cost.median:.2f}", f"{cost.low:.2f} to {cost.high:.2f}", f"{curve[-1][1]:.1f}"]
            for less in (0, 1):
                step = reached(curve, base[-1][1] - less)
                cells.append("-" if step is None else f"{step / base[-1][0] * cost.median:.2f}")
            table.append([named(case[2]), *cells])
        parts.append(f"{data}, b = {size}:\n\n{markdown(header, table)}")
    return "\n\n".join(parts)
