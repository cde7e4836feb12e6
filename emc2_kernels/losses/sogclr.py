"""SogCLR (arXiv 2202.12387) and iSogCLR (arXiv 2305.11965): each item keeps a running mean of its own denominator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..backends import NAMES
from ..distributed.shards import Shards, gather_views
from ..lse import contrastive_lse, mean_similarity
from ..stores.strict_state import FINITE, outside
from ..stores.table import SlotTable
from .anchors import (
    Anchors,
    batch_stats,
    check,
    compute_dtype,
    confirmed,
    finite_batch,
    of_all_ranks,
    over_ranks,
    reported,
    stack,
)
from .index_watch import IndexWatch
from .recomputation import refuse_recomputation
from .temperature import LEAST, fixed_temperature, warn_of_uniform_weights

TEMPERATURE_LR = 0.01
TEMPERATURE_MOMENTUM = 0.9
TEMPERATURE_RANGE = 10.0  # the bounds' default: from a tenth of `temperature` to ten times it
RHO = 1.0


class Denominators(NamedTuple):
    """What the 2b anchors' weights are made of, detached."""

    has_negatives: Tensor  # (2b,) bool
    log_mean: Tensor  # (2b,) log of the batch's mean of exp(s) over the anchor's negatives; 0 without any
    log_u: Tensor  # (2b,) log of the running mean after its update; 0 without negatives
    weight: Tensor  # (2b,) exp(log_mean - log_u), what the anchor's weights sum to; 0 without negatives


class SogCLRLoss(SlotTable):
    """The global contrastive loss log E exp(s - s+), whose inner mean over the data set is kept for each item.

    At each visit an anchor's running mean follows its batch, u <- (1 - gamma) u + gamma * mean over negatives of
    exp(s), with s = similarity / temperature and gamma = 1 on the item's first visit; its negatives are then weighted
    by exp(s) / u, u detached. All of it is done on log u, so that nothing overflows at temperature = 0.01. The value is
    the mean over the 2b anchors of log u - s+, the running estimate of the loss; its gradient is that of -s+ + sum of
    weight * s / number of negatives. An anchor without negatives (its batch has one item) has value -s+, and leaves its
    state alone.

    Scale: s is divided by the temperature already and nothing is multiplied by it, as in the other losses here. The
    papers minimise F = temperature * log E exp((sim - sim+) / temperature), whose gradient is ``temperature`` times
    ours, and the public code sums the two views where we take their mean: under SGD a learning rate of theirs is
    ours times 1 / (2 * temperature).

    One modality: both views of an item start from its one u, each is weighted with its own updated value, and their
    mean is kept. Two modalities (``bimodal=True``): image rows are contrasted with text keys and text rows with image
    keys, and an item has a u for each direction. The published two-modality version averages exp(s - s+) instead; s+
    cancels from the weights as long as it is the same at each visit, and where it is not, an average of old exp(-s+)
    would be wrong by exp of what s+ has changed since. So here u is of exp(s) in both cases, and -s+ has weight 1
    (there: the sum of the weights, 1 in expectation only).

    ``individual_temperature=True`` is iSogCLR: each item (of each tower) learns its temperature t by minimising F(t) +
    rho * t with dF/dt = log u - s+ - sum of weight * (s - s+) / number, which is the Kullback-Leibler divergence of
    the negatives' weights from uniform ones, negated: t grows where that is above rho and falls where it is below. The
    anchor's value is then multiplied by t / ``temperature``: the objective is F summed over items, as published, over
    one constant, so that items with different temperatures keep the weights that F gives them, and the scale is that
    of the other losses where t = ``temperature``. A step uses the temperatures from before their update; u averages
    exponents at the temperatures of their visits, as published.

    Args:
        num_items: items of the data set; ``index`` names them.
        temperature: in [2^-63, 2^100]; with individual temperatures, that of an item that was not visited yet. It is
            not learnt: the kept means are of exponents at it. individual_temperature=True learns one for each item.
        gamma: in (0, 1], the weight of the present batch in u.
        gamma_schedule: "constant", or "cosine": from 1 to ``gamma`` over the first ``gamma_steps`` training-mode calls
            (the paper: over half of the training).
        gamma_steps: int >= 1, with "cosine" only.
        individual_temperature: learn a temperature for each item. The following need it:
        temperature_lr: >= 0, its step; 0.01 by default.
        temperature_momentum: in [0, 1), weight of the kept gradient in v <- momentum * v + (1 - momentum) * gradient,
            v = 0 at first; 0.9 by default.
        temperature_bounds: (lowest, highest), around ``temperature``; by default a tenth and ten times of it.
        rho: >= 0, in nats; 1 by default.
        bimodal: z0 and z1 are of two modalities.
        gather: "none": means and negatives are the process's own. "all": over the keys of all processes; every process
            writes what all have found, so that the state is the same everywhere. See ``NTXentLoss``.
        process_group: that gather means; None: the default group.
        normalize: L2-normalise the embeddings first, in float32; see ``NTXentLoss``.
        backend: of ``contrastive_lse``.

    Warns:
        UserWarning: a temperature above 10, as for ``NTXentLoss``; and once in training, where it looks as if ``index``
            named classes: batches repeat items more often than by chance, or two epochs have had few different ones.

    State: buffers, in ``state_dict``, with a slot for each item, or with ``bimodal`` for each item * 2 + tower. They
    change in training mode only. Of several rows of a batch with the same item the last one's is kept.

    Example:
        >>> loss = SogCLRLoss(len(dataset), temperature=0.2)
        >>> loss(projector(encoder(x0)), projector(encoder(x1)), index).backward()
    """

    saved_facts = (*SlotTable.saved_facts, "bimodal")
    step: Tensor  # () int64  training-mode calls so far
    log_u: Tensor  # (slots,) float32  -inf: not visited
    item_temperature: Tensor  # (slots,) float32, with individual_temperature
    item_velocity: Tensor  # (slots,) float32, the momentum of its gradient

    def __init__(
        self,
        num_items: int,
        *,
        temperature: float = 0.07,
        gamma: float = 0.9,
        gamma_schedule: str = "constant",
        gamma_steps: int | None = None,
        individual_temperature: bool = False,
        temperature_lr: float | None = None,
        temperature_momentum: float | None = None,
        temperature_bounds: tuple[float, float] | None = None,
        rho: float | None = None,
        bimodal: bool = False,
        gather: str = "none",
        process_group: dist.ProcessGroup | None = None,
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        checks.boolean("bimodal", bimodal)
        super().__init__(num_items, views=2 if bimodal else 1)
        self.bimodal = bimodal
        self.temperature = fixed_temperature(temperature)
        self.gamma = checks.number_in("gamma", gamma, 0, 1, open_low=True)
        checks.one_of("gamma_schedule", gamma_schedule, ("constant", "cosine"))
        self.gamma_schedule, self.gamma_steps = gamma_schedule, _gamma_steps(gamma_schedule, gamma_steps)
        checks.boolean("individual_temperature", individual_temperature)
        checks.one_of("gather", gather, ("none", "all"))
        self.gather, self.process_group = gather, process_group
        checks.boolean("normalize", normalize)
        warn_of_uniform_weights(self.temperature, normalize)
        checks.one_of("backend", backend, NAMES)
        self.individual_temperature, self.normalize, self.backend = individual_temperature, normalize, backend
        self._watch = IndexWatch(num_items)
        self.keep("log_u", -torch.inf, torch.float32)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=self.log_u.device))
        options = {
            "temperature_lr": temperature_lr,
            "temperature_momentum": temperature_momentum,
            "temperature_bounds": temperature_bounds,
            "rho": rho,
        }
        if individual_temperature:
            self._learn_temperatures(**options)
        for name, value in options.items():
            if not individual_temperature and value is not None:
                raise ValueError(f"{name} must be None without individual_temperature=True, got {checks.shown(value)}")

    def _learn_temperatures(
        self,
        temperature_lr: float | None,
        temperature_momentum: float | None,
        temperature_bounds: tuple[float, float] | None,
        rho: float | None,
    ) -> None:
        lr = TEMPERATURE_LR if temperature_lr is None else temperature_lr
        momentum = TEMPERATURE_MOMENTUM if temperature_momentum is None else temperature_momentum
        self.temperature_lr = checks.number_in("temperature_lr", lr, 0, math.inf, open_high=True)
        self.temperature_momentum = checks.number_in("temperature_momentum", momentum, 0, 1, open_high=True)
        self.temperature_bounds = _bounds(temperature_bounds, self.temperature)
        self.rho = checks.number_in("rho", RHO if rho is None else rho, 0, math.inf, open_high=True)
        self.keep("item_temperature", self.temperature, torch.float32)
        self.keep("item_velocity", 0, torch.float32)

    def forward(
        self, z0: Tensor, z1: Tensor, index: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of b pairs; in training mode their running means are updated.

        Args:
            z0, z1: (b, d) embeddings of the two views or modalities, float32, bfloat16 or float16.
            index: (b,) int64 items in [0, num_items), on the CPU or with z0.
            return_stats: also return detached values: ntxent, positive_similarity, negative_similarity (of an anchor's
                negatives, weighted by their softmax in the batch), mean_cosine (over pairs of rows of one view),
                weight_sum (of an anchor's negatives' weights; far from 1, u is stale), and with individual temperatures
                temperature (the batch's mean).

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came; the state is unchanged.
            RuntimeError: training mode inside torch.utils.checkpoint or a backward pass; the same.
        """
        with reported(self, z0):
            self._check(z0, z1, index, return_stats)
            if self.training:
                self._watch.look(index)
        anchors = stack(z0, z1, index, normalize=self.normalize)
        shards = over_ranks(self, z0, index)
        whole, dtype = of_all_ranks(anchors, shards), compute_dtype(z0)
        slots = self.slots(anchors.items, anchors.views if self.bimodal else 0, z0.device)
        temperature = self.item_temperature[slots] if self.individual_temperature else self.temperature
        lse = self._over_negatives(anchors, whole, dtype, temperature)
        found = self._denominators(anchors, whole, slots, lse.detach())
        positive = (anchors.embeddings * anchors.positives).sum(1) / temperature
        # Of value log u, and with the gradient of weight * lse: lse's gradient is the mean score's under the softmax.
        negative = found.log_u + found.weight * torch.where(found.has_negatives, lse - lse.detach(), 0)
        loss = ((negative - positive) * (temperature / self.temperature)).mean()
        loss = loss if shards is None else loss * shards.ddp_factor
        with confirmed(self, z0):
            if not self.normalize:  # unit vectors cannot overflow
                checks.finite("the similarities of z0 and z1", loss.detach())
        learns = self.training and self.individual_temperature
        scores = None
        if learns or return_stats:  # the mean s of each anchor's negatives under their softmax
            scores = self._over_negatives(anchors, whole, dtype, temperature, lse.detach()) / temperature
        stats = self._stats(anchors, found, temperature, scores) if return_stats else None
        if self.training:
            with torch.no_grad():
                self._remember(slots, found, positive, scores, whole, shards)
        return loss if stats is None else (loss, stats)

    def _check(self, z0: Tensor, z1: Tensor, index: Tensor, return_stats: bool) -> None:
        refuse_recomputation(self)
        checks.boolean("return_stats", return_stats)
        if index is None:
            raise TypeError("index must be an int64 tensor of the batch's items, got None")
        check(z0, z1, index, dim=None, num_items=self.num_items)
        if self.log_u.device != z0.device:
            expected = f"on {self.log_u.device}, where the loss keeps its state"
            raise ValueError(f"z0 must be {expected}, got {checks.describe(z0)}")

    def _over_negatives(
        self,
        anchors: Anchors,
        whole: Anchors,
        dtype: torch.dtype,
        temperature: float | Tensor,
        lse: Tensor | None = None,
    ) -> Tensor:
        """(2b,) log sum of exp(s) over each anchor's negatives, among the anchors of all ranks; -inf without any.

        Given that, ``lse``: the mean of their similarities under their softmax, detached; 0 without any.
        """
        queries, keys = anchors.embeddings.to(dtype), whole.embeddings.to(dtype)
        if whole is anchors:
            keys = queries
        if not self.bimodal:
            return self._reduce(queries, keys, anchors.items, whole.items, temperature, lse)
        temperatures = temperature.chunk(2) if isinstance(temperature, Tensor) else (temperature, temperature)
        sums = (None, None) if lse is None else lse.chunk(2)
        query_ids, key_ids = anchors.items.chunk(2)[0], whole.items.chunk(2)[0]
        queries, keys = queries.chunk(2), keys.chunk(2)[::-1]
        sides = zip(queries, keys, temperatures, sums, strict=True)
        return torch.cat([self._reduce(q, k, query_ids, key_ids, t, of_side) for q, k, t, of_side in sides])

    def _reduce(
        self,
        queries: Tensor,
        keys: Tensor,
        query_ids: Tensor,
        key_ids: Tensor,
        temperature: float | Tensor,
        lse: Tensor | None,
    ) -> Tensor:
        """The same for queries and keys, where those of a query's item are no negatives."""
        options = {"temperature": temperature, "query_ids": query_ids, "key_ids": key_ids, "backend": self.backend}
        if lse is None:
            return contrastive_lse(queries, keys, **options)
        return mean_similarity(lse, queries, keys, **options)

    def _denominators(self, anchors: Anchors, whole: Anchors, slots: Tensor, lse: Tensor) -> Denominators:
        keys = whole.items.shape[0] // (2 if self.bimodal else 1)
        ordered = whole.items[:keys].sort().values
        own = torch.searchsorted(ordered, anchors.items, right=True) - torch.searchsorted(ordered, anchors.items)
        has_negatives = own < keys
        log_mean = torch.where(has_negatives, lse - (keys - own).to(lse.dtype).log(), 0)
        before, gamma = self.log_u[slots].to(lse.dtype), self._gamma().to(lse.dtype)
        follow = torch.logaddexp(before + (1 - gamma).log(), log_mean + gamma.log())
        log_u = torch.where(before == -torch.inf, log_mean, follow)
        weight = torch.where(has_negatives, (log_mean - log_u).exp(), 0)
        return Denominators(has_negatives, log_mean, torch.where(has_negatives, log_u, 0), weight)

    def _gamma(self) -> Tensor:
        """() float64, on the device, which is not waited for."""
        gamma = torch.full((), self.gamma, dtype=torch.float64, device=self.step.device)
        if self.gamma_schedule == "constant":
            return gamma
        progress = (self.step.double() / self.gamma_steps).clamp_max(1)
        return gamma + (1 - gamma) * (1 + (math.pi * progress).cos()) / 2

    def _remember(
        self,
        slots: Tensor,
        found: Denominators,
        positive: Tensor,
        scores: Tensor | None,
        whole: Anchors,
        shards: Shards | None,
    ) -> None:
        """Writes the anchors' updated state; one modality keeps the mean of an item's two views."""
        rows = slots if self.bimodal else slots[: slots.shape[0] // 2]

        def of_rows(values: Tensor) -> Tensor:
            return values if self.bimodal else values.view(2, -1).mean(0)

        log_u = found.log_u if self.bimodal else found.log_u.view(2, -1).logsumexp(0) - math.log(2)
        values = {"log_u": log_u}
        if self.individual_temperature:
            slope = found.log_u - positive + self.rho - found.weight * (scores - positive)
            kept = self.item_velocity[rows]
            velocity = self.temperature_momentum * kept + (1 - self.temperature_momentum) * of_rows(slope)
            moved = (self.item_temperature[rows] - self.temperature_lr * velocity).clamp(*self.temperature_bounds)
            values |= {"item_velocity": velocity, "item_temperature": moved}
        updates, finite = found.has_negatives[: rows.shape[0]], finite_batch(whole, self.temperature)
        if shards is not None:
            rows, updates = gather_views(rows, shards), gather_views(updates, shards)
            values = {name: gather_views(value, shards) for name, value in values.items()}
        self.put(rows, only=updates if finite is None else updates & finite, **values)
        self.step.add_(1 if finite is None else finite)

    def _stats(
        self, anchors: Anchors, found: Denominators, temperature: float | Tensor, scores: Tensor
    ) -> dict[str, Tensor]:
        options = {"bimodal": True} if self.bimodal else {}
        anchors_with = found.has_negatives.sum().clamp_min(1)
        stats = batch_stats(anchors, self.temperature, **options) | {
            "negative_similarity": (scores * temperature).sum() / anchors_with,
            "weight_sum": found.weight.sum() / anchors_with,
        }
        return stats | {"temperature": temperature.mean()} if self.individual_temperature else stats

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        bounds = {
            "log_u": (-math.inf, FINITE[1]),
            "item_temperature": (checks.MIN_TEMPERATURE, checks.MAX_TEMPERATURE),
            "item_velocity": FINITE,
        }
        for name, table in tables.items():
            yield from outside(prefix + name, table, *bounds[name])

    def extra_repr(self) -> str:
        gamma = f"gamma={self.gamma}, gamma_schedule={self.gamma_schedule!r}, gamma_steps={self.gamma_steps}"
        learned = ""
        if self.individual_temperature:
            learned = (
                f", temperature_lr={self.temperature_lr}, temperature_momentum={self.temperature_momentum}, "
                f"temperature_bounds={self.temperature_bounds}, rho={self.rho}"
            )
        return f"num_items={self.num_items}, temperature={self.temperature}, {gamma}, bimodal={self.bimodal}{learned}"


def _gamma_steps(schedule: str, steps: int | None) -> int | None:
    if schedule == "cosine":
        return checks.at_least("gamma_steps", steps, 1)
    if steps is not None:
        raise ValueError(f'gamma_steps must be None with gamma_schedule="constant", got {checks.shown(steps)}')
    return None


def _bounds(bounds: tuple[float, float] | None, temperature: float) -> tuple[float, float]:
    if bounds is None:
        low = max(temperature / TEMPERATURE_RANGE, LEAST)
        return low, min(temperature * TEMPERATURE_RANGE, checks.MAX_TEMPERATURE)
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"temperature_bounds must be two numbers, got {checks.describe(bounds)}")
    low = checks.number_in("temperature_bounds[0]", bounds[0], LEAST, temperature)
    return low, checks.number_in("temperature_bounds[1]", bounds[1], temperature, checks.MAX_TEMPERATURE)
