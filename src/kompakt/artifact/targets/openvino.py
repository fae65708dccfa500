"""OpenVINO: Intel CPUs and edge boxes. The artifact is an ``.xml`` with its ``.bin`` beside it."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from kompakt.artifact.lint import Finding, check_openvino
from kompakt.artifact.lint_xml import check_xml
from kompakt.artifact.onnx import export_onnx
from kompakt.artifact.targets.target import Target
from kompakt.errors import FormatError
from kompakt.graph.trace import Capture
from kompakt.plan.rules import ONNXRUNTIME

RULES = replace(ONNXRUNTIME, target="openvino", weight_depthwise=ONNXRUNTIME.weight, sums_in_layer=True)
"""As ONNX Runtime: u8·s8 pairs are summed in int16 without VNNI; depthwise kernels are held free of it too. A residual
sum is made in the convolution's kernel: a quantizer between the two would be dropped there."""

SNIPPET = """\
import numpy as np
import openvino as ov

model = ov.Core().compile_model("{file}", "CPU", {{"PERFORMANCE_HINT": "LATENCY"}})
batch = np.zeros({shape}, dtype=np.float32)  # put your input here, prepared as for training
outputs = model(batch)[0]
print(outputs.argmax(axis=1))
"""


@dataclass(frozen=True, kw_only=True)
class OpenVino:
    """A compiled model."""

    request: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input; open sizes are 1."""
        declared = self.request.get_compiled_model().input(0).partial_shape
        return tuple(size.get_length() if size.is_static else 1 for size in declared)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run one batch."""
        return np.array(self.request.infer({0: batch})[0])


def convert(source: Path, path: Path) -> Path:
    """Write an ONNX file as OpenVINO's own two files."""
    import openvino

    openvino.save_model(openvino.convert_model(str(source)), str(path), compress_to_fp16=False)
    return path


def export(capture: Capture, path: str | Path, *, metadata: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write a capture, float or quantized, by way of ONNX."""
    with tempfile.TemporaryDirectory() as folder:
        return convert(export_onnx(capture, Path(folder) / "model.onnx", metadata=metadata), Path(path))


def check(path: Path) -> tuple[Finding, ...]:
    """Check an ONNX file, or a model of OpenVINO's own."""
    return check_xml(path) if path.suffix == ".xml" else check_openvino(path)


def open_openvino(path: str | Path, threads: int = 1, *, profile: bool = False) -> OpenVino:
    """Compile an ``.xml`` or ``.onnx`` file for the CPU; ``profile`` lets its requests tell the time of each node.

    Raises:
        FormatError: OpenVINO cannot read it.
    """
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    options |= {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": profile}
    try:
        model = openvino.Core().compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise FormatError(f"{path}: OpenVINO cannot open it: {lines[-1][:200]}") from None
    return OpenVino(request=model.create_infer_request())


TARGET = Target(
    rules=RULES,
    suffix=".xml",
    export=export,
    open=open_openvino,
    snippet=SNIPPET,
    check=check,
    convert=convert,
    extra="openvino",
    modules=("openvino",),
)
