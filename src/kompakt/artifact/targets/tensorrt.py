"""TensorRT: GPU servers. The artifact is an ONNX file with explicit QDQ by TensorRT's rules.

The engine is built where the GPU is (``trtexec --onnx=model.onnx --int8``); here the file is checked
against the rules, and its numbers by ONNX Runtime with every optimisation off.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import onnx

from kompakt.artifact.inside import onnx_inside_as_written
from kompakt.artifact.lint import check_tensorrt
from kompakt.artifact.onnx import Options, Runtime, export_onnx, open_onnx
from kompakt.artifact.stored import float_biases
from kompakt.artifact.targets.target import Target
from kompakt.files import atomic_path
from kompakt.graph.trace import Capture
from kompakt.plan.rules import ONNXRUNTIME
from kompakt.spec import PerChannel, QuantSpec

_WEIGHT = QuantSpec(bits=8, granularity=PerChannel(), narrow=True)
RULES = replace(
    ONNXRUNTIME,
    target="tensorrt",
    weight=_WEIGHT,
    weight_depthwise=_WEIGHT,
    activation=QuantSpec(bits=8, signed=True, symmetric=True),
    needs_output=frozenset(),
    joins=frozenset({"add"}),
)
"""int8 symmetric everywhere, zero point 0; sums in int32, so all 8 bits of the weights are used."""

SNIPPET = """\
import tensorrt as trt

logger = trt.Logger()
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file("{file}"), parser.get_error(0)
profile, config = builder.create_optimization_profile(), builder.create_builder_config()
shape = {shape}
profile.set_shape(network.get_input(0).name, shape, (8, *shape[1:]), (64, *shape[1:]))
config.add_optimization_profile(profile)
open("model.plan", "wb").write(builder.build_serialized_network(network, config))
"""


def export(capture: Capture, path: str | Path, *, metadata: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write a capture, float or quantized; biases stay float, as TensorRT wants them."""
    path = export_onnx(capture, path, metadata=metadata)
    model = onnx.load(str(path))
    float_biases(model)
    with atomic_path(path) as temporary:
        onnx.save_model(model, str(temporary))
    return path


def open_reference(path: str | Path, threads: int = 1) -> Runtime:
    """Open the file in ONNX Runtime, every operator as it is written: the numbers, not the speed."""
    return open_onnx(path, options=Options(threads=threads, level="disabled"))


TARGET = Target(
    rules=RULES,
    suffix=".onnx",
    export=export,
    open=open_reference,
    snippet=SNIPPET,
    check=check_tensorrt,
    inside=onnx_inside_as_written,
    note="no TensorRT engine is built here; checked by TensorRT's rules and by ONNX Runtime unoptimised, not timed",
)
