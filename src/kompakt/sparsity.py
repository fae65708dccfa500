"""Single weights that become zero: at once or gradually, mended on data, in rounds, and by training with a penalty."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kompakt.build.evaluate import reestimate_bn
from kompakt.build.follow import follow
from kompakt.build.masking import Moving
from kompakt.build.penalty import STRENGTHS, Penalty, lowest
from kompakt.build.prune import apply_prune, units_of
from kompakt.build.settings import TrainSettings
from kompakt.build.sparse_update import sparse_updated
from kompakt.data import Data
from kompakt.errors import InputError
from kompakt.evidence import evidence
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.graph import Left
from kompakt.graph.trace import trace
from kompakt.job import Job
from kompakt.methods.scores import unit_scores
from kompakt.methods.sparse import SparseKnobs, eased, masks, sparse
from kompakt.methods.zeros import without_zeros
from kompakt.numerics.saliency import saliency
from kompakt.plan.plan import Plan, Sparsify
from kompakt.plan.recipe import FinetuneSection, SparseTrainingSection, SparsifySection
from kompakt.training import Extra, Slim, keeper, tuned
from kompakt.weights import load_weights

BN_EXAMPLES = 2048
FIT_EXAMPLES = 512


def thinned(found: Slim, job: Job, section: SparsifySection, tune: FinetuneSection, example: Tensor) -> Slim:
    """Set weights to zero and train what is left, in the order that the section says.

    Raises:
        InputError: what needs training has none, or the schedule does not fit the pattern.
    """
    moving = section.soft or section.schedule == "gradual"
    if not tune.epochs and (moving or section.rounds > 1 or section.rewind is not None):
        raise InputError("gradual schedules, soft masks, rounds and rewinding happen in training: give it epochs")
    if section.rounds > 1:
        return _in_rounds(found, job, section, tune, example)
    job.say("setting weights to zero")
    if moving:
        return _moving(found, job, section, tune, example)
    thin = rewound(sparsified(found, section, example, job.data, job.seed), section.rewind)
    if tune.epochs:
        job.say(f"training for {tune.epochs} epochs")
    return tuned(thin, job, tune, example, job.seed) if tune.epochs else thin


def sparsified(found: Slim, section: SparsifySection, example: Tensor, data: Data | None, seed: int) -> Slim:
    """Set weights to zero at once; ``masks`` of the result keep them so in training.

    Raises:
        InputError: a criterion or an update needs data, or a knob does not fit the model.
    """
    model = copy.deepcopy(found.model)
    tensors = dict(model.named_parameters())
    inputs = evidence(section.criterion, model, data, seed)
    plan, left = sparse(trace(model, example).graph, tensors, _knobs(section), inputs)
    if section.update == "none":
        keep = masks(plan, tensors, inputs)
        keeper(keep)(model, 0)
        if data is not None:
            part = data.train.subset(min(BN_EXAMPLES, len(data.train)), seed=seed)
            reestimate_bn(model, part.batches(128, shuffle=True, generator=torch.Generator().manual_seed(seed)))
    else:
        plan, left, model = _mended(model, plan, left, section, data, seed, inputs)
        keep = {entry.tensor: model.get_parameter(entry.tensor) != 0 for entry in plan.of(Sparsify)}
    return Slim(
        model=model.eval(),
        plan=Plan(entries=(*found.plan.entries, *plan.entries)),
        did=f"{found.did}; {_told(keep, section)}".removeprefix("; "),
        left=(*found.left, *left),
        masks=keep,
    )


def _mended(
    model: nn.Module,
    plan: Plan,
    left: tuple[Left, ...],
    section: SparsifySection,
    data: Data | None,
    seed: int,
    inputs: Mapping[str, Mapping[str, Tensor]],
) -> tuple[Plan, tuple[Left, ...], nn.Module]:
    """Make the layers sparse one after the other, mending what stays; others stay dense and are said."""
    assert section.update != "none"
    if data is None:
        raise InputError(f"update {section.update}: mends the weights on data: give --data")
    unfit = tuple(entry for entry in plan.of(Sparsify) if not _fits(model, entry.tensor))
    left = (*left, *(Left(name=e.tensor, reason="only convolutions and linear layers are mended") for e in unfit))
    plan = plan.without(*unfit)
    tensors = dict(model.named_parameters())

    def mask(name: str, weight: Tensor) -> Tensor:
        [entry] = [entry for entry in plan.of(Sparsify) if entry.tensor == name]
        return masks(Plan(entries=(entry,)), {**tensors, name: weight}, inputs)[name]

    part = data.train.subset(min(FIT_EXAMPLES, len(data.train)), seed=seed)
    return plan, left, sparse_updated(model, plan, part.batches(64), section.update, mask)


def _fits(model: nn.Module, tensor: str) -> bool:
    owner, _, leaf = tensor.rpartition(".")
    layer = model.get_submodule(owner)
    plain = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return leaf == "weight" and (plain or isinstance(layer, nn.Linear))


def _knobs(section: SparsifySection) -> SparseKnobs:
    n_of_m = None if section.n_of_m is None else tuple(int(part) for part in section.n_of_m.split(":"))
    return SparseKnobs(
        sparsity=section.sparsity,
        n_of_m=n_of_m,  # type: ignore[arg-type]  # the pattern has two parts
        scope=section.scope,
        criterion=section.criterion,
        block=section.block,
        kernels=section.kernels,
        ignore=section.ignore,
    )


def _told(keep: Mapping[str, Tensor], section: SparsifySection) -> str:
    zeros = sum(int((~mask).sum()) for mask in keep.values())
    share = zeros / max(1, sum(mask.numel() for mask in keep.values()))
    how = "" if section.update == "none" else f", the others mended by {section.update}"
    return f"{100 * share:.1f} % of the weights of {len(keep)} layers set to zero{how}"


def rewound(found: Slim, path: str | None) -> Slim:
    """Take the weights that stay back to those of a file, such as from early in training.

    The lottery ticket (Frankle and Carbin 2019, arXiv:1803.03635), rewound to early weights as in Frankle et al. 2020
    (arXiv:1912.05671). Without a file nothing changes.

    Raises:
        InputError, FormatError: the file cannot be read or does not fit the model.
    """
    if path is None:
        return found
    model = load_weights(copy.deepcopy(found.model), path)
    keeper(found.masks)(model, 0)
    return dataclasses.replace(found, model=model.eval(), did=f"{found.did}, rewound to {Path(path).name}")


def _moving(found: Slim, job: Job, section: SparsifySection, tune: FinetuneSection, example: Tensor) -> Slim:
    """Train while the masks rise or let weights come back."""
    if section.update != "none" or section.rewind is not None:
        raise InputError("gradual schedules and soft masks choose weights as they train: leave out update and rewind")
    if section.schedule == "gradual" and section.n_of_m is not None:
        raise InputError(f"a gradual schedule raises a share; {section.n_of_m} is a pattern: leave out one of them")
    if saliency(section.criterion).needs != ("weight",):
        raise InputError(f"criterion {section.criterion}: weights are weighed as they change; use magnitude or lamp")
    tensors = dict(found.model.named_parameters())
    plan, left = sparse(trace(found.model, example).graph, tensors, _knobs(section))
    names = tuple(entry.tensor for entry in plan.of(Sparsify))

    def extra(model: nn.Module, settings: TrainSettings, steps: int) -> Extra:
        run = Moving(
            masks=lambda now, share: masks(eased(plan, share), now),
            names=names,
            steps=steps,
            gradual=section.schedule == "gradual",
            soft=section.soft,
        )
        run.attach(model)
        return Extra(after_step=(run.after_step,), finish=run.detach)

    done = tuned(found, job, tune, example, job.seed, (extra,))
    keep = {name: done.model.get_parameter(name) != 0 for name in names}
    how = " ".join(word for word, on in (("gradual", section.schedule == "gradual"), ("soft", section.soft)) if on)
    return dataclasses.replace(
        done,
        plan=Plan(entries=(*found.plan.entries, *plan.entries)),
        left=(*found.left, *left),
        masks=keep,
        did=f"{done.did}; {_told(keep, section)} by {how} masks",
    )


def _in_rounds(found: Slim, job: Job, section: SparsifySection, tune: FinetuneSection, example: Tensor) -> Slim:
    """Remove a little, train, and again, each round from the last one's masks (Han et al. 2015, arXiv:1506.02626)."""
    if section.sparsity is None or section.soft or section.schedule == "gradual":
        raise InputError("rounds remove a share step by step: give sparsity, without soft masks or a gradual schedule")
    if tune.epochs < section.rounds:
        raise InputError(f"{section.rounds} rounds need at least as many epochs of training, found {tune.epochs}")
    each, now = tune.model_copy(update={"epochs": tune.epochs // section.rounds}), found
    for turn in range(1, section.rounds + 1):
        job.say(f"round {turn} of {section.rounds}: setting weights to zero")
        share = 1 - (1 - section.sparsity) ** (turn / section.rounds)
        base = dataclasses.replace(found, model=now.model)
        thin = sparsified(base, section.model_copy(update={"sparsity": share}), example, job.data, job.seed)
        now = tuned(rewound(thin, section.rewind), job, each, example, job.seed + turn)
    return dataclasses.replace(now, did=f"in {section.rounds} rounds; the last: {now.did}")


def sparse_trained(found: Slim, job: Job, section: SparseTrainingSection, example: Tensor) -> Slim:
    """Train with a penalty and remove what it brought to zero; single weights that are zero stay so.

    Raises:
        InputError: the penalty does not fit the model.
    """
    coupling = follow(found.model, couple(trace(found.model, example).graph), example)
    strength = STRENGTHS[section.penalty] if section.strength is None else section.strength
    scores = unit_scores(coupling, dict(found.model.state_dict()))
    chosen = lowest(scores, section.share) if section.penalty == "greg" else {}

    def extra(model: nn.Module, settings: TrainSettings, steps: int) -> Extra:
        penalty = Penalty(
            kind=section.penalty, strength=strength, coupling=coupling, settings=settings, steps=steps, chosen=chosen
        )
        return Extra(regularizers=(penalty.term,), after_step=(penalty.after_step,))

    job.say(f"training for {section.epochs} epochs with the penalty {section.penalty}")
    done = tuned(found, job, section, example, job.seed, (extra,))
    seen = next(iter(job.data.train.subset(min(32, len(job.data.train)), seed=job.seed).batches(32)))[0]
    plan, left = without_zeros(done.model, coupling, seen)
    made = apply_prune(done.model, plan, example).eval()
    zeros = _zeros(made) if section.penalty == "l1" else {}
    shares = [Sparsify(tensor=name, sparsity=1 - float(mask.double().mean())) for name, mask in zeros.items()]
    return Slim(
        model=made,
        plan=Plan(entries=(*found.plan.entries, *plan.entries, *shares)),
        did=f"{done.did} and {section.penalty} at {strength:g}; {_gone(coupling, plan, zeros)}",
        left=(*found.left, *left),
        masks=zeros,
    )


def _zeros(model: nn.Module) -> dict[str, Tensor]:
    """Mask the zeros of all matrices and kernels that have any."""
    found = {name: weight.detach() != 0 for name, weight in model.named_parameters() if weight.ndim > 1}
    return {name: mask for name, mask in found.items() if not bool(mask.all())}


def _gone(coupling: Coupling, plan: Plan, zeros: Mapping[str, Tensor]) -> str:
    """Say what was zero."""
    units = len(units_of(coupling, plan))
    text = f"{units} of {sum(group.size for group in coupling.groups)} channels were zero and are removed"
    single = sum(int((~mask).sum()) for mask in zeros.values())
    return f"{text}; {single} single weights are zero" if zeros else text
