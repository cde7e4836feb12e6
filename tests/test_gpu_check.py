"""`make gpu-check` as far as it can be tested without a GPU: its stages, its results, and that its tests can fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch

from emc2_kernels import rng
from emc2_kernels.backends import reference

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "gpu")]  # scripts and test files, no packages

import compile_cache  # noqa: E402
import gpu  # noqa: E402
import gpu_check  # noqa: E402
import gpu_rows  # noqa: E402
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


def session(tmp_path, **options):
    return gpu_stages.Session(tmp_path, tmp_path / "bench.json", **options)


def test_without_a_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    assert gpu_stages.sanitize(session(tmp_path), 10)["status"] == "not run"


@pytest.mark.parametrize(("racy", "status"), [("triton", "passed"), ("cuda", "failed")])
def test_races_are_judged_in_our_own_kernels(racy, status, monkeypatch, tmp_path):
    """In Triton's they are told: racecheck may take its asynchronous copies for hazards."""
    ran = []

    def run(command, log, limit, **environment):
        tool, backend = command[2], command[-1]
        ran.append((tool, backend, environment))
        found = tool == "racecheck" and backend == racy
        log.write_text(f"3 passed in 1s\n========= RACECHECK SUMMARY: {int(found)} hazards displayed\n")
        return 86 if found else 0

    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu_stages, "run_logged", run)
    record = gpu_stages.sanitize(session(tmp_path), 10)
    assert {each[:2] for each in ran} == {("memcheck", "cuda"), ("racecheck", "cuda"), ("racecheck", "triton")}
    assert record["status"] == status
    assert record[f"racecheck {racy}"].startswith("failed") and "1 hazard" in record[f"racecheck {racy}"]


FAMILY = """
import json, os, sys, time
name, end = sys.argv[1:3]
if end == "hang":
    time.sleep(100)
if end == "crash":
    print("a word before it", flush=True)
    os.kill(os.getpid(), 9)
print(json.dumps({"family": name, "status": end, "cases": [], "largest_error": 0.5, "why": ""}))
print("a word after it", file=sys.stderr)
sys.exit(end == "FAIL")
"""


def run_families(tmp_path, monkeypatch, limit=30.0, **ends):
    families = {name: SimpleNamespace(kind="triton") for name in ends}
    monkeypatch.setattr(gpu_stages.gpu_smoke, "FAMILIES", families)
    monkeypatch.setattr(gpu_stages, "FAMILY_SECONDS", 1.5)
    script = lambda self, *words: [sys.executable, "-S", "-c", FAMILY, words[2], ends[words[2]]]  # noqa: E731
    monkeypatch.setattr(gpu_stages.Session, "script", script)
    return gpu_stages.smoke(session(tmp_path), limit)


def test_a_family_that_hangs_or_crashes_costs_itself_only(tmp_path, monkeypatch):
    record = run_families(tmp_path, monkeypatch, a="PASS", b="hang", c="crash", d="FAIL", e="SKIP", f="PASS")
    assert [family["status"] for family in record["families"]] == ["PASS", "FAIL", "FAIL", "FAIL", "SKIP", "PASS"]
    assert "killed after 1.5 s" in record["families"][1]["why"]
    assert "status -9" in record["families"][2]["why"] and "a word before it" in record["families"][2]["why"]
    assert record["status"] == "failed" and (record["passed"], record["failed"], record["skipped"]) == (2, 3, 1)
    printed = gpu_check.family_line(record["families"][1])
    assert printed.startswith("FAIL") and "killed" in printed


def test_a_family_that_the_stage_had_no_time_for_has_not_failed(tmp_path, monkeypatch):
    record = run_families(tmp_path, monkeypatch, limit=0.8, a="hang", b="PASS")
    assert [family["status"] for family in record["families"]] == ["CUT OFF", "PASS"]
    assert record["status"] == "timed out" and record["failed"] == 0
    assert run_families(tmp_path, monkeypatch, a="PASS", b="SKIP")["status"] == "passed"
    assert run_families(tmp_path, monkeypatch, a="SKIP")["status"] == "failed"  # nothing was tried


def test_warm_makes_the_calls_of_smoke_and_headline(tmp_path, monkeypatch):
    ran = []

    def run(command, log, limit, **environment):
        ran.append(" ".join(command[1:]))
        log.write_text("what it said")
        return None if "small-64" in ran[-1] else 3 if "log2" in ran[-1] else 0

    monkeypatch.setattr(gpu_stages, "run_logged", run)
    monkeypatch.setattr(gpu_stages.gpu.emc2, "backends", lambda: {"cuda": "available"})
    record = gpu_stages.warm(session(tmp_path, processes=1), 10)
    assert "-c" in ran[0] and 'backend="cuda"' in ran[0]
    rows, families = [one for one in ran if "gpu.py" in one], [one for one in ran if "gpu_smoke.py" in one]
    assert len(rows) == len(gpu_rows.HEADLINE) and all("--headline --warm" in one for one in rows)
    assert ran[1 : 1 + len(rows)] == rows and all("--warm" in one for one in families)
    assert {one.split()[2] for one in families} == {
        name for name, family in gpu_stages.gpu_smoke.FAMILIES.items() if family.kind == "triton"
    }
    assert record["status"] == "failed" and record["late"] == ["row small-64"]
    assert record["errors"] == {"family log2": "what it said"} and record["done"] == len(ran) - 2
    ran.clear()
    gpu_stages.warm(session(tmp_path, rehearse=True, only=("sweep-128",)), 10)
    assert len(ran) == 2 and all(one.endswith("--rehearse") and "sweep-128" in one for one in ran)


def test_the_benchmark_is_run_with_the_rows_that_are_named(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu_stages, "run_logged", lambda command, log, limit, **environment: ran.append(command) or 0)
    assert gpu_stages.headline(session(tmp_path), 75)["status"] == "passed"
    assert "--headline" in ran[0] and "--only" not in ran[0] and "--resume" in ran[0]
    assert float(ran[0][ran[0].index("--budget") + 1]) == pytest.approx(60, abs=1)
    gpu_stages.benchmark(session(tmp_path, only=("sweep-ids", "log2")), 75)
    assert [word for word in ran[1] if word.startswith("sweep")] == ["sweep-ids-512", "sweep-ids-128"]
    assert gpu_stages.headline(session(tmp_path, only=("log2",)), 75)["status"] == "not run" and len(ran) == 2
    assert gpu_stages.headline(session(tmp_path), 5)["status"] == "not run" and len(ran) == 2


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ({}, "passed"),
        ({"small-64": "RuntimeError: no\nmore"}, "failed"),
        ({"small-64": f"{gpu.NOT_BEGUN} 60 s"}, "timed out"),
        ({"small-64": f"{gpu.NOT_BEGUN} 60 s", "uniform": "RuntimeError: no"}, "failed"),
        ({"crossover": "RuntimeError: of a row that was not asked for"}, "passed"),
    ],
)
def test_a_benchmark_whose_rows_fail_has_failed(errors, status, tmp_path, monkeypatch):
    rows = [{"name": name, "backend": "triton", "error": error} for name, error in errors.items()]
    gpu.write({"rows": [{"name": "sweep-512", "backend": "triton"}, *rows]}, tmp_path / "bench.json")
    monkeypatch.setattr(gpu_stages, "run_logged", lambda command, log, limit, **environment: 0)
    record = gpu_stages.headline(session(tmp_path), 75)
    assert record["status"] == status
    assert all(name in record["why"] for name in errors if status != "passed")


def test_a_command_that_is_stopped_takes_its_children_along(tmp_path):
    pid_file = tmp_path / "pid"
    code = f"sleep 100 & echo $! > {pid_file}; wait"
    assert gpu_stages.run_logged(["bash", "-c", code], tmp_path / "log", 1.0) is None
    assert_ends(int(pid_file.read_text()))


def test_what_a_command_leaves_behind_ends_with_it(tmp_path):
    """As pytest does that dies of a kernel, while its own processes are on the GPU."""
    pid_file = tmp_path / "pid"
    assert gpu_stages.run_logged(["bash", "-c", f"sleep 100 & echo $! > {pid_file}; exit 7"], tmp_path / "log", 30) == 7
    assert_ends(int(pid_file.read_text()))


def assert_ends(child):
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


def test_the_first_contact_takes_five_minutes_and_all_of_it_less_than_a_call():
    limits = {name: limit for parts in gpu_check.PARTS.values() for name, (_, limit) in parts.items()}
    assert [limits[name] for name in ("warm", "smoke", "headline", "tests")] == [45, 60, 75, 240]
    assert limits["smoke"] >= 2 * gpu_stages.FAMILY_SECONDS  # or a family that hangs were never said to
    assert (
        sum(limits[name] for name in ("warm", "smoke", "headline")) <= 300 - 60
    )  # imports, and packing what is compiled
    assert sum(limits[name] for name in ("warm", "smoke", "headline", "tests")) < gpu_check.BUDGET < 600 - 60


GOOD = {
    "warm": {"status": "passed"},
    "smoke": gpu_stages.summarize_families([{"family": "log2", "status": "PASS"}]),
    "headline": {"status": "passed", "met": 3},
    "tests": {"status": "passed", "passed": 10, "failed": 0, "failures": []},
    "sanitizer": {"status": "not run", "why": "compute-sanitizer was not found"},
    "rows": {"status": "passed"},
    "tune": {"status": "timed out"},
}


def fake_stages(monkeypatch, **records):
    """Stages that return these records, or raise them."""

    def part(name):
        def run(session, limit):
            (session.work / f"{name}.log").write_text("what it said")
            if name == "headline":
                row = {"name": "row", "backend": "triton", "error": "no\nmore"}
                gpu.write({"machine": {}, "rows": [row]}, session.bench)
            if name == "tune":
                session.bench.with_name("tune.json").write_text('{"shapes": [1]}')
            if isinstance(records[name], Exception):
                raise records[name]
            return records[name]

        return run

    parts = {stage: {name: (part(name), limit) for name, (_, limit) in those.items()}
             for stage, those in gpu_check.PARTS.items()}  # fmt: skip
    monkeypatch.setattr(gpu_check, "PARTS", parts)


FAILING = gpu_stages.summarize_families([{"family": "log2", "status": "FAIL", "why": "because"}])
LATE = gpu_stages.summarize_families([{"family": "log2", "status": "CUT OFF", "why": ""}])
FAILED_TEST = {"test": "test_x", "outcome": "failed", "why": "because"}
CHECKS = {
    "all well": ({}, "all", 0),
    "a family failed": ({"smoke": FAILING}, "all", 1),
    "smoke cut off": ({"smoke": LATE}, "all", 1),
    "a test failed": ({"tests": GOOD["tests"] | {"status": "failed", "failures": [FAILED_TEST]}}, "all", 1),
    "no test ran": ({"tests": gpu_stages.summarize_tests({})}, "all", 1),
    "tests cut off": ({"tests": GOOD["tests"] | {"status": "timed out"}}, "all", 1),
    "tests broke": ({"tests": RuntimeError("broken")}, "all", 1),
    "warming broke": ({"warm": RuntimeError("broken")}, "all", 0),
    "warming timed out": ({"warm": {"status": "timed out"}}, "all", 0),
    "the sanitizer found something": ({"sanitizer": {"status": "failed"}}, "all", 1),
    "a row failed": ({"headline": {"status": "failed"}}, "all", 1),
    "rows timed out": ({"headline": {"status": "timed out"}}, "all", 0),
    "tuning failed": ({"tune": {"status": "failed"}}, "all", 1),
    "the first three": ({}, "headline,warm,smoke", 0),
    "the first three, and a family failed": ({"smoke": FAILING}, "warm,smoke,headline", 1),
    "only tests": ({"smoke": FAILING}, "tests,rest", 0),
    "nothing that is judged": ({}, "warm,headline", 0),
}  # fmt: skip


def on_a_gpu(monkeypatch, tmp_path, commit="abc", dirty=False):
    """A machine with one, and nothing written outside of a folder, in which the command is called."""
    described = {"device": "NVIDIA H100 80GB HBM3", "device_type": "cuda", "commit": commit, "dirty": dirty}
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_check, "free_bytes", lambda: 80e9)
    monkeypatch.setattr(gpu, "describe", lambda device: described)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_check, "CACHE", tmp_path / "cache")
    (tmp_path / "cache").mkdir(exist_ok=True)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)


def test_a_second_run_adds_to_the_first(monkeypatch, tmp_path, capsys):
    """What it does not try again stays; of another commit nothing does."""
    on_a_gpu(monkeypatch, tmp_path)
    written = tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    families = [{"family": "a", "status": "PASS", "why": ""}, {"family": "b", "status": "FAIL", "why": ""}]
    fake_stages(monkeypatch, **GOOD | {"smoke": gpu_stages.summarize_families(families)})
    assert gpu_check.main(["--stages", "smoke,headline,rest", "--out", "out"]) == 1
    fake_stages(monkeypatch, **GOOD | {"smoke": gpu_stages.summarize_families([families[1] | {"status": "PASS"}])})
    assert gpu_check.main(["--stages", "smoke", "--only", "sweep"]) == 0
    results = json.loads(written.read_text())
    assert [row["name"] for row in results["rows"]] == ["row"] and results["tune"] == {"shapes": [1]}
    parts = results["check"]["stages"]
    assert set(parts) == {"smoke", "headline", "sanitizer", "rows", "tune"}
    assert [(each["family"], each["status"]) for each in parts["smoke"]["families"]] == [("a", "PASS"), ("b", "PASS")]
    assert parts["smoke"]["passed"] == 2 and results["check"]["passed"]
    for code in ({"commit": "def"}, {"commit": "def", "dirty": True}, {"commit": "def", "dirty": True}):
        on_a_gpu(monkeypatch, tmp_path, **code)
        assert gpu_check.main(["--stages", "headline" if code == {"commit": "def"} else "smoke"]) == 0
        results = json.loads(written.read_text())
        assert len(results["check"]["stages"]) == 1 and "tune" not in results
        assert "is of other code" in capsys.readouterr().out


def test_rows_that_are_asked_for_again_are_measured_again(tmp_path):
    code = {"commit": "abc", "dirty": False}
    report = gpu_check.Report(code, None, tmp_path / "x.json")
    rows = [{"name": name, "backend": "triton"} for name in ("sweep-512", "small-64", "crossover")]
    earlier = {"machine": code, "rows": rows, "check": {"stages": {"headline": {"status": "passed"}}}}
    report.target.write_text(json.dumps(earlier))
    gpu_check.resume(report, gpu_check.parse_arguments(["--stages", "headline", "--only", "sweep"]))
    assert [row["name"] for row in report.results()["rows"]] == ["small-64", "crossover"]
    gpu_check.resume(report, gpu_check.parse_arguments(["--stages", "rest"]))
    assert len(report.results()["rows"]) == 3
    report.target.write_text('{"machine": ')  # of a run that was killed by a version that wrote in place
    gpu_check.resume(report, gpu_check.parse_arguments([]))


STOPPED = """
import os, signal, sys, threading, time
sys.path[:0] = sys.argv[1:3]
import gpu_check, gpu_stages

def hang(session, limit):
    (session.work / "a.log").write_text("what it said")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code = gpu_stages.run_logged(["sleep", "100"], session.work / "b.log", limit)
    return {"status": "timed out", "code": code}

gpu_check.PARTS = {"smoke": {"smoke": (hang, 60)}, "tests": {"tests": (hang, 60)}}
sys.exit(gpu_check.main(["--rehearse", "--stages", "smoke,tests", "--out", "out", "--json", "x.json"]))
"""


def test_a_check_that_is_stopped_kills_what_runs_and_says_what_there_is(tmp_path):
    command = [sys.executable, "-c", STOPPED, str(ROOT / "bench"), str(ROOT)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "stopped before its end" in done.stdout, done.stderr[-2000:]
    assert time.monotonic() - started < 40
    parts = json.loads((tmp_path / "out" / "x.json").read_text())["check"]["stages"]
    assert list(parts) == ["smoke"] and parts["smoke"]["code"] is None
    assert "what it said" in (tmp_path / "out" / "gpu-check.log").read_text()


def test_a_damaged_cache_is_done_without(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "CACHE", tmp_path / "cache")
    whole = tmp_path / "cache.tar.gz"
    write_kernel(tmp_path / "here" / "triton" / "AB", "kernel", 20_000)
    compile_cache.pack(tmp_path / "here", whole)
    for content in (b"junk", whole.read_bytes()[:9000], b""):
        (tmp_path / "damaged.tar.gz").write_bytes(content)
        gpu_check.take_cache(tmp_path / "damaged.tar.gz")
        assert "was not taken in" in capsys.readouterr().out
    gpu_check.take_cache(whole)
    assert "kernels from cache.tar.gz: 1" in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "stages", "status"), CHECKS.values(), ids=CHECKS)
def test_stages_results_and_exit_status(changes, stages, status, monkeypatch, tmp_path, capsys):
    on_a_gpu(monkeypatch, tmp_path)
    fake_stages(monkeypatch, **(GOOD | changes))
    names = list(gpu_check.STAGES) if stages == "all" else [name for name in gpu_check.STAGES if name in stages]
    expected = [name for stage in names for name in gpu_check.PARTS[stage]]
    words = [] if stages == "all" else ["--stages", stages]
    assert gpu_check.main([*words, "--out", "out"]) == status
    written = tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    results = json.loads(written.read_text())
    assert (tmp_path / "out" / written.name).read_text() == written.read_text()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        written.name, "gpu-check.log", "compile-cache.tar.gz",
    }  # fmt: skip
    log = (tmp_path / "out" / "gpu-check.log").read_text()
    assert all(f"=== {name}\n" in log for name in expected) and str(tmp_path) not in written.read_text()
    parts = results["check"]["stages"]
    assert list(parts) == expected and all("seconds" in part for part in parts.values())
    assert results["check"]["passed"] == (status == 0)
    assert [row["error"] for row in results["rows"]] == ["no\nmore"] * ("headline" in expected)
    assert results.get("tune") == ({"shapes": [1]} if "tune" in expected else None)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("gpu-check passed" if status == 0 else "gpu-check FAILED")
    assert ("FAILED test_x" in printed) == ("test_x" in str(changes))
    assert ("PASS    log2" in printed) == ("smoke" not in changes and "smoke" in expected)
    assert ("FAILED  no" in printed) == ("headline" in expected)


def test_a_stage_without_time_is_not_begun(monkeypatch, tmp_path):
    fake_stages(monkeypatch, **GOOD)
    monkeypatch.setattr(gpu_check, "free_bytes", lambda: 80e9)
    report = gpu_check.Report({}, None, tmp_path / "out.json")
    gpu_check.run_stages(gpu_check.parse_arguments(["--budget", "0"]), report)
    assert {part["status"] for part in report.parts.values()} == {"not run"} and not report.passed()
    limits = []
    those = {name: (lambda session, limit: limits.append(limit) or {"status": "passed"}, 50.0) for name in "ab"}
    monkeypatch.setattr(gpu_check, "PARTS", {"tests": those})
    gpu_check.run_stages(gpu_check.parse_arguments(["--budget", "60", "--stages", "tests"]), report)
    assert limits[0] == 50 and 50 < limits[1] + 10 < 70
    for memory, processes in ((80e9, 16), (24e9, 8), (1e9, 1)):
        monkeypatch.setattr(gpu_check, "free_bytes", lambda memory=memory: memory)
        assert gpu_check.workers(gpu_check.parse_arguments(["--workers", "16"])) == processes


def test_options_that_name_nothing(tmp_path, capsys):
    for words in (["--stages", "smoke,smoek"], ["--cache", str(tmp_path / "none.tar.gz")], ["--only", "sweeep"]):
        with pytest.raises(SystemExit):
            gpu_check.parse_arguments(words)
        assert words[1].split(",")[-1] in capsys.readouterr().err
    assert gpu_check.parse_arguments(["--stages", "tests,warm"]).stages == ["warm", "tests"]


# What was compiled, on its way to another machine.


def write_kernel(folder, name, size=1000):
    """As Triton's cache has it: all stages of the compiler's work, and a list of them by their whole paths."""
    folder.mkdir(parents=True)
    files = {
        f"{name}.{stage}": folder / f"{name}.{stage}" for stage in ("ttir", "ttgir", "llir", "ptx", "cubin", "json")
    }
    for path in files.values():
        path.write_bytes(os.urandom(size))
    group = {"child_paths": {each: str(path) for each, path in files.items()}}
    (folder / f"__grp__{name}.json").write_text(json.dumps(group))


def test_what_was_compiled_fits_into_a_small_file_and_is_found_again(tmp_path):
    here, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "cache.tar.gz"
    write_kernel(here / "triton" / "AB", "sweep_kernel")
    write_kernel(here / "triton" / "CD", "lse_kernel")
    (here / "extensions").mkdir()
    (here / "extensions" / "emc2_cuda.so").write_bytes(b"machine code")
    assert compile_cache.pack(here, archive) == 0
    assert compile_cache.unpack(archive, there) == 2
    assert (there / "extensions" / "emc2_cuda.so").read_bytes() == b"machine code"
    group = json.loads((there / "triton" / "AB" / "__grp__sweep_kernel.json").read_text())["child_paths"]
    assert group.keys() == {"sweep_kernel.cubin", "sweep_kernel.json"}  # Triton 3.9 wants all that are named
    assert all(Path(path).is_relative_to(there) for path in group.values())
    for name in group:
        assert Path(group[name]).read_bytes() == (here / "triton" / "AB" / name).read_bytes()


def test_what_does_not_fit_is_what_was_compiled_last(tmp_path):
    here, archive = tmp_path / "here", tmp_path / "cache.tar.gz"
    for number in range(6):
        write_kernel(here / "triton" / str(number), "kernel", 100_000)
        for file in (here / "triton" / str(number)).iterdir():
            os.utime(file, (number, number))
    assert compile_cache.pack(here, archive, limit=700_000) == 3 * 3
    assert archive.stat().st_size < 700_000
    assert compile_cache.unpack(archive, tmp_path / "there") == 3
    assert {folder.name for folder in (tmp_path / "there" / "triton").iterdir()} == {"0", "1", "2"}


COMPILE = """
import sys
sys.path[:0] = sys.argv[1:]
import compiled
launched = next(each for each in compiled.launches(compiled.CASES["loss d=128"], 90))
print(len(compiled.compile_launch(launched, 90).asm["cubin"]))
"""


def test_triton_takes_what_was_unpacked(tmp_path):
    """Nothing is compiled again: no file is added."""
    pytest.importorskip("triton")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    sizes = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        before = {file for file in folder.rglob("*") if file.is_file()}
        command = [sys.executable, "-c", COMPILE, str(ROOT / "bench"), str(ROOT)]
        done = subprocess.run(
            command, env=clean | compile_cache.environment(folder), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        sizes.append(int(done.stdout))
        added = {file for file in folder.rglob("*") if file.is_file()} - before
        assert bool(added) == (folder.name == "here")
        if added:
            compile_cache.pack(folder, tmp_path / "cache.tar.gz")
            assert compile_cache.unpack(tmp_path / "cache.tar.gz", tmp_path / "there") == 1
    assert sizes[0] == sizes[1]


# All of it, on the CPU.


def rehearse(tmp_path, *words):
    done = run_here("bench/gpu_check.py", "--rehearse", "--out", tmp_path, "--json", tmp_path / "x.json", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return json.loads((tmp_path / "x.json").read_text())["check"]["stages"]


def test_a_rehearsal_walks_the_stages(tmp_path):
    parts = rehearse(tmp_path, "--stages", "warm,smoke,headline", "--only", "log2", "--only", "small-64")
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ["warm", "smoke", "headline"], "passed"
    )
    assert (parts["warm"]["done"], parts["smoke"]["passed"]) == (2, 1)


@pytest.mark.slow
def test_a_rehearsal_walks_every_stage(tmp_path):
    statuses = {name: part["status"] for name, part in rehearse(tmp_path).items()}
    assert statuses.pop("warm") in ("passed", "timed out")  # 40 processes, 45 s
    assert statuses.pop("sanitizer") == "not run"
    assert statuses == dict.fromkeys(["smoke", "headline", "tests", "rows", "tune"], "passed")
