"""What a backend is asked for: a walk, the scores of all keys, or draws from them; defaults filled in, shapes and
dtypes checked. The operators' schemas are made of these fields (dispatch.py), csrc/params.h has their names.

Values in tensors have not been looked at: those of a compiled graph nobody can see before the operator runs. Who reads
them looks: the compiled cores and the kernels at what they read, ``check_values`` for all that is left to torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks

MAX_PROPOSALS = 1 << 33  # of a walk: the draws' blocks have 32 bits, two positions each
MAX_CARRIED = 4  # candidates that a chain brings along: the words of one block of draws
MAX_SAMPLES = 1 << 16  # of gumbel_sample: a sample's number has 16 bits of the random counter


class WalkParams(NamedTuple):
    """n rows, m keys, and K proposals, numbers first_proposal .. first_proposal + K - 1 of total_proposals."""

    queries: Tensor  # (n, d)
    keys: Tensor  # (m, d)
    temperature: float | Tensor  # or (n,) float32
    seed: int | Tensor  # or 0-d int64, the bits of an unsigned number
    step: int | Tensor  # or 0-d int64
    chain_ids: Tensor | None  # (n,) int64; None: the row number
    query_ids: Tensor | None  # (n,) int64; None: nothing is excluded
    key_ids: Tensor | None  # (m,) int64
    positions: Tensor | None  # (n, K) int64 proposals given by the caller
    num_draws: int | None  # K uniform proposals drawn with replacement; None, and no positions: a sweep, K = m
    log_proposal: Tensor | None  # (m,) float32
    burn_in: int
    num_samples: int  # R
    first_proposal: int
    total_proposals: int

    @property
    def num_proposals(self) -> int:
        """K, of this shard."""
        if self.positions is not None:
            return self.positions.shape[1]
        return self.keys.shape[0] if self.num_draws is None else self.num_draws

    @property
    def is_sweep(self) -> bool:
        return self.positions is None and self.num_draws is None

    def sample_points(self) -> list[int]:
        return sample_points(self.total_proposals, self.burn_in, self.num_samples)

    def check_shapes(self) -> None:
        """Of what comes to the operators by themselves; ``mh_step`` has looked at its arguments.

        Raises:
            ValueError, TypeError: as ``mh_step``.
        """
        queries, keys = self.queries, self.keys
        checks.operands(queries, keys)
        checks.chain_ids(queries, keys, self.chain_ids, self.query_ids, self.key_ids)
        checks.row_temperatures(self.temperature, queries)
        if self.log_proposal is not None:
            checks.vector("log_proposal", self.log_proposal, keys.shape[0], torch.float32, queries.device)
        if self.positions is not None:
            check_positions(self.positions, queries)
        check_schedule(self.num_proposals, self.burn_in, self.num_samples, self.first_proposal, self.total_proposals)

    def check_values(self) -> None:
        """Names what is out of range, and where it is; on a GPU the device looks.

        Raises:
            ValueError: as ``mh_step``.
        """
        check_chains(self.chain_ids, self.query_ids)
        check_step(self.step)
        checks.temperature(self.temperature, self.queries.shape[0], self.queries.device)
        if self.log_proposal is not None:
            checks.finite("log_proposal", self.log_proposal)
        if self.positions is not None:
            checks.within("proposal", self.positions, 0, self.keys.shape[0], on_gpu=True)


def check_positions(proposal: Tensor, queries: Tensor) -> None:
    n, device = queries.shape[0], queries.device
    checks.tensor("proposal", proposal)
    shaped = proposal.dim() == 2 and proposal.shape[0] == n
    if not shaped or proposal.dtype != torch.int64 or proposal.device != device:
        expected = f"an int64 tensor of shape ({n}, K) on {device}"
        raise ValueError(f'proposal must be "sweep", "uniform" or {expected}, got {checks.describe(proposal)}')


def check_schedule(count: int, burn_in: int, num_samples: int, first: int, total: int) -> None:
    """Of a shard of ``count`` proposals, number ``first`` and on of a walk of ``total``."""
    checks.at_least("first_proposal", first, 0)
    if count >= checks.MAX_POSITION:
        raise ValueError(f"num_proposals must be below 2^31, those of one call, got {count}")
    if first + count > total:
        end = f"first_proposal + {count} proposals = {first + count}"
        raise ValueError(f"total_proposals must be at least {end}, got {total}")
    if total > MAX_PROPOSALS:
        raise ValueError(f"total_proposals must be at most 2^33, a chain's draws in a step, got {total}")
    checks.at_least("burn_in", burn_in, 0)
    if checks.at_least("num_samples", num_samples, 1) > MAX_PROPOSALS:
        raise ValueError(f"num_samples must be at most 2^33, got {num_samples}")
    if total > 0:  # a walk of nothing leaves every sample at the incoming state, whatever was asked
        if burn_in >= total:
            raise ValueError(f"burn_in must be below the number of proposals, {total}, got {burn_in}")
        if num_samples > total - burn_in:
            expected = f"at most {total - burn_in} ({total} proposals - burn_in)"
            raise ValueError(f"num_samples must be {expected}, got {num_samples}")


def check_chains(chain_ids: Tensor | None, query_ids: Tensor | None) -> None:
    """Ids that name the rows' random streams; the query ids do where no others are given."""
    if chain_ids is not None:
        same = query_ids is not None and chain_ids.data_ptr() == query_ids.data_ptr()
        named = "query_ids, which name the chains," if same else "chain_ids"
        checks.within(named, chain_ids, 0, checks.MAX_CHAIN_ID, on_gpu=True)


def check_items(items: Tensor) -> None:
    """Of the view coin, whose chains they are."""
    checks.within("items", items, 0, checks.MAX_CHAIN_ID, on_gpu=True)


def check_step(step: int | Tensor) -> None:
    """A seed needs none: its bits are an int64 here, each of which is legal."""
    checks.counter("step", step, 32, step.device if isinstance(step, Tensor) else None)


def sample_points(total: int, burn_in: int, num_samples: int) -> list[int]:
    """The proposal after which each sample is taken: burn_in + ceil((r + 1) * (M - burn_in) / R) - 1, r < R."""
    return [burn_in + -(-(r + 1) * (total - burn_in) // num_samples) - 1 for r in range(num_samples)]


class ScoreParams(NamedTuple):
    """The scores s_ij = <q_i, k_j> / temperature_i - log g_j of n rows and m keys, for the primitives that look at
    every key. A key with one of the row's ids, or whose score is not finite, is left out: with log g_j infinite, of all
    rows."""

    queries: Tensor  # (n, d)
    keys: Tensor  # (m, d)
    temperature: float | Tensor  # or (n,) float32, float64 where the queries are
    query_ids: Tensor | None  # (n,) int64; None: nothing is excluded
    key_ids: Tensor | None  # (m,) int64
    # Queries and keys are one operand with one set of ids, and have one gradient. It is said, not seen: Inductor gives
    # an operator one tensor for two arguments where it finds that they hold the same, and wants a gradient of each.
    symmetric: bool = False
    carried_ids: Tensor | None = None  # (n,) int64, a second id of the row; None: it has none
    log_proposal: Tensor | None = None  # (m,) float32 log g; None: zeros

    @classmethod
    def among(cls, queries: Tensor, temperature: float | Tensor, ids: Tensor | None) -> ScoreParams:
        """Of queries that are the keys."""
        return cls(queries, queries, temperature, ids, ids, symmetric=True)

    def slice_rows(self, rows: slice) -> ScoreParams:
        """Some rows against all keys."""
        per_row = ("queries", "temperature", "query_ids", "carried_ids")
        some = {name: value[rows] for name in per_row if isinstance(value := getattr(self, name), Tensor)}
        return self._replace(symmetric=False, **some)

    def check_shapes(self) -> None:
        """Of what comes to the operators by themselves.

        Raises:
            ValueError, TypeError: as ``contrastive_lse``.
        """
        checks.operands(self.queries, self.keys)
        checks.row_temperatures(self.temperature, self.queries)
        checks.ids(self.queries, self.keys, self.query_ids, self.key_ids, self.carried_ids)
        if self.log_proposal is not None:
            checks.vector("log_proposal", self.log_proposal, self.keys.shape[0], torch.float32, self.queries.device)

    def check(self) -> None:
        """Temperatures too, which a graph that was traced could not see."""
        self.check_shapes()
        self.check_values()

    def check_values(self) -> None:
        checks.temperature(self.temperature, self.queries.shape[0], self.queries.device)
        if self.log_proposal is not None:
            checks.finite("log_proposal", self.log_proposal, or_inf=True)


class DrawParams(NamedTuple):
    """Draws of keys from each row's softmax."""

    chain_ids: Tensor | None  # (n,) int64; None: the row number
    seed: int | Tensor
    step: int | Tensor
    num_samples: int  # R

    def check_num_samples(self) -> None:
        if checks.at_least("num_samples", self.num_samples, 1) >= MAX_SAMPLES:
            raise ValueError(f"num_samples must be below 2^16, got {self.num_samples}")


class CarriedParams(NamedTuple):
    """What n chains bring along to a step over all keys (i-SIR), C candidates each, and which draws are theirs."""

    key: Tensor  # (n, C) int64 labels
    score: Tensor  # (n, C) float32, float64 where the queries are; one that is not finite is no candidate
    key_labels: Tensor | None  # (m,) int64, what the next state's key holds; None: the key's number
    chain_ids: Tensor | None  # (n,) int64; None: the row number
    seed: int | Tensor  # or 0-d int64, the bits of an unsigned number
    step: int | Tensor  # or 0-d int64
    first_key: int  # number of these keys' first one among all: the noise, and positions, go by it

    def check_shapes(self, scores: ScoreParams) -> None:
        """Of what comes to the operator by itself.

        Raises:
            ValueError, TypeError: as ``isir_step``.
        """
        queries, keys = scores.queries, scores.keys
        checks.chain_ids(queries, keys, self.chain_ids, scores.query_ids, scores.key_ids)
        checks.tensor("state.key", self.key)
        shape = (queries.shape[0], self.key.shape[-1] if self.key.dim() else 0)
        for name, value, dtype in (
            ("state.key", self.key, torch.int64), ("state.score", self.score, score_dtype(queries)),
        ):  # fmt: skip
            if value.shape != shape or value.dtype != dtype or value.device != queries.device:
                expected = f"{str(dtype).removeprefix('torch.')} of shape ({queries.shape[0]}, C) on {queries.device}"
                raise ValueError(f"{name} must be {expected}, got {checks.describe(value)}")
        if shape[1] > MAX_CARRIED:
            raise ValueError(f"state.key must have at most {MAX_CARRIED} candidates a row, got {shape[1]}")
        if self.key_labels is not None:
            checks.vector("key_labels", self.key_labels, keys.shape[0], torch.int64, queries.device)
        first = checks.at_least("first_key", self.first_key, 0)
        if first + keys.shape[0] > MAX_PROPOSALS:
            raise ValueError(f"first_key must be at most 2^33 - {keys.shape[0]} keys, got {first}")

    def check_values(self, scores: ScoreParams) -> None:
        """Names what is out of range, and where it is; on a GPU the device looks.

        Raises:
            ValueError: as ``isir_step``.
        """
        check_chains(self.chain_ids, scores.query_ids)
        check_step(self.step)
        scores.check_values()


def score_dtype(queries: Tensor) -> torch.dtype:
    """Of scores, states and log-sum-exps."""
    return torch.float64 if queries.dtype == torch.float64 else torch.float32
