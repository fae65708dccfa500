"""QONNX: integers of any width as ``Quant`` nodes, for FPGA tools (FINN, hls4ml); executed by the qonnx package.

Every scale is a power of two and every zero point 0, so that sums of integers are exact in float32 and the file
computes what was simulated to the bit (while a layer's sums stay below 2^24).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor, fx

from kompakt.artifact.emit import FORMS, Arguments, Writer, emit
from kompakt.artifact.lint import Finding
from kompakt.artifact.targets.target import Target
from kompakt.build.averages import averages_as_convolutions
from kompakt.build.layers import BiasQuantizer, Quantizer
from kompakt.errors import FormatError, ModelError
from kompakt.files import atomic_path
from kompakt.graph.trace import Capture, attribute
from kompakt.plan.rules import ONNXRUNTIME
from kompakt.spec import PerChannel, PerGroup, QuantSpec

DOMAIN, VERSION = "qonnx.custom_op.general", 1
_CONV, _LINEAR = torch.ops.aten.conv2d.default, torch.ops.aten.linear.default
Weight = Callable[[Writer, fx.Node, fx.Node], str]
_WEIGHT = QuantSpec(bits=8, granularity=PerChannel(), narrow=True, power_of_two=True)
RULES = replace(
    ONNXRUNTIME,
    target="qonnx",
    weight=_WEIGHT,
    weight_depthwise=_WEIGHT,
    activation=QuantSpec(bits=8, power_of_two=True),
    positive=QuantSpec(bits=8, signed=False, symmetric=False, power_of_two=True),
    joins=frozenset({"add"}),
    pools=frozenset(),
)
"""Signed integers, unsigned ones behind a ReLU, zero point 0, scales 2ⁿ, those of weights by channel."""

SNIPPET = """\
import numpy as np
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx

model = ModelWrapper("{file}")
batch = np.zeros({shape}, dtype=np.float32)  # put your input here, prepared as for training
name, output = model.graph.input[0].name, model.graph.output[0].name
print(execute_onnx(model, {{name: batch}})[output].argmax(axis=1))
"""


def export(capture: Capture, path: str | Path, *, metadata: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write a capture, float or quantized, with ``Quant`` nodes and a batch of one.

    Raises:
        ModelError: an operator, or a kind of integers, has no form in QONNX.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    model = quant_nodes(capture)
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    clean = cleanup_model(ModelWrapper(model))
    with atomic_path(Path(path)) as temporary:
        clean.save(str(temporary))
    return Path(path)


def quant_nodes(capture: Capture, *, one_grid: bool = False) -> onnx.ModelProto:
    """Return a capture as an ONNX model with ``Quant`` nodes.

    Args:
        capture: float or quantized.
        one_grid: give a weight whose channels have scales of their own the finest of them, and as many more bits as
            that takes: the same values, and no multiplication behind the layer.

    Raises:
        ModelError: it holds what QONNX has no form for.
    """
    _refuse(capture.module)
    weight = _weight_on_one_grid if one_grid else _weight
    forms = {**_FORMS, _CONV: partial(_conv, weight=weight), _LINEAR: partial(_linear, weight=weight)}
    model = emit(capture.module, forms, {DOMAIN: VERSION})
    if model is None:
        raise ModelError(f"QONNX: {_unknown(capture.module, forms)} has no form here; write it with {_known()}")
    read = {name for node in model.graph.node for name in node.input}
    kept = [item for item in model.graph.initializer if item.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def _refuse(module: fx.GraphModule) -> None:
    """Refuse integers without a form, by the tensor that has them."""
    for node in module.graph.nodes:
        made = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(made, Quantizer) and (made.spec.dynamic or isinstance(made.spec.granularity, PerGroup)):
            raise ModelError(f"{node.args[0]}: QONNX has no dynamic ranges and no groups; quantize it statically")
        if made is not None and not isinstance(made, Quantizer | BiasQuantizer):
            raise ModelError(f"{node.args[0]}: {type(made).__name__} has no form in QONNX; use uniform integers")


def _unknown(module: fx.GraphModule, forms: Mapping[Any, Any]) -> str:
    """Name the first operator without a form; where each has one, it is a use of one that has none."""
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and "sym_size" not in str(node.target)]
    return next((f"{node.name} ({node.target})" for node in nodes if node.target not in forms), "a use of an operator")


def _known() -> str:
    return ", ".join(sorted(str(form).removeprefix("aten.") for form in FORMS if str(form).startswith("aten.")))


def _quantized(writer: Writer, node: fx.Node, given: Arguments) -> None:
    """Round an activation; a weight is written where it is read, as it lies there."""
    made = writer.module.get_submodule(str(node.target))
    if isinstance(made, Quantizer) and node.args[0].op != "get_attr":
        _quant(writer, node.args[0].name, node.name, made.spec, made.scale)


def _quant(writer: Writer, source: str, output: str, spec: "QuantSpec | _Wide", scale: Tensor) -> str:
    numbers = {"scale": scale.numpy(), "zero_point": np.zeros((), np.float32), "bits": np.float32(spec.bits)}
    read = [writer.store(f"{output}_{name}", np.asarray(value, dtype=np.float32)) for name, value in numbers.items()]
    flags = {"signed": int(spec.signed), "narrow": int(spec.narrow), "rounding_mode": "ROUND"}
    return writer.add("Quant", [source, *read], output, domain=DOMAIN, **flags)


def _weight(writer: Writer, node: fx.Node, reader: fx.Node) -> str:
    """Write the weight of a layer, rounded where it has a quantizer, and return its name."""
    value, made, name = _given(writer, node, reader, "kernel")
    if not isinstance(made, Quantizer):
        return writer.store(name, (value.t() if reader.target == _LINEAR else value).contiguous().numpy())
    scale = made.scale.reshape(-1, *[1] * (value.ndim - 1)) if made.scale.ndim else made.scale
    if reader.target == _LINEAR:
        value, scale = value.t().contiguous(), scale.t().contiguous() if scale.ndim else scale
    return _quant(writer, writer.store(f"{name}_float", value.numpy()), name, made.spec, scale)


def _weight_on_one_grid(writer: Writer, node: fx.Node, reader: fx.Node) -> str:
    value, made, name = _given(writer, node, reader, "kernel")
    rounded = made(value) if isinstance(made, Quantizer) else value
    rounded = rounded.t().contiguous() if reader.target == _LINEAR else rounded
    if not isinstance(made, Quantizer):
        return writer.store(name, rounded.numpy())
    used = value.flatten(1).abs().amax(1) > 0 if made.scale.ndim else torch.ones((), dtype=torch.bool)
    return _on_one_grid(writer, name, rounded, made.scale[used].min() if bool(used.any()) else made.scale.max())


def _bias(writer: Writer, node: fx.Node, reader: fx.Node) -> str:
    """Write a bias, rounded to one grid for all channels that holds each channel's own, and return its name."""
    value, made, name = _given(writer, node, reader, "offset")
    if not isinstance(made, BiasQuantizer):
        return writer.store(name, value.numpy())
    return _on_one_grid(writer, name, made(value), made.scale.min())


def _given(writer: Writer, node: fx.Node, reader: fx.Node, end: str) -> tuple[Tensor, object, str]:
    """A stored tensor, what rounds it, and a name for it."""
    made = writer.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return attribute(writer.module, str(_read(node).target)).detach(), made, f"{reader.name}_{end}"


def _on_one_grid(writer: Writer, name: str, rounded: Tensor, step: Tensor) -> str:
    width = int((rounded / step).abs().max().clamp_min(1).log2().floor()) + 2
    return _quant(writer, writer.store(f"{name}_float", rounded.numpy()), name, _Wide(bits=width), step)


@dataclass(frozen=True, kw_only=True)
class _Wide:
    """Integers that may be wider than those of a ``QuantSpec``."""

    bits: int
    signed: bool = True
    narrow: bool = False


def _conv(writer: Writer, node: fx.Node, given: Arguments, weight: Weight) -> None:
    kernel = list(attribute(writer.module, str(_read(given["weight"]).target)).shape[2:])
    bias = None if given["bias"] is None else _bias(writer, given["bias"], node)
    FORMS[_CONV](writer, node, {**given, "weight": weight(writer, given["weight"], node), "bias": bias})
    writer.nodes[-1].attribute.append(onnx.helper.make_attribute("kernel_shape", kernel))


def _read(node: fx.Node) -> fx.Node:
    """The read of a tensor, behind what rounds it."""
    source = node.args[0] if node.op == "call_module" else node
    assert isinstance(source, fx.Node)
    return source


def _linear(writer: Writer, node: fx.Node, given: Arguments, weight: Weight) -> None:
    bias = None if given["bias"] is None else _bias(writer, given["bias"], node)
    kernel = weight(writer, given["weight"], node)
    product = writer.add("MatMul", [given["input"], kernel], f"{node.name}_product" if bias else node.name)
    if bias:
        writer.add("Add", [product, bias], node.name)


_FORMS: dict[Any, Any] = {
    **FORMS,
    Quantizer: _quantized,
    BiasQuantizer: _quantized,
}


@dataclass(frozen=True, kw_only=True)
class Executed:
    """A QONNX file, executed node by node; one batch size after another."""

    model: Any

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run one batch."""
        from qonnx.core.onnx_exec import execute_onnx
        from qonnx.transformation.change_batchsize import ChangeBatchSize
        from qonnx.transformation.infer_shapes import InferShapes

        sized = self.model.transform(ChangeBatchSize(len(batch))).transform(InferShapes())
        found = execute_onnx(sized, {sized.graph.input[0].name: np.ascontiguousarray(batch)})
        return found[sized.graph.output[0].name]


def open_qonnx(path: str | Path, threads: int = 1) -> Executed:
    """Load a QONNX file; its executor has no threads of its own.

    Raises:
        FormatError: it is missing, truncated, or something else.
    """
    from qonnx.core.modelwrapper import ModelWrapper

    return Executed(model=ModelWrapper(_load(path)))


def _load(path: str | Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path))
    except (OSError, DecodeError) as error:
        raise FormatError(f"{path}: not a QONNX file: {str(error).splitlines()[0][:200]}") from None
    if not any(item.domain == DOMAIN for item in model.opset_import):
        raise FormatError(f"{path}: an ONNX file without {DOMAIN}; kompakt export --to qonnx writes one")
    return model


def check(path: Path) -> tuple[Finding, ...]:
    """Find the ``Quant`` nodes that fixed point does not hold: a scale that is not 2ⁿ, a zero point that is not 0."""
    model = _load(path)
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "Quant":
            continue
        scale, zero = stored.get(node.input[1]), stored.get(node.input[2])
        powers = scale is not None and bool((np.frexp(scale)[0] == 0.5).all())
        if not powers or zero is None or zero.any():
            what = "its zero point is not 0" if powers else "its scale is no power of two"
            mend = "export the model by kompakt export --to qonnx"
            found.append(Finding(where=node.name or node.output[0], what=what, mend=mend, rule="fixed point"))
    return tuple(found)


TARGET = Target(
    rules=RULES,
    suffix=".onnx",
    export=export,
    open=open_qonnx,
    snippet=SNIPPET,
    check=check,
    prepare=averages_as_convolutions,
    extra="fpga",
    modules=("qonnx",),
    note="a QONNX file has a batch of one; its integers are for FPGA tools, ONNX Runtime does not open it",
)
