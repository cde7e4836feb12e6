"""gumbel_sample: exact draws from the softmax over given keys, and softmax_sample, what everybody would write."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops, rng
from .backends import NAMES
from .backends.params import DrawParams, ScoreParams
from .backends.reference.lse import masked_scores
from .dispatch import detached

MAX_CATEGORIES = 1 << 24  # of torch.multinomial


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

    Sample r of row i is the argmax over j of ``s_ij + G``, with ``s_ij = <q_i, k_j> / temperature_i`` and G the Gumbel
    noise of (seed, step, chain i, key j, sample r): the Gumbel-max trick. All samples are drawn in one pass over the
    scores. Nothing is differentiated through.

    Args:
        queries: (n, d) float32, bfloat16 or float16 (float64 on the reference backend), unit last stride.
        keys: (m, d), dtype and device of ``queries``, m < 2^31.
        temperature: number, 0-d tensor or (n,) tensor, in [2^-120, 2^100]; scores are similarities divided by it.
        seed: integer or 0-d int64 tensor, 0 <= seed < 2^64.
        step: integer or 0-d int64 tensor, 0 <= step < 2^32, another one for each call.
        num_samples: R in 1 .. 2^16 - 1.
        chain_ids: (n,) int64 in [0, 2^40), name the random streams; default: ``query_ids``, else the row number. Rows
            that share one share their noise: each is right by itself, but they are not independent.
        query_ids: (n,) int64, ids of the rows; they need ``key_ids``.
        key_ids: (m,) int64. A key with the row's id is never drawn for it.
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
    checks.temperature(temperature, n, device, operator_looks=True)
    seed, step = checks.counter("seed", seed, 64, device), checks.counter("step", step, 32, device)
    chain_ids = checks.chain_ids(queries, keys, chain_ids, query_ids, key_ids)
    draw = DrawParams(chain_ids, seed, step, checks.integer("num_samples", num_samples))
    draw.check_num_samples()
    temperature = detached(checks.one_or_rows(temperature, queries))
    return ops.gumbel_sample(
        ScoreParams(detached(queries), detached(keys), temperature, query_ids, key_ids), draw, backend
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
        queries: (n, d), of any floating dtype.
        keys: (m, d), dtype and device of ``queries``, m <= 2^24.
        temperature: number, 0-d tensor or (n,) tensor, in [2^-120, 2^100]; scores are similarities divided by it.
        seed: 0 <= seed < 2^64. Seed and step make the generator where none is given: it is seeded with the 64-bit value
            of proposal 0 of chain 0 (stream 1 of the random-number contract). A tensor on a GPU is waited for.
        step: 0 <= step < 2^32.
        num_samples: R in 1 .. 2^16 - 1.
        query_ids: (n,) int64, ids of the rows; they need ``key_ids``.
        key_ids: (m,) int64. A key with the row's id is never drawn for it.
        generator: of the queries' device; torch's draws are taken from it, and seed and step are not looked at.

    Returns:
        (n, R) int64 positions in ``keys``, with replacement; -1 where a row has no key.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came; also for more than 2^24 keys.
    """
    checks.operands(queries, keys)
    (n, _), m, device = queries.shape, keys.shape[0], queries.device
    checks.temperature(temperature, n, device)
    seed, step = checks.counter("seed", seed, 64, device), checks.counter("step", step, 32, device)
    checks.ids(queries, keys, query_ids, key_ids)
    DrawParams(None, seed, step, num_samples).check_num_samples()
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {checks.describe(generator)}")
    if m > MAX_CATEGORIES:
        raise ValueError(f"keys must have at most 2^24 rows, the limit of torch.multinomial, got {m}")
    if n == 0 or m == 0:
        return torch.full((n, num_samples), -1, dtype=torch.int64, device=device)
    if generator is None:
        generator = torch.Generator(device).manual_seed(_generator_seed(seed, step))
    temperature = checks.one_or_rows(temperature, queries)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scores = masked_scores(ScoreParams(queries, keys, temperature, query_ids, key_ids))
        drawable = (scores > -torch.inf).any(1, keepdim=True)
        probabilities = torch.softmax(torch.where(drawable, scores, 0), 1)  # multinomial refuses a row of zeros
        return torch.where(drawable, torch.multinomial(probabilities, num_samples, True, generator=generator), -1)


def _generator_seed(seed: int | Tensor, step: int | Tensor) -> int:
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    seed, step = (int(value) for value in (seed, step))
    low, high = rng.words(zero, zero, stream=rng.POSITION, seed=seed, step=step)[0, :2].tolist()
    return high << 32 | low
