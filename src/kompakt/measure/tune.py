"""Choose ONNX Runtime's options for a file by measurement: threads, spinning, exact sums, level of the graph."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kompakt.artifact.lint import check_onnxruntime
from kompakt.artifact.onnx import Options, open_onnx
from kompakt.measure.latency import Times, interleave


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was chosen, and what it was chosen from.

    Args:
        options: the fastest.
        why: what was compared, in a line.
        p50_ms: median of each candidate, by its name.
    """

    options: Options
    why: str
    p50_ms: dict[str, float]


def candidates(threads: int, precise: bool) -> dict[str, Options]:
    """Name the options to compare; the first are those that a file is opened with by default.

    Args:
        threads: at the most.
        precise: whether sums must be exact: the file's weights would saturate without VNNI.
    """
    counts = dict.fromkeys((threads, 1))
    return {
        _name(options): options
        for count in counts
        for spinning in ((False, True) if count > 1 else (None,))
        for level in ("all", "extended")
        for options in (Options(threads=count, spinning=spinning, precise=precise, level=level),)
    }


def tune(path: Path, example: np.ndarray, *, threads: int = 1, seconds: float = 10.0, seed: int = 0) -> Tuned:
    """Time an ONNX file under every candidate, interleaved, and return the fastest by its median.

    A candidate takes the place of the default only where its interval lies below it. Sums are made exact where the
    file's own weights could saturate: speed is not bought with answers that differ between machines.

    Args:
        path: the file.
        example: one batch.
        threads: at the most.
        seconds: to spend.
        seed: of the order.
    """
    saturates = any(item.rule == "saturation" for item in check_onnxruntime(path))
    known = candidates(threads, saturates)
    runs = {name: partial(open_onnx(path, options=options), example) for name, options in known.items()}
    times = interleave(runs, seconds=seconds, seed=seed)
    best = min(times, key=lambda name: _rank(times[name]))
    exact = "sums made exact (the weights saturate without VNNI)" if saturates else "no weight can saturate"
    why = f"{best}, of {len(known)} timed; {exact}"
    return Tuned(options=known[best], why=why, p50_ms={name: item.p50_ms for name, item in times.items()})


def _rank(times: Times) -> float:
    return times.ratio if times.ratio_ci95[1] < 1 else 1.0


def _name(options: Options) -> str:
    spins = "" if options.threads == 1 else ", spinning" if options.spinning else ", not spinning"
    level = "" if options.level == "all" else f", graph level {options.level}"
    return f"{options.threads} thread{'s' if options.threads > 1 else ''}{spins}{level}"
