"""Contrastive losses with one call: ``loss(z0, z1, index)``, each the mean over its 2b anchors of ``-s+ + ...`` with s
divided by the temperature and no further factor of it, so that gradients of different methods are on one scale."""

from .clip import ClipLoss
from .emc2 import EMC2Loss
from .ntxent import NTXentLoss

__all__ = ["ClipLoss", "EMC2Loss", "NTXentLoss"]
