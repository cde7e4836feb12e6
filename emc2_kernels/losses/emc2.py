"""EMC2, the global contrastive loss with negatives of Markov chains (arXiv 2404.10575), moved by i-SIR or by
Metropolis-Hastings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.keys import Keys
from ..distributed.shards import Shards, all_true, broadcast_in_turn, gather_views
from ..stores.chains import ChainStore
from ..stores.queue import ItemQueue
from ..stores.strict_state import range_errors
from ..stores.table import fitted_tables
from ..transition import MHState
from . import emc2_fused, emc2_isir_fused
from .anchors import Anchors, check_call, check_finite, check_state_device, compute_dtype, finite_batch
from .emc2_isir import bring_along, encode_along, mean_loss, resample, resampled_stats
from .emc2_options import (
    check_decoupled,
    check_estimator,
    check_proposals,
    check_ranks,
    check_schedule,
    resolved_carry,
    resolved_queue,
    resolved_sampler,
    resolved_views,
)
from .emc2_sampler import BankSlots, Walked, WalkOptions, count_proposals, draw_from_bank, sweep_batch
from .ranks import batch_keys, batch_shards, confirm_on_all, report_errors
from .sampled import Encode, SampledLoss
from .staleness import Staleness
from .temperature import warn_uniform_weights

NUM_DRAWS = 64  # proposals of a visit with proposals="bank"


class EMC2Loss(SampledLoss):
    """The gradient of the global contrastive loss, whose negatives come from a softmax over the whole data set.

    Each of the ``num_items * 2`` views has a Markov chain over the other items' views, carried from visit to visit,
    with that softmax as its law.

    With sampler="isir", the default, the value is a loss: mean over the anchors of -s+ + log sum exp(s) over the
    batch's keys, kept keys of ``queue`` items and the one that the chain brings along. It may be negative: the positive
    is no part of the sum, as it is none of the global loss's; see ``decoupled``. What is kept counts once embeddings
    have become steady: see the statistic ``staleness``.

    With sampler="mh" the value is a surrogate whose *gradient* is the estimate: mean over the 2b anchors of -s+ + mean
    of s over the samples, ``s = <q, k> / temperature``. It is not the loss and does not fall like one, and is negative
    where positives are more alike than samples; watch the ``ntxent`` statistic.

    What it keeps is in ``state_dict``, and changes in training mode only: ``chains``, ``bank``, ``step``, with
    carry="corrected" ``batch_means``, and with sampler="isir" and kept keys ``drift`` and ``recent``, the queue.

    Args:
        num_items: items of the data set; ``index`` names them.
        dim: of the embeddings.
        temperature: in [2^-63, 2^100]; the paper's beta is 1 / temperature. Not learnt: the walk's value is no
            loss whose derivative in the temperature would mean something, and kept scores are divided by it.
        sampler: what moves the chains. "mh": the paper's Metropolis-Hastings walk over the proposals, whose states are
            the negatives. "isir": iterated sampling importance resampling (losses/emc2_isir.py), whose negatives are
            all of the batch's keys, the queue's and the chain's, weighted by their softmax; with proposals="batch".
            "auto": "isir", and "mh" where ``proposals``, ``burn_in`` or ``num_samples`` ask something of the walk.
        proposals: "batch": the keys of the mini-batch, which must then be drawn uniformly from the data set (a shuffled
            loader does). "bank": ``num_proposals`` uniform draws from the latest embeddings of the whole data set, so
            that mixing does not depend on the batch size, nor on how batches are made.
        views: with proposals="batch": "one" view of each item is proposed, chosen by a coin per item and step; or
            "both". The paper's walk proposes both, whose scores are correlated, which biases its chains whatever the
            size of the data set; i-SIR's law is exact with either. "auto": "both" with sampler="isir" and one modality,
            else "one".
        queue: with sampler="isir": how many items of the latest batches are candidates beside the batch's, by their
            embeddings from the bank. None: 16, and 0 with carry="recompute", which has none.
        decoupled: whether the positive is left out of the sum, as the global loss leaves it out (decoupled contrastive
            learning, arXiv 2110.06848). False, with sampler="isir": it is a term, as in NT-Xent and CLIP, whose loss
            this then is, with more negatives. An anchor that tells its positive from all candidates is done then, where
            decoupled it pushes on: on pairs that are nearly told apart already, that wants a lower learning rate.
        num_proposals: with proposals="bank": draws per anchor and visit; None: 64.
        burn_in: with sampler="mh": share of the M proposals before the first sample, 0 <= burn_in < 1; P =
            floor(burn_in * M). None: 0.5.
        num_samples: with sampler="mh": R in 1 .. M - P; None: min(16, M - P).
        carry: what stands for a sample that is outside the batch: the key that a chain brought along or, with
            proposals="bank", nearly every sample. "auto": the first of the two that there are.
            "cached", with proposals="batch": its latest embedding from the bank, detached, so the key's side of the
            gradient is lost; with sampler="isir" the anchor has it in the key's place.
            "corrected", with proposals="bank": that, its drift and the lost side estimated from the keys of the batch
            (losses/correction.py); keeps a second vector a view.
            "recompute": encoded again, each distinct one once; the reference. Waits for a GPU to know what it has to
            encode, as nothing else here does.
        estimator: "states", the one that is left.
        encode: called with carry="recompute" only: encode(items (k,), views (k,)) -> (k, dim) embeddings, as the loss
            takes them.
        seed: of the chains' random numbers.
        bimodal: z0 and z1 come from two towers, images and text, say: rows of each are contrasted with those of the
            other only, and each item has a chain each way.
        normalize: L2-normalise the embeddings first, in float32; see ``NTXentLoss``.
        bank_dtype: dtype of the kept embeddings.
        backend: of ``isir_step`` or ``mh_step``.
        gather: "none": proposals and negatives are the process's own. "all": the keys of all processes, from a
            differentiable all-gather. Each process walks the chains of its own rows and applies the updates of all, so
            that chains are the same everywhere; with contiguous parts of a batch, in rank order, they are those of one
            process with the whole batch. See ``NTXentLoss`` for what this does to the value. "ring": the same with one
            process's keys at a time, for proposals="batch"; with sampler="mh" the statistic acceptance is then NaN.
        process_group: that gather means; None: the default group.
        sharded: each process keeps chains and bank of a block of items only, and asks the others for the rest. For
            proposals="batch", and gather="all" or "ring".

    Warns:
        UserWarning: a temperature above 10, as for ``NTXentLoss``; and once in training, where it looks as if ``index``
            named classes: batches repeat items more often than by chance, or two epochs have had few different ones.

    Examples:
        >>> loss = EMC2Loss(len(dataset), 128, temperature=0.2)
        >>> loss(projector(encoder(x0)), projector(encoder(x1)), index).backward()
    """

    def __init__(
        self,
        num_items: int,
        dim: int,
        *,
        temperature: float = 0.07,
        sampler: str = "auto",
        proposals: str = "batch",
        views: str = "auto",
        queue: int | None = None,
        decoupled: bool = True,
        num_proposals: int | None = None,
        burn_in: float | None = None,
        num_samples: int | None = None,
        carry: str = "auto",
        estimator: str = "states",
        encode: Encode | None = None,
        gather: str = "none",
        process_group: dist.ProcessGroup | None = None,
        sharded: bool = False,
        seed: int = 0,
        bimodal: bool = False,
        normalize: bool = True,
        bank_dtype: torch.dtype = torch.bfloat16,
        backend: str = "auto",
    ) -> None:
        sampler = resolved_sampler(sampler, proposals, burn_in, num_samples)
        carry = resolved_carry(carry, proposals, sampler)
        check_estimator(estimator)
        views = resolved_views(views, sampler, proposals, bimodal)
        queue = resolved_queue(queue, sampler, carry)
        check_decoupled(decoupled, sampler)
        check_proposals(proposals, num_proposals, num_samples)
        check_ranks(gather, sharded, proposals)
        super().__init__(
            num_items, dim, temperature=temperature, carry=carry, encode=encode, gather=gather,
            process_group=process_group, seed=seed, bimodal=bimodal, normalize=normalize, bank_dtype=bank_dtype,
            backend=backend, sharded=sharded,
        )  # fmt: skip
        warn_uniform_weights(self.temperature, normalize)
        self.sampler, self.proposals, self.views, self.queue = sampler, proposals, views, queue
        self.decoupled, self.estimator, self.sharded = decoupled, estimator, sharded
        self.num_proposals = NUM_DRAWS if proposals == "bank" and num_proposals is None else num_proposals
        self.burn_in = check_schedule(sampler, burn_in, num_samples)
        self.num_samples = num_samples
        self.chains = ChainStore(num_items, views=2, process_group=process_group, sharded=sharded)
        self.recent = ItemQueue(num_items, queue) if queue else None
        self.drift = Staleness() if sampler == "isir" and carry == "cached" else None
        form = proposals, carry, gather, bimodal
        self._fusable = form == ("batch", "cached", "none", False) and (
            sampler == "mh" or emc2_isir_fused.accepts(views, queue, normalize, backend)
        )
        if proposals == "bank":
            self._number_slots()

    def _number_slots(self) -> None:
        """Items and labels of the bank's slots, by modality where there are two; they follow the module's device."""
        labels = torch.arange(self.chains.num_slots, dtype=torch.int64, device=self.step.device)
        labels = labels.view(-1, 2).T.flip(0).contiguous() if self.bimodal else labels[None]
        self.register_buffer("slot_labels", labels, persistent=False)
        self.register_buffer("slot_items", labels // 2, persistent=False)

    def forward(
        self, z0: Tensor, z1: Tensor, index: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of b pairs, with sampler="mh" its gradient surrogate; in training mode their chains move on.

        Args:
            z0: (b, dim) embeddings of view 0, float32, bfloat16 or float16.
            z1: (b, dim) of view 1, likewise.
            index: (b,) int64 items in [0, num_items), on the CPU or with z0.
            return_stats: also return detached values: ntxent, positive_similarity, mean_cosine (over pairs of rows of
                one view). With sampler="mh": acceptance (of proposals that were not excluded), carry_share (of samples
                still at the carried state), negative_similarity (of the samples). With sampler="isir": acceptance (of
                chains that moved), carried_weight (of what chains brought along, in the softmax), negative_similarity
                (under it), log_partition: the mean over anchors of the log of the estimate of sum exp(s) over all
                negatives of the data set; too large by about half the relative variance of the estimate's inverse.
                That less the mean s+ is the global loss. And, but for carry="recompute", staleness: 0 where kept
                embeddings of the anchors' positives score as high as fresh ones, 1 where no higher than the batch's
                negatives, over the last ten batches or so; NaN before any item has come twice, and where positives are
                no more alike than negatives. Below 0.2 what is kept is a candidate.

        Returns:
            The value, 0-d; with return_stats=True a pair of it and a dict of 0-d tensors.

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came; chains and bank are unchanged.
            RuntimeError: training mode inside torch.utils.checkpoint or a backward pass; the same.
        """
        with report_errors(self, z0):
            index, repeats = check_call(
                self, z0, z1, index, return_stats, dim=self.dim, state=(self.step, self.bank.embeddings)
            )
            check_state_device(z0, "chains", self.chains.key)
            options = self._walk_options(z0, return_stats)
            if self._runs_fused(z0, z1):
                check_finite(z0, z1)
                fused = self._resample_fused if self.sampler == "isir" else self._walk_fused
                value, stats = fused(z0, z1, index, options)
                return (value, stats) if return_stats else value
            anchors = Anchors.of(z0, z1, index, self.normalize, repeats)
        statistics_go_round = self.sampler == "isir" and self.gather == "ring"
        form = {"return_stats": return_stats} if statistics_go_round else {}
        shards = batch_shards(self, z0, index, **form)
        keys = batch_keys(anchors, shards, self.gather)
        step = self._resample if self.sampler == "isir" else self._walk_and_average
        loss, state, stats, drift = step(anchors, keys, shards, options)
        if self.training:
            self._update_all(anchors, keys, state, drift, shards)
        return (loss, stats) if return_stats else loss

    def _walk_and_average(
        self, anchors: Anchors, keys: Keys, shards: Shards | None, options: WalkOptions
    ) -> tuple[Tensor, MHState, dict[str, Tensor], None]:
        """The surrogate, the chains afterwards and, if asked for, statistics; and nothing more to keep."""
        walked = self._walk(anchors, keys, options)
        with confirm_on_all(self, anchors.embeddings, encodes=self.carry == "recompute"):
            loss, negatives = self._surrogate(anchors, keys, walked.samples, shards)
        if not options.return_accepts:
            return loss, walked.state, {}, None
        stats = self._stats(anchors, (anchors.embeddings.detach() * negatives).sum(1))
        stats |= {"acceptance": walked.acceptance, "carry_share": walked.carry_share}
        return loss, walked.state, stats, None

    def _resample(
        self, anchors: Anchors, keys: Keys, shards: Shards | None, options: WalkOptions
    ) -> tuple[Tensor, MHState, dict[str, Tensor], Tensor | None]:
        """The same with all candidates at once; and the drift to keep, see ``Kept``."""
        (key,) = self.chains.rows(anchors.labels, "key")
        of_chains = anchors, key, self.bank, options
        if self.carry == "recompute":
            with confirm_on_all(self, anchors.embeddings, encodes=True):
                kept = encode_along(*of_chains, self.encode, self.normalize)
                self._checked(kept.carried.similarity)
        else:
            kept = bring_along(*of_chains, self.recent, self.drift, _batch_items(keys), shards)
            with confirm_on_all(self, anchors.embeddings):
                self._checked(kept.carried.similarity)
        resampled = resample(anchors, kept, keys, options)
        with confirm_on_all(self, anchors.embeddings):
            factor = 1.0 if shards is None else shards.ddp_factor
            of_anchors = anchors, kept, resampled, options
            loss = self._checked(mean_loss(*of_anchors, decoupled=self.decoupled, factor=factor))
        if not options.return_accepts:
            return loss, resampled.state, {}, kept.drift
        stats, similarity = resampled_stats(resampled, kept, self.num_items, options)
        return loss, resampled.state, self._stats(anchors, similarity) | stats, kept.drift

    def _walk(self, anchors: Anchors, keys: Keys, options: WalkOptions) -> Walked:
        """A step of the anchors' chains; changes nothing of what is kept."""
        start, carried = self.chains.rescore(
            anchors.labels, anchors.embeddings.detach(), self.bank.read, self.temperature
        )
        if self.proposals == "batch":
            return sweep_batch(anchors, start, carried, keys, options)
        slots = BankSlots(self.slot_items, self.slot_labels, self.num_proposals)
        return draw_from_bank(anchors, start, self.bank.embeddings, slots, keys, options)

    def _walk_options(self, z0: Tensor, return_stats: bool) -> WalkOptions:
        return WalkOptions(
            self.temperature, self.seed, self.step, self.burn_in, self.num_samples, self.views, self.bimodal,
            compute_dtype(z0), return_stats, self.backend,
        )  # fmt: skip

    def _runs_fused(self, z0: Tensor, z1: Tensor) -> bool:
        runs = emc2_isir_fused.runs_small if self.sampler == "isir" else emc2_fused.runs
        return self._fusable and runs(z0, z1, self.backend)

    def _walk_fused(
        self, z0: Tensor, z1: Tensor, index: Tensor, options: WalkOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The value and, if asked for, statistics; the same in a handful of kernels, on a GPU."""
        made = emc2_fused.surrogate(z0, z1, index, self.chains, self.bank, options, self.normalize, self.training)
        if not options.return_accepts:
            return made.value, {}
        items, result = made.batch.items, made.result
        proposed = count_proposals(items, items[: made.batch.keys.shape[0]])
        stats = self._stats(Anchors(made.batch.anchors, items, made.batch.chain_ids), made.negative_similarity)
        acceptance = result.num_accepted.sum().float() / proposed.clamp_min(1)  # of integers it were the default dtype
        return made.value, stats | {"acceptance": acceptance, "carry_share": (result.samples < 0).float().mean()}

    def _resample_fused(
        self, z0: Tensor, z1: Tensor, index: Tensor, options: WalkOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Likewise."""
        stores = emc2_isir_fused.Stores(self.chains, self.bank, self.drift, self.recent)
        made = emc2_isir_fused.loss(z0, z1, index, stores, options, self.decoupled, self.training)
        if not options.return_accepts:
            return made.value, {}
        resampled, kept = emc2_isir_fused.as_plain(made, self.temperature)
        stats, similarity = resampled_stats(resampled, kept, self.num_items, options)
        keys = resampled.sides[0].keys
        return made.value, self._stats(Anchors(made.candidates.anchors, keys.items, keys.labels), similarity) | stats

    @torch.no_grad()
    def _update_all(
        self, anchors: Anchors, keys: Keys, state: MHState, drift: Tensor | None, shards: Shards | None
    ) -> None:
        """Writes what all ranks have found, in the order in which one process would: the last duplicate wins.

        Args:
            state: (2b,) of this rank's.
        """
        ring, state, known = self.gather == "ring", MHState(state.key, state.score.float()), {}
        finite = finite_batch(anchors.embeddings if ring else keys.embeddings, self.temperature)
        if ring and finite is not None:
            finite = all_true(finite, shards)
        if self.sharded:  # what a rank has goes to the owners, and to nobody else
            self._update(anchors.labels, anchors.embeddings, state, only=finite)
        elif ring:  # of a slot's rows, the last rank's come last
            for labels, embeddings, *found in broadcast_in_turn([anchors.labels, anchors.embeddings, *state], shards):
                self._update(labels, embeddings, MHState(*found), only=finite)
        elif shards is not None:
            everyone = MHState(*(gather_views(field, shards) for field in state))
            self._update(keys.labels, keys.embeddings, everyone, only=finite)
        else:
            known = {"distinct": anchors.distinct, "finite": anchors.finite}
            self._update(anchors.labels, anchors.embeddings, state, only=finite, **known)
        if drift is not None:
            self.drift.put_sums(drift, finite)
        if self.recent is not None:
            self.recent.push(_batch_items(keys), only=finite)
        if self.carry == "corrected":
            self.batch_means.update(keys.labels, keys, self.bimodal, self.bank, self.step, **known)
        self.step.add_(1 if finite is None else finite)

    def _update(self, labels: Tensor, embeddings: Tensor, state: MHState, only: Tensor | None, **known: bool) -> None:
        self.chains.put_state(labels, state, only=only, **known)
        self.bank.put_embeddings(labels, embeddings, self.step, only=only, **known)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMC2Loss:
        unmade = self.proposals == "bank" and self.slot_labels.is_meta
        super()._apply(fn, recurse)
        if unmade:
            self._number_slots()
        return self

    def _misfits(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> list[str]:
        wrong = super()._misfits(state_dict, prefix, metadata)
        for key in fitted_tables(state_dict, f"{prefix}chains.", ["key"]).values():
            name = f"{prefix}chains.key"
            wrong += range_errors(name, key, -1, self.num_items * 2 - 1)
            if self.bimodal and not key.is_meta:
                slots = torch.arange(len(key), dtype=torch.int64, device=key.device)
                views = slots % 2  # a rank's part begins with view 0, too
                own = int(((key >= 0) & (key % 2 == views)).sum())
                if own:
                    wrong.append(f"{name} must be of the other modality with bimodal=True, got {own} that are not")
        return wrong

    def _load_from_state_dict(self, *of_module: Any) -> None:
        super()._load_from_state_dict(*of_module)
        if self.proposals == "bank" and self.slot_labels.is_meta:  # a state is assigned, and these are in none
            self._number_slots()

    def extra_repr(self) -> str:
        samples = "min(16, M - P)" if self.num_samples is None else self.num_samples
        schedule = f"burn_in={self.burn_in}, num_samples={samples}, " if self.sampler == "mh" else ""
        queue = f"queue={self.queue}, decoupled={self.decoupled}, " if self.sampler == "isir" else ""
        return (
            f"temperature={self.temperature}, sampler={self.sampler!r}, proposals={self.proposals!r}, "
            f"views={self.views!r}, {schedule}{queue}carry={self.carry!r}, bimodal={self.bimodal}, seed={self.seed}"
        )


def _batch_items(keys: Keys) -> Tensor:
    """(B,) of the whole batch, of all ranks."""
    return keys.items[: keys.items.shape[0] // 2]
