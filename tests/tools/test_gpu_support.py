"""What the GPU tests share can fail, and divides them well: tried without a GPU."""

import sys

import gpu_losses
import gpu_support
import oracle
import pytest
import torch

from emc2_kernels import rng
from emc2_kernels.backends.reference import mh as reference


@pytest.mark.parametrize("proposal", ["sweep", "uniform", "positions"])
def test_the_column_walk_is_the_oracles_walk(proposal):
    n, m, draw = 23, 31, torch.Generator().manual_seed(0)
    values = gpu_support.problem(n, m, 9, torch.bfloat16, seed=4) | {
        "temperature": torch.rand(n, generator=draw) * 0.5 + 0.1,
        "chain_ids": torch.randperm(n, generator=draw) + 2**39,
        "query_ids": torch.arange(n) % 6,
        "key_ids": torch.arange(m) % 8,
        "key_labels": torch.randperm(m, generator=draw),
        "log_proposal": torch.randn(m, generator=draw),
        "burn_in": 5,
        "num_samples": 7,
    }
    values["state"].score[::3] = 2.0
    values["state"].key[::3] = 99
    values["keys"][4] = torch.nan
    if proposal == "uniform":
        values |= {"proposal": "uniform", "num_proposals": 40}
    elif proposal == "positions":
        values["proposal"] = torch.randint(0, m, (n, 40), generator=draw)
    walked, _ = gpu_support.column_walk(values)
    literal = oracle.walk(**values)
    for name in ("samples", "key", "accepted"):
        assert torch.equal(getattr(walked, name), getattr(literal, name)), name
    for name in ("score", "threshold", "closest_tie"):
        torch.testing.assert_close(getattr(walked, name), getattr(literal, name), rtol=1e-12, atol=1e-12)


MUTANTS = {
    "the positive is proposed": (reference, "_where_proposable", lambda walk, positions, scores: scores),
    "another generator": (rng, "NUM_ROUNDS", 10),
    "a sample late": (reference.WalkParams, "sample_points", lambda walk: [walk.burn_in] * walk.num_samples),
    "accepts not counted": (reference, "_count_accepts", lambda prefixes, steps, state: state.key.int() * 0),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_passes_what_is_right_and_fails_what_is_not(mutant, monkeypatch):
    ids = {"query_ids": torch.arange(40) % 9, "key_ids": torch.arange(60) % 9}
    values = gpu_support.problem(40, 60, 16, seed=2, num_samples=6, **ids)
    expected = gpu_support.column_walk(values)
    gpu_support.check_walk("cpu", "reference", values, expected=expected)
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises(AssertionError):
        gpu_support.check_walk("cpu", "reference", values, expected=expected)


def test_what_surrounds_an_operand_in_memory_is_not_a_number():
    matrix = oracle.unit(5, 24)
    for layout, (before, after) in gpu_support.LAYOUTS.items():
        window = gpu_support.lay_out(matrix, layout, "cpu")
        assert torch.equal(window, matrix) and window.stride() == (24 + before + after, 1)
        assert window.untyped_storage().nbytes() == 4 * 5 * (24 + before + after)
        assert window._base.isnan().sum() == 5 * (before + after)


@pytest.mark.parametrize("case", gpu_losses.OPTIONS)
def test_the_batches_of_the_loss_comparison_are_clear_of_ties(case):
    """Embeddings off by a hundred times the rounding of another device leave every chain where it was."""
    options, data = gpu_losses.OPTIONS[case], list(gpu_losses.batches(5))
    noise = torch.Generator().manual_seed(0)
    histories = []
    for error in (0.0, 1e-5, 1e-5):
        moved = [
            (*(z * (1 + error * torch.randn(z.shape, generator=noise)) for z in (z0, z1)), index)
            for z0, z1, index in data
        ]
        loss = gpu_losses.make("cpu", "reference", **options)
        histories.append(gpu_losses.train(loss, moved, "cpu", "reference"))
    for history in histories[1:]:
        for (_, _, stats, kept), (_, _, wanted, wanted_kept) in zip(history, histories[0], strict=True):
            assert torch.equal(kept["chains.key"], wanted_kept["chains.key"])
            assert stats["acceptance"] == wanted["acceptance"]
            assert stats.get("carry_share") == wanted.get("carry_share")
    last = histories[0][-1][2]
    assert last.get("carry_share", last.get("carried_weight")) > 0.05  # or what is carried would not be compared


def test_shares_divide_the_work_of_each_backend():
    """Each share of a file has its part of the tests whose kernels take long to compile."""
    count, command = 3, [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/gpu/test_gpu_invariance.py"]
    commands = {share: ["env", f"EMC2_GPU_SHARE={share}", *command] for share in ("0/1", f"1/{count}")}
    with gpu_support.running(commands) as processes:
        collected = [process.result().stdout.splitlines() for process in processes.values()]
    tests, second = ([line for line in lines if "::" in line] for lines in collected)
    shares = [[test for test in tests if gpu_support.share_of(test, count) == share] for share in range(count)]
    assert second == shares[1] and len(tests) > 90
    of_triton = [sum("triton" in test for test in share) for share in shares]
    assert min(of_triton) * count / sum(of_triton) > 0.6 and max(of_triton) * count / sum(of_triton) < 1.4


def test_few_processes_run_at_a_time():
    """And the ones that have not begun when a fixture ends never do."""
    code = "import time; print(time.time()); time.sleep(0.5); print(time.time())"
    with gpu_support.running({i: [sys.executable, "-S", "-c", code] for i in range(5)}, at_a_time=2) as processes:
        times = [tuple(map(float, process.result().stdout.split())) for process in processes.values()]
    at_once = [sum(begin <= moment < end for begin, end in times) for moment, _ in times]
    assert max(at_once) == 2
    with gpu_support.running({i: [sys.executable, "-S", "-c", code] for i in range(5)}, at_a_time=1) as processes:
        processes[0].result()
    assert sum(process.cancelled() for process in processes.values()) >= 3


def test_a_guard_asks_for_the_memory_that_is_taken():
    """Of every state of a large sweep: Triton's scratch memory and the samples."""
    walk = pytest.importorskip("emc2_kernels.backends.triton.transition")
    n = gpu_support.MANY_SAMPLES
    taken = 4 * walk.WORDS.value * walk.scratch_size(n, splits=1, num_samples=n, segments=8) + 4 * n * n
    assert taken < 1e9 * gpu_support.MANY_SAMPLES_GB < 1.2 * taken
