"""Exact draws from the softmax: every backend against the noise of the contract and a literal argmax, and against the
law itself."""

import pytest
import torch
from helpers import COMPILED, RUNNABLE, assert_identical, chi_square, named_error
from oracle import unit

import emc2_kernels as emc2
from emc2_kernels import rng

SIZES = [(1, 1, 1), (1, 5, 3), (7, 4, 16), (8, 3, 17), (16, 63, 64), (17, 64, 33), (33, 65, 100), (65, 130, 8)]


def oracle(queries, keys, *, temperature, seed, step, num_samples=1, chain_ids=None, query_ids=None, key_ids=None):
    """Positions (n, R), and by how much each lost draw was lost at least (n, R), in float64."""
    n, m = queries.shape[0], keys.shape[0]
    positions, margins = torch.full((n, num_samples), -1), torch.full((n, num_samples), torch.inf, dtype=torch.float64)
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(n)
    scores = queries.double() @ keys.double().T / temperatures[:, None]
    chains = chain_ids if chain_ids is not None else query_ids if query_ids is not None else torch.arange(n)
    options = {"seed": seed, "step": step, "dtype": torch.float64}
    noise = [rng.gumbel(chains, range(m), sample=r, **options) for r in range(num_samples)]
    for i in range(n):
        drawable = scores[i].isfinite()
        if query_ids is not None:
            drawable &= key_ids != query_ids[i]
        places = drawable.nonzero()[:, 0].tolist()
        for r in range(num_samples if places else 0):
            values = [(float(scores[i, j] + noise[r][i, j]), j) for j in places]
            positions[i, r] = max(values, key=lambda value: (value[0], -value[1]))[1]
            best, *others = sorted((value for value, _ in values), reverse=True)
            margins[i, r] = best - others[0] if others else torch.inf
    return positions, margins


def draw(backend, queries, keys, **options):
    return emc2.gumbel_sample(queries, keys, backend=backend, **({"temperature": 0.2, "seed": 7, "step": 3} | options))


def assert_exact(backend, queries, keys, min_share=0.9, **options):
    """Index-exact wherever the margin exceeds the error of score and noise, which grows as 1 / temperature."""
    options = {"temperature": 0.2, "seed": 7, "step": 3} | options
    drawn = draw(backend, queries, keys, **options)
    expected, margins = oracle(queries, keys, **options)
    assert drawn.dtype == torch.int64 and drawn.shape == expected.shape
    error = 3e-6 / min(0.2, float(torch.as_tensor(options["temperature"]).min()))
    clear = margins > error
    assert clear.float().mean() >= min_share
    assert_identical(drawn[clear], expected[clear])


def everything(n=37, m=45, num_samples=3):
    """Operands and options with all that a draw can have, and keys that are never drawn."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = unit(n, 19, seed=3), unit(m, 19, seed=4)
    keys[[4, 20, m - 1]] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None]
    options = {
        "temperature": torch.rand(n, generator=generator) * 0.5 + 0.1,
        "seed": 2**64 - 3,
        "step": 2**32 - 1,
        "chain_ids": torch.randperm(n, generator=generator) + 2**40 - n,
        "query_ids": torch.randint(0, 6, (n,), generator=generator) + (1 << 33),
        "key_ids": torch.randint(0, 8, (m,), generator=generator) + (1 << 33),
        "num_samples": num_samples,
    }
    options["key_ids"][::9] -= 1 << 32  # low words of excluded ids under other high words
    return queries, keys, options


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


@pytest.mark.parametrize("num_samples", [1, 3, 17])
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_positions_are_the_oracles(backend, n, m, d, num_samples):
    assert_exact(backend, unit(n, d, seed=1), unit(m, d, seed=2), num_samples=num_samples)


@pytest.mark.parametrize("num_samples", [1, 3, 17])
def test_everything_at_once(backend, num_samples):
    queries, keys, options = everything(num_samples=num_samples)
    assert_exact(backend, queries, keys, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    queries, keys = unit(40, 50, seed=5, dtype=dtype), unit(60, 50, seed=6, dtype=dtype)
    assert_exact(backend, queries, keys, temperature=0.07, num_samples=2)


def test_float64_goes_to_the_reference():
    queries, keys = unit(9, 5, seed=5, dtype=torch.float64), unit(11, 5, seed=6, dtype=torch.float64)
    assert_exact("auto", queries, keys)
    with named_error(ValueError, "backend"):
        draw("cpu", queries, keys)


def test_strided_operands(backend):
    wide_queries, wide_keys = unit(80, 3, 24, seed=7), unit(90, 40, seed=8)
    queries, keys = wide_queries[::2, 1, :20], wide_keys[5::2, 10:30]
    options = {
        "query_ids": torch.arange(80)[::2] % 5,
        "key_ids": torch.arange(86)[::2] % 7,
        "chain_ids": torch.arange(80)[::2],
        "temperature": torch.linspace(0.1, 1, 80)[::2],
    }
    assert_exact(backend, queries, keys, **options)
    assert_exact(backend, queries[:1].expand(40, 20), keys, **options)


def test_scores_far_apart():
    """Low temperatures: the bound by which the cpu backend leaves keys out must hold at all magnitudes."""
    for temperature in (1e-2, 1e-4, 1e-30):
        assert_exact("cpu", unit(33, 16, seed=1), unit(70, 16, seed=2), temperature=temperature, num_samples=3)
    huge = unit(33, 16, seed=1) * 1e19, unit(70, 16, seed=2) * 1e19
    assert_exact("cpu", *huge, temperature=1.0)


def test_many_keys_and_samples_on_all_cores():
    """Large enough that threads share the work, by rows and, with few of these, by samples."""
    for n, m, num_samples in ((3, 1500, 12), (100, 400, 2)):
        assert_exact("cpu", unit(n, 8, seed=1), unit(m, 8, seed=2), num_samples=num_samples)


def test_ties_go_to_the_lowest_position(monkeypatch):
    """Equal keys with equal noise, in the reference; elsewhere two equal words are a chance of 2^-32."""
    words = rng.words
    monkeypatch.setattr(rng, "words", lambda *args, **options: torch.full_like(words(*args, **options), 2**31))
    assert draw("reference", unit(4, 3), unit(1, 3).expand(9, 3)).unique().tolist() == [0]


QUERY, KEYS = unit(1, 6, seed=7), unit(12, 6, seed=8)
LAW = torch.softmax(KEYS.double() @ QUERY.double()[0] / 0.3, 0)
DRAWS = 100_000


def counts_of(positions):
    return positions.flatten().bincount(minlength=len(KEYS)).double()


@pytest.mark.parametrize("backend", COMPILED)
def test_draws_follow_the_softmax_over_chains_and_over_samples(backend):
    over_chains = draw(backend, QUERY.expand(DRAWS, -1), KEYS, temperature=0.3)
    assert chi_square(counts_of(over_chains), LAW) > 1e-4
    over_samples = draw(backend, QUERY.expand(DRAWS // 100, -1), KEYS, temperature=0.3, num_samples=100)
    assert chi_square(counts_of(over_samples), LAW) > 1e-4


def test_a_wrong_sampler_is_rejected():
    """The same test must see a temperature that is off by a tenth."""
    wrong = draw("cpu", QUERY.expand(DRAWS, -1), KEYS, temperature=0.33)
    assert chi_square(counts_of(wrong), LAW) < 1e-10


def test_noise_that_ends_early_is_rejected(monkeypatch):
    """Improbable keys live on the tail of the noise: here it ends at 4, which one draw in 55 exceeds."""
    gumbel = rng.gumbel
    monkeypatch.setattr(rng, "gumbel", lambda *args, **options: gumbel(*args, **options).clamp_max(4))
    wrong = draw("reference", QUERY.expand(DRAWS, -1), KEYS, temperature=0.3)
    assert chi_square(counts_of(wrong), LAW) < 1e-10


def pairs_are_independent(first, second):
    """p-value of two columns of draws, keys taken together by fours, under the product of their laws."""
    joint = (first // 4 * 3 + second // 4).bincount(minlength=9).double()
    law = LAW.view(3, 4).sum(1)
    return chi_square(joint, torch.outer(law, law).flatten())


def test_samples_chains_steps_and_seeds_are_independent():
    options = {"temperature": 0.3, "num_samples": 2}
    queries = QUERY.expand(DRAWS, -1)
    first, second = draw("cpu", queries, KEYS, **options).T
    assert pairs_are_independent(first, second) > 1e-4
    for change in (
        {"step": 4},
        {"seed": 8},
        {"chain_ids": torch.arange(DRAWS) + 1},
        {"chain_ids": torch.arange(DRAWS) + 2**32},
    ):
        assert pairs_are_independent(first, draw("cpu", queries, KEYS, **options | change)[:, 0]) > 1e-4
    same = draw("cpu", queries, KEYS, **options | {"chain_ids": torch.arange(DRAWS)})[:, 0]
    assert_identical(same, first)
    assert pairs_are_independent(first, same) == 0


@pytest.mark.parametrize("backend", COMPILED)
def test_a_draw_depends_neither_on_the_other_rows_nor_on_how_many_samples_are_drawn(backend):
    queries, keys, options = everything()
    chains = options.pop("chain_ids")
    drawn = draw(backend, queries, keys, chain_ids=chains, **options)
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(1))[:20]
    fewer = {name: value[order] for name, value in options.items() if name in ("temperature", "query_ids")}
    options |= fewer | {"num_samples": 2}
    assert_identical(draw(backend, queries[order], keys, chain_ids=chains[order], **options), drawn[order, :2])


@pytest.mark.parametrize("backend", RUNNABLE)
def test_rows_without_keys_draw_nothing(backend):
    queries, keys = unit(5, 4, seed=1), unit(3, 4, seed=2)
    ids = {"query_ids": torch.tensor([0, 0, 1, 0, 0]), "key_ids": torch.zeros(3, dtype=torch.int64)}
    drawn = draw(backend, queries, keys, num_samples=3, **ids)
    assert (drawn[[0, 1, 3, 4]] == -1).all() and (drawn[2] >= 0).all()
    assert draw(backend, queries[:0], keys, num_samples=3).shape == (0, 3)
    assert_identical(draw(backend, queries, keys[:0], num_samples=3), torch.full((5, 3), -1))
    assert_identical(draw(backend, queries, keys * torch.nan, num_samples=3), torch.full((5, 3), -1))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_what_is_not_finite_is_never_drawn(backend):
    queries, keys = unit(20, 4, seed=1).abs(), unit(40, 4, seed=2).abs()
    keys[:13], keys[13:26], keys[26:39] = torch.nan, torch.inf, -torch.inf
    assert draw(backend, queries, keys, num_samples=4).unique().tolist() == [39]


def test_nothing_is_differentiated_through():
    queries, keys = unit(3, 4, seed=1).requires_grad_(), unit(5, 4, seed=2).requires_grad_()
    temperature = torch.tensor(0.2, requires_grad=True)
    drawn = draw("auto", queries, keys, temperature=temperature)
    assert not drawn.requires_grad
    assert_identical(drawn, draw("auto", queries.detach(), keys.detach()))


def test_compiled_whole_and_under_autocast():
    queries, keys, options = everything(n=6, m=24)
    expected = draw("auto", queries, keys, **options)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(queries, keys, step):
        return emc2.gumbel_sample(queries, keys, **options | {"step": step}) + 0

    assert_identical(compiled(queries, keys, torch.tensor(2**32 - 1)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(draw("auto", queries, keys, **options), expected)
        assert_identical(draw("reference", queries, keys, **options), draw("reference", queries, keys, **options))


def test_counters_may_be_tensors():
    queries, keys, options = everything()
    drawn = draw("cpu", queries, keys, **options)
    options |= {"seed": torch.tensor(-3), "step": torch.tensor(2**32 - 1)}
    for backend in COMPILED:
        assert_identical(draw(backend, queries, keys, **options), drawn)


Q, K = unit(3, 4, seed=1), unit(5, 4, seed=2)


def test_softmax_sample_follows_the_softmax():
    drawn = emc2.softmax_sample(QUERY.expand(4, -1), KEYS, temperature=0.3, num_samples=DRAWS // 4)
    assert chi_square(counts_of(drawn), LAW) > 1e-4
    wrong = emc2.softmax_sample(QUERY.expand(4, -1), KEYS, temperature=0.33, num_samples=DRAWS // 4)
    assert chi_square(counts_of(wrong), LAW) < 1e-10


def test_softmax_sample_takes_its_draws_from_the_generator_or_from_seed_and_step():
    def drawn(**options):
        return emc2.softmax_sample(QUERY, KEYS, temperature=0.3, num_samples=50, **options)

    assert_identical(drawn(seed=5, step=6), drawn(seed=torch.tensor(5), step=torch.tensor(6)))
    different = [drawn(), drawn(seed=1), drawn(step=1), drawn(generator=torch.Generator().manual_seed(3))]
    assert len({tuple(each.flatten().tolist()) for each in different}) == 4
    generator = torch.Generator().manual_seed(3)
    first, second = drawn(generator=generator), drawn(generator=generator)
    assert_identical(first, different[3])
    assert not torch.equal(first, second)


def test_softmax_sample_draws_among_the_same_keys():
    queries, keys, options = everything(num_samples=200)
    del options["chain_ids"]
    options["query_ids"][0], options["key_ids"][:40] = (1 << 33) + 9, (1 << 33) + 9  # row 0: all keys but 41 .. 44
    options["key_ids"][40:] = 1 << 33
    drawn = emc2.softmax_sample(queries, keys, **options)
    expected = draw("reference", queries, keys, **options)
    drawable = [(set(each.tolist()), set(other.tolist())) for each, other in zip(drawn, expected, strict=True)]
    assert all(each == other == {-1} for each, other in drawable if -1 in each | other)
    assert drawable[0][0] <= {40, 41, 42, 43} and not {4, 20, 44} & set(drawn.flatten().tolist())
    assert not (options["key_ids"][drawn] == options["query_ids"][:, None])[drawn >= 0].any()


def test_softmax_sample_without_keys():
    ids = {"query_ids": torch.tensor([1, 1, 2]), "key_ids": torch.ones(5, dtype=torch.int64)}
    drawn = emc2.softmax_sample(Q, K, temperature=0.2, **ids)
    assert_identical(drawn[:2], torch.full((2, 1), -1))
    assert drawn[2] >= 0
    assert emc2.softmax_sample(Q[:0], K, temperature=0.2).shape == (0, 1)
    assert_identical(emc2.softmax_sample(Q, K[:0], temperature=0.2), torch.full((3, 1), -1))
