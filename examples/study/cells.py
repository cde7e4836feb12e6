"""Results in CSV files that an interrupted study goes on from."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emc2_kernels import files

Value = int | float | str | None
Row = dict[str, Value]
Measure = Callable[..., list[Row]]


def read(path: Path) -> list[Row]:
    """Empty where there is no file. Numbers come back as numbers, empty fields as None."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


@contextmanager
def worker_pool(jobs: int, **options: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes; options as ``ProcessPoolExecutor`` has them. Ctrl-C and errors leave what is queued undone: an
    executor of itself would do all of it first."""
    pool = ProcessPoolExecutor(jobs, **options)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def measure_missing(
    path: Path,
    names: Sequence[str],
    cells: Iterable[tuple],
    measure: Measure,
    shown: Iterable[tuple] = (),
    jobs: int = 1,
) -> list[Row]:
    """Measures the cells that the file lacks, writes them to it one by one, and returns the rows of all of `cells`.

    Args:
        names: of a cell's values; the file's first columns. All that a result depends on belongs there, or a cell that
            was measured with other settings would be taken for finished.
        measure: called with a cell's values; returns its rows, which all have the same further columns.
        shown: cells whose rows are returned, too, where the file has them, and that are never measured.
        jobs: processes that measure; 1: this one.

    Raises:
        ValueError: the file has other columns.
    """
    cells, rows = list(cells), read(path)
    if rows and tuple(rows[0])[: len(names)] != tuple(names):
        raise ValueError(f"{path}: expected columns that begin with {tuple(names)}, got {tuple(rows[0])}")
    done = {_cell(row, names) for row in rows}
    todo = [cell for cell in cells if cell not in done]
    with ExitStack() as stack:
        progress = stack.enter_context(tqdm(total=len(todo), desc=path.stem, unit="cell", disable=None))
        mapped = map if jobs == 1 else stack.enter_context(worker_pool(jobs)).map
        for cell, measured in zip(todo, mapped(measure, *zip(*todo, strict=True)) if todo else (), strict=True):
            progress.set_postfix_str(" ".join(map(str, cell)))
            progress.update()
            found = [dict(zip(names, cell, strict=True)) | row for row in measured]
            if rows and list(rows[0]) != list(found[0]):
                raise ValueError(f"{path}: expected columns {list(found[0])}, got {list(rows[0])}")
            rows += found
            _write(path, rows)
    wanted = {*cells, *shown}
    return [row for row in rows if _cell(row, names) in wanted]


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple, list[Row]]:
    """Rows by their values of these columns, in the order in which they come."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(_cell(row, names), []).append(row)
    return found


def _cell(row: Row, names: Sequence[str]) -> tuple:
    return tuple(row[name] for name in names)


def _write(path: Path, rows: Sequence[Row]) -> None:
    """The whole file, renamed into place: whenever the study is ended, it has whole cells only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)
    files.write(path, text.getvalue())


def _text(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str) -> Value:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
