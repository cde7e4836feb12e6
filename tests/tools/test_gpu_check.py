"""`make gpu-check` as far as it can be tested without a GPU: what it asks for, writes and says."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench.gpu import benchmark, check, stages
from bench.harness import CHECKOUT, machine, report
from bench.harness.report import write_json

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def run_here(*command, **environment):
    taken_out = ("EMC2_GPU", "PYTEST", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(taken_out)}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=CHECKOUT, env=clean | environment, capture_output=True, text=True
    )


@without_gpu
def test_gpu_tests_are_collected_and_skipped():
    done = run_here("-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "needs a CUDA GPU" in done.stdout and " passed" not in done.stdout and "Unknown" not in done.stdout


@without_gpu
def test_without_a_gpu_it_says_so_at_once(tmp_path):
    """In a bare checkout, with nothing on the path, and nothing written."""
    for module, words in (("check", ["--out", tmp_path / "out"]), ("benchmark", ["--json", tmp_path / "x.json"])):
        done = run_here("-m", f"bench.gpu.{module}", *words)
        assert done.returncode == 1 and "needs a CUDA GPU" in done.stdout, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


def test_the_first_contact_takes_five_minutes_and_all_of_it_less_than_a_call():
    limits = {name: limit for parts in check.PARTS.values() for name, (_, limit) in parts.items()}
    assert [limits[name] for name in ("warm", "smoke", "headline", "peers", "tests")] == [45, 60, 75, 100, 240]
    assert limits["smoke"] >= 2 * stages.FAMILY_SECONDS  # or a family that hangs were never said to
    assert (
        sum(limits[name] for name in ("warm", "smoke", "headline")) <= 300 - 60
    )  # imports, and packing what is compiled
    assert sum(limits[name] for name in ("warm", "smoke", "headline", "peers", "tests")) < check.BUDGET < 600 - 60


GOOD = {
    "warm": {"status": "passed"},
    "smoke": stages.summarize_families([{"family": "log2", "status": "PASS"}]),
    "headline": {"status": "passed", "met": 3},
    "peers": {"status": "passed", "cases": 20},
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
                benchmark.write_results({"machine": {}, "rows": [row]}, session.bench)
            if name == "peers":
                goal = {"goal": "a goal", "sense": "<=", "bound": 1, "answer": "missed by 3%"}
                write_json({"peak": None, "cases": [], "goals": [goal]}, session.bench.with_name("peers.json"))
            if name == "tune":
                session.bench.with_name("tune.json").write_text('{"shapes": [1]}')
            if isinstance(records[name], Exception):
                raise records[name]
            return records[name]

        return run

    parts = {stage: {name: (part(name), limit) for name, (_, limit) in those.items()}
             for stage, those in check.PARTS.items()}  # fmt: skip
    monkeypatch.setattr(check, "PARTS", parts)


FAILING = stages.summarize_families([{"family": "log2", "status": "FAIL", "why": "because"}])
LATE = stages.summarize_families([{"family": "log2", "status": "CUT OFF", "why": ""}])
FAILED_TEST = {"test": "test_x", "outcome": "failed", "why": "because"}
CHECKS = {
    "all well": ({}, "all", 0),
    "a family failed": ({"smoke": FAILING}, "all", 1),
    "smoke cut off": ({"smoke": LATE}, "all", 1),
    "a test failed": ({"tests": GOOD["tests"] | {"status": "failed", "failures": [FAILED_TEST]}}, "all", 1),
    "no test ran": ({"tests": stages.summarize_tests({})}, "all", 1),
    "tests cut off": ({"tests": GOOD["tests"] | {"status": "timed out"}}, "all", 1),
    "tests broke": ({"tests": RuntimeError("broken")}, "all", 1),
    "warming broke": ({"warm": RuntimeError("broken")}, "all", 0),
    "warming timed out": ({"warm": {"status": "timed out"}}, "all", 0),
    "the sanitizer found something": ({"sanitizer": {"status": "failed"}}, "all", 1),
    "a row failed": ({"headline": {"status": "failed"}}, "all", 1),
    "peers failed": ({"peers": {"status": "failed"}}, "all", 1),
    "rows timed out": ({"headline": {"status": "timed out"}}, "all", 0),
    "tuning failed": ({"tune": {"status": "failed"}}, "all", 1),
    "the first three": ({}, "headline,warm,smoke", 0),
    "the first three, and a family failed": ({"smoke": FAILING}, "warm,smoke,headline", 1),
    "only tests": ({"smoke": FAILING}, "tests,rest", 0),
    "nothing that is judged": ({}, "warm,headline", 0),
}  # fmt: skip


def fake_gpu(monkeypatch, tmp_path, commit="abc", dirty=False):
    """A machine with one, and nothing written outside of a folder, in which the command is called."""
    described = {"device": "NVIDIA H100 80GB HBM3", "device_type": "cuda", "commit": commit, "dirty": dirty}
    monkeypatch.setattr(check, "has_gpu", lambda: True)
    monkeypatch.setattr(check, "free_bytes", lambda: 80e9)
    monkeypatch.setattr(machine, "describe", lambda device: described)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(check, "CACHE", tmp_path / "cache")
    (tmp_path / "cache").mkdir(exist_ok=True)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)


def test_a_second_run_adds_to_the_first(monkeypatch, tmp_path, capsys):
    """What it does not try again stays; of another commit nothing does."""
    fake_gpu(monkeypatch, tmp_path)
    written = tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    families = [{"family": "a", "status": "PASS", "why": ""}, {"family": "b", "status": "FAIL", "why": ""}]
    fake_stages(monkeypatch, **GOOD | {"smoke": stages.summarize_families(families)})
    assert check.main(["--stages", "smoke,headline,rest", "--out", "out"]) == 1
    fake_stages(monkeypatch, **GOOD | {"smoke": stages.summarize_families(families[:1])})
    assert check.main(["--stages", "smoke", "--only", "sweep"]) == 0, "b was not asked for"
    assert json.loads(written.read_text())["check"]["passed"] is False
    fake_stages(monkeypatch, **GOOD | {"smoke": stages.summarize_families([families[1] | {"status": "PASS"}])})
    assert check.main(["--stages", "smoke", "--only", "sweep"]) == 0
    results = json.loads(written.read_text())
    assert [row["name"] for row in results["rows"]] == ["row"] and results["tune"] == {"shapes": [1]}
    parts = results["check"]["stages"]
    assert set(parts) == {"smoke", "headline", "sanitizer", "rows", "tune"}
    assert [(each["family"], each["status"]) for each in parts["smoke"]["families"]] == [("a", "PASS"), ("b", "PASS")]
    assert parts["smoke"]["passed"] == 2 and results["check"]["passed"]
    for code in ({"commit": "def"}, {"commit": "def", "dirty": True}, {"commit": "def", "dirty": True}):
        fake_gpu(monkeypatch, tmp_path, **code)
        assert check.main(["--stages", "headline" if code == {"commit": "def"} else "smoke"]) == 0
        results = json.loads(written.read_text())
        assert len(results["check"]["stages"]) == 1 and "tune" not in results
        assert "is of other code" in capsys.readouterr().out


def test_rows_that_are_asked_for_again_are_measured_again(tmp_path):
    code = {"commit": "abc", "dirty": False}
    found = check.Report(code, None, tmp_path / "x.json")
    rows = [{"name": name, "backend": "triton"} for name in ("sweep-512", "small-64", "crossover")]
    earlier = {"machine": code, "rows": rows, "check": {"stages": {"headline": {"status": "passed"}}}}
    found.target.write_text(json.dumps(earlier))
    check.resume(found, check.parse_arguments(["--stages", "headline", "--only", "sweep"]))
    assert [row["name"] for row in found.results()["rows"]] == ["small-64", "crossover"]
    check.resume(found, check.parse_arguments(["--stages", "rest"]))
    assert len(found.results()["rows"]) == 3
    found.target.write_text('{"machine": ')  # of a run that was killed by a version that wrote in place
    check.resume(found, check.parse_arguments([]))


def test_cases_beside_peers_are_kept_until_they_are_run_again(tmp_path):
    """By runs of the same commit, in which --out has them, too."""
    code, names = {"commit": "abc", "dirty": False}, ["NT-Xent-16384-512", "CLIP-16384-512"]
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "x.json").write_text(json.dumps({"machine": code, "rows": [], "check": {"stages": {}}}))
    peers = {"machine": code, "goals": [], "cases": [{"name": name} for name in names]}

    def kept(commit, *words):
        (tmp_path / "x-peers.json").write_text(json.dumps(peers | {"machine": code | {"commit": commit}}))
        found = check.Report(code, out, tmp_path / "x.json")
        check.resume(found, check.parse_arguments(words))
        found.write()
        if not found.peers.exists():
            return None
        return [case["name"] for case in json.loads((out / "x-peers.json").read_text())["cases"]]

    assert kept("abc", "--stages", "tests") == names
    assert kept("abc", "--stages", "peers", "--only", "CLIP") == names[:1]
    assert kept("abc", "--stages", "peers") is None and kept("def", "--stages", "tests") is None


STOPPED = """
import os, signal, sys, threading
from bench.gpu import check
from bench.harness.processes import run_logged

def hang(session, limit):
    (session.work / "a.log").write_text("what it said")
    print("there is a file:", os.path.exists("out/x.json"))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code = run_logged(["sleep", "100"], session.work / "b.log", limit)
    return {"status": "timed out", "code": code}

check.PARTS = {"smoke": {"smoke": (hang, 60)}, "tests": {"tests": (hang, 60)}}
sys.exit(check.main(["--rehearse", "--stages", "smoke,tests", "--out", "out", "--json", "x.json"]))
"""


def test_a_check_that_is_stopped_kills_what_runs_and_says_what_there_is(tmp_path):
    command, environment = [sys.executable, "-c", STOPPED], os.environ | {"PYTHONPATH": str(CHECKOUT)}
    started = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "stopped before its end" in done.stdout, done.stderr[-2000:]
    assert "there is a file: True" in done.stdout, "a run that is killed at once leaves nothing"
    assert time.monotonic() - started < 40
    parts = json.loads((tmp_path / "out" / "x.json").read_text())["check"]["stages"]
    assert list(parts) == ["smoke"] and parts["smoke"]["code"] is None
    assert "what it said" in (tmp_path / "out" / "gpu-check.log").read_text()


@pytest.mark.parametrize(("changes", "stages", "status"), CHECKS.values(), ids=CHECKS)
def test_stages_results_and_exit_status(changes, stages, status, monkeypatch, tmp_path, capsys):
    fake_gpu(monkeypatch, tmp_path)
    fake_stages(monkeypatch, **(GOOD | changes))
    names = list(check.STAGES) if stages == "all" else [name for name in check.STAGES if name in stages]
    expected = [name for stage in names for name in check.PARTS[stage]]
    words = [] if stages == "all" else ["--stages", stages]
    assert check.main([*words, "--out", "out"]) == status
    written = tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    results = json.loads(written.read_text())
    assert (tmp_path / "out" / written.name).read_text() == written.read_text()
    beside = written.with_name("nvidia-h100-80gb-hbm3-peers.json")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        written.name, "gpu-check.log", "compile-cache.tar.gz", *([beside.name] if "peers" in expected else []),
    }  # fmt: skip
    assert beside.exists() == ("peers" in expected)
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
    assert ("a goal, goal <= 1: missed by 3%" in printed) == ("peers" in expected)


def test_a_stage_without_time_is_not_begun(monkeypatch, tmp_path):
    fake_stages(monkeypatch, **GOOD)
    monkeypatch.setattr(check, "free_bytes", lambda: 80e9)
    found = check.Report({}, None, tmp_path / "out.json")
    check.run_stages(check.parse_arguments(["--budget", "0"]), found)
    assert {part["status"] for part in found.parts.values()} == {"not run"} and not found.passed()
    limits = []
    those = {name: (lambda session, limit: limits.append(limit) or {"status": "passed"}, 50.0) for name in "ab"}
    monkeypatch.setattr(check, "PARTS", {"tests": those})
    check.run_stages(check.parse_arguments(["--budget", "60", "--stages", "tests"]), found)
    assert limits[0] == 50 and 50 < limits[1] + 10 < 70
    for memory, processes in ((80e9, 16), (24e9, 8), (1e9, 1)):
        monkeypatch.setattr(check, "free_bytes", lambda memory=memory: memory)
        assert check.workers(check.parse_arguments(["--workers", "16"])) == processes


def test_options_that_name_nothing(tmp_path, capsys):
    for words in (["--stages", "smoke,smoek"], ["--cache", str(tmp_path / "none.tar.gz")], ["--only", "sweeep"]):
        with pytest.raises(SystemExit):
            check.parse_arguments(words)
        assert words[1].split(",")[-1] in capsys.readouterr().err
    assert check.parse_arguments(["--stages", "tests,warm"]).stages == ["warm", "tests"]


# All of it, on the CPU.


def rehearse(tmp_path, *words):
    done = run_here("-m", "bench.gpu.check", "--rehearse", "--out", tmp_path, "--json", tmp_path / "x.json", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return json.loads((tmp_path / "x.json").read_text())["check"]["stages"]


def test_a_rehearsal_walks_the_stages(tmp_path):
    parts = rehearse(tmp_path, "--stages", "warm,smoke,headline", "--only", "log2", "--only", "small-64")
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ["warm", "smoke", "headline"], "passed"
    )
    assert (parts["warm"]["done"], parts["smoke"]["passed"]) == (2, 1)


def test_a_rehearsal_stands_beside_its_peers(tmp_path):
    parts = rehearse(tmp_path, "--stages", "peers", "--only", "CLIP-64-16")
    assert (parts["peers"]["status"], parts["peers"]["cases"]) == ("passed", 1)
    assert [case["name"] for case in json.loads((tmp_path / "x-peers.json").read_text())["cases"]] == ["CLIP-64-16"]


@pytest.mark.slow
def test_a_rehearsal_walks_every_stage(tmp_path):
    statuses = {name: part["status"] for name, part in rehearse(tmp_path).items()}
    assert statuses.pop("warm") in ("passed", "timed out")  # 40 processes, 45 s
    assert statuses.pop("sanitizer") == "not run"
    assert statuses == dict.fromkeys(["smoke", "headline", "peers", "tests", "rows", "tune"], "passed")
