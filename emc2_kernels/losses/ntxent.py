"""NT-Xent, the in-batch contrastive loss of SimCLR (arXiv 2002.05709), and CLIP's between two towers (arXiv
2103.00020)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..backends import NAMES
from ..distributed.shards import GATHERS
from .anchors import Anchors, check_batch, compute_dtype, number_pairs
from .in_batch import Form, batch_stats, contrast, ntxent
from .ranks import batch_keys, batch_shards, report_errors
from .temperature import TemperedLoss, warn_uniform_weights
from .typed_call import Called


class NTXentLoss(Called, TemperedLoss):
    """NT-Xent over the 2b views of a batch: mean over anchors of -s+ + log sum exp(s), s = similarity / temperature.

    The sum has the positive and every row but the anchor's own. Scores are made by tiles, and again for the gradient:
    memory is O(b d). On a GPU, forward and backward with bfloat16 embeddings take 52 bytes for each of the b d elements
    (added up over the tensors that are allocated): 438 MB at b = 65,536, d = 128, whose scores would be 69 GB.

    Args:
        temperature: in [2^-63, 2^100].
        learn_temperature: keep ``log_scale``, the log of 1 / temperature, as a parameter; see ``TemperedLoss``.
        max_scale: a learnt 1 / temperature never exceeds it; see ``TemperedLoss``.
        normalize: L2-normalise the embeddings first, in float32, however long they are. Those shorter than 1e-6, zeros
            among them, have no direction to speak of: they are multiplied by 10^6 instead, and so are their gradients,
            which are then far larger than other rows'. Clip gradients where an encoder can give zeros.
        gather: "none": negatives are the process's own. "all": those of all processes, by a differentiable all-gather.
            "ring": the same with one process's keys at a time, memory O(b d). Both are collectives. They scale the
            value so that gradients averaged over processes, as DistributedDataParallel does, are those of one process
            with the whole batch, however unequal the parts. ``index`` must name items alike on all processes. A learnt
            temperature must be averaged too: wrap the loss together with the encoder. Processes whose losses have
            unlike options, or whose calls are not of one form (dim, dtype, index given or not, training mode, a learnt
            temperature), all raise a ValueError that names what differs; where one raises an error of its own, the
            others raise a RuntimeError that quotes it. A process that gathers nothing cannot be told of.
        process_group: that gather means; None: the default group.
        backend: of ``contrastive_lse``.

    Warns:
        UserWarning: a temperature above 10, with normalize=True: it is probably the inverse that is meant.

    Examples:
        >>> loss = NTXentLoss(temperature=0.2)
        >>> loss(z0, z1).backward()
    """

    bimodal = False

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        max_scale: float = 100.0,
        normalize: bool = True,
        gather: str = "none",
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature, learn_temperature, max_scale)
        checks.boolean("normalize", normalize)
        checks.one_of("gather", gather, GATHERS)
        checks.one_of("backend", backend, NAMES)
        warn_uniform_weights(self._fixed, normalize)
        self.normalize = normalize
        self.gather, self.process_group = gather, process_group
        self.backend = backend

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        index: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of b pairs.

        Args:
            z0: (b, d) embeddings of view 0, float32, bfloat16 or float16.
            z1: (b, d) of view 1, likewise.
            index: (b,) int64 items; other rows of an anchor's item are then no negatives of it.
            logit_scale: 1 / temperature of this call, in the place of the loss's own: a number, or a tensor of shape ()
                or (1,), which gets its gradient. It is the factor of the similarities, as open_clip's models return it,
                and not its logarithm, as they keep it.
            return_stats: also return detached values: ntxent, positive_similarity, negative_similarity (of an anchor's
                negatives, weighted by their softmax), mean_cosine (over pairs of rows of one view); temperature, where
                it is learnt.

        Returns:
            The value, 0-d; with return_stats=True a pair of it and a dict of 0-d tensors.

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came.
        """
        with report_errors(self, z0):
            checks.boolean("return_stats", return_stats)
            index, _ = check_batch(z0, z1, index, dim=None, num_items=None)
            anchors = Anchors.of(z0, z1, index, self.normalize)
            temperature = self.temperature_at(logit_scale, z0.device)
            if isinstance(temperature, Tensor):
                checks.temperature(temperature, 0, z0.device)
            if not self.normalize:  # unit vectors cannot overflow; no product is larger than its rows' own
                largest = anchors.embeddings.detach().square().sum(1) / temperature
                checks.finite("the similarities of z0 and z1", largest)
        form = {"return_stats": return_stats} if self.gather == "ring" else {}  # the statistics go round too
        log_scale = self.log_scale
        if logit_scale is not None and self.gather != "none":  # for the ranks to compare
            log_scale = torch.as_tensor(logit_scale, device=z0.device).detach().double().log()
            form["logit_scale given"] = True
        shards = batch_shards(self, z0, index, log_scale=log_scale, **form)
        anchors = number_pairs(anchors, 0 if shards is None else shards.first)
        keys = None if shards is None else batch_keys(anchors, shards, self.gather, walked=False)
        of = contrast(anchors, temperature, Form(self.bimodal, compute_dtype(z0), self.backend), keys)
        # The mean over ranks of each rank's share of the mean, times their number, is that mean.
        value = ntxent(of, 1.0 if shards is None else shards.ddp_factor)
        if not return_stats:
            return value
        stats = batch_stats(anchors, temperature, bimodal=self.bimodal, value=value.detach())
        counted = (of.lse > -torch.inf).sum()  # in a batch of one item no anchor has negatives
        stats["negative_similarity"] = of.negative_similarity().sum() / counted.clamp_min(1)
        if isinstance(temperature, Tensor):
            stats["temperature"] = temperature.detach()
        return value, stats

    def extra_repr(self) -> str:
        learnt = self.log_scale is not None
        shown = f"learnt, at most {self.max_scale} as a scale" if learnt else f"{self.temperature}"
        return f"temperature={shown}, normalize={self.normalize}"


class ClipLoss(NTXentLoss):
    """The contrastive loss of two modalities: image rows against text keys, and text rows against image keys.

    z0 are the images, z1 the texts. The mean, over the 2b anchors, of -s+ + log sum exp(s) over the other tower's keys:
    the mean of the two cross entropies of b x b scores, neither of which is kept (memory is O(b d)). With ``index``,
    other keys of an anchor's item are masked.

    For the arguments see ``NTXentLoss``. Open-source CLIP starts from temperature=0.07 with learn_temperature=True.

    Examples:
        >>> loss = ClipLoss(learn_temperature=True)
        >>> optimizer = torch.optim.AdamW([*towers.parameters(), *loss.parameters()])
        >>> loss(image_tower(images), text_tower(texts)).backward()
    """

    bimodal = True
