"""Run and time every artifact of one subject in one process: ``python -m benchmarks.peers.race JOB.json``.

The job names the artifacts (``.onnx`` run in ONNX Runtime, ``.xml`` in OpenVINO), the inputs to run them on
and a folder that gets the outputs of each. Timing is one thread, batch 1, all artifacts in one interleaved loop.
OpenVINO scores with f32 where it is not integer, and is timed with its own default (bf16 where the CPU has it).
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from kompakt.measure.latency import interleave

Run = Callable[[np.ndarray], np.ndarray]
BATCH = 20


def open_artifact(path: Path, threads: int, exact: bool) -> Run:
    """Open a file in its runtime.

    Args:
        path: ``.onnx`` or ``.xml``.
        threads: of the runtime.
        exact: forbid OpenVINO to compute in bf16.
    """
    return _openvino(path, threads, exact) if path.suffix == ".xml" else _onnxruntime(path, threads)


def _onnxruntime(path: Path, threads: int) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Fail:  # ModelOpt's output_dtype and slices: a pass of ONNX Runtime's own makes nodes that it then refuses
        session = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["QDQPropagationTransformer"]
        )
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})[0]


def _openvino(path: Path, threads: int, exact: bool) -> Run:
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if exact:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda batch: next(iter(request.infer([batch]).values()))


def outputs(run: Run, inputs: np.ndarray) -> np.ndarray:
    """Run all inputs in batches."""
    return np.concatenate([np.array(run(inputs[start : start + BATCH])) for start in range(0, len(inputs), BATCH)])


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    inputs, out = np.load(job["inputs"], mmap_mode="r"), Path(job["out"])
    paths = {name: Path(path) for name, path in job["artifacts"].items()}
    for name, path in paths.items():
        np.save(out / f"{name}.npy", outputs(open_artifact(path, 1, True), inputs))
    one = np.ascontiguousarray(inputs[:1])
    opened = {name: open_artifact(path, 1, False) for name, path in paths.items()}
    runs = {name: (lambda run=run: run(one)) for name, run in opened.items()}
    times = interleave(runs, rounds=job["rounds"], seconds=job["seconds"], precision=0.01)
    print(json.dumps({name: {**asdict(found), "samples_ms": None} for name, found in times.items()}))


if __name__ == "__main__":
    main()
