"""Which execution pipe binds a kernel's main loop, read from its machine code: the GPU need not be there.

An *element* is what the loop makes one of: a (row, key); of a draw a (row, key, sample); of a gradient (owner, other,
role). Each thread makes its own, so that the instructions of a thread for one element are the warp instructions for 32.
They are counted in the *main block*: of the blocks without a branch and without a global store, the one with the most
of an opcode that an element needs a known number of (MARKS), and what else of its loop has at least half as many: noise
that depends on no product may be made before its chunks. What the loop runs beside that is not in it: the chunks of a
product where d is longer than one, a sample point's second walk, the ending. A gradient runs all blocks of its loop for
each tile: there all count but those of a loop within.

A pipe takes a warp instruction every so many cycles (LIMITS), and all pipes work side by side. So the pipe that needs
the most cycles is a lower limit of the time, and no more than that: nothing is said of latencies, of loads that are
waited for, nor of a scheduler without a warp that is ready.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

# An H100 (SXM) as predictions here take it. The clock is one it keeps under load; the products' rate and the second
# level cache's are what good kernels reach, not what is on the data sheet.
MULTIPROCESSORS = 132
SCHEDULERS = 4  # of a multiprocessor, each with pipes of its own
CLOCK_HZ = 1.7e9
PRODUCT_FLOPS = 780e12  # of bfloat16 and float16
L2_BYTES = 5.5e12  # a second


class Mark(NamedTuple):
    """An opcode by which a kernel's elements are counted."""

    opcode: str
    count: int  # for each element
    whole_loop: bool = False  # whether each block of the loop runs once a tile


# Of lse_kernel each row of a tile has one more (2 beside 64 in a thread): its figures are up to 3 % low.
MARKS = {
    "count_kernel": Mark("MUFU.LG2", 1),
    "sweep_kernel": Mark("MUFU.LG2", 1),
    "gumbel_kernel": Mark("MUFU.LG2", 2),
    "isir_kernel": Mark("MUFU.LG2", 2),
    "lse_kernel": Mark("MUFU.EX2", 1),
    "lse_gradient_kernel": Mark("MUFU.EX2", 1, whole_loop=True),
}

# Opcodes by what executes them. That LOP3, IADD3, ISETP, SEL, FSEL, FMNMX, SHF, PRMT, MOV and their like share one
# pipe, and IMAD in all its forms (.MOV, .IADD, .X, .SHL are moves and additions that the assembler puts there) another,
# is NVIDIA's account (https://forums.developer.nvidia.com/t/302018, https://forums.developer.nvidia.com/t/108729);
# opcode by opcode as in github.com/cicuvc/nvidia-sass-document, notes/sm90/instr: there VIADD is with the multipliers.
KINDS = {
    "alu": """BMSK CS2R F2FP F2IP FMNMX FMNMX3 FSEL FSET FSETP I2FP I2I IABS IADD IADD3 IMNMX ISETP LEA LOP3 MOV P2R
        PLOP3 PRMT R2P SEL SGXT SHF SHL SHR VABSDIFF VABSDIFF4 VIADDMNMX VIMNMX VIMNMX3 VOTE""",
    "fma": "FADD FFMA FMUL FSWZADD",
    "packed": "FADD2 FFMA2 FMUL2 HADD2 HFMA2 HMUL2",
    "imad": "IDP IMAD IMUL VIADD",
    "wide": "",  # IMAD.WIDE and IMAD.HI: see classify
    "mufu": "BREV F2F F2I FCHK FLO FRND I2F MUFU POPC",
    "memory": "ATOM ATOMG ATOMS LD LDG LDGSTS LDL LDS LDSM RED SHFL ST STG STL STS STSM",
    "uniform": "CREDUX LDCU R2UR REDUX S2UR VOTEU",  # and all that begin with U
    "tensor": "HGMMA HMMA",  # and all that begin with UTC
    # A slot of the scheduler and nothing else that is known to bind.
    "control": """BAR BPT BRA BREAK BSSY BSYNC CALL CCTL DEPBAR ELECT ERRBAR EXIT FENCE LDC LDGDEPBAR LDTM MEMBAR
        NANOSLEEP NOP RET S2R STTM SYNCS WARPGROUP WARPSYNC YIELD""",
}
_KIND = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}

# Cycles for which a warp instruction of a kind holds a pipe of its scheduler. Threads a cycle: 16 of the ALU, 4 of
# MUFU, and 8 of loads and stores, whose unit is the whole multiprocessor's (32), whatever their width: 64, 16 and, of
# shuffles, 32 results of a multiprocessor in the CUDA C++ Programming Guide, "Throughput of Native Arithmetic
# Instructions".
#
# FMA: an A100's is 16 threads wide for all that it does (64 float32 operations a multiprocessor). Later ones have two
# such halves (128), of which only one multiplies integers (64), while packed operations take both at once: so the sum
# is half of the work of both, and the multiplying half has a limit of its own.
#
# Wide products (IMAD.WIDE, IMAD.HI) take two passes, 4 cycles, which the guide does not say. Measured so on an A100, an
# H100 and a GB202 by github.com/cicuvc/nvidia-sass-document, notes/sm90/arch/h100_fixed_pipeline.md, with which the
# other figures for an A100 and an H100 agree.
#
# sm_100: measured on a B300 by github.com/ademeure/QuickRunCUDA, where ALU, FMA with its halves, packed operations and
# IMAD.HI are as here, MUFU as here or a quarter better. That a B200 is alike, and that IMAD.WIDE takes what IMAD.HI
# does and FMNMX3 what FMNMX does, is assumed.
_EVERYWHERE = {"issue": {"issue": 1}, "ALU": {"alu": 2}, "MUFU": {"mufu": 8}, "load/store": {"memory": 4}}
_WHOLE = {"FMA": {"fma": 2, "packed": 2, "imad": 2, "wide": 4}}
_HALVES = {"FMA": {"fma": 1, "packed": 2, "imad": 1, "wide": 2}, "multiply": {"packed": 2, "imad": 2, "wide": 4}}
LIMITS: dict[int, dict[str, dict[str, int]]] = {
    80: _EVERYWHERE | _WHOLE,
    90: _EVERYWHERE | _HALVES,
    100: _EVERYWHERE | _HALVES,
}


class Pipes(NamedTuple):
    """A thread's instructions for one element, by what executes them: as many as a warp's for 32 elements."""

    generation: int  # 80, 90, 100
    issue: float  # all of them: each takes one slot of the scheduler
    alu: float  # integers without products, logic, comparisons, choices, minima; half rate
    fma: float  # float32 additions and products
    packed: float  # two of float32 or float16 in one
    imad: float  # integer products, and what the assembler writes as one
    wide: float  # those with 64 bits or the upper 32 as their result
    mufu: float  # logarithms, exponentials, reciprocals, and some conversions and bit counts
    memory: float  # loads, stores, shuffles
    uniform: float  # for the whole warp at once: a slot, and nothing of the ALU
    tensor: float
    control: float
    unknown: float  # opcodes that are not in KINDS: taken for a slot

    @property
    def limits(self) -> dict[str, float]:
        """Cycles that each pipe needs for the 32 elements of a warp."""
        pipes = LIMITS[self.generation]
        return {pipe: sum(n * getattr(self, kind) for kind, n in costs.items()) for pipe, costs in pipes.items()}

    @property
    def cycles(self) -> float:
        """Cycles of a scheduler for the 32 elements of a warp, at least."""
        return max(self.limits.values())

    @property
    def binding(self) -> str:
        """The pipe that needs them."""
        return max(self.limits, key=self.limits.get)


def seconds(pipes: Pipes, elements: int, multiprocessors: int = MULTIPROCESSORS, clock_hz: float = CLOCK_HZ) -> float:
    """What the pipe that binds needs for so many elements, at least, where all schedulers have their share of them."""
    return elements / 32 * pipes.cycles / (multiprocessors * SCHEDULERS * clock_hz)


def classify(opcode: str) -> str:
    """The kind of an opcode with its modifiers, as in ``IMAD.WIDE.U32``."""
    name, *modifiers = opcode.split(".")
    if name == "IMAD" and modifiers and modifiers[0] in ("WIDE", "HI"):
        return "wide"
    if name.startswith("U"):
        return "tensor" if name.startswith("UTC") else "uniform"
    return _KIND.get(name, "unknown")


class Block(NamedTuple):
    """Instructions without a branch but their last."""

    opcodes: list[str]
    label: str | None  # in front of it
    target: str | None  # of the branch that ends it


def straight_blocks(code: str) -> list[Block]:
    """Machine code, cut at labels and branches."""
    blocks: list[Block] = [Block([], None, None)]
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+)", line):
            blocks.append(Block([], label[1], None))
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            blocks[-1].opcodes.append(found[1])
            if found[1].split(".")[0] in ("BRA", "EXIT", "RET"):
                target = re.search(r"`\((\.L_\w+)\)", line)
                blocks[-1] = blocks[-1]._replace(target=target and target[1])
                blocks.append(Block([], None, None))
    return blocks


def innermost_loop(blocks: list[Block], place: int) -> range | None:
    """The blocks of the smallest loop around one of them, itself among them."""
    places = {block.label: number for number, block in enumerate(blocks) if block.label}
    ends = [(places[block.target], end) for end, block in enumerate(blocks) if block.target in places]
    loops = [range(begin, end + 1) for begin, end in ends if begin <= place <= end]
    return min(loops, key=len, default=None)


def main_block(blocks: list[Block], marks: dict[int, int]) -> int:
    """The place of the block with the most marks, of which ``marks`` has the number.

    Of two with as many, one is the loop and one its first or last round, taken out of it: the longer one is safe. Of
    two loops one after the other the first one is for plain tiles, which most are, and the other for the rest.
    """

    def length(place: int) -> int:
        return len(blocks[place].opcodes)

    most = [place for place in marks if marks[place] == max(marks.values())]
    loops = {loop: place for place in sorted(most, key=length) if (loop := innermost_loop(blocks, place))}
    apart = [loop for loop in loops if not any(other != loop and other.start in loop for other in loops)]
    return loops[min(apart, key=lambda loop: loop.start)] if len(apart) > 1 else max(most, key=length)


def read_code(code: str, logarithms: int = 1, opcode: str = "MUFU.LG2", whole_loop: bool = False) -> Pipes | None:
    """The main block of a disassembly, which has ``logarithms`` times ``opcode`` for each element; None without one."""
    generation = int(re.search(r"\.target\s+sm_(\d+)|EF_CUDA_SM(\d+)", code).expand(r"\1\2"))
    blocks = straight_blocks(code)
    marks = {
        place: block.opcodes.count(opcode)
        for place, block in enumerate(blocks)
        if opcode in block.opcodes and "STG" not in {each[:3] for each in block.opcodes}
    }
    if not marks:
        return None
    main = main_block(blocks, marks)
    around = innermost_loop(blocks, main) or range(main, main + 1)
    if whole_loop:
        counted = [place for place in around if innermost_loop(blocks, place) in (around, None)]
    else:
        counted = [place for place in around if 2 * marks.get(place, 0) >= marks[main]]
    opcodes = [each for place in counted for each in blocks[place].opcodes]
    elements = sum(marks.get(place, 0) for place in counted) / logarithms
    counts = dict.fromkeys(Pipes._fields[2:], 0.0)
    for each in opcodes:
        counts[classify(each)] += 1 / elements
    return Pipes(generation, len(opcodes) / elements, **counts)


def read_cubin(cubin: bytes, logarithms: int = 1, opcode: str = "MUFU.LG2", whole_loop: bool = False) -> Pipes | None:
    """``read_code`` of a compiled kernel."""
    return read_code(run_tool("nvdisasm", cubin, "-c"), logarithms, opcode, whole_loop)


def run_tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the tools that come with Triton says of a compiled kernel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout
