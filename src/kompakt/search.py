"""``compress``: find the plan that fits the budget, judged on the exported artifact against the original."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kompakt import __version__
from kompakt.artifact.targets import Target
from kompakt.build.quantize import quantize
from kompakt.data import Data, check_classes
from kompakt.errors import InputError, ModelError
from kompakt.files import atomic_write
from kompakt.graph.calibrate import Stats, calibrate
from kompakt.graph.fold import fold
from kompakt.graph.graph import Left
from kompakt.graph.trace import Capture, trace
from kompakt.measure.accuracy import Metric, Score
from kompakt.measure.judge import Judge, measurement
from kompakt.measure.layers import layer_table, node_times
from kompakt.measure.machine import machine, versions
from kompakt.measure.parity import compare
from kompakt.measure.result import Budget, Drop, LeftAlone, Measurement, Parity, Result, Stage
from kompakt.measure.sensitivity import sensitivities
from kompakt.methods.uniform import Knobs, uniform
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import Recipe
from kompakt.plan.rules import placed

CALIBRATION_BATCH = 32
STEPS_BACK = 20
"""At most so many times are layers given back to float before the search gives up."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to compress, on what, for what.

    Args:
        model: the original.
        name: how the user called it.
        data: decisions are made on its validation split, the final figures are of its test split.
        source: how the user called the data.
        target: the runtime.
        out: the folder that gets the artifact and its papers; it must exist.
        recipe: what is asked.
        metric: outputs and labels → one value an example; None is top-1.
        threads: of the runtime.
        seconds: for timing, at the most.
        seed: of everything that is drawn.
        command: for the record.
        say: is told what is going on.
    """

    model: nn.Module
    name: str
    data: Data
    source: str
    target: Target
    out: Path
    recipe: Recipe = Recipe()
    metric: Metric | None = None
    threads: int = 1
    seconds: float = 20.0
    seed: int = 0
    command: str = "compress"
    say: Callable[[str], None] = field(default=lambda text: None)

    @property
    def judge(self) -> Judge:
        """The judge of this job's artifacts."""
        return Judge(target=self.target, metric=self.metric, threads=self.threads, seconds=self.seconds, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan, carried out and judged on the validation split."""

    plan: Plan
    capture: Capture
    path: Path
    drop: Drop
    kept: tuple[str, ...] = ()


def compress(job: Job) -> Result:
    """Take a model to the smallest artifact of its recipe that keeps the budget, and measure it.

    The original is exported as ``baseline`` and everything is judged against it in the same runtime.
    If integers everywhere break the budget on the validation split, the most sensitive layers, as
    measured, go back to float a few at a time until it holds.

    Returns:
        What was measured; ``result.json`` in ``job.out`` holds the same.

    Raises:
        InputError, ModelError: the model, the data or the recipe cannot be used.
    """
    started = time.monotonic()
    torch.manual_seed(job.seed)
    job.say("capturing the model")
    example = _example(job.data)
    capture = fold(trace(job.model, example))
    check_classes(job.data, _outputs(capture))
    baseline = job.target.export(capture, job.out / f"baseline{job.target.suffix}", metadata={})
    job.say("scoring the original on the validation split")
    reference = job.judge.score(baseline, job.data.validation)
    stats = _calibrated(job, capture)
    candidate, decisions = _within_budget(job, capture, stats, reference)
    return _report(job, capture, candidate, decisions, started)


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


def _calibrated(job: Job, capture: Capture) -> Stats:
    section = job.recipe.quantize
    job.say(f"calibrating on {section.calibration_examples} training examples")
    part = job.data.train.subset(min(section.calibration_examples, len(job.data.train)), seed=job.seed)
    batches = (inputs for inputs, _ in part.batches(CALIBRATION_BATCH))
    return calibrate(capture, batches, placed(capture.graph, job.target.rules))


def knobs(recipe: Recipe, keep: frozenset[str] = frozenset()) -> Knobs:
    """Translate a recipe's section into the method's knobs."""
    section = recipe.quantize
    return Knobs(
        weight_bits=section.weight_bits,
        activation_bits=section.activation_bits,
        group_size=section.group_size,
        weight_range=section.weight_range,
        activation_range=section.activation_range,
        dynamic=section.dynamic,
        keep=frozenset(section.keep) | keep,
    )


def _within_budget(job: Job, capture: Capture, stats: Stats, reference: Score) -> tuple[Candidate, tuple[str, ...]]:
    """Return the first candidate that keeps the budget, or the best, and what was decided on the way."""
    limit = job.recipe.budget.max_drop
    best = _candidate(job, capture, stats, reference, ())
    decisions = [f"all layers in integers: {_points(best.drop)} on the validation split"]
    if limit is None or best.drop.points <= limit:
        return best, tuple(decisions)
    job.say("over budget: measuring the sensitivity of each layer")
    ranked = _ranked(job, capture, stats)
    step = max(1, -(-len(ranked) // STEPS_BACK))
    for count in range(step, len(ranked) + step, step):
        kept = tuple(ranked[:count])
        found = _candidate(job, capture, stats, reference, kept)
        newest = ", ".join(_module(capture, name) for name in ranked[count - step : count])
        decisions.append(f"{newest} back to float (largest output error): {_points(found.drop)}")
        best = min(best, found, key=lambda item: item.drop.points)
        if found.drop.points <= limit:
            return found, tuple(decisions)
    decisions.append(f"no candidate keeps {limit} points on the validation split; the best is kept")
    return best, tuple(decisions)


def _ranked(job: Job, capture: Capture, stats: Stats) -> list[str]:
    """Layers by the error that quantizing each alone makes, the largest first."""
    inputs = torch.cat([x for x, _ in job.data.train.subset(64, seed=job.seed).batches(64)])
    names = [op.name for op in capture.graph.layers if op.kind in job.target.rules.layers]
    found = sensitivities(capture, job.target.rules, knobs(job.recipe), stats, inputs, names)
    return sorted(found, key=lambda name: -found[name])


def _candidate(job: Job, capture: Capture, stats: Stats, reference: Score, kept: tuple[str, ...]) -> Candidate:
    """Plan, apply, export and judge with some layers kept in float."""
    plan, _ = uniform(capture.graph, job.target.rules, knobs(job.recipe, frozenset(kept)))
    made = quantize(capture, plan, stats)
    job.say(f"exporting with {len(kept)} layers in float" if kept else "exporting")
    path = job.target.export(made, job.out / f"model{job.target.suffix}.candidate", metadata={})
    job.say("scoring the exported file on the validation split")
    drop = job.judge.drop(reference, job.judge.score(path, job.data.validation))
    return Candidate(plan=plan, capture=made, path=path, drop=drop, kept=kept)


def _report(job: Job, capture: Capture, chosen: Candidate, decisions: tuple[str, ...], started: float) -> Result:
    """Measure the chosen artifact on the test split and write everything down."""
    baseline = job.out / f"baseline{job.target.suffix}"
    final = job.target.export(
        chosen.capture, job.out / f"model{job.target.suffix}", metadata={"made_by": f"kompakt {__version__}"}
    )
    (job.out / f"model{job.target.suffix}.candidate").unlink(missing_ok=True)
    job.say("scoring original and artifact on the test split")
    scores = {path: job.judge.score(path, job.data.test) for path in (baseline, final)}
    drop = job.judge.drop(scores[baseline], scores[final])
    one = capture.example[0][:1].numpy()
    job.say("timing original and artifact, interleaved")
    times = job.judge.times({"baseline": baseline, "compressed": final}, one)
    macs = capture.graph.macs
    before = measurement("original", baseline, scores[baseline], times["baseline"], macs=macs, threads=job.threads)
    after = measurement("int8", final, scores[final], times["compressed"], macs=macs, threads=job.threads)
    limit = job.recipe.budget.max_drop
    result = Result(
        command=job.command,
        model=job.name,
        data=job.source,
        target=job.target.name,
        baseline=before,
        compressed=after,
        drop_points=drop.points,
        drop_ci95=drop.ci95,
        budget=Budget(max_drop=limit, met=limit is None or drop.points <= limit),
        stages=_stages(before, after, drop),
        layers=_layers(job, capture, chosen, final, one),
        left_alone=_left(job, capture, chosen),
        decisions=(*decisions, f"ratio of latencies {times['compressed'].ratio:.3f}"),
        parity=_parity(job, chosen.capture, final),
        snippet=job.target.snippet.format(file=final.name, shape=tuple(one.shape), normal=job.data.description),
        files={"artifact": final.name, "baseline": baseline.name, "plan": "plan.json", "result": "result.json"},
        versions=versions(),
        machine=machine(),
        seed=job.seed,
        wall_s=time.monotonic() - started,
    )
    atomic_write(job.out / "plan.json", chosen.plan.to_json().encode())
    atomic_write(job.out / "result.json", result.model_dump_json(indent=1).encode())
    return result


def _stages(before: Measurement, after: Measurement, drop: Drop) -> tuple[Stage, ...]:
    return (
        Stage(name="original", did="batch norms folded, exported in fp32", measurement=before),
        Stage(name="quantized", did="uniform integers, calibrated after training", measurement=after, drop=drop),
    )


def _layers(job: Job, capture: Capture, chosen: Candidate, path: Path, one: np.ndarray) -> tuple:
    inputs = next(iter(job.data.train.subset(min(32, len(job.data.train)), seed=job.seed).batches(32)))[0]
    notes = {name: "kept in float for the budget" for name in chosen.kept}
    times = node_times(path, one, threads=job.threads)
    return layer_table(capture, chosen.capture, inputs, times, notes)


def _left(job: Job, capture: Capture, chosen: Candidate) -> tuple[LeftAlone, ...]:
    _, left = uniform(capture.graph, job.target.rules, knobs(job.recipe))
    back = [Left(name=_module(capture, name), reason="back to float for the budget") for name in chosen.kept]
    norms = [op for op in capture.graph.ops if op.kind == "batch_norm"]
    left += tuple(Left(name=op.module, reason="batch norm without a layer before it to fold into") for op in norms)
    notes = tuple(Left(name="data", reason=text) for text in job.data.left)
    return tuple(LeftAlone(name=item.name, reason=item.reason) for item in (*left, *back, *notes))


def _parity(job: Job, simulated: Capture, path: Path) -> Parity:
    """Compare the simulated model with the artifact on up to 1000 test examples."""
    runtime = job.target.open(path, job.threads)
    ours, theirs = [], []
    with torch.inference_mode():
        for inputs, _ in job.data.test.batches(100, limit=1000):
            ours.append(simulated.module(inputs).numpy())
            theirs.append(runtime(inputs.numpy()))
    a, b = np.concatenate(ours), np.concatenate(theirs)
    return compare(a, b, step=float(a.max() - a.min()) / 255)


def _module(capture: Capture, name: str) -> str:
    return capture.graph.by_name[name].module or name


def _points(drop: Drop) -> str:
    return f"{drop.points:+.2f} points ({drop.ci95[0]:+.2f} to {drop.ci95[1]:+.2f})"
