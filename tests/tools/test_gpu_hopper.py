"""How the GPU's check and benchmark treat the sweep on Hopper's matrix units; how "auto" learns where it has won."""

import json

import pytest
import torch

from bench.gpu import benchmark, matrix_sweep, rows, smoke
from bench.gpu.trial import Context
from bench.harness import CHECKOUT
from emc2_kernels.backends import gpu

CPU = torch.device("cpu")


def results(table, card="NVIDIA H100"):
    columns = ["n", "d", "cuda", "triton"]
    row = {"name": "large-crossover", "backend": "all", "notes": {"columns": columns, "us": table}}
    return {"machine": {"device": card}, "rows": [{"name": "sweep-128", "backend": "cuda"}, row]}


def test_where_it_has_won_is_read_off_the_results():
    """From a number of rows on, at every larger one; a d at which it never won keeps its place, or the next larger d's
    row would stand for it."""
    table = [
        [2048, 128, 9.0, 8.0], [4096, 128, 20.0, 25.0], [8192, 128, 80.0, 100.0],
        [2048, 256, 1.0, 2.0], [4096, 256, 9.0, 8.0], [8192, 256, 1.0, 2.0],
        [2048, 512, 9.0, 8.0], [4096, 512, 9.0, 8.0], [8192, 512, 9.0, 9.0],
    ]  # fmt: skip
    won = matrix_sweep.rows_won(results(table))
    assert [(row.d, row.least_n) for row in won] == [(128, 4096), (256, 8192), (512, gpu.NEVER)]
    assert {row.card for row in won} == {"NVIDIA H100"}


def test_rows_won_are_printed_as_they_are_written(tmp_path, capsys):
    file = tmp_path / "card.json"
    file.write_text(json.dumps(results([[2048, 128, 9.0, 10.0]])))
    matrix_sweep.main(["--won", str(file)])
    printed = capsys.readouterr().out
    assert eval(printed, {"Won": gpu.Won}) == gpu.Won("NVIDIA H100", 128, 2048)


@pytest.mark.parametrize("columns", [["n", "d", "triton"], None])
def test_results_that_do_not_say_where_it_has_won(columns, tmp_path, capsys):
    """The row is among the last, which a time limit cuts off; without nvcc it has one backend."""
    found = results([[2048, 128, 9.0]])
    if columns is None:
        found["rows"][1] = {"name": "large-crossover", "backend": "all", "error": "not begun within 105 s"}
    else:
        found["rows"][1]["notes"]["columns"] = columns
    file = tmp_path / "card.json"
    file.write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        matrix_sweep.main(["--won", str(file)])
    assert "large-crossover" in capsys.readouterr().err


def test_each_row_that_auto_goes_by_is_in_a_results_file():
    measured = []
    for file in (CHECKOUT / "bench" / "results").glob("*.json"):
        found = json.loads(file.read_text())
        rows_ = found.get("rows", []) if isinstance(found, dict) else []
        if any(row.get("name") == "large-crossover" and "error" not in row for row in rows_):
            measured += matrix_sweep.rows_won(found)
    assert set(gpu.MATRIX_SWEEP_WON) <= set(measured)


def test_hopper_takes_large_sweeps_on_the_cuda_backend():
    options = benchmark.parse_arguments(["--headline"])
    both = ["triton", "cuda"]
    others, hopper = (
        {name for name, backend in benchmark.plan(options, both, hopper) if backend == "cuda"}
        for hopper in (False, True)
    )
    assert hopper - others == set(rows.SWEEPS) and others <= hopper
    assert not benchmark.is_hopper(CPU)


HOPPER = [name for name, family in smoke.FAMILIES.items() if family.kind == "hopper"]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_its_families_are_skipped_on_other_cards(architecture, monkeypatch):
    monkeypatch.setattr(gpu, "architecture", lambda index=None: architecture)
    monkeypatch.setattr(smoke.emc2, "backends", lambda: {"cuda": "available"})
    monkeypatch.setitem(smoke.FAMILIES, HOPPER[0], smoke.Family("hopper", lambda *context: iter(())))
    monkeypatch.setattr(Context, "rehearsal", False)
    monkeypatch.setattr(smoke, "verdict", lambda cases: {"status": "PASS"})
    record = smoke.run_family(HOPPER[0], Context(CPU))
    assert record["status"] == ("PASS" if architecture == 90 else "SKIP")
    assert architecture == 90 or f"sm_{architecture}" in record["why"]


@pytest.mark.parametrize("name", HOPPER)
def test_its_families_are_what_the_kernel_takes(name, monkeypatch):
    """On a GPU nothing would show that another kernel had walked them."""
    monkeypatch.setattr(gpu, "architecture", lambda index=None: 90)
    seen = []
    monkeypatch.setattr(
        "bench.gpu.families.run_step", lambda problem, backend, **changes: seen.append((problem, changes))
    )
    for shape in ("WHOLE_TILES", "SPLIT_TILES"):  # smaller, so that they are made in time
        rows_, keys = getattr(smoke.families, shape)[0]
        assert rows_ > gpu.SMALL_SWEEP and keys % gpu.MATRIX_SWEEP_KEYS == 0
    for trial in smoke.FAMILIES[name].trials(Context(CPU), "reference"):
        trial.call()
    assert seen
    for problem, changes in seen:
        assert problem.queries.shape[1] <= gpu.MATRIX_SWEEP_LARGEST_D and problem.queries.dtype != torch.float32
        assert not changes["return_accepts"] and not changes["return_lse"] and "log_proposal" not in problem.options
        assert problem.keys.shape[0] % gpu.MATRIX_SWEEP_KEYS == 0
        assert all(operand.stride(0) % 8 == 0 for operand in (problem.queries, problem.keys))
