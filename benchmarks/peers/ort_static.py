"""ONNX Runtime's ``quantize_static``: ``python -m benchmarks.peers.ort_static FLOAT CALIBRATION OUT VARIANT``.

The file goes through ``quant_pre_process`` first, as ONNX Runtime's guide says; that is part of the time.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.peers.clock import tell, timed

UNSIGNED = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
VARIANTS: dict[str, dict] = {
    "default": {},
    "u8s8-per-channel": UNSIGNED,
    "u8s8-per-channel-7bit": {**UNSIGNED, "reduce_range": True},
    "s8s8-per-channel": {"per_channel": True},
}
"""``quantize_static``'s own defaults, and what its documentation advises with VNNI, without it, and on ARM."""


class Reader(CalibrationDataReader):
    """Feeds calibration inputs in batches; the ranges do not depend on the batch."""

    def __init__(self, inputs: np.ndarray, name: str, batch: int) -> None:
        self.pieces = ({name: inputs[start : start + batch]} for start in range(0, len(inputs), batch))

    def get_next(self) -> dict | None:
        """Return the next batch, or None after the last."""
        return next(self.pieces, None)


def run(source: Path, inputs: np.ndarray, out: Path, variant: str, batch: int = 1) -> None:
    """Quantize ``source`` into ``out / model.onnx``."""
    name = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(source), str(ready))
        quantize_static(str(ready), str(out / "model.onnx"), Reader(inputs, name, batch), **VARIANTS[variant])


def main() -> None:
    source, calibration, out, variant = sys.argv[1:5]
    inputs = np.load(calibration)
    _, seconds = timed(lambda: run(Path(source), inputs, Path(out), variant))
    tell(seconds, ("onnxruntime", "onnx"))


if __name__ == "__main__":
    main()
