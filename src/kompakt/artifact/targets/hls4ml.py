"""hls4ml: FPGAs. The artifact is a project in C++ for AMD's Vitis HLS, with its C simulation for g++."""

import ctypes
import io
import json
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import which
from types import MappingProxyType
from typing import Any

import numpy as np

from kompakt.artifact.lint import Finding
from kompakt.artifact.targets import qonnx
from kompakt.artifact.targets.target import Target
from kompakt.build.averages import averages_as_convolutions
from kompakt.errors import FormatError, MissingExtraError, ModelError
from kompakt.files import atomic_write
from kompakt.graph.trace import Capture

DEFAULT = "fixed<32,16>"
"""Of what has no quantizer and whose type hls4ml does not infer."""
PROJECT, FACTS = "myproject", "kompakt.json"
RULES = replace(qonnx.RULES, target="hls4ml")

SNIPPET = """\
# synthesis, where Vitis HLS is: cd {file} && vitis-run --mode hls --tcl build_prj.tcl
import numpy as np
from kompakt.artifact.targets import target

simulation = target("hls4ml").open("{file}", 1)  # compiled by g++ at the first call
batch = np.zeros({shape}, dtype=np.float32)  # put your input here, prepared as for training
print(simulation(batch).argmax(axis=1))
"""


def export(capture: Capture, path: str | Path, *, metadata: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write a quantized capture as an HLS project; convolutions are streamed, linear maps run in parallel.

    Raises:
        ModelError: hls4ml lacks an operator, or the capture is float.
    """
    from hls4ml.converters import convert_from_onnx_model
    from hls4ml.utils.config import config_from_onnx_model

    path = Path(path)
    try:
        with _quiet():
            model = _channels_last(capture)
            config = config_from_onnx_model(model, granularity="name", backend="Vitis", default_precision=DEFAULT)
            config["LayerName"][model.graph.input[0].name]["Precision"] = {"result": _input_type(capture)}
            made = convert_from_onnx_model(
                model,
                output_dir=str(path),
                project_name=PROJECT,
                io_type=_way(capture),
                backend="Vitis",
                hls_config=config,
            )
            made.write()
    except ModelError:
        raise
    except Exception as error:  # hls4ml raises plain exceptions
        raise ModelError(f"hls4ml: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}") from error
    facts = {
        "input": list(capture.example[0].shape[1:]),
        "output": list(capture.module(*capture.example).shape[1:]),
        "stamp": made.config.get_config_value("Stamp"),
        **metadata,
    }
    atomic_write(path / FACTS, json.dumps(facts, indent=1).encode())
    return path


def _input_type(capture: Capture) -> str:
    """The type of the input: the grid that it is rounded to first, so that no other rounding comes before."""
    for node in capture.module.graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if source is not None and source.op == "placeholder":
            made = capture.module.get_submodule(str(node.target))
            whole = made.spec.bits + int(made.scale.log2())
            return f"ap_{'' if made.spec.signed else 'u'}fixed<{made.spec.bits},{whole},AP_RND_CONV,AP_SAT>"
    raise ModelError("hls4ml: the model's input is not quantized; give --data, and keep no first layer in float")


def _way(capture: Capture) -> str:
    images = any(len(op.shape) == 4 for op in capture.graph.ops)
    return "io_stream" if images else "io_parallel"


def _channels_last(capture: Capture) -> Any:
    """Return the QONNX model of a capture as hls4ml reads it."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.util.cleanup import cleanup_model

    model = cleanup_model(ModelWrapper(qonnx.quant_nodes(capture, one_grid=True)))
    return cleanup_model(model.transform(ConvertToChannelsLastAndClean(make_input_channels_last=True)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what qonnx and hls4ml print and warn of: what goes wrong is raised, in one line."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The C simulation of a project: one example a call, float in, float out, fixed point between.

    Args:
        function: of the compiled library.
        facts: shapes, as ``kompakt.json`` has them.
    """

    function: Any
    facts: dict[str, Any]

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run a batch, one example after the other."""
        return np.stack([self._one(example) for example in batch])

    def _one(self, example: np.ndarray) -> np.ndarray:
        shape = self.facts["output"]
        given = np.ascontiguousarray(np.moveaxis(example, 0, -1), dtype=np.float32)
        found = np.zeros(int(np.prod(shape)), dtype=np.float32)
        self.function(given.ctypes.data_as(ctypes.c_void_p), found.ctypes.data_as(ctypes.c_void_p))
        return found.reshape(shape)  # the project ends with the transposition back to channels first


def open_hls4ml(path: str | Path, threads: int = 1) -> Simulation:
    """Compile a project's C simulation, if that was not done yet, and load it.

    Raises:
        FormatError: it is not a project that kompakt wrote, or it does not compile.
        MissingExtraError: there is no g++.
    """
    path = Path(path)
    try:
        facts = json.loads((path / FACTS).read_text())
        library = path / "firmware" / f"{PROJECT}-{facts['stamp']}.so"
    except (OSError, KeyError, ValueError) as error:
        raise FormatError(f"{path}: not an HLS project of kompakt's: {FACTS}: {error}") from None
    if not library.exists():
        _compile(path)
    function = getattr(ctypes.cdll.LoadLibrary(str(library.resolve())), f"{PROJECT}_float")
    function.restype = None
    return Simulation(function=function, facts=facts)


def _compile(path: Path) -> None:
    if which("g++") is None:
        raise MissingExtraError("target hls4ml: its C simulation needs g++; install a C++ compiler (apt install g++)")
    done = subprocess.run(["bash", "build_lib.sh"], cwd=path, capture_output=True, text=True, check=False)
    if done.returncode:
        line = next((text for text in done.stderr.splitlines() if "error" in text), done.stderr[-200:])
        raise FormatError(f"{path}: its C simulation does not compile: {line[:300]}")


def check(path: Path) -> tuple[Finding, ...]:
    """Compile the C simulation of a project; what does not compile is an error, not a finding."""
    open_hls4ml(path)
    return ()


TARGET = Target(
    rules=RULES,
    suffix="",
    export=export,
    open=open_hls4ml,
    snippet=SNIPPET,
    check=check,
    prepare=averages_as_convolutions,
    extra="fpga",
    modules=("hls4ml", "qonnx"),
    note="the project is simulated by g++; synthesis, timing and real use of the chip need Vitis HLS",
)
