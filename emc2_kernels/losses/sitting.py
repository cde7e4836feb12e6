"""Which chains sit on a key: what EMC2's carry="two_sided" pushes the batch's keys with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..stores.bank import EmbeddingBank
from ..stores.chains import ChainStore
from ..stores.strict_state import FINITE, outside
from ..stores.table import SlotTable, last_duplicates


class SittingQueries(SlotTable):
    """For each label, the sum of the kept embeddings of the chains whose state it is, kept up to date by differences.

    The key side of the global gradient is, for key j, the sum over chains i of p_i(j) q_i; the chains that sit on j are
    a draw of it. Float32, because every visit takes out what an earlier one has put in.
    """

    sums: Tensor  # (num_items * views, dim) float32

    def __init__(self, num_items: int, dim: int, *, views: int = 2) -> None:
        super().__init__(num_items, views)
        self.keep("sums", 0, torch.float32, width=dim)

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        yield from outside(f"{prefix}sums", tables["sums"], *FINITE)

    def on(self, labels: Tensor) -> Tensor:
        """(k, dim) sums of labels (k,) int64."""
        return self.sums[labels]

    def leave(self, slots: Tensor, chains: ChainStore, bank: EmbeddingBank, only: Tensor | None = None) -> None:
        """Takes out the chains of slots (k,), before their states and embeddings change; none where ``only`` () is
        False."""
        self._add(slots, chains, bank, -1, only)

    def sit_down(self, slots: Tensor, chains: ChainStore, bank: EmbeddingBank, only: Tensor | None = None) -> None:
        """Puts them in where they are now."""
        self._add(slots, chains, bank, 1, only)

    def _add(self, slots: Tensor, chains: ChainStore, bank: EmbeddingBank, sign: int, only: Tensor | None) -> None:
        once = last_duplicates(slots) == torch.arange(slots.shape[0], dtype=torch.int64, device=slots.device)
        keys = chains.key[slots]
        counted = once & (keys >= 0) & (bank.written_at[slots] >= 0)
        counted = counted if only is None else counted & only
        queries = torch.where(counted[:, None], bank.embeddings[slots].float(), 0)
        self.sums.index_add_(0, keys.clamp_min(0), queries, alpha=sign)
