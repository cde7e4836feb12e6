"""What the Triton kernels compile to at the shipped tuning, for GPUs that need not be there.

Registers, spills and shared memory come from the assembler; what the main loop asks of each execution pipe, and the
pipe that binds, from the machine code (sass.py). A time is a prediction for an H100, and a lower limit.

    python -m bench.gpu.compiled                the table
    python -m bench.gpu.compiled --bounds       lines of tests/tools/compiled_bounds.py
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from bench.gpu import sass

GENERATIONS = (80, 90, 100)
PROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H100, B200: they decide only how a walk is split


class Case(NamedTuple):
    """A walk whose launches are compiled, or those that a loss makes around its own."""

    dtype: torch.dtype
    n: int
    m: int
    d: int
    # "sweep", "drawn", "given"; no walk: "lse", "gumbel", "isir"; around one, or a step: "loss", "isir loss" of n pairs
    proposals: str
    step: bool = True  # else a transition
    accepts: bool = False
    lse: bool = False
    ids: bool = True  # chain, query and key ids, and labels
    symmetric: bool = False  # the keys are the queries
    all_tensors: bool = False  # per-row temperatures, proposal weights, seed and step too
    samples: int = 16


CASES = {
    "sweep d=128": Case(torch.bfloat16, 32768, 32768, 128, "sweep"),
    "sweep d=512": Case(torch.bfloat16, 32768, 32768, 512, "sweep"),
    "sweep d=128, no ids": Case(torch.bfloat16, 32768, 32768, 128, "sweep", ids=False),
    "sweep d=512, no ids": Case(torch.bfloat16, 32768, 32768, 512, "sweep", ids=False),
    "sweep float32": Case(torch.float32, 4096, 4096, 128, "sweep"),
    "split, lse": Case(torch.bfloat16, 64, 1_000_000, 128, "sweep", lse=True),
    "sweep, nothing given": Case(torch.float16, 4096, 4096, 128, "sweep", ids=False),
    "sweep, all given": Case(torch.float16, 1024, 4096, 128, "sweep", accepts=True, lse=True, all_tensors=True),
    "transition": Case(torch.bfloat16, 1024, 4096, 100, "sweep", step=False, ids=False),
    "drawn, nothing given": Case(torch.float32, 64, 1000, 40, "drawn", ids=False),
    "drawn": Case(torch.bfloat16, 32768, 10_000_000, 128, "drawn", accepts=True),
    "given": Case(torch.bfloat16, 32768, 100_000, 128, "given", step=False),
    "lse d=128": Case(torch.bfloat16, 131072, 131072, 128, "lse"),
    "lse d=256": Case(torch.bfloat16, 32768, 32768, 256, "lse"),
    "lse d=512": Case(torch.bfloat16, 32768, 32768, 512, "lse"),
    "lse d=1024": Case(torch.float16, 8192, 8192, 1024, "lse", ids=False),
    "lse float32": Case(torch.float32, 4096, 4096, 128, "lse"),
    "lse, split": Case(torch.bfloat16, 64, 1_000_000, 100, "lse", all_tensors=True),
    "lse, symmetric": Case(torch.bfloat16, 131072, 131072, 128, "lse", symmetric=True),
    "lse, symmetric d=512": Case(torch.bfloat16, 8192, 8192, 512, "lse", symmetric=True),
    "loss d=128": Case(torch.bfloat16, 32, 32, 128, "loss"),
    "loss d=768": Case(torch.bfloat16, 32, 32, 768, "loss"),
    "isir loss d=128": Case(torch.bfloat16, 32, 32, 128, "isir loss"),
    "isir loss d=512": Case(torch.float16, 32, 32, 512, "isir loss"),
    "isir loss float32": Case(torch.float32, 32, 32, 512, "isir loss"),
    "gumbel d=128": Case(torch.bfloat16, 32768, 100_000, 128, "gumbel"),
    "gumbel d=512": Case(torch.bfloat16, 32768, 100_000, 512, "gumbel", samples=1),
    "gumbel float32": Case(torch.float32, 4096, 100_000, 128, "gumbel", samples=2),
    "gumbel, nothing given": Case(torch.float16, 4096, 4096, 100, "gumbel", ids=False, samples=1),
    "gumbel, split": Case(torch.bfloat16, 64, 1_000_000, 128, "gumbel", all_tensors=True),
    "isir d=128": Case(torch.bfloat16, 32768, 32768, 128, "isir"),
    "isir d=512": Case(torch.bfloat16, 32768, 32768, 512, "isir"),
    "isir d=128, no ids": Case(torch.bfloat16, 32768, 32768, 128, "isir", ids=False),
    "isir float32": Case(torch.float32, 4096, 4096, 128, "isir"),
    "isir, split": Case(torch.bfloat16, 64, 1_000_000, 128, "isir", all_tensors=True),
}


class Launch(NamedTuple):
    """One kernel as `emc2_kernels.backends.triton` would launch it."""

    function: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Work(NamedTuple):
    """What a launch does in all, the fill of its last tiles included."""

    elements: int  # as sass.py defines them
    flops: int  # of products on the matrix units
    l2_bytes: int  # of operands that are loaded from global memory, from the second level cache at best


class Compiled(NamedTuple):
    """What one kernel compiled to."""

    case: str
    generation: int
    kernel: str
    registers: int
    stack: int  # bytes of a thread in slow memory, spilled registers among them
    shared: int  # bytes of a program
    programs: int  # that fit on one multiprocessor by registers (64 K) and shared memory
    pipes: sass.Pipes | None  # of a kernel that is in sass.MARKS
    work: Work | None
    assertions: list[str]  # on values that only the device sees

    @property
    def seconds(self) -> float | None:
        """What the pipe that binds needs for the launch, at least, on an H100; None for other GPUs' code."""
        return sass.seconds(self.pipes, self.work.elements) if self.pipes and self.generation == 90 else None


def launches(case: Case, generation: int) -> list[Launch]:
    """The launches of a walk, without a GPU: on tensors without data."""
    from emc2_kernels.backends.params import WalkParams
    from emc2_kernels.backends.triton import launch, mh, tuning

    seen: list[Launch] = []

    def record(kernel: launch.Kernel, grid: tuple[int, ...], arguments: dict, options: dict) -> None:
        named = {name: arguments[name] for name in kernel.names}
        seen.append(Launch(kernel.function, grid, named, {**options, **launch.ALWAYS}))

    before = launch.Kernel.__call__, tuning.device
    launch.Kernel.__call__ = record
    tuning.device = lambda index: (generation // 10, PROCESSORS[generation])
    try:
        others = {"loss": _loss, "isir loss": _isir_loss, "lse": _sum, "gumbel": _draw, "isir": _resample}
        without_walk = others.get(case.proposals)
        walk = None if without_walk else _walk(case, WalkParams)
        if without_walk:
            without_walk(case)
        elif case.step:
            state = _empty(torch.int64, case.n), _empty(torch.float32, case.n)
            mh.step(walk, *state, _empty(torch.int64, case.m) if case.ids else None, case.accepts, case.lse)
        else:
            mh.transition(walk)
    finally:
        launch.Kernel.__call__, tuning.device = before
    return seen


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sum(case: Case) -> None:
    """A log-sum-exp and its gradient."""
    from emc2_kernels.backends.params import ScoreParams
    from emc2_kernels.backends.triton import lse

    queries, query_ids = _empty(case.dtype, case.n, case.d), _empty(torch.int64, case.n) if case.ids else None
    temperature, row = _empty(torch.float32, case.n) if case.all_tensors else 0.07, _empty(torch.float32, case.n)
    if case.symmetric:
        scores = ScoreParams.among(queries, temperature, query_ids)
    else:
        keys, key_ids = _empty(case.dtype, case.m, case.d), _empty(torch.int64, case.m) if case.ids else None
        scores = ScoreParams(queries, keys, temperature, query_ids, key_ids)
    lse.contrastive_lse(scores)
    lse.contrastive_lse_backward(row, row, scores, True)


def _common_arguments(case: Case) -> tuple:
    """Temperature, seed and step, and the ids of chains, queries and keys."""
    ids = (_empty(torch.int64, case.n), _empty(torch.int64, case.n), _empty(torch.int64, case.m))
    temperature, number = (_empty(torch.float32, case.n), _empty(torch.int64)) if case.all_tensors else (0.07, 0)
    return temperature, number, ids if case.ids else (None,) * 3


def _draw(case: Case) -> None:
    from emc2_kernels.backends.params import ScoreParams
    from emc2_kernels.backends.triton import gumbel

    temperature, number, (chain_ids, *ids) = _common_arguments(case)
    operands = _empty(case.dtype, case.n, case.d), _empty(case.dtype, case.m, case.d)
    gumbel.gumbel_sample(ScoreParams(*operands, temperature, *ids), chain_ids, number, number, case.samples)


def _resample(case: Case) -> None:
    """A step over all keys, with a candidate of each row's own."""
    from emc2_kernels.backends.params import CarriedParams, ScoreParams
    from emc2_kernels.backends.triton import isir

    temperature, number, (chain_ids, *ids) = _common_arguments(case)
    operands = _empty(case.dtype, case.n, case.d), _empty(case.dtype, case.m, case.d)
    carried_ids, labels = (_empty(torch.int64, size) if case.ids else None for size in (case.n, case.m))
    weights = _empty(torch.float32, case.m) if case.all_tensors else None
    scores = ScoreParams(*operands, temperature, *ids, False, carried_ids, weights)
    own = _empty(torch.int64, case.n, 1), _empty(torch.float32, case.n, 1)
    isir.isir_step(scores, CarriedParams(*own, labels, chain_ids, number, number, 0))


def _walk(case: Case, make: Callable) -> Any:
    count = case.m if case.proposals == "sweep" else 256
    temperature, number, ids = _common_arguments(case)
    weights = _empty(torch.float32, case.m) if case.all_tensors else None
    positions = _empty(torch.int64, case.n, count) if case.proposals == "given" else None
    return make(
        _empty(case.dtype, case.n, case.d), _empty(case.dtype, case.m, case.d), temperature, number, number,
        *ids, positions, count if case.proposals == "drawn" else None, weights,
        count // 2, case.samples, 0, count,
    )  # fmt: skip


def _loss_stores(case: Case) -> Any:
    from emc2_kernels.backends.triton import emc2_loss

    slots, number = 2000, _empty(torch.int64)
    return emc2_loss.Stores(
        _empty(torch.int64, slots), _empty(torch.float32, slots), _empty(case.dtype, slots, case.d),
        _empty(torch.int64, slots), number, number,
    )  # fmt: skip


_SHRINKS = (2.0**54, 2.0**-73)


def _loss(case: Case) -> None:
    """A loss's launches around its walk, in training, for n pairs and 16 samples an anchor."""
    from emc2_kernels.backends.triton import emc2_loss

    b, d, stores = case.n, case.d, _loss_stores(case)
    z, options = _empty(case.dtype, b, d), {"temperature": 0.2, "floor": 1e-6}
    more = {"shrinks": _SHRINKS, "seed": 0, "both_views": False, "dtype": case.dtype}
    batch = emc2_loss.gather_batch(z, z, _empty(torch.int64, b), stores, **options, **more)
    samples = _empty(torch.int32, 2 * b, 16)
    made = emc2_loss.mean_negatives(batch, samples, stores.bank, temperature=0.2, return_similarity=False)
    emc2_loss.update_stores(batch, batch.state_key, batch.state_score, stores, _empty(torch.float32))
    emc2_loss.embedding_gradients(
        _empty(torch.float32), batch.anchors, batch.lengths, samples, made.means, made.shares, batch.coin_labels,
        **options, dtype=case.dtype,
    )  # fmt: skip


def _isir_loss(case: Case) -> None:
    """A loss's launches around its step over all candidates, in training, for n pairs and a queue of 16 items."""
    from emc2_kernels.backends.triton import isir_loss

    b, d, stores, sums, queue = case.n, case.d, _loss_stores(case), _empty(torch.float32, 2), _empty(torch.int64, 16)
    z, index, options = _empty(case.dtype, b, d), _empty(torch.int64, b), {"temperature": 0.2, "floor": 1e-6}
    more = {"shrinks": _SHRINKS, "dtype": case.dtype}
    candidates = isir_loss.gather_candidates(z, z, index, stores, queue, **options, **more)
    isir_loss.gate_candidates(candidates, sums, temperature=0.2, memory=0.9, max_staleness=0.2)
    lse = _empty(torch.float32, 2 * b)
    made = isir_loss.mean_loss(candidates, lse, temperature=0.2, decoupled=False, sums=sums, queue=queue)
    isir_loss.embedding_gradients(_empty(torch.float32), candidates, made, **options, dtype=case.dtype)


def compile_launch(launched: Launch, generation: int) -> Any:
    """Triton's compiled kernel for arguments like these, addresses and strides divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launched.function.params):
        name, value = parameter.name, launched.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name.startswith("stride"):
            signature[name] = parameter.annotation_type
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type
            assert parameter.do_not_specialize, (
                f"{name} must be in launch.NUMBERS: binaries are kept for all its values"
            )
    source = ASTSource(launched.function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options=launched.options)


_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


def kernel_name(launched: Launch) -> str:
    """The kernel's, with what a sweep's launch does: "sweep_kernel.walk"."""
    name = launched.function.__name__
    if name != "sweep_kernel":
        return name
    return f"{name}.record" if launched.arguments["RECORD"] else f"{name}.walk"


def work(launched: Launch) -> Work | None:
    """Of a kernel that multiplies blocks of rows with tiles of keys, all of them: a replay takes few of the tiles."""
    if launched.function.__name__ not in sass.MARKS or launched.function.__name__ == "replay_kernel":
        return None
    from emc2_kernels.backends.triton.scores import SEGMENTS, TILE

    given = launched.arguments
    block, tile, d = given["BLOCK_M"], given.get("BLOCK_N", TILE.value), given["d_over_align"] * given["ALIGN_D"]
    keys = SEGMENTS.value * given["segment_length"] if "segment_length" in given else given["split_length"]
    tiles = math.prod(launched.grid) * keys // tile
    depth = -(-d // given["BLOCK_D"]) * given["BLOCK_D"]  # of the first product, what fills its last chunk included
    roles = given.get("AS_QUERY", 0) + given.get("AS_KEY", 0) or 1
    columns = given.get("BLOCK_OUT", 0)  # of a second product, of weights and others
    keeps_others = given["WHOLE_D"] and columns == given["BLOCK_D"]
    again = 0 if keeps_others or not columns else d / launched.grid[2]
    loaded = tile * d + (0 if given["WHOLE_D"] else block * d) + tile * again
    operand = next(iter(given.values()))
    return Work(
        tiles * block * tile * roles * given.get("SAMPLES", 1),
        tiles * block * tile * 2 * (depth + columns),
        round(tiles * loaded) * operand.element_size(),
    )


def disable_interpreter() -> None:
    """For the start of a process, before it imports Triton: what is interpreted is never compiled."""
    os.environ.pop("TRITON_INTERPRET", None)


def measure(name: str, generation: int) -> list[Compiled]:
    rows = []
    for launched in launches(CASES[name], generation):
        compiled = compile_launch(launched, generation)
        cubin, shared, threads = compiled.asm["cubin"], compiled.metadata.shared, 32 * compiled.metadata.num_warps
        usage = sass.run_tool("cuobjdump", cubin, "-res-usage")
        registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
        fits = min(65536 // (registers * threads), (227 << 10) // max(shared, 1), 2048 // threads)
        does, mark = work(launched), sass.MARKS.get(launched.function.__name__)
        read = sass.read_cubin(cubin, mark.count, mark.opcode, mark.whole_loop) if does is not None else None
        assertions = re.findall(r'tt\.assert .*?"(.*?)"', compiled.asm["ttgir"])
        sizes = registers, stack, shared, fits
        rows.append(Compiled(name, generation, kernel_name(launched), *sizes, read, does, assertions))
    return rows


def measure_all(names: list[str], generations: list[int], processes: int) -> list[Compiled]:
    jobs = [(name, generation) for name in names for generation in generations]
    with ProcessPoolExecutor(processes) as pool:
        return [row for rows in pool.map(measure, *zip(*jobs, strict=True)) for row in rows]


def print_table(rows: list[Compiled]) -> None:
    """Per element: instructions (issue), those of three pipes, and for a warp's 32 elements the cycles of the pipe that
    binds. Then milliseconds on an H100: of those cycles, and, beside them, of the products and the loads alone."""
    print(f"{'case':22}{'sm':>5}  {'kernel':21}{'registers':>10}{'stack':>6}{'shared':>8}{'programs':>9}", end="")
    print(f"{'issue':>7}{'ALU':>6}{'MUFU':>6}{'wide':>6}{'cycles':>8}  {'binds':10}{'ms':>9}{'product':>9}{'L2':>9}")
    for row in rows:
        line = f"{row.case:22}{row.generation:5}  {row.kernel:21}{row.registers:10}{row.stack:6}{row.shared:8}"
        line += f"{row.programs:9}"
        if (p := row.pipes) is not None:
            line += f"{p.issue:7.1f}{p.alu:6.1f}{p.mufu:6.1f}{p.wide:6.1f}{p.cycles:8.1f}  {p.binding:10}"
        if row.seconds is not None:
            line += f"{1e3 * row.seconds:9.3g}"
            if CASES[row.case].dtype != torch.float32:  # whose products may be exact
                line += f"{1e3 * row.work.flops / sass.PRODUCT_FLOPS:9.3g}"
                line += f"{1e3 * row.work.l2_bytes / sass.L2_BYTES:9.3g}"
        print(line)


def print_bounds(rows: list[Compiled]) -> None:
    """Lines of tests/tools/compiled_bounds.py: what was seen, and a little."""

    def round_up(value: float, step: float, more: float) -> float:
        return math.ceil(value * (1 + more) / step) * step

    for name, generation, kernel in dict.fromkeys(row[:3] for row in rows):
        same = [row for row in rows if row[:3] == (name, generation, kernel)]
        registers = min(255, round_up(max(row.registers for row in same), 8, 0.05))
        stack = round_up(max(row.stack for row in same), 16, 0.2)
        shared = round_up(max(row.shared for row in same), 1024, 0.1)
        bound = f"{registers}, {stack}, {shared}"
        if same[0].pipes is not None:
            for value in max(row.pipes.issue for row in same), max(row.pipes.cycles for row in same):
                bound += f", {round_up(value, 0.5, 0.02)}"
        print(f'    ("{name}", {generation}, "{kernel}"): Bound({bound}),')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = "; ".join(CASES)  # names have commas
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=known)
    parser.add_argument("--generations", nargs="+", type=int, choices=GENERATIONS, default=list(GENERATIONS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--bounds", action="store_true", help="print lines of tests/tools/compiled_bounds.py instead")
    options = parser.parse_args()
    rows = measure_all(options.cases, options.generations, options.processes)
    (print_bounds if options.bounds else print_table)(rows)


if __name__ == "__main__":
    main()
