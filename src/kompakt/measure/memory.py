"""Peak memory that an artifact adds, measured in a process of its own.

``python -m kompakt.measure.memory FILE`` prints one line of JSON; ``peak_memory`` calls that.
"""

import gc
import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from kompakt.errors import InputError, KompaktError, ModelError

RUNS = 3
ONNXRUNTIME = "onnxruntime"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(
    path: str | Path,
    threads: int = 1,
    timeout_s: float = 300.0,
    *,
    runtime: str = ONNXRUNTIME,
    python: str = sys.executable,
) -> int:
    """Measure the resident set that loading and running an artifact adds, in bytes.

    The artifact is loaded and run a few times by a new process; what that process held before it
    opened it (Python, the runtime itself) is subtracted from its peak.

    Args:
        path: the artifact.
        threads: of the runtime.
        timeout_s: seconds to wait.
        runtime: name of the target.
        python: the interpreter that has the runtime.

    Raises:
        InputError: there is no such file.
        ModelError: the runtime cannot load or run it, or it takes too long.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: no such file")
    command = [python, "-m", "kompakt.measure.memory", str(path), "--threads", str(threads), "--runtime", runtime]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{path}: measuring its memory took over {timeout_s:.0f} s") from None
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return int(json.loads(lines[-1])["added_bytes"])
    last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    raise ModelError(f"{path}: measuring its memory failed: {last}")


def measure(path: str | Path, threads: int = 1, runtime: str = ONNXRUNTIME) -> dict[str, int]:
    """Load and run an artifact in THIS process; tell baseline, peak and their difference.

    Raises:
        ModelError: the runtime cannot load or run it.
    """
    load = _onnx_session if runtime == ONNXRUNTIME else _opened(runtime)
    gc.collect()
    baseline = _restart_peak()
    try:
        run = load(path, threads)
        for _ in range(RUNS):
            run()
    except KompaktError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no root class of their own
        raise ModelError(f"{path}: {str(error).splitlines()[0]}") from None
    peak = _peak()
    return {"baseline_bytes": baseline, "peak_bytes": peak, "added_bytes": max(0, peak - baseline)}


Load = Callable[[str | Path, int], Callable[[], object]]


def _onnx_session(path: str | Path, threads: int) -> Callable[[], object]:
    """Open an ONNX file, without what torch would add to the process."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {one.name: _example(one.name, one.type, one.shape) for one in session.get_inputs()}
    return partial(session.run, None, feeds)


def _opened(name: str) -> Load:
    """Import a runtime now, so that it counts as what was there before; return what opens an artifact in it."""
    from kompakt.artifact.targets import target

    chosen = target(name)
    for module in chosen.modules:
        import_module(module)

    def load(path: str | Path, threads: int) -> Callable[[], object]:
        opened = chosen.open(path, threads)
        return partial(opened, np.zeros(opened.shape, dtype=np.float32))

    return load


def _example(name: str, kind: str, shape: list[Any]) -> np.ndarray:
    """Build a zero input from the model's declaration; symbolic sizes are 1."""
    dtypes = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(double)": np.float64,
        "tensor(int64)": np.int64,
        "tensor(int32)": np.int32,
        "tensor(int8)": np.int8,
        "tensor(uint8)": np.uint8,
        "tensor(bool)": np.bool_,
    }
    if kind not in dtypes:
        raise ModelError(f"input {name}: cannot make an example of type {kind}")
    return np.zeros([size if isinstance(size, int) else 1 for size in shape], dtype=dtypes[kind])


def _restart_peak() -> int:
    """Forget the peak that the imports reached, where the system allows it; return the current size.

    On Linux the peak is read from VmHWM: ru_maxrss cannot be restarted and, across fork and exec,
    begins at the PARENT's size, which may be gigabytes.
    """
    if _CLEAR.exists():
        try:
            _CLEAR.write_text("5")
        except OSError:
            return _peak()  # not allowed: at least nothing is counted that came before
    return psutil.Process().memory_info().rss


def _peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> int:
    """Print the memory of the file named on the command line, as JSON."""
    parser = ArgumentParser(prog="python -m kompakt.measure.memory")
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runtime", default=ONNXRUNTIME)
    arguments = parser.parse_args()
    try:
        print(json.dumps(measure(arguments.file, arguments.threads, arguments.runtime)))
    except KompaktError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
