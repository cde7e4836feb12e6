"""A step over all keys on a GPU: index-exact against float64 away from ties, its gradients, and what a graph replays;
nothing waits for the device."""

import itertools

import pytest
import torch
from gpu_support import BACKENDS, captured, generator, loud_synchronisation, rehearsed, similarity_error
from helpers import relative_rms
from oracle import unit

from emc2_kernels import MHState, isir_step, ops, rng
from emc2_kernels.backends.params import CarriedParams, ScoreParams

# "cuda" has no such kernel.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"], indirect=True),
]

NOISE_ERROR = 2e-5  # of two noises: philox.py's bound in powers of two, and the roundings of score and sum
COUNTER = {"seed": 2**63 + 5, "step": 2**32 - 1}
TEMPERATURE = 0.2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # of a gradient's relative RMS
IDS = ("query_ids", "carried_ids")


def problem(n, m, d, dtype, count=1):
    """Operands and what rows bring along, a fifth of it nothing; ids exclude some keys, and keys have a law, by which
    some are none."""
    options = {
        "chain_ids": torch.randint(0, 2**40, (n,), generator=generator(1)),
        "query_ids": torch.randint(0, 9, (n,), generator=generator(2)),
        "carried_ids": torch.randint(0, 9, (n,), generator=generator(3)),
        "key_ids": torch.randint(0, 12, (m,), generator=generator(4)),
        "key_labels": torch.randint(0, 2**60, (m,), generator=generator(5)),
        "log_proposal": torch.randn(m, generator=generator(6)),
    }
    options["log_proposal"][5::13] = torch.inf
    score = torch.randn(n, count, generator=generator(7)) + 4
    for place, nothing in zip(range(3, n * count, 5), itertools.cycle((torch.nan, torch.inf, -torch.inf))):
        score.view(-1)[place] = nothing
    own = torch.arange(n * count).view(n, count) + 10**12, score
    return unit(n, d, seed=8, dtype=dtype), unit(m, d, seed=9, dtype=dtype), own, options


def candidates(queries, keys, score, options, temperature=TEMPERATURE):
    """(n, C + m) scores in float64, differentiable; -inf: there is none."""
    scores = queries.double() @ keys.double().T / temperature - options["log_proposal"].double()
    excluded = sum(options[name][:, None] == options["key_ids"] for name in IDS if name in options) > 0
    return torch.cat((score.double().where(score.isfinite(), -torch.inf), scores.masked_fill(excluded, -torch.inf)), 1)


def step_on(device, backend, queries, keys, own, options, first_key=0):
    """Position, key, score, lse and value (n,) on the CPU."""
    queries, keys, *own = (tensor.to(device) for tensor in (queries, keys, *own))
    moved = {name: value.to(device) for name, value in options.items()}
    labels, chain_ids = moved.pop("key_labels"), moved.pop("chain_ids")
    scores = ScoreParams(queries, keys, TEMPERATURE, moved.pop("query_ids", None), **moved)
    carried = CarriedParams(*own, labels, chain_ids, COUNTER["seed"] - 2**64, COUNTER["step"], first_key)
    return [result.cpu() for result in ops.isir_step(scores, carried, backend)]


def assert_steps(found, queries, keys, own, options, first_key=0):
    (n, count), m = own[1].shape, len(keys)
    scores = candidates(queries, keys, own[1], options)
    draw = {**COUNTER, "dtype": torch.float64}
    noise = rng.gumbel(options["chain_ids"], range(count), stream=rng.CARRIED, **draw)
    noise = torch.cat((noise, rng.gumbel(options["chain_ids"], range(first_key, first_key + m), **draw)), 1)
    two = (scores + noise).topk(2)
    column, margin = two.indices[:, 0], two.values[:, 0] - two.values[:, 1]
    error = similarity_error(queries.shape[1]) / TEMPERATURE + NOISE_ERROR
    nobody = two.values[:, 0] == -torch.inf
    clear = (margin > error) | nobody
    assert clear.double().mean() >= 0.9
    places = torch.cat((-1 - torch.arange(count), first_key + torch.arange(m)))[column]
    names = torch.cat((own[0], options["key_labels"].expand(n, m)), 1).gather(1, column[:, None])[:, 0]
    position, key, score, lse, value = found
    assert torch.equal(position[clear], torch.where(nobody, -1, places)[clear])
    assert torch.equal(key[clear], torch.where(nobody, -1, names)[clear])
    drawn = torch.where(nobody, -torch.inf, scores.gather(1, column[:, None])[:, 0])
    exact = [drawn[clear], torch.logsumexp(scores, 1), two.values[:, 0]]
    torch.testing.assert_close([score[clear].double(), lse.double(), value], exact, rtol=1e-6, atol=error)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 2, 1), (63, 127, 40), (65, 1025, 128), (129, 300, 768), (3, 20_001, 64)])
def test_steps_are_those_of_float64(device, backend, n, m, d, dtype):
    queries, keys, own, options = problem(n, m, d, dtype)
    assert_steps(step_on(device, backend, queries, keys, own, options), queries, keys, own, options)


@pytest.mark.parametrize(
    ("count", "first_key", "without"), [(0, 0, "query_ids"), (4, 3, ""), (2, 2**31 + 6, "carried_ids")]
)
def test_candidates_of_a_chains_own_and_keys_that_begin_anywhere(device, backend, count, first_key, without):
    queries, keys, own, options = problem(65, 1025, 128, torch.bfloat16, count)
    options.pop(without, None)
    found = step_on(device, backend, queries, keys, own, options, first_key)
    assert_steps(found, queries, keys, own, options, first_key)


def test_ids_and_products_may_be_all_that_there_is(device, backend):
    """Without ids, labels, a law and chains of names."""
    n, m = 65, 300
    queries, keys, own, _ = problem(n, m, 64, torch.bfloat16)
    state = MHState(own[0][:, 0], own[1][:, 0])
    on_device = MHState(*(field.to(device) for field in state))
    result = isir_step(
        queries.to(device), keys.to(device), on_device, temperature=TEMPERATURE, backend=backend, **COUNTER
    )
    found = [result.position, *result.state, result.lse]
    none = {"key_ids": torch.zeros(m), "log_proposal": torch.zeros(m), "key_labels": torch.arange(m)}
    none["chain_ids"] = torch.arange(n)
    draw = {**COUNTER, "dtype": torch.float64}
    noise = torch.cat((rng.gumbel(none["chain_ids"], range(1), stream=rng.CARRIED, **draw),
                       rng.gumbel(none["chain_ids"], range(m), **draw)), 1)  # fmt: skip
    value = (candidates(queries, keys, own[1], none | {"query_ids": torch.ones(n)}) + noise).amax(1)
    assert_steps([*(each.cpu() for each in found), value], queries, keys, own, none | {"query_ids": torch.ones(n)})


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("among", [False, True], ids=["", "queries that are the keys"])
@pytest.mark.parametrize("per_row", [False, True], ids=["", "temperatures"])
def test_gradients_are_those_of_float64(device, backend, per_row, among, dtype):
    queries, keys, own, options = problem(130, 130 if among else 700, 64, dtype)
    if among:
        options["query_ids"] = options["key_ids"]
    temperature = torch.linspace(0.1, 0.5, 130) if per_row else torch.tensor(0.2)
    weights = torch.linspace(-1, 1, 130)

    def leaves_of(*tensors):
        return [tensor.detach().clone().requires_grad_() for tensor in tensors]

    exact = leaves_of(queries.double(), keys.double(), own[1].double(), temperature.double())
    column = exact[3][:, None] if per_row else exact[3]
    of_keys = exact[0] if among else exact[1]
    lse = torch.logsumexp(candidates(exact[0], of_keys, exact[2], options, column), 1)
    used = [leaf for place, leaf in enumerate(exact) if not (among and place == 1)]
    expected = torch.autograd.grad((lse * weights.double()).sum(), used)

    given = leaves_of(*(tensor.to(device) for tensor in (queries, keys, own[1][:, 0], temperature)))
    moved = {name: value.to(device) for name, value in options.items()}
    if among:
        moved["query_ids"] = moved["key_ids"]
    state = MHState(own[0][:, 0].to(device), given[2])
    result = isir_step(
        given[0], given[0] if among else given[1], state, temperature=given[3], backend=backend, **COUNTER, **moved
    )
    assert relative_rms(result.lse.cpu(), lse) < 1e-5
    used = [leaf for place, leaf in enumerate(given) if not (among and place == 1)]
    found = torch.autograd.grad((result.lse * weights.to(device)).sum(), used)
    for value, wanted in zip(found, expected, strict=True):
        slack = 10 if wanted.dim() == 0 else 1  # one temperature's gradient is a sum over rows of both signs
        assert relative_rms(value.cpu().view_as(wanted), wanted.nan_to_num(0.0)) < slack * TOLERANCE[dtype]


def test_a_captured_step_advances_and_waits_for_nothing(device, backend, cuda_only):
    """Chains that are carried on by the graph itself."""
    queries, keys, own, options = problem(64, rehearsed(100_000, 1000), 64, torch.bfloat16)
    queries, keys = queries.to(device), keys.to(device)
    options = {name: value.to(device) for name, value in options.items()}
    step = torch.zeros((), dtype=torch.int64, device=device)
    state = MHState(own[0][:, 0].to(device), own[1][:, 0].to(device))

    def resample():
        return isir_step(queries, keys, state, temperature=0.2, seed=step + 3, step=step, backend=backend, **options)

    resample()
    with loud_synchronisation():
        resample()
    graph, out = captured(resample)
    for value in (0, 5):
        step.fill_(value)
        graph.replay()
        expected = resample()
        pairs = zip(
            (out.position, *out.state, out.lse), (expected.position, *expected.state, expected.lse), strict=True
        )
        assert all(torch.equal(*pair) for pair in pairs)
        state.key.copy_(expected.state.key)
        state.score.copy_(expected.state.score)
