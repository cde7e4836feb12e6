"""The stages of `make gpu-check`, with processes that hang, crash and fail in the place of those that need a GPU."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import benchmark, check, stages
from bench.gpu.rows import HEADLINE
from bench.harness import CHECKOUT
from bench.harness.processes import run_logged


def test_a_rehearsed_file_reports_what_ran(tmp_path):
    """Two tests of the real files, on the CPU; a second run finds nothing left to do."""
    file = CHECKOUT / "tests" / "gpu" / "test_gpu_sweep.py"
    command = ["env", "EMC2_GPU_REHEARSAL=reference", *stages.PYTEST, "-m", "gpu", file, "-k", "65-65"]
    for _ in range(2):
        tests, complete = stages.run_file(command, "sweep", tmp_path, time.monotonic() + 120)
        assert complete and len(tests) == 2 and {record["outcome"] for record in tests.values()} == {"passed"}
    summary = stages.summarize_tests({"sweep": (tests, complete)})
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
    monkeypatch.setattr(stages, "STALLED", 1.5)
    command = [sys.executable, "-c", FAKE, *(f"{test}={end}" for test, end in ends.items())]
    tests, complete = stages.run_file(command, "fake", tmp_path, time.monotonic() + seconds)
    return {name: record["outcome"] for name, record in tests.items()}, complete


def test_a_test_that_takes_its_process_along_costs_itself_only(tmp_path, monkeypatch):
    ends = {"a": "passed", "b": "crash", "c": "lost", "d": "hang", "e": "skipped", "f": "passed"}
    outcomes, complete = run_fake(tmp_path, monkeypatch, **ends)
    assert outcomes == ends | {"b": "crashed", "c": "failed", "d": "hung"} and complete


def test_out_of_time_blames_no_test(tmp_path, monkeypatch):
    started = time.monotonic()
    outcomes, complete = run_fake(tmp_path, monkeypatch, 1.0, a="passed", b="hang", c="passed")
    assert outcomes == {"a": "passed", "b": "started"} and not complete and time.monotonic() - started < 5
    summary = stages.summarize_tests({"fake": (stages.read_progress(tmp_path / "fake.jsonl"), complete)})
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
    judged = stages.judge_sanitizer(code, tmp_path / "log")
    assert judged["status"] == status and summary in judged["summary"]


def session(tmp_path, **options):
    return stages.Session(tmp_path, tmp_path / "bench.json", **options)


def test_without_a_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    assert stages.run_sanitizers(session(tmp_path), 10)["status"] == "not run"


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

    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(stages, "run_logged", run)
    record = stages.run_sanitizers(session(tmp_path), 10)
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
    monkeypatch.setattr(stages, "FAMILIES", families)
    monkeypatch.setattr(stages, "FAMILY_SECONDS", 1.5)
    command = lambda self, *words: [sys.executable, "-S", "-c", FAMILY, words[2], ends[words[2]]]  # noqa: E731
    monkeypatch.setattr(stages.Session, "command", command)
    return stages.run_smoke(session(tmp_path), limit)


def test_a_family_that_hangs_or_crashes_costs_itself_only(tmp_path, monkeypatch):
    record = run_families(tmp_path, monkeypatch, a="PASS", b="hang", c="crash", d="FAIL", e="SKIP", f="PASS")
    assert [family["status"] for family in record["families"]] == ["PASS", "FAIL", "FAIL", "FAIL", "SKIP", "PASS"]
    assert "killed after 1.5 s" in record["families"][1]["why"]
    assert "status -9" in record["families"][2]["why"] and "a word before it" in record["families"][2]["why"]
    assert record["status"] == "failed" and (record["passed"], record["failed"], record["skipped"]) == (2, 3, 1)
    printed = check.family_line(record["families"][1])
    assert printed.startswith("FAIL") and "killed" in printed


def test_a_familys_line():
    """Rows of all cases, the error that came nearest to its bound, and what else a case has to say."""
    cases = [
        {"case": "values", "rows": 10, "compared": 9, "mismatches": 2, "largest_error": 0.5, "bound": 2.0},
        {"case": "sums", "rows": 5, "compared": 5, "mismatches": 0, "largest_error": 0.03, "bound": 0.1, "rises": 7},
        {"case": "bits", "rows": 5, "compared": 5, "mismatches": 1, "largest_error": 1.0, "bound": 0.0},
        {"case": "far", "rows": 5, "compared": 5, "mismatches": 1, "largest_error": None, "bound": 1.0},
    ]
    line, note = check.family_line({"family": "log2", "status": "FAIL", "cases": cases, "why": "so"}).splitlines()
    assert " ".join(line.split()) == "FAIL log2 24 of 25 rows compared, 4 differ, error 0.03 of 0.1 allowed so"
    assert note.strip() == "sums: {'rises': 7}"
    exact = [case for case in cases if case["case"] == "bits"]
    assert "error" not in check.family_line({"family": "graph", "status": "PASS", "cases": exact})


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

    monkeypatch.setattr(stages, "run_logged", run)
    monkeypatch.setattr(stages.emc2, "backends", lambda: {"cuda": "available"})
    record = stages.warm_up(session(tmp_path, processes=1), 10)
    assert "-c" in ran[0] and 'backend="cuda"' in ran[0]
    rows, families = [one for one in ran if "gpu.benchmark" in one], [one for one in ran if "gpu.smoke" in one]
    assert len(rows) == len(HEADLINE) and all("--headline --warm" in one for one in rows)
    assert ran[1 : 1 + len(rows)] == rows and all("--warm" in one for one in families)
    assert {one.split()[3] for one in families} == {
        name for name, family in stages.FAMILIES.items() if family.kind == "triton"
    }
    assert record["status"] == "failed" and record["late"] == ["row small-64"]
    assert record["errors"] == {"family log2": "what it said"} and record["done"] == len(ran) - 2
    ran.clear()
    stages.warm_up(session(tmp_path, rehearse=True, only=("sweep-128",)), 10)
    assert len(ran) == 2 and all(one.endswith("--rehearse") and "sweep-128" in one for one in ran)


def test_the_benchmark_is_run_with_the_rows_that_are_named(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(stages, "run_logged", lambda command, log, limit, **environment: ran.append(command) or 0)
    assert stages.run_headline(session(tmp_path), 75)["status"] == "passed"
    assert "--headline" in ran[0] and "--only" not in ran[0] and "--resume" in ran[0]
    assert float(ran[0][ran[0].index("--budget") + 1]) == pytest.approx(60, abs=1)
    stages.run_rows(session(tmp_path, only=("sweep-ids", "log2")), 75)
    assert [word for word in ran[1] if word.startswith("sweep")] == ["sweep-ids-512", "sweep-ids-128"]
    assert stages.run_headline(session(tmp_path, only=("log2",)), 75)["status"] == "not run" and len(ran) == 2
    assert stages.run_headline(session(tmp_path), 5)["status"] == "not run" and len(ran) == 2


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ({}, "passed"),
        ({"small-64": "RuntimeError: no\nmore"}, "failed"),
        ({"small-64": f"{benchmark.NOT_BEGUN} 60 s"}, "timed out"),
        ({"small-64": f"{benchmark.NOT_BEGUN} 60 s", "uniform": "RuntimeError: no"}, "failed"),
        ({"crossover": "RuntimeError: of a row that was not asked for"}, "passed"),
    ],
)
def test_a_benchmark_whose_rows_fail_has_failed(errors, status, tmp_path, monkeypatch):
    rows = [{"name": name, "backend": "triton", "error": error} for name, error in errors.items()]
    benchmark.write_results({"rows": [{"name": "sweep-512", "backend": "triton"}, *rows]}, tmp_path / "bench.json")
    monkeypatch.setattr(stages, "run_logged", lambda command, log, limit, **environment: 0)
    record = stages.run_headline(session(tmp_path), 75)
    assert record["status"] == status
    assert all(name in record["why"] for name in errors if status != "passed")


def test_a_command_that_is_stopped_takes_its_children_along(tmp_path):
    pid_file = tmp_path / "pid"
    code = f"sleep 100 & echo $! > {pid_file}; wait"
    assert run_logged(["bash", "-c", code], tmp_path / "log", 1.0) is None
    assert_ends(int(pid_file.read_text()))


def test_what_a_command_leaves_behind_ends_with_it(tmp_path):
    """As pytest does that dies of a kernel, while its own processes are on the GPU."""
    pid_file = tmp_path / "pid"
    assert run_logged(["bash", "-c", f"sleep 100 & echo $! > {pid_file}; exit 7"], tmp_path / "log", 30) == 7
    assert_ends(int(pid_file.read_text()))


def assert_ends(child):
    for _ in range(50):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split(")")[-1].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child still runs")


PEERS = """
import json, sys, time
target, end = sys.argv[sys.argv.index("--json") + 1], "END"
cases = [{"name": "a", "contestants": {}}, {"name": "b", "why": "not begun within 1 s"}][: 1 if end == "passed" else 2]
json.dump({"cases": cases, "goals": [{"goal": "a goal", "answer": "met"}]}, open(target, "w"))
print("a reason")
time.sleep(100 if end == "hang" else 0)
sys.exit(1 if end == "failed" else 0)
"""


@pytest.mark.parametrize(
    ("end", "status", "left"),
    [("passed", "passed", 0), ("late", "timed out", 1), ("hang", "timed out", 1), ("failed", "failed", 1)],
)
def test_what_peers_found(end, status, left, monkeypatch, tmp_path):
    asked = []

    def command(module, *words):
        asked.append((module, *words))
        return [sys.executable, "-c", PEERS.replace("END", end), *map(str, words)]

    monkeypatch.setattr(stages, "module_command", command)
    record = stages.run_peers(session(tmp_path, only=("CLIP-16384",)), 3.0)
    assert (record["status"], record["cases"], record["not begun"]) == (status, 1, left)
    assert record["a goal"] == "met" and ("a reason" in record.get("why", "")) == (end == "failed")
    module, *words = asked[0]
    assert module == "bench.gpu_peers" and words[words.index("--budget") + 1] == "1"
    assert [word for word in words if str(word).startswith("CLIP")] == ["CLIP-16384-512", "CLIP-16384-128"]
    assert "--rehearse" not in words


def test_peers_without_such_a_case(tmp_path):
    record = stages.run_peers(session(tmp_path, only=("log2",)), 30.0)
    assert record == {"status": "not run", "why": "no case has such a name"}
