"""The negative cache: negatives drawn exactly from the softmax over kept embeddings (Lindgren, Reddi, Guo, Kumar,
"Efficient Training of Retrieval Models using Negative Cache", NeurIPS 2021; the third baseline of arXiv 2404.10575)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks, ops
from ..backends.params import DrawParams, ScoreParams
from ..distributed.keys import LocalKeys
from ..distributed.shards import Shards, gather_rows
from .anchors import Anchors, check_call, finite_batch
from .ranks import batch_keys, batch_shards, confirm_on_all, report_errors
from .sampled import Encode, SampledLoss, encoded, samples_by_label
from .temperature import warn_uniform_weights

DEFAULT_REFRESH = 0.01


class CachedSoftmaxLoss(SampledLoss):
    """The gradient of the global contrastive loss, with negatives drawn from a cache of the whole data set.

    The cache is an ``EmbeddingBank``: each view's latest embedding. A training-mode forward pass brings it up to date
    and then draws from it: (a) the batch's own embeddings are written; (b) with ``encode``, the oldest entries are
    encoded again, never written ones first; (c) each of the 2b anchors draws ``num_samples`` keys, exactly, from its
    softmax over the cache without its own item. Drawing last means that a key of the batch is drawn by the embedding
    that its gradient goes to, and that the first step has negatives. In eval mode nothing is written, and the draws are
    made from the cache as it stands.

    The value is a surrogate whose *gradient* is the estimate, on ``EMC2Loss``'s scale: mean over the anchors of -s+ +
    mean of s over the samples, ``s = <q, k> / temperature``. Watch the ``ntxent`` statistic instead. Its bias is the
    cache's age: what is drawn was a good negative when it was written. An anchor without any key has no negative term.

    What it keeps is in ``state_dict``, and changes in training mode only: ``bank``, ``step``, and with
    carry="corrected" ``batch_means``.

    Args:
        num_items: items of the data set; ``index`` names them; below 2^30.
        dim: of the embeddings.
        temperature: in [2^-63, 2^100]. Not learnt: the value is a surrogate, whose derivative in the temperature is not
            the loss's.
        refresh: share of the cache's 2 * num_items entries that are encoded again at each step, rounded up; needs
            ``encode``. Without it the batches alone refresh the cache, and refresh must be 0 or left alone.
        num_samples: R, negatives of an anchor.
        carry: where a sample is not in the batch, "corrected" (which "auto" stands for) takes the cache's embedding,
            with its drift and the lost key's side of the gradient estimated from the keys of the batch
            (losses/correction.py); "recompute" encodes it again, each distinct one once, with gradient, and waits for a
            GPU to know which. A sample that is in the batch is the batch's embedding, with gradient.
        encode: encode(items (k,), views (k,)) -> (k, dim) embeddings, as the loss takes them. To refresh it is called
            without gradient, in whatever mode the encoder is in.
        gather: "none": the cache is the process's own. "all": every process writes what all have, so that the cache is
            the same on all, and encodes its share of what is encoded again. See ``NTXentLoss``.
        process_group: that gather means; None: the default group.
        seed: of the draws.
        bimodal: the two views are two modalities: view 0 draws among entries of view 1, and view 1 among those of
            view 0.
        normalize: L2-normalise the embeddings first, in float32; see ``NTXentLoss``.
        bank_dtype: of the cache. The anchors are rounded to it for the draw.
        backend: of ``gumbel_sample``.

    Warns:
        UserWarning: a temperature above 10, as for ``NTXentLoss``; and once in training, where it looks as if ``index``
            named classes: batches repeat items more often than by chance, or two epochs have had few different ones.

    Examples:
        >>> loss = CachedSoftmaxLoss(len(dataset), 128, temperature=0.2, encode=encode_items)
        >>> loss(projector(encoder(x0)), projector(encoder(x1)), index).backward()
    """

    def __init__(
        self,
        num_items: int,
        dim: int,
        *,
        temperature: float = 0.07,
        refresh: float = DEFAULT_REFRESH,
        num_samples: int = 16,
        carry: str = "auto",
        encode: Encode | None = None,
        seed: int = 0,
        bimodal: bool = False,
        gather: str = "none",
        process_group: dist.ProcessGroup | None = None,
        normalize: bool = True,
        bank_dtype: torch.dtype = torch.bfloat16,
        backend: str = "auto",
    ) -> None:
        checks.number_in("refresh", refresh, 0, 1)
        checks.one_of("gather", gather, ("none", "all"))
        self.num_samples = checks.at_least("num_samples", num_samples, 1)
        DrawParams(None, 0, 0, num_samples).check_num_samples()
        if checks.at_least("num_items", num_items, 1) * 2 >= checks.MAX_POSITION:
            raise ValueError(f"num_items must be below 2^30, so that a key's position is an int32, got {num_items}")
        super().__init__(
            num_items, dim, temperature=temperature, carry=_resolved_carry(carry), encode=encode, gather=gather,
            process_group=process_group, seed=seed, bimodal=bimodal, normalize=normalize, bank_dtype=bank_dtype,
            backend=backend,
        )  # fmt: skip
        warn_uniform_weights(self.temperature, normalize)
        if encode is None and refresh not in (0, DEFAULT_REFRESH):
            raise ValueError(f"refresh must be 0 without encode, which makes the new embeddings, got {refresh}")
        self.refresh = refresh
        self.refresh_count = 0 if encode is None else math.ceil(refresh * self.bank.num_slots)

    def forward(
        self, z0: Tensor, z1: Tensor, index: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The gradient surrogate of b pairs; in training mode the cache is brought up to date.

        Args:
            z0: (b, dim) embeddings of view 0, float32, bfloat16 or float16.
            z1: (b, dim) of view 1, likewise.
            index: (b,) int64 items in [0, num_items), on the CPU or with z0.
            return_stats: also return detached values: cache_age (mean, in steps, of the entries drawn), carry_share
                (of samples outside the batch), ntxent, positive_similarity, negative_similarity (of the samples),
                mean_cosine (over pairs of rows of one view).

        Returns:
            The value, 0-d; with return_stats=True a pair of it and a dict of 0-d tensors.

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came; the state is unchanged, also
                where ``encode`` itself raises.
            RuntimeError: training mode inside torch.utils.checkpoint or a backward pass; the same.
        """
        with report_errors(self, z0):
            index, repeats = check_call(
                self, z0, z1, index, return_stats, dim=self.dim, state=(self.step, self.bank.embeddings)
            )
            anchors = Anchors.of(z0, z1, index, self.normalize, repeats)
        shards = batch_shards(self, z0, index)
        keys = batch_keys(anchors, shards, self.gather)
        if not self.training:
            with confirm_on_all(self, z0, encodes=self.carry == "recompute"):
                return self._draw_and_weigh(anchors, keys, shards, return_stats)
        with torch.no_grad():
            oldest = self._oldest(keys.labels)
            fresh = self._encode_share(oldest, anchors.embeddings, z0) if self.refresh_count else None
        finite = finite_batch(keys.embeddings, self.temperature)
        written = torch.cat((oldest, keys.labels))
        known = {} if shards is not None else {"distinct": anchors.distinct, "finite": anchors.finite}
        with self._restored_on_error(written):
            with torch.no_grad():
                if fresh is not None:
                    self.bank.put_embeddings(oldest, fresh, self.step, only=finite)
                self.bank.put_embeddings(keys.labels, keys.embeddings, self.step, only=finite, **known)
                if self.carry == "corrected":
                    known = known if fresh is None else {}  # of the batch's labels alone
                    self.batch_means.update(written, keys, self.bimodal, self.bank, self.step, **known)
            with confirm_on_all(self, z0, encodes=self.carry == "recompute"):
                result = self._draw_and_weigh(anchors, keys, shards, return_stats)
        self.step.add_(1 if finite is None else finite)
        return result

    def _oldest(self, batch: Tensor) -> Tensor:
        """Labels of the entries to encode again: by age, of one age the lowest; the batch's own are new already."""
        if not self.refresh_count:
            return batch[:0]
        written_at = self.bank.written_at.clone()
        written_at[batch] = self.step
        slots = torch.arange(self.bank.num_slots, dtype=torch.int64, device=batch.device)
        # step < 2^32 and slot < 2^31: all are different, so that every backend chooses the same
        return slots[((written_at + 1) * self.bank.num_slots + slots).topk(self.refresh_count, largest=False).indices]

    @contextmanager
    def _restored_on_error(self, labels: Tensor) -> Iterator[None]:
        """Puts the cache's entries of these labels back if anything goes wrong."""
        kept = [self.bank.embeddings, self.bank.written_at]
        if self.carry == "corrected":
            kept.append(self.batch_means.means)
        before, last_step = [buffer[labels] for buffer in kept], self.bank.last_step.clone()
        try:
            yield
        except BaseException:
            for buffer, values in zip(kept, before, strict=True):
                buffer[labels] = values
            self.bank.last_step.copy_(last_step)
            raise

    def _encode_share(self, labels: Tensor, like: Tensor, z0: Tensor) -> Tensor:
        """(k, dim) embeddings of labels (k,). Of several processes each encodes a share: it is less work, and an
        encoder that is not a function of its input alone, as with dropout, cannot make their caches differ."""
        if self.gather == "none":
            return encoded(self.encode, labels, like, self.normalize)
        rank, ranks = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        shares = labels.tensor_split(ranks)
        shards = Shards(self.process_group, rank, [len(share) for share in shares])
        mine = shares[rank]
        with confirm_on_all(self, z0, encodes=True):
            fresh = encoded(self.encode, mine, like, self.normalize) if len(mine) else like.detach()[:0]
        return gather_rows(fresh, shards)

    def _draw_and_weigh(
        self, anchors: Anchors, keys: LocalKeys, shards: Shards | None, return_stats: bool
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        drawn = self._draw(anchors)
        samples = samples_by_label(drawn, keys)
        loss, negatives = self._surrogate(anchors, keys, samples, shards)
        if not return_stats:
            return loss
        ages = self.bank.age(drawn.flatten())
        held = ages >= 0
        return loss, self._stats(anchors, (anchors.embeddings.detach() * negatives).sum(1)) | {
            "cache_age": torch.where(held, ages, 0).sum().float() / held.sum().clamp_min(1),
            "carry_share": (samples.weights > 0).sum().float() / held.sum().clamp_min(1),
        }

    def _draw(self, anchors: Anchors) -> Tensor:
        """(2b, R) labels of each anchor's negatives; -1 where the cache has none for it."""
        bank = self.bank.embeddings
        queries, slots = anchors.embeddings.detach().to(bank.dtype), self.bank.num_slots
        draw = DrawParams(anchors.labels, self.seed, self.step, self.num_samples)
        if not self.bimodal:
            key_items = torch.arange(slots, dtype=torch.int64, device=bank.device) // 2
            scores = ScoreParams(queries, bank, self.temperature, anchors.items, key_items)
            return ops.gumbel_sample(scores, draw, self.backend)
        items, drawn = torch.arange(slots // 2, dtype=torch.int64, device=bank.device), []
        for view, (rows, ids, chains) in enumerate(
            zip(queries.chunk(2), anchors.items.chunk(2), anchors.labels.chunk(2), strict=True)
        ):
            keys = bank.unflatten(0, (-1, 2))[:, 1 - view]
            scores = ScoreParams(rows, keys, self.temperature, ids, items)
            positions = ops.gumbel_sample(scores, draw._replace(chain_ids=chains), self.backend)
            drawn.append(torch.where(positions >= 0, positions * 2 + (1 - view), -1))
        return torch.cat(drawn)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, num_samples={self.num_samples}, carry={self.carry!r}, "
            f"refresh_count={self.refresh_count}, bimodal={self.bimodal}, seed={self.seed}"
        )


def _resolved_carry(carry: Any) -> str:
    if carry == "cached":
        expected = "carry must be one of 'auto', 'corrected', 'recompute', got 'cached', which was deleted"
        reason = "training from scratch collapses, all embeddings to one point (docs/results/options.md)"
        raise ValueError(f"{expected}: {reason}")
    checks.one_of("carry", carry, ("auto", "corrected", "recompute"))
    return "corrected" if carry == "auto" else carry
