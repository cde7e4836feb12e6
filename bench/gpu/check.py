"""`make gpu-check`: everything that needs a GPU, in stages that each end with a result.

    python -m bench.gpu.check                             all stages, under nine minutes
    python -m bench.gpu.check --stages warm,smoke,headline --out DIR        is it right, and how fast: five minutes
    python -m bench.gpu.check --stages smoke,tests,rest --cache DIR/compile-cache.tar.gz --out DIR     and the rest
    python -m bench.gpu.check --rehearse                  every stage on a CPU, at toy sizes; the figures mean nothing

    warm       compiles what the next two need, many processes at a time
    smoke      every family of kernels against float64 on the same GPU (smoke.py)
    headline   the first rows of the benchmark beside the machine's limits and the predictions (benchmark.py --headline)
    peers      the losses over a whole batch beside public kernels, and the goals (bench/gpu_peers.py)
    tests      tests/gpu
    rest       compute-sanitizer; the other rows of the benchmark; measures other sizes for the kernels (tune.py)

Writes bench/results/<gpu>.json after every stage. Needs no network and no installation: torch, Triton and pytest of the
Python that runs it, nvcc where the cuda backend is to be built, compute-sanitizer where it is to run. Exits with 0 only
where what was asked for ran and nothing failed; goals, met or missed, are in the benchmark's table. What is compiled
stays in build/gpu-cache. docs/development/gpu.md says how to read the results.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

import emc2_kernels as emc2
from bench import gpu_peers
from bench.gpu import benchmark, compile_cache, smoke, stages
from bench.gpu.rows import HEADLINE, ROWS
from bench.gpu.stages import Session
from bench.harness import CHECKOUT, machine
from bench.harness.processes import STOP
from bench.harness.report import REHEARSAL, results_path, write_json
from emc2_kernels import files

BUDGET = 530.0
CACHE = CHECKOUT / "build" / "gpu-cache"
PROCESS_BYTES = 3e9  # of GPU memory, for one process of smoke
STAGES = ("warm", "smoke", "headline", "peers", "tests", "rest")
# The parts of each stage, in order: what runs it, and the seconds that it may take.
PARTS: dict[str, dict[str, tuple[Callable[[Session, float], dict], float]]] = {
    "warm": {"warm": (stages.warm_up, 45)},
    "smoke": {"smoke": (stages.run_smoke, 60)},
    "headline": {"headline": (stages.run_headline, 75)},
    "peers": {"peers": (stages.run_peers, 100)},
    "tests": {"tests": (stages.run_tests, 240)},
    "rest": {
        "sanitizer": (stages.run_sanitizers, 90),
        "rows": (stages.run_rows, 120),
        "tune": (stages.run_tuner, 300),
    },
}
JUDGED = ("smoke", "tests")  # must have passed where they were asked for; of the others none may have failed
NOT_JUDGED = ("warm",)  # what it could not compile fails in smoke


class Report:
    """The results as they grow, written after every part to the results folder and to `--out`.

    What an earlier run of the same commit, unchanged, has found stays in the file until the same part is run again.
    """

    def __init__(self, described: dict[str, object], out: Path | None, target: Path) -> None:
        self.machine, self.out, self.target = described, out, target
        self.work = Path(tempfile.mkdtemp(prefix="emc2-gpu-check-"))
        self.bench, self.tuned = self.work / "bench.json", self.work / "tune.json"
        self.peers = self.work / "peers.json"
        self.peers_target = target.with_name(f"{target.stem}-peers.json")
        self.parts: dict[str, dict] = {}
        self.ran: dict[str, dict] = {}  # in this run

    def restore(self, earlier: dict, anew: Iterable[str]) -> None:
        """Takes in the results of an earlier run, but for the rows and cases ``anew``, which are to be measured again.

        Of a run in which all cases of ``peers`` are, nothing of that stage is kept.
        """
        self.parts, anew = earlier["check"]["stages"], set(anew)
        kept = [row for row in earlier["rows"] if row["name"] not in anew]
        benchmark.write_results(earlier | {"rows": kept}, self.bench)
        if "tune" in earlier:
            write_json(earlier["tune"], self.tuned)
        peers = json.loads(self.peers_target.read_text()) if self.peers_target.exists() else {"cases": []}
        kept = [case for case in peers["cases"] if case["name"] not in anew]
        if kept and peers["machine"]["commit"] == self.machine["commit"]:
            write_json(peers | {"cases": kept}, self.peers)

    def results(self) -> dict[str, object]:
        """The benchmark's results, and beside them what the check found."""
        benched = json.loads(self.bench.read_text()) if self.bench.exists() else {"rows": []}
        found = {"tune": json.loads(self.tuned.read_text())} if self.tuned.exists() else {}
        check = {"command": "make gpu-check", "stages": self.parts, "passed": has_passed(self.parts)}
        return benched | found | {"machine": self.machine, "check": check}

    def passed(self) -> bool:
        """Whether what this run was asked for ran, and nothing failed."""
        return has_passed(self.ran)

    def add(self, name: str, record: dict) -> None:
        """Keeps a part's record, prints its lines, writes everything."""
        fresh = record.get("families", [])
        if name == "smoke" and fresh:
            tried = {family["family"] for family in fresh}
            earlier = [each for each in self.parts.get(name, {}).get("families", []) if each["family"] not in tried]
            self.parts[name] = record | stages.summarize_families([*earlier, *fresh])
        else:
            self.parts[name] = record
        self.ran[name] = record
        counts = {key: value for key, value in record.items() if isinstance(value, (int, float, str)) and value != ""}
        print(f"{name}: {counts.pop('status')}  {counts}", flush=True)
        for family in fresh:
            print(f"  {family_line(family)}", flush=True)
        self.write()

    def write(self) -> None:
        """Each file whole or not at all."""
        for folder in filter(None, (self.target.parent, self.out)):
            write_json(self.results(), folder / self.target.name)
            if self.peers.exists():
                files.write(folder / self.peers_target.name, self.peers.read_text())
        if self.out is not None:
            files.write(self.out / "gpu-check.log", self.logs())

    def logs(self) -> str:
        """Of all processes, one after the other."""
        return "".join(
            f"=== {file.stem}\n{file.read_text(errors='replace')}\n" for file in sorted(self.work.glob("*.log"))
        )


OF_EVERY_CASE = {"case", "rows", "compared", "mismatches", "largest_error", "bound"}  # what else there is is a note


def has_passed(parts: Mapping[str, dict]) -> bool:
    """Whether what must pass has passed, and nothing else failed."""
    statuses = {name: part["status"] for name, part in parts.items() if name not in NOT_JUDGED}
    return "failed" not in statuses.values() and all(statuses[name] == "passed" for name in JUDGED if name in statuses)


def family_line(family: dict) -> str:
    """PASS or FAIL of one family of kernels, what was compared, and the error that came nearest to its bound; notes."""
    cases, told = family.get("cases", []), ""
    if cases:
        compared, rows, wrong = (sum(case[count] for case in cases) for count in ("compared", "rows", "mismatches"))
        bounded = [case for case in cases if case["bound"] and case["largest_error"] is not None]
        told = f"{compared:>8} of {rows:>8} rows compared, {wrong} differ"
        if bounded:
            worst = max(bounded, key=lambda case: case["largest_error"] / case["bound"])
            told += f", error {worst['largest_error']:.2g} of {worst['bound']:.2g} allowed"
    line = f"{family['status']:8}{family['family']:23}{told}  {family.get('why', '')[:300]}".rstrip()
    notes = [{name: value for name, value in case.items() if name not in OF_EVERY_CASE} for case in cases]
    return "\n".join([line, *(f"    {case['case']}: {note}" for case, note in zip(cases, notes, strict=True) if note)])


def parse_stages(text: str) -> list[str]:
    """Of `--stages`: in the order in which they run."""
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r} is no stage: they are {','.join(STAGES)}")
    return [name for name in STAGES if name in names]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=parse_stages, default=list(STAGES), help=f"of {','.join(STAGES)} (all)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="families, rows and cases (smoke, the benchmark, peers) whose names begin so")  # fmt: skip
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
    known = [*smoke.FAMILIES, *ROWS, *(case.name for case in gpu_peers.cases(options.rehearse))]
    for name in options.only:
        if not any(each.startswith(name) for each in known):
            parser.error(f"--only {name}: families, rows and cases are {', '.join(known)}")
    return options


def heading(described: dict[str, object]) -> str:
    """Machine, versions and the backends' statuses, as lines of text."""
    names = ("device", "driver", "torch", "triton", "cuda", "nvcc", "python", "commit", "dirty", "usable_cores")
    lines = [f"  {name}: {described.get(name)}" for name in names]
    return "\n".join([*lines, *(f"  backend {name}: {status}" for name, status in emc2.backends().items())])


def environment(rehearse: bool) -> dict[str, str]:
    """Of every process that is started: output unbuffered, and where compiled kernels go.

    Few threads each, as they are many. On a CPU nothing is compiled that another machine could use.
    """
    cache = {} if rehearse else compile_cache.environment(CACHE)
    return {**cache, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}


def run_part(run: Callable[[Session, float], dict], session: Session, limit: float) -> dict:
    """A part's record, within so many seconds."""
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
    session = Session(report.work, report.bench, workers(options), options.rehearse, tuple(options.only))
    report.write()  # or a run that is killed early would leave nothing
    for stage in options.stages:
        for name, (run, limit) in PARTS[stage].items():
            if not STOP.is_set():
                report.add(name, run_part(run, session, min(limit, deadline - time.monotonic())))
        if report.out is not None and not options.rehearse and CACHE.exists():
            left_out = compile_cache.pack(CACHE, report.out / "compile-cache.tar.gz")
            if left_out:
                print(f"  {left_out} compiled files did not fit into compile-cache.tar.gz", flush=True)


def workers(options: argparse.Namespace) -> int:
    """Processes at a time: no more than the GPU has memory for."""
    return options.workers if options.rehearse else max(1, min(options.workers, int(free_bytes() / PROCESS_BYTES)))


def resume(report: Report, options: argparse.Namespace) -> None:
    """Goes on from the results file where it is of this commit; says where it is not, as it will be replaced."""
    if not report.target.exists():
        return
    try:
        earlier = json.loads(report.target.read_text())
        code = [(each["commit"], each["dirty"]) for each in (earlier["machine"], report.machine)]
        same = code[0] == code[1] and code[0][1] is False and "stages" in earlier["check"]
    except (ValueError, KeyError):
        same = False
    if not same:
        print(f"  {report.target.name} is of other code, and is replaced", flush=True)
        return
    named = [*HEADLINE] if "headline" in options.stages else []
    named += [case.name for case in gpu_peers.cases(options.rehearse)] if "peers" in options.stages else []
    report.restore(earlier, [name for name in named if not options.only or name.startswith(tuple(options.only))])


def load_cache(file: Path) -> None:
    """What an earlier run has compiled; without it everything is compiled again."""
    try:
        print(f"  kernels from {file.name}: {compile_cache.unpack(file, CACHE)}", flush=True)
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error) as error:
        print(f"  {file.name} was not taken in, {type(error).__name__}: {error}", flush=True)


def stop(number: int, frame: object) -> None:
    """On SIGTERM and Ctrl-C: what runs is killed, and the report says what there is."""
    STOP.set()


def summary(report: Report) -> str:
    """What failed, and the benchmark's table last."""
    lines = []
    for failure in report.parts.get("tests", {}).get("failures", [])[:25]:
        lines.append(f"{failure['outcome'].upper()} {failure['test']}\n    {failure['why'][-300:].strip()}")
    if report.bench.exists():
        lines.append(benchmark.table(json.loads(report.bench.read_text())["rows"]))
    if report.peers.exists():
        lines.append(gpu_peers.table(json.loads(report.peers.read_text())))
    if STOP.is_set():
        lines.append("stopped before its end")
    return "\n".join([*lines, "gpu-check passed" if report.passed() else "gpu-check FAILED"])


def free_bytes() -> float:
    """Of the GPU's memory."""
    return torch.cuda.mem_get_info()[0]


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
    described = machine.describe(torch.device("cpu" if options.rehearse else "cuda"))
    print(heading(described), flush=True)
    if options.cache is not None:
        load_cache(options.cache)
    target = options.json or (REHEARSAL if options.rehearse else results_path(described))
    report = Report(described, options.out and options.out.resolve(), target.resolve())
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        resume(report, options)
        run_stages(options, report)
        print(summary(report))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        shutil.rmtree(report.work, ignore_errors=True)
    return 0 if report.passed() and not STOP.is_set() else 1


if __name__ == "__main__":
    sys.exit(main())
