"""The benchmark harness: its peers sample what they claim to, its rounds interleave, its ratios pair rounds."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import end_to_end, gcbs, gumbel, losses, peers, throughput
from bench.harness import CHECKOUT, machine, report, timing
from emc2_kernels.backends.cpu import build
from emc2_kernels.backends.extension import Unavailable

FIVE_ITEMS = torch.tensor([0.0, 0.4, 1.1, -0.9, 1.7])  # similarities to one query
TEMPERATURE = 0.7
CRITICAL = 33.38  # chi-square, 4 degrees of freedom: exceeded with probability 1e-6


def chi_square(items: torch.Tensor, temperature: float = TEMPERATURE) -> float:
    """Pearson's statistic of independent draws `items`, values 0..4, against the softmax at `temperature`."""
    expected = torch.softmax(FIVE_ITEMS.double() / temperature, 0) * items.numel()
    counts = torch.bincount(items.flatten().long(), minlength=5).double()
    return ((counts - expected) ** 2 / expected).sum().item()


def test_naive_draws_from_the_softmax() -> None:
    queries, keys = torch.ones(3, 1), FIVE_ITEMS[:, None]
    peer = peers.NaiveSoftmax(queries, keys, TEMPERATURE, samples_per_row=20_000)
    peer()  # a second call must not see what the first left in the buffers
    samples = peer()
    assert samples.shape == (3, 20_000)
    for row in samples:
        assert chi_square(row) < CRITICAL
        assert chi_square(row, TEMPERATURE * 0.9) > CRITICAL


@pytest.mark.parametrize("name", ["race", "gumbel"])
def test_exact_draws_are_of_the_softmax(name: str) -> None:
    queries, keys = torch.ones(20_000, 1), FIVE_ITEMS[:, None]
    builders = peers.bank_peers(queries, keys, temperature=TEMPERATURE, num_samples=1, backend="auto")
    peer = builders[name]()
    assert peer.samples_per_row == 1
    first, second = peer().clone(), peer()
    for samples in (first, second):
        assert chi_square(samples) < CRITICAL
        assert chi_square(samples, TEMPERATURE * 0.9) > CRITICAL
    assert not torch.equal(first, second)


def test_a_bank_is_drawn_from_uniformly_and_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = peers.emc2.mh_step
    monkeypatch.setattr(peers.emc2, "mh_step", lambda *a, **options: seen.append(options) or real(*a, **options))
    queries, keys = peers.make_operands(4, 300, 8, torch.float32, torch.device("cpu"))
    options = {"temperature": 0.07, "num_samples": 16, "backend": "auto", "others": ["reference"]}
    builders = peers.bank_peers(queries, keys, **options)
    assert list(builders) == ["mh_step", "mh_step reference", "mm", "naive", "race", "gumbel"]
    for name in ("mh_step", "mh_step reference"):
        assert builders[name]()().shape == (4, 16)
    for given, backend in zip(seen, ("auto", "reference"), strict=True):
        expected = {"proposal": "uniform", "num_proposals": 64, "burn_in": 32, "backend": backend}
        assert given | expected == given


def test_ntxent_makes_gradients() -> None:
    queries, _ = peers.make_operands(8, 8, 4, torch.float32, torch.device("cpu"))
    peer = peers.NTXentStep(queries, 0.07)
    first, second = peer(), peer()
    assert torch.equal(first, second)
    assert all(view.grad.abs().sum() > 0 for view in peer.views)


def test_a_peer_that_takes_too_long_is_left_out_and_named() -> None:
    seconds = {"mh_step": 9.0, "mm": 9.0, "slow": 2.0, "fast": 0.5}
    builders = {name: (lambda name=name: name) for name in seconds}
    kept, left_out = throughput.drop_slow(builders, lambda name, repeats: seconds[name], longest=1.0)
    assert list(kept) == ["mh_step", "mm", "fast"]
    assert left_out == {"slow": 2.0}


def test_column_loop_draws_from_the_softmax_under_independent_uniform_proposals() -> None:
    """One row per draw of proposals: rows that share their columns would depend on each other."""
    rows, proposals, burn_in = 40_000, 80, 70
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(5, (proposals, rows), generator=generator)
    scores = FIVE_ITEMS[items] / TEMPERATURE
    buffer = torch.full((proposals - burn_in, rows), -7)
    start = torch.full((rows,), -torch.inf)
    samples, outgoing = peers.walk_columns(scores, start, burn_in, generator, buffer)

    assert samples.min() >= 0 and samples.max() < proposals
    for retained in (samples[0], samples[-1]):
        drawn = items.gather(0, retained[None])[0]
        assert chi_square(drawn) < CRITICAL
        assert chi_square(drawn, TEMPERATURE * 0.9) > CRITICAL
    assert torch.equal(outgoing, scores.gather(0, samples[-1:])[0])


def test_collected_pairs_are_the_states_of_the_same_walk() -> None:
    """Given the same acceptance draws both loops visit the same states; a weight of 0 is no pair."""
    scores = torch.randn(12, 30, generator=torch.Generator().manual_seed(3))
    start = torch.full((30,), -1.0)
    buffer = torch.full((8, 30), -7)
    lean, outgoing = peers.walk_columns(scores, start, 4, torch.Generator().manual_seed(5), buffer)
    weights = scores.exp().T.contiguous()
    pairs, current = peers.collect_pairs(weights, start.exp(), 4, torch.Generator().manual_seed(5))
    assert torch.equal(pairs[0].view(8, 30), torch.arange(30).expand(8, 30))
    assert torch.equal(pairs[1].view(8, 30), lean)
    torch.testing.assert_close(current, outgoing.exp())
    weights[7, 9] = 0.0
    pairs, _ = peers.collect_pairs(weights, start.exp(), 4, torch.Generator().manual_seed(5))
    assert pairs.shape[1] == 8 * 30 - 1 and (pairs[0] == 7).sum() == 7


def test_column_loop_retains_the_state_after_each_proposal_past_burn_in() -> None:
    """Scores that differ by hundreds leave nothing to chance: up is always accepted, down never."""
    scores = torch.tensor([0.0, 300.0, 100.0, 900.0, 600.0])[:, None]
    buffer = torch.full((3, 1), -7)
    generator = torch.Generator().manual_seed(0)
    samples, outgoing = peers.walk_columns(scores, torch.tensor([-torch.inf]), 2, generator, buffer)
    assert samples.flatten().tolist() == [1, 3, 3]
    assert outgoing.item() == 900.0
    samples, outgoing = peers.walk_columns(scores, torch.tensor([2000.0]), 2, generator, buffer)
    assert samples.flatten().tolist() == [-1, -1, -1]
    assert outgoing.item() == 2000.0


def test_column_loop_carries_its_state() -> None:
    queries, keys = peers.make_operands(7, 12, 4, torch.float32, torch.device("cpu"))
    peer = peers.LeanColumnLoop(queries, keys, 0.07, burn_in=6)
    first = peer().clone()
    assert first.shape == (7, 6) and peer.samples_per_row == 6
    scores = queries @ keys.T / 0.07
    torch.testing.assert_close(peer.current, scores.gather(1, first[:, -1:])[:, 0])
    peer.current = torch.full_like(peer.current, 1e6)
    assert (peer() == -1).all()


def test_matrix_product() -> None:
    queries, keys = peers.make_operands(5, 9, 4, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(peers.MatrixProduct(queries, keys)(), queries @ keys.T)


def test_mh_step_carries_state_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = peers.emc2.mh_step

    def recording(queries, keys, state, **options):
        result = real(queries, keys, state, **options)
        seen.append((state, options["step"], options["burn_in"], result.state))
        return result

    monkeypatch.setattr(peers.emc2, "mh_step", recording)
    queries, keys = peers.make_operands(4, 8, 4, torch.float32, torch.device("cpu"))
    peer = peers.sweep_peers(queries, keys, temperature=0.07, num_samples=16, backend="reference")["mh_step"]()
    assert peer().shape == (4, 4) and peer.samples_per_row == 4  # no more than the states after burn-in
    peer()
    assert [step for _, step, _, _ in seen] == [0, 1]
    assert [burn_in for _, _, burn_in, _ in seen] == [4, 4]
    assert seen[1][0] is seen[0][3]


def test_interleave_takes_turns_in_changing_order() -> None:
    log = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}

    def timer(call, repeats: int) -> float:
        log.append("timed")
        call()
        return 1.0

    result = timing.interleave(calls, 48, timer=timer, warmup=2, min_seconds=0.5, budget_seconds=1e9)
    preparation = 3 * (2 + 2 + 2)  # per call two of warm-up and two timed estimates
    assert log[:6] == ["a", "a", "timed", "a", "timed", "a"]
    assert len(log) == preparation + 48 * 9
    rounds = [log[start : start + 9] for start in range(preparation, len(log), 9)]
    orders = set()
    for one in rounds:
        assert one[0::3] == one[2::3] and one[1::3] == ["timed"] * 3  # a call that is not timed before each that is
        assert sorted(one[0::3]) == ["a", "b", "c"]
        orders.add("".join(one[0::3]))
    assert len(orders) >= 5  # of six
    assert result.seconds == {name: [1.0] * 48 for name in "abc"}


def test_short_calls_repeat_and_slow_calls_sit_rounds_out() -> None:
    cost = {"short": 1e-4, "slow": 1.0, "slower": 100.0}
    repeats_seen = {name: [] for name in cost}
    names = {name: (lambda name=name: name) for name in cost}

    def timer(call, repeats: int) -> float:
        repeats_seen[call()].append(repeats)
        return cost[call()]

    result = timing.interleave(names, 16, timer=timer, min_seconds=0.005, budget_seconds=10.0)
    assert set(repeats_seen["short"][1:]) == {50} and set(repeats_seen["slow"]) == {1}
    taken = {name: [turn for turn, value in enumerate(series) if value] for name, series in result.seconds.items()}
    assert taken["short"] == list(range(16))
    assert taken["slow"] == [0, 4, 8, 12]  # 2 s a turn, so 4 turns keep to 10 s
    assert taken["slower"] == [0, 4, 8, 12]  # 2 turns would be too few, whatever the budget
    assert len(timing.ratios(result.seconds["slow"], result.seconds["short"])) == 4


def test_cpu_timer_is_per_call() -> None:
    calls = []
    assert 0.001 <= timing.cpu_timer(lambda: calls.append(time.sleep(0.001)), 50) < 0.05
    assert len(calls) == 50


def test_ratios_pair_rounds() -> None:
    """The machine slows down tenfold in half of the rounds; the ratio within each round is 2 all the same."""
    slow, fast = [2.0, 20.0, 200.0, None, 40.0], [1.0, 10.0, 100.0, 5.0, None]
    assert timing.ratios(slow, fast) == [2.0, 2.0, 2.0]
    seconds = {"naive": [2.0, 6.0, 9.0], "mm": [1.0, 2.0, 9.0], "mh_step": [4.0, 1.0, 3.0]}
    peer = throughput.peer_record(
        "naive",
        timing.Interleaved(seconds, {"naive": timing.Plan(1, 1)}),
        rows=4,
        samples_per_row=3,
    )
    assert peer["ratio_to_mm"]["median"] == 2.0  # the medians themselves have the ratio 3
    assert peer["speedup_of_mh_step"]["median"] == 3.0  # and here 2
    assert peer["time_ms"]["median"] == 6000.0
    assert peer["samples_per_second"] == 2.0


def test_summary() -> None:
    assert timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Summary(3.0, 2.0, 4.0, 5)
    assert timing.summarize([7.0]) == timing.Summary(7.0, 7.0, 7.0, 1)


def test_sizes() -> None:
    assert throughput.parse_sizes("64,64x256,8x16x4") == [(64, 64, 128), (64, 256, 128), (8, 16, 4)]


@pytest.mark.parametrize("text", ["", "x", "1x2x3x4", "0", "64x", "64x1", "-8"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a size is"):
        throughput.parse_size(text)


def test_unusable_backend_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.parse_arguments(["--backend", "abacus"])
    assert "no such backend" in capsys.readouterr().err


def test_command_line_names_no_absolute_path() -> None:
    command = throughput.command_line(["--quick", "--save", "/home/me/x.json", "--save=/home/me/y.json", "a/b.json"])
    assert command == "python -m bench.throughput --quick --save x.json --save=y.json a/b.json"


def test_slow_peers_are_named() -> None:
    spread = {"median": 1.0, "lower_quartile": 1.0, "upper_quartile": 1.0}
    record = {"kind": "sweep", "n": 4, "m": 5, "d": 6, "rounds": 9, "peers": {}, "left_out": {"race": 12.0}}
    for name, count in (("mm", 9), ("column_loop", 3)):
        record["peers"][name] = {"time_ms": {**spread, "count": count}}
    notes = report.notes([record])
    assert "column_loop at 4 x 5 x 6 (sweep) is slow and took part in 3 of 9 rounds." in notes
    assert "race at 4 x 5 x 6 (sweep) was left out: a call takes 12 s." in notes
    assert "mm at" not in notes


def test_commit_is_unknown_outside_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    monkeypatch.delenv("EMC2_COMMIT", raising=False)
    assert machine.source_version() == {"commit": "unknown", "dirty": None}
    for told, dirty in (("abc", False), ("abc-dirty", True)):
        monkeypatch.setenv("EMC2_COMMIT", told)
        assert machine.source_version() == {"commit": "abc", "dirty": dirty}


def test_commit_and_dirty_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = ["user.name=x", "user.email=x@example.org", "commit.gpgsign=false"]
    git = ["git", *(part for setting in settings for part in ("-c", setting)), "-C", str(tmp_path)]
    (tmp_path / "code.py").write_text("1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path.resolve())
    found = machine.source_version()
    assert len(found["commit"]) == 40 and found["dirty"] is False
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "x.json").write_text("{}")
    assert machine.source_version()["dirty"] is False  # an earlier result does not make the next one dirty
    (tmp_path / "code.py").write_text("2\n")
    assert machine.source_version() == {**found, "dirty": True}
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(machine, "CHECKOUT", (tmp_path / "inner").resolve())
    assert machine.source_version()["commit"] == "unknown"  # a copy inside of another project


def test_file_name_of_a_machine() -> None:
    assert machine.slug({"device": "AMD EPYC(R) 9", "device_type": "cpu", "usable_cores": 2}) == "amd-epyc-r-9-2-cores"
    assert machine.slug({"device": "NVIDIA H100 80GB", "device_type": "cuda", "usable_cores": 2}) == "nvidia-h100-80gb"


def test_peak_growth_sees_what_an_earlier_peak_would_hide() -> None:
    """In a process of its own: 300 MB are used and given back, then a call keeps 64 MB and another frees 64 MB."""
    code = """
import torch
from bench.harness import memory
cpu = torch.device("cpu")
torch.ones(75_000_000)
kept = []
print(memory.peak_growth(lambda: kept.append(torch.ones(16_000_000)), cpu))
print(memory.peak_growth(lambda: torch.ones(16_000_000).sum(), cpu))
print(memory.peak_growth(lambda: None, cpu))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    kept, freed, nothing = (int(line) / 1e6 for line in done.stdout.split())
    assert kept == pytest.approx(64, abs=4)
    assert freed == pytest.approx(64, abs=4)
    assert nothing < 2


def test_measured_sweep_needs_the_memory_it_reports() -> None:
    """The reference backend holds the n x m scores at least once; half that size would be a wrong measurement."""
    record = throughput.measure_memory("mh_step", (1024, 1024, 16), dtype="float32", device="cpu", backend="reference")
    assert record["score_matrix_mb"] == pytest.approx(4.19, abs=0.01)
    assert record["peak_extra_mb"] > 0.9 * record["score_matrix_mb"]
    assert "ru_maxrss" in record["how"]


def test_losses_are_timed_beside_plain_ntxent_which_is_ntxent() -> None:
    rows = losses.time_batch(4, 8, 2)
    assert set(rows) == set(losses.LOSSES) and rows["plain"]["ratio_to_plain"] == 1
    plain, ours = (losses.make_step(name, 6, 8)() for name in ("plain", "NTXentLoss"))
    torch.testing.assert_close(plain, ours, atol=1e-6, rtol=1e-4)


def test_whole_steps_are_timed_with_the_share_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("simclr", "emc2", "emc2, walk")
    monkeypatch.setattr(end_to_end, "METHODS", {name: end_to_end.METHODS[name] for name in chosen})
    monkeypatch.setattr(end_to_end, "TRACED", 1)
    torch.set_num_threads(1)
    small = end_to_end.Config(batch_size=16, dim=8, device="cpu", quiet=True, out=str(tmp_path))
    split = end_to_end.load("digits", subset=64)
    rows = end_to_end.time_batch(small, split, 2)
    assert set(rows) == set(end_to_end.METHODS) and rows["simclr"]["ratio_to_simclr"] == 1
    for name, row in rows.items():
        assert 0 < row["loss_share"] < 1 and (row["drawing_share"] > 0) == (name == "emc2, walk")


BENCHMARKS = {
    throughput: ["--device", "cpu"],
    losses: [],
    gumbel: [],
    gcbs: [],
    end_to_end: ["--device", "cpu", "--threads", str(torch.get_num_threads())],
}


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda module: module.__name__)
def test_a_benchmark_begins_with_the_instruction_sets_that_run(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    class Printed(Exception):
        """Instead of the first line on the screen: nothing is measured."""

    def stop(text: str, **options: object) -> None:
        raise Printed(text)

    described = machine.describe(torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["benchmark", *BENCHMARKS[benchmark]])
    monkeypatch.setattr("builtins.print", stop)
    sets = f"core {described['core_instruction_set']}, torch {torch.backends.cpu.get_cpu_capability()}"
    with pytest.raises(Printed, match=f"\ninstruction sets: {sets} "):
        benchmark.main()


def test_a_machine_without_a_core_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def library() -> None:
        raise Unavailable("no compiler")

    assert machine.core_instruction_set() == build.library().instruction_set
    monkeypatch.setattr(build, "library", library)
    described = machine.describe(torch.device("cpu"))
    assert described["core_instruction_set"] is None
    assert "instruction sets: core not compiled, torch" in machine.heading(described, "")
    assert "instruction sets" not in machine.heading(described | {"device_type": "cuda"}, "")


def test_draws_are_timed_beside_naive_ones(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gumbel, "SIZES", [(8, 32, 4)])
    monkeypatch.setattr(sys, "argv", ["gumbel.py", "--rounds", "2"])
    gumbel.main()
    assert "gumbel_sample" in capsys.readouterr().out
