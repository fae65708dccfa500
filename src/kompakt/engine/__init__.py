"""The search: pruning, training and bits together, under one budget, resumable, by one worker or many."""

from kompakt.engine.candidate import CANDIDATES
from kompakt.engine.explore import Asked, explore
from kompakt.engine.strategy import Objective

__all__ = ["CANDIDATES", "Asked", "Objective", "explore"]
