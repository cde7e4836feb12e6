"""SogCLR (arXiv 2202.12387) and iSogCLR (arXiv 2305.11965): each item keeps a running mean of its own denominator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..backends import NAMES
from ..distributed.keys import Keys
from ..distributed.shards import Shards, gather_views
from ..stores.strict_state import FINITE, range_errors
from ..stores.table import SlotTable
from .anchors import Anchors, check_call, compute_dtype, finite_batch
from .in_batch import Contrast, Form, batch_stats, contrast
from .index_watch import IndexWatch
from .ranks import batch_keys, batch_shards, confirm_on_all, report_errors
from .temperature import LEAST, fixed_temperature, warn_uniform_weights
from .typed_call import CalledWithIndex

TEMPERATURE_RANGE = 10.0  # the bounds' default: from a tenth of `temperature` to ten times it


class Denominators(NamedTuple):
    """What the 2b anchors' weights are made of, detached."""

    has_negatives: Tensor | None  # (2b,) bool; None: all have
    log_u: Tensor  # (2b,) log of the running mean after its update; 0 without negatives
    weight: Tensor  # (2b,) what its weights sum to: the batch's mean of exp(s) over u; 0 without negatives


class SogCLRLoss(CalledWithIndex, SlotTable):
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

    What it keeps is in ``state_dict``, a slot for each item, or with ``bimodal`` for each item * 2 + tower, and changes
    in training mode only. Of several rows of a batch with the same item the last one's is kept.

    Args:
        num_items: items of the data set; ``index`` names them.
        temperature: in [2^-63, 2^100]. It is not learnt, since the kept means are of exponents at it; ``ISogCLRLoss``
            learns one for each item.
        gamma: in (0, 1], the weight of the present batch in u.
        gamma_schedule: "constant", or "cosine": from 1 to ``gamma`` over the first ``gamma_steps`` training-mode calls
            (the paper: over half of the training).
        gamma_steps: int >= 1, with "cosine" only.
        individual_temperature: True makes an ``ISogCLRLoss``, as 0.1.0 spelt it.
        bimodal: z0 and z1 are of two modalities.
        gather: "none": means and negatives are the process's own. "all": over the keys of all processes; every process
            writes what all have found, so that the state is the same everywhere. See ``NTXentLoss``.
        process_group: that gather means; None: the default group.
        normalize: L2-normalise the embeddings first, in float32; see ``NTXentLoss``.
        backend: of ``contrastive_lse``.

    Warns:
        UserWarning: a temperature above 10, as for ``NTXentLoss``; and once in training, where it looks as if ``index``
            named classes: batches repeat items more often than by chance, or two epochs have had few different ones.

    Examples:
        >>> loss = SogCLRLoss(len(dataset), temperature=0.2)
        >>> loss(projector(encoder(x0)), projector(encoder(x1)), index).backward()

    Attributes:
        step: () int64, training-mode calls so far.
        log_u: (slots,) float32, log of each running mean; -inf: not visited.
    """

    saved_facts = (*SlotTable.saved_facts, "bimodal")
    step: Tensor
    log_u: Tensor

    def __new__(cls, *arguments: Any, individual_temperature: bool = False, **options: Any) -> SogCLRLoss:
        """``SogCLRLoss(individual_temperature=True)``, as 0.1.0 spelt it, is an ``ISogCLRLoss``."""
        checks.boolean("individual_temperature", individual_temperature)
        return super().__new__(ISogCLRLoss if individual_temperature and cls is SogCLRLoss else cls)

    def __init__(
        self,
        num_items: int,
        *,
        temperature: float = 0.07,
        gamma: float = 0.9,
        gamma_schedule: str = "constant",
        gamma_steps: int | None = None,
        individual_temperature: bool = False,
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
        checks.one_of("gather", gather, ("none", "all"))
        self.gather, self.process_group = gather, process_group
        checks.boolean("normalize", normalize)
        checks.one_of("backend", backend, NAMES)
        learns = isinstance(self, ISogCLRLoss)
        if individual_temperature != learns:
            raise ValueError(f"individual_temperature must be {learns} in {type(self).__name__}, got {not learns}")
        self.individual_temperature, self.normalize, self.backend = individual_temperature, normalize, backend
        warn_uniform_weights(self.temperature, normalize, 3 if type(self) is SogCLRLoss else 4)
        self._watch = IndexWatch(num_items)
        self.keep("log_u", -torch.inf, torch.float32)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=self.log_u.device))

    def forward(
        self, z0: Tensor, z1: Tensor, index: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of b pairs; in training mode their running means are updated.

        Args:
            z0: (b, d) embeddings of view (or modality) 0, float32, bfloat16 or float16.
            z1: (b, d) of view 1, likewise.
            index: (b,) int64 items in [0, num_items), on the CPU or with z0.
            return_stats: also return detached values: ntxent, positive_similarity, negative_similarity (of an anchor's
                negatives, weighted by their softmax in the batch), mean_cosine (over pairs of rows of one view),
                weight_sum (of an anchor's negatives' weights; far from 1, u is stale).

        Returns:
            The value, 0-d; with return_stats=True a pair of it and a dict of 0-d tensors.

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came; the state is unchanged.
            RuntimeError: training mode inside torch.utils.checkpoint or a backward pass; the same.
        """
        with report_errors(self, z0):
            index, repeats = check_call(self, z0, z1, index, return_stats, dim=None, state=(self.log_u,))
            anchors = Anchors.of(z0, z1, index, self.normalize, repeats)
        shards = batch_shards(self, z0, index)
        keys = None if shards is None else batch_keys(anchors, shards, self.gather)
        slots = anchors.labels if self.bimodal else anchors.items
        temperature = self._temperatures(slots)
        of = contrast(anchors, temperature, Form(self.bimodal, compute_dtype(z0), self.backend), keys)
        found = self._denominators(of, keys, slots)
        # Of value log u, and with the gradient of weight * lse: lse's gradient is the mean score's under the softmax.
        scale = temperature / self.temperature * (1 if shards is None else shards.ddp_factor)
        value = ((found.log_u - of.positive) * scale).mean()
        share = torch.full_like(of.positive, 1 / len(of.positive)) * scale
        loss = of.attach_gradient(value, found.weight * share, -share)
        with confirm_on_all(self, z0):
            if not self.normalize:  # unit vectors cannot overflow
                checks.finite("the similarities of z0 and z1", loss.detach())
        # The mean s of each anchor's negatives under their softmax.
        learns = self.training and self.individual_temperature
        scores = of.negative_similarity() / temperature if learns or return_stats else None
        stats = self._stats(of, found, scores) if return_stats else None
        if self.training:
            self._update(of, found, scores, slots, keys, shards)
        return loss if stats is None else (loss, stats)

    def _temperatures(self, slots: Tensor) -> float | Tensor:
        """Of the anchors with these slots (2b,)."""
        return self.temperature

    def _count_negatives(self, anchors: Anchors, keys: Keys | None) -> int | Tensor:
        """Of each anchor (2b,); a number where all are known to have as many, and some."""
        rows = len(anchors.items)
        if anchors.distinct and keys is None and rows > 2:
            return rows // 2 - 1 if self.bimodal else rows - 2
        items = anchors.items if keys is None else keys.items
        ordered = items[: items.shape[0] // (2 if self.bimodal else 1)].sort().values
        own = torch.searchsorted(ordered, anchors.items, right=True) - torch.searchsorted(ordered, anchors.items)
        return len(ordered) - own

    def _denominators(self, of: Contrast, keys: Keys | None, slots: Tensor) -> Denominators:
        number, dtype = self._count_negatives(of.anchors, keys), of.lse.dtype
        (kept,), (log_gamma, log_rest) = self.rows(slots, "log_u"), self._log_gammas(dtype)
        before = kept.to(dtype)
        if isinstance(number, int):
            log_mean = of.lse - math.log(number)
        else:
            log_mean = torch.where(number > 0, of.lse - number.to(dtype).log(), 0)
        log_u = torch.where(before == -torch.inf, log_mean, torch.logaddexp(before + log_rest, log_mean + log_gamma))
        weight = (log_mean - log_u).exp()
        if isinstance(number, int):
            return Denominators(None, log_u, weight)
        return Denominators(number > 0, torch.where(number > 0, log_u, 0), torch.where(number > 0, weight, 0))

    def _log_gammas(self, dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
        """Of the weight of the present batch, and of the rest's. With a schedule they are on the device, which is not
        waited for."""
        if self.gamma_schedule == "constant":
            return math.log(self.gamma), math.log(1 - self.gamma) if self.gamma < 1 else -math.inf
        progress = (self.step.double() / self.gamma_steps).clamp_max(1)
        gamma = self.gamma + (1 - self.gamma) * (1 + (math.pi * progress).cos()) / 2
        return gamma.log().to(dtype), (1 - gamma).log().to(dtype)

    @torch.no_grad()
    def _update(
        self,
        of: Contrast,
        found: Denominators,
        scores: Tensor | None,
        slots: Tensor,
        keys: Keys | None,
        shards: Shards | None,
    ) -> None:
        """Writes the anchors' updated state; one modality keeps the mean of an item's two views."""
        rows = slots if self.bimodal else slots[: slots.shape[0] // 2]
        log_u = found.log_u if self.bimodal else found.log_u.view(2, -1).logsumexp(0) - math.log(2)
        values = {"log_u": log_u, **self._learnt(of, found, scores, rows)}
        updates = found.has_negatives
        updates = None if updates is None else updates[: rows.shape[0]]
        finite = finite_batch(of.anchors.embeddings if keys is None else keys.embeddings, self.temperature)
        if shards is not None:
            rows, updates = gather_views(rows, shards), gather_views(updates, shards)
            values = {name: gather_views(value, shards) for name, value in values.items()}
        if finite is not None:
            updates = finite if updates is None else updates & finite
        self.put(rows, only=updates, distinct=of.anchors.distinct and shards is None, **values)
        self.step.add_(1 if finite is None else finite)

    def _learnt(self, of: Contrast, found: Denominators, scores: Tensor | None, rows: Tensor) -> dict[str, Tensor]:
        """What else is kept of the slots ``rows``, by name."""
        return {}

    def _stats(self, of: Contrast, found: Denominators, scores: Tensor) -> dict[str, Tensor]:
        counted = found.has_negatives
        anchors_with = len(scores) if counted is None else counted.sum().clamp_min(1)
        return batch_stats(of.anchors, self.temperature, bimodal=self.bimodal) | {
            "negative_similarity": (scores * of.temperature).sum() / anchors_with,
            "weight_sum": found.weight.sum() / anchors_with,
        }

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        bounds = {
            "log_u": (-math.inf, FINITE[1]),
            "item_temperature": (checks.MIN_TEMPERATURE, checks.MAX_TEMPERATURE),
            "item_velocity": FINITE,
        }
        for name, table in tables.items():
            yield from range_errors(prefix + name, table, *bounds[name])

    def extra_repr(self) -> str:
        gamma = f"gamma={self.gamma}, gamma_schedule={self.gamma_schedule!r}, gamma_steps={self.gamma_steps}"
        return f"num_items={self.num_items}, temperature={self.temperature}, {gamma}, bimodal={self.bimodal}"


class ISogCLRLoss(SogCLRLoss):
    """SogCLR with a temperature for each item (iSogCLR, arXiv 2305.11965).

    Each item (of each tower) learns its temperature t by minimising F(t) + rho * t with dF/dt = log u - s+ - sum of
    weight * (s - s+) / number, which is the Kullback-Leibler divergence of the negatives' weights from uniform ones,
    negated: t grows where that is above rho and falls where it is below. The anchor's value is then multiplied by t /
    ``temperature``: the objective is F summed over items, as published, over one constant, so that items with different
    temperatures keep the weights that F gives them, and the scale is that of the other losses where t =
    ``temperature``. A step uses the temperatures from before their update; u averages exponents at the temperatures of
    their visits, as published. The statistics also have temperature, the batch's mean.

    Args:
        num_items: items of the data set; ``index`` names them.
        temperature: that of an item that was not visited yet.
        gamma: in (0, 1], the weight of the present batch in u.
        gamma_schedule: "constant" or "cosine"; see ``SogCLRLoss``.
        gamma_steps: int >= 1, with "cosine" only.
        individual_temperature: True, the one value here.
        temperature_lr: >= 0, its step; None: 0.01.
        temperature_momentum: in [0, 1), weight of the kept gradient in v <- momentum * v + (1 - momentum) * gradient,
            v = 0 at first; None: 0.9.
        temperature_bounds: (lowest, highest), around ``temperature``; None: a tenth and ten times of it.
        rho: >= 0, in nats; None: 1.
        bimodal: z0 and z1 are of two modalities.
        gather: "none" or "all"; see ``SogCLRLoss``.
        process_group: that gather means; None: the default group.
        normalize: L2-normalise the embeddings first, in float32; see ``NTXentLoss``.
        backend: of ``contrastive_lse``.

    Attributes:
        item_temperature: (slots,) float32.
        item_velocity: (slots,) float32, the momentum of its gradient.
    """

    item_temperature: Tensor
    item_velocity: Tensor

    def __init__(
        self,
        num_items: int,
        *,
        temperature: float = 0.07,
        gamma: float = 0.9,
        gamma_schedule: str = "constant",
        gamma_steps: int | None = None,
        individual_temperature: bool = True,
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
        super().__init__(
            num_items, temperature=temperature, gamma=gamma, gamma_schedule=gamma_schedule, gamma_steps=gamma_steps,
            individual_temperature=individual_temperature, bimodal=bimodal, gather=gather, process_group=process_group,
            normalize=normalize, backend=backend,
        )  # fmt: skip
        lr = 0.01 if temperature_lr is None else temperature_lr
        momentum = 0.9 if temperature_momentum is None else temperature_momentum
        self.temperature_lr = checks.number_in("temperature_lr", lr, 0, math.inf, open_high=True)
        self.temperature_momentum = checks.number_in("temperature_momentum", momentum, 0, 1, open_high=True)
        self.temperature_bounds = _bounds(temperature_bounds, self.temperature)
        self.rho = checks.number_in("rho", 1.0 if rho is None else rho, 0, math.inf, open_high=True)
        self.keep("item_temperature", self.temperature, torch.float32)
        self.keep("item_velocity", 0, torch.float32)

    def _temperatures(self, slots: Tensor) -> Tensor:
        return self.item_temperature[slots]

    def _learnt(self, of: Contrast, found: Denominators, scores: Tensor | None, rows: Tensor) -> dict[str, Tensor]:
        slope = found.log_u - of.positive + self.rho - found.weight * (scores - of.positive)
        slope = slope if self.bimodal else slope.view(2, -1).mean(0)
        velocity = self.temperature_momentum * self.item_velocity[rows] + (1 - self.temperature_momentum) * slope
        moved = (self.item_temperature[rows] - self.temperature_lr * velocity).clamp(*self.temperature_bounds)
        return {"item_velocity": velocity, "item_temperature": moved}

    def _stats(self, of: Contrast, found: Denominators, scores: Tensor) -> dict[str, Tensor]:
        return super()._stats(of, found, scores) | {"temperature": of.temperature.mean()}

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, temperature_lr={self.temperature_lr}, "
            f"temperature_momentum={self.temperature_momentum}, temperature_bounds={self.temperature_bounds}, "
            f"rho={self.rho}"
        )


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
