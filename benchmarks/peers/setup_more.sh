#!/bin/sh
# Makes environments of peers that want torch or another onnx: sh benchmarks/peers/setup_more.sh
# .venv-torch-pruning, .venv-olive and .venv-modelopt stand on .venv (make .venv/.stamp-dev) and add what it lacks.
set -eu
python=${PYTHON:-.venv/bin/python}
above() {
    "$python" -m venv "$1"
    site=$("$1/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    below=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
    echo "import site; site.addsitedir('$below')" > "$site/below.pth"
}
above .venv-torch-pruning
.venv-torch-pruning/bin/pip install --quiet --disable-pip-version-check --no-deps torch-pruning==1.6.1
above .venv-olive
.venv-olive/bin/pip install --quiet --disable-pip-version-check \
    olive-ai==0.13.0 onnxruntime==1.32.0 pandas torchmetrics questionary opentelemetry-sdk transformers requests
above .venv-modelopt
.venv-modelopt/bin/pip install --quiet --disable-pip-version-check --no-deps \
    nvidia-modelopt==0.47.0 "onnx~=1.21.0" onnx-graphsurgeon onnxconverter-common polygraphy lief omegaconf \
    antlr4-python3-runtime==4.9.3 "pulp<4" regex nvidia-ml-py ninja cppimport onnxslim colored
echo "ready: python -m benchmarks.compress"
