"""What a recipe says about training, as objects: settings, batches, what is minimised, who learns."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kompakt.augment import AUGMENTATIONS
from kompakt.build.distill import Objective, Teacher, Term, stage_terms
from kompakt.build.factor import reset
from kompakt.build.settings import Loader, TrainSettings, shuffled
from kompakt.build.teacher_cache import weights_digest
from kompakt.errors import InputError
from kompakt.graph.trace import trace
from kompakt.job import Job
from kompakt.methods.students import Made, is_derived, student
from kompakt.models import load_model
from kompakt.numerics.losses import LOGIT_LOSSES
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import DistillSection, FinetuneSection, TermSection
from kompakt.teachers import teachers

CHECKPOINT_STEPS = 100


def settings(section: FinetuneSection, out: Path, model: nn.Module, seed: int) -> TrainSettings:
    """Return how long and how fast a section trains; its checkpoint is named by ``model``'s weights and the price."""
    price = "" if section.rate is None else f"-{section.rate:g}-{section.rise:g}"
    place = out / "checkpoints" / f"{weights_digest(model)[:12]}-{seed}{price}" if section.checkpoint else None
    return TrainSettings(
        epochs=section.epochs,
        learning_rate=section.learning_rate,
        cycles=section.cycles,
        warmup_epochs=min(1.0, section.epochs / section.cycles / 4),
        channels_last=section.channels_last,
        compile=section.compile,
        seed=seed,
        checkpoint=place,
        checkpoint_every=CHECKPOINT_STEPS,
    )


def batches(section: FinetuneSection, job: Job, seed: int) -> Loader:
    """Return the training split, or the part of it that a section asks for, in batches."""
    part = job.data.train if section.examples is None else job.data.train.subset(section.examples, seed=job.seed)
    return shuffled(part, section.batch_size, seed=seed, augment=AUGMENTATIONS[section.augment])


def taught(
    job: Job, student: nn.Module, section: FinetuneSection, example: Tensor
) -> tuple[tuple[Teacher, ...], Objective]:
    """Return the teachers that a section asks for, and what is minimised.

    Raises:
        InputError: a teacher, a loss, a knob or a tap does not fit.
    """
    who = teachers(job, section, example)
    return who, objective(section, job.recipe.distill, job.model, student, example) if who else Objective()


def objective(
    section: FinetuneSection, distill: DistillSection, teacher: nn.Module, student: nn.Module, example: Tensor
) -> Objective:
    """Return the loss: ``(1 - distill) · task + distill · Σ weight · term``.

    Raises:
        InputError: an unknown loss or knob, a tap on one side alone, or stages that do not pair.
    """
    terms: list[Term] = []
    for term in distill.terms:
        terms += _terms(term, section, teacher, student, example)
    return Objective(terms=tuple(terms), task_weight=1 - section.distill)


def _terms(
    term: TermSection, section: FinetuneSection, teacher: nn.Module, student: nn.Module, example: Tensor
) -> tuple[Term, ...]:
    """Return one term, or one a stage for a loss on features that names no taps."""
    logits = term.loss in LOGIT_LOSSES
    if (term.teacher is None) != (term.student is None):
        raise InputError(f"{term.loss}: name taps of both teacher and student, or of neither")
    knobs = ({"temperature": section.temperature} if logits and term.loss != "dist" else {}) | term.knobs
    made = Term(
        loss=term.loss,
        teacher=term.teacher or "",
        student=term.student or "",
        weight=section.distill * term.weight,
        warmup_epochs=term.warmup_epochs,
        decay_epochs=term.decay_epochs,
        standardize=term.standardize,
        knobs=knobs,
    )
    if logits or term.teacher is not None:
        return (made,)
    pairs = stage_terms(term.loss, teacher, student, example, weight=made.weight, **knobs)
    return tuple(replace(pair, warmup_epochs=term.warmup_epochs, decay_epochs=term.decay_epochs) for pair in pairs)


def taught_by(section: FinetuneSection, distill: DistillSection) -> str:
    """Say who taught, and by which losses where they were chosen; nothing where nobody did."""
    names = (section.teacher,) if isinstance(section.teacher, str) else section.teacher
    if names == ("none",) or not section.distill:
        return ""
    said = " and ".join("the original" if name == "original" else Path(name).name for name in names)
    losses = "" if distill.terms == DistillSection().terms else f" by {', '.join(t.loss for t in distill.terms)}"
    return f" with {said} as teacher{losses}"


def learner(teacher: nn.Module, text: str, example: Tensor, *, start: str = "teacher", seed: int = 0) -> Made:
    """Make the student that a recipe names: from the teacher, or the user's own.

    Raises:
        InputError: the student is unknown, or cannot be made from this teacher.
        ModelError: the user's own does not take the teacher's inputs.
    """
    if is_derived(text) or ":" not in text:
        made = student(teacher, text, example)
        return replace(made, model=(reset(made.model, seed) if start == "random" else made.model).eval())
    torch.manual_seed(seed)
    own = load_model(text)
    trace(own, example)  # says in one line where it does not take the teacher's inputs
    return Made(model=own, plan=Plan())
