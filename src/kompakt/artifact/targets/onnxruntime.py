"""ONNX Runtime: CPU servers, desktops, edge boxes."""

from functools import partial

from kompakt.artifact.inside import onnx_inside
from kompakt.artifact.lint import check_onnxruntime
from kompakt.artifact.onnx import Options, copy_onnx, export_onnx, open_onnx
from kompakt.artifact.targets.target import Target
from kompakt.plan.rules import ONNXRUNTIME


def snippet(options: Options) -> str:
    """Return how to run an artifact that is opened with ``options``; fields ``file`` and ``shape`` stay open."""
    return _HEAD + options.source() + _TAIL


_HEAD = """\
import numpy as np
import onnxruntime as ort

"""
_TAIL = """\
session = ort.InferenceSession("{file}", options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
batch = np.zeros({shape}, dtype=np.float32)  # put your input here, prepared as for training
outputs = session.run(None, {{name: batch}})[0]
print(outputs.argmax(axis=1))
"""

TARGET = Target(
    rules=ONNXRUNTIME,
    suffix=".onnx",
    export=partial(export_onnx, moves=True),
    open=open_onnx,
    snippet=snippet(Options()),
    check=check_onnxruntime,
    inside=onnx_inside,
    convert=copy_onnx,
)
