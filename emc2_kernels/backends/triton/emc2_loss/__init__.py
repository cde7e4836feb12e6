"""A loss's visit to its chains: the launches around the walk, in their order."""

from .backward import gradient
from .forward import Batch, Negatives, Stores, negatives, prepare
from .update import remember

__all__ = ["Batch", "Negatives", "Stores", "gradient", "negatives", "prepare", "remember"]
