"""Triton: a model repository for the cloud, ``config.pbtxt`` and ``1/model.onnx``, with dynamic batching."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx

from kompakt.artifact.inside import onnx_inside
from kompakt.artifact.lint import Finding, check_onnxruntime
from kompakt.artifact.onnx import Runtime, export_onnx, open_onnx
from kompakt.artifact.targets.target import Target
from kompakt.errors import FormatError, ModelError
from kompakt.files import atomic_write
from kompakt.graph.trace import Capture
from kompakt.plan.rules import ONNXRUNTIME

MAX_BATCH = 64
CONFIG, FILE = "config.pbtxt", "1/model.onnx"
_TYPES: dict[int, str] = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}

SNIPPET = """\
# tritonserver --model-repository="$(dirname {file})"
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient("localhost:8000")
name = client.get_model_metadata("{file}")["inputs"][0]["name"]
batch = triton.InferInput(name, {shape}, "FP32")
batch.set_data_from_numpy(np.zeros({shape}, dtype=np.float32))
print(client.infer("{file}", [batch]).get_response())
"""


def convert(source: Path, path: Path) -> Path:
    """Put an ONNX file into a model folder of its own.

    Raises:
        ModelError: the file fixes its batch, so that the server could not batch requests.
    """
    graph = onnx.load(str(source)).graph
    if not graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ModelError(
            f"{source}: its batch is fixed, Triton's batching needs a symbolic one; export it from the model"
        )
    (path / "1").mkdir(parents=True, exist_ok=True)
    if source.resolve() != (path / FILE).resolve():
        shutil.copyfile(source, path / FILE)
    atomic_write(path / CONFIG, _config(path.name, graph).encode())
    return path


def export(capture: Capture, path: str | Path, *, metadata: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write the model folder of a capture, float or quantized."""
    (Path(path) / "1").mkdir(parents=True, exist_ok=True)
    return convert(export_onnx(capture, Path(path) / FILE, metadata=metadata), Path(path))


def _config(name: str, graph: onnx.GraphProto) -> str:
    """Write the configuration; Triton takes the batch for granted, so it is not among the dimensions."""
    batches = ", ".join(str(2**n) for n in range(3, 7))
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {MAX_BATCH}\n'
        f"input [ {_tensor(graph.input[0])} ]\noutput [ {_tensor(graph.output[0])} ]\n"
        f"dynamic_batching {{ preferred_batch_size: [ {batches} ] max_queue_delay_microseconds: 1000 }}\n"
        "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
        'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }\n'
    )


def _tensor(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    dims = ", ".join(str(dim.dim_value or -1) for dim in kind.shape.dim[1:])
    return f'{{ name: "{value.name}" data_type: {_TYPES[kind.elem_type]} dims: [ {dims} ] }}'


def read_config(path: Path) -> dict[str, object]:
    """Read what matters of a ``config.pbtxt``: backend, largest batch, input and output.

    Raises:
        FormatError: it is missing or does not say these things.
    """
    try:
        text = (path / CONFIG).read_text()
        one = r'\[\s*\{\s*name:\s*"([^"]+)"\s*data_type:\s*(\w+)\s*dims:\s*\[([^\]]*)\]'
        tensors = {key: re.search(rf"^{key}\s*{one}", text, flags=re.M) for key in ("input", "output")}
        found: dict[str, object] = {
            key: (item[1], item[2], tuple(int(n) for n in item[3].split(","))) for key, item in tensors.items() if item
        }
        found["max_batch_size"] = int(re.search(r"max_batch_size:\s*(\d+)", text)[1])  # type: ignore[index]
        found["backend"] = re.search(r'backend:\s*"(\w+)"', text)[1]  # type: ignore[index]
    except (OSError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: not a Triton model folder: {CONFIG} cannot be read: {error}") from None
    if len(found) != 4:
        raise FormatError(f"{path}: {CONFIG} lacks an input or output with name, data_type and dims")
    return found


def open_triton(path: str | Path, threads: int = 1) -> Runtime:
    """Open the model as the server's backend does, after its configuration was read and found to fit."""
    config, runtime = read_config(Path(path)), open_onnx(Path(path) / FILE, threads)
    source = runtime.session.get_inputs()[0]
    real = (source.name, "TYPE_FP32", tuple(size if isinstance(size, int) else -1 for size in source.shape[1:]))
    if config["input"] != real:
        raise FormatError(f"{path}: {CONFIG} says the input is {config['input']}; the model's is {real}")
    return runtime


def check(path: Path) -> tuple[Finding, ...]:
    """Check the ONNX file inside, and run it at the ends of the range of batches."""
    runtime = open_triton(path, 1)
    shape = [size if isinstance(size, int) else 1 for size in runtime.session.get_inputs()[0].shape[1:]]
    for batch in (1, MAX_BATCH):
        if len(runtime(np.zeros((batch, *shape), dtype=np.float32))) != batch:
            raise FormatError(f"{path}: a batch of {batch} does not give {batch} outputs")
    return check_onnxruntime(path / FILE)


def inside(path: Path, inputs: np.ndarray, grids: Mapping[str, tuple[float, int]]) -> dict[str, np.ndarray]:
    """Show the values inside the model."""
    return onnx_inside(path / FILE, inputs, grids)


TARGET = Target(
    rules=replace(ONNXRUNTIME, target="triton"),
    suffix="",
    export=export,
    open=open_triton,
    snippet=SNIPPET,
    check=check,
    inside=inside,
    convert=convert,
)
