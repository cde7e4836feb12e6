"""`make gpu-check`: everything that needs a GPU, in one command, inside a time limit.

    python bench/gpu_check.py               builds, GPU tests, compute-sanitizer, GPU benchmark; under 8 minutes
    python bench/gpu_check.py --out DIR     also copies the results and the logs there

Writes bench/results/<gpu>.json after every stage. Needs no network and no installation: torch, Triton and pytest of the
Python that runs it, nvcc where the cuda backend is to be built, compute-sanitizer where its stage is to run. Exits with
0 only where tests ran and none failed; the benchmark's goals, met or missed, are in its table.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))  # from a bare checkout

import gpu  # noqa: E402
import gpu_stages  # noqa: E402
import machine  # noqa: E402
import torch  # noqa: E402

import emc2_kernels as emc2  # noqa: E402

BUDGET = 480.0
# Seconds that a stage may take, and seconds that the stages before it must leave to it.
LIMITS = {"build": (150, 60), "tests": (240, 60), "sanitizer": (90, 40), "bench": (200, 110)}


def allot(stage: str, remaining: float) -> float:
    """Seconds for a stage: its own limit, or less where later stages would be left without their share."""
    names = list(LIMITS)
    later = sum(LIMITS[name][1] for name in names[names.index(stage) + 1 :])
    return max(0.0, min(LIMITS[stage][0], remaining - later))


class Report:
    """The results as they grow, written after every stage to the results folder and to `--out`."""

    def __init__(self, described: dict[str, object], out: Path | None, target: Path) -> None:
        self.stages: dict[str, dict] = {}
        self.machine, self.out, self.target = described, out, target
        self.work = Path(tempfile.mkdtemp(prefix="emc2-gpu-check-"))
        self.bench = self.work / "bench.json"

    def results(self) -> dict[str, object]:
        """The benchmark's results, and beside them what the check found."""
        benched = json.loads(self.bench.read_text()) if self.bench.exists() else {"machine": self.machine, "rows": []}
        return benched | {"check": {"command": "make gpu-check", "stages": self.stages, "passed": self.passed()}}

    def passed(self) -> bool:
        """Whether tests ran and nothing failed. A stage that could not be had (no sanitizer) is no failure."""
        tests = self.stages.get("tests", {})
        wrong = any(
            stage["status"] in ("failed", "timed out") for name, stage in self.stages.items() if name != "bench"
        )
        return tests.get("passed", 0) > 0 and not wrong

    def add(self, name: str, record: dict) -> None:
        """Keeps a stage's record, prints its line, writes everything."""
        self.stages[name] = record
        counts = {
            key: value for key, value in record.items() if isinstance(value, (int, float, str)) and key != "status"
        }
        print(f"{name}: {record['status']}  {counts}", flush=True)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.target.write_text(json.dumps(self.results(), indent=2) + "\n")
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            for file in (self.target, *self.work.glob("*.log")):
                shutil.copy(file, self.out / file.name)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy results and logs there")
    parser.add_argument("--json", type=Path, metavar="PATH", help="results file (bench/results/<gpu>.json)")
    parser.add_argument("--skip", action="append", default=[], choices=LIMITS, help="leave a stage out")
    parser.add_argument("--workers", type=int, default=min(12, max(1, machine.usable_cores() * 3 // 4)),
                        help="test files that run at a time (%(default)s)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a quick benchmark")
    return parser.parse_args(arguments)


def heading(described: dict[str, object]) -> str:
    """Machine, versions and the backends' statuses, as lines of text."""
    names = ("device", "driver", "torch", "triton", "cuda", "nvcc", "python", "commit", "dirty", "usable_cores")
    lines = [f"  {name}: {described.get(name)}" for name in names]
    return "\n".join([*lines, *(f"  backend {name}: {status}" for name, status in emc2.backends().items())])


def environment() -> dict[str, str]:
    """Of every process that is started: the checkout's package, output unbuffered."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run_stages(options: argparse.Namespace, report: Report) -> None:
    """Every stage that is not skipped, each within what is left."""
    deadline = time.monotonic() + options.budget
    stages = {
        "build": lambda limit: gpu_stages.build(report.work, limit),
        "tests": lambda limit: gpu_stages.run_tests(report.work, limit, options.workers),
        "sanitizer": lambda limit: gpu_stages.sanitize(report.work, limit),
        "bench": lambda limit: gpu_stages.benchmark(report.work, limit, report.bench, options.quick),
    }
    for name, stage in stages.items():
        limit = allot(name, deadline - time.monotonic())
        if name in options.skip or limit <= 0:
            report.add(name, {"status": "not run", "why": "left out" if name in options.skip else "no time was left"})
            continue
        started = time.monotonic()
        try:
            record = stage(limit)
        except Exception as error:  # a stage that breaks must not take the others' results with it
            record = {"status": "failed", "why": f"{type(error).__name__}: {error}"}
        report.add(name, record | {"seconds": round(time.monotonic() - started, 1), "limit": round(limit)})


def closing(report: Report) -> str:
    """What failed, and the benchmark's table last."""
    lines = []
    for failure in report.stages.get("tests", {}).get("failures", [])[:25]:
        lines.append(f"{failure['outcome'].upper()} {failure['test']}\n    {failure['why'][-300:].strip()}")
    if report.bench.exists():
        lines.append(gpu.table(json.loads(report.bench.read_text())["rows"]))
    return "\n".join([*lines, "gpu-check passed" if report.passed() else "gpu-check FAILED"])


def has_gpu() -> bool:
    """Whether torch sees one."""
    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; 0 where tests ran and nothing failed."""
    options = parse_arguments(arguments)
    if not has_gpu():
        print("make gpu-check needs a CUDA GPU and found none: nothing was run")
        return 1
    os.environ.update(environment())
    os.chdir(CHECKOUT)
    described = gpu.describe(torch.device("cuda"))
    print(heading(described), flush=True)
    target = options.json or gpu.RESULTS / f"{machine.slug(described)}.json"
    report = Report(described, options.out, target.resolve())
    try:
        run_stages(options, report)
        print(closing(report))
    finally:
        shutil.rmtree(report.work, ignore_errors=True)
    return 0 if report.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
