"""The competitors of the throughput benchmark, each an object that makes one step when it is called.

All of them get the same operands, include the scores in their time, and own the buffers that a careful user would
reuse, so that none is slowed down by the allocator. What differs is how many samples they return per row, and of which
kind: `naive`, `race` and `gumbel` draw independent samples from the softmax over `keys`, the Metropolis-Hastings walks
return states of a chain, and `mm` and `ntxent` none.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

import emc2_kernels as emc2
from emc2_kernels.losses import NTXentLoss

# One batch comes again and again, as no training would have it.
warnings.filterwarnings("ignore", message="index seems to name classes")

DRAWS = 64  # proposals of a step over a bank, of which half are burn-in


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


class ExponentialRace:
    """One exact draw a row: the argmax of the softmax over exponential noise, whose size is that of the scores."""

    samples_per_row = 1

    def __init__(self, queries: Tensor, keys: Tensor, temperature: float, seed: int = 0) -> None:
        """`queries` (n, d), `keys` (m, d)."""
        self.product = MatrixProduct(queries, keys)
        self.temperature = temperature
        self.probabilities = torch.empty_like(self.product.out, dtype=torch.float32)
        self.noise = torch.empty_like(self.probabilities)
        self.generator = torch.Generator(queries.device).manual_seed(seed)

    def __call__(self) -> Tensor:
        """Key positions (n,), int64."""
        scores = self.product().div_(self.temperature)
        torch.softmax(scores, dim=1, dtype=torch.float32, out=self.probabilities)
        return self.probabilities.div_(self.noise.exponential_(generator=self.generator)).argmax(1)


class GumbelDraws:
    """This library: `emc2_kernels.gumbel_sample`, exact draws without the scores in memory."""

    def __init__(self, queries: Tensor, keys: Tensor, temperature: float, samples_per_row: int) -> None:
        """`queries` (n, d), `keys` (m, d)."""
        self.queries, self.keys, self.temperature = queries, keys, temperature
        self.samples_per_row = samples_per_row
        self.step = 0

    def __call__(self) -> Tensor:
        """Key positions (n, samples_per_row), int64."""
        self.step += 1
        options = {"temperature": self.temperature, "num_samples": self.samples_per_row, "seed": 0, "step": self.step}
        return emc2.gumbel_sample(self.queries, self.keys, **options)


class NTXentStep:
    """What a training step without a sampler does with such a batch: NT-Xent of n / 2 pairs, forward and backward."""

    samples_per_row = 0

    def __init__(self, queries: Tensor, temperature: float) -> None:
        """`queries` (n, d): the first half are one view, the second half the other."""
        pairs = queries.shape[0] // 2
        self.views = [rows.clone().requires_grad_() for rows in (queries[:pairs], queries[pairs : 2 * pairs])]
        self.loss = NTXentLoss(temperature=temperature)

    def __call__(self) -> Tensor:
        """() value; the views' gradients are made, too."""
        for view in self.views:
            view.grad = None
        value = self.loss(*self.views)
        value.backward()
        return value


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


class LossStep:
    """Forward and backward of a loss on one batch; the gradient of both embeddings is taken."""

    def __init__(self, loss: nn.Module, z0: Tensor, z1: Tensor, index: Tensor) -> None:
        """`z0`, `z1` (b, d); `index` (b,) on their device."""
        self.loss, self.index = loss, index
        self.z0, self.z1 = (z.detach().clone().requires_grad_() for z in (z0, z1))

    def __call__(self) -> tuple[Tensor, ...]:
        value = self.loss(self.z0, self.z1, self.index)
        return torch.autograd.grad(value, (self.z0, self.z1))


class MHStep:
    """This library: `emc2_kernels.mh_step`, state carried and step advanced from call to call as in training."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        temperature: float,
        burn_in: int,
        num_samples: int,
        backend: str = "auto",
        draws: int | None = None,
        ids: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`queries` (n, d), `keys` (m, d); `num_samples` of the states after burn-in are returned. `draws`: so many
        proposals, uniform over the keys; None: a sweep of all m. `ids`: as `item_ids` makes them; None: none."""
        self.queries, self.keys = queries, keys
        self.options = {
            "temperature": temperature,
            "burn_in": burn_in,
            "num_samples": num_samples,
            "backend": backend,
            "seed": 0,
            **(ids or {}),
        }
        if draws is not None:
            self.options |= {"proposal": "uniform", "num_proposals": draws}
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
    for side in sides:  # in place: ten million keys are gigabytes
        side.div_(side.norm(dim=1, keepdim=True))
    queries, keys = (side.to(dtype) for side in sides)
    return queries, keys


def item_ids(n: int, m: int, device: torch.device) -> dict[str, Tensor]:
    """What a loss tells `mh_step` of n anchors and m keys: chains, items and labels. Row i's own item is key i % m."""
    generator = torch.Generator(device).manual_seed(0)
    items = torch.randperm(10 * max(n, m), generator=generator, device=device)[:m]
    queries = items[torch.arange(n, device=device) % m]
    return {"chain_ids": 2 * queries, "query_ids": queries, "key_ids": items, "key_labels": 2 * items}


Builders = dict[str, Callable[[], Peer]]


def sweep_peers(
    queries: Tensor, keys: Tensor, *, temperature: float, num_samples: int, backend: str, others: Sequence[str] = ()
) -> Builders:
    """Every competitor by name, to be made in its turn. All m keys are proposed, half of them burn-in; `naive` draws
    m/4 a row. `others`: backends that `mh_step` is timed on beside its own."""
    m = keys.shape[0]
    burn_in = m // 2
    returned = min(num_samples, m - burn_in)
    builders: Builders = {"mh_step": lambda: MHStep(queries, keys, temperature, burn_in, returned, backend)}
    for name in others:
        builders[f"mh_step {name}"] = partial(MHStep, queries, keys, temperature, burn_in, returned, name)
    builders |= {
        "mm": lambda: MatrixProduct(queries, keys),
        "naive": lambda: NaiveSoftmax(queries, keys, temperature, max(1, m // 4)),
        "race": lambda: ExponentialRace(queries, keys, temperature),
        "gumbel": lambda: GumbelDraws(queries, keys, temperature, 1),
        "column_loop": lambda: ColumnLoop(queries, keys, temperature, burn_in),
        "lean_loop": lambda: LeanColumnLoop(queries, keys, temperature, burn_in),
        "ntxent": lambda: NTXentStep(queries, temperature),
    }
    if keys.shape[0] != queries.shape[0]:  # it is its own keys
        del builders["ntxent"]
    return builders


def bank_peers(
    queries: Tensor, keys: Tensor, *, temperature: float, num_samples: int, backend: str, others: Sequence[str] = ()
) -> Builders:
    """Those that sample from a fixed bank of keys. `mh_step` draws `DRAWS` of them, half of them burn-in."""
    burn_in = DRAWS // 2
    returned = min(num_samples, DRAWS - burn_in)
    own = (queries, keys, temperature, burn_in, returned)
    return {
        "mh_step": lambda: MHStep(*own, backend, DRAWS),
        **{f"mh_step {name}": partial(MHStep, *own, name, DRAWS) for name in others},
        "mm": lambda: MatrixProduct(queries, keys),
        "naive": lambda: NaiveSoftmax(queries, keys, temperature, returned),
        "race": lambda: ExponentialRace(queries, keys, temperature),
        "gumbel": lambda: GumbelDraws(queries, keys, temperature, returned),
    }


PEERS = {"sweep": sweep_peers, "uniform": bank_peers}
