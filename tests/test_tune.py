"""bench/tune.py on a toy walk in Triton's interpreter: candidates take their turns, and the table is left as it was."""

import sys
import time
from pathlib import Path

import pytest
import torch

from emc2_kernels.backends import gpu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
pytest.importorskip("triton")

import timing
import tune


@pytest.mark.skipif(not gpu.interpreting(), reason="the real thing runs on a GPU")
@pytest.mark.parametrize("draws", [None, 6], ids=["sweep", "gathered"])
def test_the_shipped_row_and_the_fastest_are_measured(draws, monkeypatch, capsys):
    from emc2_kernels.backends.triton import settings

    sweeps = [settings.Sweep(16, 16, 4, 1, None, ""), settings.Sweep(24, 16, 4, 1, None, "")]  # 24 is no power of two
    gathered = [settings.Gathered(8, 16, 1, ""), settings.Gathered(5, 16, 1, "")]
    candidates = sweeps if draws is None else gathered
    name = "sweep" if draws is None else "gathered"
    monkeypatch.setitem(tune.CANDIDATES, name, lambda settings, shape: candidates)
    monkeypatch.setattr(tune, "ROUNDS", 3)
    before = getattr(settings, name)
    tuner = tune.Tuner(tune.Shape(torch.float32, 2, 12, 4, draws), torch.device("cpu"), timing.cpu_timer)
    rows = tuner.run(time.monotonic() + 60)
    assert getattr(settings, name) is before
    assert [row["shipped"] for row in rows].count(True) == 1 and len(rows) == 2
    assert str(tuple(candidates[0])) in {row["settings"] for row in rows}
    assert [row["median"] for row in rows] == sorted(row["median"] for row in rows)
    assert str(tuple(candidates[1][:-1])) in capsys.readouterr().out  # does not compile, and is said to


def test_candidates_are_few_and_distinct():
    from emc2_kernels.backends.triton import settings

    for shape in tune.SHAPES:
        candidates = list(tune.CANDIDATES["sweep" if shape.draws is None else "gathered"](settings, shape))
        assert 4 < len(candidates) == len(set(candidates)) <= 80


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 1
    assert "CUDA GPU" in capsys.readouterr().err
