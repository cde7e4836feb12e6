"""What losses with sampled negatives share: the mean negative of each anchor, from samples inside and outside the
batch, and the surrogate whose gradient is the estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..backends import NAMES
from ..distributed.keys import Keys, LocalKeys
from ..distributed.shards import Shards
from ..stores.bank import EmbeddingBank
from ..stores.strict_state import StrictState
from .anchors import Anchors, unit
from .correction import BatchMeans, correction
from .in_batch import batch_stats
from .index_watch import IndexWatch
from .temperature import fixed_temperature
from .typed_call import CalledWithIndex

Encode = Callable[[Tensor, Tensor], Tensor]


class Samples(NamedTuple):
    """The anchors' negatives as weighted means: the weights of an anchor sum to 1, or to 0 if it has no sample."""

    inside: Tensor  # (2b, d) weighted sum of those that are keys of the batch, which have a gradient
    labels: Tensor  # (2b, S) int64 of the others
    weights: Tensor  # (2b, S) float of the others; 0 where ``labels`` means nothing
    kept: Tensor | None = None  # (2b, S, d) what the bank has for them; None: it has not been asked


def samples_by_label(labels: Tensor, keys: LocalKeys) -> Samples:
    """Samples (2b, S) given by label, -1: none; from the batch where it has them."""
    counted = labels >= 0
    weights = counted / counted.sum(1, keepdim=True).clamp_min(1).to(keys.embeddings.dtype)
    rows = rows_with_labels(keys.labels, labels)
    inside = rows >= 0
    # A bag wants legal indices: one that means nothing points at row 0 with weight 0.
    return Samples(keys.bag(rows.clamp_min(0), weights * inside), labels, weights * ~inside)


def rows_with_labels(labels: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted label, of any shape, stands in labels (k,): of duplicates the last, as a bank keeps it; -1:
    nowhere."""
    ordered, order = labels.sort(stable=True)
    after = torch.searchsorted(ordered, wanted.contiguous(), right=True) - 1
    place = after.clamp_min(0)
    return torch.where((after >= 0) & (ordered[place] == wanted), order[place], -1)


def check_encode(encode: Any, carry: str) -> None:
    if encode is not None and not callable(encode):
        raise TypeError(f"encode must be a function, got {checks.describe(encode)}")
    if encode is None and carry == "recompute":
        raise ValueError('encode must be given with carry="recompute", got None')


def encoded(encode: Encode, labels: Tensor, like: Tensor, normalize: bool) -> Tensor:
    """(k, dim) embeddings of distinct labels (k,) = item * 2 + view, as anchors are kept: of ``like``'s dim, device and
    dtype, of unit length where asked to.

    Raises:
        ValueError, TypeError: the result is not (k, dim) finite floats on that device.
    """
    result = encode(labels // 2, labels % 2)
    checks.tensor("encode's result", result)
    checks.operand_dtype("encode's result", result)
    if result.shape != (labels.shape[0], like.shape[1]) or result.device != like.device:
        expected = f"shape ({labels.shape[0]}, {like.shape[1]}) on {like.device}"
        raise ValueError(f"encode's result must have {expected}, got {checks.describe(result)}")
    checks.finite("encode's result", result.detach())
    return unit(result, normalize).to(like.dtype)


def mean_negative(samples: Samples, bank: EmbeddingBank, encode: Encode | None, normalize: bool) -> Tensor:
    """(2b, d), differentiable in the batch's keys; zeros for an anchor without samples.

    Args:
        encode: makes what is outside the batch, each distinct sample once, with gradient; on a GPU this waits to know
            which. None: the bank gives it, without.
    """
    mean, weights = samples.inside, samples.weights.to(samples.inside.dtype)
    if encode is None:
        if samples.kept is not None:
            kept = samples.kept.to(mean.dtype)
        else:  # in their own dtype they would take memory beside this
            labels = torch.where(weights > 0, samples.labels, -1).flatten()
            kept = bank.read(labels)[1].to(mean.dtype).view(*weights.shape, -1)
        return mean + (weights[..., None] * kept).sum(1)  # no product for autocast to round
    anchor, sample = weights.nonzero(as_tuple=True)
    if len(anchor) == 0:
        return mean
    distinct, inverse = samples.labels[anchor, sample].unique(return_inverse=True)
    again = encoded(encode, distinct, mean, normalize)[inverse]
    return mean.index_add(0, anchor, weights[anchor, sample, None] * again)


class SampledLoss(CalledWithIndex, StrictState):
    """A surrogate whose *gradient* is the estimate: mean over the 2b anchors of -<q, k+>/temperature + mean over
    samples of <q, k>/temperature. A subclass draws the samples.

    ``carry`` says what stands for a sample outside the batch: "cached": its latest embedding from the bank, detached;
    "corrected": that, its drift and the lost side estimated from the keys of the batch (correction.py); "recompute":
    encoded again.
    """

    saved_facts = ("bimodal",)
    step: Tensor  # () int64  training-mode calls so far

    def __init__(
        self,
        num_items: int,
        dim: int,
        *,
        temperature: float,
        carry: str,
        encode: Encode | None,
        gather: str,
        process_group: dist.ProcessGroup | None,
        seed: int,
        bimodal: bool,
        normalize: bool,
        bank_dtype: torch.dtype,
        backend: str,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = fixed_temperature(temperature)
        checks.one_of("backend", backend, NAMES)
        checks.boolean("normalize", normalize)
        checks.boolean("bimodal", bimodal)
        checks.embedding_dtype("bank_dtype", bank_dtype)
        check_encode(encode, carry)
        self.gather, self.process_group = gather, process_group
        self.carry, self.bimodal, self.normalize, self.backend = carry, bimodal, normalize, backend
        object.__setattr__(self, "encode", encode)  # past nn.Module: an encoder given here is not a part of the loss
        self.seed = checks.counter("seed", checks.integer("seed", seed), 64, torch.device("cpu"))
        self.bank = EmbeddingBank(
            num_items, dim, views=2, dtype=bank_dtype, process_group=process_group, sharded=sharded
        )
        self.num_items, self.dim, self.bank_dtype = num_items, dim, bank_dtype
        if carry == "corrected":
            self.batch_means = BatchMeans(num_items, dim, bank_dtype)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=self.bank.embeddings.device))
        self._watch = IndexWatch(num_items)

    def _surrogate(
        self, anchors: Anchors, keys: Keys, samples: Samples, shards: Shards | None
    ) -> tuple[Tensor, Tensor]:
        """The value, and the mean negative (2b, d) of each anchor, detached."""
        again = self.encode if self.carry == "recompute" else None
        negatives = mean_negative(samples, self.bank, again, self.normalize)
        view_0, view_1 = anchors.embeddings.chunk(2)
        total = torch.sub((anchors.embeddings * negatives).sum(), (view_0 * view_1).sum(), alpha=2)
        if self.carry == "corrected":
            options = self.batch_means, self.temperature, self.bimodal
            total = total + correction(anchors, keys, samples.labels, samples.weights, *options).sum()
        loss = total * ((1 if shards is None else shards.ddp_factor) / (len(negatives) * self.temperature))
        return self._checked(loss), negatives.detach()

    def _checked(self, loss: Tensor) -> Tensor:
        if not self.normalize:  # unit vectors cannot overflow
            checks.finite("the similarities of z0 and z1", loss.detach())
        return loss

    def _stats(self, anchors: Anchors, negative_similarity: Tensor) -> dict[str, Tensor]:
        """Of every loss of this kind.

        Args:
            negative_similarity: (2b,) of each anchor and its mean negative.
        """
        stats = batch_stats(anchors, self.temperature, bimodal=self.bimodal)
        return stats | {"negative_similarity": negative_similarity.mean()}
