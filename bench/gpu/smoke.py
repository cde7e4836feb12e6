"""Smoke test of every kernel family on a GPU: is it right, in a minute, against float64 on the same device.

    python -m bench.gpu.check --stages smoke   every family in a process of its own, which may hang or lose the GPU
    python -m bench.gpu.smoke --list           their names
    python -m bench.gpu.smoke --family NAME    one, in this process; its result as a line of JSON, last on stdout
    python -m bench.gpu.smoke ... --warm       only calls the kernels, which compiles and loads them; compares nothing
    python -m bench.gpu.smoke ... --rehearse   on the CPU at toy sizes; the figures mean nothing

Exits with 0 where the family passes, is skipped or warmed, 1 where it fails, 2 where it was called wrongly.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

import emc2_kernels as emc2
from bench.gpu import families, isir_loss_trials, loss_trials
from bench.gpu.families import (
    ALIGNED,
    FEW_ROWS,
    FEW_ROWS_WIDE,
    FILLS,
    GATHERED,
    GATHERED_SPLIT,
    LONG,
    SPLIT,
    SPLIT_LONG,
    SPLIT_TILES,
    WHOLE_TILES,
)
from bench.gpu.trial import Case, Context, Trial
from emc2_kernels.backends import gpu

MOST_WORDS = 2000
NO_GPU = "bench.gpu.smoke needs a CUDA GPU and found none; --rehearse walks every family on the CPU at toy sizes"


class Family(NamedTuple):
    """Kernels that stand or fall together, and how many binaries a process has to compile for them: few."""

    kind: str  # of backend: "triton", "cuda", or what of that only a GPU of compute capability 9.0 has: "hopper"
    trials: Callable[[Context, str], Iterator[Trial]]


HALF, SINGLE = torch.bfloat16, torch.float32
BOTH_GATHERED = tuple({"kind": kind, "shapes": (GATHERED, GATHERED_SPLIT)} for kind in ("uniform", "given"))
SMALL_LOSS = partial(loss_trials.losses, b=(32, 6), items=(64, 12), d=128, dtype=HALF)


def _walks(kind: str, **options: object) -> Family:
    return Family(kind, partial(families.walks, **({"d": 128, "dtype": HALF} | options)))


def _variants(kind: str, *each: dict[str, object], **options: object) -> Family:
    return Family(kind, partial(families.walk_variants, each=each, **({"d": 128, "dtype": HALF} | options)))


def _triton(function: Callable[..., Iterator[Trial]], **options: object) -> Family:
    return Family("triton", partial(function, **options))


FAMILIES = {
    "sweep-128": _walks("triton", shapes=(FILLS,)),
    "sweep-512": _walks("triton", d=512, temperature=0.5, shapes=(FILLS, FEW_ROWS_WIDE)),
    "sweep-replayed-128": _walks("triton", shapes=(LONG, SPLIT_LONG), num_samples=3),
    "sweep-replayed-512": _walks("triton", d=512, temperature=1.0, shapes=(LONG,), num_samples=3),
    "sweep-replayed-options": _walks("triton", shapes=(SPLIT_LONG,), num_samples=3, full=True, counts=True),
    "sweep-float32": _walks("triton", dtype=SINGLE, shapes=(SPLIT, ALIGNED)),
    "sweep-split": _walks("triton", shapes=(SPLIT, ALIGNED, FEW_ROWS)),
    "sweep-counts": _walks("triton", shapes=(FILLS,), counts=True),
    "sweep-split-counts": _walks("triton", shapes=(SPLIT,), counts=True),
    "sweep-options": _walks("triton", d=100, shapes=(FILLS, SPLIT), full=True, counts=True),
    "gathered": _variants("triton", *BOTH_GATHERED, counts=True),
    "gathered-options": _variants("triton", *BOTH_GATHERED, d=512, dtype=SINGLE, temperature=0.5, full=True),
    "gumbel-1": _triton(families.gumbels, num_samples=1, full=False),
    "gumbel-5": _triton(families.gumbels, num_samples=5, full=True),
    "isir-128": _triton(families.isirs, d=128, dtype=HALF, full=False),
    "isir-options": _triton(families.isirs, d=100, dtype=HALF, full=True),
    "isir-float32": _triton(families.isirs, d=512, dtype=SINGLE, full=True),
    "lse-128": _triton(families.lses, d=128, dtype=HALF),
    "lse-512": _triton(families.lses, d=512, dtype=HALF),
    "lse-float32": _triton(families.lses, d=128, dtype=SINGLE),
    "loss-32": Family("triton", SMALL_LOSS),
    "loss-2500": _triton(loss_trials.losses, b=(2500, 20), items=(4000, 40), d=128, dtype=SINGLE),
    "isir-loss-32": _triton(isir_loss_trials.losses, b=(32, 6), items=(64, 12), d=128, dtype=HALF),
    "isir-loss-500": _triton(isir_loss_trials.losses, b=(500, 20), items=(1000, 40), d=512, dtype=SINGLE),
    "graph": _triton(families.graphs),
    "loss-graph": _triton(loss_trials.loss_graphs, sampler="mh"),
    "isir-loss-graph": _triton(loss_trials.loss_graphs, sampler="isir"),
    "by-address": _triton(families.by_address),
    "log2": _triton(families.logarithms),
    "cuda-sweep": _variants(
        "cuda",
        {"shapes": (SPLIT, ALIGNED)},
        {"shapes": (SPLIT,), "d": 37, "full": True},
        {"shapes": (ALIGNED,), "dtype": SINGLE},
        counts=True,
    ),
    "cuda-gathered": _variants(
        "cuda", *BOTH_GATHERED, *({**each, "full": True} for each in BOTH_GATHERED), counts=True
    ),
    "hopper-sweep-128": _variants(
        "hopper",
        {"shapes": (WHOLE_TILES, SPLIT_TILES)},
        {"shapes": (SPLIT_TILES,), "dtype": torch.float16, "d": 72},
    ),
    "hopper-sweep-samples": _walks("hopper", shapes=(WHOLE_TILES,), num_samples=200),
    "hopper-sweep-512": _walks("hopper", d=512, temperature=0.5, shapes=(WHOLE_TILES, SPLIT_TILES)),
    "hopper-sweep-options": _walks("hopper", shapes=(WHOLE_TILES, SPLIT_TILES), full=True, weights=False),
    "cuda-loss": Family("cuda", SMALL_LOSS),  # Triton's kernels around the CUDA walk
    "cuda-graph": Family("cuda", families.graphs),
    "cuda-log2": Family("cuda", families.kernel_draws),
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="names of the families, one a line")
    parser.add_argument("--family", choices=FAMILIES, metavar="NAME", help="one family, in this process")
    parser.add_argument("--warm", action="store_true", help="only call the kernels")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--backend", choices=("cpu", "reference", "triton"),
                        help="of a rehearsal, in Triton's place (cpu); triton needs TRITON_INTERPRET=1")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.backend and not options.rehearse:
        parser.error("--backend goes with --rehearse")
    if not options.list and options.family is None:
        parser.error("--family or --list is needed; bench.gpu.check --stages smoke tries every family")
    return options


def make_context(options: argparse.Namespace) -> Context:
    """The GPU, or the CPU and the backends that can run on it."""
    if not options.rehearse:
        return Context(torch.device("cuda", torch.cuda.current_device()))
    native = "cpu" if emc2.backends()["cpu"] == "available" else "reference"
    return Context(torch.device("cpu"), options.backend or native, "reference")


def finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None


def verdict(cases: Sequence[Case]) -> dict[str, object]:
    """Of a family that ran to its end: its largest error is the one that came nearest to its bound."""
    why = "; ".join(filter(None, (case.failure() for case in cases)))
    worst = max(cases, key=lambda case: case.nearness)
    return {
        "status": "FAIL" if why else "PASS",
        "largest_error": finite(worst.largest_error),
        "why": why[:MOST_WORDS],
    }


def run_family(name: str, context: Context, warm: bool = False) -> dict[str, object]:
    """One family's record. Whatever a kernel, a compiler or the driver raises is its failure."""
    started = time.perf_counter()
    family, cases, at = FAMILIES[name], [], "making operands"
    backend = context.backend(family.kind)
    record: dict[str, object] = {"family": name, "status": "WARM", "cases": [], "largest_error": None}
    record |= {"seconds": 0.0, "why": ""}
    reason = emc2.backends()[backend]
    if reason != "available":
        status = "FAIL" if family.kind == "triton" else "SKIP"
        return record | {"status": status, "why": f"backend {backend!r}: {reason}"[:MOST_WORDS]}
    if family.kind == "hopper" and not context.rehearsal and gpu.architecture() != gpu.MATRIX_SWEEP_ARCHITECTURE:
        return record | {"status": "SKIP", "why": f"the kernel is for sm_90, and this GPU is sm_{gpu.architecture()}"}
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # bounds are those of full products
    try:
        for trial in family.trials(context, backend):
            at = trial.name
            found = trial.call()
            context.synchronize()
            if not warm:
                cases += trial.judge(found)
            at = "making operands"
        record |= {} if warm else verdict(cases)
    except Exception as error:
        record |= {"status": "FAIL", "why": f"{at}: {type(error).__name__}: {error}"[:MOST_WORDS]}
    record["cases"] = [case.record() for case in cases]
    return record | {"seconds": round(time.perf_counter() - started, 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; the exit status."""
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(FAMILIES))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print(NO_GPU)
        return 1
    record = run_family(options.family, make_context(options), options.warm)
    print(json.dumps(record), flush=True)
    return 1 if record["status"] == "FAIL" else 0


if __name__ == "__main__":
    sys.exit(main())
