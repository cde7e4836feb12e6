"""What a backend is asked for by the primitives that look at every key: the scores of n rows and m keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """s_ij = <q_i, k_j> / temperature_i, arguments checked. A key with the row's id, or whose score is not finite, is
    left out."""

    queries: Tensor  # (n, d)
    keys: Tensor  # (m, d); may be the very tensor ``queries``
    temperature: float | Tensor  # or (n,) float32, float64 where the queries are
    query_ids: Tensor | None  # (n,) int64; None: nothing is excluded
    key_ids: Tensor | None  # (m,) int64

    @property
    def symmetric(self) -> bool:
        """Queries and keys are one matrix with one set of ids; its gradient is then one."""
        return self.keys is self.queries

    def of_rows(self, rows: slice) -> Scores:
        per_row = ("queries", "temperature", "query_ids")
        return self._replace(
            **{name: value[rows] for name in per_row if isinstance(value := getattr(self, name), Tensor)}
        )
