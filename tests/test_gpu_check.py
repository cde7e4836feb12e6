"""`make gpu-check` as far as it can be tested without a GPU: its stages, its results, and that its tests can fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import oracle
import pytest
import torch

from emc2_kernels import rng
from emc2_kernels.backends import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "gpu")]  # scripts and test files, no packages

import gpu  # noqa: E402
import gpu_check  # noqa: E402
import gpu_stages  # noqa: E402
import gpu_support  # noqa: E402
import test_gpu_loss  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def run_here(*command, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EMC2_GPU", "PYTEST"))}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=clean | environment, capture_output=True, text=True
    )


# The tests' own machinery.


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
    "a sample late": (reference.Walk, "sample_points", lambda walk: [walk.burn_in] * walk.num_samples),
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


@pytest.mark.parametrize("case", test_gpu_loss.OPTIONS)
def test_the_batches_of_the_loss_comparison_are_clear_of_ties(case):
    """Embeddings off by a hundred times the rounding of another device leave every chain where it was."""
    options, data = test_gpu_loss.OPTIONS[case], list(test_gpu_loss.batches(5))
    noise = torch.Generator().manual_seed(0)
    histories = []
    for error in (0.0, 1e-5, 1e-5):
        moved = [
            (*(z * (1 + error * torch.randn(z.shape, generator=noise)) for z in (z0, z1)), index)
            for z0, z1, index in data
        ]
        loss = test_gpu_loss.make("cpu", "reference", **options)
        histories.append(test_gpu_loss.train(loss, moved, "cpu", "reference"))
    for history in histories[1:]:
        for (_, _, stats, kept), (_, _, wanted, wanted_kept) in zip(history, histories[0], strict=True):
            assert torch.equal(kept["chains.key"], wanted_kept["chains.key"])
            assert stats["carry_share"] == wanted["carry_share"] and stats["acceptance"] == wanted["acceptance"]
    assert histories[0][-1][2]["carry_share"] > 0.05  # or carried samples would not be compared


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
    walk = pytest.importorskip("emc2_kernels.backends.triton.walk")
    n = gpu_support.MANY_SAMPLES
    taken = 4 * walk.WORDS.value * walk.room_for(n, splits=1, num_samples=n, segments=8) + 4 * n * n
    assert taken < 1e9 * gpu_support.MANY_SAMPLES_GB < 1.2 * taken


@without_gpu
def test_gpu_tests_are_collected_and_skipped():
    done = run_here("-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "needs a CUDA GPU" in done.stdout and " passed" not in done.stdout and "Unknown" not in done.stdout


# Running them.


def test_a_rehearsed_file_reports_what_ran(tmp_path):
    """Two tests of the real files, on the CPU; a second run finds nothing left to do."""
    file = ROOT / "tests" / "gpu" / "test_gpu_sweep.py"
    command = ["env", "EMC2_GPU_REHEARSAL=reference", *gpu_stages.PYTEST, "-m", "gpu", file, "-k", "65-65"]
    for _ in range(2):
        tests, complete = gpu_stages.run_file(command, "sweep", tmp_path, time.monotonic() + 120)
        assert complete and len(tests) == 2 and {record["outcome"] for record in tests.values()} == {"passed"}
    summary = gpu_stages.summarize_tests({"sweep": (tests, complete)})
    assert summary["status"] == "passed" and (summary["passed"], summary["failed"]) == (2, 0)


FAKE = """
import json, os, sys, time
progress, ends = os.environ["EMC2_GPU_PROGRESS"], dict(word.split("=") for word in sys.argv[1:])
done = {json.loads(line)["test"] for line in open(progress)} if os.path.exists(progress) else set()
def note(test, outcome):
    with open(progress, "a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "seconds": 1.0, "why": ""}) + "\\n")
for test, end in ends.items():
    if test in done:
        continue
    note(test, "started")
    if end == "crash":
        os.kill(os.getpid(), 9)
    if end == "hang":
        time.sleep(100)
    if end == "usage":
        sys.exit(4)
    note(test, "failed" if end == "lost" else end)
    if end == "lost":
        sys.exit(70)
"""


def run_fake(tmp_path, monkeypatch, seconds=30.0, **ends):
    monkeypatch.setattr(gpu_stages, "STALLED", 1.5)
    command = [sys.executable, "-c", FAKE, *(f"{test}={end}" for test, end in ends.items())]
    tests, complete = gpu_stages.run_file(command, "fake", tmp_path, time.monotonic() + seconds)
    return {name: record["outcome"] for name, record in tests.items()}, complete


def test_a_test_that_takes_its_process_along_costs_itself_only(tmp_path, monkeypatch):
    ends = {"a": "passed", "b": "crash", "c": "lost", "d": "hang", "e": "skipped", "f": "passed"}
    outcomes, complete = run_fake(tmp_path, monkeypatch, **ends)
    assert outcomes == ends | {"b": "crashed", "c": "failed", "d": "hung"} and complete


def test_out_of_time_blames_no_test(tmp_path, monkeypatch):
    started = time.monotonic()
    outcomes, complete = run_fake(tmp_path, monkeypatch, 1.0, a="passed", b="hang", c="passed")
    assert outcomes == {"a": "passed", "b": "started"} and not complete and time.monotonic() - started < 5
    summary = gpu_stages.summarize_tests({"fake": (gpu_stages.read_progress(tmp_path / "fake.jsonl"), complete)})
    assert summary["status"] == "timed out" and summary["files_cut_off"] == ["fake"] and summary["failed"] == 0


def test_a_file_that_cannot_be_collected_is_a_failure(tmp_path, monkeypatch):
    outcomes, complete = run_fake(tmp_path, monkeypatch, a="passed", b="usage")
    assert outcomes["fake"] == "failed" and complete


SANITIZED = {
    "clean": (0, "3 passed in 1s\n========= ERROR SUMMARY: 0 errors\n", "passed", "3 passed in 1s; ERROR SUMMARY: 0"),
    "errors": (86, "3 passed in 1s\n========= ERROR SUMMARY: 2 errors\n", "failed", "2 errors"),
    "races": (86, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", "failed", "1 hazard"),
    "a failing test": (1, "1 failed, 2 passed in 1s\n========= ERROR SUMMARY: 0 errors\n", "failed", "1 failed"),
    "too slow": (None, "", "timed out", ""),
    "no such device": (1, "========= Error: Device not supported\n", "not run", "does not support"),
    "said nothing": (0, "3 passed in 1s\n", "failed", "3 passed"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "text", "status", "summary"), SANITIZED.values(), ids=SANITIZED)
def test_what_the_sanitizer_said(tmp_path, code, text, status, summary):
    (tmp_path / "log").write_text(text)
    judged = gpu_stages.judge_sanitizer(code, tmp_path / "log")
    assert judged["status"] == status and summary in judged["summary"]


def test_without_a_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    assert gpu_stages.sanitize(tmp_path, 10)["status"] == "not run"


def test_a_command_that_is_stopped_takes_its_children_along(tmp_path):
    pid_file = tmp_path / "pid"
    code = f"sleep 100 & echo $! > {pid_file}; wait"
    assert gpu_stages.run_logged(["bash", "-c", code], tmp_path / "log", 1.0) is None
    child = int(pid_file.read_text())
    for _ in range(50):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split(")")[-1].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child still runs")


# The command.


@without_gpu
def test_without_a_gpu_it_says_so_at_once(tmp_path):
    """From anywhere, with nothing on the path, and nothing written."""
    for script, words in (("gpu_check.py", ["--out", tmp_path / "out"]), ("gpu.py", ["--json", tmp_path / "x.json"])):
        done = run_here(ROOT / "bench" / script, *words)
        assert done.returncode == 1 and "needs a CUDA GPU" in done.stdout, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


def test_the_budget_is_shared():
    assert gpu_check.allot("build", 480) == gpu_check.LIMITS["build"][0]
    assert gpu_check.allot("tests", 300) == 300 - 40 - 110  # what the later stages must have
    assert gpu_check.allot("bench", 70) == 70
    assert gpu_check.allot("tests", 100) == 0
    left = gpu_check.BUDGET
    for stage in gpu_check.LIMITS:  # each stage takes all that it may: the last still has its share
        allotted = gpu_check.allot(stage, left)
        assert allotted >= gpu_check.LIMITS[stage][1]
        left -= allotted
    assert left >= 0


def fake_stages(monkeypatch, **records):
    """Stages that return these records, or raise them."""

    def stage(name):
        def run(work, limit, *others):
            (work / f"{name}.log").write_text("what it said")
            if name == "bench":
                gpu.write(
                    {"machine": {}, "rows": [{"name": "row", "backend": "triton", "error": "no\nmore"}]}, others[0]
                )
            if isinstance(records[name], Exception):
                raise records[name]
            return records[name]

        return run

    functions = {"build": "build", "tests": "run_tests", "sanitizer": "sanitize", "bench": "benchmark"}
    for name, function in functions.items():
        monkeypatch.setattr(gpu_stages, function, stage(name))


GOOD = {
    "build": {"status": "passed"},
    "tests": {"status": "passed", "passed": 10, "failed": 0, "failures": []},
    "sanitizer": {"status": "not run", "why": "compute-sanitizer was not found"},
    "bench": {"status": "passed", "met": 3},
}
FAILED_TEST = {"test": "test_x", "outcome": "failed", "why": "because"}
CHECKS = {
    "all well": ({}, 0),
    "a test failed": ({"tests": GOOD["tests"] | {"status": "failed", "failed": 1, "failures": [FAILED_TEST]}}, 1),
    "no test ran": ({"tests": GOOD["tests"] | {"passed": 0}}, 1),
    "tests cut off": ({"tests": GOOD["tests"] | {"status": "timed out"}}, 1),
    "a stage broke": ({"build": RuntimeError("broken")}, 1),
    "the sanitizer found something": ({"sanitizer": {"status": "failed"}}, 1),
    "the benchmark failed": ({"bench": {"status": "failed"}}, 0),
}


@pytest.mark.parametrize(("changes", "status"), CHECKS.values(), ids=CHECKS)
def test_stages_results_and_exit_status(changes, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "describe", lambda device: {"device": "NVIDIA H100 80GB HBM3", "device_type": "cuda"})
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)
    fake_stages(monkeypatch, **(GOOD | changes))
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == status
    written = tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    results = json.loads(written.read_text())
    assert (tmp_path / "out" / written.name).read_text() == written.read_text()
    logs = {file.name for file in (tmp_path / "out").glob("*.log")}
    assert logs == {f"{name}.log" for name in GOOD} and str(tmp_path) not in written.read_text()
    stages = results["check"]["stages"]
    assert list(stages) == list(GOOD) and all("seconds" in stage for stage in stages.values())
    assert results["check"]["passed"] == (status == 0) and results["rows"][0]["error"] == "no\nmore"
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("gpu-check passed" if status == 0 else "gpu-check FAILED")
    assert ("FAILED test_x" in printed) == ("failed" in str(changes.get("tests", {}).get("failures")))
    assert "FAILED  no" in printed


def test_a_stage_without_time_is_not_begun(monkeypatch, tmp_path):
    fake_stages(monkeypatch, **GOOD)
    report = gpu_check.Report({}, None, tmp_path / "out.json")
    gpu_check.run_stages(gpu_check.parse_arguments(["--budget", "1", "--skip", "build"]), report)
    assert [stage["status"] for stage in report.stages.values()] == ["not run", "not run", "not run", "passed"]
    assert not report.passed()
