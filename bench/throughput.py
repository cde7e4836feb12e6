"""Time of one sampling step beside its peers, in one interleaved run.

    python bench/throughput.py                      the default sizes
    python bench/throughput.py --quick              the same in under a minute
    python bench/throughput.py --memory --json      and peak memory, all written to bench/results/<machine>.json

The peers are described in peers.py, the method in timing.py. Every ratio is the median over rounds of the ratio within
a round.
"""

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import machine
import memory
import torch
from peers import build_peers, make_operands
from timing import Interleaved, figures, interleave, ratios, summarize, timer_for

import emc2_kernels as emc2

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_SIZES = "64,512,2048"
DEFAULT_DIM = 128
MEMORY_SIZE = (16384, 16384, DEFAULT_DIM)
OURS, LIMIT = "mh_step", "mm"
BY_MACHINE = "<machine>"  # stands for the default path of --json, which depends on the device
SCHEMA = 1  # of the results file; raise it when a field changes its meaning

Size = tuple[int, int, int]


def parse_size(text: str) -> Size:
    """`n`, `nxm` or `nxmxd` -> (n, m, d); m defaults to n, d to 128."""
    try:
        parts = [int(part) for part in text.split("x")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 2:
        raise argparse.ArgumentTypeError(f"a size is n, nxm or nxmxd in whole numbers from 2 up, not {text!r}")
    n, m, d = (parts + [parts[0], DEFAULT_DIM][len(parts) - 1 :])[:3]
    return n, m, d


def parse_sizes(text: str) -> list[Size]:
    """A list of sizes with commas between."""
    return [parse_size(part) for part in text.split(",")]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; options that it leaves out come from `--quick` or the full defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=parse_sizes, default=DEFAULT_SIZES, help="n[xm][xd], commas between (%(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of queries and keys (%(default)s)")
    parser.add_argument("--backend", default="auto", help="of mh_step (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (as torch chooses)")
    parser.add_argument("--temperature", type=float, default=0.07, help="(%(default)s)")
    parser.add_argument("--num-samples", type=int, default=16, help="of mh_step, per row (%(default)s)")
    parser.add_argument("--rounds", type=int, help="(25; 9 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter ones, for a look")
    parser.add_argument(
        "--memory",
        type=parse_size,
        nargs="?",
        const=MEMORY_SIZE,
        metavar="SIZE",
        help="also peak memory of one sweep (16384)",
    )
    parser.add_argument(
        "--json", nargs="?", const=BY_MACHINE, metavar="PATH", help="write results (bench/results/<machine>.json)"
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (9 if options.quick else 25)
    reason = {"auto": "available", **emc2.backends()}.get(options.backend, "no such backend")
    if reason != "available":
        parser.error(f"--backend {options.backend}: {reason}")
    return options


def time_size(size: Size, options: argparse.Namespace) -> dict[str, object]:
    """Time all peers at one size. Returns the size and, for each peer, times, ratios and samples per second."""
    n, m, d = size
    device = torch.device(options.device)
    queries, keys = make_operands(n, m, d, getattr(torch, options.dtype), device)
    settings = {"temperature": options.temperature, "num_samples": options.num_samples, "backend": options.backend}
    peers = build_peers(queries, keys, **settings)
    min_seconds, budget_seconds = (0.003, 2.5) if options.quick else (0.01, 15.0)
    pace = {"min_seconds": min_seconds, "budget_seconds": budget_seconds}
    measured = interleave(peers, options.rounds, timer=timer_for(device), **pace)
    records = {
        name: peer_record(name, measured, rows=n, samples_per_row=peer.samples_per_row) for name, peer in peers.items()
    }
    return {"n": n, "m": m, "d": d, "dtype": options.dtype, "rounds": options.rounds, "peers": records}


def peer_record(name: str, measured: Interleaved, *, rows: int, samples_per_row: int) -> dict[str, object]:
    """One peer's results: milliseconds per call, ratio to the limit, speed-up of ours over it, samples per second."""
    own = measured.seconds[name]
    time_ms = summarize([1e3 * seconds for seconds in figures(own)])
    return {
        "time_ms": asdict(time_ms),
        "ratio_to_mm": asdict(summarize(ratios(own, measured.seconds[LIMIT]))),
        "speedup_of_mh_step": asdict(summarize(ratios(own, measured.seconds[OURS]))),
        "samples_per_row": samples_per_row,
        "samples_per_second": rows * samples_per_row / (time_ms.median / 1e3) if samples_per_row else None,
        "calls_per_figure": measured.plans[name].repeats,
    }


def table(records: Sequence[dict]) -> str:
    """The results as lines of text, one peer a line."""
    head = f"{'n x m x d':>18}  {'peer':<12}{'rounds':>6}{'median ms':>11}{'quartiles ms':>20}{'/ mm':>9}"
    lines = [head + f"{'speed-up':>10}{'samples/s':>11}"]
    for record in records:
        for name, peer in record["peers"].items():
            time_ms, rate = peer["time_ms"], peer["samples_per_second"]
            quartiles = f"{time_ms['lower_quartile']:.4g} .. {time_ms['upper_quartile']:.4g}"
            row = f"{shape(record):>18}  {name:<12}{time_ms['count']:>6}{time_ms['median']:>11.4g}{quartiles:>20}"
            row += f"{peer['ratio_to_mm']['median']:>9.2f}{peer['speedup_of_mh_step']['median']:>10.2f}"
            lines.append(row + f"{'-' if rate is None else format(rate, '.3g'):>11}")
    return "\n".join(lines)


def shape(record: dict) -> str:
    """`n x m x d` of a record."""
    return f"{record['n']} x {record['m']} x {record['d']}"


def notes(records: Sequence[dict]) -> str:
    """How to read the table, and which peers were given fewer rounds."""
    lines = [
        "/ mm: time over that of the matrix product. speed-up: of mh_step over this peer. Both are medians over rounds",
        "of the ratio within one round, not ratios of medians. samples/s counts what a call returns for all rows:",
        "naive draws m/4 independent samples a row, mh_step and the loops return states of walks (correlated).",
    ]
    for record in records:
        for name, peer in record["peers"].items():
            taken = peer["time_ms"]["count"]
            if taken < record["rounds"]:
                lines.append(
                    f"{name} at {shape(record)} is slow and took part in {taken} of {record['rounds']} rounds."
                )
    return "\n".join(lines)


def command_line(arguments: Sequence[str]) -> str:
    """The command that made the results; absolute paths, which mean nothing elsewhere, are cut to their last part."""
    words = [re.sub(r"^(--[^=]+=)?/.*/", r"\1", word) for word in arguments]
    return shlex.join(["python", "bench/throughput.py", *words])


def write_results(results: dict[str, object], path: str) -> Path:
    """Write JSON to `path`, or to bench/results/<machine>.json where none was named."""
    default = Path(__file__).resolve().parent / "results" / f"{machine.slug(results['machine'])}.json"
    target = default if path == BY_MACHINE else Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    return target


def heading(described: dict[str, object], command: str) -> str:
    """Machine, versions and command, as lines of text."""
    cores = f"{described['usable_cores']} of {described['cores']} cores, {described['threads']} threads"
    changes = " with changes" if described["dirty"] else ""
    return (
        f"{described['device']}; {cores}, load {described['load_average']}; {command}\n"
        f"emc2_kernels {described['emc2_kernels']}, commit {described['commit']}{changes};"
        f" torch {described['torch']}, python {described['python']}"
    )


def measure_memory(options: argparse.Namespace) -> dict[str, object]:
    """Measure the peak extra memory of one sweep, print it, and return its record."""
    chosen = {"dtype": options.dtype, "device": options.device, "backend": options.backend}
    sweep = memory.measure(options.memory, threads=torch.get_num_threads(), **chosen)
    print(
        f"peak extra memory of mh_step at {shape(sweep)}, num_samples = 1: {sweep['peak_extra_mb']:.1f} MB (10^6 bytes)"
    )
    print(f"(the scores alone would be {sweep['score_matrix_mb']:.1f} MB in float32), measured by")
    print(f"{sweep['how']}.")
    return sweep


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for, print it, and write it where `--json` says."""
    started = time.perf_counter()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    described, command = machine.describe(torch.device(options.device)), command_line(arguments)
    print(heading(described, command))
    swept = [measure_memory(options)] if options.memory else []
    timed = [time_size(size, options) for size in options.sizes]
    print(table(timed))
    print(notes(timed))
    print(f"{time.perf_counter() - started:.0f} s in all")
    if options.json:
        results = {
            "schema": SCHEMA,
            "command": command,
            "machine": described,
            "available_backends": [name for name, reason in emc2.backends().items() if reason == "available"],
            "settings": {name: getattr(options, name) for name in ("backend", "temperature", "num_samples", "quick")},
            "throughput": timed,
            "memory": swept,
        }
        print(f"written to {write_results(results, options.json)}")


if __name__ == "__main__":
    main()
