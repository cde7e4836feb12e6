"""The rows of the GPU benchmark: what is timed at which size, beside what, and the goal that the figure is held to."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.gpu.context import Context, Row
from bench.gpu.limits import Work, gradient_l2_bytes, sweep_binary, sweep_l2_bytes, triton_tuning
from bench.gpu.peers import (
    BlockedNaive,
    Copy,
    DeviceStep,
    IndexSelect,
    IsirStep,
    LseStep,
    Replay,
    StreamingNTXent,
    UniformStep,
    count_kernels,
)
from bench.harness.timing import Call, figures, host_timer, ratios, summarize, wall_timer
from bench.peers import ColumnLoop, GumbelDraws, LossStep, MatrixProduct, MHStep, item_ids, make_operands
from emc2_kernels.losses import EMC2Loss

TEMPERATURE = 0.07
SAMPLES = 16
CLUSTER = 256, 512  # rows that share the keys in csrc/cuda/matrix_sweep.cuh, and dimensions that stay there
SWEEP_GOALS = {512: 1.2, 128: 1.0}  # d -> time over torch.mm's, at most
LOSS_LAUNCHES = 6  # of EMC2Loss on a GPU, with either sampler: five forward, one backward


def sweep_work(backend: str, n: int, m: int, d: int, call: Call, ids: bool = False) -> Work:
    """What a bfloat16 sweep cannot do without; `call` makes one, alone or in a loss."""
    tuning, l2_bytes = triton_tuning(), 0
    if backend == "cuda":
        l2_bytes = sweep_l2_bytes(n, m, d, 2, *CLUSTER, ids)
    elif tuning is not None:
        chosen = tuning.sweep(tuning.device(0)[0], True, d, n)
        l2_bytes = sweep_l2_bytes(n, m, d, 2, chosen.block_m, chosen.block_d, ids)
    operands = 2 * (n + m) * d
    return Work(2 * n * m * d, operands, l2_bytes, binary=sweep_binary(call), pairs=n * m)


def product_work(n: int, m: int, d: int) -> Work:
    """A bfloat16 matrix product into memory."""
    return Work(flops=2 * n * m * d, memory_bytes=2 * (n * d + m * d + n * m))


def sweep(context: Context, backend: str, d: int, bound: float | None, ids: bool = False) -> Row:
    """A large sweep beside the matrix product alone, and beside softmax and multinomial.

    ids: chains, items and labels are given, and a row's own item is among the keys, as in a loss.
    """
    n = context.size(32_768, 64)
    queries, keys = make_operands(n, n, d, torch.bfloat16, context.device)
    given = item_ids(n, n, context.device) if ids else None
    step = MHStep(queries, keys, TEMPERATURE, n // 2, SAMPLES, backend, ids=given)
    calls: dict[str, Call] = {"mh_step": step, "mm": MatrixProduct(queries, keys)}
    if not context.headline and not ids:
        calls["naive"] = BlockedNaive(queries, keys, TEMPERATURE, SAMPLES, n // 8)
    measured = context.measure(calls)
    row = Row({"n": n, "m": n, "d": d, "R": SAMPLES, "dtype": "bfloat16", "ids": ids})
    row.add_times(measured)
    own = measured.seconds["mh_step"]
    row.add_reading("time, ms", own, context.limits.times(sweep_work(backend, n, n, d, step, ids)))
    row.add_reading("torch.mm, ms", measured.seconds["mm"], context.limits.times(product_work(n, n, d)))
    row.add_goal("time / torch.mm", ratios(own, measured.seconds["mm"]), "<=", bound)
    if "naive" in calls:
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
    replays = {
        "replay": Replay(DeviceStep(queries, keys, carry=False, **settings), context.device),
        "replay with chains carried": Replay(DeviceStep(queries, keys, carry=True, **settings), context.device),
    }
    calls: dict[str, Call] = {"eager": eager, **replays}
    if not context.headline:
        calls["column loop"] = ColumnLoop(queries, keys, TEMPERATURE, m // 2)
    wall = context.measure(calls, wall_timer)
    host = context.measure({"eager": eager}, host_timer)
    on_device = context.measure(replays)
    row = Row({"n": n, "m": m, "d": d, "R": SAMPLES, "dtype": str(dtype).removeprefix("torch.")})
    row.add_times(wall)
    row.add_times(host, ", host alone")
    row.add_times(on_device, ", between events")
    row.add_reading("eager, us", wall.seconds["eager"], context.limits.times(Work(called=1)))
    row.add_reading("replay, us", on_device.seconds["replay"], context.limits.times(Work(replayed=1)))
    own = [1e6 * seconds for seconds in figures(wall.seconds["eager"])]
    row.add_goal("eager us", own, "<=", 40)
    row.add_goal("eager us, host alone", [1e6 * seconds for seconds in figures(host.seconds["eager"])])
    row.add_goal("replay us", [1e6 * seconds for seconds in figures(on_device.seconds["replay"])], "<=", 10)
    if "column loop" in calls:
        looped = wall.seconds["column loop"]
        row.add_goal("column loop / eager", ratios(looped, wall.seconds["eager"]), ">=", 50)
        row.add_goal("column loop / replay", ratios(looped, wall.seconds["replay"]), ">=", 100)
    add_kernels(context, row, eager)
    return row


def add_kernels(context: Context, row: Row, call: Call) -> None:
    """The number of kernels of a call; a profiler that does not work costs the number, not the row.

    Not in the headline: the profiler takes seconds to start, and what it leaves behind slows later launches down.
    """
    if context.rehearsal or context.headline or context.warm:
        return
    try:
        kernels = count_kernels(call)
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


def small_loss(context: Context, backend: str, sampler: str) -> Row:
    """EMC2Loss forward and backward at batch 32."""
    b, d, items = 32, 128, context.size(50_000, 100)
    batch = make_batch(context, b, d, items, torch.float32)
    losses = [EMC2Loss(items, d, sampler=sampler, backend=backend).to(context.device) for _ in range(2)]
    steps = [LossStep(loss, *batch) for loss in losses]
    replay = Replay(steps[1], context.device)
    wall = context.measure({"eager": steps[0], "replay": replay}, wall_timer)
    host = context.measure({"eager": steps[0]}, host_timer)
    on_device = context.measure({"replay": replay})
    row = Row({"b": b, "d": d, "num_items": items, "dtype": "float32"})
    row.add_times(wall)
    row.add_times(host, ", host alone")
    row.add_times(on_device, ", between events")
    row.add_reading("eager, us", wall.seconds["eager"], context.limits.times(Work(called=LOSS_LAUNCHES)))
    row.add_reading("replay, us", on_device.seconds["replay"], context.limits.times(Work(replayed=LOSS_LAUNCHES)))
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
    calls: dict[str, Call] = {"EMC2": step}
    if not context.headline:
        peer = LossStep(StreamingNTXent(TEMPERATURE, context.size(2048, 32)), z0, z1, index)
        calls["streaming NT-Xent"] = peer
    measured = context.measure(calls)
    row = Row({"b": b, "d": d, "R": SAMPLES, "num_items": items, "dtype": "bfloat16"})
    row.add_times(measured)
    own = measured.seconds["EMC2"]
    # Of its own walk alone: 2b anchors over a key of each of the b items.
    row.add_reading("time, ms", own, context.limits.times(sweep_work(backend, 2 * b, b, d, step, ids=True)))
    if "streaming NT-Xent" in calls:
        row.add_goal("streaming NT-Xent / EMC2", ratios(measured.seconds["streaming NT-Xent"], own), ">=", 2.5)
        row.notes["MB of streaming NT-Xent"] = context.peak_megabytes(peer)
    half = LossStep(loss, z0[: b // 2], z1[: b // 2], index[: b // 2])
    half()
    whole_mb, half_mb = context.peak_megabytes(step), context.peak_megabytes(half)
    row.add_goal("peak extra MB", whole_mb)
    row.add_goal("peak extra MB / that of half the batch", whole_mb / half_mb if half_mb else 0.0, "<=", 2.2)
    row.notes["MB of the 2b anchors in float32"] = 2 * b * d * 4e-6
    return row


def uniform(context: Context, backend: str) -> Row:
    """Chains that draw their proposals from 10^6 and from 10^7 keys, beside the gathering of as many rows alone.

    The headline has 10^7 alone.
    """
    n, count, d = context.size(32_768, 16), context.size(256, 24), 128
    sizes = [context.size(10**6, 200), context.size(10**7, 400, 10**6)][1 if context.headline else 0 :]
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
    limits = context.limits.times(Work(gathered_bytes=2 * n * count * d))  # of the most keys
    row.add_reading("time, ms", own[-1], limits)
    # It writes, too, what it has read.
    limits = context.limits.times(Work(gathered_bytes=4 * n * count * d))
    row.add_reading("index_select, ms", measured.seconds[f"index_select, N = {sizes[-1]}"], limits)
    if len(own) > 1:
        row.add_goal("time at 10 N / time at N", ratios(own[1], own[0]), "<=", 1.35)
    return row


def lse_work(n: int, m: int, d: int) -> Work:
    """What a bfloat16 `contrastive_lse` cannot do without."""
    tuning = triton_tuning()
    l2_bytes = 0
    if tuning is not None:
        chosen = tuning.lse(tuning.device(0)[0], True)
        l2_bytes = sweep_l2_bytes(n, m, d, 2, chosen.block_m, chosen.block_d, ids=False)
    return Work(2 * n * m * d, 2 * (n + m) * d, l2_bytes, exponentials=n * m)


def lse_gradient_work(n: int, m: int, d: int) -> Work:
    """One of the two kernels of its gradient: scores again, and their weights times the others."""
    tuning = triton_tuning()
    l2_bytes = 0
    if tuning is not None:
        chosen = tuning.lse_gradient(tuning.device(0)[0], True, d)
        sizes = chosen.block_m, chosen.block_n, chosen.block_d, chosen.block_out
        l2_bytes = gradient_l2_bytes(n, m, d, 2, *sizes)
    return Work(4 * n * m * d, 2 * (2 * n + m) * d, l2_bytes, exponentials=n * m)


def lse(context: Context, backend: str, d: int, backward: bool = False) -> Row:
    """`contrastive_lse` of a large batch: forward, or its gradient in queries and in keys, two matrices.

    The gradient is a kernel for each, alike but for the roles.
    """
    n = context.size(32_768, 64)
    queries, keys = make_operands(n, n, d, torch.bfloat16, context.device)
    name, kernels = ("backward", 2) if backward else ("forward", 1)
    measured = context.measure({name: LseStep(queries, keys, TEMPERATURE, backend, backward=backward)})
    row = Row({"n": n, "m": n, "d": d, "dtype": "bfloat16"})
    row.add_times(measured)
    of_one = [seconds / kernels for seconds in figures(measured.seconds[name])]
    quantity, work = ("one of two kernels, ms", lse_gradient_work) if backward else ("time, ms", lse_work)
    row.add_reading(quantity, of_one, context.limits.times(work(n, n, d)))
    return row


def isir_work(n: int, m: int, d: int) -> Work:
    """What a bfloat16 `isir_step` cannot do without: of a (row, key) an exponential and two logarithms."""
    tuning = triton_tuning()
    l2_bytes = 0
    if tuning is not None:
        chosen = tuning.sweep(tuning.device(0)[0], True, d, n)
        l2_bytes = sweep_l2_bytes(n, m, d, 2, chosen.block_m, chosen.block_d, ids=False)
    return Work(2 * n * m * d, 2 * (n + m) * d, l2_bytes, exponentials=3 * n * m)


def isir(context: Context, backend: str, d: int) -> Row:
    """`isir_step` of a large batch, beside the two that it does in one: a log-sum-exp and a draw."""
    n = context.size(32_768, 64)
    queries, keys = make_operands(n, n, d, torch.bfloat16, context.device)
    step = IsirStep(queries, keys, TEMPERATURE, backend)
    measured = context.measure(
        {
            "isir_step": step,
            "contrastive_lse": LseStep(queries, keys, TEMPERATURE, backend, backward=False),
            "gumbel_sample": GumbelDraws(queries, keys, TEMPERATURE, 1),
        }
    )
    row = Row({"n": n, "m": n, "d": d, "dtype": "bfloat16"})
    row.add_times(measured)
    own = measured.seconds["isir_step"]
    row.add_reading("time, ms", own, context.limits.times(isir_work(n, n, d)))
    # By rounds: a call that took no part in one has no time there.
    alone = zip(measured.seconds["contrastive_lse"], measured.seconds["gumbel_sample"], strict=True)
    both = [None if None in pair else sum(pair) for pair in alone]
    row.add_goal("time / both alone", ratios(own, both), "<=", 1.0)
    row.add_goal("peak extra MB", context.peak_megabytes(step), "<=", 100)
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
    row.add_reading("time, ms", measured.seconds["mh_step"], context.limits.times(sweep_work(backend, n, m, d, step)))
    row.notes["TB/s of copy"] = 1e-12 * copy.bytes_moved / summarize(figures(measured.seconds["copy"])).median
    return row


def crossover(context: Context, _: str, sides: tuple[int, ...]) -> Row:
    """Replayed sweeps by every backend: which is faster at which size. Microseconds, in the notes."""
    sides = (32, 48) if context.rehearsal else sides
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
    "sweep-512": partial(sweep, d=512, bound=SWEEP_GOALS[512]),
    "sweep-128": partial(sweep, d=128, bound=SWEEP_GOALS[128]),
    "sweep-ids-512": partial(sweep, d=512, bound=None, ids=True),
    "sweep-ids-128": partial(sweep, d=128, bound=None, ids=True),
    "uniform": uniform,
    "small-64": partial(small, m=64),
    "loss-32": partial(small_loss, sampler="mh"),
    "loss-16384": large_loss,
    "lse-128": partial(lse, d=128),
    "lse-backward-128": partial(lse, d=128, backward=True),
    "lse-backward-512": partial(lse, d=512, backward=True),
    "isir-128": partial(isir, d=128),
    "isir-loss-32": partial(small_loss, sampler="isir"),
    "small-32": partial(small, m=32),
    "split": split,
    "small-64-float32": partial(small, m=64, dtype=torch.float32),
    "sweep-1024": partial(sweep, d=1024, bound=None),
    "large-crossover": partial(crossover, sides=(2048, 4096, 8192, 16_384)),
    "crossover": partial(crossover, sides=(32, 64, 128, 256, 512, 1024)),
}
OF_ALL_BACKENDS = ("large-crossover", "crossover")
NONE_ON_CUDA = ("lse-128", "lse-backward-128", "lse-backward-512", "isir-128", "isir-loss-32")

# What is measured first where a GPU is lent for minutes. No name begins another's: each can be asked for alone.
HEADLINE = tuple(ROWS)[:11]
# Without matrix units, which the cuda backend uses on Hopper alone, such a sweep takes several times as long.
SWEEPS = ("sweep-512", "sweep-128", "sweep-ids-512", "sweep-ids-128")
HEADLINE_NOT_ON_CUDA = ("loss-16384",)
