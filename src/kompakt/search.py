"""``compress``: find the plan that fits the budget, judged on the exported artifact against the original."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kompakt.artifact.targets import MADE_BY
from kompakt.awareness import trained
from kompakt.bits import knobs, planned, unquantized
from kompakt.build.aware import Aware, shipped, without_tensors
from kompakt.build.quantize import quantize
from kompakt.data import Data, check_classes
from kompakt.errors import InputError, ModelError
from kompakt.finish import Chosen, StageFile, finish, points_text
from kompakt.graph.calibrate import Stats, calibrate
from kompakt.graph.fold import fold
from kompakt.graph.graph import Left
from kompakt.graph.trace import Capture, trace
from kompakt.job import Job
from kompakt.measure.accuracy import Score
from kompakt.measure.result import Drop, Result
from kompakt.measure.sensitivity import sensitivities
from kompakt.networks import slimmed
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import QuantizeSection
from kompakt.plan.rules import placed
from kompakt.refinement import notes, prepared, refine
from kompakt.slim import Slim
from kompakt.teaching import taught_by
from kompakt.weights import save_weights

__all__ = ["Job", "compress"]

CALIBRATION_BATCH = 32
STEPS_BACK = 20
"""At most so many times are layers given back to float before the search gives up."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan, carried out and judged on the validation split."""

    plan: Plan
    original: Capture
    capture: Capture
    path: Path
    drop: Drop
    kept: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()
    notes: tuple[str, ...] = ()


def compress(job: Job) -> Result:
    """Take a model to the smallest artifact of its recipe that keeps the budget, and measure it.

    The original is exported as ``baseline`` and everything is judged against it in the same runtime.
    Channels are removed and the rest trained where the recipe asks for it. Then the network is
    quantized; if integers everywhere break the budget on the validation split, the most sensitive
    layers, as measured, go back to float a few at a time until it holds.

    Returns:
        What was measured; ``result.json`` in ``job.out`` holds the same.

    Raises:
        InputError, ModelError: the model, the data or the recipe cannot be used.
    """
    started = time.monotonic()
    made = make(job)
    return finish(job, made.stages, made.chosen, started)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a recipe gave: every stage's file and the artifact, judged on the validation split where it is quantized."""

    stages: tuple[StageFile, ...]
    chosen: Chosen


def make(job: Job) -> Made:
    """Carry out a job's recipe and export everything; nothing is looked at on the test split.

    Raises:
        InputError, ModelError: the model, the data or the recipe cannot be used.
    """
    torch.manual_seed(job.seed)
    job.say("capturing the model")
    example = _example(job.data)
    original = fold(trace(job.model, example))
    check_classes(job.data, _outputs(original))
    baseline = _export(job, original, "baseline")
    stages = [StageFile(name="original", did="exported in fp32", path=baseline, macs=original.graph.macs)]
    found = slimmed(job, example)
    capture = original if found.model is job.model else fold(trace(found.model, example))
    if found.did:
        name = found.name or ("pruned" if found.plan.entries else "trained")
        save_weights(found.model, job.out / f"{name}.safetensors")
        path = _export(job, capture, name)
        stages.append(StageFile(name=name, did=found.did, path=path, macs=capture.graph.macs))
    chosen = _quantized(job, job.recipe.quantize, capture, baseline, found) if job.recipe.quantize else None
    return Made(stages=tuple(stages), chosen=chosen or _float(stages[-1], capture, found))


def _example(data: Data) -> Tensor:
    """Take the first two training examples."""
    for inputs, _ in data.train.batches(2, limit=2):
        return inputs
    raise InputError("the training split gave no batch; expected at least one example")


def _outputs(capture: Capture) -> int:
    with torch.inference_mode():
        output = capture.module(*capture.example)
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns {type(output).__name__}; expected one tensor of scores")
    return output.shape[1] if output.ndim == 2 else 0


def _export(job: Job, capture: Capture, name: str) -> Path:
    path = job.out / f"{name}{job.target.suffix}"
    return job.target.export(capture, path, metadata=MADE_BY)


def _float(last: StageFile, capture: Capture, found: Slim) -> Chosen:
    """Choose the network as it stands, in float."""
    return Chosen(plan=found.plan, original=capture, capture=capture, path=last.path, did=last.did, left=found.left)


def _quantized(job: Job, section: QuantizeSection, capture: Capture, baseline: Path, found: Slim) -> Chosen:
    """Quantize within the budget."""
    reference = job.reference
    if reference is None:
        job.say("scoring the original on the validation split")
        reference = job.judge.score(baseline, job.data.validation)
    # What is trained is the network itself; equalizing, and mending after, is for a network that is not.
    capture = capture if job.recipe.qat.epochs else prepared(job, section, capture)
    stats = _calibrated(job, section, capture)
    best, decisions = _within_budget(job, section, capture, stats, reference, found.model)
    final = best.path.replace(job.out / f"model{job.target.suffix}")
    for other in job.out.glob(f"candidate-*{job.target.suffix}"):
        other.unlink()
    return Chosen(
        plan=Plan(entries=(*found.plan.entries, *best.plan.entries)),
        original=best.original,
        capture=best.capture,
        path=final,
        did=_did(job, section),
        kept=best.kept,
        decisions=(*notes(section, best.capture, job.target.suffix, taught=bool(job.recipe.qat.epochs)), *decisions),
        left=(*found.left, *best.left),
    )


def _did(job: Job, section: QuantizeSection) -> str:
    """Say in a few words how the network was quantized."""
    if job.plan is not None:
        what = "quantized by the plan given"
    elif section.codebook is not None:
        what = f"weights shared in codebooks of {2**section.codebook} values"
    else:
        what = "integers of bits chosen by layer" if section.mixed else "uniform integers"
    qat = job.recipe.qat
    how = f"trained for {qat.epochs} epochs{taught_by(qat, job.recipe.distill)}"
    return f"{what}, {how if qat.epochs else 'calibrated after training'}"


def _calibrated(job: Job, section: QuantizeSection, capture: Capture) -> Stats:
    job.say(f"calibrating on {section.calibration_examples} training examples")
    part = job.data.train.subset(min(section.calibration_examples, len(job.data.train)), seed=job.seed)
    batches = (inputs for inputs, _ in part.batches(CALIBRATION_BATCH))
    return calibrate(capture, batches, placed(capture.graph, job.target.rules))


def _within_budget(
    job: Job, section: QuantizeSection, capture: Capture, stats: Stats, reference: Score, model: nn.Module
) -> tuple[Candidate, tuple[str, ...]]:
    """Return the first candidate that keeps the budget, or the best, and what was decided on the way."""
    limit = job.recipe.budget.max_drop
    start = _Start(section=section, capture=capture, stats=stats, reference=reference)
    if job.recipe.qat.epochs:
        plan, _, _ = planned(job, section, capture, stats, frozenset())
        start = replace(start, aware=trained(job, model, plan, stats))
    best = _candidate(job, start, ())
    decisions = [*best.notes, f"all layers quantized: {points_text(best.drop)} on the validation split"]
    if limit is None or best.drop.points <= limit:
        return best, tuple(decisions)
    job.say("over budget: measuring the sensitivity of each layer")
    ranked = _ranked(job, section, _unrounded(start), stats)
    step = max(1, -(-len(ranked) // STEPS_BACK))
    for count in range(step, len(ranked) + step, step):
        kept = tuple(ranked[:count])
        found = _candidate(job, start, kept)
        newest = ", ".join(capture.graph.by_name[name].module or name for name in ranked[count - step : count])
        decisions.append(f"{newest} back to float (largest output error): {points_text(found.drop)}")
        best = min(best, found, key=lambda item: item.drop.points)
        if found.drop.points <= limit:
            return found, tuple(decisions)
    decisions.append(f"no candidate keeps {limit:g} points on the validation split; the best is kept")
    return best, tuple(decisions)


def _unrounded(start: "_Start") -> Capture:
    """The float network that was quantized: as it came, or as it was trained."""
    if start.aware is None:
        return start.capture
    return shipped(start.aware, start.stats, frozenset(start.capture.graph.tensor))[1]


def _ranked(job: Job, section: QuantizeSection, capture: Capture, stats: Stats) -> list[str]:
    """Layers by the error that quantizing each alone makes, the largest first."""
    inputs = torch.cat([x for x, _ in job.data.train.subset(64, seed=job.seed).batches(64)])
    names = [op.name for op in capture.graph.layers if op.kind in job.target.rules.layers]
    found = sensitivities(capture, job.target.rules, knobs(section), stats, inputs, names)
    return sorted(found, key=lambda name: -found[name])


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What every candidate starts from; ``aware`` where the network was trained under its plan."""

    section: QuantizeSection
    capture: Capture
    stats: Stats
    reference: Score
    aware: Aware | None = None


def _candidate(job: Job, start: _Start, kept: tuple[str, ...]) -> Candidate:
    """Plan and apply, or take what was trained; export and judge with some layers kept in float."""
    capture, keep = start.capture, frozenset(kept)
    plan, left, notes = planned(job, start.section, capture, start.stats, keep if start.aware is None else frozenset())
    if start.aware is not None:
        gone = unquantized(capture, job.target.rules, keep)
        plan = without_tensors(start.aware.plan, gone)
        made, capture = shipped(start.aware, start.stats, gone)
    else:
        made = quantize(capture, plan, start.stats, job.seed)
        made = refine(job, start.section, capture, made, plan)
    job.say(f"exporting with {len(kept)} layers in float" if kept else "exporting")
    path = _export(job, made, f"candidate-{len(kept)}")
    job.say("scoring the exported file on the validation split")
    drop = job.judge.drop(start.reference, job.judge.score(path, job.data.validation))
    return Candidate(plan=plan, original=capture, capture=made, path=path, drop=drop, kept=kept, left=left, notes=notes)
