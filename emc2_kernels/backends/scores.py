"""What a backend is asked for by the primitives that look at every key: the scores of n rows and m keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """s_ij = <q_i, k_j> / temperature_i, arguments checked. A key with the row's id, or whose score is not finite, is
    left out."""

    queries: Tensor  # (n, d)
    keys: Tensor  # (m, d)
    temperature: float | Tensor  # or (n,) float32, float64 where the queries are
    query_ids: Tensor | None  # (n,) int64; None: nothing is excluded
    key_ids: Tensor | None  # (m,) int64
    # Queries and keys are one operand with one set of ids, and have one gradient. It is said, not seen: Inductor gives
    # an operator one tensor for two arguments where it finds that they hold the same, and wants a gradient of each.
    symmetric: bool = False

    @classmethod
    def among(cls, queries: Tensor, temperature: float | Tensor, ids: Tensor | None) -> Scores:
        """Of queries that are the keys."""
        return cls(queries, queries, temperature, ids, ids, symmetric=True)

    def of_rows(self, rows: slice) -> Scores:
        """Some rows against all keys."""
        per_row = ("queries", "temperature", "query_ids")
        some = {name: value[rows] for name in per_row if isinstance(value := getattr(self, name), Tensor)}
        return self._replace(symmetric=False, **some)
