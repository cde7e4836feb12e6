"""Contrastive losses whose negatives come from the whole data set, by Markov chains, on fused kernels.

``losses.EMC2Loss`` and its peers are what a training loop calls. Below them, ``isir_step`` and ``mh_step`` move the
chains of a mini-batch, ``ChainStore`` and ``EmbeddingBank`` keep them for a data set. Importing this package compiles
nothing and touches no GPU.
"""

from . import batching, checkpoint, data, losses
from .backends import backends
from .gumbel import gumbel_sample, softmax_sample
from .isir import isir_step
from .lse import contrastive_lse
from .mh import mh_step, mh_transition
from .stores.bank import EmbeddingBank
from .stores.chains import ChainStore
from .transition import ISIRResult, MHResult, MHState, Transition, apply, compose, init_state

__version__ = "0.1.0"

__all__ = [
    "ChainStore",
    "EmbeddingBank",
    "ISIRResult",
    "MHResult",
    "MHState",
    "Transition",
    "apply",
    "backends",
    "batching",
    "checkpoint",
    "compose",
    "contrastive_lse",
    "data",
    "gumbel_sample",
    "init_state",
    "isir_step",
    "losses",
    "mh_step",
    "mh_transition",
    "softmax_sample",
]
