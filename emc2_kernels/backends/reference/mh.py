"""The walk in plain torch: the formulas of the method, and the oracle that every kernel is tested against.

Runs on any device and in float64. Memory is O(rows x proposals), so rows are taken in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import rng
from ...transition import MHState, Transition, apply, compose
from ..params import WalkParams, check_items, check_step

BLOCK_ELEMENTS = 1 << 22  # of the (rows, proposals) or (rows, proposals, dim) arrays of one block


def _dtype(walk: WalkParams) -> torch.dtype:
    """Of scores and states: half precision operands are widened first, so that products are exact."""
    return torch.float64 if walk.queries.dtype == torch.float64 else torch.float32


def _row_blocks(walk: WalkParams) -> Iterator[WalkParams]:
    n = walk.queries.shape[0]
    if walk.chain_ids is None:
        walk = walk._replace(chain_ids=torch.arange(n, dtype=torch.int64, device=walk.queries.device))
    per_row = ("queries", "temperature", "chain_ids", "query_ids", "positions")
    fields = {name: value for name in per_row if isinstance(value := getattr(walk, name), Tensor)}
    width = walk.keys.shape[0] if walk.is_sweep else walk.num_proposals * walk.queries.shape[1]
    size = max(1, BLOCK_ELEMENTS // max(1, width))
    for first in range(0, n, size):
        yield walk._replace(**{name: value[first : first + size] for name, value in fields.items()})


def _proposed_positions(walk: WalkParams) -> Tensor:
    """(rows, K) int64, or (1, K) for a sweep: which key each proposal proposes."""
    if walk.positions is not None:
        return walk.positions
    if walk.num_draws is None:
        return torch.arange(walk.keys.shape[0], dtype=torch.int64, device=walk.keys.device)[None]
    numbers = range(walk.first_proposal, walk.first_proposal + walk.num_draws)
    return rng.proposal_positions(walk.chain_ids, numbers, walk.keys.shape[0], seed=walk.seed, step=walk.step)


def _scores(walk: WalkParams, positions: Tensor) -> Tensor:
    """(rows, K): s_ij = <q_i, k_j> / temperature of the proposed keys."""
    queries, keys = walk.queries.to(_dtype(walk)), walk.keys.to(_dtype(walk))
    dots = queries @ keys.T if walk.is_sweep else torch.einsum("nd,nkd->nk", queries, keys[positions])
    temperature = walk.temperature
    return dots / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def _where_proposable(walk: WalkParams, positions: Tensor, scores: Tensor) -> Tensor:
    """(rows, K): -inf for a key with the row's id, which is never proposed to it, and where a score is not finite."""
    proposable = scores.isfinite()
    if walk.query_ids is not None:
        proposable &= walk.key_ids[positions] != walk.query_ids[:, None]
    return torch.where(proposable, scores, -torch.inf)


def _steps(walk: WalkParams) -> tuple[Transition, Tensor]:
    """Each proposal as a transition, (rows, K), and the scores without proposal weights, -inf where not proposable."""
    positions = _proposed_positions(walk)
    scores = _scores(walk, positions)
    similarity = _where_proposable(walk, positions, scores)
    weighted = scores if walk.log_proposal is None else scores - walk.log_proposal[positions]
    value = _where_proposable(walk, positions, weighted)
    numbers = range(walk.first_proposal, walk.first_proposal + walk.num_proposals)
    e = rng.acceptance(walk.chain_ids, numbers, seed=walk.seed, step=walk.step, dtype=value.dtype)
    if walk.is_sweep:  # numbered as in the whole walk, so that shards compose
        positions = positions + walk.first_proposal
    return Transition(value + e, value, torch.where(value.isfinite(), positions, -1)), similarity


def _identity(walk: WalkParams) -> Transition:
    """(rows, 1)."""
    minus_infinity = torch.full((walk.queries.shape[0], 1), -torch.inf, dtype=_dtype(walk), device=walk.queries.device)
    return Transition(minus_infinity, minus_infinity, torch.full_like(minus_infinity, -1, dtype=torch.int64))


def _scan(steps: Transition) -> Transition:
    """Inclusive prefixes by doubling: after the round of ``distance``, a column has the 2 * distance steps up to it."""
    distance = 1
    while distance < steps.threshold.shape[1]:
        earlier = Transition(*(field[:, :-distance] for field in steps))
        later = Transition(*(field[:, distance:] for field in steps))
        composed = compose(earlier, later)
        steps = Transition(*(torch.cat((old[:, :distance], new), 1) for old, new in zip(steps, composed, strict=True)))
        distance *= 2
    return steps


def _prefixes(walk: WalkParams) -> tuple[Transition, Transition, Tensor]:
    """Transitions after 0 .. K proposals, (rows, K + 1); the single steps; their similarities."""
    steps, similarity = _steps(walk)
    prefixes = Transition(*(torch.cat(pair, 1) for pair in zip(_identity(walk), _scan(steps), strict=True)))
    return prefixes, steps, similarity


def _at_sample_points(walk: WalkParams, prefixes: Transition) -> Transition:
    """Sample points before the shard are the identity, those after it the whole shard."""
    done = [min(max(point + 1 - walk.first_proposal, 0), walk.num_proposals) for point in walk.sample_points()]
    columns = torch.tensor(done, dtype=torch.int64, device=walk.queries.device)
    return Transition(*(field[:, columns] for field in prefixes))


def _count_accepts(prefixes: Transition, steps: Transition, state: MHState) -> Tensor:
    """(rows,) int32: a proposal is accepted where the state before it lies below the proposal's own threshold."""
    incoming = torch.where(state.score.isnan(), -torch.inf, state.score)[:, None]
    before = torch.where(incoming < prefixes.threshold, prefixes.score, incoming)[:, :-1]
    return (before < steps.threshold).sum(1).to(torch.int32)


def _concatenated(blocks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(fields) for fields in zip(*blocks, strict=True))


def transition(walk: WalkParams) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, score and position of the prefixes at the sample points, (n, R) each."""
    walk.check_values()
    with torch.autocast(walk.queries.device.type, enabled=False):
        blocks = [tuple(_at_sample_points(rows, _prefixes(rows)[0])) for rows in _row_blocks(walk)]
    if not blocks:
        empty = Transition(*(field.expand(0, walk.num_samples).clone() for field in _identity(walk)))
        return tuple(empty)
    return _concatenated(blocks)


def step(
    walk: WalkParams, key: Tensor, score: Tensor, key_labels: Tensor | None, return_accepts: bool, return_lse: bool
) -> list[Tensor]:
    """[samples, key, score, threshold], then accepted and lse if asked for; see ``emc2_kernels.mh_step``."""
    walk.check_values()
    device, dtype = walk.queries.device, _dtype(walk)
    blocks, done = [], 0
    with torch.autocast(device.type, enabled=False):
        for rows in _row_blocks(walk):
            prefixes, steps, similarity = _prefixes(rows)
            size = rows.queries.shape[0]
            state = MHState(key[done : done + size], score[done : done + size].to(dtype))
            result = apply(_at_sample_points(rows, prefixes), state, key_labels)
            accepted = _count_accepts(prefixes, steps, state)
            lse = torch.logsumexp(similarity, 1) if similarity.shape[1] else similarity.new_full((size,), -torch.inf)
            blocks.append((result.samples, *result.state, prefixes.threshold[:, -1], accepted, lse))
            done += size
    if not blocks:
        floats = torch.empty(0, dtype=dtype, device=device)
        samples = torch.empty(0, walk.num_samples, dtype=torch.int32, device=device)
        blocks = [(samples, key[:0].clone(), floats, floats.clone(), samples[:, 0].clone(), floats.clone())]
    *out, accepted, lse = _concatenated(blocks)
    return out + [accepted] * return_accepts + [lse] * return_lse


def view_coin(items: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """(b,) int64 of 0 and 1; see ``emc2_kernels.rng.view_coin``."""
    check_items(items)
    check_step(step)
    return rng.view_coin(items, seed=seed, step=step)
