"""Compiles the kernels of the fused loss for a GPU that need not be here; prints registers and stack of each as JSON.

    python tests/aot_visit.py 90 128,768

In a process of its own, without TRITON_INTERPRET: Triton decides once whether it compiles.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from emc2_kernels.backends.triton import gradient, negatives, prepare, remember
from emc2_kernels.backends.triton.launch import ALWAYS
from emc2_kernels.backends.triton.rows import row_block, tile_rows, warps

INT64 = ("index", "step", "now", "store_key", "written_at", "last_step", "items", "chain_ids", "coin_labels")
INT64 += ("state_key", "new_key", "last")
EMBEDDINGS = ("z0", "z1", "queries", "keys", "gradient_0", "gradient_1")  # in the dtype of the call
DTYPES = dict.fromkeys(INT64, "i64") | dict.fromkeys(EMBEDDINGS, "bf16") | {"samples": "i32", "bank": "bf16"}
NOT_GIVEN = ("seed", "last", "key_gradient", "similarity")


def signature(kernel, constants):
    """Types, constants and alignments of a call at a small batch in bfloat16."""
    types, values, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        tensor = name.removesuffix("_ptr")
        if parameter.is_constexpr or tensor in NOT_GIVEN:
            types[name], values[name] = "constexpr", constants.get(name)
        elif tensor != name:
            types[name] = "*" + DTYPES.get(tensor, "fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            types[name] = parameter.annotation_type
            if name.startswith("stride_z"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return types, values, attributes


def usage(kernel, constants, num_warps, architecture):
    source = ASTSource(kernel, *signature(kernel, constants))
    options = {"num_warps": num_warps, **ALWAYS}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    binaries = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [binaries / "cuobjdump", "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", listing)}
    return numbers | {"assertions": re.findall(r'tt\.assert .*?"(.*?)"', compiled.asm["ttgir"])}


def main(architecture, dims):
    for d in dims:
        whole = {"D": d, "BLOCK_D": row_block(d)}
        samples = tile_rows(d, negatives.TILE_ELEMENTS, 16)
        rows = tile_rows(d, gradient.TILE_ELEMENTS, 64)
        for kernel, constants, elements in (
            (prepare.prepare_kernel, whole, row_block(d)),
            (negatives.negatives_kernel, whole | {"BLOCK_R": samples}, samples * row_block(d)),
            (remember.remember_kernel, whole | {"BLOCK_B": remember.BLOCK_B}, 2048),
            (gradient.gradient_kernel, whole | {"BLOCK_N": rows, "BLOCK_R": 16}, rows * row_block(d)),
        ):
            numbers = usage(kernel, constants, warps(elements), architecture)
            print(json.dumps({"kernel": kernel.__name__, "d": d, "warps": warps(elements)} | numbers), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter does not compile"
    main(int(sys.argv[1]), [int(d) for d in sys.argv[2].split(",")])
