"""NNCF's post-training quantization: ``python -m benchmarks.peers.nncf_ptq FLOAT CALIBRATION OUT VARIANT``.

From the same ONNX file, by its OpenVINO backend (an OpenVINO artifact) or its ONNX backend (an ONNX artifact).
Bias correction is on, as by default; all calibration inputs are used (its default would take 300).
"""

import sys
from pathlib import Path

import nncf
import numpy as np
import onnx
import openvino as ov
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

from benchmarks.peers.clock import tell, timed

VARIANTS: dict[str, tuple[str, dict]] = {
    "openvino": ("openvino", {}),
    "openvino-overflow-fix": ("openvino", {"overflow_fix": OverflowFix.ENABLE}),
    "onnx": ("onnx", {}),
    "onnx-overflow-fix": ("onnx", {"overflow_fix": OverflowFix.ENABLE}),
}


def run(source: Path, inputs: np.ndarray, out: Path, variant: str) -> None:
    """Quantize ``source`` into ``out / model.xml`` and ``.bin``, or ``out / model.onnx``."""
    backend, advanced = VARIANTS[variant]
    model = ov.Core().read_model(source) if backend == "openvino" else onnx.load(str(source))
    name = model.inputs[0].any_name if backend == "openvino" else model.graph.input[0].name
    data = nncf.Dataset(inputs, lambda one: {name: one[None]})
    parameters = AdvancedQuantizationParameters(**advanced) if advanced else None
    made = nncf.quantize(model, data, subset_size=len(inputs), advanced_parameters=parameters)
    if backend == "openvino":
        ov.save_model(made, out / "model.xml", compress_to_fp16=False)
    else:
        onnx.save_model(made, str(out / "model.onnx"))


def main() -> None:
    source, calibration, out, variant = sys.argv[1:5]
    inputs = np.load(calibration)
    _, seconds = timed(lambda: run(Path(source), inputs, Path(out), variant))
    tell(seconds, ("nncf", "openvino", "onnx"))


if __name__ == "__main__":
    main()
