"""gumbel_sample: exact draws from the softmax over given keys, and softmax_sample, what everybody would write."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops, rng
from .backends import NAMES, resolve
from .backends.params import ScoreParams
from .backends.reference.lse import masked_scores
from .ops import LIBRARY

MAX_SAMPLES = 1 << 16  # the sample's number has 16 bits of the random counter
MAX_CATEGORIES = 1 << 24  # of torch.multinomial

LIBRARY.define(
    "gumbel_sample(Tensor queries, Tensor keys, float temperature, Tensor? temperatures, SymInt seed, "
    "Tensor? seed_tensor, SymInt step, Tensor? step_tensor, Tensor? chain_ids, Tensor? query_ids, Tensor? key_ids, "
    "SymInt num_samples, str backend) -> Tensor"
)


def gumbel_sample(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    num_samples: int = 1,
    chain_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Independent exact draws of keys from each row's softmax, without its scores in memory.

    Sample r of row i is argmax_j of s_ij + G, s_ij = <q_i, k_j> / temperature_i and G the Gumbel noise of (seed, step,
    chain i, key j, sample r): the Gumbel-max trick. All samples are drawn in one pass over the scores. Nothing is
    differentiated through.

    Args:
        queries: (n, d) float32, bfloat16 or float16 (float64 on the reference backend), unit last stride.
        keys: (m, d), dtype and device of ``queries``, m < 2^31.
        temperature: number, 0-d tensor or (n,) tensor, in [2^-120, 2^100]; scores are similarities divided by it.
        seed: 0 <= seed < 2^64; step: 0 <= step < 2^32, another one for each call. Integers or 0-d int64 tensors.
        num_samples: R in 1 .. 2^16 - 1.
        chain_ids: (n,) int64 in [0, 2^40), name the random streams; default: ``query_ids``, else the row number. Rows
            that share one share their noise: each is right by itself, but they are not independent.
        query_ids, key_ids: (n,) and (m,) int64. A key with the row's id is never drawn for it.
        backend: "auto" or a name from ``backends()``.

    Returns:
        (n, R) int64 positions in ``keys``; of equal values the lowest. A key whose score is not finite is never drawn;
        -1 where a row has no key.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came. Values in tensors are looked at on
            the CPU only.
        RuntimeError: the named backend cannot run here.
    """
    checks.operands(queries, keys)
    checks.one_of("backend", backend, NAMES)
    n, device = queries.shape[0], queries.device
    checks.temperature(temperature, n, device)
    seed, step = checks.counter("seed", seed, 64, device), checks.counter("step", step, 32, device)
    chain_ids = checks.chain_ids(queries, keys, chain_ids, query_ids, key_ids)
    num_samples = _check_num_samples(num_samples)
    number, temperatures = checks.number_or_rows(temperature, queries)
    return _gumbel_sample(
        ops.detached(queries),
        ops.detached(keys),
        number,
        ops.detached(temperatures),
        *ops.integer_or_tensor(seed),
        *ops.integer_or_tensor(step),
        chain_ids,
        query_ids,
        key_ids,
        num_samples,
        backend,
    )


def softmax_sample(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    num_samples: int = 1,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The same law as ``gumbel_sample``, naively: all n x m scores, their softmax, ``torch.multinomial``.

    The baseline to measure against. Its draws are torch's, so they depend on device and version; ``torch.multinomial``
    takes at most 2^24 keys.

    Args:
        seed, step: make the generator where none is given: it is seeded with the 64-bit value of proposal 0 of chain 0
            (stream 1 of the random-number contract). A tensor on a GPU is waited for.
        generator: of the queries' device; torch's draws are taken from it, and seed and step are not looked at.
        The others are those of ``gumbel_sample``.

    Returns:
        (n, R) int64 positions in ``keys``, with replacement; -1 where a row has no key.

    Raises:
        As ``gumbel_sample``; also ValueError for more than 2^24 keys.
    """
    checks.operands(queries, keys)
    (n, _), m, device = queries.shape, keys.shape[0], queries.device
    checks.temperature(temperature, n, device)
    seed, step = checks.counter("seed", seed, 64, device), checks.counter("step", step, 32, device)
    checks.ids(queries, keys, query_ids, key_ids)
    num_samples = _check_num_samples(num_samples)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {checks.describe(generator)}")
    if m > MAX_CATEGORIES:
        raise ValueError(f"keys must have at most 2^24 rows, the limit of torch.multinomial, got {m}")
    if n == 0 or m == 0:
        return torch.full((n, num_samples), -1, dtype=torch.int64, device=device)
    if generator is None:
        generator = torch.Generator(device).manual_seed(_generator_seed(seed, step))
    number, temperatures = checks.number_or_rows(temperature, queries)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scores = masked_scores(
            ScoreParams(queries, keys, number if temperatures is None else temperatures, query_ids, key_ids)
        )
        drawable = (scores > -torch.inf).any(1, keepdim=True)
        probabilities = torch.softmax(torch.where(drawable, scores, 0), 1)  # multinomial refuses a row of zeros
        return torch.where(drawable, torch.multinomial(probabilities, num_samples, True, generator=generator), -1)


def _generator_seed(seed: int | Tensor, step: int | Tensor) -> int:
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    seed, step = (int(value) for value in (seed, step))
    low, high = rng.words(zero, zero, stream=rng.POSITION, seed=seed, step=step)[0, :2].tolist()
    return high << 32 | low


def _check_num_samples(num_samples: int) -> int:
    number = checks.at_least("num_samples", num_samples, 1)
    if number >= MAX_SAMPLES:
        raise ValueError(f"num_samples must be below 2^16, got {number}")
    return number


def _sample(*arguments):
    queries, keys, temperature, temperatures, seed, seed_tensor, step, step_tensor = arguments[:8]
    chain_ids, query_ids, key_ids, num_samples, backend = arguments[8:]
    scores = ScoreParams(queries, keys, temperature if temperatures is None else temperatures, query_ids, key_ids)
    return resolve(backend, queries, op="gumbel").gumbel_sample(
        scores,
        chain_ids,
        seed if seed_tensor is None else seed_tensor,
        step if step_tensor is None else step_tensor,
        num_samples,
    )


def _check(queries, keys, temperature, temperatures, *arguments):
    chain_ids, query_ids, key_ids, num_samples, _ = arguments[4:]
    checks.operands(queries, keys)
    checks.row_temperatures(temperature if temperatures is None else temperatures, queries)
    checks.chain_ids(queries, keys, chain_ids, query_ids, key_ids)
    _check_num_samples(num_samples)


_gumbel_sample = ops.registered("gumbel_sample", _sample, _check)


@torch.library.register_fake("emc2_kernels::gumbel_sample", lib=LIBRARY)
def _sample_fake(queries, *arguments):
    return queries.new_empty(queries.shape[0], arguments[-2], dtype=torch.int64)
