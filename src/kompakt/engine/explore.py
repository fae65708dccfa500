"""``explore``: search pruning, training and bits together under one budget, and ship the best candidate."""

import hashlib
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from kompakt.alignment import alignment
from kompakt.engine.candidate import CANDIDATES, Original, all_tried, failed, folder_of, kept, verify
from kompakt.engine.choice import Choice
from kompakt.engine.effort import PRICED_COST, RESERVE, Effort, begun, epoch_cost, teaching_cost, untrained_seconds
from kompakt.engine.frontier import Limits, choose
from kompakt.engine.ledger import Ledger, open_ledger
from kompakt.engine.shipping import shipped, shipped_since
from kompakt.engine.strategy import Objective, Space, propose, within_reach
from kompakt.engine.views import augmentation
from kompakt.errors import InputError, KompaktError
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.job import Job
from kompakt.measure.accuracy import top_1
from kompakt.measure.expected import beliefs
from kompakt.measure.latency import interleave
from kompakt.measure.result import Result, Tried
from kompakt.methods.blocks import residual_blocks
from kompakt.plan.recipe import PruneSection, Recipe

TRAINED_SHARE, ROUNDS, LEAST = 0.7, 2, 3
"""Of the effort, so much is for training, in so many rounds; where the time of a round is not left, one of a ``LEAST``
of its epochs is still worth it."""

POLL_SECONDS = 0.5
"""How often a worker that is done looks whether the others are."""


class TimeUp(Exception):
    """The effort is spent in the middle of a candidate."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a search may spend and must keep.

    Args:
        objective: bytes as ``.kpk``, time, or both together.
        minutes: to spend in all, the measuring of the end included; None is no limit.
        candidates: the most to make; None is no limit.
        confident: whether the upper end of the drop's interval must keep the budget.
        max_bytes: of the artifact.
        max_latency_ms: of one call, batch 1.
        study: Optuna storage; None is a journal in the job's folder.
    """

    objective: Objective = "both"
    minutes: float | None = None
    candidates: int | None = None
    confident: bool = False
    max_bytes: int | None = None
    max_latency_ms: float | None = None
    study: str | None = None

    @property
    def bounds(self) -> dict[str, object]:
        """What the result says of the budget."""
        return {"confident": self.confident, "max_bytes": self.max_bytes, "max_latency_ms": self.max_latency_ms}


def explore(job: Job, asked: Asked) -> Result:
    """Search within the effort and ship the best candidate, measured on the test split.

    Every candidate is a recipe that is carried out, exported and judged on the validation split in the target's
    runtime. The search is written down after every step, so that the same command goes on after a crash.

    Raises:
        InputError: the data or the metric give other figures when asked again, or the study is of something else.
        BudgetError: no candidate could be made.
    """
    effort = begun(job, asked.minutes, time.monotonic())
    (job.out / CANDIDATES).mkdir(exist_ok=True)
    original = _original(job)
    ledger = open_ledger(job.out, asked.study, _identity(job, asked), job.seed)
    space, seconds = _space(job, asked, ledger, original)
    job = replace(job, recipe=_settled(job.recipe, space))
    search = _Search(
        job=job,
        asked=asked,
        original=original,
        ledger=ledger,
        space=space,
        limits=_limits(job, asked, original),
        effort=replace(effort, epoch_seconds=seconds, teaching_seconds=teaching_cost(job.recipe) * seconds),
    )
    notes = search.run()
    search.effort.save(job)
    waited_from = time.time()
    with ledger.alone("shipping"):
        return shipped_since(job.out, waited_from) or shipped(
            job, asked.objective, search.limits, original, notes, asked.bounds
        )


@dataclass(frozen=True, kw_only=True)
class _Search:
    """One worker of a search."""

    job: Job
    asked: Asked
    original: Original
    ledger: Ledger
    space: Space
    limits: Limits
    effort: Effort

    def run(self) -> list[str]:
        """Make candidates until the effort, their number or the ideas end; return what is to be told."""
        while True:
            try:
                with ExitStack() as held:
                    with self.ledger.alone():
                        tried = all_tried(self.job.out)
                        drops = self.ledger.drops({item.number: self.limits.judged(item) for item in tried})
                        proposed = self._affordable(drops, tried)
                        ended = self._ended(tried, proposed)
                        if not ended:
                            reach = within_reach(drops, self._within_means(tried))
                            trial, choice = held.enter_context(self.ledger.taken(proposed, self.space, reach))
                    if ended:
                        if self._waited(tried):
                            continue
                        return [ended]
                    self.job.say(self._progress(trial.number, choice, tried))
                    folder = folder_of(self.job.out, trial.number)
                    self.ledger.tell(trial, kept(folder) or self._attempt(trial.number, choice))
            except TimeUp:
                return ["the effort was spent in the middle of a candidate, from where the same command goes on"]
            except KeyboardInterrupt:
                return ["interrupted: the best so far is saved; the same command goes on"]
            self.effort.save(self.job)

    def _affordable(self, drops: dict[Choice, float], tried: list[Tried]) -> Choice | None:
        """Propose what comes next in the plan; what the time that is left does not suffice for counts as failed."""
        known = dict(drops)
        while (proposed := propose(known, self.space)) is not None:
            for choice in _shorter(proposed):
                if choice not in known and (not tried or self._suffices(choice, tried)):
                    return choice
            known[proposed] = float("inf")
        return None

    def _suffices(self, choice: Choice, tried: list[Tried]) -> bool:
        return self.effort.suffices(self.job, choice, self.job.recipe, tried, self.ledger.choices())

    def _within_means(self, tried: list[Tried]) -> Space:
        """Return what a sampler may draw in the time that is left: training, or none."""
        most = Choice(epochs=self.space.epochs_at(1.0))
        can = not tried or self._suffices(most, tried)
        return self.space if can else self.space.untrained()

    def _ended(self, tried: list[Tried], proposed: Choice | None) -> str:
        """Say why the search ends here; empty where it goes on."""
        if self.asked.candidates is not None and len(tried) + self.ledger.in_hand() >= self.asked.candidates:
            return f"{self.asked.candidates} candidates were made, as many as asked for"
        if proposed is None and self.asked.minutes is None and self.asked.candidates is None:
            return "the plan of the search is carried out"
        if tried and not self._suffices(proposed or Choice(), tried):
            return "the effort does not suffice for another candidate"
        return ""

    def _waited(self, tried: list[Tried]) -> bool:
        """Wait, as long as the effort allows, for candidates in other hands, so that all are known to who ships."""
        waited = False
        while self.effort.left() > RESERVE * untrained_seconds(tried):
            with self.ledger.alone():
                if not self.ledger.in_hand():
                    break
            waited = True
            time.sleep(POLL_SECONDS)
        return waited

    def _attempt(self, number: int, choice: Choice) -> Tried:
        """Make a candidate; one that cannot be made is written down, and the search goes on."""
        started = time.monotonic()

        def tick() -> None:
            if self.effort.left() < 0:
                raise TimeUp

        try:
            job = replace(self.job, tick=tick)
            return verify(job, self.original, number, choice)
        except (KompaktError, RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            note = (str(error).splitlines() or [type(error).__name__])[0]
        except OSError as error:
            raise InputError(
                f"{error.filename or self.job.out}: {error.strerror or error}; the same command goes on from here"
            ) from error
        seconds = time.monotonic() - started
        return failed(self.job.out, number, choice, note, seconds)

    def _progress(self, number: int, choice: Choice, tried: list[Tried]) -> str:
        best = choose(tried, self.limits, self.asked.objective)
        left = "" if self.asked.minutes is None else f"; {max(0.0, self.effort.left()) / 60:.1f} minutes left"
        if best is None or best.points is None:
            return f"candidate {number}: {choice}{left}"
        so_far = f"{best.what}: {best.points:.2f} points, {best.packed_bytes or 0:,} bytes"
        return f"candidate {number}: {choice}; best so far {so_far}{left}"


def _shorter(choice: Choice) -> list[Choice]:
    """Return a choice and what it is with fewer and fewer epochs in its last round."""
    return [replace(choice, epochs=epochs) for epochs in range(choice.epochs, choice.epochs // LEAST, -1)] or [choice]


def _original(job: Job) -> Original:
    """Export the original and score it twice: a metric or data that change from run to run decide nothing."""
    job.say("scoring the original on the validation split")
    example = next(iter(job.data.train.batches(2, limit=2)), (None,))[0]
    if example is None:
        raise InputError("the training split gave no batch; expected at least one example")
    path = job.target.export(fold(trace(job.model, example)), job.out / f"baseline{job.target.suffix}", metadata={})
    classifies = job.metric in (None, top_1)
    first, again = (job.judge.score(path, job.data.validation, keep=classifies) for _ in range(2))
    if first.examples != again.examples:
        raise InputError(
            f"the validation data gave {first.examples} examples, then {again.examples}; they must be fixed"
        )
    if first.accuracy != again.accuracy:
        raise InputError(
            f"the metric gave {first.accuracy:g}, then {again.accuracy:g} for the same model and data; it must be fixed"
        )
    believed = beliefs(first.seen) if first.seen else None
    return Original(path=path, score=replace(first, seen=None), beliefs=believed, example=example[:1].numpy())


def _identity(job: Job, asked: Asked) -> dict[str, str]:
    """Name what a study is of."""
    digest = hashlib.sha256()
    for name, value in sorted(job.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    sizes = "/".join(str(len(split)) for split in (job.data.train, job.data.validation, job.data.test))
    return {
        "model": f"{job.name} {digest.hexdigest()[:12]}",
        "data": f"{job.source} {sizes}",
        "target": job.target.name,
        "recipe": hashlib.sha256(job.recipe.model_dump_json().encode()).hexdigest()[:12],
        "objective": asked.objective,
        "seed": str(job.seed),
    }


def _settled(recipe: Recipe, space: Space) -> Recipe:
    """Return the user's recipe with what was decided once for the study, where it leaves that open."""
    finetune = {"channels_last": space.channels_last, "augment": space.augment}
    prune = recipe.prune or PruneSection(allocation="sensitivity")
    prune = prune if "align" in prune.model_fields_set else prune.model_copy(update={"align": space.align})
    return recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update=finetune), "prune": prune})


def _space(job: Job, asked: Asked, ledger: Ledger, original: Original) -> tuple[Space, float]:
    """Decide what may be tried, and what an epoch costs, once for a study: whoever goes on with it must do the same."""
    known = ledger.study.user_attrs.get("space")
    if known is not None:
        if known.keys() != Space.__dataclass_fields__.keys():
            raise InputError(f"{job.out}: the study is of another version of kompakt; take another --out, or delete it")
        ladders = {name: tuple(known[name]) for name in ("rates", "prices")}
        return Space(**known | ladders), float(ledger.study.user_attrs["epoch_seconds"])
    limit = job.recipe.budget.max_drop
    epochs = job.recipe.finetune.epochs
    trains = bool(epochs) or asked.minutes is not None
    augment = augmentation(job, original) if trains else job.recipe.finetune.augment
    finetune = job.recipe.finetune.model_copy(update={"augment": augment})
    job = replace(job, recipe=job.recipe.model_copy(update={"finetune": finetune}))
    job.say("timing a step of training")
    seconds, channels_last = epoch_cost(job, asked.minutes is not None)
    means = 0.0
    if not epochs and asked.minutes is not None:
        priced = 1.0 if asked.objective == "latency" else PRICED_COST
        training = asked.minutes * 60 * TRAINED_SHARE - teaching_cost(job.recipe) * seconds
        means = max(training, 0.0) / (priced * seconds) / ROUNDS
    graph = trace(job.model, next(iter(job.data.train.batches(2, limit=2)))[0]).graph
    align = 1 if asked.objective == "size" else _alignment(job, couple(graph))
    space = Space(
        objective=asked.objective,
        max_drop=1.0 if limit is None else limit,
        epochs=epochs,
        means=round(means, 3),
        blocks=min(2, len(residual_blocks(graph))),
        align=align,
        channels_last=channels_last,
        augment=augment,
    ).fitted(sum(parameter.numel() for parameter in job.model.parameters()))
    ledger.study.set_user_attr("epoch_seconds", seconds)
    ledger.study.set_user_attr("space", vars(space))
    return space, seconds


def _alignment(job: Job, coupling: Coupling) -> int:
    """Measure what widths should be multiples of; half of the channels at least keep two widths to choose from."""
    job.say("timing layers at widths that are multiples of 2 to 16")
    liked = alignment(coupling, replace(job.timing, quantized=True).layers)
    sizes = [group.size for group in coupling.groups]
    while liked > 1 and 2 * sum(size for size in sizes if size >= 2 * liked) < sum(sizes):
        liked //= 2
    return liked


def _limits(job: Job, asked: Asked, original: Original) -> Limits:
    ratio = None
    if asked.max_latency_ms is not None:
        run = partial(job.target.open(original.path, job.threads), original.example)
        ratio = asked.max_latency_ms / interleave({"original": run}, seconds=2.0)["original"].p50_ms
    return Limits(
        max_drop=job.recipe.budget.max_drop, max_bytes=asked.max_bytes, max_ratio=ratio, confident=asked.confident
    )
