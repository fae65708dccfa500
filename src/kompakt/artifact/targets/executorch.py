"""ExecuTorch: phones and embedded boards. The artifact is a ``.pte`` lowered to XNNPACK, for batches of one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from kompakt.artifact.decomposed import to_decomposed
from kompakt.artifact.lint import Finding
from kompakt.artifact.targets.target import Target
from kompakt.errors import FormatError, ModelError
from kompakt.files import atomic_write
from kompakt.graph.trace import Capture, quiet_torch
from kompakt.plan.rules import ONNXRUNTIME
from kompakt.spec import PerChannel, QuantSpec

_WEIGHT = QuantSpec(bits=8, granularity=PerChannel(), narrow=True)
RULES = replace(
    ONNXRUNTIME,
    target="executorch",
    weight=_WEIGHT,
    weight_depthwise=_WEIGHT,
    activation=QuantSpec(bits=8, signed=True, symmetric=False),
    needs_output=frozenset({"conv2d", "linear"}),
    one_grid=frozenset({"cat"}),
)
"""s8 activations with a zero point, s8 weights by channel; XNNPACK sums in int32: all 8 bits are used.

XNNPACK's concatenation copies bytes: what it joins must lie on one grid.
"""

SNIPPET = """\
import torch
from executorch.runtime import Runtime

method = Runtime.get().load_program("{file}").load_method("forward")
batch = torch.zeros({shape})  # put your input here, prepared as for training
outputs = method.execute([batch])[0]
print(outputs.argmax(dim=1))
"""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A loaded program; what loaded it is held with it."""

    method: Any
    program: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input."""
        return tuple(self.method.metadata.input_tensor_meta(0).sizes())

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run a batch, one example after the other."""
        examples = torch.from_numpy(np.ascontiguousarray(batch)).split(1)
        return np.concatenate([self.method.execute([example])[0].numpy().copy() for example in examples])


def export(capture: Capture, path: str | Path, *, metadata: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write a capture, float or quantized, lowered to XNNPACK.

    Raises:
        ModelError: an operator has no form in ExecuTorch.
    """
    one = tuple(x[:1].contiguous() for x in capture.example)
    try:
        with quiet_torch():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            program = torch.export.export(to_decomposed(capture), one, strict=False)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:
        raise ModelError(f"ExecuTorch: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}") from error
    atomic_write(Path(path), lowered.buffer)
    return Path(path)


def open_executorch(path: str | Path, threads: int = 1) -> Program:
    """Load a program.

    Raises:
        FormatError: it is missing, truncated, or something else.
    """
    with quiet_torch():
        from executorch.runtime import Runtime

    try:
        program = Runtime.get().load_program(Path(path).read_bytes())
        return Program(method=program.load_method("forward"), program=program)
    except (OSError, RuntimeError, ValueError) as error:
        raise FormatError(f"{path}: ExecuTorch cannot open it: {str(error).splitlines()[0][:200]}") from None


def check(path: Path) -> tuple[Finding, ...]:
    """Find what was left to the portable kernels, which are slow, and in float."""
    open_executorch(path)  # says in one line what is not a program
    with quiet_torch():
        from executorch.exir._serialize._program import deserialize_pte_binary
    plan = deserialize_pte_binary(path.read_bytes()).program.execution_plan[0]
    what = "is left to a portable kernel, outside XNNPACK"
    mend = "quantize its inputs and output, or replace it by an operator that XNNPACK has; then export again"
    return tuple(
        Finding(where=item.name, what=what, mend=mend, rule="float")
        for item in plan.operators
        if not any(word in item.name for word in _BOUNDARY)
    )


_BOUNDARY = ("quantize", "view_copy", "clone", "_copy", "permute", "to_dim_order")
"""Operators that stand at the edges of what XNNPACK runs, or only move values."""

TARGET = Target(
    rules=RULES,
    suffix=".pte",
    export=export,
    open=open_executorch,
    snippet=SNIPPET,
    check=check,
    extra="executorch",
    modules=("executorch",),
    note="a .pte is for batches of one; its threads are the library's own",
)
