"""Decisions as data: ``Plan`` and its entries."""

from kompakt.plan.plan import (
    Cut,
    Drop,
    Entry,
    Factor,
    Mend,
    Plan,
    Prune,
    Quantize,
    Share,
    Sparsify,
    diff,
)

__all__ = [
    "Cut",
    "Drop",
    "Entry",
    "Factor",
    "Mend",
    "Plan",
    "Prune",
    "Quantize",
    "Share",
    "Sparsify",
    "diff",
]
