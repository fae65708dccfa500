"""What one cell of ``python -m benchmarks.distill`` does: train a student with a loss, score it; time steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.prune_cells import TimeUp, packed
from benchmarks.prune_subjects import ROOT, build, example
from kompakt.artifact.onnx import export_onnx
from kompakt.artifact.targets import target
from kompakt.augment import AUGMENTATIONS, FORMS
from kompakt.build.distill import Objective, Student, Teacher, Term, stage_terms
from kompakt.build.run import Run, training_mode
from kompakt.build.settings import Hooks, Loader, TrainSettings, shuffled
from kompakt.build.teacher_cache import TeacherCache, weights_digest
from kompakt.build.train import train
from kompakt.data import Data, Split, open_data
from kompakt.files import writable_folder
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.measure.judge import Judge
from kompakt.measure.latency import interleave
from kompakt.teachers import onnx_teacher
from kompakt.teaching import learner

STUDENTS = {"resnet20": "thinner:0.5", "resnet18": "shallower"}
SIZES = {"resnet20": 32, "resnet18": 48}
SOFT = Term(loss="soft_targets", weight=0.9, knobs={"temperature": 4.0})
STANDARDIZED = Term(loss="soft_targets", weight=9.0, standardize=True, knobs={"temperature": 2.0})
LOGITS: dict[str, tuple[float, tuple[Term, ...]]] = {
    "alone": (1.0, ()),
    "soft targets": (0.1, (SOFT,)),
    "attention": (1.0, ()),
    "DKD": (1.0, (Term(loss="decoupled", weight=0.1, knobs={"beta": 2.0, "temperature": 4.0}),)),
    "DIST": (1.0, (Term(loss="dist", weight=0.25, knobs={"beta": 1.0, "gamma": 1.0, "temperature": 4.0}),)),
    "logit standardization": (0.1, (STANDARDIZED,)),
    "soft targets + attention": (0.1, (SOFT,)),
}
"""Row → weight of the task, and terms on logits; weights as in the papers, but for DKD and DIST, whose weights (for a
hundred classes and more) left students of ten classes far behind: theirs were chosen on validation images."""
ATTENTION = 10.0
"""Weight of all stages together, in the rows that name attention."""


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """How every row of a table is trained.

    Args:
        images: of the training part, the same for all; None is all of them.
        epochs, learning_rate, batch_size: as they say.
    """

    images: int | None
    epochs: int
    learning_rate: float = 0.05
    batch_size: int = 128

    def settings(self, seed: int, checkpoint: Path | None = None) -> TrainSettings:
        """Return the settings of the loop; all weights decay, as in torchdistill."""
        return TrainSettings(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            warmup_epochs=min(1.0, self.epochs / 4),
            decay_all=True,
            channels_last=True,
            seed=seed,
            checkpoint=checkpoint,
            checkpoint_every=200,
        )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A teacher, its student's form, and the data."""

    name: str
    cifar: str
    schooling: Schooling

    @property
    def folder(self) -> Path:
        """Where caches, checkpoints and files lie."""
        return writable_folder(ROOT / "out" / "distill" / self.name)

    @cached_property
    def data(self) -> Data:
        """CIFAR-10 with a validation part that is taken off train."""
        return open_data(self.cifar, validation=5000, input_size=SIZES[self.name], progress=False)

    @property
    def train_part(self) -> Split:
        """What is trained on, the same for every row and seed."""
        return self.data.train.subset(self.schooling.images or len(self.data.train), seed=0)

    @cached_property
    def teacher(self) -> nn.Module:
        """The trained network."""
        return build(self.name)

    def student(self, start: str, seed: int) -> nn.Module:
        """Make the student: its first weights are the teacher's, or random ones of a seed."""
        return learner(self.teacher, STUDENTS[self.name], example(self.name), start=start, seed=seed).model

    def loader(self, seed: int) -> Loader:
        """Return the batches of a seed, the same for every row and tool."""
        return shuffled(self.train_part, self.schooling.batch_size, seed=seed, augment=AUGMENTATIONS["flip"])

    @cached_property
    def file(self) -> Path:
        """The teacher as an ONNX file."""
        return export_onnx(fold(trace(self.teacher, example(self.name))), self.folder / "teacher.onnx")

    def cached(self) -> TeacherCache:
        """Return the teacher's answers to both forms of every image, kept on disk."""
        capacity = FORMS["flip"] * len(self.train_part)
        place = self.folder / f"answers-{capacity}"
        return TeacherCache(onnx_teacher(self.file), place, capacity=capacity, identity=weights_digest(self.teacher))

    def objective(self, row: str, student: nn.Module) -> Objective:
        """Return what a row minimises."""
        task, terms = LOGITS[row]
        if "attention" in row:
            terms += stage_terms("attention", self.teacher, student, example(self.name), weight=ATTENTION)
        return Objective(terms=terms, task_weight=task)

    def who(self, goal: Objective) -> tuple[Teacher, ...]:
        """Return the teacher: its answers from disk where a row asks for logits alone."""
        if not goal.terms:
            return ()
        inside = any(term.loss == "attention" for term in goal.terms)
        return (Teacher(model=self.teacher if inside else self.cached()),)

    def judged(self, model: nn.Module, label: str) -> dict[str, Any]:
        """Export a student and score the file on the test images."""
        path = export_onnx(fold(trace(model.eval(), example(self.name))), self.folder / f"{label}.onnx")
        found = Judge(target=target("onnxruntime")).score(path, self.data.test)
        return {"accuracy": found.accuracy, "correct": packed(found.correct)}


def taught(bench: Bench, row: str, start: str, seed: int, spent: Callable[[], bool]) -> dict[str, Any]:
    """Train a student by a row's loss, and score it.

    Raises:
        TimeUp: the time is used up; the checkpoint stays and the next call goes on from it.
    """

    def watch(_model: nn.Module, _step: int) -> None:
        if spent():
            raise TimeUp

    student = bench.student(start, seed)
    goal = bench.objective(row, student)
    given = bench.schooling
    label = f"{row}-{start}-{seed}-{given.images}-{given.epochs}".replace(" ", "_")
    begun = time.perf_counter()
    settings = given.settings(seed, bench.folder / "checkpoints" / label)
    hooks = Hooks(after_step=(watch,), progress=False)
    train(student, bench.loader(seed), settings, objective=goal, teachers=bench.who(goal), hooks=hooks)
    return {"train_s": time.perf_counter() - begun, **bench.judged(student, label)}


def steps(bench: Bench, others: dict[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    """Time one training step of the student with every kind of teacher, interleaved; alone is the baseline.

    Args:
        bench: whose student.
        others: more steps to time, by name.
        seconds: to spend.
    """
    batch = next(iter(bench.loader(0).batches(0)))
    live, runtime, kept = bench.teacher, onnx_teacher(bench.file), bench.cached()
    kept(batch[0])
    rows: dict[str, tuple[str, Callable[[Tensor], Any] | None]] = {
        "alone": ("alone", None),
        "soft targets, teacher in PyTorch": ("soft targets", live),
        "soft targets, teacher in ONNX Runtime": ("soft targets", runtime),
        "soft targets, answers on disk": ("soft targets", kept),
        "attention": ("attention", live),
    }
    runs = {name: partial(_stepper(bench, row, teacher), *batch) for name, (row, teacher) in rows.items()}
    times = interleave({**runs, **others}, rounds=60, seconds=seconds)
    return {name: {"ratio": found.ratio, "ci95": found.ratio_ci95} for name, found in times.items()}


def _stepper(bench: Bench, row: str, teacher: Callable[[Tensor], Any] | None) -> Callable[[Tensor, Tensor], None]:
    """Return the training loop's own step of a row."""
    model = bench.student("random", 0)
    who = () if teacher is None else (Teacher(model=teacher),)
    student = Student(model, bench.objective(row, model), who).to(memory_format=torch.channels_last)
    run = Run(student, bench.loader(0), bench.schooling.settings(0), who, (), Hooks(), Accelerator(cpu=True))
    training_mode(student, False)
    return run._train_step
