"""Triton's draws from the softmax in its interpreter, against the oracle: tile edges, dtypes, whole and split keys."""

import pytest
import torch
from helpers import assert_identical, normal, poisoned
from oracle import unit
from test_gumbel import KEYS, LAW, QUERY, assert_exact, chi_square, draw, everything

from emc2_kernels import ops, rng
from emc2_kernels.backends import gpu
from emc2_kernels.backends.params import DrawParams, ScoreParams
from emc2_kernels.backends.reference.lse import masked_scores

pytestmark = pytest.mark.skipif(not gpu.interpreting(), reason="in Triton's interpreter")
pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from emc2_kernels.backends.triton import gumbel, philox, tuning  # noqa: E402

SMALL = tuning.Sweep(16, 16, 4, 1, None, "chosen for tests")


@pytest.fixture(autouse=True)
def small_tiles_of_rubbish(monkeypatch):
    """Small blocks; what a kernel must fill comes with rubbish in it."""
    monkeypatch.setattr(tuning, "sweep", lambda *key: SMALL)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: poisoned(new_empty(*args, **options)))


SIZES = [(1, 1, 1), (15, 127, 16), (16, 128, 17), (17, 129, 8), (2, 650, 4)]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_positions_are_the_oracles(n, m, d, splits, monkeypatch):
    monkeypatch.setattr(tuning, "splits", lambda *sizes: min(splits, sizes[1]))
    assert_exact("triton", unit(n, d, seed=1), unit(m, d, seed=2), num_samples=3)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("num_samples", [1, 5])
def test_everything_at_once(num_samples, splits, monkeypatch):
    monkeypatch.setattr(tuning, "splits", lambda *sizes: splits)
    queries, keys, options = everything(n=17, m=140, num_samples=num_samples)
    assert_exact("triton", queries, keys, **options)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("without", [None, "query_ids", "carried_ids", "log_proposal"])
def test_second_ids_and_a_law_of_the_keys(without, splits, monkeypatch):
    """As the operator takes them; against the scores of the reference and the contract's noise."""
    monkeypatch.setattr(tuning, "splits", lambda *sizes: splits)
    queries, keys, options = everything(n=17, m=140)
    fields = {name: options[name] for name in ("temperature", "query_ids", "key_ids")}
    fields |= {"carried_ids": options["query_ids"].roll(1), "log_proposal": normal(3, 140)}
    scores = ScoreParams(queries, keys, **{name: None if name == without else fields[name] for name in fields})
    draw = {name: options[name] for name in ("seed", "step")}
    drawn = ops.gumbel_sample(scores, DrawParams(options["chain_ids"], **draw, num_samples=3), "triton")
    for r in range(3):
        noise = rng.gumbel(options["chain_ids"], range(140), sample=r, dtype=torch.float64, **draw)
        two = (masked_scores(scores).double() + noise).topk(2)
        clear = two.values[:, 0] - two.values[:, 1] > 3e-5  # the error of scores at the lowest temperature, and noise
        assert clear.double().mean() >= 0.9
        assert_identical(drawn[clear, r], two.indices[clear, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    queries, keys = unit(11, 50, seed=5, dtype=dtype), unit(60, 50, seed=6, dtype=dtype)
    assert_exact("triton", queries, keys, temperature=0.07)


def test_draws_follow_the_softmax(monkeypatch):
    """Enough to see a temperature that is off by a tenth; large blocks, since time goes by programs."""
    monkeypatch.setattr(tuning, "sweep", lambda *key: SMALL._replace(block_m=2048))
    counts = {}
    for temperature in (0.3, 0.33):
        drawn = draw("triton", QUERY.expand(2000, -1), KEYS, temperature=temperature, num_samples=10)
        counts[temperature] = drawn.flatten().bincount(minlength=len(KEYS)).double()
    assert chi_square(counts[0.3], LAW) > 1e-4
    assert chi_square(counts[0.33], LAW) < 1e-10


@pytest.mark.parametrize("at", ["the lowest position of a tile", "of several tiles", "of several splits"])
def test_ties_go_to_the_lowest_position(at, monkeypatch):
    """Rows without noise: all keys are worth the same."""
    constant = triton.jit(_no_noise)
    monkeypatch.setattr(gumbel, "gumbel_log2", constant)
    tiles, splits = {"the lowest position of a tile": (1, 1), "of several tiles": (3, 1), "of several splits": (3, 3)}[
        at
    ]
    monkeypatch.setattr(tuning, "splits", lambda *sizes: splits)
    keys = unit(1, 3).expand(128 * tiles, 3)
    ids = {"query_ids": torch.zeros(4, dtype=torch.int64), "key_ids": (torch.arange(len(keys)) >= 17).long()}
    assert draw("triton", unit(4, 3), keys, **ids).unique().tolist() == [17]


def _no_noise(word):
    return word.to(tl.float32) * 0.0


@triton.jit
def _noise_kernel(words_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, philox.gumbel_log2(tl.load(words_ptr + at).to(tl.uint32)))


def test_noise_is_exact_at_both_ends():
    """In powers of two, against the formula in float64. The GPU's logarithm is less exact (philox.py says by how much);
    the interpreter's is not, so this bounds what the rest adds."""
    ends = [0, 1, 2, 3, 7, 2**24 - 1, 2**24 + 1, 2**29 - 1, 2**29, 2**31 - 1, 2**31, 2**32 - 2**24 - 1]
    ends += [2**32 - 129, 2**32 - 3, 2**32 - 2, 2**32 - 1]
    generator = torch.Generator().manual_seed(0)
    words = torch.cat((torch.tensor(ends), torch.randint(0, 2**32, (4096 - len(ends),), generator=generator)))
    out = torch.empty(4096)
    _noise_kernel[(1,)](words, out, 4096)
    v = (words.double() + 0.5) * 2.0**-32
    exact = (-torch.log1p(-v) / torch.log(torch.tensor(2.0, dtype=torch.float64))).log2()
    assert (out.double() - exact).abs().max() < 5e-6
    noise = rng.gumbel(torch.zeros(1, dtype=torch.int64), range(8), seed=0, step=0, sample=0, dtype=torch.float64)
    word = rng.words(torch.zeros(1, dtype=torch.int64), torch.arange(2), stream=rng.GUMBEL, seed=0, step=0).flatten()
    _noise_kernel[(1,)](torch.cat((word, word.new_zeros(4088))), out, 4096)
    log_of_log2 = torch.log(torch.tensor(2.0, dtype=torch.float64)).log()
    torch.testing.assert_close(
        -out[:8].double() * 2.0**0 * 0.6931471805599453 - log_of_log2, noise[0], rtol=0, atol=5e-6
    )
