"""The rows of the GPU benchmark: what is timed at which size, beside what, and the goal that the figure is held to."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import memory
import torch
from gpu_peers import (
    BlockedNaive,
    Copy,
    DeviceStep,
    IndexSelect,
    LossStep,
    Replay,
    StreamingNTXent,
    UniformStep,
    kernels_of,
)
from peers import ColumnLoop, MatrixProduct, MHStep, make_operands
from timing import Call, Interleaved, Timer, cpu_timer, cuda_timer, figures, interleave, ratios, summarize
from torch import Tensor

from emc2_kernels.losses import EMC2Loss

TEMPERATURE = 0.07
SAMPLES = 16


def wall_timer(call: Call, repeats: int) -> float:
    """Seconds per call until the device is done with all of them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def host_timer(call: Call, repeats: int) -> float:
    """Seconds per call that the host is busy for: launches are asynchronous."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = (time.perf_counter() - start) / repeats
    torch.cuda.synchronize()
    return seconds


@dataclass(frozen=True)
class Context:
    """Where a row runs. A rehearsal runs every line of it on a CPU at toy sizes; its figures mean nothing."""

    device: torch.device
    backends: Sequence[str]
    quick: bool = False
    rehearsal: bool = False

    def size(self, real: int, toy: int) -> int:
        return toy if self.rehearsal else real

    def measure(self, calls: Mapping[str, Call], timer: Timer = cuda_timer) -> Interleaved:
        """Interleaved rounds; at most about half a second for each call."""
        pace = {"min_seconds": 2e-4, "budget_seconds": 0.05} if self.rehearsal else {"min_seconds": 0.004}
        rounds = 3 if self.rehearsal else 7 if self.quick else 15
        pace = {"budget_seconds": 0.25 if self.quick else 0.6} | pace
        return interleave(calls, rounds, timer=cpu_timer if self.rehearsal else timer, **pace)

    def peak_megabytes(self, call: Call) -> float:
        """Peak extra memory of a call that has been made before; results count."""
        return 0.0 if self.rehearsal else memory.peak_growth(call, self.device) / 1e6


@dataclass
class Row:
    """What one row measured; `goals` are the figures, held to a bound or not."""

    sizes: dict[str, object]
    times_ms: dict[str, dict] = field(default_factory=dict)
    goals: list[dict] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)

    def add_times(self, measured: Interleaved, suffix: str = "") -> None:
        for name, seconds in measured.seconds.items():
            self.times_ms[name + suffix] = asdict(summarize([1e3 * figure for figure in figures(seconds)]))

    def add_goal(
        self, quantity: str, values: float | Sequence[float], sense: str | None = None, bound: float | None = None
    ) -> None:
        """A figure, or its values over the rounds; `sense` "<=" or ">=" `bound`, or no goal."""
        spread = summarize([values] if isinstance(values, (int, float)) else values)
        met = None if bound is None else spread.median <= bound if sense == "<=" else spread.median >= bound
        self.goals.append(
            {"quantity": quantity, "value": spread.median, "lower_quartile": spread.lower_quartile}
            | {"upper_quartile": spread.upper_quartile, "goal": bound and f"{sense} {bound:g}", "met": met}
        )


def sweep(context: Context, backend: str, d: int, bound: float | None) -> Row:
    """A large sweep beside the matrix product alone, and beside softmax and multinomial."""
    n = context.size(32_768, 64)
    queries, keys = make_operands(n, n, d, torch.bfloat16, context.device)
    step = MHStep(queries, keys, TEMPERATURE, n // 2, SAMPLES, backend)
    calls = {
        "mh_step": step,
        "mm": MatrixProduct(queries, keys),
        "naive": BlockedNaive(queries, keys, TEMPERATURE, SAMPLES, n // 8),
    }
    measured = context.measure(calls)
    row = Row({"n": n, "m": n, "d": d, "R": SAMPLES, "dtype": "bfloat16"})
    row.add_times(measured)
    own = measured.seconds["mh_step"]
    row.add_goal("time / torch.mm", ratios(own, measured.seconds["mm"]), "<=", bound)
    row.add_goal("naive / time", ratios(measured.seconds["naive"], own), ">=", None if bound is None else 20)
    row.add_goal("peak extra MB", context.peak_megabytes(step), "<=", 100)
    row.notes["tflops of mm"] = 2e-12 * n * n * d / summarize(figures(measured.seconds["mm"])).median
    return row


def small(context: Context, backend: str, m: int, dtype: torch.dtype = torch.bfloat16) -> Row:
    """A step at batch 32: bound by the host when called, by latency when replayed."""
    n, d = 64, 128
    queries, keys = make_operands(n, m, d, dtype, context.device)
    eager = MHStep(queries, keys, TEMPERATURE, m // 2, SAMPLES, backend)
    settings = {"temperature": TEMPERATURE, "num_samples": SAMPLES, "backend": backend}
    loop = ColumnLoop(queries, keys, TEMPERATURE, m // 2)
    replays = {
        "replay": Replay(DeviceStep(queries, keys, carry=False, **settings), context.device),
        "replay with chains carried": Replay(DeviceStep(queries, keys, carry=True, **settings), context.device),
    }
    wall = context.measure({"eager": eager, "column loop": loop, **replays}, wall_timer)
    host = context.measure({"eager": eager}, host_timer)
    on_device = context.measure(replays)
    row = Row({"n": n, "m": m, "d": d, "R": SAMPLES, "dtype": str(dtype).removeprefix("torch.")})
    row.add_times(wall)
    row.add_times(host, ", host alone")
    row.add_times(on_device, ", between events")
    own = [1e6 * seconds for seconds in figures(wall.seconds["eager"])]
    row.add_goal("eager us", own, "<=", 40)
    row.add_goal("eager us, host alone", [1e6 * seconds for seconds in figures(host.seconds["eager"])])
    row.add_goal("replay us", [1e6 * seconds for seconds in figures(on_device.seconds["replay"])], "<=", 10)
    looped = wall.seconds["column loop"]
    row.add_goal("column loop / eager", ratios(looped, wall.seconds["eager"]), ">=", 50)
    row.add_goal("column loop / replay", ratios(looped, wall.seconds["replay"]), ">=", 100)
    add_kernels(context, row, eager)
    return row


def add_kernels(context: Context, row: Row, call: Call) -> None:
    """The number of kernels of a call; a profiler that does not work costs the number, not the row."""
    if context.rehearsal:
        return
    try:
        kernels = kernels_of(call)
    except RuntimeError as error:
        row.notes["kernels"] = f"the profiler failed: {error}"[:300]
        return
    row.notes["kernels"] = kernels
    row.add_goal("kernels per call", sum(kernels.values()))


def make_batch(context: Context, b: int, d: int, num_items: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(b, d) embeddings of two views, and the batch's items."""
    z0, z1 = make_operands(b, b, d, dtype, context.device)
    draw = torch.Generator(context.device).manual_seed(1)
    return z0, z1, torch.randperm(num_items, generator=draw, device=context.device)[:b]


def small_loss(context: Context, backend: str) -> Row:
    """EMC2Loss forward and backward at batch 32."""
    b, d, items = 32, 128, context.size(50_000, 100)
    batch = make_batch(context, b, d, items, torch.float32)
    steps = [LossStep(EMC2Loss(items, d, backend=backend).to(context.device), *batch) for _ in range(2)]
    replay = Replay(steps[1], context.device)
    wall = context.measure({"eager": steps[0], "replay": replay}, wall_timer)
    host = context.measure({"eager": steps[0]}, host_timer)
    on_device = context.measure({"replay": replay})
    row = Row({"b": b, "d": d, "num_items": items, "dtype": "float32"})
    row.add_times(wall)
    row.add_times(host, ", host alone")
    row.add_times(on_device, ", between events")
    row.add_goal("eager us", [1e6 * seconds for seconds in figures(wall.seconds["eager"])], "<=", 300)
    row.add_goal("eager us, host alone", [1e6 * seconds for seconds in figures(host.seconds["eager"])])
    row.add_goal("replay us", [1e6 * seconds for seconds in figures(on_device.seconds["replay"])], "<=", 60)
    add_kernels(context, row, steps[0])
    return row


def large_loss(context: Context, backend: str) -> Row:
    """EMC2Loss forward and backward on a large batch, beside an NT-Xent that streams; memory must grow with b alone."""
    b, d, items = context.size(16_384, 64), context.size(512, 16), context.size(65_536, 100)
    z0, z1, index = make_batch(context, b, d, items, torch.bfloat16)
    loss = EMC2Loss(items, d, num_samples=SAMPLES, temperature=TEMPERATURE, backend=backend).to(context.device)
    step = LossStep(loss, z0, z1, index)
    peer = LossStep(StreamingNTXent(TEMPERATURE, context.size(2048, 32)), z0, z1, index)
    measured = context.measure({"EMC2": step, "streaming NT-Xent": peer})
    row = Row({"b": b, "d": d, "R": SAMPLES, "num_items": items, "dtype": "bfloat16"})
    row.add_times(measured)
    row.add_goal(
        "streaming NT-Xent / EMC2", ratios(measured.seconds["streaming NT-Xent"], measured.seconds["EMC2"]), ">=", 2.5
    )
    half = LossStep(loss, z0[: b // 2], z1[: b // 2], index[: b // 2])
    half()
    whole_mb, half_mb = context.peak_megabytes(step), context.peak_megabytes(half)
    row.add_goal("peak extra MB", whole_mb)
    row.add_goal("peak extra MB / that of half the batch", whole_mb / half_mb if half_mb else 0.0, "<=", 2.2)
    row.notes["MB of the 2b anchors in float32"] = 2 * b * d * 4e-6
    row.notes["MB of streaming NT-Xent"] = context.peak_megabytes(peer)
    return row


def uniform(context: Context, backend: str) -> Row:
    """Chains that draw their proposals from 10^6 and from 10^7 keys, beside the gathering of as many rows alone."""
    n, count, d = context.size(32_768, 16), context.size(256, 24), 128
    sizes = [context.size(10**6, 200), context.size(10**7, 400)]
    calls: dict[str, Call] = {}
    for number_of_keys in sizes:
        queries, keys = make_operands(n, number_of_keys, d, torch.bfloat16, context.device)
        calls[f"mh_step, N = {number_of_keys}"] = UniformStep(queries, keys, count, 1.0, backend)
        calls[f"index_select, N = {number_of_keys}"] = IndexSelect(keys, n * count)
    measured = context.measure(calls)
    row = Row({"n": n, "proposals": count, "N": sizes, "d": d, "dtype": "bfloat16"})
    row.add_times(measured)
    own = [measured.seconds[f"mh_step, N = {number_of_keys}"] for number_of_keys in sizes]
    for number_of_keys, seconds in zip(sizes, own, strict=True):
        gathered = measured.seconds[f"index_select, N = {number_of_keys}"]
        row.add_goal(f"time / index_select, N = {number_of_keys:.0e}", ratios(seconds, gathered), "<=", 0.8)
        row.notes[f"TB/s of rows read, N = {number_of_keys:.0e}"] = (
            2e-12 * n * count * d / summarize(figures(seconds)).median
        )
    row.add_goal("time at 10 N / time at N", ratios(own[1], own[0]), "<=", 1.35)
    return row


def split(context: Context, backend: str) -> Row:
    """Few rows and many keys: bound by the reading of the keys, once."""
    n, m, d = 64, context.size(1_000_000, 500), 128
    queries, keys = make_operands(n, m, d, torch.bfloat16, context.device)
    copy = Copy(context.size(1024, 1), context.device)
    step = MHStep(queries, keys, TEMPERATURE, m // 2, SAMPLES, backend)
    measured = context.measure({"mh_step": step, "copy": copy, "mm": MatrixProduct(queries, keys)})
    row = Row({"n": n, "m": m, "d": d, "R": SAMPLES, "dtype": "bfloat16"})
    row.add_times(measured)
    share = ratios(measured.seconds["copy"], measured.seconds["mh_step"])
    key_bytes = keys.numel() * keys.element_size()
    row.add_goal("bandwidth of keys / copy bandwidth", [one * key_bytes / copy.bytes_moved for one in share], ">=", 0.5)
    row.add_goal("time / torch.mm", ratios(measured.seconds["mh_step"], measured.seconds["mm"]))
    row.notes["TB/s of copy"] = 1e-12 * copy.bytes_moved / summarize(figures(measured.seconds["copy"])).median
    return row


def crossover(context: Context, _: str) -> Row:
    """Replayed small sweeps by every backend: which is faster at which size. Microseconds, in the notes."""
    sides = (32, 64, 128, 256, 512, 1024) if not context.rehearsal else (32, 48)
    row = Row({"n = m": sides, "R": SAMPLES, "dtype": "bfloat16"})
    row.notes["columns"] = ["n", "d", *context.backends]
    row.notes["us"] = table = []
    for d in (64, 128, 512) if not context.rehearsal else (64,):
        for n in sides:
            operands = make_operands(n, n, d, torch.bfloat16, context.device)
            settings = {"carry": False, "temperature": TEMPERATURE, "num_samples": SAMPLES}
            calls = {
                name: Replay(DeviceStep(*operands, backend=name, **settings), context.device)
                for name in context.backends
            }
            measured = context.measure(calls)
            medians = [1e6 * summarize(figures(measured.seconds[name])).median for name in context.backends]
            table.append([n, d, *(round(median, 2) for median in medians)])
    return row


RowFunction = Callable[[Context, str], Row]
ROWS: dict[str, RowFunction] = {  # in the order of their weight: what the time limit cuts off stands last
    "sweep-512": partial(sweep, d=512, bound=1.6),
    "sweep-128": partial(sweep, d=128, bound=2.2),
    "small-32": partial(small, m=32),
    "small-64": partial(small, m=64),
    "loss-32": small_loss,
    "loss-16384": large_loss,
    "split": split,
    "uniform": uniform,
    "small-64-float32": partial(small, m=64, dtype=torch.float32),
    "sweep-1024": partial(sweep, d=1024, bound=None),
    "crossover": crossover,
}
OF_ALL_BACKENDS = ("crossover",)
