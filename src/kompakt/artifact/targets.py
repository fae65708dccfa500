"""The runtimes that kompakt ships for: an explicit dict of ``Target``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kompakt.artifact.onnx import export_onnx, open_onnx
from kompakt.errors import InputError
from kompakt.graph.trace import Capture
from kompakt.plan.rules import ONNXRUNTIME, Rules

ORT_SNIPPET = """\
import numpy as np
import onnxruntime as ort

session = ort.InferenceSession("{file}", providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
batch = np.zeros({shape}, dtype=np.float32)  # put your input here, prepared as for training
outputs = session.run(None, {{name: batch}})[0]
print(outputs.argmax(axis=1))
"""


class Runtime(Protocol):
    """An open artifact: a batch of inputs → the first output."""

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run one batch."""


class Export(Protocol):
    """Writes a capture, float or quantized, as the target's file."""

    def __call__(self, capture: Capture, path: str | Path, *, metadata: Mapping[str, str]) -> Path:
        """Write the file and return its path."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A runtime: what it runs in integers, how its file is written and opened.

    Args:
        rules: what it can quantize and how.
        suffix: of its files.
        export: writes the file.
        open: opens a file with a number of threads.
        snippet: how to run the artifact, with fields ``file`` and ``shape``.
    """

    rules: Rules
    suffix: str
    export: Export
    open: Callable[[str | Path, int], Runtime]
    snippet: str

    @property
    def name(self) -> str:
        """The target's name."""
        return self.rules.target


TARGETS: dict[str, Target] = {
    "onnxruntime": Target(rules=ONNXRUNTIME, suffix=".onnx", export=export_onnx, open=open_onnx, snippet=ORT_SNIPPET),
}


def target(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        InputError: there is none; those that exist are named.
    """
    if name not in TARGETS:
        raise InputError(f"target {name}: unknown; use {', '.join(TARGETS)}")
    return TARGETS[name]
