"""LiteRT (TensorFlow Lite): phones, microcontrollers, NPUs. The artifact is a ``.tflite`` for batches of one.

Quantized, it is integer from end to end: input and output are int8, with the scale and zero point that the file tells.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from kompakt.artifact.decomposed import to_decomposed
from kompakt.artifact.lint import Finding
from kompakt.artifact.targets.target import Target
from kompakt.build.quantize import quantizers
from kompakt.errors import FormatError, ModelError
from kompakt.files import atomic_write
from kompakt.graph.trace import Capture, quiet_torch
from kompakt.plan.rules import ONNXRUNTIME
from kompakt.spec import PerChannel, QuantSpec

_WEIGHT = QuantSpec(bits=8, granularity=PerChannel(), narrow=True)
RULES = replace(
    ONNXRUNTIME,
    target="litert",
    weight=_WEIGHT,
    weight_depthwise=_WEIGHT,
    activation=QuantSpec(bits=8, signed=True, symmetric=False),
    needs_output=frozenset({"conv2d", "linear"}),
    one_grid=frozenset({"cat", "avg_pool2d"}),
)
"""s8 activations with a zero point, s8 symmetric weights by channel, int32 sums: the LiteRT 8-bit specification.

https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec
"""

SNIPPET = """\
import numpy as np
from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter("{file}", num_threads=1)
interpreter.allocate_tensors()
source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
batch = np.zeros({shape}, dtype=np.float32)  # put your input here, prepared as for training
scale, zero_point = source["quantization"]
if scale:
    batch = np.clip(np.round(batch / scale) + zero_point, -128, 127).astype(np.int8)
interpreter.set_tensor(source["index"], batch)
interpreter.invoke()
print(interpreter.get_tensor(result["index"]).argmax(axis=1))
"""


@dataclass(frozen=True, kw_only=True)
class Interpreted:
    """An interpreter with its tensors allocated."""

    interpreter: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input."""
        return tuple(int(size) for size in self.interpreter.get_input_details()[0]["shape"])

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run a batch, one example after the other; integers become floats on the file's own grids."""
        source, result = self.interpreter.get_input_details()[0], self.interpreter.get_output_details()[0]
        found = []
        for example in np.split(_into(batch, source), len(batch)):
            self.interpreter.set_tensor(source["index"], np.ascontiguousarray(example))
            self.interpreter.invoke()
            found.append(self.interpreter.get_tensor(result["index"]))
        return _out(np.concatenate(found), result)


def _into(batch: np.ndarray, source: Mapping[str, Any]) -> np.ndarray:
    scale, zero_point = source["quantization"]
    if not scale:
        return batch.astype(source["dtype"], copy=False)
    ends = np.iinfo(source["dtype"])
    # In float32, half to even: as the simulated model rounds.
    steps = np.round(batch.astype(np.float32) / np.float32(scale)) + zero_point
    return np.clip(steps, ends.min, ends.max).astype(source["dtype"])


def _out(values: np.ndarray, result: Mapping[str, Any]) -> np.ndarray:
    scale, zero_point = result["quantization"]
    return (values.astype(np.float32) - np.float32(zero_point)) * np.float32(scale) if scale else values


def export(capture: Capture, path: str | Path, *, metadata: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write a capture, float or quantized.

    Raises:
        ModelError: an operator has no form in LiteRT.
    """
    one = tuple(x[:1].contiguous() for x in capture.example)
    try:
        with _silence(), quiet_torch():
            import litert_torch
            from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
            from litert_torch.quantize.quant_config import QuantConfig

            # Only tells the converter that the graph is quantized already, so that it fuses integers.
            said = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
            config = QuantConfig(pt2e_quantizer=said) if quantizers(capture.module) else None
            made = litert_torch.convert(to_decomposed(capture, stored=False), one, quant_config=config)
            content = made.model_content()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        raise ModelError(f"LiteRT: {type(error).__name__}: {lines[0].strip()[:300]}") from error
    atomic_write(Path(path), content)
    return Path(path)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the converter's progress and its log, which go to the streams of the process, off the screen."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
        logging.disable(level)


def open_litert(path: str | Path, threads: int = 1) -> Interpreted:
    """Load a file.

    Raises:
        FormatError: it is missing, truncated, or something else.
    """
    try:
        content = Path(path).read_bytes()
        if content[4:8] != b"TFL3":
            raise ValueError("it has no TFL3 mark")
        with _silence():
            interpreter = _interpreter(content, threads)
    except (OSError, RuntimeError, ValueError) as error:
        raise FormatError(f"{path}: LiteRT cannot open it: {str(error).splitlines()[0][:200]}") from None
    return Interpreted(interpreter=interpreter)


def _interpreter(content: bytes, threads: int, *, whole: bool = False) -> Any:
    """Make an interpreter; ``whole`` keeps every tensor and leaves all operators to LiteRT's own kernels."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    more: dict[str, Any] = {}
    if whole:
        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        more = {"experimental_preserve_all_tensors": True, "experimental_op_resolver_type": plain}
    made = Interpreter(model_content=content, num_threads=threads, **more)
    made.allocate_tensors()
    return made


def inside(path: Path, inputs: np.ndarray, grids: Mapping[str, tuple[float, int]]) -> dict[str, np.ndarray]:
    """Show the values inside by LiteRT's own kernels; the converter renames tensors, so each is known by its grid."""
    opened = _interpreter(Path(path).read_bytes(), 1, whole=True)
    by_grid = {(np.float32(scale), zero): name for name, (scale, zero) in grids.items()}
    places: dict[str, Any] = {}
    for detail in opened.get_tensor_details():
        scale, zero = detail["quantization"]
        # The value that pads a tensor is on its grid too, and has no dimension.
        batched = detail["dtype"] is np.int8 and len(detail["shape"]) > 1
        name = by_grid.get((np.float32(scale), zero)) if batched else None
        if name is not None:
            places.setdefault(name, detail)
    source = opened.get_input_details()[0]
    seen: dict[str, list[np.ndarray]] = {name: [] for name in places}
    for example in np.split(_into(inputs, source), len(inputs)):
        opened.set_tensor(source["index"], example)
        opened.invoke()
        for name, detail in places.items():
            seen[name].append(_first_channels(_out(opened.get_tensor(detail["index"]), detail)))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def _first_channels(value: np.ndarray) -> np.ndarray:
    """Put channels, which LiteRT keeps last, where PyTorch has them."""
    return value.transpose(0, 3, 1, 2) if value.ndim == 4 else value


def check(path: Path) -> tuple[Finding, ...]:
    """Find operators that run in float in an integer file, those that only this runtime has, and open shapes."""
    open_litert(path)  # says in one line what is not a model
    with _silence():
        opened = _interpreter(path.read_bytes(), 1, whole=True)
    details = {item["index"]: item for item in opened.get_tensor_details()}
    kinds = {index: np.dtype(item["dtype"]) for index, item in details.items()}
    integer = np.int8 in kinds.values()
    found = []
    for item in opened._get_ops_details():
        name = item["op_name"]
        made = [kinds[index] for index in item["outputs"] if index in kinds]
        where = ", ".join(str(details[index]["name"])[-60:] for index in item["outputs"] if index in details) or name
        if integer and np.float32 in made and name != "DEQUANTIZE":
            what = f"{name} runs in float: no integer kernel, so microcontrollers and NPUs cannot run it"
            mend = "give it quantized inputs and output, or replace it"
            found.append(Finding(where=where, what=what, mend=mend, rule="float"))
        elif name.startswith(("STABLEHLO_", "Flex", "CUSTOM")):
            what = f"{name}: not among LiteRT's builtin operators for small devices"
            mend = "replace the layer by one of ordinary operators, and export again"
            found.append(Finding(where=where, what=what, mend=mend, rule="type"))
    for source in opened.get_input_details():
        if -1 in source["shape_signature"]:
            what = f"input shape {tuple(source['shape_signature'])} is open; NPUs and microcontrollers want it fixed"
            mend = "export it by kompakt export --to litert, which fixes it"
            found.append(Finding(where=source["name"], what=what, mend=mend, rule="shape"))
    return tuple(found)


TARGET = Target(
    rules=RULES,
    suffix=".tflite",
    export=export,
    open=open_litert,
    snippet=SNIPPET,
    check=check,
    inside=inside,
    extra="litert",
    modules=("litert_torch", "ai_edge_litert"),
    note="a .tflite is for batches of one; quantized, its input and output are int8",
)
