"""Make trained neural networks small and fast, measured on the artifact that ships.

The names below are loaded when they are first read, so that ``import kompakt`` costs nothing.

Example:
    >>> import kompakt
    >>> kompakt.Recipe.from_toml("[budget]\\nmax_drop = 1.0").budget.max_drop
    1.0
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "Data",
    "Job",
    "KompaktError",
    "Plan",
    "Recipe",
    "Result",
    "build_report",
    "compress",
    "fold",
    "load_model",
    "open_data",
    "target",
    "trace",
]

_HOMES = {
    "Data": "kompakt.data",
    "Job": "kompakt.job",
    "KompaktError": "kompakt.errors",
    "Plan": "kompakt.plan",
    "Recipe": "kompakt.plan.recipe",
    "Result": "kompakt.measure.result",
    "build_report": "kompakt.report",
    "compress": "kompakt.search",
    "fold": "kompakt.graph.fold",
    "load_model": "kompakt.models",
    "open_data": "kompakt.data",
    "target": "kompakt.artifact.targets",
    "trace": "kompakt.graph.trace",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
