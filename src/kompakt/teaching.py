"""What a recipe says about teachers, as objects: who teaches, and what is minimised."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kompakt.artifact.onnx import open_onnx
from kompakt.build.distill import Objective, Teacher, Term, stage_terms
from kompakt.build.factor import reset
from kompakt.build.teacher_cache import TeacherCache
from kompakt.errors import InputError
from kompakt.graph.trace import trace
from kompakt.methods.students import Made, is_derived, student
from kompakt.models import load_model
from kompakt.numerics.losses import LOGIT_LOSSES
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import DistillSection, FinetuneSection, TermSection


def teachers(
    section: FinetuneSection, distill: DistillSection, original: nn.Module, folder: Path, examples: int
) -> tuple[Teacher, ...]:
    """Return who teaches: the original, ONNX files in ONNX Runtime, or nobody.

    Args:
        section, distill: what the recipe says.
        original: the original model.
        folder: gets the caches of outputs, where they are asked for.
        examples: the size of the training split, for the caches.

    Raises:
        InputError: a teacher that is neither, ``none`` beside another, or a cache under random augmentation.
        FormatError: a file cannot be opened.
    """
    names = (section.teacher,) if isinstance(section.teacher, str) else section.teacher
    if names == ("none",) or not section.distill:
        return ()
    if "none" in names or not names:
        raise InputError(f"teacher {', '.join(names)}: say none alone, or the teachers")
    if distill.cache and section.augment != "none":
        raise InputError("cache: augmentation makes every image new, nothing would be found again; use augment none")
    return tuple(Teacher(model=_teacher(name, original, distill.cache, folder, examples)) for name in names)


def _teacher(
    name: str, original: nn.Module, cache: bool, folder: Path, examples: int
) -> Callable[[Tensor], object] | TeacherCache:
    if name != "original" and Path(name).suffix != ".onnx":
        raise InputError(f"teacher {name}: expected original, none or an ONNX file")
    found = original if name == "original" else onnx_teacher(Path(name))
    if not cache:
        return found
    identity = "" if name == "original" else hashlib.sha256(Path(name).read_bytes()).hexdigest()
    place = folder / "teachers" / ("original" if name == "original" else Path(name).stem)
    return TeacherCache(found, place, capacity=examples, identity=identity)


def onnx_teacher(path: Path) -> Callable[[Tensor], Tensor]:
    """Open an ONNX file, float or quantized, as a teacher: a batch → logits, in ONNX Runtime.

    Raises:
        FormatError: the file cannot be opened, or does not run on the batches.
    """
    runtime = open_onnx(path, torch.get_num_threads())

    def answer(inputs: Tensor) -> Tensor:
        return torch.from_numpy(runtime(inputs.detach().cpu().contiguous().numpy()))

    return answer


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
    """Say who taught, and by which losses where they were chosen."""
    names = (section.teacher,) if isinstance(section.teacher, str) else section.teacher
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
