"""What one cell of ``python -m benchmarks.bits`` does: quantize, train where asked, export, score, count bytes."""

import copy
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.prune_cells import TimeUp, packed
from benchmarks.prune_subjects import ROOT, build
from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.onnx import export_onnx
from kompakt.artifact.targets import target
from kompakt.augment import crop_and_flip
from kompakt.awareness import begun
from kompakt.bits import planned
from kompakt.build.aware import Aware, shipped, with_signs
from kompakt.build.distill import Objective, Teacher, Term, stage_terms
from kompakt.build.quantize import quantize
from kompakt.build.train import Hooks, TrainSettings, shuffled, train
from kompakt.data import Data, Split, open_data
from kompakt.graph.calibrate import Stats, calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.job import Job
from kompakt.plan.recipe import QuantizeSection, Recipe
from kompakt.plan.rules import placed
from kompakt.refinement import prepared, refine

FOLDER = ROOT / "out" / "bits"
TEMPERATURE, TAUGHT, BATCH, RATE = 4.0, 0.5, 128, 0.02


@dataclass(frozen=True)
class Bench:
    """The data and the network that every cell starts from."""

    name: str
    cifar: str

    @cached_property
    def data(self) -> Data:
        """CIFAR-10 with a validation part that is taken off train."""
        return open_data(self.cifar, validation=5000, input_size=32, progress=False)

    @cached_property
    def capture(self) -> Capture:
        """The network as captured, batch norms not folded."""
        return trace(build(self.name), self.example)

    @cached_property
    def example(self) -> Tensor:
        """Two training images."""
        return next(iter(self.data.train.batches(2, limit=2)))[0]

    def job(self, section: QuantizeSection | None) -> Job:
        """What ``kompakt quantize`` would be asked."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        return Job(
            model=build(self.name),
            name=self.name,
            data=self.data,
            source=self.cifar,
            target=target("onnxruntime"),
            out=FOLDER,
            recipe=Recipe(quantize=section),
        )

    def score(self, capture: Capture, label: str, split: str) -> dict[str, Any]:
        """Export a capture, score the file in ONNX Runtime, and count its bytes, as it is and as ``.kpk``."""
        job = self.job(None)
        file = export_onnx(capture, FOLDER / f"{label}.onnx")
        part: Split = getattr(self.data, split)
        correct = job.judge.score(file, part).correct
        return {
            "accuracy": float(correct.mean()),
            "correct": packed(correct),
            "onnx_bytes": file.stat().st_size,
            "kpk_bytes": pack_onnx(file, FOLDER / f"{label}.kpk"),
        }


def ptq(bench: Bench, label: str, section: QuantizeSection | None, split: str) -> dict[str, Any]:
    """Quantize without training as ``kompakt quantize`` does; no section gives the float network."""
    folded = fold(bench.capture)
    if section is None:
        return bench.score(folded, label, split)
    start, job = time.perf_counter(), bench.job(section)
    capture = prepared(job, section, folded)
    stats = calibrate(capture, _calibration(bench, section), placed(capture.graph, job.target.rules))
    plan, _, notes = planned(job, section, capture, stats, frozenset())
    made = refine(job, section, capture, quantize(capture, plan, stats), plan)
    seconds = time.perf_counter() - start
    return {**bench.score(made, label, split), "seconds": seconds, "notes": list(notes)}


def qat(bench: Bench, label: str, key: dict[str, Any], section: QuantizeSection | None, form: str,
        spent: Callable[[], bool]) -> dict[str, Any]:  # fmt: skip
    """Train under a plan, or the float network for no section (the control), with or without a teacher.

    Raises:
        TimeUp: the time is used up; the checkpoint stays and the next call goes on from it.
    """
    teacher, aware_form = build(bench.name), None if section is None else aware_of(bench, section, form)
    model = copy.deepcopy(teacher) if aware_form is None else aware_form[0].module

    def watch(_model: torch.nn.Module, step: int) -> None:
        if spent():
            raise TimeUp

    settings = settings_of(key["epochs"], key["seed"], label, key.get("cycles", 1))
    teachers = (Teacher(model=teacher),) if key["teacher"] else ()
    loader = shuffled(bench.data.train, BATCH, seed=key["seed"], augment=crop_and_flip)
    hooks, goal = Hooks(after_step=(watch,)), objective(key["teacher"])
    if key.get("hint") and aware_form is not None:
        goal = hinted(goal, teacher, model, bench.example, key["hint"])
    report = train(model, loader, settings, objective=goal, teachers=teachers, hooks=hooks)
    if aware_form is None:
        made = fold(trace(model.eval(), bench.example))
    else:
        made, _ = shipped(*aware_form)
    with suppress(IndexError):
        print([round(record.loss, 4) for record in report.history], flush=True)
    return {**bench.score(made, label, "test"), "train_s": report.seconds}


def aware_of(bench: Bench, section: QuantizeSection, form: str) -> tuple[Aware, Stats]:
    """Return the form of the network that trains under a plan, and what its ranges were calibrated to."""
    folded, job = fold(bench.capture), bench.job(section)
    stats = calibrate(folded, _calibration(bench, section), placed(folded.graph, job.target.rules))
    plan, _, _ = planned(job, section, folded, stats, frozenset())
    return begun(job, section, bench.capture, with_signs(plan, form), stats, form), stats  # type: ignore[arg-type]


def settings_of(epochs: int, seed: int, label: str, cycles: int = 1) -> TrainSettings:
    """Return how every row is trained, the peers' too."""
    return TrainSettings(
        epochs=epochs,
        learning_rate=RATE,
        cycles=cycles,
        warmup_epochs=min(1.0, epochs / cycles / 4),
        seed=seed,
        channels_last=True,
        checkpoint=FOLDER / "checkpoints" / label,
        checkpoint_every=100,
    )


def objective(taught: bool) -> Objective:
    """Return what is minimised: half of it the teacher's soft targets, where there is one."""
    term = Term(loss="soft_targets", weight=TAUGHT, knobs={"temperature": TEMPERATURE})
    return Objective(terms=(term,), task_weight=1 - TAUGHT) if taught else Objective()


def hinted(goal: Objective, teacher: torch.nn.Module, student: torch.nn.Module, example: Tensor,
           weight: float) -> Objective:  # fmt: skip
    """Add the teacher's features at the end of every stage (FitNets, Romero et al. 2015, arXiv 1412.6550)."""
    return replace(goal, terms=(*goal.terms, *stage_terms("hint", teacher, student, example, weight=weight)))


def _calibration(bench: Bench, section: QuantizeSection) -> Any:
    part = bench.data.train.subset(section.calibration_examples, seed=0)
    return (inputs for inputs, _ in part.batches(32))
