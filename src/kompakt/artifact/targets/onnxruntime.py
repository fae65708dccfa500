"""ONNX Runtime: CPU servers, desktops, edge boxes."""

from kompakt.artifact.lint import check_onnxruntime
from kompakt.artifact.onnx import copy_onnx, export_onnx, open_onnx
from kompakt.artifact.targets.target import Target
from kompakt.plan.rules import ONNXRUNTIME

SNIPPET = """\
import numpy as np
import onnxruntime as ort

session = ort.InferenceSession("{file}", providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
batch = np.zeros({shape}, dtype=np.float32)  # put your input here, prepared as for training
outputs = session.run(None, {{name: batch}})[0]
print(outputs.argmax(axis=1))
"""

TARGET = Target(
    rules=ONNXRUNTIME,
    suffix=".onnx",
    export=export_onnx,
    open=open_onnx,
    snippet=SNIPPET,
    check=check_onnxruntime,
    convert=copy_onnx,
)
