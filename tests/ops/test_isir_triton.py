"""Triton's step over all keys in its interpreter, against the oracle: tile edges, dtypes, whole and split keys, shards
that begin anywhere; and the sums of scores with all that they can have, cut in the same ways."""

import oracle
import pytest
import torch
from helpers import assert_identical, chi_square, normal, poisoned, relative_rms, with_rows
from oracle import unit
from test_isir import assert_drawn, assert_steps, chains_at, error_of, everything, operator_step, own_of, resample
from test_isir_gradients import (
    assert_equals_formula,
    lse_of_scores,
    lse_of_step,
    options_of,
    started,
    temperatures,
    value_and_gradients,
)

from emc2_kernels import MHState, ops
from emc2_kernels.backends import gpu
from emc2_kernels.backends.params import CarriedParams, ScoreParams

pytestmark = pytest.mark.skipif(not gpu.interpreting(), reason="in Triton's interpreter")
pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from emc2_kernels.backends.triton import isir, tuning  # noqa: E402

SMALL = tuning.Sweep(16, 16, 4, 1, None, "chosen for tests")
SHIPPED = tuning.lse_gradient


@pytest.fixture(autouse=True)
def small_tiles_of_rubbish(monkeypatch):
    """Small blocks; what a kernel must fill comes with rubbish in it."""
    monkeypatch.setattr(tuning, "sweep", lambda *key: SMALL)
    monkeypatch.setattr(tuning, "lse", lambda *key: tuning.Lse(16, 16, 4, 1, "for tests"))
    monkeypatch.setattr(
        tuning, "lse_gradient", lambda *key: tuning.LseGradient(16, 128, 16, 32, 4, 1, False, "for tests")
    )
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: poisoned(new_empty(*args, **options)))


def split_into(monkeypatch, count):
    monkeypatch.setattr(tuning, "splits", lambda blocks, tiles, processors: max(1, min(count, tiles)))


SIZES = [(1, 1, 1), (15, 127, 16), (16, 128, 17), (17, 129, 8), (2, 650, 4)]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_steps_are_the_oracles(n, m, d, splits, monkeypatch):
    split_into(monkeypatch, splits)
    queries, keys, state = unit(n, d, seed=1), unit(m, d, seed=2), chains_at(n)
    for step in range(2):  # carried on
        state = assert_steps("triton", queries, keys, state, step=step).state


WITHOUT = [(), ("query_ids",), ("carried_ids",), ("query_ids", "carried_ids"), ("log_proposal", "temperature")]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("without", WITHOUT, ids=lambda names: f"without {', '.join(names)}" if names else "all")
def test_everything_at_once(without, splits, monkeypatch):
    split_into(monkeypatch, splits)
    queries, keys, state, options = everything(n=17, m=140)
    assert_steps("triton", queries, keys, state, **{k: v for k, v in options.items() if k not in without})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    queries, keys = unit(11, 50, seed=5, dtype=dtype), unit(60, 50, seed=6, dtype=dtype)
    assert_steps("triton", queries, keys, chains_at(11), temperature=0.07, log_proposal=normal(7, 60))


BEGINNINGS = [(0, 3), (1, 0), (1, 1), (2, 2), (3, 3), (4, 4), (4, 2**31 + 5), (1, 2**33 - 140)]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("count", "first_key"), BEGINNINGS)
def test_candidates_of_a_chains_own_and_shards_that_begin_anywhere(count, first_key, splits, monkeypatch):
    split_into(monkeypatch, splits)
    queries, keys, _, options = everything(n=17, m=140)
    own = own_of(17, count)
    drawn = operator_step("triton", queries, keys, own, first_key=first_key, **options)
    expected = oracle.resample(queries, keys, own, first_key=first_key, **options)
    assert_drawn(drawn, expected, error_of(options))


@pytest.mark.parametrize("begin", [1, 2, 3, 6, 131])
def test_shards_take_the_noise_of_the_whole(begin, monkeypatch):
    """The winner of a shard that has it is that of the whole, whose values agree to the bit."""
    queries, keys = torch.zeros(40, 3), torch.zeros(290, 3)
    nothing = torch.zeros(40, 0, dtype=torch.int64), torch.zeros(40, 0)
    whole = operator_step("triton", queries, keys, nothing)
    for splits in (1, 2):
        split_into(monkeypatch, splits)
        shard = operator_step("triton", queries, keys[begin:], nothing, first_key=begin)
        there = whole.position >= begin
        assert there.any()
        assert_identical((shard.position[there], shard.value[there]), (whole.position[there], whole.value[there]))


def test_split_is_the_step_unsplit(monkeypatch):
    queries, keys, _, options = everything(n=17, m=300)
    own = own_of(17, 2)
    results = []
    for splits in (1, 2, 3):
        split_into(monkeypatch, splits)
        results.append(operator_step("triton", queries, keys, own, first_key=2, **options))
    for result in results[1:]:
        assert_identical(result[:3] + result[4:], results[0][:3] + results[0][4:])
        torch.testing.assert_close(result.lse, results[0].lse)


def test_seed_and_step_as_tensors(monkeypatch):
    split_into(monkeypatch, 2)
    queries, keys, state, options = everything(n=5, m=140)
    expected = resample("triton", queries, keys, state, **options)
    options |= {"seed": torch.tensor(-3), "step": torch.tensor(2**32 - 1)}
    assert_identical(resample("triton", queries, keys, state, **options), expected)


def test_a_winners_score_is_its_products(monkeypatch):
    """Made of the value, whose rounding it has: also where values are large, and in every word of a block."""
    queries, keys = unit(64, 8, seed=1), unit(200, 8, seed=2)
    for temperature in (1.0, 0.01):
        state = MHState(torch.zeros(64).long(), torch.full((64,), -torch.inf))
        result = resample("triton", queries, keys, state, temperature=temperature)
        assert {0, 1, 2, 3} == {*(result.position % 4).tolist()}
        exact = (queries.double() * keys[result.position].double()).sum(1) / temperature
        assert (result.state.score - exact).abs().max() < 8 * 2.0**-24 * (1 / temperature + 24)


PLACES = {"the lowest position of a tile": (1, 1), "of several tiles": (3, 1), "of several splits": (3, 3)}


@pytest.mark.parametrize("first_key", [0, 3])
@pytest.mark.parametrize("place", PLACES)
def test_ties_go_to_a_rows_own_then_to_the_lowest_position(place, first_key, monkeypatch):
    """Without noise, and with scores that are exact in powers of two: all candidates are worth the same."""
    monkeypatch.setattr(isir, "gumbel_log2", triton.jit(_no_noise))
    tiles, splits = PLACES[place]
    split_into(monkeypatch, splits)
    queries, keys = torch.zeros(4, 3), torch.zeros(128 * tiles - first_key, 3)
    ids = {"query_ids": torch.zeros(4, dtype=torch.int64), "key_ids": (torch.arange(len(keys)) >= 17).long()}
    score = torch.tensor([[0.0, 0.0], [torch.nan, 0.0], [-torch.inf, torch.inf], [-1.0, -1.0]])
    own = torch.arange(8).view(4, 2) + 70, score
    drawn = operator_step("triton", queries, keys, own, first_key=first_key, key_labels=None, **ids)
    assert drawn.position.tolist() == [-1, -2, 17 + first_key, 17 + first_key]
    assert drawn.key.tolist() == [70, 73, 17 + first_key, 17 + first_key]
    assert drawn.score.tolist() == [0.0] * 4


def _no_noise(word):
    return word.to(tl.float32) * 0.0


QUERY, KEYS, OWN = unit(1, 6, seed=7), unit(11, 6, seed=8), 2.0
LAW = torch.softmax(torch.cat((torch.tensor([OWN], dtype=torch.float64), (KEYS.double() @ QUERY.double()[0]) / 0.3)), 0)


def test_steps_follow_the_softmax(monkeypatch):
    """Over what is carried and the keys; enough to see a temperature that is off by a tenth. Large blocks, since time
    goes by programs."""
    monkeypatch.setattr(tuning, "sweep", lambda *key: SMALL._replace(block_m=2048))
    chains = MHState(torch.zeros(20_000).long(), torch.full((20_000,), OWN))
    counts = {}
    for temperature in (0.3, 0.33):
        drawn = resample("triton", QUERY.expand(20_000, -1), KEYS, chains, temperature=temperature).position
        counts[temperature] = (drawn + 1).bincount(minlength=len(LAW)).double()
    assert chi_square(counts[0.3], LAW) > 1e-4
    assert chi_square(counts[0.33], LAW) < 1e-10


# Sums of scores with second ids and a law of the keys, and their gradients.


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m", "d"), [(16, 128, 32), (17, 129, 33), (3, 260, 70)])
def test_sums_and_gradients_of_scores_with_all_their_options(n, m, d, dtype, splits, monkeypatch):
    split_into(monkeypatch, splits)
    given = {"queries": unit(n, d, seed=1, dtype=dtype), "keys": unit(m, d, seed=2, dtype=dtype)}
    given["temperature"] = temperatures(n, per_row=splits == 1)
    assert_equals_formula(lse_of_scores("triton"), given | options_of(n, m))
    assert_equals_formula(lse_of_step("triton"), started(given | options_of(n, m)))


# Beside the edges of tiles of 32, 64 and 128, and on and beside those of the table's rows.
ON_HOPPER = [
    (65, 129, 100),
    (70, 257, 128),
    (64, 33, 130),
    (6, 100, 256),
    (66, 65, 257),
    (130, 129, 512),
    (65, 70, 1030),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("n", "m", "d"), ON_HOPPER)
def test_gradients_in_the_sizes_of_a_hopper(n, m, d, splits, monkeypatch):
    """Whose products the compiler must not see together: here as queries, as keys, and as both at once."""
    split_into(monkeypatch, splits)
    monkeypatch.setattr(tuning, "device", lambda index: (9, 132))
    monkeypatch.setattr(tuning, "lse_gradient", SHIPPED)
    dtype = torch.bfloat16 if d % 2 else torch.float16
    given = {"queries": unit(n, d, seed=1, dtype=dtype), "keys": unit(m, d, seed=2, dtype=dtype)}
    given["temperature"] = temperatures(n, per_row=splits == 1)
    assert_equals_formula(lse_of_scores("triton"), given | options_of(n, m))
    bad, weights = given | {"keys": with_rows(given["keys"], m - 1, torch.inf)}, torch.linspace(-1, 2, n)
    found, gradients = value_and_gradients(lse_of_scores("triton"), bad, weights)
    expected, without = value_and_gradients(lse_of_scores("triton"), given | {"keys": given["keys"][:-1]}, weights)
    assert relative_rms(found, expected) < 1e-6 and not gradients["keys"][-1].any()
    assert relative_rms(gradients["queries"], without["queries"]) < 1e-2
    assert relative_rms(gradients["keys"][:-1], without["keys"]) < 1e-2
    ids = torch.arange(n) % (n // 2)
    among = {
        "keys": None,
        "temperature": 0.1,
        "query_ids": ids,
        "key_ids": ids,
        "carried_ids": (ids * 3 + 1) % (n // 2),
    }
    assert_equals_formula(lse_of_scores("triton"), given | among | {"log_proposal": normal(7, n)})


def test_all_sizes_of_a_hopper_are_tried():
    tried = {SHIPPED(9, True, d) for _, _, d in ON_HOPPER}
    assert tried == {row for key, row in tuning.LSE_GRADIENTS.items() if key[:2] == (9, True)}


@pytest.mark.parametrize("per_row", [False, True], ids=["", "temperatures"])
@pytest.mark.parametrize("splits", [1, 2])
def test_both_roles_of_one_operand_leave_out_their_own_pairs(splits, per_row, monkeypatch):
    """A row's second id leaves keys out for it as a query; as a key it is left out by the ids of others."""
    split_into(monkeypatch, splits)
    n, ids = 140, torch.arange(140) % 70
    given = {"queries": unit(n, 7), "keys": None, "temperature": temperatures(n, per_row)}
    given |= {"query_ids": ids, "key_ids": ids, "carried_ids": (ids * 3 + 1) % 70, "log_proposal": normal(7, n)}
    assert_equals_formula(lse_of_scores("triton"), given)


def test_a_gradient_of_a_temperature_is_without_the_log_of_the_law():
    """-sum_j p_ij <q_i, k_j> / temperature^2, of which a law that is the same for all keys changes nothing."""
    queries, keys = unit(20, 6, seed=1), unit(130, 6, seed=2)
    found = []
    for law in (None, torch.full((130,), 5.0)):
        scores = ScoreParams(queries, keys, torch.full((20,), 0.2), None, None, log_proposal=law)
        own = CarriedParams(torch.zeros(20, 0, dtype=torch.int64), torch.zeros(20, 0), None, None, 1, 2, 0)
        lse = ops.isir_step(scores, own, "triton")[3]
        found.append(ops.contrastive_lse_backward(scores, torch.ones(20), lse, True, "triton"))
    for one, other in zip(*found, strict=True):
        assert relative_rms(one, other) < 1e-5
    products = queries @ keys.T
    expected = -((products / 0.2).softmax(1) * products).sum(1) / 0.04
    assert relative_rms(found[1][2], expected) < 1e-5
