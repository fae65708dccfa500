"""Quantization-aware training of a job: what its recipe's ``[qat]`` section says, on its training data."""

from torch import nn

from kompakt.build.aware import Aware, Form, aware, with_signs
from kompakt.build.quantize import codebooks, quantize
from kompakt.build.train import Hooks, train
from kompakt.errors import InputError
from kompakt.graph.calibrate import Stats
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.job import Job
from kompakt.plan.plan import Plan, Share
from kompakt.plan.recipe import QuantizeSection
from kompakt.refinement import refine, rounding
from kompakt.teaching import batches, settings, taught


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
    made = begun(job, job.recipe.quantize, trace(model, example), signed, stats, section.weights)
    job.say(f"quantization-aware training for {section.epochs} epochs")
    who, goal = taught(job, made.module, section, example)
    board = job.out / "tensorboard" if section.tensorboard else None
    hooks = Hooks(progress=job.progress, tensorboard=board)
    how = settings(section, job.out, made.module, job.seed)
    train(made.module, batches(section, job, job.seed), how, objective=goal, teachers=who, hooks=hooks)
    return made


def begun(
    job: Job, section: QuantizeSection | None, capture: Capture, plan: Plan, stats: Stats, form: Form = "steps"
) -> Aware:
    """Return the form that is trained; values that a whole tensor shares begin as refined without training.

    Args:
        job: whose data refine.
        section: what is asked beyond rounding to nearest; None asks nothing.
        capture: of the float model, batch norms not folded.
        plan: made for the folded capture.
        stats: of the folded capture.
        form: see ``aware``.
    """
    made = aware(capture, plan, stats, form, job.seed)
    shared = [entry.tensor for entry in plan.of(Share) if entry.grid == "free" and entry.granularity == "tensor"]
    if shared and section is not None and rounding(section) != "nearest":
        folded = fold(capture)
        better = refine(job, section, folded, quantize(folded, plan, stats, job.seed), plan)
        books, found = codebooks(made.module), codebooks(better.module)
        for name in shared:
            books[name].begin_at(found[name])
    return made
