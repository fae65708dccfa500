"""Decide how much goes where: measure what an allocation of channels needs, then plan."""

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from kompakt.artifact.targets import Target
from kompakt.build.evaluate import evaluate, reestimate_bn
from kompakt.build.prune import apply_prune, run_once
from kompakt.build.structure import checked_structure
from kompakt.build.teacher_cache import weights_digest
from kompakt.data import Data, Split
from kompakt.errors import BudgetError, FormatError, InputError
from kompakt.files import atomic_write, writable_folder
from kompakt.graph.coupling import Coupling
from kompakt.graph.trace import trace
from kompakt.measure.latency import Times, interleave
from kompakt.measure.layer_times import layer_times, write
from kompakt.methods.channels import Knobs, channels, offered_widths
from kompakt.methods.latency import Case, cases, latency_cost, whole_ms
from kompakt.methods.sensitivity import measured_drops
from kompakt.plan.plan import Plan

EFFECT_EXAMPLES = 256
SPEED_SECONDS = 5.0
SLACK = 1.1
"""So many times faster than asked is near enough; beyond, fewer channels need to go."""
TRIES = 5
"""Plans that are tried until the file is as fast as asked."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where the times of layers are measured.

    Args:
        target: the runtime.
        threads: of the runtime.
        quantized: whether all is timed in integers, as it will ship.
        folder: of the tables on disk; None keeps none.
        progress: whether a bar may be shown.
    """

    target: Target
    threads: int = 1
    quantized: bool = False
    folder: Path | None = None
    progress: bool = False

    def speed(self, before: nn.Module, after: nn.Module, example: Tensor) -> float:
        """Measure how many times faster the file of ``after`` is than that of ``before``, interleaved."""
        return 1 / self._timed({"before": before, "after": after}, example)["after"].ratio

    def latency_ms(self, model: nn.Module, example: Tensor) -> float:
        """Measure how long the file of a model takes for one example: the median."""
        return self._timed({"alone": model}, example)["alone"].p50_ms

    def layers(self, cases: Sequence[Case]) -> dict[Case, float]:
        """Measure single layers, in milliseconds."""
        return layer_times(
            cases,
            self.target,
            threads=self.threads,
            quantized=self.quantized,
            folder=self.folder,
            progress=self.progress,
        )

    def _timed(self, models: Mapping[str, nn.Module], example: Tensor) -> dict[str, Times]:
        with tempfile.TemporaryDirectory() as folder:
            runs = {}
            for name, model in models.items():
                path = Path(folder) / f"{name}{self.target.suffix}"
                write(model, example, self.target, path, quantized=self.quantized)
                runs[name] = partial(self.target.open(path, self.threads), example[:1].numpy())
            return interleave(runs, seconds=SPEED_SECONDS)


def times_faster_for(model: nn.Module, example: Tensor, timing: Timing, max_latency_ms: float) -> float:
    """Say how many times faster a model has to be to keep a latency, measured on its own file.

    Raises:
        BudgetError: it keeps it already.
    """
    now = timing.latency_ms(model, example)
    if now <= max_latency_ms:
        raise BudgetError(
            f"the original takes {now:.3g} ms in {timing.target.name} already, no more than the {max_latency_ms:g} ms "
            "asked for: there is nothing to remove"
        )
    return now / max_latency_ms


def need_faster(model: nn.Module, plan: Plan, example: Tensor, timing: Timing, times_faster: float) -> None:
    """Refuse a plan whose file is not as many times faster as asked, timed beside the original's.

    Raises:
        PlanError: the plan does not fit the model.
        BudgetError: it is not as fast; the message says how fast it is, and why where the plan shows it.
    """
    made = checked_structure(model, plan, example)
    speed = timing.speed(model, made, example)
    if speed < times_faster:
        before, after = (trace(each.eval(), example).graph.macs for each in (model, made))
        raise BudgetError(
            f"the plan is not fast enough: its file is {speed:.2f}× as fast as the original's in {timing.target.name}, "
            f"asked {times_faster:.2f}×; it has {before / max(1, after):.2f}× fewer multiply-accumulates: more "
            "channels must go, in multiples of what the runtime likes (--align auto)"
        )


def allotted(
    model: nn.Module,
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    knobs: Knobs,
    data: Data | None,
    seed: int,
    keep: Path | None = None,
) -> Plan:
    """Plan the removal of channels, with measured drops where the allocation needs them.

    Args:
        model, coupling, scores, knobs: as ``channels`` takes them.
        data: drops are measured on its training split.
        seed: of the examples that are drawn.
        keep: a folder where drops are kept for the same question again; it must serve one data set.

    Raises:
        InputError: there are no data to measure drops on.
        BudgetError: the target cannot be reached.
    """
    if knobs.allocation != "sensitivity":
        return channels(coupling, scores, knobs)
    if data is None:
        raise InputError("the sensitivity allocation measures the effect of every group: give --data")
    file = None if keep is None else keep / f"{_question(model, scores, seed, len(data.train))}.json"
    if file is None or not file.exists():
        drops = measured_drops(model, coupling, scores, loss_on(data, seed))
        if file is not None:
            atomic_write(writable_folder(file.parent) / file.name, json.dumps(drops).encode())
    else:
        drops = {name: {int(width): drop for width, drop in curve.items()} for name, curve in _read(file).items()}
    return channels(coupling, scores, knobs, drops=drops)


def _question(model: nn.Module, scores: Mapping[str, Tensor], seed: int, examples: int) -> str:
    """Name what drops are measured for: the weights, the order in which channels go, and the examples."""
    state = hashlib.sha256(f"{weights_digest(model)} {seed} {examples}".encode())
    for name, score in sorted(scores.items()):
        state.update(f"{name} {score.argsort().tolist()}".encode())
    return state.hexdigest()[:16]


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        return TypeAdapter(dict[str, dict[str, float]]).validate_json(file.read_bytes())
    except ValidationError:
        raise FormatError(f"{file}: not the drops that were kept here; delete it to measure anew") from None


def faster(
    model: nn.Module,
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    knobs: Knobs,
    example: Tensor,
    timing: Timing,
    times_faster: float,
) -> tuple[Plan, float]:
    """Plan the removal of channels so that the exported file is as many times faster, verified on the file.

    The times of single layers at candidate widths are measured in the runtime and feed the exact allocation;
    what they promise is checked by timing the whole pruned file beside the original's, interleaved, and the
    budget is tightened or eased until the file keeps it closely (what lies between the layers does not shrink
    as they do).

    Returns:
        The plan, and how many times faster its file was measured.

    Raises:
        BudgetError: the target cannot be reached, or no plan that was tried is faster at all.
    """
    widths = offered_widths(coupling, knobs)
    times = timing.layers(cases(coupling, widths))
    budget_ms = whole_ms(coupling, widths, times) / times_faster
    tried: list[tuple[Plan, float]] = []
    for _ in range(TRIES):
        costs = {"latency": latency_cost(coupling, widths, times, budget_ms)}
        try:
            plan = channels(coupling, scores, knobs, costs=costs)
        except BudgetError:
            if not tried:
                raise
            break
        speed = timing.speed(model, apply_prune(model, plan, example), example)
        tried.append((plan, speed))
        if times_faster <= speed <= SLACK * times_faster:
            break
        budget_ms *= max(0.5, min(2.0, speed / times_faster))
    fast = [found for found in tried if found[1] >= times_faster]
    best = min(fast, key=lambda found: found[1]) if fast else max(tried, key=lambda found: found[1])
    if best[1] <= 1:
        raise BudgetError(
            f"no plan is faster in {timing.target.name}: the best that was tried takes {1 / best[1]:.2f} times the "
            "original's time; ask for more with --times-faster, or prune by --fewer-params for size alone"
        )
    return best


def classifies(model: nn.Module, data: Data) -> bool:
    """Whether a model gives one score a class and the data one class an example: what ``loss_on`` needs."""
    inputs, labels = next(iter(data.train.batches(2, limit=2)))
    outputs = run_once(model, inputs)
    return isinstance(outputs, Tensor) and outputs.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point()


def loss_on(data: Data, seed: int) -> Callable[[nn.Module], float]:
    """Return a score for measuring effects: minus the cross entropy on training examples, batch norms mended."""
    batches = _mixed(data.train, seed)

    def score(model: nn.Module) -> float:
        made = copy.deepcopy(model)
        reestimate_bn(made, batches)
        found = evaluate(made.eval(), batches)
        return -float(F.cross_entropy(found.outputs, found.labels))

    return score


def accuracy_on(data: Data, seed: int) -> Callable[[nn.Module], float]:
    """Return a score for curves: accuracy in % on validation examples, batch norms mended on training examples."""
    fitted, judged = _mixed(data.train, seed), _mixed(data.validation, seed)

    def score(model: nn.Module) -> float:
        made = copy.deepcopy(model)
        reestimate_bn(made, fitted)
        return 100 * evaluate(made.eval(), judged).accuracy

    return score


def _mixed(split: Split, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return some examples in mixed batches."""
    part = split.subset(min(EFFECT_EXAMPLES, len(split)), seed=seed)
    inputs, labels = map(torch.cat, zip(*part.batches(64), strict=True))
    # A folder lies in the order of its classes: batches of one class would give batch norms that class's variance.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return [(inputs[places], labels[places]) for places in order.split(64)]
