"""``Target``: what one runtime can run, how its artifact is written, opened and checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from kompakt import __version__
from kompakt.artifact.lint import Finding
from kompakt.errors import MissingExtraError
from kompakt.graph.trace import Capture
from kompakt.plan.rules import Rules

MADE_BY = MappingProxyType({"made_by": f"kompakt {__version__}"})
"""What the metadata of every artifact says."""


class Runtime(Protocol):
    """An open artifact: a batch of inputs → the first output."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input as the file declares it; sizes that it leaves open are 1."""

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run one batch."""


class Export(Protocol):
    """Writes a capture, float or quantized, as the target's artifact."""

    def __call__(self, capture: Capture, path: str | Path, *, metadata: Mapping[str, str]) -> Path:
        """Write the file or folder and return its path."""


class Inside(Protocol):
    """Shows the values inside an artifact while it runs."""

    def __call__(
        self, path: Path, inputs: np.ndarray, grids: Mapping[str, tuple[float, int]]
    ) -> Mapping[str, np.ndarray]:
        """Run a batch; op → its rounded output, for those of ``grids`` (scale and zero point) that can be seen."""


def no_checks(path: Path) -> tuple[Finding, ...]:
    """Find nothing: what the file holds was settled when it was compiled for its runtime."""
    return ()


def as_it_is(capture: Capture) -> Capture:
    """Change nothing."""
    return capture


@dataclass(frozen=True, kw_only=True)
class Target:
    """A runtime: what it runs in integers, how its artifact is written, opened and checked.

    Args:
        rules: what it can quantize and how.
        suffix: of its files; empty where the artifact is a folder.
        export: writes the artifact.
        open: opens an artifact with a number of threads.
        snippet: how to run the artifact, with fields ``file`` and ``shape``.
        check: reads off a file what would go wrong in this runtime.
        inside: shows the values inside an artifact, where the runtime can.
        prepare: changes the folded float model before it is quantized, where the target lacks an operator.
        convert: writes the artifact from an ONNX file of kompakt's, where the target takes one.
        extra: the extra of kompakt that installs what it needs; empty where nothing is needed.
        modules: the modules that the extra must bring.
        note: what a user has to know, in a line.
    """

    rules: Rules
    suffix: str
    export: Export
    open: Callable[[str | Path, int], Runtime]
    snippet: str
    check: Callable[[Path], tuple[Finding, ...]] = no_checks
    inside: Inside | None = None
    prepare: Callable[[Capture], Capture] = as_it_is
    convert: Callable[[Path, Path], Path] | None = None
    extra: str = ""
    modules: tuple[str, ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        """The target's name."""
        return self.rules.target

    def ready(self) -> "Target":
        """Return this target if what it needs is installed.

        Raises:
            MissingExtraError: a module is missing; the line has the install command.
        """
        for module in self.modules:
            if find_spec(module) is None:
                raise MissingExtraError(
                    f'target {self.name}: {module} is not installed; pip install "kompakt[{self.extra}]"'
                )
        return self
