"""What each layer became: its bits, its error against the float model, its time in the runtime."""

import json
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from kompakt.artifact.onnx import open_onnx
from kompakt.artifact.targets.openvino import open_openvino
from kompakt.build.layers import Codebook, Quantizer
from kompakt.build.quantize import codebooks, quantizers, two_valued
from kompakt.graph.trace import Capture, attribute
from kompakt.measure.bench import op_times
from kompakt.measure.parity import sqnr_db
from kompakt.measure.result import Layer

# ONNX Runtime adds endings to the names of nodes that it fuses or lays out anew.
_NODE = re.compile(r"^(?:node_)?(.+?)(?:_token_\d+|_nchwc|_quant|_fused)*$")


def layer_table(
    original: Capture, quantized: Capture, inputs: Tensor, times: Mapping[str, float], notes: Mapping[str, str]
) -> tuple[Layer, ...]:
    """Describe every layer.

    Args:
        original: the folded float capture.
        quantized: the same with quantizers.
        inputs: a batch on which outputs are compared.
        times: op → milliseconds, see ``node_times``.
        notes: op → what to say of it.
    """
    names = [op.name for op in original.graph.layers]
    before, after = outputs_of(original, inputs, names), outputs_of(quantized, inputs, names)
    made, books, two = quantizers(quantized.module), codebooks(quantized.module), two_valued(quantized.module)
    return tuple(
        Layer(
            name=op.module or op.name,
            kind=op.kind,
            shape=original.graph.tensor[str(op.ref("weight"))].shape,
            params=original.graph.tensor[str(op.ref("weight"))].numel,
            macs=op.macs,
            weight_bits=_weight_bits(made, books, op.ref("weight")),
            activation_bits=1 if op.ref("input") in two else _bits(made, op.ref("input")),
            weight_sqnr_db=_weight_sqnr(original, quantized, made, str(op.ref("weight"))),
            output_sqnr_db=_finite(sqnr_db(before[op.name], after[op.name])),
            latency_ms=times.get(op.name),
            note=notes.get(op.name, ""),
        )
        for op in original.graph.layers
    )


def outputs_of(capture: Capture, inputs: Tensor, names: Collection[str]) -> dict[str, np.ndarray]:
    """Run a capture and return the outputs of the ops called ``names``."""
    found: dict[str, np.ndarray] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name in wanted and isinstance(value, Tensor):
                found[n.name] = value.numpy()
            return value

    wanted = frozenset(names)
    with torch.inference_mode():
        Keep(capture.module).run(inputs)
    return found


def node_times(path: str | Path, batch: np.ndarray, *, runs: int = 10, threads: int = 1) -> dict[str, float]:
    """Time each op of an ONNX file in ONNX Runtime, in milliseconds an inference, by its name in the capture.

    Fused ops bear the name of one of their parts, and the time is that of the whole.
    """
    with tempfile.TemporaryDirectory() as folder:
        runtime = open_onnx(path, threads, profile=Path(folder) / "profile")
        for _ in range(runs):
            runtime(batch)
        events = json.loads(Path(runtime.session.end_profiling()).read_text())
    found: dict[str, float] = {}
    for name, milliseconds in op_times(events).items():
        key = _NODE.sub(r"\1", name)
        found[key] = found.get(key, 0.0) + milliseconds
    return found


def openvino_times(path: str | Path, batch: np.ndarray, *, runs: int = 10, threads: int = 1) -> dict[str, float]:
    """Time each node of an artifact in OpenVINO, in milliseconds an inference, by the name that OpenVINO gives it."""
    runtime = open_openvino(path, threads, profile=True)
    found: dict[str, float] = {}
    for _ in range(runs):
        runtime(batch)
        for item in runtime.request.get_profiling_info():
            found[item.node_name] = found.get(item.node_name, 0.0) + item.real_time.total_seconds() * 1000 / runs
    return {name: milliseconds for name, milliseconds in found.items() if milliseconds}


RUNTIME_TIMES = {"onnxruntime": node_times, "openvino": openvino_times}
"""Runtime → what reads the times of its nodes; the others tell none through Python."""


def _bits(made: Mapping[str, Quantizer], name: str | None) -> float:
    return float(made[name].spec.bits) if name is not None and name in made else 32.0


def _weight_bits(made: Mapping[str, Quantizer], books: Mapping[str, Codebook], name: str | None) -> float:
    return float(books[name].bits) if name is not None and name in books else _bits(made, name)


def _weight_sqnr(original: Capture, quantized: Capture, made: Mapping[str, Quantizer], name: str) -> float | None:
    if name not in made:
        return None
    weight, stored = (attribute(each.module, name).detach() for each in (original, quantized))
    with torch.no_grad():
        return _finite(sqnr_db(weight.numpy(), made[name](stored).numpy()))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
