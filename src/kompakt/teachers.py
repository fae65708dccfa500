"""Who teaches: the original, in ONNX Runtime where that is faster, or ONNX files; answers kept on disk if asked."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kompakt.artifact.onnx import export_onnx, open_onnx
from kompakt.augment import FORMS
from kompakt.build.distill import Teacher
from kompakt.build.taps import inference
from kompakt.build.teacher_cache import TeacherCache, weights_digest
from kompakt.errors import InputError, KompaktError
from kompakt.files import atomic_write, writable_folder
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.job import Job
from kompakt.measure.latency import interleave
from kompakt.numerics.losses import LOGIT_LOSSES
from kompakt.plan.recipe import FinetuneSection

Answers = Callable[[Tensor], object]
TIMED_EXAMPLES = 32
TOLERANCE = 1e-3
"""Largest difference of logits between PyTorch and ONNX Runtime, relative to the largest logit."""


def teachers(job: Job, section: FinetuneSection, example: Tensor) -> tuple[Teacher, ...]:
    """Return who teaches: the original, ONNX files in ONNX Runtime, or nobody.

    Args:
        job: whose original may teach; its folder, or that of networks that many jobs share, gets the caches of
            outputs, where they are asked for.
        section: what the recipe says of this training.
        example: a batch of inputs.

    Raises:
        InputError: a teacher that is neither, ``none`` beside another, or a cache under random augmentation.
        FormatError: a file cannot be opened.
    """
    names = (section.teacher,) if isinstance(section.teacher, str) else section.teacher
    if names == ("none",) or not section.distill:
        return ()
    if "none" in names or not names:
        raise InputError(f"teacher {', '.join(names)}: say none alone, or the teachers")
    if job.recipe.distill.cache and section.augment not in FORMS:
        raise InputError(
            f"cache: augment {section.augment} makes every image new, nothing would be found again; use "
            f"{' or '.join(FORMS)}"
        )
    return tuple(Teacher(model=_teacher(job, section, name, example)) for name in names)


def _teacher(job: Job, section: FinetuneSection, name: str, example: Tensor) -> Answers:
    """Return one teacher, behind its cache where there is one."""
    if name != "original" and Path(name).suffix != ".onnx":
        raise InputError(f"teacher {name}: expected original, none or an ONNX file")
    cache, place = job.recipe.distill.cache, (job.networks or job.out) / "teachers"
    if name != "original":
        found: Answers = onnx_teacher(Path(name))
    elif all(term.loss in LOGIT_LOSSES for term in job.recipe.distill.terms):
        found = swift(job.model, example, section.batch_size, place, job.say)
    else:
        found = job.model  # losses on features look inside
    if not cache:
        return found
    identity = weights_digest(job.model) if name == "original" else hashlib.sha256(Path(name).read_bytes()).hexdigest()
    folder = (place if cache is True else Path(str(cache))) / Path(name).stem
    return TeacherCache(found, folder, capacity=FORMS[section.augment] * len(job.data.train), identity=identity)


def onnx_teacher(path: Path) -> Callable[[Tensor], Tensor]:
    """Open an ONNX file, float or quantized, as a teacher: a batch → logits, in ONNX Runtime.

    Raises:
        FormatError: the file cannot be opened, or does not run on the batches.
    """
    runtime = open_onnx(path, torch.get_num_threads())

    def answer(inputs: Tensor) -> Tensor:
        return torch.from_numpy(runtime(inputs.detach().cpu().contiguous().numpy()))

    return answer


def swift(model: nn.Module, example: Tensor, batch_size: int, folder: Path, say: Callable[[str], None]) -> Answers:
    """Return what answers as a model does and sooner: its ONNX file in ONNX Runtime, or the model itself.

    Both are timed side by side and their fastest calls compared: other work on the machine only adds time. ONNX
    Runtime is taken unless it is slower, the model cannot be exported, or the answers differ. The choice is kept in
    ``folder``, so that a run that goes on goes on alike.

    Args:
        model: the teacher.
        example: a batch of inputs.
        batch_size: examples a step.
        folder: gets ``original.onnx`` and ``original.json``.
        say: is told why the model itself teaches.
    """
    if torch.accelerator.is_available():
        return model
    path, choice = writable_folder(folder) / "original.onnx", folder / "original.json"
    digest = weights_digest(model)
    made = json.loads(choice.read_bytes()) if choice.exists() else {}
    why = made.get("why") if made.get("identity") == digest else _hindrance(model, example, batch_size, path)
    atomic_write(choice, json.dumps({"identity": digest, "why": why}).encode())
    if why is None:
        return onnx_teacher(path)
    say(f"the teacher runs in PyTorch, not in ONNX Runtime: {why}")
    return model


def _hindrance(model: nn.Module, example: Tensor, batch_size: int, path: Path) -> str | None:
    """Export a teacher and say why its file should not teach, or None."""
    try:
        answer = onnx_teacher(export_onnx(fold(trace(model, example)), path))
        with inference(model):
            theirs, ours = answer(example), model(example)
    except KompaktError as error:
        return str(error)
    if (ours - theirs).abs().max() > TOLERANCE * ours.abs().max():
        return "its answers differ"
    batch = example[:1].expand(min(batch_size, TIMED_EXAMPLES), *example.shape[1:]).contiguous()
    with inference(model):
        times = interleave({"model": partial(model, batch), "file": partial(answer, batch)}, rounds=10, seconds=60.0)
    ratio = min(times["file"].samples_ms) / min(times["model"].samples_ms)
    return f"{ratio:.2f}× the time" if ratio > 1 else None
