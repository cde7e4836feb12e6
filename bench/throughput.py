"""Time and memory of one sampling step beside its peers, in one interleaved run.

    python -m bench.throughput                      all sizes: about 25 minutes on 2 cores
    python -m bench.throughput --quick              small sizes and fewer rounds: under 2 minutes
    python -m bench.throughput --save               and JSON, CSV and figures: bench/results/<machine>-throughput.*
    python -m bench.compare old.json new.json       what has become slower
    python -m bench.side_by_side a.json b.json      as a table in Markdown, a column a file

Sweeps propose a batch's keys to all rows; banks are fixed sets of keys from which a few are drawn uniformly. The peers
are described in peers.py, the method in harness/timing.py. Every ratio is the median over rounds of the ratio within a
round.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import emc2_kernels as emc2
from bench.harness import machine, memory
from bench.harness.report import format_csv, notes, plot_all, results_path, shape, table, write_json
from bench.harness.timing import Interleaved, choose_timer, figures, interleave, ratios, summarize
from bench.mixing import UniformWalk
from bench.peers import DRAWS, PEERS, Peer, make_operands
from emc2_kernels import files
from emc2_kernels.backends import TABLE

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_DIM = 128
BANK_ROWS, BANK_DIM = 32, 64  # ten million keys are 2.6 GB then, and scores of one peer 1.3 GB
MEMORY_PEERS = ("mh_step", "gumbel", "naive", "race", "column_loop")
OURS, LIMIT = "mh_step", "mm"
NEAR = 0.1  # of its target, in total variation: how many proposals a new chain needs is told beside the time of 64
MIXING_SCORES = 5_000_000  # that are sorted for it: rows times keys, one row at least
BY_MACHINE = "<machine>"  # stands for the default path of --save, which depends on the device
SCHEMA = 2  # of the results file; raise it when a field changes its meaning

Size = tuple[int, int, int]


class Extent(NamedTuple):
    """What is measured, and for how long."""

    sizes: str
    banks: str
    memory: str
    rounds: int
    figure_seconds: float  # that one figure spans at least
    budget_seconds: float  # of one peer at one size, roughly
    longest_call: float  # seconds; what takes longer is left out, and named


FULL = Extent(
    "32,64,128,512,2048,8192,16384,2048x2048x64,2048x2048x256,2048x2048x1024",
    "10000,100000,1000000,10000000",
    "1024,2048,4096,8192,16384",
    rounds=25,
    figure_seconds=0.01,
    budget_seconds=15.0,
    longest_call=6.0,
)
QUICK = Extent("32,256,1024", "10000,100000,1000000", "1024,4096", 7, 0.003, 1.0, 0.5)
GPU = FULL._replace(sizes=FULL.sizes + ",16384x16384x512", longest_call=1.0)


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
    """A list of sizes with commas between; "none" is an empty one."""
    return [] if text == "none" else [parse_size(part) for part in text.split(",")]


def parse_counts(text: str) -> list[int]:
    """Numbers of a bank's keys with commas between; "none": no bank."""
    return [] if text == "none" else [parse_size(part)[0] for part in text.split(",")]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; options that it leaves out come from `--quick` or the full extent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=parse_sizes, help='of sweeps: n[xm][xd], commas between, or "none"')
    parser.add_argument("--banks", type=parse_counts, help=f'keys of banks, for {BANK_ROWS} rows; or "none"')
    parser.add_argument("--memory", type=parse_sizes, help='sizes whose peak memory is taken, or "none"')
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of queries and keys (%(default)s)")
    parser.add_argument("--backend", default="auto", help="of mh_step; auto also times the others (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (as torch chooses)")
    parser.add_argument("--temperature", type=float, default=0.07, help="(%(default)s)")
    parser.add_argument("--num-samples", type=int, default=16, help="of mh_step, per row (%(default)s)")
    parser.add_argument("--rounds", type=int, help=f"({FULL.rounds}; {QUICK.rounds} with --quick)")
    parser.add_argument("--quick", action="store_true", help="small sizes and fewer, shorter rounds")
    results = "write PATH (.json), and a .csv and figures beside it (bench/results/<machine>-throughput.json)"
    parser.add_argument("--save", nargs="?", const=BY_MACHINE, metavar="PATH", help=results)
    options = parser.parse_args(arguments)
    options.extent = QUICK if options.quick else GPU if options.device == "cuda" else FULL
    for name, parse in (("sizes", parse_sizes), ("banks", parse_counts), ("memory", parse_sizes)):
        if getattr(options, name) is None:
            setattr(options, name, parse(getattr(options.extent, name)))
    options.rounds = options.rounds or options.extent.rounds
    reason = {"auto": "available", **emc2.backends()}.get(options.backend, "no such backend")
    if reason != "available":
        parser.error(f"--backend {options.backend}: {reason}")
    return options


def other_backends(options: argparse.Namespace) -> list[str]:
    """Those that can run such operands here, where none was named; but for "cpu", which is all that "auto" chooses on
    a CPU."""
    if options.backend != "auto":
        return []
    device, dtype = options.device, getattr(torch, options.dtype)
    return [
        name
        for name, backend in TABLE.items()
        if name != "cpu"
        and backend.why_unavailable() is None
        and (backend.devices is None or device in backend.devices)
        and (backend.dtypes is None or dtype in backend.dtypes)
    ]


def time_size(kind: str, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Time all peers at one size. Returns the size and, for each peer, times, ratios and samples per second."""
    n, m, d = size
    device, extent = torch.device(options.device), options.extent
    queries, keys = make_operands(n, m, d, getattr(torch, options.dtype), device)
    settings = {"temperature": options.temperature, "num_samples": options.num_samples, "backend": options.backend}
    builders = PEERS[kind](queries, keys, others=other_backends(options), **settings)
    timer = choose_timer(device)
    peers, left_out = drop_slow(builders, timer, extent.longest_call)
    pace = {"min_seconds": extent.figure_seconds, "budget_seconds": extent.budget_seconds, "warmup": 1}
    measured = interleave(peers, options.rounds, timer=timer, **pace)
    records = {
        name: peer_record(name, measured, rows=n, samples_per_row=peer.samples_per_row) for name, peer in peers.items()
    }
    shape = {"kind": kind, "n": n, "m": m, "d": d, "dtype": options.dtype, "rounds": options.rounds}
    found = {**shape, "peers": records, "left_out": left_out}
    if kind == "uniform":
        found["mixing"] = measure_mixing(queries, keys, options.temperature)
    return found


def measure_mixing(queries: Tensor, keys: Tensor, temperature: float) -> dict[str, Any]:
    """How near the target the chains of a bank's rows are that `mh_step` is timed on, were they new: the largest and
    the median over rows of the total variation after `DRAWS` proposals, and of the proposals that `NEAR` needs."""
    rows = max(1, min(len(queries), MIXING_SCORES // len(keys)))
    walks = (UniformWalk((keys.float() @ row.float()).cpu() / temperature) for row in queries[:rows])
    distances, needed = zip(*((walk.distance(DRAWS), walk.proposals_to(NEAR)) for walk in walks), strict=True)
    return {
        "rows": rows,
        "proposals": DRAWS,
        "total_variation": {"median": statistics.median(distances), "largest": max(distances)},
        "near": NEAR,
        "proposals_to_near": {"median": statistics.median(needed), "largest": max(needed)},
    }


def drop_slow(
    builders: dict[str, Callable[[], Peer]], timer: Callable[[Peer, int], float], longest: float
) -> tuple[dict[str, Peer], dict[str, float]]:
    """The peers of which a call takes at most so many seconds, warmed up, and the seconds of the others. Ours and the
    limit stay, whatever they take."""
    peers, left_out = {}, {}
    for name, build in builders.items():
        peer = build()
        seconds = timer(peer, 1)
        if seconds < 10 * longest:  # the first call may compile
            seconds = timer(peer, 1)
        if seconds <= longest or name in (OURS, LIMIT):
            peers[name] = peer
        else:
            left_out[name] = seconds
    return peers, left_out


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


def command_line(arguments: Sequence[str]) -> str:
    """The command that made the results; absolute paths, which mean nothing elsewhere, are cut to their last part."""
    words = [re.sub(r"^(--[^=]+=)?/.*/", r"\1", word) for word in arguments]
    return shlex.join(["python", "-m", "bench.throughput", *words])


def write_results(results: dict[str, Any], path: str) -> list[Path]:
    """Write JSON to `path`, or to bench/results/<machine>-throughput.json where none was named; CSV and
    figures beside it. <machine>.json is that of bench/gpu/benchmark.py."""
    target = results_path(results["machine"], "-throughput.json") if path == BY_MACHINE else Path(path)
    write_json(results, target)
    files.write(target.with_suffix(".csv"), format_csv(results))
    return [target, target.with_suffix(".csv"), *plot_all(results, target.with_suffix(""))]


def heading(described: dict[str, object], command: str) -> str:
    """Machine, instruction sets, versions and command, as lines of text."""
    cores = f"{described['usable_cores']} of {described['cores']} cores"
    changes = " with changes" if described["dirty"] else ""
    return (
        f"{machine.heading(described, f'{cores}; {command}')}\n"
        f"emc2_kernels {described['emc2_kernels']}, commit {described['commit']}{changes}; python {described['python']}"
    )


def call_growth(peer: str, size: Sequence[int], dtype: str, device: str, backend: str) -> int:
    """Peak extra bytes of one call of a peer of sweeps with one sample per row, the operands in place. The buffers that
    a peer makes for itself count."""
    where, kind = torch.device(device), getattr(torch, dtype)
    settings = {"temperature": 0.07, "num_samples": 1, "backend": backend}
    build_small, build = (
        PEERS["sweep"](*make_operands(n, m, size[2], kind, where), **settings)[peer] for n, m in ((256, 256), size[:2])
    )
    warmed_up = build_small()
    return memory.warm_growth(warmed_up, lambda: build()(), where, kind)


def measure_memory(peer: str, size: Size, *, dtype: str, device: str, backend: str) -> dict[str, Any]:
    """The record of a peer's `call_growth`, in a process of its own."""
    n, m, d = size
    growth = memory.call_isolated("bench.throughput", "call_growth", peer, size, dtype, device, backend)
    return {
        "peer": peer,
        "n": n,
        "m": m,
        "d": d,
        "num_samples": 1,
        "dtype": dtype,
        "peak_extra_mb": growth / 1e6,
        "score_matrix_mb": n * m * 4 / 1e6,
        "how": memory.HOW[torch.device(device).type],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for, print it, and write it where `--save` says."""
    started = time.perf_counter()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    described, command = machine.describe(torch.device(options.device)), command_line(arguments)
    print(heading(described, command))
    # First: a process inherits its parent's peak, and would have to fill gigabytes to see its own.
    swept, chosen = [], {"dtype": options.dtype, "device": options.device, "backend": options.backend}
    for size in options.memory:
        swept += [measure_memory(peer, size, **chosen) for peer in MEMORY_PEERS]
        named = ", ".join(
            f"{one['peer']} {one['peak_extra_mb']:.1f}" for one in swept if (one["n"], one["m"]) == size[:2]
        )
        print(f"peak extra memory at {shape(swept[-1])}, MB (10^6 bytes): {named}", flush=True)
    cases = [("sweep", size) for size in options.sizes]
    cases += [("uniform", (BANK_ROWS, keys, BANK_DIM)) for keys in options.banks]
    timed = []
    for case in cases:
        timed.append(time_size(*case, options))
        print(table(timed[-1:], head=len(timed) == 1), flush=True)
    print(notes(timed))
    print(f"{time.perf_counter() - started:.0f} s in all")
    if options.save:
        results = {
            "schema": SCHEMA,
            "command": command,
            "machine": described,
            "available_backends": [name for name, reason in emc2.backends().items() if reason == "available"],
            "settings": {name: getattr(options, name) for name in ("backend", "temperature", "num_samples", "quick")},
            "throughput": timed,
            "memory": swept,
        }
        print("written: " + ", ".join(str(path) for path in write_results(results, options.save)))


if __name__ == "__main__":
    main()
