"""Hold an artifact open for ``kompakt.measure.remote``: one JSON line a request and an answer, arrays as ``.npy``."""

import json
import os
import sys
import time
import warnings
from argparse import ArgumentParser
from pathlib import Path
from typing import IO, Any

import numpy as np

from kompakt.artifact.targets import Runtime, target
from kompakt.errors import KompaktError
from kompakt.measure.remote import array_bytes, read_array


def serve(runtime: Runtime, source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer requests until ``source`` ends: ``load`` a batch, ``time`` a run of it, ``run`` it for its outputs."""
    batch = np.zeros(runtime.shape, dtype=np.float32)
    _say(sink, {"shape": runtime.shape})
    for line in source:
        asked = json.loads(line)
        if asked["do"] == "load":
            batch = read_array(source, asked["bytes"])
            _say(sink, {})
        elif asked["do"] == "time":
            start = time.perf_counter_ns()
            runtime(batch)
            _say(sink, {"ns": time.perf_counter_ns() - start})
        else:
            held = array_bytes(runtime(batch))
            _say(sink, {"bytes": len(held)}, held)


def _say(sink: IO[bytes], what: dict[str, Any], held: bytes = b"") -> None:
    sink.write(json.dumps(what).encode() + b"\n" + held)
    sink.flush()


def main() -> int:
    """Open the artifact named on the command line and serve it over the standard streams."""
    warnings.simplefilter("ignore")
    parser = ArgumentParser(prog="python -m kompakt.measure.worker")
    parser.add_argument("target")
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # runtimes print to the standard output
    try:
        serve(target(arguments.target).open(arguments.file, arguments.threads), sys.stdin.buffer, sink)
    except KompaktError as error:
        _say(sink, {"error": str(error), "kind": type(error).__name__})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
