"""NVIDIA ModelOpt's ONNX quantization: ``python -m benchmarks.peers.modelopt_onnx FLOAT CALIBRATION OUT VARIANT``.

int8 with quantize and dequantize nodes, symmetric, a scale a channel of the weights; calibrated on a CPU by the range
or by entropy. It is made for TensorRT; the file is run here in ONNX Runtime like the others.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from modelopt.onnx.quantization import quantize

from benchmarks.peers.clock import tell, timed

VARIANTS = ("max", "entropy")
"""How activations are calibrated; ``entropy`` is its default for int8."""


def run(source: Path, inputs: np.ndarray, out: Path, method: str) -> None:
    """Quantize ``source`` into ``out / model.onnx``."""
    name = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    quantize(
        onnx_path=str(source),
        quantize_mode="int8",
        calibration_data={name: inputs},
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        dq_only=True,
        output_path=str(out / "model.onnx"),
        log_level="ERROR",
    )


def main() -> None:
    source, calibration, out, variant = sys.argv[1:5]
    if variant not in VARIANTS:
        raise SystemExit(f"{variant}: expected one of {', '.join(VARIANTS)}")
    inputs = np.load(calibration)
    _, seconds = timed(lambda: run(Path(source).resolve(), inputs, Path(out), variant))
    tell(seconds, ("nvidia-modelopt", "onnxruntime", "onnx"))


if __name__ == "__main__":
    main()
