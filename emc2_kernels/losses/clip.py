"""CLIP's symmetric cross entropy between two towers (arXiv 2103.00020)."""

from __future__ import annotations

from .ntxent import NTXentLoss


class ClipLoss(NTXentLoss):
    """The contrastive loss of two modalities: image rows against text keys, and text rows against image keys.

    z0 are the images, z1 the texts. The mean, over the 2b anchors, of -s+ + log sum exp(s) over the other tower's keys:
    the mean of the two cross entropies of b x b scores, neither of which is kept (memory is O(b d)). With ``index``,
    other keys of an anchor's item are masked.

    Arguments are those of ``NTXentLoss``. Open-source CLIP starts from temperature=0.07 with learn_temperature=True.

    Example:
        >>> loss = ClipLoss(learn_temperature=True)
        >>> optimizer = torch.optim.AdamW([*towers.parameters(), *loss.parameters()])
        >>> loss(image_tower(images), text_tower(texts)).backward()
    """

    bimodal = True
