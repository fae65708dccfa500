"""Distillation as data and wiring: terms of the objective, teachers, and the student with its taps.

The mathematics is in ``kompakt.numerics.losses``; the loop in ``kompakt.build.train``.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kompakt.build.taps import capture, inference, pair_stages, resolve_tap, shape_text
from kompakt.errors import InputError
from kompakt.numerics.losses import LABEL_LOSSES, LOGIT_LOSSES, LOSSES, WIDTH_LOSSES, standardize

Names = str | tuple[str, ...]
Features = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One weighted loss between a tensor of the teacher and a tensor of the student.

    Args:
        loss: a key of ``kompakt.numerics.losses.LOSSES``.
        teacher, student: module names or patterns (``layer3*``) whose outputs are compared; the
            empty name is the model's own output. ``fsp`` takes two on each side.
        weight: in the sum; ``warmup_epochs`` raises it linearly from 0 at the start of the run,
            ``decay_epochs`` lowers it linearly to 0 over the last epochs.
        standardize: bring logits to mean 0 and deviation 1 first (arXiv:2403.01427).
        knobs: keyword arguments of the loss, such as ``temperature``.
    """

    loss: str
    teacher: Names = ""
    student: Names = ""
    weight: float = 1.0
    warmup_epochs: float = 0.0
    decay_epochs: float = 0.0
    standardize: bool = False
    knobs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InputError(f"{self.loss}: no such distillation loss; there are {', '.join(LOSSES)}")
        known = inspect.signature(LOSSES[self.loss]).parameters.values()
        allowed = [knob.name for knob in known if knob.kind is inspect.Parameter.KEYWORD_ONLY]
        for name in self.knobs:
            if name not in allowed:
                raise InputError(f"{self.loss}: no knob {name}; it has {', '.join(allowed) or 'none'}")
        if not self.knobs.get("temperature", 1) > 0:
            raise InputError(f"{self.loss}: temperature {self.knobs['temperature']}: expected a positive number; try 4")
        if min(self.weight, self.warmup_epochs, self.decay_epochs) < 0:
            raise InputError(f"{self.loss}: weight, warmup_epochs and decay_epochs must not be negative")
        if self.standardize and self.loss not in LOGIT_LOSSES:
            raise InputError(f"{self.loss}: only losses on logits can be standardized")
        if len(self.teacher_taps) != len(self.student_taps):
            raise InputError(f"{self.loss}: as many taps of the teacher as of the student are expected")

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """The teacher's taps as a tuple."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    @property
    def student_taps(self) -> tuple[str, ...]:
        """The student's taps as a tuple."""
        return (self.student,) if isinstance(self.student, str) else self.student

    def weight_at(self, epoch: float, epochs: int) -> float:
        """Return the weight after ``epoch`` (a fraction counts) of ``epochs``."""
        rise = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        fall = min(1.0, max(0.0, epochs - epoch) / self.decay_epochs) if self.decay_epochs else 1.0
        return self.weight * rise * fall


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: ``task_weight · task + Σ weight · loss`` over the terms.

    Example:
        >>> soft = Term(loss="soft_targets", weight=0.9, knobs={"temperature": 4.0})
        >>> Objective(terms=(soft,), task_weight=0.1).terms[0].weight_at(0.0, 10)
        0.9
    """

    terms: tuple[Term, ...] = ()
    task_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.task_weight < 0:
            raise InputError(f"task_weight {self.task_weight}: expected 0 or more")
        if not self.terms and not self.task_weight:
            raise InputError("objective: no terms and no task loss; there is nothing to minimise")

    def weights_at(self, epoch: float, epochs: int) -> tuple[float, ...]:
        """Return the weights of the task and of every term after ``epoch`` of ``epochs``."""
        return (self.task_weight, *(term.weight_at(epoch, epochs) for term in self.terms))


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who is imitated: a module, or any callable from a batch to logits, such as an ONNX session.

    Several teachers are mixed by weight, loss by loss; for ``soft_targets`` this has the gradient of
    their probabilities' mean. Taps inside a model need modules: other callables take part in the
    terms on outputs alone.
    """

    model: Callable[[Tensor], Any]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise InputError(f"teacher's weight {self.weight}: expected a positive number")


def term_names(objective: Objective) -> tuple[str, ...]:
    """Return a name for every term, for records and error lines: the loss, and the tap where there is one."""
    names = [" ".join((term.loss, *(tap for tap in term.student_taps if tap))) for term in objective.terms]
    return tuple(name if names.count(name) == 1 else f"{name} #{i}" for i, name in enumerate(names))


def stage_terms(
    loss: str, teacher: nn.Module, student: nn.Module, example: Tensor, *, weight: float = 1.0, **knobs: float
) -> tuple[Term, ...]:
    """Return one term for every resolution stage that both models have, sharing ``weight`` evenly.

    ``fsp`` compares the flow from the first to the last module of a stage, other losses the last.
    """
    pairs = pair_stages(teacher, student, example)
    ends = [((t.first, t.last), (s.first, s.last)) if loss == "fsp" else (t.last, s.last) for t, s in pairs]
    return tuple(Term(loss=loss, teacher=t, student=s, weight=weight / len(ends), knobs=knobs) for t, s in ends)


class Student(nn.Module):
    """The trained model with its taps and projections, for the length of one run.

    A projection (1×1 convolution, or a linear map of the last dimension) is made only where a loss
    asks for equal widths and they differ; it is trained along and thrown away with this wrapper.

    Raises:
        InputError: a tap matches no module or several, or shapes that no projection can bridge.
    """

    def __init__(self, model: nn.Module, objective: Objective, teachers: tuple[Teacher, ...]):
        super().__init__()
        if objective.terms and not teachers:
            raise InputError("the objective has distillation terms, but no teacher was given")
        if any(teacher.model is model for teacher in teachers):
            raise InputError("the teacher is the very module that is trained; give a deep copy as the teacher")
        self.model = model
        self.projections = nn.ModuleDict()
        self.objective = objective
        self.terms = objective.terms
        self.teachers = len(teachers)
        self.taps = tuple(tuple(resolve_tap(model, tap) for tap in term.student_taps) for term in self.terms)
        self.names = {name for taps in self.taps for name in taps}

    def forward(self, inputs: Tensor) -> tuple[Any, list[list[Features]]]:
        """Run the model; return its output and its features as ``[term][teacher]``, projected."""
        with capture(self.model, self.names) as seen:
            output = self.model(inputs)
        if "" in self.names:
            seen[""] = output
        return output, [[self._project(seen, t, k) for k in range(self.teachers)] for t in range(len(self.terms))]

    def _project(self, seen: Mapping[str, Tensor], term: int, teacher: int) -> Features:
        keys = [f"{term}-{teacher}-{tap}" for tap in range(len(self.taps[term]))]
        found = [seen[name] for name in self.taps[term]]
        return tuple(
            (self.projections[key](x) if key in self.projections else x).float()
            for key, x in zip(keys, found, strict=True)
        )

    def add_projections(self, teachers: tuple[Teacher, ...], example: Tensor) -> None:
        """Make the projections that the shapes of an example batch ask for."""
        if not any(term.loss in WIDTH_LOSSES for term in self.terms):
            return
        device = next((p.device for p in self.parameters()), example.device)
        with inference(self):
            _, ours = self(example.to(device))
        for k, teacher in enumerate(teachers):
            theirs = teacher_features(teacher, self.terms, example)
            for t, term in enumerate(self.terms):
                wanted = theirs[t]
                if term.loss not in WIDTH_LOSSES or wanted is None:
                    continue
                for tap, (x, y) in enumerate(zip(ours[t][k], wanted, strict=True)):
                    if (projection := bridge(x, y, f"{term.loss}: tap {self.taps[t][tap]}")) is not None:
                        self.projections[f"{t}-{k}-{tap}"] = projection.to(x.device)


def bridge(student: Tensor, teacher: Tensor, where: str) -> nn.Module | None:
    """Return the projection that gives ``student`` the width of ``teacher``, or None where it has it.

    Raises:
        InputError: the shapes differ in more than the width.
    """
    if student.shape == teacher.shape:
        return None
    axis = 1 if student.ndim == 4 else -1
    rest, wanted = ([size for i, size in enumerate(x.shape) if i != axis % x.ndim] for x in (student, teacher))
    if rest != wanted or student.ndim < 2:
        raise InputError(
            f"{where}: {shape_text(student)} cannot be projected to the teacher's {shape_text(teacher)}; "
            "tap both at the same resolution"
        )
    if axis == 1:
        return nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False)
    return nn.Linear(student.shape[-1], teacher.shape[-1], bias=False)


def teacher_features(teacher: Teacher, terms: tuple[Term, ...], inputs: Tensor) -> list[Features | None]:
    """Run a teacher without gradients; return its tensors for every term, None where it has no such tap.

    Raises:
        InputError: a tap matches no module of the teacher or several.
    """
    model = teacher.model
    if not isinstance(model, nn.Module):
        output = torch.as_tensor(model(inputs), device=inputs.device).float()
        return [(output,) if term.teacher_taps == ("",) else None for term in terms]
    taps = [tuple(resolve_tap(model, tap) for tap in term.teacher_taps) for term in terms]
    with inference(model), capture(model, {name for names in taps for name in names}) as seen:
        output = model(inputs)
    if any("" in names for names in taps):
        seen[""] = output
    return [tuple(seen[name].float() for name in names) for names in taps]


def distillation_losses(
    terms: tuple[Term, ...],
    teachers: tuple[Teacher, ...],
    theirs: list[list[Features | None]],
    ours: list[list[Features]],
    labels: Tensor,
) -> list[Tensor]:
    """Return every term's loss, not yet weighted: the mean over the teachers by their weights.

    Args:
        theirs: the teachers' features, ``[teacher][term]``, from ``teacher_features``.
        ours: the student's features, ``[term][teacher]``, from ``Student``.
        labels: shape (N,), for the losses that need them.
    """
    losses = []
    for t, term in enumerate(terms):
        heard = [(teacher.weight, theirs[k][t], ours[t][k]) for k, teacher in enumerate(teachers)]
        parts = [(weight, term_loss(term, x, y, labels)) for weight, x, y in heard if x is not None]
        if not parts:
            raise InputError(f"{term.loss}: no teacher has the tap {term.teacher}; it takes a teacher that is a module")
        losses.append(torch.stack([weight * loss for weight, loss in parts]).sum() / sum(weight for weight, _ in parts))
    return losses


def term_loss(term: Term, teacher: Features, student: Features, labels: Tensor) -> Tensor:
    """Return one term's loss for one teacher."""
    if term.standardize:
        teacher, student = (tuple(standardize(x) for x in side) for side in (teacher, student))
    function = LOSSES[term.loss]
    if len(teacher) > 1:
        return function(teacher, student, **term.knobs)
    extra = (labels,) if term.loss in LABEL_LOSSES else ()
    return function(teacher[0], student[0], *extra, **term.knobs)
