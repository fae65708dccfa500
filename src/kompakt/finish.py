"""Measure the chosen artifact and every stage before it on the test split, and write everything down."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.build.integer import exact
from kompakt.files import atomic_write
from kompakt.graph.graph import Left
from kompakt.graph.trace import Capture
from kompakt.job import Job
from kompakt.measure.judge import measurement
from kompakt.measure.layers import layer_table, node_times
from kompakt.measure.machine import machine, versions
from kompakt.measure.parity import compare
from kompakt.measure.result import Budget, Drop, Layer, LeftAlone, Parity, Result, Stage
from kompakt.plan.plan import Plan

PACKED = "model.kpk"


@dataclass(frozen=True, kw_only=True)
class StageFile:
    """A stage of the run: what was done, and the file that it left."""

    name: str
    did: str
    path: Path
    macs: int


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The artifact that ships.

    Args:
        plan: every decision.
        original: the float capture that was quantized.
        capture: what the artifact computes.
        path: the file.
        did: what was done last.
        kept: layers that went back to float.
        decisions: what was decided on the way, in order.
        left: what was left alone.
    """

    plan: Plan
    original: Capture
    capture: Capture
    path: Path
    did: str
    kept: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()


def finish(job: Job, before: tuple[StageFile, ...], chosen: Chosen, started: float) -> Result:
    """Measure every stage and the artifact, and write ``plan.json`` and ``result.json``.

    Args:
        job: the job.
        before: the stages; the first is the original.
        chosen: the artifact.
        started: when the run began, ``time.monotonic()``.
    """
    stages = _measured(job, before, chosen)
    first, last = stages[0].measurement, stages[-1]
    drop, limit = last.drop or Drop(points=0.0, ci95=(0.0, 0.0)), job.recipe.budget.max_drop
    one = chosen.capture.example[0][:1].numpy()
    packed = pack_onnx(chosen.path, job.out / PACKED) if chosen.path.suffix == ".onnx" else None
    result = Result(
        command=job.command,
        model=job.name,
        data=job.source,
        target=job.target.name,
        baseline=first,
        compressed=last.measurement,
        drop_points=drop.points,
        drop_ci95=drop.ci95,
        budget=Budget(max_drop=limit, met=limit is None or drop.points <= limit),
        stages=stages,
        layers=_layers(job, chosen, one),
        left_alone=_left(job, chosen),
        decisions=chosen.decisions,
        parity=_parity(job, chosen),
        packed_bytes=packed,
        snippet=job.target.snippet.format(file=chosen.path.name, shape=tuple(one.shape)),
        files=_files(job, before, chosen),
        versions=versions(),
        machine=machine(),
        seed=job.seed,
        wall_s=time.monotonic() - started,
    )
    atomic_write(job.out / "plan.json", chosen.plan.to_json().encode())
    atomic_write(job.out / "result.json", result.model_dump_json(indent=1).encode())
    return result


def _measured(job: Job, before: tuple[StageFile, ...], chosen: Chosen) -> tuple[Stage, ...]:
    """Score every file on the test split and time all of them in one interleaved run."""
    files = before
    if chosen.path not in {stage.path for stage in before}:
        macs = chosen.original.graph.macs
        files = (*before, StageFile(name="quantized", did=chosen.did, path=chosen.path, macs=macs))
    job.say("scoring original and artifact on the test split")
    scores = [job.judge.score(stage.path, job.data.test) for stage in files]
    job.say("timing original and artifact, interleaved")
    times = job.judge.times({stage.name: stage.path for stage in files}, chosen.capture.example[0][:1].numpy())
    found: list[Stage] = []
    for stage, score in zip(files, scores, strict=True):
        seen = measurement(stage.name, stage.path, score, times[stage.name], macs=stage.macs, threads=job.threads)
        drop = job.judge.drop(scores[0], score) if found else None
        found.append(Stage(name=stage.name, did=stage.did, measurement=seen, drop=drop))
    return tuple(found)


def _layers(job: Job, chosen: Chosen, one: np.ndarray) -> tuple[Layer, ...]:
    inputs = next(iter(job.data.train.subset(min(32, len(job.data.train)), seed=job.seed).batches(32)))[0]
    notes = {name: "kept in float for the budget" for name in chosen.kept}
    times = node_times(chosen.path, one, threads=job.threads)
    return layer_table(chosen.original, chosen.capture, inputs, times, notes)


def _left(job: Job, chosen: Chosen) -> tuple[LeftAlone, ...]:
    graph = chosen.original.graph
    names = [graph.by_name[name].module or name for name in chosen.kept]
    back = [Left(name=name, reason="back to float for the budget") for name in names]
    norms = [op for op in graph.ops if op.kind == "batch_norm"]
    stay = [Left(name=op.module, reason="batch norm without a layer before it to fold into") for op in norms]
    notes = [Left(name="data", reason=text) for text in job.data.left]
    return tuple(LeftAlone(name=i.name, reason=i.reason) for i in (*chosen.left, *back, *stay, *notes))


def _files(job: Job, before: tuple[StageFile, ...], chosen: Chosen) -> dict[str, str]:
    files = {"artifact": chosen.path.name, "plan": "plan.json", "result": "result.json", "report": "report.html"}
    files |= {("baseline" if stage is before[0] else stage.name): stage.path.name for stage in before}
    if (job.out / PACKED).exists():
        files["packed"] = PACKED
    for stage in before[1:]:
        files[f"{stage.name} weights"] = f"{stage.name}.safetensors"
    return files


def _parity(job: Job, chosen: Chosen) -> Parity:
    """Compare the simulated model with the artifact on up to 1000 test examples."""
    runtime, simulated = job.target.open(chosen.path, job.threads), exact(chosen.capture)
    ours, theirs = [], []
    with torch.inference_mode():
        for inputs, _ in job.data.test.batches(100, limit=1000):
            ours.append(simulated.module(inputs).numpy())
            theirs.append(runtime(inputs.numpy()))
    a, b = np.concatenate(ours), np.concatenate(theirs)
    return compare(a, b, step=float(a.max() - a.min()) / 255)


def points_text(drop: Drop) -> str:
    """Write a drop with its interval."""
    return f"{drop.points:+.2f} points ({drop.ci95[0]:+.2f} to {drop.ci95[1]:+.2f})"
