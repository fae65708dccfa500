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
    from ai_edge_litert.interpreter import Interpreter

    try:
        content = Path(path).read_bytes()
        if content[4:8] != b"TFL3":
            raise ValueError("it has no TFL3 mark")
        with _silence():
            interpreter = Interpreter(model_content=content, num_threads=threads)
            interpreter.allocate_tensors()
    except (OSError, RuntimeError, ValueError) as error:
        raise FormatError(f"{path}: LiteRT cannot open it: {str(error).splitlines()[0][:200]}") from None
    return Interpreted(interpreter=interpreter)


TARGET = Target(
    rules=RULES,
    suffix=".tflite",
    export=export,
    open=open_litert,
    snippet=SNIPPET,
    extra="litert",
    modules=("litert_torch", "ai_edge_litert"),
    note="a .tflite is for batches of one; quantized, its input and output are int8",
)
