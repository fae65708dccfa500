"""Time single layers at candidate widths in the target's runtime, and keep the times on disk."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from kompakt.artifact.targets import Target
from kompakt.errors import InputError
from kompakt.files import atomic_write
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.measure.machine import machine, versions
from kompakt.methods.latency import Case
from kompakt.methods.uniform import Knobs, integers
from kompakt.progress import track

SAMPLES = 7
SAMPLE_NS = 1_000_000
QUICK = Knobs(activation_range="minmax")
"""No range is searched for: the time does not depend on it."""
Clock = Callable[[], int]


def layer_times(
    cases: Sequence[Case],
    target: Target,
    *,
    threads: int = 1,
    quantized: bool = False,
    folder: Path | None = None,
    progress: bool = False,
    clock: Clock = time.perf_counter_ns,
) -> dict[Case, float]:
    """Measure how long every case takes, alone in a file of its own, in milliseconds.

    What was measured before on this machine, with this version of the runtime and as many threads, is read
    from ``folder`` and not measured again.

    Args:
        cases: layers at widths (``kompakt.methods.latency.cases``).
        target: the runtime.
        threads: of the runtime.
        quantized: whether layers are timed in integers: their kernels work on other blocks of channels.
        folder: of the tables on disk; None keeps none.
        progress: whether a bar may be shown.
        clock: in nanoseconds.
    """
    file = None if folder is None else folder / f"latency-{table_key(target.name, threads, quantized=quantized)}.json"
    known = _read(file)
    new = [case for case in dict.fromkeys(cases) if _name(case) not in known]
    with tempfile.TemporaryDirectory() as scratch:
        for case in track(new, len(new), "timing layers", show=progress):
            path = Path(scratch) / f"layer{target.suffix}"
            inputs = torch.randn(case.input, generator=torch.Generator().manual_seed(0))
            write(_layer(case), inputs, target, path, quantized=quantized)
            run = partial(target.open(path, threads), np.zeros(case.input, dtype=np.float32))
            known[_name(case)] = _time(run, clock)
    if file is not None and new:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(known, indent=0, sort_keys=True).encode())
    return {case: known[_name(case)] for case in cases}


def write(model: nn.Module, inputs: Tensor, target: Target, path: Path, *, quantized: bool) -> None:
    """Write a model's file to be timed, its integers calibrated on the inputs."""
    capture = target.prepare(fold(trace(model.eval(), inputs)))
    if quantized:
        capture = integers(capture, target.rules, [inputs], QUICK).capture
    target.export(capture, path, metadata={})


def table_key(runtime: str, threads: int, *, quantized: bool = False) -> str:
    """Name a table: it changes with the machine, the version of the runtime, the threads and the numbers."""
    where = machine()
    facts = [where["cpu"], where["isa"], where["cores"], runtime, versions((runtime,)).get(runtime, ""), threads]
    return hashlib.sha256(json.dumps([*facts, *(["int8"] if quantized else [])]).encode()).hexdigest()[:16]


def _name(case: Case) -> str:
    return json.dumps(asdict(case))


def _read(file: Path | None) -> dict[str, float]:
    if file is None or not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}  # losing the table loses only time
    good = isinstance(found, Mapping) and all(isinstance(ms, float) and ms > 0 for ms in found.values())
    return dict(found) if good else {}


def _time(run: Callable[[], object], clock: Clock) -> float:
    run()
    repeats = max(1, min(1000, SAMPLE_NS // max(1, _sample(run, 1, clock))))
    return median(_sample(run, repeats, clock) / repeats for _ in range(SAMPLES)) / 1e6


def _sample(run: Callable[[], object], repeats: int, clock: Clock) -> int:
    start = clock()
    for _ in range(repeats):
        run()
    return clock() - start


def _layer(case: Case) -> nn.Module:
    """Build a layer of a case's shape; its weights do not matter."""
    if case.kind == "linear":
        return nn.Linear(case.weight[1], case.weight[0])
    if case.kind != "conv2d" or len(case.settings) != 3:
        raise InputError(f"{case.kind}: the latency allocation times conv2d and linear layers alone; use knapsack")
    stride, padding, dilation = case.settings
    inside, kernel = case.weight[1] * case.groups, case.weight[2:]
    return nn.Conv2d(inside, case.weight[0], kernel, stride, padding, dilation, case.groups)  # type: ignore[arg-type]
