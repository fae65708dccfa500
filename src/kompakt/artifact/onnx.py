"""Export to ONNX for ONNX Runtime, open a session, and read what the runtime made of the file."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxscript import opset21 as op
from torch import nn

from kompakt.artifact.emit import emit
from kompakt.artifact.moves import move_integers
from kompakt.artifact.nibbles import pack_nibbles, pack_weights
from kompakt.artifact.pads import absorb_pads
from kompakt.artifact.qdq import to_integers
from kompakt.build.quantize import quantizers
from kompakt.errors import FormatError, ModelError
from kompakt.files import atomic_path
from kompakt.graph.trace import Capture, quiet_torch

INTEGER_OPS = frozenset(
    {
        "QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QGemm", "QLinearConcat", "QLinearAveragePool",
        "QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "ConvInteger",
        "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLinear", "MatMulNBits",
    }
)  # fmt: skip
HEAVY_FLOAT_OPS = frozenset({"Conv", "FusedConv", "Gemm", "MatMul", "FusedGemm", "FusedMatMul", "ConvTranspose"})


def export_onnx(
    capture: Capture, path: str | Path, *, metadata: Mapping[str, str] = MappingProxyType({}), moves: bool = False
) -> Path:
    """Write a capture, float or quantized, as an ONNX file with a symbolic batch where the model has one.

    Args:
        capture: what to write.
        path: the file.
        metadata: goes into the file's ``metadata_props``.
        moves: whether slices and pads between integers move the integers themselves, as ONNX Runtime likes it.

    Raises:
        ModelError: an operator has no ONNX form; the message names it.
    """
    path = Path(path)
    module = to_integers(capture)
    model = emit(module)
    if model is None:
        model = _onnx_program(module, capture.example).model_proto
        _strip(model)
    absorb_pads(model)
    if moves:
        move_integers(model)
    _unshare_zero_points(model)
    pack_nibbles(model)
    if any(made.spec.packed for made in quantizers(capture.module).values()):
        pack_weights(model)
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    with atomic_path(path) as temporary:
        onnx.save_model(model, str(temporary))
    return path


def _onnx_program(module: nn.Module, example: tuple[torch.Tensor, ...]) -> "torch.onnx.ONNXProgram":
    dynamic = tuple({0: torch.export.Dim.AUTO} if x.ndim and x.shape[0] > 1 else None for x in example)
    with quiet_torch():
        try:
            exported = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
            made = torch.onnx.export(
                exported, dynamo=True, opset_version=21, custom_translation_table=_table(), verbose=False, optimize=True
            )
        except Exception as error:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise ModelError(f"ONNX export: {type(error).__name__}: {first[:300]}") from error
    assert made is not None
    return made


def _table() -> dict[Callable, Callable]:
    return {
        torch.ops.kompakt.quantize.default: _quantize,
        torch.ops.kompakt.dequantize.default: _dequantize,
        torch.ops.kompakt.dequantize_blocks.default: _dequantize_blocks,
        torch.ops.kompakt.dynamic_linear.default: _dynamic_linear,
        torch.ops.kompakt.lookup.default: _lookup,
        torch.ops.kompakt.lookup_rows.default: _lookup_rows,
        torch.ops.kompakt.global_average_pool.default: _global_average_pool,
    }


def _quantize(x, scale, zero_point):  # type: ignore[no-untyped-def]  # onnxscript reads the values
    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize(q, scale, zero_point, axis: int = 0):  # type: ignore[no-untyped-def]
    return op.DequantizeLinear(q, scale, zero_point, axis=axis)


def _dequantize_blocks(q, scale, zero_point, axis: int, size: int):  # type: ignore[no-untyped-def]
    return op.DequantizeLinear(q, scale, zero_point, axis=axis, block_size=size)


def _lookup(indices, values):  # type: ignore[no-untyped-def]
    return op.Gather(values, op.Cast(indices, to=6))


def _lookup_rows(indices, values):  # type: ignore[no-untyped-def]
    return op.GatherElements(values, op.Cast(indices, to=6), axis=1)


def _global_average_pool(x):  # type: ignore[no-untyped-def]
    return op.GlobalAveragePool(x)


def _dynamic_linear(x, weight, weight_scale, weight_zero):  # type: ignore[no-untyped-def]
    integers, scale, zero = op.DynamicQuantizeLinear(x)
    product = op.MatMulInteger(integers, weight, zero, weight_zero)
    return op.Mul(op.Cast(product, to=1), op.Mul(scale, weight_scale))


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes for its own debugging, and call the symbolic batch ``batch``."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        if not isinstance(item, onnx.ModelProto):
            del item.metadata_props[:]
        if hasattr(item, "doc_string"):
            item.ClearField("doc_string")
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim[:1]:
            if dim.dim_param.isdigit():
                # The exporter's way to write a batch that the model's code fixes.
                dim.dim_value = int(dim.dim_param)
            elif dim.dim_param:
                dim.dim_param = "batch"


def _unshare_zero_points(model: onnx.ModelProto) -> None:
    """Give every DequantizeLinear and QuantizeLinear a zero point of its own.

    The exporter shares equal initializers; ONNX Runtime's ``session.x64quantprecision`` then fails with
    ``AddInitializedOrtValue Attempt to replace the existing tensor``.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    taken: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        name = node.input[2]
        if name not in stored:
            continue
        if name in taken and node.op_type == "DequantizeLinear" and node.input[0] in stored:
            copy = onnx.TensorProto()
            copy.CopyFrom(stored[name])
            copy.name = f"{node.input[0]}_zero_point_own"
            model.graph.initializer.append(copy)
            node.input[2] = copy.name
        taken.add(name)


LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
SPINNING, PRECISE = "session.intra_op.allow_spinning", "session.x64quantprecision"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How ONNX Runtime opens a file.

    Args:
        threads: intra-op threads.
        spinning: whether idle threads spin; None lets them where there is one.
        precise: ``session.x64quantprecision``: u8·s8 sums in int32 on x86 without VNNI, exact and slower.
        level: key of ``LEVELS``: how much the graph is optimised.
    """

    threads: int = 1
    spinning: bool | None = None
    precise: bool = False
    level: str = "all"

    @property
    def entries(self) -> dict[str, str]:
        """The session's configuration entries."""
        spins = self.threads == 1 if self.spinning is None else self.spinning
        return {SPINNING: str(int(spins))} | ({PRECISE: "1"} if self.precise else {})

    def session(self) -> ort.SessionOptions:
        """Return them as the runtime takes them."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = LEVELS[self.level]
        for key, value in self.entries.items():
            options.add_session_config_entry(key, value)
        return options

    def source(self) -> str:
        """Return the lines of Python that make ``options``."""
        lines = ["options = ort.SessionOptions()", f"options.intra_op_num_threads = {self.threads}"]
        if self.level != "all":
            lines.append(f"options.graph_optimization_level = ort.{LEVELS[self.level]}")
        lines += [f'options.add_session_config_entry("{key}", "{value}")' for key, value in self.entries.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """An open ONNX Runtime session and how it was opened."""

    session: ort.InferenceSession
    path: Path
    threads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input; open sizes are 1."""
        return tuple(size if isinstance(size, int) else 1 for size in self.session.get_inputs()[0].shape)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run a batch and return the first output; a file with a fixed batch is run as often as it takes."""
        source = self.session.get_inputs()[0]
        size = source.shape[0] if source.shape and isinstance(source.shape[0], int) else len(batch)
        pieces = [batch[start : start + size] for start in range(0, len(batch), max(size, 1))]
        return np.concatenate([self._piece(source.name, piece, size) for piece in pieces])

    def _piece(self, name: str, piece: np.ndarray, size: int) -> np.ndarray:
        short = size - len(piece)
        full = np.concatenate([piece, np.repeat(piece[-1:], short, axis=0)]) if short else piece
        return self.session.run(None, {name: full})[0][: len(piece)]


def open_onnx(
    path: str | Path,
    threads: int = 1,
    *,
    options: Options | None = None,
    optimized: Path | None = None,
    profile: Path | None = None,
) -> Runtime:
    """Open a file in ONNX Runtime on the CPU.

    Args:
        path: the file.
        threads: intra-op threads; with more than one, idle threads do not spin.
        options: how else to open it; instead of ``threads``.
        optimized: where to write the graph as the runtime optimised it, less what depends on the CPU.
        profile: where (a prefix) to write the runtime's own profile.

    Raises:
        FormatError: the file is missing, is not an ONNX model, or the runtime cannot run it.
    """
    asked = options or Options(threads=threads)
    settings = (asked if optimized is None else replace(asked, level="extended")).session()
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    if not Path(path).is_file():
        raise FormatError(f"{path}: no such file")
    try:
        session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own, one for each status
        raise FormatError(f"{path}: ONNX Runtime cannot open it: {str(error).splitlines()[0][:300]}") from None
    return Runtime(session=session, path=Path(path), threads=asked.threads)


def runtime_graph(path: str | Path) -> onnx.ModelProto:
    """Return a file's graph after ONNX Runtime's own optimisation, as it would run it."""
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "optimized.onnx"
        open_onnx(path, optimized=seen)
        return onnx.load(str(seen), load_external_data=False)


def runtime_ops(path: str | Path) -> dict[str, int]:
    """Count the operators of a file after ONNX Runtime's own optimisation."""
    return dict(Counter(node.op_type for node in runtime_graph(path).graph.node))


def copy_onnx(source: Path, path: Path) -> Path:
    """Copy an ONNX file that stands alone."""
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
    return path
