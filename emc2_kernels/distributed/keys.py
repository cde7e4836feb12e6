"""The keys of a batch behind one interface: all of them here (this process's own, or gathered), or going round a ring.

What a loss or a sampler does with keys is the same in both cases, because a walk over some of them is a value: a step
is ``apply(mh_transition(...))``, and transitions of shards compose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends.params import CarriedParams, ScoreParams, WalkParams
from ..checks import one_or_rows
from ..isir import Drawn
from ..lse import differentiable_lse, mean_similarity
from ..transition import MHResult, MHState, Transition, apply
from .ring import ring_bag, ring_lse, ring_lse_gradient, ring_resample, ring_similarity, ring_transition
from .shards import Shards

SMALL_BAG = 1 << 15  # rows * keys up to which a product with all keys takes less time than a bag, whose backward sorts


class Sweep(NamedTuple):
    """n chains that are proposed all keys one after another."""

    queries: Tensor  # (n, d) in the dtype to multiply in
    items: Tensor  # (n,) int64; a key of a row's item is never proposed to it
    chain_ids: Tensor  # (n,) int64
    state: MHState
    temperature: float
    seed: int
    step: Tensor  # () int64
    burn_in: int
    num_samples: int
    return_accepts: bool
    backend: str

    def params(self, keys: Keys) -> WalkParams:
        """Over all keys, of which a ring's other ranks' are not here."""
        here = keys.embeddings.detach().to(self.queries.dtype)
        return WalkParams(
            self.queries, here, self.temperature, self.seed, self.step, self.chain_ids, self.items, keys.items,
            None, None, None, self.burn_in, self.num_samples, 0, keys.items.shape[0],
        )  # fmt: skip


class LocalKeys(NamedTuple):
    """Keys that are here: this process's own, or those of all ranks, gathered."""

    embeddings: Tensor  # (m, d) differentiable, view by view
    items: Tensor  # (m,) int64; of a batch without items, numbers of its pairs
    labels: Tensor | None  # (m,) int64  item * 2 + view
    log_proposal: Tensor | None = None  # (m,) float32, see ``ScoreParams``: +inf where there is no key

    def select_view(self, view: int) -> LocalKeys:
        """Those of one of two views."""
        b = self.items.shape[0] // 2
        return LocalKeys(*(None if field is None else field[view * b : (view + 1) * b] for field in self))

    def choose_views(self, coins: Tensor) -> LocalKeys:
        """One view of each item: ``coins`` (m / 2,) of 0 and 1."""
        b = coins.shape[0]
        rows = torch.arange(b, dtype=torch.int64, device=coins.device).add_(coins, alpha=b)
        log_proposal = None if self.log_proposal is None else self.log_proposal[:b]  # an item's views have one
        return LocalKeys(
            self.embeddings.index_select(0, rows), self.items[:b], self.labels.index_select(0, rows), log_proposal
        )

    def cast(self, dtype: torch.dtype) -> LocalKeys:
        return self._replace(embeddings=self.embeddings.to(dtype))

    def walk(self, sweep: Sweep) -> MHResult:
        """Chains after all keys."""
        samples, key, score, threshold, *accepted = ops.mh_step(
            sweep.params(self), *sweep.state, self.labels, sweep.return_accepts, False, sweep.backend
        )
        return MHResult(samples, MHState(key, score), accepted[0] if accepted else None, threshold, None)

    def resample(
        self,
        queries: Tensor,
        items: Tensor,
        carried_items: Tensor,
        temperature: float | Tensor,
        carried: CarriedParams,
        backend: str,
    ) -> Drawn:
        """A step of n chains among all keys but those of the rows' items and of what they bring along: see
        ``ops.isir_step``. carried: its labels are these keys'."""
        return Drawn(*ops.isir_step(self._scores(queries, items, temperature, carried_items), carried, backend))

    def lse_gradient(
        self,
        queries: Tensor,
        items: Tensor,
        carried_items: Tensor,
        temperature: float,
        grad: Tensor,
        lse: Tensor,
        backend: str,
        keys_wanted: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Of queries and keys, for grad (n,) of ``resample``'s log-sum-exps; None: queries are the keys, and the first
        is of both, or it is not wanted."""
        scores = self._scores(queries, items, temperature, carried_items)
        d_queries, d_keys, _ = ops.contrastive_lse_backward(scores, grad, lse, keys_wanted, backend)
        return d_queries, d_keys if keys_wanted and not scores.symmetric else None

    def _scores(
        self, queries: Tensor, items: Tensor, temperature: float | Tensor, carried_items: Tensor | None = None
    ) -> ScoreParams:
        symmetric = queries is self.embeddings and items is self.items
        temperature = one_or_rows(temperature, queries)
        ids = items, self.items, symmetric, carried_items
        return ScoreParams(queries, self.embeddings, temperature, *ids, self.log_proposal)

    def lse(self, queries: Tensor, items: Tensor, temperature: float | Tensor, backend: str) -> Tensor:
        """(n,) log-sum-exp of the scores of queries (n, d) and the keys of other items; see ``contrastive_lse``."""
        return differentiable_lse(self._scores(queries, items, temperature), backend)

    def mean_similarity(
        self,
        lse: Tensor,
        queries: Tensor,
        items: Tensor,
        temperature: float | Tensor,
        backend: str,
        carried_items: Tensor | None = None,
    ) -> Tensor:
        """(n,) mean similarity of queries and keys under the softmax that ``lse`` has summed, detached."""
        return mean_similarity(lse, self._scores(queries, items, temperature, carried_items), backend)

    def bag(self, rows: Tensor, weights: Tensor) -> Tensor:
        """(n, d) weighted sums of the keys at rows (n, S), weights (n, S); differentiable in the keys."""
        weights = weights.to(self.embeddings.dtype)
        small = rows.is_cpu and rows.shape[0] * self.embeddings.shape[0] <= SMALL_BAG
        if small and not torch.is_autocast_enabled("cpu"):  # which would round the product
            every = weights.new_zeros(rows.shape[0], self.embeddings.shape[0]).scatter_add(1, rows, weights)
            return every @ self.embeddings
        return torch.nn.functional.embedding_bag(rows, self.embeddings, mode="sum", per_sample_weights=weights)


class RingKeys(NamedTuple):
    """Keys of all ranks, of which one rank's are here at a time. What a walk needs is gathered: 8 bytes an item."""

    embeddings: Tensor  # (v b, d) of this rank, differentiable
    own_items: Tensor  # (v b,) int64
    items: Tensor | None  # (v B,) int64 of all ranks, view by view and rank by rank; None: there is no walk
    labels: Tensor | None  # (v B,) int64
    shards: Shards

    def select_view(self, view: int) -> RingKeys:
        b, whole = self.embeddings.shape[0] // 2, self.shards.total
        of_all = (None if field is None else field[view * whole : (view + 1) * whole] for field in self[2:4])
        return RingKeys(self.embeddings[view * b : (view + 1) * b], self.own_items[:b], *of_all, self.shards)

    def choose_views(self, coins: Tensor) -> RingKeys:
        b, first, whole = self.embeddings.shape[0] // 2, self.shards.first, self.shards.total
        mine = coins[first : first + b, None]
        chosen = torch.where(mine == 1, self.embeddings[b:], self.embeddings[:b])
        return RingKeys(chosen, self.own_items[:b], self.items[:whole], self.labels[:whole] + coins, self.shards)

    def cast(self, dtype: torch.dtype) -> RingKeys:
        return self._replace(embeddings=self.embeddings.to(dtype))

    def walk(self, sweep: Sweep) -> MHResult:
        """``num_accepted`` is None: which proposals were accepted is on no rank."""
        return apply(
            Transition(*ring_transition(sweep.params(self), self.shards, sweep.backend)), sweep.state, self.labels
        )

    def lse(self, queries: Tensor, items: Tensor, temperature: float | Tensor, backend: str) -> Tensor:
        ids = items, self.own_items, None
        return ring_lse(queries, self.embeddings, temperature, ids, self.shards, backend)

    def resample(
        self,
        queries: Tensor,
        items: Tensor,
        carried_items: Tensor,
        temperature: float | Tensor,
        carried: CarriedParams,
        backend: str,
    ) -> Drawn:
        ids = items, self.own_items, carried_items
        return ring_resample(queries, self.embeddings, temperature, ids, carried, self.shards, backend)

    def lse_gradient(
        self,
        queries: Tensor,
        items: Tensor,
        carried_items: Tensor,
        temperature: float,
        grad: Tensor,
        lse: Tensor,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ids = items, self.own_items, carried_items
        gradients = ring_lse_gradient(grad, lse, queries, self.embeddings, temperature, ids, self.shards, backend)
        return gradients[:2]

    def mean_similarity(
        self,
        lse: Tensor,
        queries: Tensor,
        items: Tensor,
        temperature: float | Tensor,
        backend: str,
        carried_items: Tensor | None = None,
    ) -> Tensor:
        ids = items, self.own_items, carried_items
        return ring_similarity(lse, queries, self.embeddings, temperature, ids, self.shards, backend)

    def bag(self, rows: Tensor, weights: Tensor) -> Tensor:
        return ring_bag(self.embeddings, rows, weights.to(self.embeddings.dtype), self.shards)


Keys = LocalKeys | RingKeys
