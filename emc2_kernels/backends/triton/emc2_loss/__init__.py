"""What ``EMC2Loss`` launches around its walk. ``gather_batch`` comes before it, ``mean_negatives`` after it."""

from .backward import embedding_gradients
from .forward import Batch, Negatives, Stores, gather_batch, mean_negatives
from .update import SCAN_ROWS, update_stores

__all__ = [
    "SCAN_ROWS",
    "Batch",
    "Negatives",
    "Stores",
    "embedding_gradients",
    "gather_batch",
    "mean_negatives",
    "update_stores",
]
