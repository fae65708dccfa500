"""Make the network smaller before it is quantized: remove channels, then train what is left."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kompakt.alignment import alignment
from kompakt.allotment import Timing, allotted, classifies, faster, loss_on, times_faster_for
from kompakt.build.drop import apply_drop
from kompakt.build.follow import follow
from kompakt.build.prune import apply_prune, units_of, verify
from kompakt.build.reconstruct import reconstruct
from kompakt.build.structure import checked_structure
from kompakt.build.train import reestimate_bn
from kompakt.data import Data
from kompakt.errors import InputError
from kompakt.evidence import evidence
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.trace import trace
from kompakt.job import Job
from kompakt.methods.blocks import drop_blocks, residual_blocks
from kompakt.methods.channels import Knobs
from kompakt.methods.scores import Scoring, unit_scores
from kompakt.methods.sparse import masks
from kompakt.plan.plan import Plan, Prune, Quantize, Share, Sparsify
from kompakt.plan.recipe import FinetuneSection, PruneSection, QuantizeSection
from kompakt.sparsity import sparse_trained, thinned
from kompakt.teaching import learner
from kompakt.training import Slim, keeper, tuned

Maker = Callable[[Job, Tensor], Slim]
"""Makes a smaller network of a job's model."""
FIT_EXAMPLES = 512
BN_EXAMPLES = 2048


def slim(job: Job, example: Tensor, earlier: "Maker | None" = None) -> Slim:
    """Prune, sparsify and train as the recipe says; the job's model itself is left as it was.

    Args:
        job: whose model and recipe.
        example: a batch of inputs.
        earlier: what makes the rounds that come before (``[[before]]``), this function itself where nothing is said.

    Raises:
        InputError, BudgetError: a knob does not fit the model, or the target cannot be reached.
    """
    prune, thin, tune, penalised = (
        job.recipe.prune,
        job.recipe.sparsify,
        job.recipe.finetune,
        job.recipe.sparse_training,
    )
    if (text := job.recipe.distill.student) is not None:
        job.say(f"making the student {text}")
        return _taught(job, text, example)
    found = Slim(model=job.model, plan=Plan(), did="")
    if job.recipe.before:
        found = (earlier or slim)(dataclasses.replace(job, recipe=job.recipe.earlier()), example)
        prune = job.recipe.remaining()
    if job.plan is not None:
        found = as_planned(job.model, job.plan, example, job.data, job.seed)
    if penalised is not None:
        if penalised.penalty == "l1" and prune is not None:
            raise InputError("penalty l1 zeroes single weights; before channels go use group_lasso, bn_l1 or greg")
        found = sparse_trained(found, job, penalised, example)
    prune = None if prune is None else within_bytes(prune, found.model, job.recipe.quantize)
    if prune is not None and prune.rounds > 1:
        return _in_rounds(found, job, prune, tune, example)
    if prune is not None:
        job.say("removing channels")
        found = _after(found, pruned(found.model, job.data, prune, example, job.seed, job.timing, _curves(job)))
    if thin is not None:
        return thinned(found, job, thin, tune, example)
    if tune.epochs:
        job.say(f"training for {tune.epochs} epochs")
        found = tuned(found, job, tune, example, job.seed + len(job.recipe.before))
    return found


def within_bytes(section: PruneSection, model: nn.Module, quantize: QuantizeSection | None) -> PruneSection:
    """Say a budget of bytes as how many times fewer parameters: each takes the bits of ``[quantize]``, or 32.

    Raises:
        InputError: the model is within the budget as it is.
    """
    if section.max_bytes is None:
        return section
    bits = 32 if quantize is None else quantize.bits_each
    whole = sum(parameter.numel() for parameter in model.parameters()) * bits / 8
    if whole <= section.max_bytes:
        raise InputError(
            f"max_bytes {section.max_bytes:,}: at {bits:g} bits each the parameters take {whole:,.0f} already; "
            "ask for less, or prune nothing"
        )
    return section.model_copy(update={"max_bytes": None, "fewer_params": whole / section.max_bytes})


def _after(found: Slim, cut: Slim) -> Slim:
    """Join what was done before with what was removed after it."""
    entries = (*found.plan.entries, *cut.plan.entries)
    did = f"{found.did}; {cut.did}".removeprefix("; ")
    return dataclasses.replace(cut, plan=Plan(entries=entries), did=did, left=(*found.left, *cut.left))


def as_planned(model: nn.Module, plan: Plan, example: Tensor, data: Data | None = None, seed: int = 0) -> Slim:
    """Carry out what a plan says of shapes and zeros; its integers and codebooks come later.

    Args:
        model: the model that the plan was made for.
        plan: checked against the model first.
        example: a batch of inputs.
        data: where channels go, batch norms are estimated anew on it.
        seed: of the examples that are drawn.

    Raises:
        PlanError: the plan does not fit; the message says what differs.
        InputError: a criterion of its zeros needs data.
    """
    shapes = plan.without(*plan.of(Quantize), *plan.of(Share))
    if not shapes.entries:
        return Slim(model=model, plan=shapes, did="")
    made = checked_structure(model, shapes, example).eval()
    inputs: dict[str, dict[str, Tensor]] = {}
    for criterion in dict.fromkeys(entry.criterion for entry in shapes.of(Sparsify)):
        inputs |= evidence(criterion, made, data, seed)
    keep = masks(shapes, dict(made.named_parameters()), inputs)
    keeper(keep)(made, 0)
    if data is not None and shapes.of(Prune):
        reestimate_bn(made, _batches(data, BN_EXAMPLES, seed))
    return Slim(model=made, plan=shapes, did="made smaller by the plan given", masks=keep)


def _taught(job: Job, text: str, example: Tensor) -> Slim:
    """Make a student and train it."""
    recipe = job.recipe
    if any(part is not None for part in (recipe.sparse_training, recipe.prune, recipe.sparsify)):
        raise InputError(f"student {text}: what is pruned or sparse is the model itself; thinner:0.7 prunes a student")
    made = learner(job.model, text, example, start=job.recipe.distill.start, seed=job.seed)
    found = Slim(model=made.model, plan=made.plan, did=f"student {text}", left=made.left, name="student")
    tune = job.recipe.finetune
    return tuned(found, job, tune, example, job.seed) if tune.epochs else found


def _in_rounds(found: Slim, job: Job, prune: PruneSection, tune: FinetuneSection, example: Tensor) -> Slim:
    """Prune a little, train, and again (Han et al. 2015, arXiv:1506.02626); every round starts from the last."""
    if tune.epochs < prune.rounds:
        raise InputError(f"{prune.rounds} rounds need at least as many epochs of training, found {tune.epochs}")
    if job.recipe.sparsify is not None or job.plan is not None:
        raise InputError(
            f"{prune.rounds} rounds go with channels alone: leave out single weights and the plan, or rounds"
        )
    part, each = _share(prune), tune.model_copy(update={"epochs": tune.epochs // prune.rounds})
    for turn in range(prune.rounds):
        job.say(f"round {turn + 1} of {prune.rounds}: removing channels")
        first = {"drop_blocks": 0 if turn else prune.drop_blocks}
        cut = pruned(found.model, job.data, part.model_copy(update=first), example, job.seed, job.timing, _curves(job))
        cut = tuned(cut, job, each, example, job.seed + turn)
        entries = (*found.plan.entries, *cut.plan.entries)
        found = Slim(model=cut.model, plan=Plan(entries=entries), did=cut.did, left=cut.left)
    did = f"pruned in {prune.rounds} rounds, each trained for {each.epochs} epochs; the last: {found.did}"
    return dataclasses.replace(found, did=did)


def _curves(job: Job) -> Path | None:
    """Where measured effects are kept: beside the networks that many jobs share."""
    return None if job.networks is None else job.networks / "curves"


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
    curves: Path | None = None,
) -> Slim:
    """Remove blocks and channels and mend what is left without training: see ``PruneSection.reconstruct``.

    Args:
        model: the original.
        data: for gradients, measured effects and mending; without it none of them is possible.
        section: what the recipe says.
        example: a batch of inputs.
        seed: of the random criterion and of the examples that are drawn.
        timing: where times are measured: for the latency allocation and the alignment of widths.
        curves: folder where measured effects are kept for another call on the same data; None keeps none.
    """
    section = _settled(section, model, data)
    blocks = dropped(model, data, section.drop_blocks, example, seed)
    coupling = follow(blocks.model, couple(trace(blocks.model, example).graph), example)
    scoring = Scoring(criterion=section.criterion, seed=seed, **_units(section))
    inputs = evidence(section.criterion, blocks.model, data, seed)
    scores = unit_scores(coupling, dict(blocks.model.state_dict()), scoring, measured=inputs)
    knobs, speed = _knobs(section, coupling, timing), None
    if section.allocation == "latency":
        assert timing is not None
        times = _times_faster(section, blocks.model, example, timing)
        plan, speed = faster(blocks.model, coupling, scores, knobs, example, timing, times)
    else:
        plan = allotted(blocks.model, coupling, scores, knobs, data, seed, curves)
    made = apply_prune(blocks.model, plan, example)
    verify(coupling, plan, made, example)
    if data is not None:
        made = _mended(blocks.model, made, coupling, plan, data, section, seed)
    did = f"{blocks.did}; {_told(coupling, plan, section, knobs)}".removeprefix("; ")
    did += "" if speed is None else f", measured {speed:.2f}× faster"
    whole = Plan(entries=(*blocks.plan.entries, *plan.entries))
    return Slim(model=made.eval(), plan=whole, did=did, left=coupling.left)


def _settled(section: PruneSection, model: nn.Module, data: Data | None) -> PruneSection:
    """Say how much goes where and how widths are aligned, where the recipe does not."""
    timed = section.times_faster is not None or section.max_latency_ms is not None
    if timed and section.allocation not in (None, "latency"):
        raise InputError(f"times_faster and max_latency_ms go with the latency allocation, not {section.allocation}")
    if section.allocation == "latency" and not timed:
        raise InputError("the latency allocation needs to know how much faster: give --times-faster 2")
    measured = data is not None and not timed and section.allocation is None and classifies(model, data)
    allocation = (
        "latency" if timed else section.allocation or ("sensitivity" if measured and not section.layers else "global")
    )
    align = section.align if section.align is not None else ("auto" if allocation == "latency" else 1)
    return section.model_copy(update={"allocation": allocation, "align": align})


def _times_faster(section: PruneSection, model: nn.Module, example: Tensor, timing: Timing) -> float:
    if section.max_latency_ms is not None:
        return times_faster_for(model, example, timing, section.max_latency_ms)
    return section.times_faster or 1.0


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
    batches = _batches(data, count, seed)
    if section.reconstruct:
        return reconstruct(model, made, coupling, plan, batches)
    reestimate_bn(made, batches)
    return made


def _batches(data: Data, count: int, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Return so many training examples, classes mixed."""
    part = data.train.subset(min(count, len(data.train)), seed=seed)
    return part.batches(128, shuffle=True, generator=torch.Generator().manual_seed(seed))


def _units(section: PruneSection) -> dict[str, Any]:
    """Say how scores of members become one; Taylor scores stay in units of the loss where groups are weighed."""
    weighed = section.allocation in ("global", "knapsack", "latency") and section.criterion.startswith("taylor")
    said = {"normalisation": section.normalisation, "reduction": section.reduction}
    default = {"normalisation": "none", "reduction": "sum"} if weighed else {}
    return default | {name: value for name, value in said.items() if value is not None}


def _knobs(section: PruneSection, coupling: Coupling, timing: Timing | None) -> Knobs:
    if timing is None and (section.align == "auto" or section.allocation == "latency"):
        raise InputError("align auto and the latency allocation measure times: there is no runtime to measure them in")
    align = alignment(coupling, timing.layers) if section.align == "auto" and timing is not None else section.align
    return Knobs(
        ratio=section.channels,
        fewer_macs=section.fewer_macs,
        fewer_params=section.fewer_params,
        allocation=section.allocation or "global",
        align=int(align or 1),
        min_width=section.min_width,
        ratios=tuple(section.layers.items()),
        ignore=section.ignore,
    )


def _told(coupling: Coupling, plan: Plan, section: PruneSection, knobs: Knobs) -> str:
    """Say what a plan removes."""
    units = units_of(coupling, plan)
    before, after = coupling.cost_after(()), coupling.cost_after(units)
    share = len(units) / max(sum(group.size for group in coupling.groups), 1)
    return (
        f"{share:.0%} of the channels removed by {section.criterion}, {section.allocation} allocation: "
        f"{before.macs / after.macs:.2f}× fewer MACs, {before.params / after.params:.2f}× fewer parameters"
        + (f", widths in multiples of {knobs.align} (measured)" if section.align == "auto" else "")
    )
