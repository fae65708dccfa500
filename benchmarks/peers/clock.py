"""Wall and processor seconds of one piece of work, and the one line of JSON that a tool's process prints."""

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import TypeVar

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Do some work; return what it made and its wall and processor seconds (all threads)."""
    wall, busy = time.perf_counter(), time.process_time()
    made = work()
    return made, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - busy}


def tell(seconds: dict[str, float], packages: tuple[str, ...]) -> None:
    """Print the result of a tool's process as its last line."""
    sys.stdout.flush()
    print(json.dumps({**seconds, "versions": {name: metadata.version(name) for name in packages}}), flush=True)
