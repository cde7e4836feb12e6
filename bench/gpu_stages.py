"""The stages of `make gpu-check`, each in processes of its own, which may hang, crash or lose the GPU.

A stage returns a record with a `status`: "passed", "failed", "timed out" or "not run".
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu

CHECKOUT = Path(__file__).resolve().parent.parent
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no")
STALLED = 100.0  # seconds without a test ending: it hangs (compiling one test's kernels takes less)
MOST_RESTARTS = 8
LOST = ("crashed", "hung")  # outcomes that this module gives to a test whose process did not survive it

BUILD = """
import sys, time
import torch
import emc2_kernels as emc2
name, started = sys.argv[1], time.perf_counter()
queries, state = torch.randn(64, 128, device="cuda"), emc2.init_state(64, "cuda")
for proposal in ({}, {"proposal": "uniform", "num_proposals": 8}):
    emc2.mh_step(queries, queries, state, temperature=1.0, seed=0, step=0, backend=name, **proposal)
torch.cuda.synchronize()
print(f"{time.perf_counter() - started:.1f}")
"""


def kill_group(process: subprocess.Popen) -> None:
    """Ends a process that was started in a session of its own, with all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_logged(
    command: Sequence[str], log: Path, limit: float, *, stalled: Callable[[], bool] = lambda: False, **environment: str
) -> int | None:
    """Runs a command, its output appended to a file. Its exit status; None where it was stopped, late or stalled."""
    deadline = time.monotonic() + limit
    with log.open("ab") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=CHECKOUT,
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if time.monotonic() > deadline or stalled():
                    return None
                time.sleep(0.1)
            return process.returncode
        finally:
            kill_group(process)


def tail(log: Path, characters: int = 1500) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-characters:] if log.exists() else ""


def build(work: Path, limit: float) -> dict:
    """First use of each backend: compiles the cuda core and one kernel each. All at once."""
    status = gpu.emc2.backends()
    names = [name for name in gpu.GPU_BACKENDS if status.get(name) == "available"]
    record: dict = {"status": "passed", "backends": status, "first_use_seconds": {}, "errors": {}}
    if not names:
        return record | {"status": "failed", "why": "no GPU backend is available"}
    logs = {name: work / f"build-{name}.log" for name in names}
    with ThreadPoolExecutor(len(names)) as pool:
        commands = [[sys.executable, "-c", BUILD, name] for name in names]
        codes = pool.map(run_logged, commands, logs.values(), [limit] * len(names))
        for name, code in zip(names, codes, strict=True):
            if code == 0:
                record["first_use_seconds"][name] = float(tail(logs[name]).split()[-1])
            else:
                record["status"] = "timed out" if code is None else "failed"
                record["errors"][name] = tail(logs[name])
    return record


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


def write_off(progress: Path, outcome: str, why: str) -> None:
    """Notes the tests that were running when their process ended: they are not run again."""
    with progress.open("a") as file:
        for name, record in read_progress(progress).items():
            if record["outcome"] == "started":
                file.write(json.dumps({"test": name, "outcome": outcome, "seconds": 0.0, "why": why}) + "\n")


# Files that compile tens of binaries, at some seconds each, are done by so many processes.
SHARES = {"test_gpu_sweep": 4, "test_gpu_invariance": 3, "test_gpu_options": 2, "test_gpu_gathered": 2}


def run_file(
    command: Sequence[str], name: str, work: Path, deadline: float, share: str = "0/1"
) -> tuple[dict[str, dict], bool]:
    """All tests of one file, in as many processes as it takes. Their records, and whether all of them were reached.

    Of a file's tests, a share "i/k" is every k-th from the i-th on.

    A test that kills its process, hangs, or leaves a dead GPU context costs itself only: the next process goes on with
    the tests that have not run (tests/gpu/conftest.py reads what has).
    """
    progress, log = work / f"{name}.jsonl", work / f"{name}.tests.txt"
    for _ in range(MOST_RESTARTS):

        def stalled() -> bool:
            return progress.exists() and time.time() - progress.stat().st_mtime > STALLED

        left = deadline - time.monotonic()
        if left <= 0:
            break
        if progress.exists():
            os.utime(progress)  # the patience begins anew
        settings = {
            "EMC2_GPU_PROGRESS": str(progress),
            "EMC2_GPU_SHARE": share,
            "OMP_NUM_THREADS": "2",
        }  # not alone here
        code = run_logged(command, log, left, stalled=stalled, **settings)
        if code in (0, 1, 5):  # all passed, some failed, none was left
            return read_progress(progress), True
        if code is None and time.monotonic() > deadline:  # what was running is not to blame
            break
        write_off(progress, "hung" if code is None else "crashed", tail(log))
        if code in (2, 3, 4):  # pytest could not import or collect it: trying again would not help
            failure = {"test": name, "outcome": "failed", "seconds": 0.0, "why": tail(log)}
            return read_progress(progress) | {name: failure}, True
    return read_progress(progress), False


def run_tests(work: Path, limit: float, workers: int) -> dict:
    """Every file of GPU tests, several at a time: most of their time is compilation, on the CPU."""
    files = sorted((CHECKOUT / "tests" / "gpu").glob("test_*.py"))
    shares = [(file, i, SHARES.get(file.stem, 1)) for file in files for i in range(SHARES.get(file.stem, 1))]
    shares.sort(key=lambda share: -share[2])  # the longest first
    names = [file.stem if count == 1 else f"{file.stem}-{i}" for file, i, count in shares]
    deadline = time.monotonic() + limit

    def one(name: str, share: tuple[Path, int, int]) -> tuple[dict[str, dict], bool]:
        file, i, count = share
        return run_file([*PYTEST, "-m", "gpu", "-rs", str(file)], name, work, deadline, f"{i}/{count}")

    with ThreadPoolExecutor(workers) as pool:
        results = dict(zip(names, pool.map(one, names, shares), strict=True))
    with (work / "tests.log").open("w") as log:
        for file in sorted(work.glob("*.tests.txt")):
            log.write(f"=== {file.name}\n{file.read_text(errors='replace')}\n")
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
        "status": "failed" if failures else "timed out" if cut_off else "passed",
        "passed": counts["passed"],
        "failed": len(failures),
        "skipped": counts["skipped"],
        "files_cut_off": cut_off,
        "failures": failures,
        "skip_reasons": dict(skips.most_common(20)),
        "slowest": [[record["test"], record.get("seconds", 0.0)] for record in slowest],
    }


SANITIZER_ENVIRONMENT = {
    # Else memory that torch hands out lies in blocks of 2 MB, and a step past its end is inside.
    "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    "racecheck": {},
}


def sanitize(work: Path, limit: float) -> dict:
    """The tests marked `sanitizer`, under memcheck and under racecheck, both at a time."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": "not run", "why": "compute-sanitizer was not found"}
    tests = [*PYTEST, "-m", "sanitizer", str(CHECKOUT / "tests" / "gpu" / "test_gpu_sanitizer.py")]
    options = ["--target-processes", "application-only", "--error-exitcode", "86"]
    names = list(SANITIZER_ENVIRONMENT)

    def one(name: str) -> dict:
        report_only = ["--report-api-errors", "no"] if name == "memcheck" else []
        log = work / f"{name}.log"
        command = [tool, "--tool", name, *report_only, *options, *tests]
        return judge_sanitizer(run_logged(command, log, limit, **SANITIZER_ENVIRONMENT[name]), log)

    with ThreadPoolExecutor(len(names)) as pool:
        records = dict(zip(names, pool.map(one, names), strict=True))
    ranks = ["not run", "passed", "timed out", "failed"]
    worst = max((record["status"] for record in records.values()), key=ranks.index)
    return {"status": worst, **{name: record["summary"] for name, record in records.items()}, "tools": records}


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


def benchmark(work: Path, limit: float, target: Path, quick: bool) -> dict:
    """bench/gpu.py; where it loses the GPU or hangs, again with the rows that are left."""
    log = work / "bench.log"
    deadline = time.monotonic() + limit
    status = "failed"
    for _ in range(MOST_RESTARTS):
        left = deadline - time.monotonic()
        if left <= 15:
            break
        command = [sys.executable, str(CHECKOUT / "bench" / "gpu.py"), "--json", str(target), "--resume"]
        command += ["--budget", f"{left - 15:.0f}", *(["--quick"] if quick else [])]
        code = run_logged(command, log, left)
        status = "passed" if code == 0 else "timed out" if code is None else "failed"
        if code in (0, 1, 2):
            break
    counts = json.loads(target.read_text())["goals"] if target.exists() else {}
    return {"status": status, **counts, "why": "" if status == "passed" else tail(log, 600)}
