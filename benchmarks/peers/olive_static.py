"""Olive's static quantization: ``python -m benchmarks.peers.olive_static FLOAT CALIBRATION OUT VARIANT``.

One pass of its workflow, on a data set of ours; it drives ONNX Runtime's quantizer, with its pre-processing and its
own choice of what is quantized.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from olive.data.registry import Registry
from olive.workflows import run as workflow

from benchmarks.peers.clock import tell, timed

ADVISED = {"activation_type": "uint8", "precision": "int8", "per_channel": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "u8s8-per-channel-7bit": {**ADVISED, "reduce_range": True, "prepare_qdq_config": False},
    "default": {},
}


class Inputs:
    """Calibration inputs as a data set: one after another, with labels that nobody reads."""

    def __init__(self, inputs: np.ndarray, name: str) -> None:
        self.inputs, self.name = inputs, name

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        return {self.name: self.inputs[index]}, 0


@Registry.register_dataset("calibration_inputs")
def calibration_inputs(path: str, name: str, **_: Any) -> Inputs:
    """Load the calibration inputs."""
    return Inputs(np.load(path), name)


def run(source: Path, calibration: Path, out: Path, variant: str) -> None:
    """Quantize ``source`` into ``out / model.onnx``."""
    name = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    data = {
        "name": "calibration",
        "load_dataset_config": {
            "type": "calibration_inputs",
            "params": {"path": str(calibration.resolve()), "name": name},
        },
        "dataloader_config": {"params": {"batch_size": 1}},
    }
    with tempfile.TemporaryDirectory() as folder:
        workflow(
            {
                "input_model": {"type": "OnnxModel", "model_path": str(source)},
                "data_configs": [data],
                "passes": {
                    "quantize": {"type": "OnnxStaticQuantization", "data_config": "calibration", **VARIANTS[variant]}
                },
                "output_dir": str(Path(folder) / "made"),
                "cache_dir": str(Path(folder) / "cache"),
                "log_severity_level": 3,
            }
        )
        (found,) = (Path(folder) / "made").rglob("*.onnx")
        found.replace(out / "model.onnx")


def main() -> None:
    source, calibration, out, variant = sys.argv[1:5]
    _, seconds = timed(lambda: run(Path(source), Path(calibration), Path(out), variant))
    tell(seconds, ("olive-ai", "onnxruntime", "onnx"))


if __name__ == "__main__":
    main()
