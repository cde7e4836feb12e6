"""`make gpu-check`: everything that needs a GPU, in stages that each end with a result.

    python bench/gpu_check.py                             all stages, under nine minutes
    python bench/gpu_check.py --stages warm,smoke,headline --out DIR        is it right, and how fast: five minutes
    python bench/gpu_check.py --stages smoke,tests,rest --cache DIR/compile-cache.tar.gz --out DIR     and the rest
    python bench/gpu_check.py --rehearse                  every stage on a CPU, at toy sizes; the figures mean nothing

    warm       compiles what the next two need, many processes at a time
    smoke      every family of kernels against float64 on the same GPU (gpu_smoke.py)
    headline   the first rows of the benchmark beside the machine's limits and the predictions (gpu.py --headline)
    tests      tests/gpu
    rest       compute-sanitizer; the other rows of the benchmark; measures other sizes for the kernels (tune.py)

Writes bench/results/<gpu>.json after every stage. Needs no network and no installation: torch, Triton and pytest of the
Python that runs it, nvcc where the cuda backend is to be built, compute-sanitizer where it is to run. Exits with 0 only
where what was asked for ran and nothing failed; goals, met or missed, are in the benchmark's table. What is compiled
stays in build/gpu-cache. docs/gpu.md says how to read the results.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))  # from a bare checkout

import compile_cache  # noqa: E402
import gpu  # noqa: E402
import gpu_stages  # noqa: E402
import machine  # noqa: E402
import torch  # noqa: E402
from gpu_stages import Session  # noqa: E402

import emc2_kernels as emc2  # noqa: E402

BUDGET = 530.0
CACHE = CHECKOUT / "build" / "gpu-cache"
STAGES = ("warm", "smoke", "headline", "tests", "rest")
# The parts of each stage, in order: what runs it, and the seconds that it may take.
PARTS: dict[str, dict[str, tuple[Callable[[Session, float], dict], float]]] = {
    "warm": {"warm": (gpu_stages.warm, 45)},
    "smoke": {"smoke": (gpu_stages.smoke, 60)},
    "headline": {"headline": (gpu_stages.headline, 75)},
    "tests": {"tests": (gpu_stages.run_tests, 240)},
    "rest": {
        "sanitizer": (gpu_stages.sanitize, 90),
        "rows": (gpu_stages.benchmark, 120),
        "tune": (gpu_stages.tune, 300),
    },
}
JUDGED = ("smoke", "tests")  # must have passed where they were asked for
MAY_NOT_FAIL = ("sanitizer",)  # but need not be there, nor end


class Report:
    """The results as they grow, written after every part to the results folder and to `--out`."""

    def __init__(self, described: dict[str, object], out: Path | None, target: Path) -> None:
        self.parts: dict[str, dict] = {}
        self.machine, self.out, self.target = described, out, target
        self.work = Path(tempfile.mkdtemp(prefix="emc2-gpu-check-"))
        self.bench = self.work / "bench.json"

    def results(self) -> dict[str, object]:
        """The benchmark's results, and beside them what the check found."""
        benched = json.loads(self.bench.read_text()) if self.bench.exists() else {"machine": self.machine, "rows": []}
        tuned = self.bench.with_name("tune.json")
        found = {"tune": json.loads(tuned.read_text())} if tuned.exists() else {}
        return benched | {"check": {"command": "make gpu-check", "stages": self.parts, "passed": self.passed()}} | found

    def passed(self) -> bool:
        """Whether something was judged and nothing failed."""
        judged = [self.parts[name]["status"] for name in JUDGED if name in self.parts]
        return (
            bool(judged)
            and all(status == "passed" for status in judged)
            and not any(self.parts.get(name, {}).get("status") == "failed" for name in MAY_NOT_FAIL)
        )

    def add(self, name: str, record: dict) -> None:
        """Keeps a part's record, prints its lines, writes everything."""
        self.parts[name] = record
        counts = {key: value for key, value in record.items() if isinstance(value, (int, float, str)) and value != ""}
        print(f"{name}: {counts.pop('status')}  {counts}", flush=True)
        for family in record.get("families", []):
            print(f"  {family_line(family)}", flush=True)
        text = json.dumps(self.results(), indent=2) + "\n"
        for folder in filter(None, (self.target.parent, self.out)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / self.target.name).write_text(text)
        if self.out is not None:
            (self.out / "gpu-check.log").write_text(self.logs())

    def logs(self) -> str:
        """Of all processes, one after the other."""
        return "".join(
            f"=== {file.stem}\n{file.read_text(errors='replace')}\n" for file in sorted(self.work.glob("*.log"))
        )


def family_line(family: dict) -> str:
    """PASS or FAIL of one family of kernels, in a line."""
    cases = family.get("cases", [])
    mismatches = sum(case["mismatches"] or 0 for case in cases)
    told = (
        f"{mismatches} mismatches in {len(cases)} cases, largest error {family.get('largest_error')}" if cases else ""
    )
    return f"{family['status']:8}{family['family']:20}{told}  {family.get('why', '')[:300]}".rstrip()


def names_of_stages(text: str) -> list[str]:
    """Of `--stages`: in the order in which they run."""
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r} is no stage: they are {','.join(STAGES)}")
    return [name for name in STAGES if name in names]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=names_of_stages, default=list(STAGES), help=f"of {','.join(STAGES)} (all)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="of smoke and of the benchmark: families and rows whose names begin so")  # fmt: skip
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="put results, log and what was compiled there, too")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="what an earlier run left in --out, to begin with")
    parser.add_argument("--json", type=Path, metavar="PATH", help="results file (bench/results/<gpu>.json)")
    parser.add_argument("--workers", type=int, default=max(1, min(16, machine.usable_cores())),
                        help="processes at a time (%(default)s)")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes")
    options = parser.parse_args(arguments)
    if options.cache is not None and not options.cache.is_file():
        parser.error(f"--cache: there is no file {options.cache}")
    return options


def heading(described: dict[str, object]) -> str:
    """Machine, versions and the backends' statuses, as lines of text."""
    names = ("device", "driver", "torch", "triton", "cuda", "nvcc", "python", "commit", "dirty", "usable_cores")
    lines = [f"  {name}: {described.get(name)}" for name in names]
    return "\n".join([*lines, *(f"  backend {name}: {status}" for name, status in emc2.backends().items())])


def environment(rehearse: bool) -> dict[str, str]:
    """Of every process that is started: the checkout's package, output unbuffered, and where compiled kernels go.

    Few threads each, as they are many. On a CPU nothing is compiled that another machine could use.
    """
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    cache = {} if rehearse else compile_cache.environment(CACHE)
    return {**os.environ, **cache, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}


def run_part(name: str, session: Session, left: float) -> dict:
    """A part's record, within its own limit and what is left of the whole."""
    run, limit = next(parts[name] for parts in PARTS.values() if name in parts)
    limit = min(limit, left)
    if limit <= 0:
        return {"status": "not run", "why": "no time was left"}
    started = time.monotonic()
    try:
        record = run(session, limit)
    except Exception as error:  # a part that breaks must not take the others' results with it
        record = {"status": "failed", "why": f"{type(error).__name__}: {error}"}
    return record | {"seconds": round(time.monotonic() - started, 1), "limit": round(limit)}


def run_stages(options: argparse.Namespace, report: Report) -> None:
    """Every stage that was asked for, each within what is left."""
    deadline = time.monotonic() + options.budget
    session = Session(report.work, report.bench, options.workers, options.rehearse, tuple(options.only))
    for stage in options.stages:
        for name in PARTS[stage]:
            report.add(name, run_part(name, session, deadline - time.monotonic()))
        if report.out is not None and not options.rehearse and CACHE.exists():
            left_out = compile_cache.pack(CACHE, report.out / "compile-cache.tar.gz")
            if left_out:
                print(f"  {left_out} compiled files did not fit into compile-cache.tar.gz", flush=True)


def closing(report: Report) -> str:
    """What failed, and the benchmark's table last."""
    lines = []
    for failure in report.parts.get("tests", {}).get("failures", [])[:25]:
        lines.append(f"{failure['outcome'].upper()} {failure['test']}\n    {failure['why'][-300:].strip()}")
    if report.bench.exists():
        lines.append(gpu.table(json.loads(report.bench.read_text())["rows"]))
    return "\n".join([*lines, "gpu-check passed" if report.passed() else "gpu-check FAILED"])


def has_gpu() -> bool:
    """Whether torch sees one."""
    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; 0 where what was asked for ran and nothing failed."""
    options = parse_arguments(arguments)
    if not options.rehearse and not has_gpu():
        print(
            "make gpu-check needs a CUDA GPU and found none: nothing was run (--rehearse walks its stages on the CPU)"
        )
        return 1
    os.environ.update(environment(options.rehearse))
    described = gpu.describe(torch.device("cpu" if options.rehearse else "cuda"))
    print(heading(described), flush=True)
    if options.cache is not None:
        print(f"  kernels from {options.cache.name}: {compile_cache.unpack(options.cache, CACHE)}", flush=True)
    beside = CHECKOUT / "build" if options.rehearse else gpu.RESULTS  # a rehearsal is never among the results
    target = options.json or beside / ("rehearsal.json" if options.rehearse else f"{machine.slug(described)}.json")
    report = Report(described, options.out, target.resolve())
    os.chdir(CHECKOUT)
    try:
        run_stages(options, report)
        print(closing(report))
    finally:
        shutil.rmtree(report.work, ignore_errors=True)
    return 0 if report.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
