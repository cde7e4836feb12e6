"""A loss's visit to its chains: the launches around the walk, in their order."""

from .gradient import gradient
from .negatives import Negatives, negatives
from .prepare import Batch, Stores, prepare
from .remember import remember

__all__ = ["Batch", "Negatives", "Stores", "gradient", "negatives", "prepare", "remember"]
