"""kompakt on one subject: ``python -m benchmarks.peers.ours KEY FOLDER SHELF OUT [VARIANT]``.

Timed from the model in memory to the int8 file; then, for itself, the export of the float model, which the
peers start from. Prints the seconds of each step too.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.clock import tell, timed
from benchmarks.ptq_subjects import build
from kompakt.artifact.onnx import export_onnx
from kompakt.build.quantize import quantize
from kompakt.graph.calibrate import calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.methods.uniform import Knobs, uniform
from kompakt.plan.rules import ONNXRUNTIME, placed

BATCH = 32
EXACT = replace(ONNXRUNTIME, weight=replace(ONNXRUNTIME.weight, saturation_free=False))
VARIANTS = {
    "default": (ONNXRUNTIME, Knobs()),
    "mse": (ONNXRUNTIME, Knobs(weight_range="mse")),
    "8bit": (EXACT, Knobs(weight_range="mse")),
}
"""Rules and knobs; ``8bit`` gives up what keeps sums in int16 on x86 without VNNI, as the peers' defaults do."""


def run(model: torch.nn.Module, inputs: torch.Tensor, out: Path, variant: str) -> dict[str, float]:
    """Quantize ``model`` into ``out / model.onnx``; the wall seconds of each step."""
    rules, chosen = VARIANTS[variant]
    steps: dict[str, dict[str, float]] = {}
    capture, steps["trace"] = timed(lambda: fold(trace(model, inputs[:2])))
    names = [name for name, like in placed(capture.graph, rules).items() if like is None]
    stats, steps["calibrate"] = timed(lambda: calibrate(capture, inputs.split(BATCH), names))
    plan, _ = uniform(capture.graph, rules, chosen)
    made, steps["quantize"] = timed(lambda: quantize(capture, plan, stats))
    _, steps["export"] = timed(lambda: export_onnx(made, out / "model.onnx"))
    return {f"{name}_s": seconds["wall_s"] for name, seconds in steps.items()}


def main() -> None:
    key, folder, shelf, out = sys.argv[1], *map(Path, sys.argv[2:5])
    variant = sys.argv[5] if len(sys.argv) > 5 else "default"
    inputs, model = torch.from_numpy(np.load(folder / "calibration.npy")), build(key, folder, shelf)
    steps, seconds = timed(lambda: run(model, inputs, out, variant))
    _, alone = timed(lambda: export_onnx(fold(trace(model, inputs[:2])), out.parent / "float_again.onnx"))
    (out.parent / "float_again.onnx").unlink()
    tell({**seconds, **steps, "float_export_s": alone["wall_s"]}, ("kompakt", "torch", "onnx", "onnxruntime"))


if __name__ == "__main__":
    main()
