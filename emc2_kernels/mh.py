"""mh_step and mh_transition: the arguments checked, the defaults filled in, one operator called."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops
from .backends import NAMES
from .backends.params import WalkParams, check_positions, check_schedule
from .dispatch import detached
from .transition import MHResult, MHState, Transition


def mh_step(
    queries: Tensor,
    keys: Tensor,
    state: MHState,
    *,
    temperature: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    chain_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_labels: Tensor | None = None,
    proposal: str | Tensor = "sweep",
    num_proposals: int | None = None,
    log_proposal: Tensor | None = None,
    burn_in: int = 0,
    num_samples: int = 1,
    return_accepts: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> MHResult:
    """Walks n Metropolis-Hastings chains over proposed keys, scores included (EMC2, arXiv 2404.10575, Algorithm 1).

    Chain i has the target ``p_i(j) ~ exp(s_ij)``, ``s_ij = <q_i, k_j> / temperature``, over the keys that are not
    excluded for it. It moves from key c to the proposed key j with probability ``min(1, exp(s_ij - s_ic))``. Nothing is
    differentiated through.

    A sweep proposes the given keys one after another. That is right where the keys are mutually independent uniform
    draws from the data set, made afresh for this call: a mini-batch drawn without replacement is that up to O(b / N).
    It is not right for a fixed set of keys (use "uniform"), for two augmented views of one item in the same sweep, or
    for batches that are not drawn uniformly.

    Args:
        queries: (n, d) float32, bfloat16 or float16 (float64 on the reference backend), unit last stride.
        keys: (m, d), dtype and device of ``queries``, m < 2^31.
        state: where the chains are: keys (n,) int64 and scores (n,) float32; ``init_state(n)`` at first.
        temperature: number, 0-d tensor or (n,) tensor, in [2^-120, 2^100]; scores are similarities divided by it.
        seed: integer or 0-d int64 tensor, 0 <= seed < 2^64.
        step: integer or 0-d int64 tensor, 0 <= step < 2^32, another one for each call.
        chain_ids: (n,) int64 in [0, 2^40), name the random streams; default: ``query_ids``, else the row number. Rows
            that share one share their stream: each is right by itself, but they are not independent.
        query_ids: (n,) int64, ids of the rows; they need ``key_ids``.
        key_ids: (m,) int64. A key with the row's id is never proposed to it (the positive, the row itself).
        key_labels: (m,) int64, what ``state.key`` holds; default: ``key_ids``, else the position in ``keys``.
        proposal: "sweep"; "uniform", ``num_proposals`` draws with replacement; or (n, K) int64 positions in ``keys``.
        num_proposals: with "uniform" only: draws per row.
        log_proposal: (m,) float32, finite: log g_j up to a constant, where the keys were not drawn uniformly but from
            g.
        burn_in: proposals before the first sample, 0 <= burn_in < M for M proposals.
        num_samples: R in 1 .. M - burn_in. Sample r is the state after proposal burn_in + ceil((r + 1) (M - burn_in) /
            R) - 1, so that M - burn_in of them keep every state after burn-in.
        return_accepts: count accepted proposals.
        return_lse: log-sum-exp of similarity / temperature over the keys that are not excluded; sweeps only.
        backend: "auto" or a name from ``backends()``.

    Returns:
        The samples, and the chains afterwards. A score that is not finite is never moved to; without keys every sample
        is the incoming state, -1.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came. Values in tensors are looked at on
            the CPU only.
        RuntimeError: the named backend cannot run here.
    """
    walk = _checked_walk(
        queries, keys, temperature, seed, step, chain_ids, query_ids, key_ids, proposal, num_proposals, log_proposal,
        burn_in, num_samples, 0, None, backend,
    )  # fmt: skip
    key, score = checks.state(state, queries)
    if key_labels is not None:
        checks.vector("key_labels", key_labels, keys.shape[0], torch.int64, queries.device)
    checks.boolean("return_accepts", return_accepts)
    checks.boolean("return_lse", return_lse)
    if return_lse and not (isinstance(proposal, str) and proposal == "sweep"):
        raise ValueError('return_lse needs proposal="sweep", which sees every key, got another proposal')
    key_labels = key_ids if key_labels is None else key_labels
    samples, key, score, threshold, *asked_for = ops.mh_step(
        walk, key, detached(score), key_labels, return_accepts, return_lse, backend
    )
    num_accepted = asked_for[0] if return_accepts else None
    lse = asked_for[-1] if return_lse else None
    return MHResult(samples, MHState(key, score), num_accepted, threshold, lse)


def mh_transition(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    chain_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    proposal: str | Tensor = "sweep",
    num_proposals: int | None = None,
    log_proposal: Tensor | None = None,
    burn_in: int = 0,
    num_samples: int = 1,
    first_proposal: int = 0,
    total_proposals: int | None = None,
    backend: str = "auto",
) -> Transition:
    """The walk of ``mh_step`` as a value, before any chain enters it: compose it with others, then ``apply`` it to
    states.

    Args:
        queries: (n, d) float32, bfloat16 or float16 (float64 on the reference backend), unit last stride.
        keys: (m, d), dtype and device of ``queries``, m < 2^31; this shard's.
        temperature: number, 0-d tensor or (n,) tensor, in [2^-120, 2^100].
        seed: integer or 0-d int64 tensor, 0 <= seed < 2^64.
        step: integer or 0-d int64 tensor, 0 <= step < 2^32, another one for each call.
        chain_ids: (n,) int64 in [0, 2^40), name the random streams; default: ``query_ids``, else the row number.
        query_ids: (n,) int64, ids of the rows; they need ``key_ids``.
        key_ids: (m,) int64. A key with the row's id is never proposed to it.
        proposal: "sweep"; "uniform"; or (n, K) int64 positions in ``keys``, this shard's proposals.
        num_proposals: with "uniform" only: draws per row, of this shard.
        log_proposal: (m,) float32, finite: log g_j up to a constant, where the keys were not drawn uniformly but from
            g.
        burn_in: proposals before the first sample, of the whole walk.
        num_samples: R in 1 .. M - burn_in, of the whole walk.
        first_proposal: number in the whole walk of this shard's first proposal. Burn-in, sample points and draws follow
            the whole walk's numbering; a sample point outside the shard is the identity (before it) or the whole shard
            (after it).
        total_proposals: M of the whole walk; default: ``first_proposal`` plus this shard's.
        backend: "auto" or a name from ``backends()``.

    Returns:
        Fields (n, R): prefixes at the sample points, the last column the whole shard. ``position`` is the key's place
        in ``keys``; in a sweep it counts from ``first_proposal``, so that the shards of a sweep compose as they are.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here.
    """
    walk = _checked_walk(
        queries, keys, temperature, seed, step, chain_ids, query_ids, key_ids, proposal, num_proposals, log_proposal,
        burn_in, num_samples, first_proposal, total_proposals, backend,
    )  # fmt: skip
    return Transition(*ops.mh_transition(walk, backend))


def _checked_walk(
    queries, keys, temperature, seed, step, chain_ids, query_ids, key_ids, proposal, num_proposals, log_proposal,
    burn_in, num_samples, first_proposal, total_proposals, backend,
) -> WalkParams:  # fmt: skip
    checks.operands(queries, keys)
    checks.one_of("backend", backend, NAMES)
    n, device = queries.shape[0], queries.device
    checks.temperature(temperature, n, device, operator_looks=True)
    seed, step = checks.counter("seed", seed, 64, device), checks.counter("step", step, 32, device)
    chain_ids = checks.chain_ids(queries, keys, chain_ids, query_ids, key_ids)
    if log_proposal is not None:
        checks.vector("log_proposal", log_proposal, keys.shape[0], torch.float32, device)
        log_proposal = detached(log_proposal)
    positions, num_draws, count = _proposals(queries, keys, proposal, num_proposals)
    schedule = _schedule(count, burn_in, num_samples, first_proposal, total_proposals)
    return WalkParams(
        detached(queries), detached(keys), detached(checks.one_or_rows(temperature, queries)), seed, step, chain_ids,
        query_ids, key_ids, positions, num_draws, log_proposal, *schedule,
    )  # fmt: skip


def _proposals(
    queries: Tensor, keys: Tensor, proposal: str | Tensor, num_proposals: int | None
) -> tuple[Tensor | None, int | None, int]:
    """Given positions, number of uniform draws, and number of proposals."""
    m = keys.shape[0]
    if isinstance(proposal, str) and proposal == "uniform":
        if num_proposals is None:
            raise ValueError('num_proposals must be given with proposal="uniform", got None')
        draws = checks.at_least("num_proposals", num_proposals, 0) if m > 0 else 0
        return None, draws, draws
    if num_proposals is not None:
        raise ValueError(f'num_proposals goes with proposal="uniform" only, got {checks.shown(num_proposals)}')
    if isinstance(proposal, Tensor):
        check_positions(proposal, queries)
        return proposal, None, proposal.shape[1]
    checks.one_of("proposal", proposal, ("sweep", "uniform"))
    return None, None, m


def _schedule(count: int, burn_in: int, num_samples: int, first: int, total: int | None) -> tuple[int, int, int, int]:
    """Burn-in, number of samples, first proposal, and M of the whole walk."""
    first = checks.integer("first_proposal", first)
    total = first + count if total is None else checks.integer("total_proposals", total)
    burn_in, num_samples = checks.integer("burn_in", burn_in), checks.integer("num_samples", num_samples)
    check_schedule(count, burn_in, num_samples, first, total)
    return burn_in, num_samples, first, total
