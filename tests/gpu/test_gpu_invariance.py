"""What must not change a bit: row order, neighbours, splitting a walk, running again, rubbish in fresh memory."""

import functools
import itertools

import pytest
import torch
from gpu_support import (
    BACKENDS,
    ON_GPU,
    assert_equal_bits,
    assert_matches,
    column_walk,
    generator,
    integers,
    moved,
    on_cpu,
    problem,
    rehearsed,
    run,
    score_error,
    step_of,
)

import emc2_kernels as emc2

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS, indirect=True)]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
KINDS = pytest.mark.parametrize("kind", ["sweep", "uniform", "positions"])


def exact_problem(n, m, d, dtype, kind="sweep", count=100, **options):
    """Operands whose products no order of addition changes, so that whatever kernel runs, it must agree to the bit."""
    draw = generator(d)
    values = {
        "queries": integers(n, d, seed=1, dtype=dtype),
        "keys": integers(m, d, seed=2, dtype=dtype),
        "state": emc2.MHState(torch.arange(n) + 100, torch.linspace(-6, 6, n)),
        "temperature": 2.0 ** round(torch.tensor(d).log2().item() / 2),
        "seed": 5,
        "step": 2,
        "chain_ids": torch.randperm(10 * n, generator=draw)[:n],
        "query_ids": torch.randint(0, 20, (n,), generator=draw),
        "key_ids": torch.randint(0, 30, (m,), generator=draw),
        **options,
    }
    if kind == "uniform":
        values |= {"proposal": "uniform", "num_proposals": count}
    elif kind == "positions":
        values["proposal"] = torch.randint(0, m, (n, count), generator=draw)
    return values


PER_ROW = ("queries", "chain_ids", "query_ids")


def some_rows(values, rows):
    taken = {name: values[name][rows] for name in PER_ROW}
    if isinstance(values.get("proposal"), torch.Tensor):
        taken["proposal"] = values["proposal"][rows]
    return values | taken | {"state": emc2.MHState(*(field[rows] for field in values["state"]))}


def take(result, rows):
    fields = [None if field is None else field[rows] for field in result if not isinstance(field, emc2.MHState)]
    return [*fields, *(field[rows] for field in result.state)]


@KINDS
@DTYPES
def test_permuted_rows(device, backend, kind, dtype):
    """The same number of rows in another order: not a bit changes, whatever the operands."""
    values = exact_problem(
        203, 190, 72, dtype, kind, num_samples=8, burn_in=10, log_proposal=torch.linspace(-1, 1, 190)
    )
    random = problem(203, 190, 72, dtype, seed=7)
    values |= {"queries": random["queries"], "keys": random["keys"], "temperature": 0.1}
    asked = {"return_accepts": True, "return_lse": kind == "sweep"}
    whole = step_of(values, device, backend, **asked)
    for seed in range(3):
        rows = torch.randperm(203, generator=generator(seed))
        again = step_of(some_rows(values, rows), device, backend, **asked)
        assert_equal_bits(take(again, slice(None)), take(whole, rows))


@KINDS
@DTYPES
def test_other_neighbours(device, backend, kind, dtype):
    """Fewer rows may run in other tiles or another kernel."""
    values = exact_problem(300, 257, 96, dtype, kind, num_samples=8, burn_in=10)
    whole = step_of(values, device, backend, return_accepts=True)
    for size in (257, 128, 65, 64, 17, 3, 1):
        rows = torch.randperm(300, generator=generator(size))[:size]
        part = step_of(some_rows(values, rows), device, backend, return_accepts=True)
        assert_equal_bits(take(part, slice(None)), take(whole, rows))


def shards(values, cuts, device, backend):
    """The parts of a walk between the cuts, each as a transition; sample points follow the whole walk."""
    proposal, m = values.get("proposal", "sweep"), len(values["keys"])
    is_sweep = isinstance(proposal, str) and proposal == "sweep"
    total = m if is_sweep else values.get("num_proposals", 0) or proposal.shape[1]
    local = moved({name: value for name, value in values.items() if name != "state"}, device)
    queries, keys = local.pop("queries"), local.pop("keys")
    for begin, end in itertools.pairwise([0, *cuts, total]):
        part, own = keys, {"first_proposal": begin, "total_proposals": total}
        if is_sweep:
            part = keys[begin:end]
            own |= {name: local[name][begin:end] for name in ("key_ids", "log_proposal") if name in local}
        elif "num_proposals" in local:
            own["num_proposals"] = end - begin
        else:
            own["proposal"] = local["proposal"][:, begin:end]
        yield run(emc2.mh_transition, queries, part, backend=backend, **(local | own))


@KINDS
@DTYPES
@pytest.mark.parametrize("cuts", [(1,), (5, 21), (3, 17, 18, 40, 130), (64,), (0, 190), (15, 16, 33, 127, 129)])
def test_shards_compose_to_the_whole_walk(device, backend, kind, dtype, cuts):
    weights = torch.linspace(-1, 1, 190)
    values = exact_problem(77, 190, 64, dtype, kind, 190, burn_in=11, num_samples=9, log_proposal=weights)
    whole = step_of(values, device, backend)
    composed = on_cpu(functools.reduce(emc2.compose, shards(values, cuts, device, backend)))
    assert_equal_bits(emc2.apply(composed, values["state"], values["key_ids"]), whole)
    assert_equal_bits(composed, on_cpu(next(shards(values, (), device, backend))))


@DTYPES
def test_shards_of_random_operands(device, backend, dtype):
    """Shards may be multiplied by another kernel: equal wherever no tie is within rounding."""
    values = problem(130, 700, 128, dtype, seed=9, temperature=0.1, num_samples=12, burn_in=100)
    composed = functools.reduce(emc2.compose, shards(values, (70, 71, 333), device, backend))
    result = emc2.apply(on_cpu(composed), values["state"])
    assert_matches(result, column_walk(values), score_error(0.1, 128))


@DTYPES
def test_few_rows_and_many_keys(device, backend, dtype):
    """Keys that are split over the chip make the walk that their shards make."""
    m = rehearsed(1_000_000, 5_000)
    for n, d in ((64, 64), (3, 128)):
        values = exact_problem(n, m, d, dtype, burn_in=m // 2, num_samples=16)
        whole = step_of(values, device, backend, return_accepts=True)
        cuts = sorted({m * k // 7 + k for k in range(1, 7)})
        composed = on_cpu(functools.reduce(emc2.compose, shards(values, cuts, device, backend)))
        applied = emc2.apply(composed, values["state"], values["key_ids"])
        assert_equal_bits(applied, whole._replace(num_accepted=None))
        assert (whole.num_accepted > 0).all()
        reference = emc2.mh_step(**(moved(values, device)), backend="reference")
        error = score_error(values["temperature"], d).item()
        torch.testing.assert_close(whole.threshold, reference.threshold.cpu(), rtol=1e-6, atol=error)
        # A tie sends two walks apart, and a few proposals later they meet again.
        assert (whole.state.key == reference.state.key.cpu()).double().mean() >= 0.95 or n < 20


def soil(device, megabytes, byte):
    """Fresh memory will be what was just given back: filled with this byte."""
    sizes = [512 << k for k in range(0, 12)] + [megabytes << 20]
    held = [torch.full((size,), byte, dtype=torch.uint8, device=device) for size in sizes for _ in range(6)]
    del held


RERUNS = {
    "small": (64, 32, 128, "sweep"),
    "tiles": (300, 500, 128, "sweep"),
    "wide rows": (130, 260, 1024, "sweep"),
    "split": (16, 20_000, 64, "sweep"),
    "uniform": (300, 500, 128, "uniform"),
    "positions": (300, 500, 96, "positions"),
}


@DTYPES
@pytest.mark.parametrize("shape", RERUNS.values(), ids=RERUNS)
def test_twenty_runs_in_dirty_memory(device, backend, dtype, shape):
    """The same bits each time: nothing is left unwritten and nothing races."""
    n, m, d, kind = shape
    values = problem(n, m, d, dtype, seed=11, temperature=0.1) | {"burn_in": 20, "num_samples": 8}
    if kind == "uniform":
        values |= {"proposal": "uniform", "num_proposals": 200}
    elif kind == "positions":
        values["proposal"] = torch.randint(0, m, (n, 200), generator=generator(0))
    asked = {"return_accepts": True, "return_lse": kind == "sweep"}
    first = step_of(values, device, backend, **asked)
    for repeat in range(20 if ON_GPU else 3):
        soil(device, 4, (0xFF, 0x7F, 0x80, 0x3C)[repeat % 4])
        assert_equal_bits(step_of(values, device, backend, **asked), first)
    soil(device, 4, 0x7F)
    options = {name: value for name, value in moved(values, device).items() if name != "state"}
    assert_equal_bits(
        run(emc2.mh_transition, options.pop("queries"), options.pop("keys"), backend=backend, **options).threshold[
            :, -1
        ],
        first.threshold.to(device),
    )
