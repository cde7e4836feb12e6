"""The losses over a whole batch beside public kernels, on a GPU: time, share of the card's peak, memory; and the goals.

    python -m bench.gpu_peers              bench/results/<gpu>-peers.json, and a table; about a minute and a half
    python -m bench.gpu_peers --only CLIP-16384-512    cases whose names begin so: LOSS-PAIRS-DIM; --list prints them
    python -m bench.gpu_peers --resume     the cases that the file lacks
    python -m bench.gpu_peers --rehearse   on the CPU, at toy sizes; the figures mean nothing

    pip install memeff==0.3.1              first, or that peer is reported as not installed; nothing else needs it

Forward and backward of raw bfloat16 embeddings: `NTXentLoss` and `ClipLoss` beside memeff (CLIP alone), plain torch,
the same under torch.compile, and cuBLAS alone, which makes the products and nothing else (gpu/contestants.py).

Share: of the bfloat16 peak that the card is sold with (gpu/peaks.py) or, of a card that is not in that table, of its
fastest product here. All are credited with the same work, three products of n x m x d, which are 6 n m d operations:
the scores, the gradient of the rows, that of the keys. n = m = 2b for NT-Xent, b for CLIP. What is computed twice to
save memory is not counted: a loss that makes its scores again keeps the tensor cores busy for more than its share.

Contestants of a case take turns (harness/timing.py); a figure is the median over rounds, with quartiles. Memory is the
peak of one call above what was in use before it. One that runs out of memory, or whose value or gradient is not that of
the first, is told as that. Goals: a sweep of 32,768 rows and keys takes at most 1.2 times torch.mm at d = 512 and 1.0
times at d = 128; NT-Xent reaches half of the peak at d = 512.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import emc2_kernels as emc2
from bench.gpu import benchmark, rows
from bench.gpu.contestants import CONTESTANTS, Missing, memeff_version, rows_and_keys, useful_flops
from bench.gpu.context import DEAD_CONTEXT, Context, context_is_alive
from bench.gpu.limits import BEST
from bench.gpu.peaks import Peak, find_peak
from bench.harness import machine
from bench.harness.report import REHEARSAL, results_path, write_json
from bench.harness.timing import figures, ratios, summarize
from bench.peers import LossStep, make_operands

SCHEMA = 1
NO_GPU = 1  # an exit status, as DEAD_CONTEXT
SHARE_GOAL = 0.5  # of the peak, at least: NT-Xent, forward and backward
SHARE_GOAL_DIM = 512
DIFFERS = 0.05  # relative: bfloat16 scores of plain torch are off by less


class Case(NamedTuple):
    """A loss of b pairs of d elements."""

    loss: str
    b: int
    d: int

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.b}-{self.d}"


# In the order of their weight: what the time limit cuts off stands last.
CASES = [
    Case(loss, b, d)
    for sizes in ([16_384], [4096, 65_536], [32_768, 8192])
    for d in (512, 128)
    for b in sizes
    for loss in CONTESTANTS
]
TOY_CASES = [Case(loss, 64, d) for d in (32, 16) for loss in CONTESTANTS]


def cases(rehearsal: bool) -> list[Case]:
    """In order."""
    return TOY_CASES if rehearsal else CASES


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the cases' names, one a line, and end")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="cases whose names begin so")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="PATH", help="results file (bench/results/<gpu>-peers.json)")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the results file has already")
    parser.add_argument("--budget", type=float, default=100, help="seconds; no case is begun after them (%(default)g)")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(arguments)
    options.cases = cases(options.rehearse)
    for name in options.only:
        if not any(case.name.startswith(name) for case in options.cases):
            parser.error(f"--only {name}: the cases are {', '.join(case.name for case in options.cases)}")
    return options


def first_call(call: Callable[[], object]) -> dict[str, float]:
    """A call's value and the length of z0's gradient, of those that have them."""
    call()
    if not isinstance(call, LossStep):
        return {}
    value = call.loss(call.z0, call.z1, None)
    gradient = torch.autograd.grad(value, call.z0)[0]
    return {"value": float(value.detach()), "gradient": float(gradient.float().norm())}


def why_not(error: BaseException) -> str:
    """A contestant that does not run is a result."""
    if isinstance(error, Missing):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {error}"[:500]


def differs(found: dict[str, float], ours: dict[str, float]) -> str | None:
    """What a contestant computes that is not what ours does; None: nothing."""
    for name in found.keys() & ours.keys():
        if not abs(found[name] - ours[name]) <= DIFFERS * abs(ours[name]):
            return f"{name} {found[name]:.4g}, and ours {ours[name]:.4g}"
    return None


def run_case(case: Case, context: Context, peak: Peak | None) -> dict[str, object]:
    """A record: of each contestant time, share and memory, or why there are none."""
    started = time.perf_counter()
    z0, z1 = make_operands(case.b, case.b, case.d, torch.bfloat16, context.device)
    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, dict] = {name: {} for name in CONTESTANTS[case.loss]}
    ours: dict[str, float] = {}
    for name, make in CONTESTANTS[case.loss].items():
        try:
            calls[name] = make(z0, z1, context.rehearsal)
            values = first_call(calls[name])
            found[name]["peak_mb"] = context.peak_megabytes(calls[name])
        except Exception as error:  # memory, a compiler, a package: the others go on
            calls.pop(name, None)
            found[name] = {"why": why_not(error)}
            if isinstance(error, RuntimeError) and not context_is_alive(context.device):
                break
        else:
            ours = ours or values
            found[name] |= values | {"differs": differs(values, ours)}
        gc.collect()
        _free(context.device)
    if context_is_alive(context.device):
        _time(case, calls, found, context, peak)
    n, m = rows_and_keys(case.loss, case.b)
    sizes = {"loss": case.loss, "b": case.b, "d": case.d, "n": n, "m": m, "dtype": "bfloat16"}
    seconds = round(time.perf_counter() - started, 1)
    return {"name": case.name, **sizes, "flops": useful_flops(*case), "contestants": found, "seconds": seconds}


def _free(device: torch.device) -> None:
    """What one contestant has taken is the next one's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _time(
    case: Case, calls: dict[str, Callable[[], object]], found: dict[str, dict], context: Context, peak: Peak | None
) -> None:
    """Adds times to the records, and what they are a share of. Where memory is too small for all to take turns, those
    that need most have none."""
    while True:
        try:
            measured = context.measure(calls)
            break
        except torch.OutOfMemoryError:
            largest = max(calls, key=lambda name: found[name]["peak_mb"])
            del calls[largest]
            found[largest]["why"] = "out of memory beside the others"
            _free(context.device)
        except Exception as error:
            for name in calls:
                found[name]["why"] = why_not(error)
            return
    own = measured.seconds.get(next(iter(found)))
    for name, series in measured.seconds.items():
        taken = figures(series)
        found[name]["time_ms"] = asdict(summarize([1e3 * seconds for seconds in taken]))
        if peak is not None:
            shares = [useful_flops(*case) / seconds / peak.flops for seconds in taken]
            found[name]["share_of_peak"] = asdict(summarize(shares))
        if own is not None:
            found[name]["time / ours"] = asdict(summarize(ratios(series, own)))


def sweep_backends(context: Context) -> list[str]:
    """Those that walk on matrix units here."""
    if context.rehearsal:
        return ["reference"]
    hopper = benchmark.is_hopper(context.device) and emc2.backends()["cuda"] == "available"
    return ["triton", "cuda"] if hopper else ["triton"]


def run_sweep(d: int, context: Context, backend: str) -> dict[str, object]:
    """The goal of a large sweep beside torch.mm, in turns with it."""
    bound = rows.SWEEP_GOALS[d]
    goal = {"goal": f"sweep-{d} [{backend}]: time / torch.mm", "sense": "<=", "bound": bound}
    try:
        row = rows.sweep(context, backend, d, bound)
    except Exception as error:
        return goal | {"answer": f"not known: {why_not(error)}"}
    return goal | answer(row.goals[0] | {"bound": bound}, context.rehearsal)


def share_goal(records: Sequence[dict], peak: Peak | None, rehearsal: bool) -> dict[str, object]:
    """Of NT-Xent at the batch size at which it does best."""
    goal = {
        "goal": f"NT-Xent, forward and backward, d = {SHARE_GOAL_DIM}: share of the peak, at its best b",
        "sense": ">=",
        "bound": SHARE_GOAL,
    }
    ours = next(iter(CONTESTANTS["NT-Xent"]))
    of_cases = [case for case in records if case["loss"] == "NT-Xent" and (rehearsal or case["d"] == SHARE_GOAL_DIM)]
    known = [(case["contestants"][ours].get("share_of_peak"), case["b"]) for case in of_cases]
    shares = [(share["median"], b, share) for share, b in known if share]
    if not shares:
        why = "no share was measured" if peak else "the card's peak is not known"
        return goal | {"answer": f"not known: {why}"}
    _, b, best = max(shares, key=lambda each: each[0])
    quartiles = {name: best[name] for name in ("lower_quartile", "upper_quartile")}
    return goal | {"b": b} | answer({"value": best["median"], "bound": SHARE_GOAL, **quartiles}, rehearsal, more=True)


def answer(figure: dict, rehearsal: bool, *, more: bool = False) -> dict[str, object]:
    """Value, quartiles and verdict. more: the more the better."""
    value, bound = figure["value"], figure["bound"]
    missed = (bound - value if more else value - bound) / bound
    verdict = "met" if missed <= 0 else f"missed by {missed:.0%}"
    quartiles = {name: figure[name] for name in ("lower_quartile", "upper_quartile")}
    return {"value": value, **quartiles, "answer": "a rehearsal answers nothing" if rehearsal else verdict}


def table(results: dict) -> str:
    """A line for each contestant, then one for each goal."""
    peak = results["peak"]
    known = f"{peak['flops'] / 1e12:g} TFLOP/s ({peak['source']})" if peak else "not known"
    lines = [f"shares are of {known}; all contestants are credited with 6 n m d operations"]
    lines.append(f"{'case':<20}{'contestant':<15}{'ms':>10}{'quartiles':>20}{'/ ours':>8}{'share':>8}{'extra MB':>10}")
    for case in results["cases"]:
        if "why" in case:
            lines.append(f"{case['name']:<20}{case['why']}")
        lines += [f"{case['name']:<20}{line(*each)}" for each in case.get("contestants", {}).items()]
    for goal in results["goals"]:
        value = f" {goal['value']:.3g}" if "value" in goal else ""
        lines.append(f"{goal['goal']}{value}, goal {goal['sense']} {goal['bound']:g}: {goal['answer']}")
    return "\n".join(lines)


def line(name: str, record: dict) -> str:
    """Of one contestant in a case."""
    if "time_ms" not in record:
        return f"{name:<15}{record.get('why', 'not run')}"
    time_ms = record["time_ms"]
    spread = f"{time_ms['lower_quartile']:.4g} .. {time_ms['upper_quartile']:.4g}"
    share, ratio = (record.get(each, {}).get("median") for each in ("share_of_peak", "time / ours"))
    figures_ = f"{time_ms['median']:>10.4g}{spread:>20}{'-' if ratio is None else format(ratio, '.2f'):>8}"
    figures_ += f"{'-' if share is None else format(share, '.1%'):>8}{record['peak_mb']:>10.0f}"
    return f"{name:<15}{figures_}" + (f"  DIFFERS: {record['differs']}" if record.get("differs") else "")


def run_all(options: argparse.Namespace, context: Context, results: dict, target: Path) -> int:
    """Every case and goal, within the budget; the file is written after each. Returns the exit status."""
    deadline = time.perf_counter() + options.budget
    peak = results["peak"] and Peak(**results["peak"])
    swept, have = list(results["goals"]), {case["name"] for case in results["cases"]}
    for d in () if options.only or swept else rows.SWEEP_GOALS:
        swept += [run_sweep(d, context, backend) for backend in sweep_backends(context)]
    answer_goals(results, swept, peak, context.rehearsal)
    write_json(results, target)
    for case in options.cases:
        if case.name in have or (options.only and not case.name.startswith(tuple(options.only))):
            continue
        if time.perf_counter() > deadline:
            results["cases"].append(
                {"name": case.name, "loss": case.loss, "why": f"not begun within {options.budget:g} s"}
            )
            continue
        record = run_case(case, context, peak)
        results["cases"].append(record)
        print(f"{case.name} {record['seconds']} s", flush=True)
        answer_goals(results, swept, peak, context.rehearsal)
        write_json(results, target)
        if not context_is_alive(context.device):
            return DEAD_CONTEXT
    write_json(results, target)
    return 0


def answer_goals(results: dict, swept: list[dict], peak: Peak | None, rehearsal: bool) -> None:
    """The sweeps', and the losses' by the cases so far: a run that is killed leaves it so."""
    ran = [case for case in results["cases"] if "contestants" in case]
    results["goals"] = [*swept, share_goal(ran, peak, rehearsal)]


def read_earlier(target: Path) -> tuple[list[dict], list[dict]]:
    """Cases that an earlier run has measured, and its goals of sweeps."""
    earlier = json.loads(target.read_text()) if target.exists() else {"cases": [], "goals": []}
    cases = [case for case in earlier["cases"] if "contestants" in case]
    return cases, [goal for goal in earlier["goals"] if goal["goal"].startswith("sweep-")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases, writes the file, prints the table last."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(case.name for case in options.cases))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("bench.gpu_peers needs a CUDA GPU and found none; --rehearse runs it on the CPU at toy sizes")
        return NO_GPU
    device = torch.device("cpu" if options.rehearse else "cuda")
    context = Context(device, ["triton"], options.quick, options.rehearse, headline=True)
    described = machine.describe(device)
    peak = find_peak(str(described["device"]), lambda: context.limits.best("tensor cores", BEST["tensor cores"]))
    target = options.json or (REHEARSAL if options.rehearse else results_path(described, "-peers.json"))
    kept, goals = read_earlier(target) if options.resume else ([], [])
    results = {
        "schema": SCHEMA,
        "command": shlex.join(["python", "-m", "bench.gpu_peers", *(Path(word).name for word in arguments)]),
        "machine": described,
        "backends": emc2.backends(),
        "memeff": memeff_version(),
        "peak": peak and peak._asdict(),
        "settings": {"quick": options.quick, "rehearsal": options.rehearse},
        "cases": kept,
        "goals": goals,
    }
    status = run_all(options, context, results, target)
    print(
        f"{described['device']}; torch {described['torch']}, triton {described['triton']}, memeff {results['memeff']}"
    )
    print(table(results))
    print(f"written to {target.name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
