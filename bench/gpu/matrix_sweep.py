"""What nvcc makes of the sweep on Hopper's matrix units (csrc/cuda/sweep_sm90.cu); the GPU need not be there.

    python -m bench.gpu.matrix_sweep
    python -m bench.gpu.matrix_sweep --won bench/results/FILE.json    rows of gpu.MATRIX_SWEEP_WON, from a GPU's results

The walk is counted as bench.gpu.compiled counts Triton's: instructions of a thread for each (row, key), by the pipe
that executes them. A tile costs a thread more: its 64 products by the scale, and some 50 instructions for each 64
dimensions by which the matrix unit is given its next products.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gpu import sass
from emc2_kernels.backends import gpu
from emc2_kernels.backends.cuda import build
from emc2_kernels.backends.extension import source_root

SOURCE = "csrc/cuda/sweep_sm90.cu"


class Compiled(NamedTuple):
    """The kernel of one dtype."""

    element: str  # "Bfloat16", "Float16"
    code: str  # disassembled
    opcodes: list[str]  # in it, with their modifiers
    walk: sass.Pipes


def compile_kernels() -> tuple[list[Compiled], str]:
    """Both kernels, and what the assembler said."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "sweep.cubin")
        flags = ["-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", *build.definitions()]
        architecture = build.gencode_flags(gpu.MATRIX_SWEEP_ARCHITECTURE)
        command = [*build.compiler(), *flags, *architecture, source_root() / SOURCE, "-o", target]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = sass.run_tool("nvdisasm", target.read_bytes(), "-c")
    header, *sections = re.split(r"(?=\n\s*\.section\s+\.text\.)", code)
    target_line = re.search(r"\.target\s+sm_\d+", header)[0]
    kernels = []
    for section in sections:
        if found := re.search(r"matrix_sweep_kernelI\w*?(Bfloat16|Float16)", section):
            opcodes = [each for block in sass.straight_blocks(section) for each in block.opcodes]
            kernels.append(Compiled(found[1], section, opcodes, sass.read_code(f"{target_line}\n{section}")))
    return kernels, log


def rows_won(results: dict) -> list[gpu.Won]:
    """For each d that a GPU has been tried with (the row "large-crossover"), the least number of rows from which on
    this kernel was faster than Triton's at every size."""
    measured = [row for row in results["rows"] if row["name"] == "large-crossover" and "error" not in row]
    columns, table = (measured[0]["notes"][name] for name in ("columns", "us")) if measured else ([], [])
    if not {"cuda", "triton"} <= set(columns):
        raise ValueError('no row "large-crossover" of cuda and triton: bench.gpu.check --stages rest measures it')
    cuda, triton = columns.index("cuda"), columns.index("triton")
    won = []
    for d in sorted({line[1] for line in table}):
        least = gpu.NEVER
        for line in sorted((line for line in table if line[1] == d), reverse=True):
            if line[cuda] >= line[triton]:
                break
            least = line[0]
        won.append(gpu.Won(results["machine"]["device"], d, least))
    return won


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--won", type=Path, metavar="FILE", help="a results file of bench.gpu.check")
    options = parser.parse_args(arguments)
    if options.won:
        try:
            print(*rows_won(json.loads(options.won.read_text())), sep="\n")
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--won {options.won}: {error}")
        return
    kernels, log = compile_kernels()
    registers = re.findall(r"Used (\d+) registers", log)
    print(f"registers of a thread at launch: {', '.join(registers)} (168 leaves a walking warp 232)")
    for element, _code, opcodes, walk in kernels:
        pairs = sass.seconds(walk, 2**30) * 1e3
        print(
            f"{element}: {len(opcodes)} instructions; walk {walk.issue:.1f} a (row, key), ALU {walk.alu:.1f}, "
            f"{walk.cycles:.1f} cycles for a warp's 32, {walk.binding} binds: {pairs:.2f} ms for 2^30 on an H100"
        )


if __name__ == "__main__":
    main()
