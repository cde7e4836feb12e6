"""What the Triton kernels compile to at the shipped settings, for GPUs that need not be there.

Registers, spills and shared memory come from the assembler; the instructions for each (row, key) are counted in the
longest block without a branch that makes its logarithms. Run `python bench/compiled.py` for the table.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

GENERATIONS = (80, 90, 100)
PROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H100, B200: they decide only how a walk is split


class Case(NamedTuple):
    """A walk whose launches are compiled, or those that a loss makes around its own."""

    dtype: torch.dtype
    n: int
    m: int
    d: int
    proposals: str  # "sweep", "drawn", "given"; "loss": n pairs in a loss, without their walk; "lse", "gumbel": no walk
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
    "sweep float32": Case(torch.float32, 4096, 4096, 128, "sweep"),
    "split, lse": Case(torch.bfloat16, 64, 1_000_000, 128, "sweep", lse=True),
    "sweep, nothing given": Case(torch.float16, 4096, 4096, 128, "sweep", ids=False),
    "sweep, all given": Case(torch.float16, 1024, 4096, 128, "sweep", accepts=True, lse=True, all_tensors=True),
    "transition": Case(torch.bfloat16, 1024, 4096, 100, "sweep", step=False, ids=False),
    "drawn, nothing given": Case(torch.float32, 64, 1000, 40, "drawn", ids=False),
    "drawn": Case(torch.bfloat16, 32768, 10_000_000, 128, "drawn", accepts=True),
    "given": Case(torch.bfloat16, 32768, 100_000, 128, "given", step=False),
    "lse d=128": Case(torch.bfloat16, 131072, 131072, 128, "lse"),
    "lse d=1024": Case(torch.float16, 8192, 8192, 1024, "lse", ids=False),
    "lse float32": Case(torch.float32, 4096, 4096, 128, "lse"),
    "lse, split": Case(torch.bfloat16, 64, 1_000_000, 100, "lse", all_tensors=True),
    "lse, symmetric": Case(torch.bfloat16, 131072, 131072, 128, "lse", symmetric=True),
    "lse, symmetric d=512": Case(torch.bfloat16, 8192, 8192, 512, "lse", symmetric=True),
    "loss d=128": Case(torch.bfloat16, 32, 32, 128, "loss"),
    "loss d=768": Case(torch.bfloat16, 32, 32, 768, "loss"),
    "gumbel d=128": Case(torch.bfloat16, 32768, 100_000, 128, "gumbel"),
    "gumbel d=512": Case(torch.bfloat16, 32768, 100_000, 512, "gumbel", samples=1),
    "gumbel float32": Case(torch.float32, 4096, 100_000, 128, "gumbel", samples=2),
    "gumbel, nothing given": Case(torch.float16, 4096, 4096, 100, "gumbel", ids=False, samples=1),
    "gumbel, split": Case(torch.bfloat16, 64, 1_000_000, 128, "gumbel", all_tensors=True),
}


LOGARITHMS = {"sweep_kernel": 1, "gumbel_kernel": 2}  # for each element


class Launch(NamedTuple):
    """One kernel as `emc2_kernels.backends.triton` would launch it."""

    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """What one kernel compiled to."""

    case: str
    generation: int
    kernel: str
    registers: int
    stack: int  # bytes of a thread in slow memory, spilled registers among them
    shared: int  # bytes of a program
    programs: int  # that fit on one multiprocessor by registers (64 K) and shared memory
    per_element: float | None  # instructions for each (row, key), of a draw for each (row, key, sample)
    assertions: list[str]  # on values that only the device sees


def launches(case: Case, generation: int) -> list[Launch]:
    """The launches of a walk, without a GPU: on tensors without data."""
    from emc2_kernels.backends.triton import launch, run, settings
    from emc2_kernels.backends.walk import Walk

    seen: list[Launch] = []

    def record(kernel: launch.Kernel, grid: tuple[int, ...], arguments: dict, options: dict) -> None:
        named = {name: arguments[name] for name in kernel.names}
        seen.append(Launch(kernel.function, named, {**options, **launch.ALWAYS}))

    before = launch.Kernel.__call__, settings.device
    launch.Kernel.__call__ = record
    settings.device = lambda index: (generation // 10, PROCESSORS[generation])
    try:
        walk = None if case.proposals in ("loss", "lse", "gumbel") else _walk(case, Walk)
        if case.proposals == "loss":
            _visit(case)
        elif case.proposals == "lse":
            _sum(case)
        elif case.proposals == "gumbel":
            _draw(case)
        elif case.step:
            state = _empty(torch.int64, case.n), _empty(torch.float32, case.n)
            run.step(walk, *state, _empty(torch.int64, case.m) if case.ids else None, case.accepts, case.lse)
        else:
            run.transition(walk)
    finally:
        launch.Kernel.__call__, settings.device = before
    return seen


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sum(case: Case) -> None:
    """A log-sum-exp and its gradient."""
    from emc2_kernels.backends.scores import Scores
    from emc2_kernels.backends.triton import lse

    queries, query_ids = _empty(case.dtype, case.n, case.d), _empty(torch.int64, case.n) if case.ids else None
    temperature, row = _empty(torch.float32, case.n) if case.all_tensors else 0.07, _empty(torch.float32, case.n)
    if case.symmetric:
        scores = Scores.among(queries, temperature, query_ids)
    else:
        keys, key_ids = _empty(case.dtype, case.m, case.d), _empty(torch.int64, case.m) if case.ids else None
        scores = Scores(queries, keys, temperature, query_ids, key_ids)
    lse.contrastive_lse(scores)
    lse.contrastive_lse_backward(row, row, scores)


def _given(case: Case) -> tuple:
    """Temperature, seed and step, and the ids of chains, queries and keys."""
    ids = (_empty(torch.int64, case.n), _empty(torch.int64, case.n), _empty(torch.int64, case.m))
    temperature, number = (_empty(torch.float32, case.n), _empty(torch.int64)) if case.all_tensors else (0.07, 0)
    return temperature, number, ids if case.ids else (None,) * 3


def _draw(case: Case) -> None:
    from emc2_kernels.backends.scores import Scores
    from emc2_kernels.backends.triton import gumbel

    temperature, number, (chain_ids, *ids) = _given(case)
    operands = _empty(case.dtype, case.n, case.d), _empty(case.dtype, case.m, case.d)
    gumbel.gumbel_sample(Scores(*operands, temperature, *ids), chain_ids, number, number, case.samples)


def _walk(case: Case, make: Callable) -> Any:
    count = case.m if case.proposals == "sweep" else 256
    temperature, number, ids = _given(case)
    weights = _empty(torch.float32, case.m) if case.all_tensors else None
    positions = _empty(torch.int64, case.n, count) if case.proposals == "given" else None
    return make(
        _empty(case.dtype, case.n, case.d), _empty(case.dtype, case.m, case.d), temperature, number, number,
        *ids, positions, count if case.proposals == "drawn" else None, weights,
        count // 2, case.samples, 0, count,
    )  # fmt: skip


def _visit(case: Case) -> None:
    """A loss's launches around its walk, in training, for n pairs and 16 samples an anchor."""
    from emc2_kernels.backends.triton import visit

    b, d, slots = case.n, case.d, 2000
    number = _empty(torch.int64)
    stores = visit.Stores(
        _empty(torch.int64, slots), _empty(torch.float32, slots), _empty(case.dtype, slots, d),
        _empty(torch.int64, slots), number, number,
    )  # fmt: skip
    z, options = _empty(case.dtype, b, d), {"temperature": 0.2, "floor": 1e-6}
    batch = visit.prepare(z, z, _empty(torch.int64, b), stores, **options, seed=0, both_views=False, dtype=case.dtype)
    samples = _empty(torch.int32, 2 * b, 16)
    made = visit.negatives(batch, samples, stores.bank, temperature=0.2, return_similarity=False)
    visit.remember(batch, batch.state_key, batch.state_score, stores)
    visit.gradient(
        _empty(torch.float32), batch.anchors, batch.lengths, samples, made.means, made.shares, batch.coin_labels,
        **options, dtype=case.dtype,
    )  # fmt: skip


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
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def _tool(name: str, *arguments: str) -> str:
    """One of the disassemblers that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def straight_blocks(code: str) -> list[list[str]]:
    """The opcodes of machine code, cut at labels and branches."""
    blocks: list[list[str]] = [[]]
    for line in code.splitlines():
        if re.match(r"\s*\.L_", line):
            blocks.append([])
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line):
            blocks[-1].append(found[1])
            if found[1].split(".")[0] in ("BRA", "EXIT", "RET"):
                blocks.append([])
    return blocks


def instructions_per_logarithm(code: str) -> float | None:
    """Of the walk's main path: the block with the most logarithms among those that store nothing."""

    def logarithms(block: list[str]) -> int:
        return block.count("MUFU.LG2")

    walks = [block for block in straight_blocks(code) if logarithms(block) and "STG" not in {op[:3] for op in block}]
    best = max(walks, key=logarithms, default=None)
    return None if best is None else len(best) / logarithms(best)


def interpret_nothing() -> None:
    """For the start of a process, before it imports Triton: what is interpreted is never compiled."""
    os.environ.pop("TRITON_INTERPRET", None)


def measure(name: str, generation: int) -> list[Compiled]:
    rows = []
    for launched in launches(CASES[name], generation):
        compiled = compile_launch(launched, generation)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage, code = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
        registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
        shared, threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
        fits = min(65536 // (registers * threads), (227 << 10) // max(shared, 1), 2048 // threads)
        kernel = launched.function.__name__
        logarithms = LOGARITHMS.get(kernel)
        per_element = logarithms and logarithms * instructions_per_logarithm(code)
        assertions = re.findall(r'tt\.assert .*?"(.*?)"', compiled.asm["ttgir"])
        rows.append(Compiled(name, generation, kernel, registers, stack, shared, fits, per_element, assertions))
    return rows


def measure_all(names: list[str], generations: list[int], processes: int) -> list[Compiled]:
    jobs = [(name, generation) for name in names for generation in generations]
    with ProcessPoolExecutor(processes) as pool:
        return [row for rows in pool.map(measure, *zip(*jobs, strict=True)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--generations", nargs="+", type=int, choices=GENERATIONS, default=list(GENERATIONS))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    rows = measure_all(options.cases, options.generations, options.processes)
    print(f"{'case':22}{'sm':>5}  {'kernel':17}", end="")
    print(f"{'registers':>10}{'stack':>7}{'shared':>9}{'programs':>10}{'per element':>13}")
    for row in rows:
        per_element = "" if row.per_element is None else f"{row.per_element:.1f}"
        print(
            f"{row.case:22}{row.generation:5}  {row.kernel:17}{row.registers:10}{row.stack:7}{row.shared:9}"
            f"{row.programs:10}{per_element:>13}"
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
