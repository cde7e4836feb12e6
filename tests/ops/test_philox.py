"""The random-number contract: known answers, an independent generator in plain integers, and every draw from it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import RUNNABLE
from scipy import stats

from emc2_kernels import mh_transition, ops, rng
from emc2_kernels.backends.cpu import build as native
from emc2_kernels.backends.params import CarriedParams, ScoreParams

SEEDS = (0, 20240427, 2**32, 2**63 + 11, 2**64 - 1)
STEPS = (0, 5, 2**32 - 1)
CHAINS = (0, 1, 2**32 - 1, 2**32, 2**32 + 7, 0xAB << 32 | 0x1234_5678, 2**40 - 1)  # 40 bits, in two counter words
KNOWN_ANSWERS = {
    0x00000000: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    0xFFFFFFFF: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
}


def plain_philox(counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """Philox4x32-7 in Python's integers, from the paper's description: two products, their halves swapped and mixed."""
    left0, right0, left1, right1 = counter
    key0, key1 = seed % 2**32, seed // 2**32
    for _ in range(7):
        product0, product1 = 0xD2511F53 * left0, 0xCD9E8D57 * left1
        left0, right0 = product1 // 2**32 ^ right0 ^ key0, product1 % 2**32
        left1, right1 = product0 // 2**32 ^ right1 ^ key1, product0 % 2**32
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return left0, right0, left1, right1


def plain_words(chain: int, block: int, *, stream: int, seed: int, step: int, sample: int = 0) -> tuple[int, ...]:
    """The counter as the contract spells it: block; chain, low; 16 bits sample, 8 bits chain, 8 bits stream; step."""
    third = int(f"{sample:016b}{chain // 2**32:08b}{stream:08b}", 2)
    return plain_philox((block, chain % 2**32, third, step), seed)


def plain_exponential(chain: int, proposal: int, *, seed: int, step: int) -> float:
    word = plain_words(chain, proposal // 4, stream=0, seed=seed, step=step)[proposal % 4]
    return -math.log(((word >> 9) * 2 + 1) / 2**24)


def plain_position(chain: int, proposal: int, num_keys: int, *, seed: int, step: int) -> int:
    drawn = plain_words(chain, proposal // 2, stream=1, seed=seed, step=step)
    low, high = drawn[proposal % 2 * 2 : proposal % 2 * 2 + 2]
    return (high << 32 | low) * num_keys >> 64


def native_words(counters: torch.Tensor, seed: int) -> torch.Tensor:
    """(n, 4) int64 counters to (n, 4) int64 words, by the compiled core."""
    given = counters.to(torch.int32).contiguous()  # wraps: the same 32 bits
    words = torch.full_like(given, -77)
    native.library().philox_words(given.data_ptr(), given.shape[0], seed, words.data_ptr())
    return words.to(torch.int64) & 0xFFFFFFFF


def random_counters(count: int, seed: int) -> torch.Tensor:
    return torch.randint(2**32, (count, 4), generator=torch.Generator().manual_seed(seed))


def assert_uniform(values: torch.Tensor, bins: int) -> None:
    """Chi-square, both ways: too even is not random either."""
    counts = torch.bincount(values.flatten(), minlength=bins).double()
    assert counts.numel() == bins, f"{counts.numel() - bins} values too many"
    expected = values.numel() / bins
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    law = stats.chi2(bins - 1)
    assert law.sf(statistic) > 1e-9 and law.cdf(statistic) > 1e-9, f"{statistic:.1f} for {bins} bins"


@pytest.mark.parametrize("word", KNOWN_ANSWERS, ids=hex)
def test_known_answers(word: int) -> None:
    seed = word << 32 | word
    counter = torch.full((1, 4), word)
    answer = KNOWN_ANSWERS[word]
    assert plain_philox((word,) * 4, seed) == answer
    assert tuple(map(int, rng.philox4x32(counter.unbind(1), seed))) == answer
    assert tuple(native_words(counter, seed)[0].tolist()) == answer


def test_a_million_counters_on_every_implementation() -> None:
    for number, seed in enumerate(SEEDS):
        counters = random_counters(200_000, number)
        expected = torch.stack(rng.philox4x32(counters.unbind(1), seed), 1)
        assert torch.equal(native_words(counters, seed), expected)
        for row in range(200):
            assert tuple(expected[row].tolist()) == plain_philox(tuple(counters[row].tolist()), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tensor_seed_is_the_unsigned_number_with_its_bits(seed: int) -> None:
    counters = random_counters(100, 1).unbind(1)
    tensor = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    assert torch.equal(torch.stack(rng.philox4x32(counters, tensor)), torch.stack(rng.philox4x32(counters, seed)))


@pytest.mark.parametrize("stream", range(5))
def test_counter_layout(stream: int) -> None:
    blocks = (0, 1, 2**31, 2**32 - 1)
    for seed, step in ((SEEDS[1], 0), (SEEDS[3], STEPS[1]), (SEEDS[4], STEPS[2])):
        for sample in (0, 1, 2**16 - 1):
            drawn = rng.words(
                torch.tensor(CHAINS)[:, None], torch.tensor(blocks), stream=stream, seed=seed, step=step, sample=sample
            )
            for i, chain in enumerate(CHAINS):
                for j, block in enumerate(blocks):
                    expected = plain_words(chain, block, stream=stream, seed=seed, step=step, sample=sample)
                    assert tuple(drawn[i, j].tolist()) == expected, (chain, block, sample)


def test_stream_numbers() -> None:
    assert (rng.ACCEPTANCE, rng.POSITION, rng.GUMBEL, rng.VIEW_COIN, rng.CARRIED) == (0, 1, 2, 3, 4)


def test_no_two_draws_share_a_counter() -> None:
    """The generator is one-to-one for a seed, so equal words would mean equal counters: fields that overlap."""
    drawn = [
        rng.words(torch.tensor(CHAINS)[:, None], torch.arange(3), stream=stream, seed=3, step=step, sample=sample)
        for stream in range(5)
        for step in STEPS
        for sample in (0, 1, 2**16 - 1)
    ]
    blocks = {tuple(row) for row in torch.cat([d.flatten(0, 1) for d in drawn]).tolist()}
    assert len(blocks) == len(drawn) * len(CHAINS) * 3


# Inside one block of four, across blocks, past 2^32 proposals.
SHARDS = (range(0, 1), range(0, 9), range(3, 10), range(4, 8), range(6, 7), range(2**32 + 5, 2**32 + 12))


@pytest.mark.one_seed
@pytest.mark.parametrize("proposals", SHARDS, ids=str)
def test_acceptance_draws(proposals: range) -> None:
    for seed in SEEDS:
        for step in STEPS:
            drawn = rng.acceptance(torch.tensor(CHAINS), proposals, seed=seed, step=step, dtype=torch.float64)
            expected = [[plain_exponential(chain, p, seed=seed, step=step) for p in proposals] for chain in CHAINS]
            torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("proposals", SHARDS, ids=str)
def test_acceptance_draws_of_the_kernels(proposals: range) -> None:
    """Scores rise by 100 from key to key, so that each is accepted: the threshold after each proposal is its own."""
    scores = 100.0 * torch.arange(len(proposals))
    for seed in SEEDS:
        walk = mh_transition(
            torch.ones(len(CHAINS), 1), scores[:, None], temperature=1.0, seed=seed, step=2**32 - 1,
            chain_ids=torch.tensor(CHAINS), first_proposal=proposals.start, total_proposals=proposals.stop,
            burn_in=proposals.start, num_samples=len(proposals), backend="cpu",
        )  # fmt: skip
        expected = rng.acceptance(torch.tensor(CHAINS), proposals, seed=seed, step=2**32 - 1, dtype=torch.float64)
        torch.testing.assert_close(walk.threshold.double() - scores, expected, rtol=0, atol=1e-4)


def test_acceptance_draws_of_the_kernels_to_two_units_in_the_last_place() -> None:
    """One key of score 0: the threshold is E itself."""
    chains = torch.arange(20_000)
    for proposal in range(4):
        walk = mh_transition(
            torch.zeros(20_000, 1), torch.zeros(1, 1), temperature=1.0, seed=9, step=1, first_proposal=proposal,
            backend="cpu",
        )  # fmt: skip
        shard = range(proposal, proposal + 1)
        expected = rng.acceptance(chains, shard, seed=9, step=1, dtype=torch.float64)
        torch.testing.assert_close(walk.threshold.double(), expected, rtol=2 * 2.0**-23, atol=0)


def replace_words(monkeypatch: pytest.MonkeyPatch, words: list[int]) -> None:
    """Extreme words are too rare to be waited for."""
    monkeypatch.setattr(rng, "_word_of_proposal", lambda *_, **__: torch.tensor([words]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_acceptance_draws(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """u stays inside (0, 1), so E is finite, and never negative."""
    replace_words(monkeypatch, [0, 511, 512, 2**32 - 512, 2**32 - 1])
    drawn = rng.acceptance(torch.zeros(1), range(5), seed=0, step=0, dtype=dtype)
    u = torch.tensor([[2.0**-24, 2.0**-24, 3 * 2.0**-24, 1 - 2.0**-24, 1 - 2.0**-24]], dtype=torch.float64)
    torch.testing.assert_close(drawn.double(), -u.log(), rtol=1e-14 if dtype == torch.float64 else 1e-7, atol=0)
    assert (drawn > 0).all()


def test_acceptance_draws_are_exponential() -> None:
    e = rng.acceptance(torch.arange(10_000), range(100), seed=6, step=2, dtype=torch.float32).double()
    assert e.min() >= 0  # exact
    assert e.max() <= 24 * math.log(2) + 1e-5
    assert abs(e.mean() - 1) < 6e-3  # standard deviation 1e-3
    assert abs(e.var() - 1) < 6 * math.sqrt(8e-6)
    for x in (0.1, 1.0, 4.0, 9.0):
        tail = math.exp(-x)
        assert abs((e > x).double().mean() - tail) < 6 * math.sqrt(tail * (1 - tail) / e.numel())
    assert_uniform((torch.exp(-e) * 64).long().clamp_max(63), 64)


SIZES = (1, 2, 3, 1000, 2**16 + 1, 2**31 - 1)
BEYOND_KEYS = (2**32 - 1, 2**33 + 5, 2**41 - 3)  # no tensor has so many rows, but the arithmetic is written for 64 bits


@pytest.mark.parametrize("num_keys", SIZES + BEYOND_KEYS)
def test_proposal_positions(num_keys: int) -> None:
    for proposals in (range(0, 7), range(5, 6), range(2**33 + 3, 2**33 + 6)):
        for seed, step in ((SEEDS[1], 0), (SEEDS[3], 5), (SEEDS[4], 2**32 - 1)):
            drawn = rng.proposal_positions(torch.tensor(CHAINS), proposals, num_keys, seed=seed, step=step)
            expected = [
                [plain_position(chain, p, num_keys, seed=seed, step=step) for p in proposals] for chain in CHAINS
            ]
            assert drawn.tolist() == expected


@pytest.mark.parametrize("num_keys", SIZES + BEYOND_KEYS)
def test_extreme_proposal_positions(monkeypatch: pytest.MonkeyPatch, num_keys: int) -> None:
    """Carries between the halves of the product, and the last position."""
    extreme = [0, 1, 2**16 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    values = [(low, high) for low in extreme for high in extreme]
    words = torch.tensor([[low, high, high, low] for low, high in values])
    monkeypatch.setattr(rng, "words", lambda *_, **__: words.repeat_interleave(2, 0)[None])
    drawn = rng.proposal_positions(torch.zeros(1), range(2 * len(values)), num_keys, seed=0, step=0)
    expected = [(b << 32 | a) * num_keys >> 64 for low, high in values for a, b in ((low, high), (high, low))]
    assert drawn[0].tolist() == expected
    assert drawn.max() == num_keys - 1


@pytest.mark.parametrize("num_keys", SIZES)
@pytest.mark.parametrize("first", [0, 5, 2**32 + 1])
def test_proposal_positions_of_the_kernels(num_keys: int, first: int) -> None:
    """All scores are 0, so every proposal is accepted and shows its position. The keys are one row, seen many times."""
    keys = torch.zeros(1, 1).expand(num_keys, 1)
    walk = mh_transition(
        torch.zeros(len(CHAINS), 1), keys, temperature=1.0, seed=2**64 - 3, step=2**32 - 2, proposal="uniform",
        num_proposals=70, chain_ids=torch.tensor(CHAINS), first_proposal=first, total_proposals=first + 70,
        burn_in=first, num_samples=70, backend="cpu",
    )  # fmt: skip
    shard = range(first, first + 70)
    expected = rng.proposal_positions(torch.tensor(CHAINS), shard, num_keys, seed=2**64 - 3, step=2**32 - 2)
    assert torch.equal(walk.position, expected)


@pytest.mark.parametrize("num_keys", [2, 10, 1000])
def test_proposal_positions_are_uniform(num_keys: int) -> None:
    drawn = rng.proposal_positions(torch.arange(5_000), range(40), num_keys, seed=31, step=7)
    assert_uniform(drawn, num_keys)
    assert_uniform(drawn[:, 1::2], num_keys)  # both halves of a block by themselves


def test_neighbouring_draws_are_independent() -> None:
    """Pairs along every axis of the counter fill a 16 x 16 table evenly."""
    blocks = torch.arange(60)
    top = [
        rng.words(torch.arange(400)[:, None], blocks, stream=stream, seed=12, step=step) >> 28
        for stream, step in ((0, 0), (0, 1), (1, 0))
    ]
    pairs = {
        "word": (top[0][..., 0], top[0][..., 1]),
        "block": (top[0][:, :-1], top[0][:, 1:]),
        "chain": (top[0][:-1], top[0][1:]),
        "step": (top[0], top[1]),
        "stream": (top[0], top[2]),
    }
    for first, second in pairs.values():
        assert_uniform(first * 16 + second, 256)


def test_view_coin() -> None:
    items = torch.tensor([*CHAINS, *range(100)])
    for seed in SEEDS:
        for step in STEPS:
            expected = [plain_words(item, 0, stream=3, seed=seed, step=step)[0] // 2**31 for item in items.tolist()]
            assert rng.view_coin(items, seed=seed, step=step).tolist() == expected
            assert ops.view_coin(items, seed, step, "cpu").tolist() == expected


def test_view_coin_is_fair_and_new_at_each_step() -> None:
    coins = torch.stack([rng.view_coin(torch.arange(50_000), seed=8, step=step) for step in range(2)])
    assert_uniform(coins[0] * 2 + coins[1], 4)


def plain_gumbel(chain: int, column: int, *, stream: int = 2, **counter: int) -> float:
    v = (plain_words(chain, column // 4, stream=stream, **counter)[column % 4] + 0.5) / 2**32
    return -math.log(-math.log1p(-v))


@pytest.mark.parametrize("columns", [range(0, 9), range(3, 6), range(2**32 + 2, 2**32 + 7)], ids=str)
def test_gumbel_noise(columns: range) -> None:
    for seed, step, sample in ((SEEDS[1], 0, 0), (SEEDS[3], 5, 3), (SEEDS[4], 2**32 - 1, 2**16 - 1)):
        counter = {"seed": seed, "step": step, "sample": sample}
        noise = rng.gumbel(torch.tensor(CHAINS), columns, dtype=torch.float64, **counter)
        for i, chain in enumerate(CHAINS):
            for j, column in enumerate(columns):
                expected = plain_gumbel(chain, column, **counter)
                assert noise[i, j].item() == pytest.approx(expected, rel=1e-13, abs=1e-13)


# A step over all keys hands over the score and noise that won; where there is one candidate of score 0, its noise.


def noise_that_won(
    backend: str, own: int, chosen: int | None, num_keys: int, first_key: int, seed: int, step: int
) -> torch.Tensor:
    """(len(CHAINS),) of the chain's own candidate ``chosen``, the others being none; None: of the last key."""
    score = torch.full((len(CHAINS), own), -torch.inf)
    keys = torch.full((num_keys, 1), torch.nan)
    if chosen is None:
        keys[-1] = 0
    else:
        score[:, chosen] = 0
    scores = ScoreParams(torch.zeros(len(CHAINS), 1), keys, 1.0, None, None)
    labels = torch.zeros(len(CHAINS), own, dtype=torch.int64)
    carried = CarriedParams(labels, score, None, torch.tensor(CHAINS), seed, step, first_key)
    position, *_, value = ops.isir_step(scores, carried, backend)
    assert set(position.tolist()) == {first_key + num_keys - 1 if chosen is None else -1 - chosen}
    return value


@pytest.mark.parametrize("backend", RUNNABLE)
def test_noise_of_what_chains_carry(backend: str) -> None:
    """Word c of block 0 of a stream of its own, whatever else there is."""
    for own, chosen, num_keys in ((1, 0, 0), (1, 0, 5), (2, 1, 3), (3, 0, 0), (4, 3, 70), (4, 2, 0)):
        for seed, step in ((SEEDS[1], 0), (SEEDS[4], STEPS[2])):
            found = noise_that_won(backend, own, chosen, num_keys, 2**32 * (num_keys > 4), seed, step)
            expected = [plain_gumbel(chain, chosen, stream=4, seed=seed, step=step) for chain in CHAINS]
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_noise_of_keys_goes_by_their_number_among_all(backend: str) -> None:
    for own, num_keys, first_key in ((0, 1, 0), (1, 7, 0), (4, 1, 6), (0, 3, 2**32 - 1), (2, 66, 2**33 - 66)):
        for seed, step in ((SEEDS[1], 0), (SEEDS[4], STEPS[2])):
            found = noise_that_won(backend, own, None, num_keys, first_key, seed, step)
            column = first_key + num_keys - 1
            expected = [plain_gumbel(chain, column, seed=seed, step=step) for chain in CHAINS]
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gumbel_noise(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Finite at both ends; float32 noise is rounded from float64, where log1p(-v) of the last v is not -inf."""
    replace_words(monkeypatch, [0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    noise = rng.gumbel(torch.zeros(1), range(5), seed=0, step=0, sample=0, dtype=dtype)[0]
    assert noise.dtype == dtype
    tiny = 2.0**-33
    expected = [
        -math.log(-math.log1p(-tiny)),
        -math.log(-math.log1p(-3 * tiny)),
        -math.log(-math.log(0.5 - tiny)),
        -math.log(-math.log(3 * tiny)),
        -math.log(-math.log(tiny)),
    ]
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(noise.double(), wanted, rtol=1e-13 if dtype == torch.float64 else 1e-7, atol=0)
    assert noise[0] > 22.8


@pytest.mark.one_seed
def test_gumbel_noise_beyond_what_23_bits_can_hold() -> None:
    """A draw that is there, found by search: the shift of the acceptance draws would stop it at 16.64."""
    chain, column = 7, 4 * 341_670 + 1
    noise = rng.gumbel(
        torch.tensor([chain]), range(column, column + 1), seed=2024, step=9, sample=0, dtype=torch.float64
    )
    assert noise.item() == pytest.approx(-math.log(46.5 / 2**32), abs=1e-7)
    assert noise.item() > 18.3


def test_gumbel_noise_has_its_distribution() -> None:
    noise = rng.gumbel(torch.arange(10_000), range(100), seed=4, step=1, sample=2, dtype=torch.float64)
    variance = math.pi**2 / 6
    assert abs(noise.mean() - 0.5772156649) < 6 * math.sqrt(variance / noise.numel())
    assert abs(noise.var() - variance) < 6 * math.sqrt(4.4 * variance**2 / noise.numel())  # excess kurtosis 2.4
    assert_uniform((torch.exp(-torch.exp(-noise)) * 128).long().clamp_max(127), 128)
    other = rng.gumbel(torch.arange(10_000), range(100), seed=4, step=1, sample=3, dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1]
    assert abs(correlation) < 6e-3
