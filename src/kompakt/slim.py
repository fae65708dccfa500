"""Make the network smaller before it is quantized: remove channels, then train what is left."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kompakt.augment import crop_and_flip
from kompakt.build.distill import Objective, Teacher, Term
from kompakt.build.follow import follow
from kompakt.build.prune import apply_prune, units_of
from kompakt.build.reconstruct import reconstruct
from kompakt.build.train import Hooks, TrainSettings, reestimate_bn, shuffled, train
from kompakt.data import Data
from kompakt.errors import InputError
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.graph import Left
from kompakt.graph.trace import trace
from kompakt.job import Job
from kompakt.methods.channels import Knobs, channels
from kompakt.methods.scores import Scoring, unit_scores
from kompakt.numerics.saliency import saliency
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import FinetuneSection, PruneSection

GRADIENT_EXAMPLES = 512
FIT_EXAMPLES = 512
BN_EXAMPLES = 2048


@dataclass(frozen=True, kw_only=True)
class Slim:
    """A smaller network, the plan that made it, and what was done."""

    model: nn.Module
    plan: Plan
    did: str
    left: tuple[Left, ...] = ()


def slim(job: Job, example: Tensor) -> Slim:
    """Prune and train as the recipe says; the job's model itself is left as it was.

    Raises:
        InputError, BudgetError: a knob does not fit the model, or the target cannot be reached.
    """
    prune, tune = job.recipe.prune, job.recipe.finetune
    found = Slim(model=job.model, plan=Plan(), did="")
    if prune is not None:
        job.say("removing channels")
        found = pruned(job.model, job.data, prune, example, job.seed)
    if tune.epochs:
        job.say(f"training for {tune.epochs} epochs")
        found = tuned(found, job.model, job.data, tune, seed=job.seed, progress=job.progress)
    return found


def pruned(model: nn.Module, data: Data | None, section: PruneSection, example: Tensor, seed: int) -> Slim:
    """Remove channels and mend what is left without training: see ``PruneSection.reconstruct``.

    Args:
        model: the original.
        data: for gradients and for mending; without it neither is possible.
        section: what the recipe says.
        example: a batch of inputs.
        seed: of the random criterion and of the examples that are drawn.
    """
    coupling = follow(model, couple(trace(model, example).graph), example)
    scoring = Scoring(criterion=section.criterion, seed=seed)
    grads = gradients(model, data, seed) if "grad" in saliency(section.criterion).needs else None
    scores = unit_scores(coupling, dict(model.state_dict()), scoring, grads)
    plan = channels(coupling, scores, _knobs(section))
    made = apply_prune(model, plan, example)
    if data is not None:
        made = _mended(model, made, coupling, plan, data, section, seed)
    return Slim(model=made.eval(), plan=plan, did=_told(coupling, plan, section), left=coupling.left)


def _mended(
    model: nn.Module, made: nn.Module, coupling: Coupling, plan: Plan, data: Data, section: PruneSection, seed: int
) -> nn.Module:
    """Refit the layers that lost inputs, or estimate the batch norms' statistics anew."""
    count = FIT_EXAMPLES if section.reconstruct else BN_EXAMPLES
    part = data.train.subset(min(count, len(data.train)), seed=seed)
    batches = part.batches(128, shuffle=True, generator=torch.Generator().manual_seed(seed))
    if section.reconstruct:
        return reconstruct(model, made, coupling, plan, batches)
    reestimate_bn(made, batches)
    return made


def tuned(
    found: Slim, original: nn.Module, data: Data, section: FinetuneSection, *, seed: int, progress: bool = False
) -> Slim:
    """Train the smaller network, with the original as teacher if the recipe says so."""
    model = copy.deepcopy(found.model)
    settings = TrainSettings(
        epochs=section.epochs,
        learning_rate=section.learning_rate,
        warmup_epochs=min(1.0, section.epochs / 4),
        seed=seed,
    )
    taught = section.teacher == "original" and section.distill > 0
    term = Term(loss="soft_targets", weight=section.distill, knobs={"temperature": section.temperature})
    objective = Objective(terms=(term,), task_weight=1 - section.distill) if taught else Objective()
    augment = crop_and_flip if section.augment == "crop_and_flip" else None
    loader = shuffled(data.train, section.batch_size, seed=seed, augment=augment)
    teachers = (Teacher(model=original),) if taught else ()
    train(model, loader, settings, objective=objective, teachers=teachers, hooks=Hooks(progress=progress))
    with_teacher = " with the original as teacher" if taught else ""
    did = f"{found.did}; trained for {section.epochs} epochs{with_teacher}".removeprefix("; ")
    return Slim(model=model.eval(), plan=found.plan, did=did, left=found.left)


def _knobs(section: PruneSection) -> Knobs:
    return Knobs(
        ratio=section.channels,
        fewer_macs=section.fewer_macs,
        fewer_params=section.fewer_params,
        allocation=section.allocation,
        align=section.align,
        min_width=section.min_width,
        ignore=section.ignore,
    )


def gradients(model: nn.Module, data: Data | None, seed: int) -> dict[str, Tensor]:
    """Sum the gradients of the cross entropy over some training examples."""
    if data is None:
        raise InputError("this criterion needs gradients: give --data")
    part = data.train.subset(min(GRADIENT_EXAMPLES, len(data.train)), seed=seed)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for inputs, labels in part.batches(64):
        loss = F.cross_entropy(model(inputs), labels, reduction="sum")
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                total[name] += gradient
    return total


def _told(coupling: Coupling, plan: Plan, section: PruneSection) -> str:
    """Say what a plan removes."""
    units = units_of(coupling, plan)
    before, after = coupling.cost_after(()), coupling.cost_after(units)
    share = len(units) / max(sum(group.size for group in coupling.groups), 1)
    return (
        f"{share:.0%} of the channels removed by {section.criterion}, {section.allocation} allocation: "
        f"{before.macs / after.macs:.2f}× fewer MACs, {before.params / after.params:.2f}× fewer parameters"
    )
