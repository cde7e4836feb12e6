"""Measures candidates for the settings of the Triton kernels on the GPU that is here, and prints rows for tuning.py.

    python -m bench.gpu.tune [--budget SECONDS] [--quick] [--json PATH]
    python -m bench.gpu.tune --warm 3/16     compiles every 16th candidate, from the third on (counted from 0)
    python -m bench.gpu.tune --rehearse      every line in Triton's interpreter at toy sizes; the figures mean nothing

The candidates (candidates.py) are compiled first, by as many processes as there are cores, in at most half of the
budget; those that compiled and ran are then measured, the most important shapes first, and what has been measured when
the budget ends is written. Nothing of this runs in a user's program: what it prints is read, judged and typed into
`emc2_kernels/backends/triton/tuning.py` by hand, with the GPU's name in the row's last field.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.gpu.candidates import SHAPES, TOYS, Shape, candidates
from bench.gpu.context import DEAD_CONTEXT, context_is_alive
from bench.gpu.peers import LseStep
from bench.harness import machine
from bench.harness.processes import module_command, run_logged
from bench.harness.report import write_json
from bench.harness.timing import FEWEST_ROUNDS, Timer, cpu_timer, cuda_timer, figures, interleave, summarize
from bench.peers import MHStep, item_ids, make_operands

ROUNDS, FINALISTS = 9, 4
FINAL_SECONDS = 1.0  # for all of a finalist's rounds, of which there are no fewer than timing.FEWEST_ROUNDS
TURN = 0.005  # seconds of a round at least, as timing.interleave has it
MOST_PROCESSES = 16


def make_call(shape: Shape, device: torch.device) -> Callable[[], object]:
    """One call of such a shape on random unit vectors; walks with the ids that a loss gives."""
    operands = make_operands(shape.n, shape.m, shape.d, shape.dtype, device)
    if shape.kind in ("lse", "lse_gradient"):
        return LseStep(*operands, 0.07, "triton", backward=shape.kind == "lse_gradient")
    count, ids = shape.draws or shape.m, item_ids(shape.n, shape.m, device)
    return MHStep(*operands, 0.07, count // 2, min(16, count // 2), "triton", shape.draws or None, ids)


class Tuner:
    """Puts one candidate after the other in the place of the table's row."""

    def __init__(self, shape: Shape, device: torch.device, tuning: ModuleType) -> None:
        self.tuning, self.kind = tuning, shape.kind
        self.table = getattr(tuning, shape.kind)
        self.call = make_call(shape, device)

    def candidate_call(self, candidate: Any) -> Callable[[], object]:
        """A call with the candidate's sizes."""

        def call() -> object:
            setattr(self.tuning, self.kind, lambda *key: candidate)
            try:
                return self.call()
            finally:
                setattr(self.tuning, self.kind, self.table)

        return call

    def measure(
        self, tried: Sequence[Any], deadline: float, timer: Timer, clock: Callable[[], float] = time.monotonic
    ) -> list[dict[str, Any]]:
        """The fastest first, each with its quartiles if there was time for the final, which the first of `tried`, the
        row that is shipped, is always in."""
        rough: dict[Any, float] = {}
        for candidate in tried:
            if clock() >= deadline:
                break
            call = self.candidate_call(candidate)
            try:
                call()  # loads the binary
                rough[candidate] = timer(call, 3)
            except Exception as error:  # a candidate that does not fit is none
                print(f"  {tuple(candidate[:-1])}: {first_line(error)}")
        finalists = sorted(rough, key=rough.__getitem__)[:FINALISTS]
        finalists += [one for one in tried[:1] if one in rough and one not in finalists]
        spread = {one: summarize([seconds]) for one, seconds in rough.items()}
        if clock() + sum(final_seconds(rough[one]) for one in finalists) <= deadline:
            calls = {str(place): self.candidate_call(one) for place, one in enumerate(finalists)}
            measured = interleave(calls, ROUNDS, timer=timer, budget_seconds=FINAL_SECONDS)
            spread |= {finalists[int(place)]: summarize(figures(one)) for place, one in measured.seconds.items()}
        rows = [
            {"settings": list(one[:-1]), "shipped": one == tried[0], **summary.__dict__}
            for one, summary in spread.items()
        ]
        return sorted(rows, key=lambda row: row["median"])


def final_seconds(call: float) -> float:
    """What a finalist's calls take, of so many seconds each: warming up, estimating, rounds."""
    turn = call + max(call, TURN)
    return 4 * call + turn + min(ROUNDS * turn, max(FINAL_SECONDS, FEWEST_ROUNDS * turn))


def first_line(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:120]


def jobs(shapes: Sequence[Shape], tuning: ModuleType, rehearsal: bool) -> list[tuple[int, Any]]:
    """(shape's place, candidate), the most important first. The same in every process on the same GPU."""
    generation = tuning.device(0)[0]
    return [
        (place, one) for place, shape in enumerate(shapes) for one in candidates(tuning, shape, generation, rehearsal)
    ]


def share(all_jobs: Sequence[tuple[int, Any]], part: str) -> list[tuple[int, Any]]:
    """Of a list, "i/k" is every k-th from the i-th on."""
    first, step = (int(number) for number in part.split("/"))
    if not 0 <= first < step:
        raise ValueError(f"a share is i/k with 0 <= i < k, got {part}")
    return list(all_jobs[first::step])


def compile_share(
    mine: Sequence[tuple[int, Any]], shapes: Sequence[Shape], device: torch.device, tuning: ModuleType
) -> int:
    """Compiles candidates by running each once; a line of JSON for each says how that went."""
    tuner, of = None, None
    for place, candidate in mine:
        if place != of:  # jobs come shape by shape: one shape's operands at a time
            tuner = None
            tuner, of = Tuner(shapes[place], device, tuning), place
        error = None
        try:
            tuner.candidate_call(candidate)()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:
            error = first_line(failure)
        print(json.dumps({"shape": place, "settings": list(candidate[:-1]), "error": error}), flush=True)
        if error is not None and not context_is_alive(device):
            return DEAD_CONTEXT
    return 0


def compile_all(processes: int, words: Sequence[str], limit: float) -> Iterator[dict[str, Any]]:
    """The lines of so many processes, each with its share; one that is late or lost leaves what it had."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{part}.log" for part in range(processes)]
        commands = [
            module_command("bench.gpu.tune", "--warm", f"{part}/{processes}", *words) for part in range(processes)
        ]
        with ThreadPoolExecutor(processes) as pool:
            # In this process's group, which whoever stops it kills as a whole.
            run = partial(run_logged, own_group=False)
            codes = list(pool.map(run, commands, logs, [limit] * processes))
        for code, log in zip(codes, logs, strict=True):
            text = log.read_text(errors="replace").splitlines()
            if code not in (0, None):
                print(f"  a process that compiled ended with {code}: {text[-1] if text else 'it said nothing'}")
            yield from (json.loads(line) for line in text if line.startswith('{"shape"') and line.endswith("}"))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300, help="seconds for everything (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first two shapes only")
    parser.add_argument("--warm", metavar="I/K", help="compile every K-th candidate from the I-th on, and end")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes in Triton's interpreter")
    return parser.parse_args(arguments)


def print_rows(shape: Shape, rows: Sequence[dict[str, Any]]) -> None:
    """A shape's rows, the fastest first."""
    print(f"{shape}")
    for row in rows:
        mark = "  (shipped)" if row["shipped"] else ""
        spread = f"{row['lower_quartile'] * 1e3:.3f} .. {row['upper_quartile'] * 1e3:.3f}, {row['count']} rounds"
        print(f"  {row['median'] * 1e3:9.3f} ms  [{spread}]  {tuple(row['settings'])}{mark}", flush=True)


def tune(options: argparse.Namespace, device: torch.device, results: dict[str, Any]) -> None:
    """Compiles, measures, and writes after each shape."""
    from emc2_kernels.backends.triton import tuning

    shapes = (TOYS if options.rehearse else SHAPES)[: 2 if options.quick else None]
    words = [word for word in ("--quick", "--rehearse") if getattr(options, word[2:])]
    start = time.monotonic()
    everything = jobs(shapes, tuning, options.rehearse)
    processes = min(machine.usable_cores(), MOST_PROCESSES, len(everything))
    lines = list(compile_all(processes, words, options.budget / 2))
    compiled = {(line["shape"], tuple(line["settings"])) for line in lines if line["error"] is None}
    failed = [line for line in lines if line["error"] is not None]
    results["candidates"] = {"all": len(everything), "compiled": len(compiled), "failed": failed}
    print(f"{len(compiled)} of {len(everything)} candidates compiled in {time.monotonic() - start:.0f} s")
    for line in failed:
        print(f"  {shapes[line['shape']].kind} {tuple(line['settings'])}: {line['error']}")
    for place, shape in enumerate(shapes):
        ready = [one for at, one in everything if at == place and (at, tuple(one[:-1])) in compiled]
        rows = []
        if ready and time.monotonic() < start + options.budget:
            timer = cpu_timer if options.rehearse else cuda_timer
            rows = Tuner(shape, device, tuning).measure(ready, start + options.budget, timer)
        print_rows(shape, rows)
        results["shapes"].append({"shape": [str(field) for field in shape], "ready": len(ready), "rows": rows})
        if options.json is not None:
            write_json(results, options.json)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Tunes, or compiles a share of the candidates."""
    options = parse_arguments(arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif not torch.cuda.is_available():
        print("bench.gpu.tune needs a CUDA GPU, and none is visible to torch", file=sys.stderr)
        return 1
    device = torch.device("cpu" if options.rehearse else "cuda")
    if options.warm is not None:
        from emc2_kernels.backends.triton import tuning

        shapes = (TOYS if options.rehearse else SHAPES)[: 2 if options.quick else None]
        mine = share(jobs(shapes, tuning, options.rehearse), options.warm)
        return compile_share(mine, shapes, device, tuning)
    described = machine.describe(device)
    print(f"{described['device']}; last field of a row that is chosen: {described['device']!r}")
    tune(options, device, {"machine": described, "budget": options.budget, "shapes": []})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
