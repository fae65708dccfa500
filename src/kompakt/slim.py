"""Make the network smaller before it is quantized: remove channels, then train what is left."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kompakt.allotment import Timing, allotted, faster, loss_on
from kompakt.augment import crop_and_flip
from kompakt.build.drop import apply_drop
from kompakt.build.follow import follow
from kompakt.build.prune import apply_prune, units_of
from kompakt.build.reconstruct import reconstruct
from kompakt.build.train import Hooks, Objective, TrainSettings, reestimate_bn, shuffled, train
from kompakt.data import Data
from kompakt.errors import InputError
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.graph import Left
from kompakt.graph.trace import trace
from kompakt.job import Job
from kompakt.methods.blocks import drop_blocks, residual_blocks
from kompakt.methods.channels import Knobs
from kompakt.methods.scores import Scoring, unit_scores
from kompakt.methods.sparse import SparseKnobs, masks, sparse
from kompakt.numerics.saliency import saliency
from kompakt.plan.plan import Plan, Quantize, Share
from kompakt.plan.recipe import FinetuneSection, PruneSection, SparsifySection
from kompakt.teaching import learner, objective, taught_by, teachers

GRADIENT_EXAMPLES = 512
FIT_EXAMPLES = 512
BN_EXAMPLES = 2048


@dataclass(frozen=True, kw_only=True)
class Slim:
    """A smaller network, the plan that made it, what was done, which weights stay in training, the stage's name."""

    model: nn.Module
    plan: Plan
    did: str
    left: tuple[Left, ...] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = ""


def slim(job: Job, example: Tensor) -> Slim:
    """Prune, sparsify and train as the recipe says; the job's model itself is left as it was.

    Raises:
        InputError, BudgetError: a knob does not fit the model, or the target cannot be reached.
    """
    prune, thin, tune = job.recipe.prune, job.recipe.sparsify, job.recipe.finetune
    if (text := job.recipe.distill.student) is not None:
        job.say(f"making the student {text}")
        return _taught(job, text, example)
    found = Slim(model=job.model, plan=Plan(), did="")
    if job.plan is not None:
        found = _as_planned(job.model, job.plan, example)
    if prune is not None and prune.rounds > 1:
        return _in_rounds(job, prune, tune, example)
    if prune is not None:
        job.say("removing channels")
        cut = pruned(found.model, job.data, prune, example, job.seed, job.timing)
        found = dataclasses.replace(cut, plan=Plan(entries=(*found.plan.entries, *cut.plan.entries)))
    if thin is not None:
        job.say("setting weights to zero")
        found = sparsified(found, thin, example, job.data, job.seed)
    if tune.epochs:
        job.say(f"training for {tune.epochs} epochs")
        found = tuned(found, job, tune, example, job.seed)
    return found


def _as_planned(model: nn.Module, plan: Plan, example: Tensor) -> Slim:
    """Carry out what a plan says of shapes; its integers and codebooks come later."""
    shapes = plan.without(*plan.of(Quantize), *plan.of(Share))
    if not shapes.entries:
        return Slim(model=model, plan=shapes, did="")
    return Slim(model=apply_prune(model, shapes, example).eval(), plan=shapes, did="channels removed by the plan given")


def _taught(job: Job, text: str, example: Tensor) -> Slim:
    """Make a student and train it."""
    if job.recipe.prune is not None or job.recipe.sparsify is not None:
        raise InputError(f"student {text}: prune and sparsify are for the model itself; thinner:0.7 prunes a student")
    made = learner(job.model, text, example, start=job.recipe.distill.start, seed=job.seed)
    found = Slim(model=made.model, plan=made.plan, did=f"student {text}", left=made.left, name="student")
    tune = job.recipe.finetune
    return tuned(found, job, tune, example, job.seed) if tune.epochs else found


def _in_rounds(job: Job, prune: PruneSection, tune: FinetuneSection, example: Tensor) -> Slim:
    """Prune a little, train, and again (Han et al. 2015, arXiv:1506.02626); every round starts from the last."""
    if tune.epochs < prune.rounds:
        raise InputError(f"{prune.rounds} rounds need at least as many epochs of training, found {tune.epochs}")
    if job.recipe.sparsify is not None or job.plan is not None:
        raise InputError(
            f"{prune.rounds} rounds go with channels alone: leave out single weights and the plan, or rounds"
        )
    part, each = _share(prune), tune.model_copy(update={"epochs": tune.epochs // prune.rounds})
    found = Slim(model=job.model, plan=Plan(), did="")
    for turn in range(prune.rounds):
        job.say(f"round {turn + 1} of {prune.rounds}: removing channels")
        first = {"drop_blocks": 0 if turn else prune.drop_blocks}
        cut = pruned(found.model, job.data, part.model_copy(update=first), example, job.seed, job.timing)
        cut = tuned(cut, job, each, example, job.seed + turn)
        entries = (*found.plan.entries, *cut.plan.entries)
        found = Slim(model=cut.model, plan=Plan(entries=entries), did=cut.did, left=cut.left)
    did = f"pruned in {prune.rounds} rounds, each trained for {each.epochs} epochs; the last: {found.did}"
    return dataclasses.replace(found, did=did)


def _share(prune: PruneSection) -> PruneSection:
    """Return what one of the rounds removes, so that all together remove what was asked."""
    rounds = prune.rounds
    return prune.model_copy(
        update={
            "rounds": 1,
            "drop_blocks": 0,
            "channels": None if prune.channels is None else 1 - (1 - prune.channels) ** (1 / rounds),
            **{
                name: None if (times := getattr(prune, name)) is None else times ** (1 / rounds)
                for name in ("fewer_macs", "fewer_params", "times_faster")
            },
        }
    )


def pruned(
    model: nn.Module,
    data: Data | None,
    section: PruneSection,
    example: Tensor,
    seed: int,
    timing: Timing | None = None,
) -> Slim:
    """Remove blocks and channels and mend what is left without training: see ``PruneSection.reconstruct``.

    Args:
        model: the original.
        data: for gradients and for mending; without it neither is possible.
        section: what the recipe says.
        example: a batch of inputs.
        seed: of the random criterion and of the examples that are drawn.
        timing: where the latency allocation measures times.
    """
    blocks = dropped(model, data, section.drop_blocks, example, seed)
    coupling = follow(blocks.model, couple(trace(blocks.model, example).graph), example)
    scoring = Scoring(criterion=section.criterion, seed=seed, **_units(section))
    grads = gradients(blocks.model, data, seed) if "grad" in saliency(section.criterion).needs else None
    scores = unit_scores(coupling, dict(blocks.model.state_dict()), scoring, grads)
    knobs, speed = _knobs(section), None
    if section.allocation == "latency":
        if timing is None or section.times_faster is None:
            raise InputError("the latency allocation needs to know how much faster: give --times-faster 2")
        plan, speed = faster(blocks.model, coupling, scores, knobs, example, timing, section.times_faster)
    else:
        plan = allotted(blocks.model, coupling, scores, knobs, data, seed)
    made = apply_prune(blocks.model, plan, example)
    if data is not None:
        made = _mended(blocks.model, made, coupling, plan, data, section, seed)
    did = f"{blocks.did}; {_told(coupling, plan, section)}".removeprefix("; ")
    did += "" if speed is None else f", measured {speed:.2f}× faster"
    whole = Plan(entries=(*blocks.plan.entries, *plan.entries))
    return Slim(model=made.eval(), plan=whole, did=did, left=coupling.left)


def dropped(model: nn.Module, data: Data | None, count: int, example: Tensor, seed: int) -> Slim:
    """Replace so many residual blocks by the identity, those whose loss raises the training loss least."""
    if not count:
        return Slim(model=model, plan=Plan(), did="")
    if data is None:
        raise InputError("dropping blocks needs data to measure their effect on: give --data")
    blocks = residual_blocks(trace(model, example).graph)
    plan, history = drop_blocks(model, blocks, loss_on(data, seed), count=count)
    names = ", ".join(name for name, _ in history)
    return Slim(model=apply_drop(model, plan, example).eval(), plan=plan, did=f"blocks dropped: {names}")


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


def tuned(found: Slim, job: Job, section: FinetuneSection, example: Tensor, seed: int) -> Slim:
    """Train the smaller network, taught as the recipe says; weights that were set to zero stay zero."""
    model, distill = copy.deepcopy(found.model), job.recipe.distill
    settings = TrainSettings(
        epochs=section.epochs,
        learning_rate=section.learning_rate,
        warmup_epochs=min(1.0, section.epochs / 4),
        seed=seed,
    )
    augment = crop_and_flip if section.augment == "crop_and_flip" else None
    loader = shuffled(job.data.train, section.batch_size, seed=seed, augment=augment)
    who = teachers(section, distill, job.model, job.out, len(job.data.train))
    goal = objective(section, distill, job.model, model, example) if who else Objective()
    hooks = Hooks(
        progress=job.progress,
        after_step=(keeper(found.masks),) if found.masks else (),
        tensorboard=job.out / "tensorboard" if section.tensorboard else None,
    )
    train(model, loader, settings, objective=goal, teachers=who, hooks=hooks)
    said = taught_by(section, distill) if who else ""
    did = f"{found.did}; trained for {section.epochs} epochs{said}".removeprefix("; ")
    return dataclasses.replace(found, model=model.eval(), did=did)


def _units(section: PruneSection) -> dict[str, Any]:
    """Leave Taylor scores in units of the loss where groups are weighed against each other."""
    weighed = section.allocation in ("global", "knapsack", "latency") and section.criterion.startswith("taylor")
    return {"normalisation": "none", "reduction": "sum"} if weighed else {}


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


def sparsified(found: Slim, section: SparsifySection, example: Tensor, data: Data | None, seed: int) -> Slim:
    """Set weights to zero; ``masks`` of the result keep them so in training."""
    n_of_m = None if section.n_of_m is None else tuple(int(part) for part in section.n_of_m.split(":"))
    knobs = SparseKnobs(
        sparsity=section.sparsity,
        n_of_m=n_of_m,  # type: ignore[arg-type]  # the pattern has two parts
        scope=section.scope,
        criterion=section.criterion,
        block=section.block,
        ignore=section.ignore,
    )
    model = copy.deepcopy(found.model)
    tensors = dict(model.named_parameters())
    inputs = {"grad": gradients(model, data, seed)} if "grad" in saliency(section.criterion).needs else {}
    plan, left = sparse(trace(model, example).graph, tensors, knobs, inputs)
    keep = masks(plan, tensors, inputs)
    keeper(keep)(model, 0)
    if data is not None:
        part = data.train.subset(min(BN_EXAMPLES, len(data.train)), seed=seed)
        reestimate_bn(model, part.batches(128, shuffle=True, generator=torch.Generator().manual_seed(seed)))
    zeros = sum(int((~mask).sum()) for mask in keep.values())
    share = zeros / max(1, sum(mask.numel() for mask in keep.values()))
    did = f"{found.did}; {100 * share:.1f} % of the weights of {len(keep)} layers set to zero".removeprefix("; ")
    return Slim(
        model=model.eval(),
        plan=Plan(entries=(*found.plan.entries, *plan.entries)),
        did=did,
        left=(*found.left, *left),
        masks=keep,
    )


def keeper(keep: Mapping[str, Tensor]) -> Callable[[nn.Module, int], None]:
    """Return a hook for the training loop that sets to zero again what ``keep`` has False for."""

    def after_step(model: nn.Module, step: int) -> None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in keep:
                    weight.mul_(keep[name].to(weight.device, weight.dtype))

    return after_step


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
