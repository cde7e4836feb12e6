"""Batches chosen over the whole data set: GCBS (arXiv 2210.12874) as a batch sampler, and what it changes, measured."""

from .gap import Gap, global_train_gap
from .gcbs import GlobalContrastiveBatchSampler
from .graph import SCOPES, GraphFacts, SimilarityGraph, consecutive_order, similarity_graph
from .suitable import check_loss

__all__ = [
    "SCOPES",
    "Gap",
    "GlobalContrastiveBatchSampler",
    "GraphFacts",
    "SimilarityGraph",
    "check_loss",
    "consecutive_order",
    "global_train_gap",
    "similarity_graph",
]
