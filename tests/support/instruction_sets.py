"""Which tests hang on the processor or on luck: the suite under other instruction sets, threads and seeds.

    python tests/support/instruction_sets.py                      all settings, then other seeds (make test-isa)
    python tests/support/instruction_sets.py --settings "avx2, 1 thread" --seeds 0 -- tests/ops/test_lse.py

Another instruction set adds in another order: training takes another path, and a score close to a tie falls to the
other side. Reported, with exit status 1, are tests that fail under a setting or with other seeds, and comparisons whose
margin is below three standard deviations of its spread over seeds (margins.py has what a margin is). A test of what was
made with one seed says so by the marker one_seed, a comparison that holds whatever chance brings by `# exact`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from margins import relative_slack, slack

TESTS = Path(__file__).resolve().parents[1]
DEVIATIONS = 3.0

# The suite's arithmetic is ATen's, oneDNN's (convolutions), MKL's (products; only Intel's processors heed
# MKL_ENABLE_INSTRUCTIONS), OpenBLAS's (scikit-learn's probes), and our core's.
INSTRUCTION_SETS = {  # what torch and the core then say that they use, and the variables that ask for it
    "native": (None, {}),
    "avx2": ("AVX2", {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "EMC2_ARCH": "-march=x86-64-v3",
    }),
    "baseline": ("DEFAULT", {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
        "EMC2_ARCH": "-march=x86-64",
    }),
}  # fmt: skip
SETTINGS = {
    f"{name}, {threads} thread{'s' * (threads > 1)}": (said, {**variables, "OMP_NUM_THREADS": str(threads)})
    for name, (said, variables) in INSTRUCTION_SETS.items()
    if name == "native" or platform.machine() == "x86_64"
    for threads in (2, 1)
}
SEEDS_RUN_WITH = SETTINGS["native, 2 threads"]
# Whatever the caller has set; but OpenBLAS's choice may be there because it guesses wrong.
NOT_INHERITED = {name for _, variables in SETTINGS.values() for name in variables} - {"OPENBLAS_CORETYPE"}
# What compiles, writes files, or drives the check of a GPU: their numbers are no floats of this processor's.
WITHOUT_ARITHMETIC = (
    "tools/test_compiled.py", "tools/test_compile_cache.py", "tools/test_sass.py", "tools/test_gpu_check.py",
    "tools/test_gpu_stages.py", "backends/test_cuda_build.py", "backends/test_extension.py", "stores/test_files.py",
    "gpu",
)  # fmt: skip

IN_FORCE = """
import torch
from emc2_kernels.backends.cpu import build
print(f"ATen {torch.backends.cpu.get_cpu_capability()}, core {build.library().instruction_set}")
"""


class Done(NamedTuple):
    """One test in one run of the suite."""

    outcome: str
    closest: dict[str, tuple[float, float]]  # where -> the smaller and the larger side
    why: str


class Thin(NamedTuple):
    """A comparison that another seed may turn."""

    test: str
    where: str
    sides: tuple[float, float]  # where they came closest, over settings
    deviations: float  # their slack, in standard deviations over seeds


Outcomes = dict[str, Done]  # by test


def environment(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_INHERITED} | variables


def in_force(expected: str | None, variables: dict[str, str]) -> str:
    """Which instruction sets torch and the core say they use. Builds the core.

    Raises:
        SystemExit: not the expected ones, or there is no core.
    """
    command = [sys.executable, "-c", IN_FORCE]
    done = subprocess.run(command, env=environment(variables), cwd=TESTS.parent, capture_output=True, text=True)
    said = done.stdout.strip()
    if done.returncode != 0 or expected is not None and said != f"ATen {expected}, core {expected}":
        raise SystemExit(f"expected {expected}, got {said or done.stderr[-2000:]}")
    return said


def run_suite(variables: dict[str, str], move_seeds: int, selection: Iterable[str], file: Path) -> None:
    """Runs pytest with these variables in the environment and all seeds moved; margins.py writes ``file``."""
    part = file.with_suffix(".part")
    part.write_text("")
    path = os.pathsep.join(filter(None, (str(TESTS / "support"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "margins", "-o", "enable_assertion_pass_hook=true"]
    command += [f"--margins={part}", f"--move-seeds={move_seeds}"]  # a lone value would pass for a path of tests
    command += ["--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal", *selection]
    bytecode = file.with_name("bytecode")  # of its own: the hook is compiled into the assertions
    settings = {"PYTHONPATH": path, "PYTHONPYCACHEPREFIX": str(bytecode), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command, env=environment(variables) | settings, cwd=TESTS.parent, capture_output=True, text=True
    )
    failed = any(outcome.outcome == "failed" for outcome in read(part).values())
    if done.returncode != failed:  # 0: all passed, 1: some failed
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    part.rename(file)


def read(file: Path) -> Outcomes:
    found: Outcomes = {}
    for line in map(json.loads, file.read_text().splitlines()):
        closest = {where: tuple(sides) for where, sides in line["closest"]}
        if line["test"] not in found or line["outcome"] == "failed":  # of a set-up, a call and a tear-down the worst
            found[line["test"]] = Done(line["outcome"], closest, line["why"])
    return found


def failures(runs: dict[str, Outcomes]) -> dict[str, list[str]]:
    """Test -> the runs that it fails in."""
    failed = defaultdict(list)
    for name, tests in runs.items():
        for test, done in tests.items():
            if done.outcome == "failed":
                failed[test].append(name)
    return dict(failed)


def deviations(here: list[tuple[float, float]], moved: list[tuple[float, float]]) -> float:
    """The slack of a comparison in standard deviations of its spread over seeds: the least under any setting, or the
    mean over seeds where that is less, since another processor is one more draw from that spread. As a difference or as
    a ratio, whichever is more: a probability of 0.3 is far from 1e-4 as a ratio, and 0.1 standard errors from 6 as a
    difference."""
    found = []
    for measure in (slack, relative_slack):
        least, spread = min(measure(*sides) for sides in here), [measure(*sides) for sides in moved]
        if all(map(math.isfinite, (least, *spread))) and len(spread) > 1:
            deviation = statistics.stdev(spread)
            found.append(min(least, statistics.fmean(spread)) / deviation if deviation > 0 else math.inf)
    return max(found, default=math.inf)


def thin_margins(settings: dict[str, Outcomes], seeds: dict[str, Outcomes]) -> list[Thin]:
    """The comparisons that come within DEVIATIONS of failing under any setting, the closest first."""
    here, moved = defaultdict(list), defaultdict(list)
    for runs, sides_of in ((settings, here), (seeds, moved)):
        for tests in runs.values():
            for test, done in tests.items():
                for where, sides in done.closest.items():
                    sides_of[test, where].append(sides)
    thin = [
        Thin(*place, min(sides, key=lambda pair: slack(*pair)), deviations(sides, moved[place]))
        for place, sides in here.items()
    ]
    return sorted((found for found in thin if found.deviations < DEVIATIONS), key=lambda found: found.deviations)


def report(settings: dict[str, Outcomes], seeds: dict[str, Outcomes]) -> bool:
    """Prints what was found; True where nothing hangs on the setting or on luck."""
    print(f"\n{'run':22}{'passed':>8}{'failed':>8}{'skipped':>9}")
    for name, tests in (settings | seeds).items():
        outcomes = [done.outcome for done in tests.values()]
        print(f"{name:22}{outcomes.count('passed'):8}{outcomes.count('failed'):8}{outcomes.count('skipped'):9}")
    failed = failures(settings | seeds)
    for test, where in sorted(failed.items()):
        print(f"\nFAILED {test}\n  under {'; '.join(where)}\n{(settings | seeds)[where[0]][test].why}")
    thin = thin_margins(settings, seeds)
    print(f"\nmargins below {DEVIATIONS:g} standard deviations of {len(seeds)} other seeds: {len(thin)}")
    for test, where, (small, large), distance in thin:
        print(f"  {distance:5.1f}  {small:.4g} < {large:.4g}  {test}\n         {where}")
    return not failed and not thin


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="how many other seeds (default 5)")
    parser.add_argument(
        "--keep", type=Path, help="folder for what runs of this tree find; what is there is not run again"
    )
    parser.add_argument("selection", nargs="*", help="pytest's arguments, after --")
    options = parser.parse_args(arguments)
    folder = options.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    print(f"what runs find is kept in {folder}")
    selection = options.selection or [f"--ignore=tests/{name}" for name in WITHOUT_ARITHMETIC]

    def run(name: str, setting: tuple[str | None, dict[str, str]], move_seeds: int, selection: list[str]) -> Outcomes:
        file, variables = folder / f"{name}.jsonl", setting[1]
        if not file.exists():
            print(f"{name}: {in_force(*setting)} ...", flush=True)
            start = time.monotonic()
            run_suite(variables, move_seeds, selection, file)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        return read(file)

    settings = {name: run(name, SETTINGS[name], 0, selection) for name in options.settings}
    # Other seeds for what compares numbers.
    comparing = sorted({test for tests in settings.values() for test, done in tests.items() if done.closest})
    if options.seeds and not comparing:
        raise SystemExit("no test that was selected compares numbers: nothing to try with other seeds")
    numbers = range(1000, 1000 * options.seeds + 1, 1000)
    seeds = {f"seeds + {by}": run(f"seeds + {by}", SEEDS_RUN_WITH, by, comparing) for by in numbers}
    return 0 if report(settings, seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
