"""Artifacts open in processes of their own, and one clock for all that is timed, wherever it runs.

Runtimes that cannot be installed beside each other are run by another interpreter: ``Remote`` starts
``python -m kompakt.measure.worker`` there and talks to it over its standard streams. The worker times itself.
"""

import json
import subprocess
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from kompakt.errors import FormatError, InputError, MissingExtraError, ModelError

_ERRORS = {kind.__name__: kind for kind in (FormatError, InputError, MissingExtraError, ModelError)}


class Remote:
    """An artifact that a worker holds open.

    Args:
        python: the interpreter, whose environment has kompakt and the runtime.
        target: name of the target.
        path: the artifact.
        threads: of the runtime.

    Raises:
        InputError: the interpreter cannot be started, or has no kompakt.
        MissingExtraError, FormatError, ModelError: as opening the artifact raises them there.
    """

    def __init__(self, python: str, target: str, path: Path, threads: int) -> None:
        command = [python, "-m", "kompakt.measure.worker", target, str(path), "--threads", str(threads)]
        self._where = f"{path} under {python}"
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise InputError(f"{python}: cannot be started: {error.strerror}") from None
        try:
            self.shape = tuple(self._answer()["shape"])
        except BaseException:
            self.close()
            raise

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run a batch and return the outputs."""
        self.load(batch)
        self._ask({"do": "run"})
        return read_array(self._stream("stdout"), self._answer()["bytes"])

    def load(self, batch: np.ndarray) -> None:
        """Hand over the batch that ``time_ns`` runs."""
        held = array_bytes(batch)
        self._ask({"do": "load", "bytes": len(held)}, held)
        self._answer()

    def time_ns(self) -> int:
        """Run the batch once more and return the nanoseconds that it took there."""
        self._ask({"do": "time"})
        return int(self._answer()["ns"])

    def close(self) -> None:
        """End the worker."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _stream(self, name: str) -> IO[bytes]:
        stream = getattr(self._process, name)
        assert stream is not None
        return stream

    def _ask(self, what: dict[str, Any], held: bytes = b"") -> None:
        try:
            self._stream("stdin").write(json.dumps(what).encode() + b"\n" + held)
            self._stream("stdin").flush()
        except BrokenPipeError:
            raise ModelError(f"{self._where}: the worker ended") from None

    def _answer(self) -> dict[str, Any]:
        line = self._stream("stdout").readline()
        if not line:
            raise InputError(f"{self._where}: no answer; is kompakt installed there?")
        found = json.loads(line)
        if "error" in found:
            raise _ERRORS.get(found["kind"], ModelError)(found["error"])
        return dict(found)


def array_bytes(array: np.ndarray) -> bytes:
    """Write an array as an ``.npy`` file."""
    held = BytesIO()
    np.save(held, array, allow_pickle=False)
    return held.getvalue()


def read_array(stream: IO[bytes], size: int) -> np.ndarray:
    """Read an array of ``size`` bytes in all."""
    return np.load(BytesIO(stream.read(size)), allow_pickle=False)


class Stopwatch:
    """A clock that only runs while what it times runs, here or in a worker."""

    def __init__(self) -> None:
        self._total_ns = 0

    def __call__(self) -> int:
        """Return the nanoseconds so far."""
        return self._total_ns

    def here(self, run: Callable[[np.ndarray], np.ndarray], batch: np.ndarray) -> Callable[[], None]:
        """Return a call that runs ``batch`` in this process."""

        def timed() -> None:
            start = time.perf_counter_ns()
            run(batch)
            self._total_ns += time.perf_counter_ns() - start

        return timed

    def there(self, remote: Remote, batch: np.ndarray) -> Callable[[], None]:
        """Return a call that runs ``batch`` in a worker."""
        loaded = False

        def timed() -> None:
            nonlocal loaded
            if not loaded:
                remote.load(batch)
                loaded = True
            self._total_ns += remote.time_ns()

        return timed
