"""EMC2, the global contrastive loss with Metropolis-Hastings negatives (arXiv 2404.10575)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..backends import NAMES
from ..distributed.shards import Shards, each_rank, gather_views, true_on_all
from ..stores.bank import EmbeddingBank
from ..stores.chains import ChainStore
from ..stores.strict_state import StrictState, outside
from ..stores.table import fitted_tables
from ..transition import MHState
from . import emc2_fused
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
from .correction import BatchMeans, correction, warn_of_collapse
from .emc2_options import COLLAPSING, check_proposals, check_ranks, check_samples, resolved_carry
from .emc2_ring import RingVisit, ring_visit
from .emc2_sampler import Visit, num_proposed, visit
from .encoding import Encode
from .index_watch import IndexWatch
from .negatives import mean_negative, mean_outside
from .recomputation import refuse_recomputation
from .sitting import SittingQueries
from .temperature import fixed_temperature, warn_of_uniform_weights

NUM_DRAWS = 64  # proposals of a visit with proposals="bank"


class EMC2Loss(StrictState):
    """The gradient of the global contrastive loss, whose negatives come from a softmax over the whole data set.

    Each of the ``num_items * 2`` views has a Metropolis-Hastings chain over the other items' views, carried from visit
    to visit. The value returned is a surrogate whose *gradient* is the estimate: mean over the 2b anchors of
    -<q, k+>/temperature + mean over samples of <q, k>/temperature. It is not the loss and does not fall like one; watch
    the ``ntxent`` statistic.

    Args:
        num_items: items of the data set; ``index`` names them. dim: of the embeddings.
        temperature: in [2^-63, 2^100]; the paper's beta is 1 / temperature. Not learnt: the value is a surrogate, whose
            derivative in the temperature is not the loss's, and the kept scores are divided by it.
        proposals: "batch": the keys of the mini-batch, which must then be drawn uniformly from the data set (a shuffled
            loader does). "bank": ``num_proposals`` uniform draws from the latest embeddings of the whole data set, so
            that mixing does not depend on the batch size, nor on how batches are made.
        views: with proposals="batch": "one" view of each item is proposed, chosen by a coin per item and step. "both"
            is the paper's choice: the scores of two views of an item are correlated, which biases the chains whatever
            the size of the data set.
        num_proposals: with proposals="bank": draws per anchor and visit; None: 64.
        burn_in: share of the M proposals before the first sample, 0 <= burn_in < 1; P = floor(burn_in * M).
        num_samples: R in 1 .. M - P; None: min(16, M - P).
        carry: what stands for a sample that is outside the batch: the key that a chain brought along or, with
            proposals="bank", nearly every sample. "auto": "cached", and "corrected" with proposals="bank".
            "cached": its latest embedding from the bank, detached, so the key's side of the gradient is lost.
            "corrected": that, its drift and the lost side estimated from the keys of the batch (losses/correction.py);
            keeps a second vector a view.
            "two_sided": that, and each of the batch's keys is pushed by the kept queries of all the chains that sit on
            it, scaled by N / b: unbiased at fixed parameters, but old on both sides.
            "recompute": encoded again, each distinct one once; the reference. Waits for a GPU to know what it has to
            encode, as nothing else here does.
            "drop": left out, which is badly biased and there for comparison only.
        estimator: "states": the chain's state after each sample's proposal. "recycled": the proposal with the
            probability a that it is accepted, and the state before it with 1 - a, which is the same on average with
            less noise (Frenkel's waste recycling, PNAS 2004).
        encode: called with carry="recompute" only: encode(items (k,), views (k,)) -> (k, dim) embeddings, as the loss
            takes them.
        seed: of the chains' random numbers.
        bimodal: z0 and z1 come from two towers, images and text, say: rows of each are contrasted with those of the
            other only, and each item has a chain each way.
        normalize: L2-normalise the embeddings first, in float32; see ``NTXentLoss``.
        bank_dtype: dtype of the kept embeddings.
        backend: of ``mh_step``.
        gather: "none": proposals and negatives are the process's own. "all": the keys of all processes, from a
            differentiable all-gather. Each process walks the chains of its own rows and applies the updates of all, so
            that chains are the same everywhere; with contiguous parts of a batch, in rank order, they are those of one
            process with the whole batch. See ``NTXentLoss`` for what this does to the value. "ring": the same with one
            process's keys at a time, for proposals="batch", estimator="states" and the carries "cached", "recompute"
            and "drop"; the statistic acceptance is then NaN.
        process_group: that gather means; None: the default group.
        sharded: each process keeps chains and bank of a block of items only, and asks the others for the rest. For
            proposals="batch", gather="all" or "ring", and the carries "cached", "recompute" and "drop".

    State: ``chains``, ``bank``, ``step``, and with a carry that needs them ``batch_means`` or ``sitting``, are in
    ``state_dict``. They change in training mode only.

    Warns:
        UserWarning: carry="two_sided", and carry="cached" with proposals="bank": training from scratch collapses there,
            all embeddings to one point (docs/choosing.md, docs/results.md).
        UserWarning: a temperature above 10, as for ``NTXentLoss``; and once in training, where it looks as if ``index``
            named classes: batches repeat items more often than by chance, or two epochs have had few different ones.

    Example:
        >>> loss = EMC2Loss(len(dataset), 128, temperature=0.2)
        >>> loss(projector(encoder(x0)), projector(encoder(x1)), index).backward()
    """

    saved_facts = ("bimodal",)
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
        super().__init__()
        self.temperature = fixed_temperature(temperature)
        carry = resolved_carry(carry, proposals)
        checks.one_of("backend", backend, NAMES)
        checks.boolean("normalize", normalize)
        warn_of_uniform_weights(self.temperature, normalize)
        checks.boolean("bimodal", bimodal)
        checks.embedding_dtype("bank_dtype", bank_dtype)
        check_samples(estimator, num_samples, carry, encode)
        check_proposals(proposals, num_proposals, views, bimodal, carry)
        check_ranks(gather, sharded, proposals, carry, estimator)
        if (proposals, carry) in COLLAPSING:
            warn_of_collapse(f'EMC2Loss: proposals="{proposals}" with carry="{carry}"')
        self.gather, self.process_group = gather, process_group
        self.proposals = proposals
        self.num_proposals = NUM_DRAWS if proposals == "bank" and num_proposals is None else num_proposals
        self.estimator, self.bimodal, self.views = estimator, bimodal, views
        self.burn_in = checks.number_in("burn_in", burn_in, 0, 1, open_high=True)
        self.num_samples = num_samples
        self.carry = carry
        object.__setattr__(self, "encode", encode)  # past nn.Module: an encoder given here is not a part of the loss
        self.seed = checks.counter("seed", checks.integer("seed", seed), 64, torch.device("cpu"))
        self.normalize, self.backend = normalize, backend
        shards = {"process_group": process_group, "sharded": sharded}
        self.sharded = sharded
        self.num_items, self.dim, self.bank_dtype = num_items, dim, bank_dtype
        self.chains = ChainStore(num_items, views=2, **shards)
        self.bank = EmbeddingBank(num_items, dim, views=2, dtype=bank_dtype, **shards)
        if carry == "corrected":
            self.batch_means = BatchMeans(num_items, dim, bank_dtype)
        if carry == "two_sided":
            self.sitting = SittingQueries(num_items, dim)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=self.chains.key.device))
        self._watch = IndexWatch(num_items)
        if proposals == "bank":
            self._number_slots()

    def _number_slots(self) -> None:
        """Items and labels of the bank's slots, by modality where there are two; they follow the module's device."""
        labels = torch.arange(self.chains.num_slots, dtype=torch.int64, device=self.step.device)
        labels = labels.view(-1, 2).T.flip(0).contiguous() if self.bimodal else labels[None]
        self.register_buffer("slot_labels", labels, persistent=False)
        self.register_buffer("slot_items", labels // 2, persistent=False)

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
            wrong += outside(name, key, -1, self.num_items * 2 - 1)
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
            RuntimeError: training mode inside torch.utils.checkpoint or a backward pass; the same.
        """
        with reported(self, z0):
            self._check(z0, z1, index, return_stats)
            if self.training:
                self._watch.look(index)
        if emc2_fused.takes(self, z0, z1):
            return self._fused(z0, z1, index, return_stats)
        anchors = stack(z0, z1, index, normalize=self.normalize)
        shards = over_ranks(self, z0, index)
        whole = anchors if self.gather == "ring" else of_all_ranks(anchors, shards)
        if self.gather == "ring":
            visited = ring_visit(self, anchors, shards, compute_dtype(z0))
        else:
            visited = visit(self, anchors, compute_dtype(z0), return_stats, whole)
        with confirmed(self, z0, encodes=self.carry == "recompute"):
            negatives = self._negatives(visited)
            positive_similarity = (anchors.embeddings * anchors.positives).sum(1)
            negative_similarity = (anchors.embeddings * negatives).sum(1)
            terms = negative_similarity - positive_similarity
            if self.carry == "two_sided":
                terms = terms + self._key_side(anchors)
            elif self.carry == "corrected":
                options = self.batch_means, self.temperature, self.bimodal
                terms = terms + correction(anchors, whole, visited.samples, *options)
            loss = terms.mean() / self.temperature * (1 if shards is None else shards.ddp_factor)
            if not self.normalize:  # unit vectors cannot overflow
                checks.finite("the similarities of z0 and z1", loss.detach())
        stats = None
        if return_stats:
            stats = self._stats(anchors, visited.acceptance, visited.carry_share, negative_similarity.detach())
        if self.training:
            self._remember_all(anchors, whole, visited.state, shards)
        return loss if stats is None else (loss, stats)

    def _check(self, z0: Tensor, z1: Tensor, index: Tensor, return_stats: bool) -> None:
        refuse_recomputation(self)
        checks.boolean("return_stats", return_stats)
        if index is None:
            raise TypeError("index must be an int64 tensor of the batch's items, got None")
        check(z0, z1, index, dim=self.dim, num_items=self.num_items)
        for buffer in (self.step, self.chains.key, self.bank.embeddings):
            if buffer.device != z0.device:
                expected = f"on {buffer.device}, where the loss keeps its chains"
                raise ValueError(f"z0 must be {expected}, got {checks.describe(z0)}")

    def _fused(self, z0: Tensor, z1: Tensor, index: Tensor, return_stats: bool) -> Tensor | tuple[Tensor, dict]:
        """The same in a handful of kernels, on a GPU."""
        made = emc2_fused.surrogate(self, z0, z1, index, return_stats)
        if not return_stats:
            return made.value
        items, result = made.batch.items, made.result
        anchors = Anchors(made.batch.anchors, items, made.batch.chain_ids % 2)
        proposed = num_proposed(items, items[: made.batch.keys.shape[0]])
        acceptance = result.num_accepted.sum().float() / proposed.clamp_min(1)  # of integers it were the default dtype
        carry_share = (result.samples < 0).float().mean()
        return made.value, self._stats(anchors, acceptance, carry_share, made.negative_similarity)

    def schedule(self, num_proposals: int) -> tuple[int, int]:
        """Burn-in and number of samples of a walk over so many proposals."""
        burn_in = int(self.burn_in * num_proposals)
        most = num_proposals - burn_in
        if self.num_samples is None:
            return burn_in, min(16, most)
        if self.num_samples > most:
            expected = f"at most {most} with this batch ({num_proposals} proposals, burn-in {burn_in})"
            raise ValueError(f"num_samples must be {expected}, got {self.num_samples}")
        return burn_in, self.num_samples

    def _negatives(self, visited: Visit | RingVisit) -> Tensor:
        """(2b, d) each anchor's mean negative, differentiable."""
        options = self.bank, self.encode if self.carry == "recompute" else None, self.normalize
        if isinstance(visited, RingVisit):
            return mean_outside(visited.inside, visited.samples, *options)
        keys = visited.keys.detach() if self.carry == "two_sided" else visited.keys
        return mean_negative(keys, visited.samples, *options)

    def _key_side(self, anchors: Anchors) -> Tensor:
        """(2b,): each row as the key of all the chains that sat on it before this step.

        Whether a batch has a key does not depend on where chains were before it; so the mean over batches of these
        terms, b / N of the keys at a time and scaled by N / b, is the whole data set's. After the step, the batch's
        chains would sit on the batch's keys more often than the others' do.
        """
        sitting = self.sitting.on(anchors.items * 2 + anchors.views).to(anchors.embeddings.dtype)
        return (anchors.embeddings * sitting).sum(1)

    @torch.no_grad()
    def _remember_all(self, anchors: Anchors, whole: Anchors, state: MHState, shards: Shards | None) -> None:
        """Writes what all ranks have found, in the order in which one process would: the last duplicate wins.

        Args:
            whole: the anchors of all ranks; unused in a ring. state: (2b,) of this rank's.
        """
        state, finite = MHState(state.key, state.score.float()), finite_batch(whole, self.temperature)
        if self.gather == "ring" and finite is not None:
            finite = true_on_all(finite, shards)
        if self.sharded:  # what a rank has goes to the owners, and to nobody else
            self._remember(anchors, state, finite)
        elif self.gather == "ring":  # of a slot's rows, the last rank's come last
            for embeddings, items, views, *found in each_rank([*anchors, *state], shards):
                self._remember(Anchors(embeddings, items, views), MHState(*found), finite)
        else:
            everyone = state if shards is None else MHState(*(gather_views(field, shards) for field in state))
            self._remember(whole, everyone, finite)
        self.step.add_(1 if finite is None else finite)

    def _remember(self, anchors: Anchors, state: MHState, only: Tensor | None) -> None:
        slots = anchors.items * 2 + anchors.views
        if self.carry == "two_sided":
            self.sitting.leave(slots, self.chains, self.bank, only)
        self.chains.write(anchors.items, anchors.views, state, only=only)
        self.bank.update(anchors.items, anchors.views, anchors.embeddings, self.step, only=only)
        if self.carry == "corrected":
            self.batch_means.update(slots, anchors, self.bimodal, self.bank, self.step)
        if self.carry == "two_sided":
            self.sitting.sit_down(slots, self.chains, self.bank, only)

    def _stats(
        self, anchors: Anchors, acceptance: Tensor, carry_share: Tensor, negative_similarity: Tensor
    ) -> dict[str, Tensor]:
        return batch_stats(anchors, self.temperature, bimodal=self.bimodal) | {
            "acceptance": acceptance,
            "carry_share": carry_share,
            "negative_similarity": negative_similarity.mean(),
        }

    def extra_repr(self) -> str:
        samples = "min(16, M - P)" if self.num_samples is None else self.num_samples
        return (
            f"temperature={self.temperature}, proposals={self.proposals!r}, views={self.views!r}, "
            f"burn_in={self.burn_in}, num_samples={samples}, carry={self.carry!r}, estimator={self.estimator!r}, "
            f"bimodal={self.bimodal}, seed={self.seed}"
        )
