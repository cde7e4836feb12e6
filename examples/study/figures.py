"""The study's figures, one a part, legible at the width of a page's column of text."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.study.cells import Row, grouped
from examples.study.gradient_bias import COLOURS, named
from examples.study.speed import ratios
from examples.study.tables import curves, last_epochs

WIDTH, LEGEND_COLUMNS = 8.8, 4
STYLES = [*((colour, "-") for colour in COLOURS), *((colour, "--") for colour in COLOURS)]


def _figure(width: float, height: float, rows: int, columns: int, **shared: object) -> tuple[Figure, list[Axes]]:
    """Figure instead of pyplot: it draws without a display and leaves the caller's backend alone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def _finish(path: Path, figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them: beside them it would cost each its width."""
    for axis in axes:
        axis.grid(alpha=0.3)
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        named_handles = list(handles.values()), list(handles)
        figure.legend(*named_handles, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=9)
    figure.savefig(path, dpi=110)


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy(rows: Sequence[Row], path: Path) -> None:
    found = last_epochs(rows)
    settings = grouped(found, "data", "epochs", "lr")
    figure, axes = _figure(WIDTH, 3.3 * len(settings), len(settings), 2)
    panels = [(case, column) for case in settings for column in ("few_probe", "few_nearest")]
    for axis, ((data, epochs, lr), column) in zip(axes, panels, strict=True):
        chosen = settings[data, epochs, lr]
        for (method,), runs in grouped(chosen, "method").items():
            number = list(dict.fromkeys(row["method"] for row in found)).index(method)
            sizes = grouped(runs, "batch_size")
            points = [_mean_and_spread([row[column] for row in at]) for at in sizes.values()]
            # Side by side, so that bars do not hide each other.
            x = [size * 1.03 ** (number - 2.5) for (size,) in sizes]
            means, spreads = zip(*points, strict=True)
            style = {"marker": "o", "markersize": 4, "capsize": 2}
            axis.errorbar(x, means, spreads, color=COLOURS[number], label=named(method), **style)
        axis.set_xscale("log", base=2)
        ticks = sorted({row["batch_size"] for row in chosen})
        axis.set_xticks(ticks, [str(size) for size in ticks])
        axis.set_xlabel("Batch size")
        name = "Linear probe" if column == "few_probe" else "1-NN"
        axis.set_ylabel(f"{name}, 10 labels a class (%)")
        axis.set_title(f"{data}, {epochs} epochs, learning rate {lr:g}", fontsize=10)
    _finish(path, figure, axes)


def subset(rows: Sequence[Row], path: Path) -> None:
    """A row of panels for each data set and learning rate; means over the seeds, whose spread is in the table."""
    columns = {
        "loss": "Exact loss (nats)",
        "squared_gradient": "Squared gradient norm",
        "mean_cosine": "Mean cosine",
    }
    cases = sorted(grouped(rows, "data", "lr"))
    figure, axes = _figure(WIDTH, 2.6 * len(cases), len(cases), len(columns), sharex=True)
    panels = [(*case, column) for case in cases for column in columns]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axis, (data, lr, column) in zip(axes, panels, strict=True):
        chosen = [row for row in rows if (row["data"], row["lr"]) == (data, lr)]
        for (method,), runs in grouped(chosen, "method").items():
            colour, style = STYLES[methods.index(method)]
            steps = grouped(runs, "step")
            means = [statistics.fmean(row[column] for row in at) for at in steps.values()]
            axis.plot([step for (step,) in steps], means, style, color=colour, label=named(method))
        if column == "squared_gradient":
            axis.set_yscale("log")
        axis.set_ylabel(columns[column])
        axis.set_title(f"{data}, learning rate {lr:g}", fontsize=10)
        axis.set_xlabel("Iteration")
    _finish(path, figure, axes)


def sampler(rows: Sequence[Row], path: Path) -> None:
    """The first anchor; all anchors are in the table."""
    rows = [row for row in rows if row["anchor"] == 0]
    data_sets = list(dict.fromkeys(row["data"] for row in rows))
    temperatures = sorted({row["temperature"] for row in rows}, reverse=True)
    shared = {"sharex": True, "sharey": "row"}
    figure, axes = _figure(WIDTH, 5.2 * len(data_sets), 2 * len(data_sets), len(temperatures), **shared)
    markers = {"uniform": "o", "sweep, one view": "s", "sweep, both views": "^"}
    panels = itertools.product(data_sets, ("", "_items"), temperatures)
    for axis, (data, over, temperature) in zip(axes, panels, strict=True):
        chosen = [row for row in rows if (row["data"], row["temperature"]) == (data, temperature)]
        kinds = grouped(chosen, "proposals")
        for number, ((kind,), found) in enumerate(kinds.items()):
            x = [row["after"] for row in found]
            chains = [row[f"chains_distance{over}"] for row in found]
            axis.plot(x, chains, markers[kind], color=COLOURS[number + 1], markersize=5, label=f"chains, {kind}")
            if kind == "uniform":
                lines = {
                    f"exact_distance{over}": "transition matrix",
                    f"expected_distance{over}": "the same, drawn from",
                }
                if not over:
                    lines |= {"bound": "bound of these scores", "worst_bound": "bound of any unit vectors"}
                for (column, name), style in zip(lines.items(), ("-", "--", "-.", ":"), strict=False):
                    colour = "black" if "bound" not in column else "grey"
                    axis.plot(x, [row[column] for row in found], style, color=colour, label=name, zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(1e-3, 1.3)
        axis.set_xlabel("Proposals")
        axis.set_ylabel("Total variation, " + ("items" if over else "views"))
        axis.set_title(f"{data}, temperature {temperature:g}", fontsize=10)
    _finish(path, figure, axes)


def options(bias: Sequence[Row], trained: Sequence[Row], path: Path) -> None:
    """In the order of the tables."""
    gradients, runs = grouped(bias, "options"), grouped(trained, "options")
    names = [name for (name,) in gradients | runs]
    data_sets = [data for (data,) in grouped(trained, "data")]
    figure, axes = _figure(WIDTH, 0.22 * len(names) + 1.2, 1, 2 + len(data_sets), sharey=True)
    for axis, column in zip(axes, ("bias", "deviation"), strict=False):
        axis.barh(range(len(bias)), [row[column] for row in bias], color=COLOURS[1])
    axes[0].set_xlabel("Bias, relative")
    axes[1].set_xlabel("Deviation, relative")
    for axis, data in zip(axes[2:], data_sets, strict=True):
        for (name,), found in grouped([row for row in trained if row["data"] == data], "options").items():
            mean, deviation = _mean_and_spread([row["few_probe"] for row in found])
            axis.errorbar(mean, names.index(name), xerr=deviation, fmt="o", color=COLOURS[2], capsize=2)
        axis.set_xlabel(f"{data}: probe (%)")
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylim(len(names) - 0.4, -0.6)  # from top to bottom
    _finish(path, figure, axes)


def speed(timed: Sequence[Row], trained: Sequence[Row], path: Path) -> None:
    costs, found = ratios(timed), curves(trained)
    data_sets, sizes = ([value for (value,) in grouped(timed, column)] for column in ("data", "batch_size"))
    figure, axes = _figure(WIDTH, 3.4 * len(data_sets), len(data_sets), len(sizes), sharey="row")
    for axis, (data, size) in zip(axes, itertools.product(data_sets, sizes), strict=True):
        methods = [key[2] for key in found if key[:2] == (data, size) and key in costs]
        for number, method in enumerate(methods):
            case = (data, size, method)
            x = [step / found[case][-1][0] * costs[case].median for step, _ in found[case]]
            values = [value for _, value in found[case]]
            axis.plot(x, values, color=COLOURS[number], marker=".", label=named(method))
        axis.set_title(f"{data}, b = {size}", fontsize=10)
        axis.set_xlabel("Time, all of SimCLR's training = 1")
        axis.set_ylabel("1-NN, 10 labels a class (%)")
    _finish(path, figure, axes)


def learning_curves(
    rows: Sequence[Row], best_rate: Callable[[Sequence[Row]], Sequence[Row]], floor: str, path: Path
) -> None:
    """Excess over the floor against steps, of each method's best rate at each length; the longest length is solid.

    Args:
        best_rate: of the ends of a method's runs, those at its best rate.
    """
    ends = [row for row in rows if row["step"] == row["steps"]]
    floors = {
        temperature: min(row["loss"] for row in found)
        for (temperature,), found in grouped([row for row in ends if row["method"] == floor], "temperature").items()
    }
    panels = grouped([row for row in rows if row["method"] != floor], "temperature", "batch_size")
    figure, axes = _figure(4.4 * len(panels), 4.4, 1, len(panels), sharey=True)
    for axis, ((temperature, size), found) in zip(axes, panels.items(), strict=True):
        longest = max(row["steps"] for row in found)
        methods = list(dict.fromkeys(row["method"] for row in found))
        for (method, steps), runs in grouped(found, "method", "steps").items():
            rate = best_rate([row for row in runs if row["step"] == steps])[0]["rate"]
            points = grouped([row for row in runs if row["rate"] == rate], "step")
            excess = [statistics.fmean(row["loss"] for row in at) - floors[temperature] for at in points.values()]
            line, label = ("-", named(method)) if steps == longest else (":", None)
            axis.loglog(
                [step for (step,) in points], excess, line, color=COLOURS[methods.index(method) % 7], label=label
            )
        axis.set_title(f"b = {size}, temperature {temperature:g}")
        axis.set_xlabel("Steps of 2b encodings")
    axes[0].set_ylabel("Exact global loss, less that of the exact gradient")
    _finish(path, figure, axes)
