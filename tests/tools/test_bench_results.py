"""What the throughput benchmark writes, and what is made of its files: a comparison, a table side by side."""

import csv
import json
import re
from pathlib import Path

import pytest

from bench import compare, side_by_side, throughput
from bench.harness import machine, report

SMALL = ["--memory", "none", "--device", "cpu", "--backend", "reference", "--rounds", "3", "--quick"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "sub" / "out.json"
    throughput.main([*SMALL, "--sizes", "8x16x4,6,9", "--banks", "64,256", "--save", str(path)])
    return path


def test_nothing_is_written_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    throughput.main([*SMALL, "--sizes", "6", "--banks", "none"])
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert all(name in printed for name in report.LOOKS)


def test_results_file(saved: Path) -> None:
    results = json.loads(saved.read_text())
    assert list(results) == ["schema", "command", "machine", "available_backends", "settings", "throughput", "memory"]
    assert str(saved.parent) not in json.dumps(results)
    expected = {"device", "cpu", "usable_cores", "threads", "torch", "python", "emc2_kernels", "commit", "dirty"}
    assert expected <= set(results["machine"])
    assert results["machine"]["core_instruction_set"] == machine.core_instruction_set()
    assert results["memory"] == [] and "reference" in results["available_backends"]
    cases = [(one["kind"], one["n"], one["m"], one["d"]) for one in results["throughput"]]
    assert cases[:3] == [("sweep", 8, 16, 4), ("sweep", 6, 6, 128), ("sweep", 9, 9, 128)]
    assert cases[3:] == [("uniform", 32, 64, 64), ("uniform", 32, 256, 64)]
    assert ["mixing" in one for one in results["throughput"]] == [False] * 3 + [True] * 2
    for one in results["throughput"][3:]:
        mixing = one["mixing"]
        assert mixing["rows"] == 32 and 0 < mixing["total_variation"]["median"] <= mixing["total_variation"]["largest"]
        needed = mixing["proposals_to_near"]
        assert 1 < needed["median"] <= needed["largest"]
        assert (mixing["total_variation"]["largest"] <= mixing["near"]) == (needed["largest"] <= mixing["proposals"])
    for one in results["throughput"]:
        for name, peer in one["peers"].items():
            for field in ("time_ms", "ratio_to_mm", "speedup_of_mh_step"):
                spread = peer[field]
                assert 0 < spread["lower_quartile"] <= spread["median"] <= spread["upper_quartile"]
                assert spread["count"] == 3
            if name in ("mm", "ntxent"):
                assert peer["samples_per_second"] is None
            else:
                seconds = peer["time_ms"]["median"] / 1e3
                assert peer["samples_per_second"] == pytest.approx(one["n"] * peer["samples_per_row"] / seconds)
    samples = {name: peer["samples_per_row"] for name, peer in results["throughput"][0]["peers"].items()}
    assert samples == {"mh_step": 8, "mm": 0, "naive": 4, "race": 1, "gumbel": 1, "column_loop": 8, "lean_loop": 8}


def test_lines_of_csv_say_what_was_measured_where(saved: Path) -> None:
    results = json.loads(saved.read_text())
    with saved.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(one["peers"]) for one in results["throughput"])
    for name in ("commit", "core_instruction_set", "cpu_capability"):
        assert {row[name] for row in rows} == {results["machine"][name]}
    first = results["throughput"][0]["peers"]["mh_step"]
    assert float(rows[0]["median_ms"]) == first["time_ms"]["median"]
    assert float(rows[0]["ratio_to_mm"]) == first["ratio_to_mm"]["median"]


def test_figures_are_drawn(saved: Path, tmp_path: Path) -> None:
    assert {path.name for path in saved.parent.glob("*.png")} == {"out-time.png", "out-bank.png"}
    results = json.loads(saved.read_text())
    for n in (64, 128):
        results["memory"].append({"peer": "mh_step", "n": n, "m": n, "d": 4, "dtype": "float32", "peak_extra_mb": 1.0})
    assert [path.name for path in report.plot_all(results, tmp_path / "x")] == [
        "x-time.png",
        "x-bank.png",
        "x-memory.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def changed(path: Path, out: Path, factor: float, machine: dict | None = None) -> Path:
    """The results with one peer's figures times a factor, and tight quartiles everywhere."""
    results = json.loads(path.read_text())
    results["machine"] |= machine or {}
    for one in results["throughput"]:
        for name, peer in one["peers"].items():
            for field in ("time_ms", "ratio_to_mm"):
                median = peer[field]["median"] * (factor if name == "mh_step" and one["n"] == 6 else 1)
                peer[field] |= {"median": median, "lower_quartile": 0.99 * median, "upper_quartile": 1.01 * median}
    out.write_text(json.dumps(results))
    return out


@pytest.mark.parametrize(
    ("factor", "code", "line"), [(1.05, 0, "0 regressions"), (1.3, 1, "SLOWER"), (0.7, 0, "faster")]
)
def test_comparison_flags_regressions(saved, tmp_path, capsys, factor, code, line) -> None:
    old, new = changed(saved, tmp_path / "old.json", 1), changed(saved, tmp_path / "new.json", factor)
    assert compare.main([str(old), str(new)]) == code
    printed = capsys.readouterr().out
    assert line in printed
    assert printed.count("sweep 6 x 6 x 128 float32 mh_step") == (0 if factor == 1.05 else 2)  # the time and the ratio
    elsewhere = changed(saved, tmp_path / "elsewhere.json", factor, {"device": "another"})
    assert compare.main([str(old), str(elsewhere)]) == code
    assert capsys.readouterr().out.count("mh_step") == (0 if factor == 1.05 else 1)  # times do not compare


def on_instruction_sets(path: Path, out: Path, core: str | None, in_torch: str) -> Path:
    """The results as a CPU of these would have them; `core` None: from before files had the core's."""
    results = json.loads(path.read_text())
    results["machine"] |= {"core_instruction_set": core, "cpu_capability": in_torch}
    if core is None:
        del results["machine"]["core_instruction_set"]
    out.write_text(json.dumps(results))
    return out


@pytest.mark.parametrize(
    ("core", "in_torch", "named"),
    [
        ("AVX2", "AVX512", "new: core AVX2, torch AVX512"),
        ("AVX512", "AVX2", "new: core AVX512, torch AVX2"),
        (None, "AVX512", "new: core unknown, torch AVX512 (written before files said which)"),
    ],
)
def test_instruction_sets_are_compared_only_when_asked_for(saved, tmp_path, capsys, core, in_torch, named) -> None:
    old = on_instruction_sets(saved, tmp_path / "old.json", "AVX512", "AVX512")
    new = on_instruction_sets(saved, tmp_path / "new.json", core, in_torch)
    unlike = f"old: core AVX512, torch AVX512; {named}"
    with pytest.raises(SystemExit, match=re.escape(f"got {unlike}: measure both on one, or pass --across")):
        compare.main([str(old), str(new)])
    assert compare.main([str(old), str(new), "--across-instruction-sets"]) == 0
    assert capsys.readouterr().out.startswith(f"ACROSS INSTRUCTION SETS, {unlike}\n")


def test_two_files_that_do_not_say_their_instruction_sets_are_not_alike(saved, tmp_path, capsys) -> None:
    kept = on_instruction_sets(saved, tmp_path / "old.json", None, "AVX512")
    with pytest.raises(SystemExit, match="core unknown.*core unknown"):
        compare.main([str(kept), str(kept)])
    gpu = changed(kept, tmp_path / "gpu.json", 1, {"device_type": "cuda"})  # its CPU does not matter
    assert compare.main([str(gpu), str(gpu)]) == 0
    assert compare.main([str(saved), str(saved)]) == 0
    assert "ACROSS" not in capsys.readouterr().out


def test_files_stand_side_by_side(saved, tmp_path, capsys) -> None:
    kept = on_instruction_sets(saved, tmp_path / "first.json", "AVX512", "AVX512")
    first, second = json.loads(kept.read_text()), json.loads(kept.read_text())
    second["machine"]["core_instruction_set"] = "AVX2"
    mm, ours = (first["throughput"][0]["peers"][name] for name in ("mm", "mh_step"))
    mm["time_ms"]["median"], ours["time_ms"]["median"] = 0.01234, 1234.6
    ours["ratio_to_mm"] = {"median": 1.5, "lower_quartile": 1.25, "upper_quartile": 12.0}
    del second["throughput"][0]["peers"]["mh_step"], second["throughput"][0]["peers"]["mm"]
    second["throughput"][0]["left_out"]["mh_step"] = 9.87
    for name, results in (("first.json", first), ("second.json", second)):
        (tmp_path / name).write_text(json.dumps(results))
    files = [str(tmp_path / name) for name in ("first.json", "second.json")]
    side_by_side.main([*files, "--peers", "mm", "mh_step"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[:4]] == ["size", "---", "sweep, 8 x 16 x 4, float32", ""]
    assert [title.split(":")[0] for title in lines[0][2:]] == [
        f"core {name}, torch AVX512" for name in ("AVX512", "AVX2")
    ]
    assert lines[2][1:] == ["mh_step", "1,235 ms, 1.50 x (1.25 to 12.0)", "9,870 ms, one call"]
    assert lines[3][1:] == ["torch.mm alone", "0.0123 ms", "-"]
    assert len(lines) == 2 + 2 * len(first["throughput"]) and {len(line) for line in lines} == {4}
    side_by_side.main(files)
    assert "gumbel_sample" in capsys.readouterr().out


def make_results(median: float, spread: float, megabytes: float) -> dict:
    """Of one peer at one size, its quartiles the spread away from the median."""
    figures = {"median": median, "lower_quartile": median - spread, "upper_quartile": median + spread}
    case = {"kind": "sweep", "n": 4, "m": 4, "d": 2, "dtype": "float32", "peer": "mh_step"}
    peers = {"mh_step": {"ratio_to_mm": figures, "time_ms": figures}}
    on = dict.fromkeys(compare.SAME_MACHINE, 1)
    return {"machine": on, "throughput": [case | {"peers": peers}], "memory": [case | {"peak_extra_mb": megabytes}]}


@pytest.mark.parametrize(
    ("new", "regressions"),
    [((1.5, 0.1, 50), 2), ((1.5, 0.4, 50), 0), ((1, 0.1, 56), 1), ((1, 0.1, 53), 0), ((0.5, 0.1, 40), 0)],
    ids=["slower", "within the spread", "more memory", "within a step of memory", "better"],
)
def test_a_regression_is_beyond_tolerance_and_spread(new, regressions) -> None:
    found = list(compare.changes(make_results(1, 0.2, 50), make_results(*new), tolerance=0.1))
    assert sum(change.regression for change in found) == regressions


def test_comparison_refuses_other_files(saved, tmp_path) -> None:
    with pytest.raises(SystemExit, match="expected a file of bench.throughput"):
        compare.main([str(saved), str(tmp_path / "none.json")])
    (tmp_path / "first.json").write_text('{"schema": 1}')
    with pytest.raises(SystemExit, match="expected results of schema 2, got 1"):
        compare.main([str(tmp_path / "first.json"), str(saved)])
