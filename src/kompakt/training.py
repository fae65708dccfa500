"""Train what was made smaller: the one loop as a recipe asks for it, with what else happens while it runs."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kompakt.build.priced import FIRST, attach, priced_bits, refit, rising, settle, trainable
from kompakt.build.settings import Regularizer
from kompakt.build.train import Hooks, TrainSettings, train
from kompakt.frugality import started
from kompakt.graph.graph import Left
from kompakt.job import Job
from kompakt.numerics.priced import price_share
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import FinetuneSection
from kompakt.teaching import batches, settings, taught, taught_by


@dataclass(frozen=True, kw_only=True)
class Slim:
    """A smaller network, the plan that made it, what was done, which weights stay in training, the stage's name."""

    model: nn.Module
    plan: Plan
    did: str
    left: tuple[Left, ...] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What else happens in a run: terms of the loss, hooks after every step, and what is done at the end."""

    regularizers: tuple[Regularizer, ...] = ()
    after_step: tuple[Callable[[nn.Module, int], None], ...] = ()
    finish: Callable[[nn.Module], object] = lambda model: None


Extras = Callable[[nn.Module, TrainSettings, int], Extra]
"""The model that will be trained, the run's settings and all its steps → what else happens in it."""


def tuned(
    found: Slim, job: Job, section: FinetuneSection, example: Tensor, seed: int, extras: tuple[Extras, ...] = ()
) -> Slim:
    """Train the smaller network, taught as the recipe says; weights that were set to zero stay zero."""
    model = copy.deepcopy(found.model)
    loader, how = batches(section, job, seed), settings(section, job.out, model, seed)
    who, goal = taught(job, model, section, example)
    more = [extra(model, how, section.epochs * loader.steps) for extra in extras]
    more += [Extra(after_step=(keeper(found.masks),))] if found.masks else []
    if section.rate is not None:
        more.append(_rated(model, found, job, section, section.epochs * loader.steps))
    tick = job.tick
    more += [Extra(after_step=(lambda _model, _step: tick(),))] if tick is not None else []
    hooks = Hooks(
        progress=job.progress,
        after_step=tuple(hook for extra in more for hook in extra.after_step),
        tensorboard=job.out / "tensorboard" if section.tensorboard else None,
    )
    terms = tuple(term for extra in more for term in extra.regularizers)
    train(model, loader, how, objective=goal, teachers=who, regularizers=terms, hooks=hooks)
    for extra in more:
        extra.finish(model)
    part = "" if section.examples is None else f" on {section.examples:,} examples"
    part += taught_by(section, job.recipe.distill)
    did = f"{found.did}; trained for {section.epochs} epochs{part}".removeprefix("; ")
    return dataclasses.replace(found, model=model.eval(), did=did)


def _rated(model: nn.Module, found: Slim, job: Job, section: FinetuneSection, steps: int) -> Extra:
    """Let the weights be trained as the integers of the file, and what that asks of the loop."""
    assert section.rate is not None
    share = price_share(0.0, section.rise, FIRST)
    job.say(f"choosing integers to begin with, at {share * section.rate:.2g} nats a bit")
    attach(model, started(job, found.model, share * section.rate, found.masks), share)
    hooks = (rising(section.rise, steps), refit)
    return Extra(regularizers=(priced_bits(section.rate),), after_step=hooks, finish=settle)


def keeper(keep: Mapping[str, Tensor]) -> Callable[[nn.Module, int], None]:
    """Return a hook for the training loop that sets to zero again what ``keep`` has False for."""

    def after_step(model: nn.Module, step: int) -> None:
        with torch.no_grad():
            for name, weight in trainable(model).items():
                if name in keep:
                    weight.mul_(keep[name].to(weight.device, weight.dtype))

    return after_step
