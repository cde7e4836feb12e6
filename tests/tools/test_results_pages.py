"""The pages of docs/results: what the study prints stands there as its files have it, in tables that fit a page."""

import shutil
from pathlib import Path

import pytest

from examples.study import (
    __main__ as study,
)
from examples.study import (
    accuracy,
    cells,
    figures,
    lag,
    options,
    sampler,
    speed,
    subset,
    tables,
)

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
# The page that a part's tables stand on, and how many of them; the others are left to the CSV files.
SHOWN = {"a": ("accuracy", 6), "b": ("accuracy", 5), "c": ("sampler-law", 2), "d": ("options", 3), "e": ("accuracy", 4)}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A copy of the files, in which nothing may be missing."""

    def read_only(path, names, wanted, _, *further):
        return cells.measure_missing(path, names, wanted, lambda *cell: pytest.fail(f"measures {cell}"), *further)

    for module in (accuracy, subset, lag, options, sampler, speed):
        monkeypatch.setattr(module, "measure_missing", read_only)
    for drawn in ("accuracy", "subset", "sampler", "options", "speed"):
        monkeypatch.setattr(figures, drawn, lambda *_: None)
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


@pytest.mark.parametrize("part", study.PARTS)
def test_the_tables_of_the_study_are_made_from_the_files_beside_the_page(part, measured):
    printed = study.PARTS[part](measured, measured, False)
    page, count = SHOWN[part]
    text = (RESULTS / f"{page}.md").read_text()
    made = [block for block in printed.split("\n\n") if block.startswith("|")]
    assert sum(f"\n\n{table}\n\n" in text for table in made) == count
    if part == "d":  # with what the library no longer has
        assert all(f"| {name} |" in printed for name in options.REMOVED)


def test_a_wide_table_becomes_several_that_begin_alike():
    header, row = ["", *"abcdefg"], ["x", *"1234567"]
    first, second = tables.markdown(header, [row]).split("\n\n")
    assert first.splitlines() == ["|  | a | b | c | d |", "| --- | --- | --- | --- | --- |", "| x | 1 | 2 | 3 | 4 |"]
    assert second.splitlines() == ["|  | e | f | g |", "| --- | --- | --- | --- |", "| x | 5 | 6 | 7 |"]
