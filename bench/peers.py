"""The competitors of the throughput benchmark, each an object that makes one step when it is called.

All of them get the same operands, include the scores in their time, and own the buffers that a careful user would
reuse, so that none is slowed down by the allocator. What differs is how many samples they return per row, and of which
kind: `naive` draws independent samples from the softmax over `keys`, the two Metropolis-Hastings walks return states of
a chain.
"""

from typing import Protocol

import torch
from torch import Tensor

import emc2_kernels as emc2


class Peer(Protocol):
    """One competitor. `samples_per_row` is what one call returns for each of the n rows; 0 where nothing is sampled."""

    samples_per_row: int

    def __call__(self) -> Tensor: ...


class MatrixProduct:
    """The limit: the matrix product of the operands into a buffer, and nothing else."""

    samples_per_row = 0

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        """`queries` (n, d), `keys` (m, d), one dtype and device."""
        self.queries, self.keys_t = queries, keys.T
        self.out = queries.new_empty(queries.shape[0], keys.shape[0])

    def __call__(self) -> Tensor:
        """Similarities (n, m), in the operands' dtype."""
        return torch.mm(self.queries, self.keys_t, out=self.out)


class NaiveSoftmax:
    """What one writes first: all scores, their softmax in float32, and `torch.multinomial` with replacement."""

    def __init__(self, queries: Tensor, keys: Tensor, temperature: float, samples_per_row: int, seed: int = 0) -> None:
        """`queries` (n, d), `keys` (m, d); `samples_per_row` independent draws for each row."""
        self.product = MatrixProduct(queries, keys)
        self.temperature = temperature
        self.samples_per_row = samples_per_row
        self.probabilities = torch.empty_like(self.product.out, dtype=torch.float32)
        self.generator = torch.Generator(queries.device).manual_seed(seed)

    def __call__(self) -> Tensor:
        """Key positions (n, samples_per_row), int64."""
        scores = self.product().div_(self.temperature)
        torch.softmax(scores, dim=1, dtype=torch.float32, out=self.probabilities)
        return torch.multinomial(self.probabilities, self.samples_per_row, replacement=True, generator=self.generator)


def walk_columns(
    scores: Tensor, current: Tensor, burn_in: int, generator: torch.Generator, samples: Tensor
) -> tuple[Tensor, Tensor]:
    """Walk n chains over m proposals, one column of the score matrix after another.

    Args:
        scores: (m, n) float32, proposal by row, so that a column of the score matrix is contiguous here.
        current: (n,) float32, score of each chain's incoming state; -inf: not started.
        burn_in: number of proposals before the first retained state.
        generator: of the acceptance draws, on the operands' device.
        samples: (m - burn_in, n) int64, filled with the state after each retained proposal, as its position among the
            proposals; -1: still at the incoming state.

    Returns:
        samples, and the scores (n,) of the outgoing states.
    """
    position = torch.full_like(current, -1, dtype=torch.int64)
    for proposal, score in enumerate(scores):
        uniform = torch.rand(score.shape, device=score.device, generator=generator)
        accept = uniform < torch.exp(score - current)
        position = torch.where(accept, proposal, position)
        current = torch.where(accept, score, current)
        if proposal >= burn_in:
            samples[proposal - burn_in] = position
    return samples, current


def collect_pairs(weights: Tensor, current: Tensor, burn_in: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The walk as the EMC2 authors' code schedules it: ratios of exponentials, masked writes, a list of pairs.

    Args:
        weights: (n, m) float32, exp of the scores; 0 where the key is not to be a negative of the row.
        current: (n,) float32, weight of each chain's incoming state; overwritten.
        burn_in: number of proposals before the first retained state.
        generator: of the acceptance draws.

    Returns:
        (2, pairs) int64 rows and the position of their state after each retained proposal (-1: the incoming one), as
        that code collects them for its gradient; and current.
    """
    rows = torch.arange(len(weights), device=weights.device)
    position = torch.full_like(rows, -1)
    uniform = torch.empty_like(current)
    pairs = []
    for proposal in range(weights.shape[1]):
        weight = weights[:, proposal]
        accept = uniform.uniform_(generator=generator) < weight / current
        current[accept] = weight[accept]
        position[accept] = proposal
        if proposal >= burn_in:
            pairs.append(torch.stack((rows, position))[:, weight != 0])
    return torch.cat(pairs, 1), current


class ColumnLoop:
    """The scheme of the EMC2 authors' code, written afresh: all scores, then a Python loop over the key columns."""

    def __init__(self, queries: Tensor, keys: Tensor, temperature: float, burn_in: int, seed: int = 0) -> None:
        """`queries` (n, d), `keys` (m, d); the first `burn_in` of the m proposals are not retained."""
        self.product = MatrixProduct(queries, keys)
        self.temperature = temperature
        self.burn_in = burn_in
        self.samples_per_row = keys.shape[0] - burn_in
        smallest = torch.finfo(torch.float32).smallest_normal
        self.current = queries.new_full((queries.shape[0],), smallest, dtype=torch.float32)
        self.generator = torch.Generator(queries.device).manual_seed(seed)

    def __call__(self) -> Tensor:
        """(2, n * samples_per_row) int64 pairs of row and key position; the chains go on from the last call."""
        weights = self.product().div_(self.temperature).float().exp_()
        pairs, self.current = collect_pairs(weights, self.current, self.burn_in, self.generator)
        return pairs


class LeanColumnLoop:
    """The same walk in as little plain torch as it takes: columns contiguous, no masks, states in a buffer."""

    def __init__(self, queries: Tensor, keys: Tensor, temperature: float, burn_in: int, seed: int = 0) -> None:
        """`queries` (n, d), `keys` (m, d); the first `burn_in` of the m proposals are not retained."""
        rows, proposals = queries.shape[0], keys.shape[0]
        self.product = MatrixProduct(keys, queries)
        self.temperature = temperature
        self.burn_in = burn_in
        self.samples_per_row = proposals - burn_in
        self.samples = queries.new_empty((self.samples_per_row, rows), dtype=torch.int64)
        self.current = queries.new_full((rows,), float("-inf"), dtype=torch.float32)
        self.generator = torch.Generator(queries.device).manual_seed(seed)

    def __call__(self) -> Tensor:
        """Key positions (n, samples_per_row), int64; the chains go on from where the last call left them."""
        scores = self.product().div_(self.temperature).float()
        samples, self.current = walk_columns(scores, self.current, self.burn_in, self.generator, self.samples)
        return samples.T


class MHStep:
    """This library: `emc2_kernels.mh_step`, state carried and step advanced from call to call as in training."""

    def __init__(
        self, queries: Tensor, keys: Tensor, temperature: float, burn_in: int, num_samples: int, backend: str = "auto"
    ) -> None:
        """`queries` (n, d), `keys` (m, d); `num_samples` of the m - burn_in states after burn-in are returned."""
        self.queries, self.keys = queries, keys
        self.options = {
            "temperature": temperature,
            "burn_in": burn_in,
            "num_samples": num_samples,
            "backend": backend,
            "seed": 0,
        }
        self.samples_per_row = num_samples
        self.state = emc2.init_state(queries.shape[0], device=queries.device)
        self.step = 0

    def __call__(self) -> Tensor:
        """Key positions (n, samples_per_row), int32; -1: still at the incoming state."""
        result = emc2.mh_step(self.queries, self.keys, self.state, step=self.step, **self.options)
        self.state = result.state
        self.step += 1
        return result.samples


def make_operands(n: int, m: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random unit vectors: queries (n, d) and keys (m, d). Always the same ones for the same arguments."""
    generator = torch.Generator(device).manual_seed(0)
    sides = [torch.randn(count, d, device=device, generator=generator) for count in (n, m)]
    queries, keys = (torch.nn.functional.normalize(side, dim=1).to(dtype) for side in sides)
    return queries, keys


def build_peers(
    queries: Tensor, keys: Tensor, *, temperature: float, num_samples: int, backend: str
) -> dict[str, Peer]:
    """Every competitor on these operands, by name. Half of the proposals are burn-in; `naive` draws m/4 per row."""
    proposals = keys.shape[0]
    burn_in = proposals // 2
    return {
        "mh_step": MHStep(queries, keys, temperature, burn_in, min(num_samples, proposals - burn_in), backend),
        "mm": MatrixProduct(queries, keys),
        "naive": NaiveSoftmax(queries, keys, temperature, max(1, proposals // 4)),
        "column_loop": ColumnLoop(queries, keys, temperature, burn_in),
        "lean_loop": LeanColumnLoop(queries, keys, temperature, burn_in),
    }
