"""What a search may spend, and what its next step will cost."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kompakt.augment import FORMS
from kompakt.engine.candidate import NETWORKS
from kompakt.engine.choice import Choice, cached
from kompakt.files import atomic_write
from kompakt.job import Job
from kompakt.measure.result import Tried
from kompakt.networks import is_made
from kompakt.plan.recipe import Recipe

SPENT = "spent"
PROBES, PROBE_BATCH = 4, 128
TEACHER_COST, KEPT_COST, PRICED_COST, FORWARD = 1.5, 1.1, 1.3, 1 / 3
LEAST_PACE, MOST_PACE = 0.7, 3.0
RESERVE = 1.5
RECENT = 4
"""So many times an untrained candidate's time is kept for making the one that ships again and measuring it; so many
candidates tell what one takes."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The time of a search; what earlier runs of it spent counts.

    Args:
        started: of this run, ``time.monotonic()``.
        before: seconds that earlier runs spent.
        minutes: in all; None is no limit.
        epoch_seconds: of training the original with a teacher.
        teaching_seconds: what the first training spends on the teacher's answers, which are kept for the others.
    """

    started: float
    before: float
    minutes: float | None
    epoch_seconds: float = 0.0
    teaching_seconds: float = 0.0

    def spent(self) -> float:
        """Seconds that were spent."""
        return self.before + time.monotonic() - self.started

    def left(self) -> float:
        """Seconds that are left; infinite without a limit."""
        return float("inf") if self.minutes is None else 60 * self.minutes - self.spent()

    def suffices(
        self, job: Job, choice: Choice, base: Recipe, tried: list[Tried], choices: Mapping[int, Choice]
    ) -> bool:
        """Whether a candidate can be made and the end measured in the time that is left.

        Args:
            job: of the search.
            choice: the candidate.
            base: the user's recipe.
            tried: what was made, which tells how long it takes.
            choices: by number, what was tried.
        """
        training, there = 0.0, replace(job, networks=job.out / NETWORKS)
        for each in reversed(choice.rounds):
            if is_made(there, each.recipe(base)):
                break
            training += self._round_seconds(each)
        begun = [item for item in tried if item.epochs and item.state == "verified" and item.number in choices]
        untaught = self.teaching_seconds if training and not begun else 0.0
        seconds = (1 + RESERVE) * untrained_seconds(tried) + untaught + self._pace(begun, tried, choices) * training
        return seconds <= self.left()

    def _round_seconds(self, choice: Choice) -> float:
        """What the last round of a choice should take."""
        priced = PRICED_COST if choice.rate else 1.0
        return priced * choice.epochs * self.epoch_seconds / choice.fewer_macs

    def _pace(self, begun: list[Tried], tried: list[Tried], choices: Mapping[int, Choice]) -> float:
        """How many times as long as it should the latest training took."""
        if not begun:
            return 1.0
        latest = begun[-1]
        should = self._round_seconds(choices[latest.number]) + self.teaching_seconds * (latest is begun[0])
        took = latest.seconds - untrained_seconds(tried)
        return min(max(took / max(should, 1e-9), LEAST_PACE), MOST_PACE)

    def save(self, job: Job) -> None:
        """Write down what was spent, for a run that goes on."""
        atomic_write(job.out / SPENT, f"{self.spent():.1f}".encode())


def begun(job: Job, minutes: float | None, started: float) -> Effort:
    """Begin or go on with the effort of a search."""
    try:
        before = float((job.out / SPENT).read_text())
    except (FileNotFoundError, ValueError):
        before = 0.0
    return Effort(started=started, before=before, minutes=minutes)


def untrained_seconds(tried: list[Tried]) -> float:
    """The time that a candidate takes without training: the longest of the latest."""
    return max([item.seconds for item in tried if not item.epochs][-RECENT:], default=0.0)


def epoch_cost(job: Job, choose: bool) -> tuple[float, bool]:
    """Estimate what an epoch of the original costs with a teacher, from the fastest of a few steps.

    Args:
        job: what is trained, on what.
        choose: whether the layout that is faster here may be taken, where the recipe leaves it open.

    Returns:
        Seconds, and whether images are laid out channels last.
    """
    inputs, labels = next(iter(job.data.train.batches(PROBE_BATCH, limit=PROBE_BATCH)))
    section = job.recipe.finetune
    is_open = choose and inputs.ndim == 4 and "channels_last" not in section.model_fields_set
    layouts = (False, True) if is_open else (section.channels_last,)
    steps = {layout: _Step(job, inputs, labels, layout) for layout in layouts}
    best = dict.fromkeys(layouts, float("inf"))
    for _ in range(PROBES):
        best = {layout: min(best[layout], step.seconds()) for layout, step in steps.items()}
    layout = min(best, key=lambda each: best[each])
    return teacher_cost(job.recipe) * best[layout] * len(job.data.train) / len(inputs), layout


def teacher_cost(recipe: Recipe) -> float:
    """Say what a teacher makes of the cost of a step: little where its answers are kept."""
    return KEPT_COST if cached(recipe) else TEACHER_COST


def teaching_cost(recipe: Recipe) -> float:
    """Say how many epochs' time the teacher's answers take once, where they are kept: a forward pass for each form."""
    return FORWARD * FORMS[recipe.finetune.augment] if cached(recipe) else 0.0


class _Step:
    """A step of training in one layout."""

    def __init__(self, job: Job, inputs: Tensor, labels: Tensor, channels_last: bool) -> None:
        layout = torch.channels_last if channels_last and inputs.ndim == 4 else torch.contiguous_format
        self.model = copy.deepcopy(job.model).train().to(memory_format=layout)
        self.inputs, self.labels = inputs.contiguous(memory_format=layout), labels

    def seconds(self) -> float:
        """Time one."""
        started = time.monotonic()
        F.cross_entropy(self.model(self.inputs), self.labels).backward()
        return time.monotonic() - started
