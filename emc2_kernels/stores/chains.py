"""The chains of a data set: one for each (item, view), carried from visit to visit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..transition import MHState
from .bank import EmbeddingBank
from .strict_state import FINITE, range_errors
from .table import SlotTable


class ChainStore(SlotTable):
    """States of ``num_items * views`` chains; chain id = item * views + view. They are in ``state_dict``.

    One chain for each view, because the two views of an item have different targets (EMC2's public code shares one, and
    carries a score that was computed for the other view).

    Args:
        num_items: items of the data set.
        views: of an item.
        device: of the tables; None: torch's default.
        process_group: over whose ranks it lies with ``sharded``; None: the default group.
        sharded: each rank keeps a block of items; reads and writes are then collectives.

    Attributes:
        key: (num_items * views,) int64, label of each chain's present key; -1: not started.
        score: (num_items * views,) float32, its score when it was kept; -inf: not started.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """

    key: Tensor
    score: Tensor

    def __init__(
        self,
        num_items: int,
        *,
        views: int = 2,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        sharded: bool = False,
    ) -> None:
        super().__init__(num_items, views, process_group=process_group, sharded=sharded)
        self.keep("key", -1, torch.int64, device)
        self.keep("score", -torch.inf, torch.float32, device)

    def read(
        self,
        index: Tensor,
        view: int | Tensor,
        queries: Tensor | None = None,
        bank: EmbeddingBank | None = None,
        temperature: float | Tensor | None = None,
    ) -> MHState:
        """States of b chains, rescored where a bank is given.

        A kept score is stale: the anchor has been augmented anew and the encoder has moved. With ``queries``, ``bank``
        and ``temperature``, all three, the score becomes that of the bank's entry of the chain's key, as an inner
        product over the temperature; chains that have not started, or whose key the bank does not hold, keep theirs.

        Args:
            index: (b,) int64 items.
            view: one number or (b,) int64, in [0, views).
            queries: (b, d) embeddings of the anchors.
            bank: of the same items and views.
            temperature: number, 0-d tensor or (b,) tensor.

        Raises:
            ValueError, TypeError: an index or view out of range, or only some of the three rescoring arguments.
        """
        with self.report_errors():
            slots = self.slots(index, view, self.key.device)
            rescored = self._check_rescoring(slots.shape[0], queries, bank, temperature)
        if rescored:
            return self.rescore(slots, queries, bank.find, temperature)[0]
        return MHState(*self.rows(slots, "key", "score"))

    @torch.no_grad()
    def rescore(
        self,
        slots: Tensor,
        queries: Tensor,
        find: Callable[[Tensor], tuple[Tensor, Tensor]],
        temperature: float | Tensor,
    ) -> tuple[MHState, Tensor]:
        """``read`` of slots (b,), rescored, with arguments that have been checked; and the embeddings (b, d) of the
        chains' keys, zeros for what the bank does not hold.

        Args:
            find: the bank's, or its ``read`` where keys are known to be its labels.
        """
        key, score = self.rows(slots, "key", "score")
        held, embeddings = find(key)
        similarity = (queries.float() * embeddings.float()).sum(-1)  # no product for autocast to round
        return MHState(key, torch.where(held, similarity / temperature, score)), embeddings

    def _check_rescoring(self, rows: int, queries: Any, bank: Any, temperature: Any) -> bool:
        """Whether it is asked for."""
        given = [argument is not None for argument in (queries, bank, temperature)]
        if not any(given):
            return False
        if not all(given):
            raise ValueError("queries, bank and temperature go together: rescoring needs all three, got only some")
        if not isinstance(bank, EmbeddingBank):
            raise TypeError(f"bank must be an EmbeddingBank, got {checks.describe(bank)}")
        checks.matrix("queries", queries)
        if queries.shape != (rows, bank.dim):
            raise ValueError(f"queries must have shape ({rows}, {bank.dim}), got {checks.describe(queries)}")
        checks.temperature(temperature, rows, queries.device)
        return True

    def write(self, index: Tensor, view: int | Tensor, state: MHState, *, only: Tensor | None = None) -> None:
        """Keeps the states of b chains; of several rows with the same (index, view), the last one's.

        A state whose score is NaN or +inf is not kept: the chain stays where it was.

        Args:
            index: (b,) int64 items.
            view: one number or (b,) int64, in [0, views).
            state: keys (b,) int64 and scores (b,) float32.
            only: () bool; False: nothing is written. It is not waited for.

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came; nothing has been written.
        """
        with self.report_errors():
            slots = self.slots(index, view, self.key.device)
            checks.state(state, slots)
        self.put_state(slots, state, only=only)

    def put_state(self, slots: Tensor, state: MHState, *, only: Tensor | None = None, **known: bool) -> None:
        """``write`` of slots (b,), with arguments that have been checked. For ``known`` see ``SlotTable.put``."""
        self.put(slots, only=only, **known, key=state.key, score=state.score)

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        yield from range_errors(f"{prefix}key", tables["key"], -1, torch.iinfo(torch.int64).max)
        yield from range_errors(f"{prefix}score", tables["score"], -math.inf, FINITE[1])

    def extra_repr(self) -> str:
        return f"num_items={self.num_items}, views={self.views}"
