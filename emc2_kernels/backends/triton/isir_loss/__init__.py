"""What ``EMC2Loss(sampler="isir")`` launches around its step over all candidates.

Before it ``gather_candidates`` and ``gate_candidates``; after it ``mean_loss`` and, in training, the update that both
samplers share; then ``embedding_gradients``, which is all of the backward pass.
"""

from .gather import Candidates, gate_candidates, gather_candidates
from .gradient import embedding_gradients
from .value import Loss, mean_loss

__all__ = ["Candidates", "Loss", "embedding_gradients", "gate_candidates", "gather_candidates", "mean_loss"]
