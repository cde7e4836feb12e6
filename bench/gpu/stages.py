"""The stages of `make gpu-check`, each in processes of its own.

A stage returns a record with a `status`: "passed", "failed", "timed out" or "not run".
"""

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import emc2_kernels as emc2
from bench import gpu_peers
from bench.gpu import benchmark
from bench.gpu.rows import HEADLINE, ROWS
from bench.gpu.smoke import FAMILIES
from bench.harness import CHECKOUT
from bench.harness.processes import STOP, module_command, run_logged, tail

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no")
STALLED = 100.0  # seconds without a test ending: it hangs (compiling one test's kernels takes less)
MOST_RESTARTS = 8
FAMILY_SECONDS = 30  # of smoke, for one family of kernels: half of the stage, or one that hangs were only cut off
LEAST_FOR_ROWS = 15  # seconds that a process of the benchmark is left beyond its own budget
REHEARSED = ("test_gpu_lse",)  # a rehearsal of all tests would take minutes
LOST = ("crashed", "hung")  # outcomes that this module gives to a test whose process did not survive it

BUILD_CUDA = """
import torch
import emc2_kernels as emc2
queries, state = torch.randn(64, 128, device="cuda"), emc2.init_state(64, "cuda")
emc2.mh_step(queries, queries, state, temperature=1.0, seed=0, step=0, backend="cuda")
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Session:
    """What all stages are told."""

    work: Path  # for logs
    bench: Path  # the benchmark's results
    processes: int = 16  # at a time
    rehearse: bool = False  # on the CPU, at toy sizes
    only: tuple[str, ...] = ()  # beginnings of the names of smoke's families and of the benchmark's rows; none: all

    def choose(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not self.only or name.startswith(self.only)]

    def command(self, name: str, *words: object) -> list[str]:
        """Of a module beside this one."""
        return module_command(f"bench.gpu.{name}", *words, *(["--rehearse"] if self.rehearse else []))


def warm_up(session: Session, limit: float) -> dict:
    """Compiles what smoke and headline need: each of their processes once, without comparing or timing, and nvcc."""
    families = [name for name in session.choose(FAMILIES) if FAMILIES[name].kind == "triton"]
    rows = session.choose(HEADLINE)
    jobs: dict[str, list[str]] = {}
    if not session.rehearse and emc2.backends()["cuda"] == "available":
        jobs["cuda"] = [sys.executable, "-c", BUILD_CUDA]
    # Rows first, which are timed: a family that is not reached compiles in its own time.
    here = [] if session.rehearse else ["--backends", "triton"]
    jobs |= {
        f"row {name}": session.command("benchmark", "--headline", "--warm", "--only", name, *here) for name in rows
    }
    jobs |= {f"family {name}": session.command("smoke", "--family", name, "--warm") for name in families}
    deadline, seconds = time.monotonic() + limit, {}

    def run(name: str) -> int | None:
        started = time.monotonic()
        code = run_logged(jobs[name], session.work / f"warm {name}.log", deadline - started)
        seconds[name] = round(time.monotonic() - started, 1)
        return code

    with ThreadPoolExecutor(session.processes) as pool:
        codes = dict(zip(jobs, pool.map(run, jobs), strict=True))
    late = [name for name, code in codes.items() if code is None]
    failed = {name: tail(session.work / f"warm {name}.log", 400) for name, code in codes.items() if code}
    return {
        "status": "failed" if failed else "timed out" if late else "passed",
        "done": sum(code == 0 for code in codes.values()),
        "late": late,
        "errors": failed,
        "slowest": sorted(seconds.items(), key=lambda item: -item[1])[:5],
    }


def run_smoke(session: Session, limit: float) -> dict:
    """Every family of kernels against float64, each in a process that is killed where it hangs."""
    deadline = time.monotonic() + limit

    def run(name: str) -> dict:
        log, left = session.work / f"smoke {name}.log", deadline - time.monotonic()
        code = run_logged(session.command("smoke", "--family", name), log, min(left, FAMILY_SECONDS))
        told = [line for line in tail(log, 100_000).splitlines() if line.startswith('{"family"')]
        if told:
            return json.loads(told[-1])
        if code is None and (left < FAMILY_SECONDS or STOP.is_set()):  # it had less than a family's time
            return {"family": name, "status": "CUT OFF", "why": f"within {max(0.0, left):.0f} s: {tail(log, 600)}"}
        why = f"killed after {FAMILY_SECONDS} s" if code is None else f"ended with status {code}"
        return {"family": name, "status": "FAIL", "why": f"{why}: {tail(log, 600)}"}

    with ThreadPoolExecutor(session.processes) as pool:
        return summarize_families(list(pool.map(run, session.choose(FAMILIES))))


def summarize_families(families: list[dict]) -> dict:
    """Counts of verdicts, and each family's record."""
    counts = Counter(family["status"] for family in families)
    status = "failed" if counts["FAIL"] else "timed out" if counts["CUT OFF"] else "passed"
    return {
        "status": status if counts["PASS"] or status != "passed" else "failed",  # none ran
        "passed": counts["PASS"],
        "failed": counts["FAIL"],
        "skipped": counts["SKIP"],
        "cut off": counts["CUT OFF"],
        "families": families,
    }


def read_progress(file: Path) -> dict[str, dict]:
    """Each test's record: the worst of its outcomes, or "started" where there is none."""
    order = ["started", "passed", "skipped", "failed", *LOST]
    tests: dict[str, dict] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        record = json.loads(line)
        known = tests.get(record["test"])
        if known is None or order.index(record["outcome"]) > order.index(known["outcome"]):
            tests[record["test"]] = record
    return tests


def mark_lost(progress: Path, outcome: str, why: str) -> None:
    """Notes the tests that were running when their process ended: they are not run again."""
    with progress.open("a") as file:
        for name, record in read_progress(progress).items():
            if record["outcome"] == "started":
                file.write(json.dumps({"test": name, "outcome": outcome, "seconds": 0.0, "why": why}) + "\n")


# Files that compile tens of binaries, at some seconds each, are done by so many processes.
SHARES = {"test_gpu_sweep": 4, "test_gpu_invariance": 3, "test_gpu_options": 2, "test_gpu_gathered": 2}


def run_file(
    command: Sequence[str], name: str, work: Path, deadline: float, share: str = "0/1", **environment: str
) -> tuple[dict[str, dict], bool]:
    """All tests of one file, in as many processes as it takes. Their records, and whether all of them were reached.

    ``share`` "i/k" is the i-th of k (tests/support/gpu_support.py says which tests are in it).

    A test that kills its process, hangs, or leaves a dead GPU context costs itself only: the next process goes on with
    the tests that have not run (tests/gpu/conftest.py reads what has).
    """
    progress, log = work / f"{name}.jsonl", work / f"tests {name}.log"
    for _ in range(MOST_RESTARTS):

        def stalled() -> bool:
            return progress.exists() and time.time() - progress.stat().st_mtime > STALLED

        left = deadline - time.monotonic()
        if left <= 0 or STOP.is_set():
            break
        if progress.exists():
            os.utime(progress)  # the patience begins anew
        settings = {
            "EMC2_GPU_PROGRESS": str(progress),
            "EMC2_GPU_SHARE": share,
            **environment,
        }
        code = run_logged(command, log, left, stalled=stalled, **settings)
        if code in (0, 1, 5):  # all passed, some failed, none was left
            return read_progress(progress), True
        if code is None and (time.monotonic() > deadline or STOP.is_set()):  # what was running is not to blame
            break
        mark_lost(progress, "hung" if code is None else "crashed", tail(log))
        if code in (2, 3, 4):  # pytest could not import or collect it: trying again would not help
            failure = {"test": name, "outcome": "failed", "seconds": 0.0, "why": tail(log)}
            return read_progress(progress) | {name: failure}, True
    return read_progress(progress), False


def run_tests(session: Session, limit: float) -> dict:
    """Every file of GPU tests, several at a time: most of their time is compilation, on the CPU."""
    files = sorted((CHECKOUT / "tests" / "gpu").glob("test_*.py"))
    files = [file for file in files if not session.rehearse or file.stem in REHEARSED]
    shares = [(file, i, SHARES.get(file.stem, 1)) for file in files for i in range(SHARES.get(file.stem, 1))]
    shares.sort(key=lambda share: -share[2])  # the longest first
    names = [file.stem if count == 1 else f"{file.stem}-{i}" for file, i, count in shares]
    deadline = time.monotonic() + limit
    rehearsal = {"EMC2_GPU_REHEARSAL": "reference,cpu"} if session.rehearse else {}

    def one(name: str, share: tuple[Path, int, int]) -> tuple[dict[str, dict], bool]:
        file, i, count = share
        command = [*PYTEST, "-m", "gpu", "-rs", str(file)]
        return run_file(command, name, session.work, deadline, f"{i}/{count}", **rehearsal)

    with ThreadPoolExecutor(session.processes) as pool:
        results = dict(zip(names, pool.map(one, names, shares), strict=True))
    return summarize_tests(results)


def summarize_tests(results: dict[str, tuple[dict[str, dict], bool]]) -> dict:
    """Counts, failures with their reasons, reasons of skips, and the slowest tests."""
    tests = {name: record for records, _ in results.values() for name, record in records.items()}
    counts = Counter(record["outcome"] for record in tests.values())
    failures = [record for record in tests.values() if record["outcome"] in ("failed", *LOST)]
    skips = Counter(record["why"] for record in tests.values() if record["outcome"] == "skipped")
    cut_off = [name for name, (_, complete) in results.items() if not complete]
    slowest = sorted(tests.values(), key=lambda record: -record.get("seconds", 0.0))[:10]
    return {
        "status": "failed" if failures else "timed out" if cut_off else "passed" if counts["passed"] else "not run",
        "passed": counts["passed"],
        "failed": len(failures),
        "skipped": counts["skipped"],
        "files_cut_off": cut_off,
        "failures": failures,
        "skip_reasons": dict(skips.most_common(20)),
        "slowest": [[record["test"], record.get("seconds", 0.0)] for record in slowest],
    }


class Sanitizer(NamedTuple):
    """One run of compute-sanitizer over the tests marked `sanitizer`."""

    tool: str
    backend: str
    judged: bool  # else it is told, and fails nothing: racecheck takes asynchronous copies of Triton's for hazards


SANITIZERS = [Sanitizer("memcheck", "cuda", True), Sanitizer("racecheck", "cuda", True)]
SANITIZERS += [Sanitizer("racecheck", "triton", False)]
SANITIZER_ENVIRONMENT = {
    # Else memory that torch hands out lies in blocks of 2 MB, and a step past its end is inside.
    "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    "racecheck": {},
}


def run_sanitizers(session: Session, limit: float) -> dict:
    """compute-sanitizer on our CUDA kernels, and for information on Triton's; all at a time."""
    tool = None if session.rehearse else shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": "not run", "why": "compute-sanitizer was not found"}
    tests = [*PYTEST, "-m", "sanitizer", str(CHECKOUT / "tests" / "gpu" / "test_gpu_sanitizer.py")]
    options = ["--target-processes", "application-only", "--error-exitcode", "86"]

    def one(run: Sanitizer) -> dict:
        report_only = ["--report-api-errors", "no"] if run.tool == "memcheck" else []
        log = session.work / f"{run.tool} {run.backend}.log"
        command = [tool, "--tool", run.tool, *report_only, *options, *tests, "-k", run.backend]
        return judge_sanitizer(run_logged(command, log, limit, **SANITIZER_ENVIRONMENT[run.tool]), log)

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        records = dict(zip(SANITIZERS, pool.map(one, SANITIZERS), strict=True))
    ranks = ["not run", "passed", "timed out", "failed"]
    worst = max((record["status"] for run, record in records.items() if run.judged), key=ranks.index)
    told = {f"{run.tool} {run.backend}": f"{record['status']}: {record['summary']}" for run, record in records.items()}
    return {"status": worst, **told}


def judge_sanitizer(code: int | None, log: Path) -> dict:
    """Status and summary lines of one tool's run."""
    text = log.read_text(errors="replace") if log.exists() else ""
    found = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", text, re.MULTILINE)
    ran = re.findall(r"^\d+ (?:passed|failed|skipped).*$", text, re.MULTILINE)
    summary = "; ".join([*ran[-1:], *found[-1:]]) or text[-400:]
    if "Device not supported" in text:
        return {"status": "not run", "summary": "compute-sanitizer does not support this device here"}
    if code is None:
        return {"status": "timed out", "summary": summary}
    return {"status": "passed" if code == 0 and found else "failed", "summary": summary}


def run_rows(session: Session, limit: float, *words: str) -> dict:
    """The benchmark; where it loses the GPU or hangs, again with the rows that are left."""
    log, deadline, status = session.work / "benchmark.log", time.monotonic() + limit, "not run"
    named = session.choose(HEADLINE if "--headline" in words else ROWS)
    if not named:
        return {"status": "not run", "why": "no row has such a name"}
    words = (*words, *(word for row in named if session.only for word in ("--only", row)))
    for _ in range(MOST_RESTARTS):
        left = deadline - time.monotonic()
        if left <= LEAST_FOR_ROWS or STOP.is_set():
            break
        command = session.command("benchmark", "--json", session.bench, "--resume", *words)
        code = run_logged([*command, "--budget", f"{left - LEAST_FOR_ROWS:.0f}"], log, left)
        status = "passed" if code == 0 else "timed out" if code is None else "failed"
        if code in (0, 1, 2):
            break
    results = json.loads(session.bench.read_text()) if session.bench.exists() else {"rows": [], "goals": {}}
    errors = {row["name"]: row["error"] for row in results["rows"] if row["name"] in named and "error" in row}
    late = [name for name, error in errors.items() if error.startswith(benchmark.NOT_BEGUN)]
    if status == "passed" and errors:
        status = "timed out" if len(late) == len(errors) else "failed"
    why = "; ".join(f"{name}: {error.splitlines()[0][:200]}" for name, error in errors.items()) or tail(log, 600)
    return {"status": status, **results["goals"], "why": "" if status == "passed" else why}


def run_headline(session: Session, limit: float) -> dict:
    """The rows that a first reader asks for."""
    return run_rows(session, limit, "--headline")


def run_peers(session: Session, limit: float) -> dict:
    """The losses beside public kernels, and the goals' answers."""
    target, log = session.bench.with_name("peers.json"), session.work / "peers.log"
    names = [case.name for case in gpu_peers.cases(session.rehearse)]
    named = session.choose(names)
    if not named:
        return {"status": "not run", "why": "no case has such a name"}
    words = [word for name in named if session.only for word in ("--only", name)]
    words += ["--rehearse"] if session.rehearse else []
    budget = f"{max(1.0, limit - LEAST_FOR_ROWS):.0f}"
    words = ["--json", target, "--resume", "--budget", budget, *words]  # check.py keeps what is not to be run again
    code = run_logged(module_command("bench.gpu_peers", *words), log, limit)
    found = json.loads(target.read_text()) if target.exists() else {"cases": [], "goals": []}
    late = sum("contestants" not in case for case in found["cases"])
    status = "timed out" if code is None or (code == 0 and late) else "passed" if code == 0 else "failed"
    answers = {goal["goal"]: goal["answer"] for goal in found["goals"]}
    why = {} if code in (0, None) else {"why": tail(log, 600)}
    return {"status": status, "cases": len(found["cases"]) - late, "not begun": late, **answers, **why}


def run_tuner(session: Session, limit: float) -> dict:
    """The tuner, which keeps to its budget and writes after each shape."""
    target, log = session.bench.with_name("tune.json"), session.work / "tune.log"
    command = session.command("tune", "--json", target, "--budget", f"{max(1.0, limit - LEAST_FOR_ROWS):.0f}")
    code = run_logged(command, log, limit)
    shapes = len(json.loads(target.read_text())["shapes"]) if target.exists() else 0
    return {"status": "passed" if code == 0 else "timed out" if code is None else "failed", "shapes": shapes}
