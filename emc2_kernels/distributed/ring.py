"""Sums over the keys of all ranks with one shard of keys at a time: the shards travel round, the queries stay.

Memory is O(b d) on each rank. A shard's exchange runs while the shard before it is worked on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import checks, ops
from ..autograd import no_double_backward
from ..backends.params import CarriedParams, ScoreParams, WalkParams
from ..isir import Drawn
from ..lse import mean_similarity
from ..transition import Transition, compose
from .shards import Shards

NO_SECOND_DERIVATIVE = "a sum over a ring of ranks has no second derivative"


class _Exchange:
    """Tensors on their way to the next rank, and the previous rank's on their way here."""

    def __init__(self, tensors: list[Tensor], source: int, shards: Shards) -> None:
        """source: rank whose shard, of its number of rows, the tensors are."""
        group, ranks = shards.group, len(shards.sizes)
        here, there = shards.sizes[source], shards.sizes[(source - 1) % ranks]
        self.arriving = [t.new_empty(t.shape[0] // here * there, *t.shape[1:]) for t in tensors]
        next_rank, previous = ((shards.rank + side) % ranks for side in (1, -1))
        if group is not None:
            next_rank, previous = (dist.get_global_rank(group, rank) for rank in (next_rank, previous))
        self._sent = [tensor.contiguous() for tensor in tensors]  # alive until they have arrived
        calls = [dist.P2POp(dist.isend, tensor, next_rank, group) for tensor in self._sent]
        calls += [dist.P2POp(dist.irecv, tensor, previous, group) for tensor in self.arriving]
        self._works = dist.batch_isend_irecv(calls) if calls else []

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self.arriving


def rotate_shards(tensors: list[Tensor], shards: Shards) -> Iterator[tuple[int, list[Tensor]]]:
    """Every rank's tensors in turn, this rank's first, then those of the ranks before it.

    Args:
        tensors: of this rank, each with a whole multiple of its shard's rows.
    """
    ranks = len(shards.sizes)
    for hop in range(ranks):
        source = (shards.rank - hop) % ranks
        exchange = _Exchange(tensors, source, shards) if hop + 1 < ranks else None
        yield source, tensors
        if exchange is not None:
            tensors = exchange.wait()


def rotate_and_sum(
    tensors: list[Tensor], shards: Shards, contribution: Callable[[int, list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """Every rank looks at every rank's tensors, and what they contribute to a shard is added up where it belongs.

    Args:
        contribution: (rank, its tensors) -> what this rank adds to that rank's sums, each with a whole multiple of the
            shard's rows.

    Returns:
        The sums of this rank's shard. They travel with the shard, a hop behind, and are added up in one fixed order.
    """
    sums: list[Tensor] = []
    under_way = None
    for source, shard in rotate_shards(tensors, shards):
        sums = contribution(source, shard)
        if under_way is not None:
            sums = [own.add_(others) for own, others in zip(sums, under_way.wait(), strict=True)]
        if len(shards.sizes) > 1:  # after the last hop, home
            under_way = _Exchange(sums, source, shards)
    return sums if under_way is None else under_way.wait()


# Of the queries and of this rank's keys; of the queries again, or None. See ``ScoreParams``.
Ids = tuple[Tensor, Tensor, Tensor | None]


class _RingLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        queries: Tensor,
        keys: Tensor,
        temperature: float | Tensor,
        ids: Ids,
        shards: Shards,
        backend: str,
    ) -> Tensor:
        rows, lse = checks.one_or_rows(temperature, queries), None
        for _, (some, some_ids) in rotate_shards([keys, ids[1]], shards):
            scores = ScoreParams(queries, some, rows, ids[0], some_ids, carried_ids=ids[2])
            part = ops.contrastive_lse(scores, backend)
            lse = part if lse is None else torch.logaddexp(lse, part)
        ctx.shards, ctx.backend = shards, backend
        ctx.number = None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(queries, keys, *ids, lse, temperature if ctx.number is None else None)
        return lse

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        queries, keys, *ids, lse, learnt = (x if x is None else x.detach() for x in saved)
        temperature = learnt if ctx.number is None else ctx.number
        of = queries, keys, temperature, ids, ctx.shards, ctx.backend
        gradients = ring_lse_gradient(grad.detach(), lse, *of)
        sources = grad, saved[0], saved[1], saved[-1]
        return *no_double_backward(NO_SECOND_DERIVATIVE, *gradients, of=sources), None, None, None


def ring_lse_gradient(
    grad: Tensor,
    lse: Tensor,
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    ids: Ids,
    shards: Shards,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of queries, keys and a 0-d temperature, None for a number, for grad (n,) of lse (n,), of which the keys' scores
    are a part at least. The others are those of ``ring_lse``."""
    rows = checks.one_or_rows(temperature, queries)
    # In float32 at least: sums of half precision, rounded at every hop, are 1% wrong after 64 of them.
    d_queries = torch.zeros_like(queries, dtype=lse.dtype)
    d_temperature = torch.zeros_like(temperature) if isinstance(temperature, Tensor) else None

    def contribution(_: int, shard: list[Tensor]) -> list[Tensor]:
        scores = ScoreParams(queries, shard[0], rows, ids[0], shard[1], carried_ids=ids[2])
        for_queries, for_keys, for_rows = ops.contrastive_lse_backward(scores, grad, lse, True, backend)
        d_queries.add_(for_queries)
        if d_temperature is not None:
            d_temperature.add_(for_rows.sum())
        return [for_keys.to(lse.dtype)]

    (d_keys,) = rotate_and_sum([keys, ids[1]], shards, contribution)
    return d_queries.to(queries.dtype), d_keys.to(keys.dtype), d_temperature


def ring_lse(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    ids: Ids,
    shards: Shards,
    backend: str,
) -> Tensor:
    """``contrastive_lse`` of this rank's queries over the keys of all ranks, differentiable in queries, keys and a 0-d
    temperature. A rank's keys get the sum of all ranks' gradients.

    Args:
        queries: (n, d).
        keys: (m, d) of this rank, where m is a whole multiple of its shard's rows.
        ids: (n,) of the queries, (m,) int64 of this rank's keys. A key with one of the row's ids is left out, on
            whichever rank it is.
    """
    return _RingLse.apply(queries, keys, temperature, ids, shards, backend)


def ring_resample(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    ids: Ids,
    carried: CarriedParams,
    shards: Shards,
    backend: str,
) -> Drawn:
    """``ops.isir_step`` of this rank's chains over the keys of all ranks, view by view and rank by rank.

    Args:
        queries: as are the next three, see ``ring_lse``.
        carried: its labels are all ranks' keys'.
    """
    rows, views = checks.one_or_rows(temperature, queries), keys.shape[0] // shards.sizes[shards.rank]
    # What the chains bring along are the candidates of a step without keys.
    own, nobody = carried._replace(key_labels=None), ScoreParams(queries, keys[:0], rows, None, None)
    found = Drawn(*ops.isir_step(nobody, own, backend))
    nothing = own._replace(key=own.key[:, :0], score=own.score[:, :0])
    for source, shard in rotate_shards([keys, ids[1]], shards):
        for view, (some, some_ids) in enumerate(zip(*(x.unflatten(0, (views, -1)) for x in shard), strict=True)):
            first = view * shards.total + sum(shards.sizes[:source])
            labels = carried.key_labels[first : first + len(some)]
            scores = ScoreParams(queries, some, rows, ids[0], some_ids, carried_ids=ids[2])
            part = ops.isir_step(scores, nothing._replace(key_labels=labels, first_key=first), backend)
            found = found.or_better(Drawn(*part))
    return found


def ring_similarity(
    lse: Tensor,
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    ids: Ids,
    shards: Shards,
    backend: str,
) -> Tensor:
    """``mean_similarity`` over the keys of all ranks: (n,), detached."""
    total, rows = torch.zeros_like(lse), checks.one_or_rows(temperature, queries)
    for _, (some, some_ids) in rotate_shards([keys.detach(), ids[1]], shards):
        scores = ScoreParams(queries, some, rows, ids[0], some_ids, carried_ids=ids[2])
        total += mean_similarity(lse, scores, backend)
    return total


def ring_transition(walk: WalkParams, shards: Shards, backend: str) -> Transition:
    """``mh_transition`` of this rank's queries over the keys of all ranks, view by view and rank by rank.

    A rank sees the shards in another order, its own first and then those before it; walks compose, so that does not
    matter: what it has walked is kept as two values for each view, of the ranks up to this one and of those behind it.

    Args:
        walk: a sweep whose keys (v b, d) are this rank's, v views of its shard's b rows, and whose key ids (v B,) and
            number of proposals are those of all ranks.
    """
    views = walk.keys.shape[0] // shards.sizes[shards.rank]
    up_to_here: list[Transition | None] = [None] * views
    behind: list[Transition | None] = [None] * views
    for source, (some,) in rotate_shards([walk.keys], shards):
        for view, block in enumerate(some.unflatten(0, (views, -1))):
            first = view * shards.total + sum(shards.sizes[:source])
            ids = walk.key_ids[first : first + block.shape[0]]
            of_shard = walk._replace(keys=block, key_ids=ids, first_proposal=first)
            walked = Transition(*ops.mh_transition(of_shard, backend))
            side = up_to_here if source <= shards.rank else behind
            side[view] = walked if side[view] is None else compose(walked, side[view])  # ranks come in falling order
    in_order = [side[view] for view in range(views) for side in (up_to_here, behind) if side[view] is not None]
    return reduce(compose, in_order)


class _RingBag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, keys: Tensor, rows: Tensor, weights: Tensor, shards: Shards) -> Tensor:
        ctx.shards, ctx.views = shards, keys.shape[0] // shards.sizes[shards.rank]
        ctx.save_for_backward(rows, weights)
        total = keys.new_zeros(rows.shape[0], keys.shape[1])
        for source, (some,) in rotate_shards([keys], shards):
            local, share = _rows_on_rank(source, rows, weights, ctx.views, shards)
            total += torch.nn.functional.embedding_bag(local, some, mode="sum", per_sample_weights=share)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weights), shards = ctx.saved_tensors, ctx.shards

        def contribution(source: int, _: list[Tensor]) -> list[Tensor]:
            local, share = _rows_on_rank(source, rows, weights, ctx.views, shards)
            return [_bag_gradient(grad.detach(), local, share, ctx.views * shards.sizes[source])]

        (d_keys,) = rotate_and_sum([], shards, contribution)
        return *no_double_backward(NO_SECOND_DERIVATIVE, d_keys, of=(grad,)), None, None, None


def _bag_gradient(grad: Tensor, rows: Tensor, weights: Tensor, num_keys: int) -> Tensor:
    """(num_keys, d) of a bag's keys, from torch's own backward pass, which makes no (n, S, d) array and asks a GPU for
    no count."""
    with torch.enable_grad():
        keys = grad.new_zeros(num_keys, grad.shape[1]).requires_grad_()
        bag = torch.nn.functional.embedding_bag(rows, keys, mode="sum", per_sample_weights=weights)
    return torch.autograd.grad(bag, keys, grad)[0]


def _rows_on_rank(source: int, rows: Tensor, weights: Tensor, views: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """Rows of the keys of all ranks as rows of one rank's, and the weights of those that are among them, else 0."""
    size, first = shards.sizes[source], sum(shards.sizes[:source])
    view = torch.div(rows, shards.total, rounding_mode="floor")
    place = rows - view * shards.total - first
    inside = (place >= 0) & (place < size) & (view < views)
    return torch.where(inside, view * size + place, 0), torch.where(inside, weights, 0)


def ring_bag(keys: Tensor, rows: Tensor, weights: Tensor, shards: Shards) -> Tensor:
    """(n, d) weighted sums of keys of all ranks, differentiable in the keys; each rank's get all ranks' gradients.

    Args:
        keys: (v b, d) of this rank, v views of its shard's b rows.
        rows: (n, S) int64 rows of all ranks' keys, view by view and rank by rank.
        weights: (n, S) in the keys' dtype.
    """
    return _RingBag.apply(keys, rows, weights, shards)
