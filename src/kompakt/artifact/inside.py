"""The values inside an ONNX file while it runs: what every quantizer of an activation made."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from kompakt.artifact.onnx import Options, open_onnx
from kompakt.artifact.stored import constants


def onnx_inside(path: Path, inputs: np.ndarray, grids: Mapping[str, tuple[float, int]]) -> dict[str, np.ndarray]:
    """Run a file with the integers of its activations as further outputs.

    Integers leave the fused kernels as they are, so that what is seen is what ships.

    Args:
        path: the file.
        inputs: a batch.
        grids: op → scale and zero point; which to look for.

    Returns:
        Op → the floats that its integers stand for.
    """
    return _inside(path, inputs, grids, Options())


def onnx_inside_as_written(
    path: Path, inputs: np.ndarray, grids: Mapping[str, tuple[float, int]]
) -> dict[str, np.ndarray]:
    """Do the same with every operator run as it is written."""
    return _inside(path, inputs, grids, Options(level="disabled"))


def _inside(
    path: Path, inputs: np.ndarray, grids: Mapping[str, tuple[float, int]], options: Options
) -> dict[str, np.ndarray]:
    model = onnx.load(str(path))
    stored, present = constants(model), {item.name for item in model.graph.output}
    makers = {
        node.input[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in grids
    }
    for node in makers.values():
        if node.output[0] not in present:
            kind = helper.np_dtype_to_tensor_dtype(stored[node.input[2]].dtype)
            model.graph.output.append(helper.make_tensor_value_info(node.output[0], kind, None))
    with tempfile.TemporaryDirectory() as folder:
        opened = Path(folder) / "inside.onnx"
        onnx.save_model(model, str(opened))
        session = open_onnx(opened, options=options).session
        names = [node.output[0] for node in makers.values()]
        rows = [session.run(names, {session.get_inputs()[0].name: one}) for one in np.split(inputs, len(inputs))]
    found = {}
    for index, (name, node) in enumerate(makers.items()):
        scale, zero_point = (stored[item] for item in node.input[1:3])
        steps = np.concatenate([row[index] for row in rows]).astype(np.int32) - zero_point.astype(np.int32)
        found[name] = steps.astype(np.float32) * scale
    return found
