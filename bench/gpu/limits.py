"""What the machine allows: a time below which a call cannot come, for each thing that could hold it up.

A row says what its call cannot do without (`Work`): products, bytes, launches, instructions. `Limits` knows how fast
the machine does each of these at best, measures that once in the run when it is first asked, and turns the one into
milliseconds by the other. The largest limit is the one that binds.

Bytes between the L2 and the multiprocessors are not measured but counted, from the sizes that a kernel is launched
with. Instructions are counted in the compiled binary (sass.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

from bench.gpu import sass
from bench.gpu.peers import Copy, IndexSelect, Replay
from bench.harness import machine
from bench.harness.timing import Call, Timer, cuda_timer, figures, summarize, wall_timer
from bench.peers import MatrixProduct

if TYPE_CHECKING:
    from bench.gpu.context import Context

TILE = 128  # keys of a product, in all of Triton's kernels here but the gradient's, whose tuning names them
ID_BYTES = 8
SPECIAL_LANES = 16  # results of exp2 a clock and multiprocessor: NVIDIA's programming guide, 8.0 to 10.0


def pipe_seconds(binary: bytes, pairs: int, multiprocessors: int, clock_hz: float) -> tuple[str, float] | None:
    """The pipe that a walk's instructions fill first, and its seconds for so many (row, key) pairs; None: not known."""
    counted = sass.read_cubin(binary)
    if counted is None:
        return None
    return counted.binding, sass.seconds(counted, pairs, multiprocessors=multiprocessors, clock_hz=clock_hz)


def triton_tuning() -> ModuleType | None:
    """The sizes that Triton's kernels are launched with; None where there is no Triton."""
    try:
        from emc2_kernels.backends.triton import tuning
    except ImportError:
        return None
    return tuning


def sweep_binary(call: Call) -> bytes | None:
    """The machine code of the launch that walks, the first of a sweep; None where a call launches none of Triton's."""
    try:
        from emc2_kernels.backends.triton.sweep import SWEEP_KERNEL
    except ImportError:
        return None
    known, SWEEP_KERNEL.compiled = SWEEP_KERNEL.compiled, {}  # what is in it after the call is the call's
    try:
        call()
        launched = list(SWEEP_KERNEL.compiled.values())
    finally:
        SWEEP_KERNEL.compiled = known | SWEEP_KERNEL.compiled
    return launched[0].asm["cubin"] if launched else None


def sweep_l2_bytes(n: int, m: int, d: int, element: int, block_m: int, block_d: int, ids: bool) -> int:
    """From the L2 to the multiprocessors in a sweep or a log-sum-exp, which read alike.

    Each block of rows reads all keys, and its queries once, or with each tile of keys where it cannot hold them.
    """
    blocks, tiles = -(-n // block_m), -(-m // TILE)
    keys = tiles * TILE * (d * element + ID_BYTES * ids)
    queries = block_m * d * element * (1 if d <= block_d else tiles)
    return blocks * (keys + queries)


def gradient_l2_bytes(
    n: int, m: int, d: int, element: int, block_m: int, block_n: int, block_d: int, block_out: int
) -> int:
    """From the L2 to the multiprocessors in the gradient of n owners over m others, one kernel.

    Scores are made again for each chunk of `block_out` columns of the result; where a chunk is not the whole row, the
    others' part of it is read once more, for the second product.
    """
    widest = max(32, 1 << (d - 1).bit_length())  # what a row of d elements is cut into at most
    block_d, block_out = min(block_d, widest), min(block_out, widest)
    blocks, tiles, chunks = -(-n // block_m), -(-m // block_n), -(-d // block_out)
    whole = d <= block_d
    again = 0 if whole and block_out == block_d else min(block_out, d)
    owners = block_m * d * element * (1 if whole else tiles)
    return blocks * chunks * (owners + tiles * block_n * (d + again) * element)


@dataclass(frozen=True)
class Work:
    """What one call cannot do without; 0 is none, or not known.

    flops: of bfloat16 matrix products. memory_bytes: operands once and results once. l2_bytes: see above.
    gathered_bytes: of rows read in no order, far apart. exponentials: on the special function units.
    called, replayed: launches, one after another, by the host or in one graph. binary: of a sweep, which makes `pairs`
    steps.
    """

    flops: float = 0
    memory_bytes: float = 0
    l2_bytes: float = 0
    gathered_bytes: float = 0
    exponentials: float = 0
    called: int = 0
    replayed: int = 0
    binary: bytes | None = None
    pairs: int = 0


class Best(NamedTuple):
    """How a limit of the machine is found: in which unit, from what, by which function of a context."""

    unit: str
    how: str
    find: Callable[[Context], float]


def _seconds(context: Context, call: Call, timer: Timer = cuda_timer) -> float:
    return summarize(figures(context.measure({"": call}, timer).seconds[""])).median


def _product(context: Context) -> float:
    side = context.size(8192, 64, 1024)
    operand = torch.randn(side, side, device=context.device).to(torch.bfloat16)
    return 2 * side**3 / _seconds(context, MatrixProduct(operand, operand))


def _copy(context: Context) -> float:
    copy = Copy(context.size(1024, 1, 16), context.device)
    return copy.bytes_moved / _seconds(context, copy)


def _l2(context: Context) -> float:
    if context.rehearsal:  # on a CPU: no L2 of a GPU, nor a kernel that reads it
        buffer = torch.ones(1 << 16)
        return 4 * buffer.numel() / _seconds(context, buffer.sum)
    from bench.gpu.l2_reader import L2Read

    megabytes = min(16.0, l2_bytes(context) / 3 / (1 << 20))  # well inside, however it is divided
    read = L2Read(megabytes, multiprocessors(context), context.device)
    return read.bytes_read / _seconds(context, read)


def _gather(context: Context) -> float:
    rows, count = context.size(10**7, 400, 10**5), context.size(1 << 21, 400, 10**4)
    gather = IndexSelect(torch.zeros(rows, 128, dtype=torch.bfloat16, device=context.device), count)
    return 2 * gather.out.numel() * gather.out.element_size() / _seconds(context, gather)


def _clock(context: Context) -> float:
    if context.rehearsal:
        return 1e9
    return 1e6 * float(machine.ask_nvidia_smi("clocks.max.sm"))


def multiprocessors(context: Context) -> int:
    return 1 if context.rehearsal else torch.cuda.get_device_properties(context.device).multi_processor_count


def l2_bytes(context: Context) -> int:
    """The L2's size."""
    return 0 if context.rehearsal else torch.cuda.get_device_properties(context.device).L2_cache_size


BEST = {
    "tensor cores": Best("flop/s", "torch.mm of 8192 x 8192 by 8192 x 8192 bfloat16", _product),
    "memory": Best("byte/s", "a copy of 1 GB, bytes read and bytes written", _copy),
    "L2": Best(
        "byte/s",
        "a third of it, 16 MB at most, read again and again past the L1 (ld.cg)",
        _l2,
    ),
    "gather": Best("byte/s", "index_select of 2^21 of 10^7 rows of 256 bytes, bytes read and bytes written", _gather),
    "clock": Best("Hz", "the highest SM clock that nvidia-smi tells: no arithmetic is faster", _clock),
}
CALLED, REPLAYED = "launch, called", "launch, replayed"


class _Additions:
    """Launches that do next to nothing, each after the last: additions of one number to one number."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.number = count, torch.zeros((), device=device)

    def __call__(self) -> None:
        for _ in range(self.count):
            self.number.add_(1)


def _launches(kind: str, count: int) -> Best:
    if kind == CALLED:
        how = f"{count} additions of one number, called: wall-clock time until the device is done with many such calls"
        return Best("s", how, lambda context: _seconds(context, _Additions(count, context.device), wall_timer))
    return Best(
        "s",
        f"{count} additions of one number in a graph, replayed, between events",
        lambda context: _seconds(context, Replay(_Additions(count, context.device), context.device)),
    )


class Limits:
    """The machine's limits in this run. One that cannot be had is recorded with its error, and limits nothing."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.values: dict[str, float] = {}
        self.records: dict[str, dict[str, object]] = {}  # for the results file

    def times(self, work: Work) -> dict[str, float]:
        """Name -> milliseconds that such work takes at least."""
        amounts = {
            "tensor cores": work.flops,
            # What fits into the L2 can stay there from one call to the next.
            "memory": work.memory_bytes if work.memory_bytes > l2_bytes(self.context) else 0,
            "L2": work.l2_bytes,
            "gather": work.gathered_bytes,
        }
        seconds = {
            name: amount / best
            for name, amount in amounts.items()
            if amount and (best := self.best(name, BEST[name])) is not None
        }
        for kind, count in ((CALLED, work.called), (REPLAYED, work.replayed)):
            if count and (latency := self.best(f"{kind}, {count}", _launches(kind, count))) is not None:
                seconds[kind] = latency
        return {name: 1e3 * value for name, value in (seconds | self._instruction_limits(work)).items()}

    def _instruction_limits(self, work: Work) -> dict[str, float]:
        if not work.exponentials and not work.binary:
            return {}
        clock, processors = self.best("clock", BEST["clock"]), multiprocessors(self.context)
        if clock is None:
            return {}
        found = {}
        if work.exponentials:
            found["special functions"] = work.exponentials / (SPECIAL_LANES * processors * clock)
        counted = None
        if work.binary:
            try:
                counted = pipe_seconds(work.binary, work.pairs, processors, clock)
            except Exception as error:  # a disassembler that is missing, or writes what was not expected
                self.records["pipes"] = {"error": f"{type(error).__name__}: {error}"[:500]}
        if counted:
            found[f"{counted[0]} pipe"] = counted[1]
        return found

    def best(self, name: str, how: Best) -> float | None:
        """A limit of the machine, measured now if it has not been; None where it could not be."""
        if name not in self.records:
            self.records[name] = {"unit": how.unit, "how": how.how}
            try:
                self.values[name] = self.records[name]["value"] = how.find(self.context)
            except Exception as error:  # memory, a compiler, the driver: the rows go on without this limit
                self.records[name]["error"] = f"{type(error).__name__}: {error}"[:500]
        return self.values.get(name)


def binding(limits: Mapping[str, float]) -> str | None:
    """The limit that a call meets first."""
    return max(limits, key=limits.__getitem__, default=None)
