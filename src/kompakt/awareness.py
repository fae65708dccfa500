"""Quantization-aware training of a job: what its recipe's ``[qat]`` section says, on its training data."""

from torch import Tensor, nn

from kompakt.augment import crop_and_flip
from kompakt.build.aware import Aware, aware, with_signs
from kompakt.build.distill import Objective, Teacher
from kompakt.build.train import Hooks, TrainSettings, shuffled, train
from kompakt.errors import InputError
from kompakt.graph.calibrate import Stats
from kompakt.graph.trace import trace
from kompakt.job import Job
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import FinetuneSection
from kompakt.teaching import objective, teachers


def trained(job: Job, model: nn.Module, plan: Plan, stats: Stats) -> Aware:
    """Train a network under a plan and return its trained form; ``build.aware.shipped`` makes of it what ships.

    Args:
        job: with ``[qat]`` epochs.
        model: what is quantized, pruned or not; it is left as it was.
        plan: made for its folded capture.
        stats: of that capture.

    Raises:
        InputError: the plan holds ranges that are taken at run time, which cannot be learned.
    """
    section = job.recipe.qat
    if any(entry.spec.dynamic for entry in plan.entries if hasattr(entry, "spec")):
        raise InputError("quantization-aware training learns ranges; dynamic ones are taken at run time")
    example = next(iter(job.data.train.batches(2, limit=2)))[0]
    signed = with_signs(plan, section.weights)
    made = aware(trace(model, example), signed, stats, section.weights, job.seed)
    job.say(f"quantization-aware training for {section.epochs} epochs")
    who, goal = taught(job, made.module, section, example)
    loader = shuffled(job.data.train, section.batch_size, seed=job.seed, augment=_augment(section))
    settings = TrainSettings(
        epochs=section.epochs,
        learning_rate=section.learning_rate,
        warmup_epochs=min(1.0, section.epochs / 4),
        channels_last=True,
        seed=job.seed,
    )
    board = job.out / "tensorboard" if section.tensorboard else None
    hooks = Hooks(progress=job.progress, tensorboard=board)
    train(made.module, loader, settings, objective=goal, teachers=who, hooks=hooks)
    return made


def taught(
    job: Job, student: nn.Module, section: FinetuneSection, example: Tensor
) -> tuple[tuple[Teacher, ...], Objective]:
    """Return the teachers and the objective that a section asks for, as for fine-tuning."""
    distill = job.recipe.distill
    who = teachers(section, distill, job.model, job.out, len(job.data.train))
    return who, objective(section, distill, job.model, student, example) if who else Objective()


def _augment(section: FinetuneSection) -> object:
    return crop_and_flip if section.augment == "crop_and_flip" else None
