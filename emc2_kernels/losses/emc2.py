"""EMC2, the global contrastive loss with Metropolis-Hastings negatives (arXiv 2404.10575)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..backends import NAMES
from ..bank import EmbeddingBank
from ..chains import ChainStore
from ..mh import mh_step
from ..transition import MHResult, MHState
from . import fused
from .pairs import Anchors, batch_stats, check, compute_dtype, stack, unit

Encode = Callable[[Tensor, Tensor], Tensor]


class ProposedKeys(NamedTuple):
    """The keys of a sweep, the same for all anchors."""

    embeddings: Tensor  # (m, d) differentiable
    items: Tensor  # (m,) int64
    views: Tensor  # (m,) int64


class EMC2Loss(nn.Module):
    """The gradient of the global contrastive loss, whose negatives come from a softmax over the whole data set.

    Each of the ``num_items * 2`` views has a Metropolis-Hastings chain over the other items' views, carried from visit
    to visit; the keys of each mini-batch are its proposals. The value returned is a surrogate whose *gradient* is the
    estimate: mean over the 2b anchors of -<q, k+>/temperature + mean over samples of <q, k>/temperature. It is not the
    loss and does not fall like one; watch the ``ntxent`` statistic. Batches must be drawn uniformly from the data set
    (a shuffled loader does).

    Args:
        num_items: items of the data set; ``index`` names them. dim: of the embeddings.
        temperature: > 0; the paper's beta is 1 / temperature.
        proposals: "batch".
        views: "one": one view of each item is proposed, chosen by a coin per item and step. "both" is the paper's
            choice: the scores of two views of an item are correlated, which biases the chains whatever the size of the
                data set.
        burn_in: share of the M proposals before the first sample, 0 <= burn_in < 1; P = floor(burn_in * M).
        num_samples: R in 1 .. M - P; None: min(16, M - P).
        carry: where a sample is still the key that the chain brought along, which is outside the batch: "cached" takes
            its latest embedding from the bank, detached, so the key's side of the gradient is lost; "recompute" encodes
            it again, the reference, and waits for a GPU to know what it has to encode, as nothing else here does;
            "drop" leaves it out, which is badly biased and there for comparison only.
        encode: called with carry="recompute" only: encode(items (k,), views (k,)) -> (k, dim) embeddings, as the loss
            takes them.
        seed: of the chains' random numbers.
        normalize: L2-normalise the embeddings first, in float32.
        bank_dtype: dtype of the kept embeddings.
        backend: of ``mh_step``.
        num_proposals, estimator, gather, bimodal: accept the one value that is built so far.

    State: ``chains``, ``bank`` and ``step`` are buffers, in ``state_dict``. They change in training mode only.

    Example:
        >>> loss = EMC2Loss(len(dataset), 128, temperature=0.2)
        >>> loss(projector(encoder(x0)), projector(encoder(x1)), index).backward()
    """

    step: Tensor  # () int64  training-mode calls so far

    def __init__(
        self,
        num_items: int,
        dim: int,
        *,
        temperature: float = 0.07,
        proposals: str = "batch",
        views: str = "one",
        num_proposals: int | None = None,
        burn_in: float = 0.5,
        num_samples: int | None = None,
        carry: str = "cached",
        estimator: str = "states",
        encode: Encode | None = None,
        gather: str = "none",
        seed: int = 0,
        bimodal: bool = False,
        normalize: bool = True,
        bank_dtype: torch.dtype = torch.bfloat16,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.temperature = checks.one_temperature(temperature)
        checks.one_of("proposals", proposals, ("batch",))
        checks.one_of("views", views, ("one", "both"))
        checks.one_of("carry", carry, ("cached", "recompute", "drop"))
        checks.one_of("estimator", estimator, ("states",))
        checks.one_of("gather", gather, ("none",))
        checks.one_of("backend", backend, NAMES)
        checks.boolean("normalize", normalize)
        checks.embedding_dtype("bank_dtype", bank_dtype)
        if num_proposals is not None:
            raise ValueError(
                f'num_proposals must be None with proposals="batch" (the keys are proposed), got {num_proposals!r}'
            )
        if bimodal is not False:
            raise ValueError(f"bimodal must be False, got {bimodal!r}")
        if isinstance(burn_in, bool) or not isinstance(burn_in, (int, float)) or not 0 <= burn_in < 1:
            raise ValueError(f"burn_in must be a share of the proposals in [0, 1), got {burn_in!r}")
        if num_samples is not None:
            checks.at_least("num_samples", num_samples, 1)
        if encode is None and carry == "recompute":
            raise ValueError('encode must be given with carry="recompute", got None')
        if encode is not None and not callable(encode):
            raise TypeError(f"encode must be a function, got {checks.describe(encode)}")
        self.views = views
        self.burn_in = float(burn_in)
        self.num_samples = num_samples
        self.carry = carry
        object.__setattr__(self, "encode", encode)  # past nn.Module: an encoder given here is not a part of the loss
        self.seed = checks.counter("seed", checks.integer("seed", seed), 64, torch.device("cpu"))
        self.normalize = normalize
        self.backend = backend
        self.chains = ChainStore(num_items, views=2)
        self.bank = EmbeddingBank(num_items, dim, views=2, dtype=bank_dtype)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(
        self, z0: Tensor, z1: Tensor, index: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The gradient surrogate of b pairs; in training mode their chains walk on.

        Args:
            z0, z1: (b, dim) embeddings of the two views, float32, bfloat16 or float16.
            index: (b,) int64 items in [0, num_items), on the CPU or with z0.
            return_stats: also return detached values: acceptance (of proposals that were not excluded), carry_share (of
                samples still at the carried state), ntxent, positive_similarity, negative_similarity (of the samples),
                mean_cosine (over pairs of rows of one view).

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came; chains and bank are unchanged.
        """
        checks.boolean("return_stats", return_stats)
        if index is None:
            raise TypeError("index must be an int64 tensor of the batch's items, got None")
        check(z0, z1, index, dim=self.bank.dim, num_items=self.chains.num_items)
        self._check_device(z0)
        if fused.takes(self, z0, z1):
            return self._fused(z0, z1, index, return_stats)
        anchors = stack(z0, z1, index, normalize=self.normalize)
        keys = self._proposed_keys(anchors)
        state, result = self._walk(anchors, keys, compute_dtype(z0), return_stats)
        negatives = self._mean_negatives(keys, state, result)
        positive_similarity = (anchors.embeddings * anchors.positives).sum(1)
        negative_similarity = (anchors.embeddings * negatives).sum(1)
        loss = (negative_similarity - positive_similarity).mean() / self.temperature
        if not self.normalize:  # unit vectors cannot overflow
            checks.finite("the similarities of z0 and z1", loss.detach())
        stats = self._stats(anchors, keys, result, negative_similarity.detach()) if return_stats else None
        if self.training:
            self._remember(anchors, result.state)
        return loss if stats is None else (loss, stats)

    def _check_device(self, z0: Tensor) -> None:
        for buffer in (self.step, self.chains.key, self.bank.embeddings):
            if buffer.device != z0.device:
                expected = f"on {buffer.device}, where the loss keeps its chains"
                raise ValueError(f"z0 must be {expected}, got {checks.describe(z0)}")

    def _fused(self, z0: Tensor, z1: Tensor, index: Tensor, return_stats: bool) -> Tensor | tuple[Tensor, dict]:
        """The same in a handful of kernels, on a GPU."""
        made = fused.surrogate(self, z0, z1, index, return_stats)
        if not return_stats:
            return made.value
        items, labels = made.batch.items, made.batch.key_labels
        anchors = Anchors(made.batch.anchors, items, made.batch.chain_ids % 2)
        keys = ProposedKeys(made.batch.keys, items[: labels.shape[0]], labels % 2)
        return made.value, self._stats(anchors, keys, made.result, made.negative_similarity)

    def schedule(self, num_keys: int) -> tuple[int, int]:
        """Burn-in and number of samples of a sweep over so many keys."""
        burn_in = int(self.burn_in * num_keys)
        most = num_keys - burn_in
        if self.num_samples is None:
            return burn_in, min(16, most)
        if self.num_samples > most:
            expected = f"at most {most} with this batch ({num_keys} proposals, burn-in {burn_in})"
            raise ValueError(f"num_samples must be {expected}, got {self.num_samples}")
        return burn_in, self.num_samples

    def _proposed_keys(self, anchors: Anchors) -> ProposedKeys:
        if self.views == "both":
            return ProposedKeys(*anchors)
        b = anchors.embeddings.shape[0] // 2
        items = anchors.items[:b]
        coin = ops.view_coin(items, *ops.integer_or_tensor(self.seed), *ops.integer_or_tensor(self.step), self.backend)
        chosen = torch.where(coin[:, None] == 1, anchors.embeddings[b:], anchors.embeddings[:b])
        return ProposedKeys(chosen, items, coin)

    def _walk(
        self, anchors: Anchors, keys: ProposedKeys, dtype: torch.dtype, return_accepts: bool
    ) -> tuple[MHState, MHResult]:
        """The incoming states, rescored with the current anchors, and what the step made of them."""
        queries, embeddings = anchors.embeddings.detach(), keys.embeddings.detach()
        burn_in, num_samples = self.schedule(embeddings.shape[0])
        state = self.chains.read(anchors.items, anchors.views, queries, self.bank, self.temperature)
        result = mh_step(
            queries.to(dtype),
            embeddings.to(dtype),
            state,
            temperature=self.temperature,
            seed=self.seed,
            step=self.step,
            chain_ids=anchors.items * 2 + anchors.views,
            query_ids=anchors.items,
            key_ids=keys.items,
            key_labels=keys.items * 2 + keys.views,
            burn_in=burn_in,
            num_samples=num_samples,
            return_accepts=return_accepts,
            backend=self.backend,
        )
        return state, result

    def _mean_negatives(self, keys: ProposedKeys, state: MHState, result: MHResult) -> Tensor:
        """(2b, d): each anchor's samples, averaged; an anchor without any (a chain that has not started) gets zeros."""
        in_batch = result.samples >= 0
        counted = in_batch if self.carry == "drop" else in_batch | (state.key >= 0)[:, None]
        weights = counted.to(keys.embeddings.dtype) / counted.sum(1, keepdim=True).clamp_min(1)
        # -1 is no legal index of a bag: it points at key 0 with weight 0.
        in_batch_mean = nn.functional.embedding_bag(
            result.samples.clamp_min(0), keys.embeddings, mode="sum", per_sample_weights=weights * in_batch
        )
        if self.carry == "drop":
            return in_batch_mean
        carried_weight = (weights * ~in_batch).sum(1)
        if self.carry == "recompute":
            return self._add_recomputed(in_batch_mean, carried_weight, state.key)
        return in_batch_mean + carried_weight[:, None] * self.bank.lookup(state.key).to(in_batch_mean.dtype)

    def _add_recomputed(self, mean: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Encodes the carried keys that count again, each once, with gradient."""
        rows = weight.nonzero().squeeze(1)
        if rows.numel() == 0:
            return mean
        distinct, inverse = labels[rows].unique(return_inverse=True)
        encoded = self.encode(distinct // 2, distinct % 2)
        checks.tensor("encode's result", encoded)
        checks.operand_dtype("encode's result", encoded)
        if encoded.shape != (distinct.shape[0], mean.shape[1]) or encoded.device != mean.device:
            expected = f"shape ({distinct.shape[0]}, {mean.shape[1]}) on {mean.device}"
            raise ValueError(f"encode's result must have {expected}, got {checks.describe(encoded)}")
        checks.finite("encode's result", encoded.detach())
        carried = unit(encoded, self.normalize).to(mean.dtype)[inverse]
        return mean.index_add(0, rows, weight[rows, None] * carried)

    def _remember(self, anchors: Anchors, state: MHState) -> None:
        with torch.no_grad():
            self.chains.write(anchors.items, anchors.views, MHState(state.key, state.score.float()))
            self.bank.update(anchors.items, anchors.views, anchors.embeddings, self.step)
            self.step += 1

    def _stats(
        self, anchors: Anchors, keys: ProposedKeys, result: MHResult, negative_similarity: Tensor
    ) -> dict[str, Tensor]:
        ordered = keys.items.sort().values
        own_keys = torch.searchsorted(ordered, anchors.items, right=True) - torch.searchsorted(ordered, anchors.items)
        proposed = keys.items.shape[0] - own_keys
        return batch_stats(anchors, self.temperature) | {
            "acceptance": result.num_accepted.sum() / proposed.sum().clamp_min(1),
            "carry_share": (result.samples < 0).float().mean(),
            "negative_similarity": negative_similarity.mean(),
        }

    def extra_repr(self) -> str:
        samples = "min(16, M - P)" if self.num_samples is None else self.num_samples
        return (
            f"temperature={self.temperature}, views={self.views!r}, burn_in={self.burn_in}, num_samples={samples}, "
            f"carry={self.carry!r}, seed={self.seed}"
        )
