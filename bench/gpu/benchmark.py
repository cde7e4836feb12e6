"""The benchmark on a GPU: every figure beside the machine's limit or a peer, and beside its goal.

    python -m bench.gpu.benchmark                all rows, under three minutes on an H100; bench/results/<gpu>.json
    python -m bench.gpu.benchmark --headline     the rows of the headline only, without the peers that are slow
    python -m bench.gpu.benchmark --quick        fewer rounds, for a look
    python -m bench.gpu.benchmark --only small   the rows whose names begin so; --list prints the names
    python -m bench.gpu.benchmark --warm         every call once: compiles and loads the kernels, writes nothing
    python -m bench.gpu.benchmark --rehearse     every line on a CPU at toy sizes; the figures mean nothing

The rows are in rows.py, their peers in peers.py, the machine's limits in limits.py, what was predicted in
predictions.py, the method in bench/harness/timing.py. A row that fails is recorded with its error and does not stop the
others; the file is written after each row, so that a run cut off keeps what it had.

The headline is to take 75 s on an H100 whose kernels are compiled, and is estimated, not measured, at 30: 10 s until
torch, Triton and the GPU have started; 18 rows (seven are of both backends; 14 and three where cuda has no matrix
units) at 0.3 s for operands and binaries; 53 calls that are timed, those of the limits among them, at 0.1 s (9 rounds
of 4 ms and as much again), but 0.4 s for the gradient at d = 512 (12 ms a call); 1 s for each of the five binaries that
are disassembled; 3 s for what is forgotten.
"""

import argparse
import gc
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import emc2_kernels as emc2
from bench.gpu.context import DEAD_CONTEXT, Context, Row, context_is_alive
from bench.gpu.predictions import find_prediction
from bench.gpu.rows import HEADLINE, HEADLINE_NOT_ON_CUDA, NONE_ON_CUDA, OF_ALL_BACKENDS, ROWS, SWEEPS
from bench.harness import machine
from bench.harness.report import REHEARSAL, results_path, write_json
from emc2_kernels.backends import gpu

GPU_BACKENDS = ("triton", "cuda")
SCHEMA = 1  # of the results file; raise it when a field changes its meaning
NO_GPU = 1  # an exit status, as DEAD_CONTEXT
UNFINISHED = "started and never finished"
NOT_BEGUN = "not begun within"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headline", action="store_true", help="the rows of the headline only")
    parser.add_argument("--list", action="store_true", help="print the rows' names, one a line, and end")
    parser.add_argument("--warm", action="store_true", help="every call once, and no results")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows whose names begin so")
    parser.add_argument("--backends", help=f"commas between ({','.join(GPU_BACKENDS)}; cpu in a rehearsal)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="results file (bench/results/<gpu>.json)")
    parser.add_argument("--budget", type=float, help="seconds; no row is begun after them (170; of the headline: 75)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the results file has already")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(arguments)
    if options.budget is None:
        options.budget = 75 if options.headline else 170
    for name in options.only:
        if not any(row.startswith(name) for row in names(options)):
            parser.error(f"--only {name}: the rows are {', '.join(names(options))}")
    return options


def names(options: argparse.Namespace) -> list[str]:
    """The rows to choose from, in order."""
    return [name for name in HEADLINE if name in ROWS] if options.headline else list(ROWS)


def plan(options: argparse.Namespace, available: Sequence[str], hopper: bool = False) -> list[tuple[str, str]]:
    """(row, backend) in order; a row of all backends comes once. hopper: whether the cuda backend has matrix units."""
    slow = (*HEADLINE_NOT_ON_CUDA, *(() if hopper else SWEEPS)) if options.headline else ()
    not_on_cuda = {*NONE_ON_CUDA, *slow}
    wanted = [name for name in names(options) if not options.only or name.startswith(tuple(options.only))]
    return [
        (name, backend)
        for name in wanted
        for backend in (["all"] if name in OF_ALL_BACKENDS else available)
        if available and not (backend == "cuda" and name in not_on_cuda)
    ]


def is_hopper(device: torch.device) -> bool:
    """Whether the GPU has what csrc/cuda/matrix_sweep.cuh needs."""
    return device.type == "cuda" and gpu.architecture() == gpu.MATRIX_SWEEP_ARCHITECTURE


def device_name(device: torch.device) -> str:
    """The GPU's; predictions are for one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def run_row(name: str, backend: str, context: Context) -> dict[str, object]:
    """One row's record: what it measured, or the error that stopped it."""
    started = time.perf_counter()
    record: dict[str, object] = {"name": name, "backend": backend}
    try:
        row: Row = ROWS[name](context, backend)
        record |= asdict(row)
        for reading in record["readings"]:
            reading["predicted"] = find_prediction(name, reading["quantity"], backend, device_name(context.device))
        if context.rehearsal:  # toy sizes on another machine meet and miss nothing
            record["goals"] = [goal | {"met": None} for goal in record["goals"]]
    except Exception as error:  # whatever a kernel, a compiler or the driver raises: the other rows go on
        record["error"] = f"{type(error).__name__}: {error}"[:2000]
    record["seconds"] = round(time.perf_counter() - started, 1)
    gc.collect()
    return record


def count_goals(rows: Sequence[dict]) -> dict[str, int]:
    """How many goals were met and missed, and how many rows failed. It takes one backend to meet a goal."""
    best: dict[tuple[str, str], bool] = {}
    for row in rows:
        for goal in row.get("goals", []):
            if goal["met"] is not None:
                key = (row["name"], goal["quantity"])
                best[key] = best.get(key, False) or goal["met"]
    met = sum(best.values())
    return {"met": met, "missed": len(best) - met, "failed_rows": sum("error" in row for row in rows)}


def write_results(results: dict, target: Path) -> None:
    """With the goals counted."""
    results["goals"] = count_goals(results["rows"])
    write_json(results, target)


def reading_line(reading: dict) -> str:
    """What was predicted, what was measured, and the limits, the one that binds first."""
    foreseen = reading["predicted"]
    figures = f"{'':>24}"
    if foreseen:
        elsewhere = "" if foreseen["for_this_card"] else f" for an {foreseen['for']}"
        figures = f"{foreseen['low']:g} to {foreseen['high']:g}{elsewhere}".rjust(24)
    spread = f"{reading['lower_quartile']:.4g} .. {reading['upper_quartile']:.4g}"
    figures += f"{reading['measured']:>11.4g} {spread:>22}"
    if reading["binds"] is None:
        return figures
    others = [f"{name} {limit:.3g}" for name, limit in reading["limits"].items() if name != reading["binds"]]
    also = f"  ({', '.join(others)})" if others else ""
    binds = f"{reading['binds']} {reading['limits'][reading['binds']]:.3g} ms"
    return f"{figures} {reading['time / limit']:>7.2f} x {binds}{also}"


def readings_table(rows: Sequence[dict]) -> list[str]:
    """A line for each time that has limits."""
    lines = [f"{'row':<17}{'backend':<10}{'quantity':<24}{'predicted':>24}{'measured':>11} {'quartiles':>22}  limit"]
    for row in rows:
        head = f"{row['name']:<17}{row['backend']:<10}"
        lines += [f"{head}{reading['quantity']:<24}{reading_line(reading)}" for reading in row.get("readings", [])]
    return lines if len(lines) > 1 else []


def table(rows: Sequence[dict]) -> str:
    """Times beside predictions and limits; goals, one a line: value, quartiles, goal, whether it was met; then the
    crossover of the backends."""
    lines = readings_table(rows)
    lines.append(f"{'row':<17}{'backend':<10}{'quantity':<40}{'value':>11} {'quartiles':>22}{'goal':>10}")
    for row in rows:
        head = f"{row['name']:<17}{row['backend']:<10}"
        if "error" in row:
            lines.append(f"{head}FAILED  {row['error'].splitlines()[0][:100]}")
        for goal in row.get("goals", []):
            spread = f"{goal['lower_quartile']:.4g} .. {goal['upper_quartile']:.4g}"
            verdict = {True: "met", False: "MISSED", None: ""}[goal["met"]]
            figures = f"{goal['value']:>11.4g} {spread:>22}{goal['goal'] or '':>10}"
            lines.append(f"{head}{goal['quantity']:<40}{figures}  {verdict}".rstrip())
        notes = row.get("notes", {})
        if "us" in notes:
            lines.append(head + "".join(f"{column:>10}" for column in notes["columns"]))
            lines += [" " * len(head) + "".join(f"{cell:>10}" for cell in cells) for cells in notes["us"]]
    return "\n".join(lines)


def read_earlier(target: Path) -> tuple[list[dict], dict]:
    """Rows and limits of an earlier run, but for rows that there was no time for.

    A row that was running when its process died is not tried again.
    """
    earlier = json.loads(target.read_text()) if target.exists() else {}
    rows = [row for row in earlier.get("rows", []) if not row.get("error", "").startswith(NOT_BEGUN)]
    return rows, earlier.get("limits", {})


def run_all(options: argparse.Namespace, context: Context, results: dict, target: Path) -> int:
    """Runs the rows that the file lacks, and writes it after each. Returns the exit status."""
    deadline = time.perf_counter() + options.budget
    have, earlier = {(row["name"], row["backend"]) for row in results["rows"]}, results.get("limits", {})
    for name, backend in plan(options, context.backends, is_hopper(context.device)):
        if (name, backend) in have:
            continue
        if time.perf_counter() > deadline:
            record = {"name": name, "backend": backend, "error": f"{NOT_BEGUN} {options.budget:g} s"}
            results["rows"].append(record)
            continue
        results["rows"].append({"name": name, "backend": backend, "error": UNFINISHED})
        write_results(results, target)
        results["rows"][-1] = run_and_print(name, backend, context)
        results["limits"] = earlier | context.limits.records
        write_results(results, target)
        if not context_is_alive(context.device):
            return DEAD_CONTEXT
    write_results(results, target)
    return 0


def run_and_print(name: str, backend: str, context: Context) -> dict[str, object]:
    """A row's record, after a line that says how it went."""
    record = run_row(name, backend, context)
    outcome = str(record.get("error", "done"))
    print(f"{name} [{backend}] {record['seconds']} s: {outcome.splitlines()[0][:200]}", flush=True)
    return record


def warm(options: argparse.Namespace, context: Context) -> int:
    """Compiles and loads what the rows need, frees their operands, and keeps no figure; 1 where a row failed."""
    deadline, failed = time.perf_counter() + options.budget, False
    for name, backend in plan(options, context.backends, is_hopper(context.device)):
        if time.perf_counter() > deadline:
            break
        failed |= "error" in run_and_print(name, backend, context)
        if not context_is_alive(context.device):
            return DEAD_CONTEXT
    return int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark, writes its file, prints the table last."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(names(options)))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("bench.gpu.benchmark needs a CUDA GPU and found none; --rehearse runs it on the CPU at toy sizes")
        return NO_GPU
    started, status = time.perf_counter(), emc2.backends()
    device = torch.device("cpu" if options.rehearse else "cuda")
    named = options.backends.split(",") if options.backends else ["cpu"] if options.rehearse else GPU_BACKENDS
    available = [name for name in named if status.get(name) == "available"]
    context = Context(device, available, options.quick, options.rehearse, options.headline, options.warm)
    if options.warm:
        return warm(options, context)
    described = machine.describe(device)
    target = options.json or (REHEARSAL if options.rehearse else results_path(described))
    rows, limits = read_earlier(target) if options.resume else ([], {})
    results = {
        "schema": SCHEMA,
        "command": shlex.join(["python", "-m", "bench.gpu.benchmark", *(Path(word).name for word in arguments)]),
        "machine": described,
        "backends": status,
        "settings": {"headline": options.headline, "quick": options.quick, "rehearsal": options.rehearse},
        "limits": limits,
        "rows": rows,
    }
    exit_status = run_all(options, context, results, target)
    print(
        f"{described['device']}; torch {described['torch']}, triton {described['triton']}; commit {described['commit']}"
    )
    print(table(results["rows"]))
    print(f"{count_goals(results['rows'])}; {time.perf_counter() - started:.0f} s; written to {target.name}")
    return exit_status


if __name__ == "__main__":
    sys.exit(main())
