"""Decide how much goes where: measure what an allocation of channels needs, then plan."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kompakt.artifact.targets import Target
from kompakt.build.evaluate import evaluate, reestimate_bn
from kompakt.build.prune import apply_prune
from kompakt.data import Data
from kompakt.errors import BudgetError, InputError
from kompakt.graph.coupling import Coupling
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.measure.latency import interleave
from kompakt.measure.layer_times import layer_times
from kompakt.methods.channels import Knobs, channels, offered_widths
from kompakt.methods.latency import cases, latency_cost, whole_ms
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
        folder: of the tables on disk; None keeps none.
        progress: whether a bar may be shown.
    """

    target: Target
    threads: int = 1
    folder: Path | None = None
    progress: bool = False

    def speed(self, before: nn.Module, after: nn.Module, example: Tensor) -> float:
        """Measure how many times faster the file of ``after`` is than that of ``before``, interleaved."""
        with tempfile.TemporaryDirectory() as folder:
            runs = {}
            for name, model in (("before", before), ("after", after)):
                path = Path(folder) / f"{name}{self.target.suffix}"
                self.target.export(fold(trace(model.eval(), example)), path, metadata={})
                runs[name] = partial(self.target.open(path, self.threads), example[:1].numpy())
            return 1 / interleave(runs, seconds=SPEED_SECONDS)["after"].ratio


def allotted(
    model: nn.Module, coupling: Coupling, scores: Mapping[str, Tensor], knobs: Knobs, data: Data | None, seed: int
) -> Plan:
    """Plan the removal of channels, with measured drops where the allocation needs them.

    Raises:
        InputError: there are no data to measure drops on.
        BudgetError: the target cannot be reached.
    """
    if knobs.allocation != "sensitivity":
        return channels(coupling, scores, knobs)
    if data is None:
        raise InputError("the sensitivity allocation measures the effect of every group: give --data")
    return channels(coupling, scores, knobs, drops=measured_drops(model, coupling, scores, loss_on(data, seed)))


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
    times = layer_times(
        cases(coupling, widths),
        timing.target,
        threads=timing.threads,
        folder=timing.folder,
        progress=timing.progress,
    )
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


def loss_on(data: Data, seed: int) -> Callable[[nn.Module], float]:
    """Return a score for measuring effects: minus the cross entropy on training examples, batch norms mended."""
    part = data.train.subset(min(EFFECT_EXAMPLES, len(data.train)), seed=seed)
    inputs, labels = map(torch.cat, zip(*part.batches(64), strict=True))
    # A folder lies in the order of its classes: batches of one class would give batch norms that class's variance.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    batches = [(inputs[places], labels[places]) for places in order.split(64)]

    def score(model: nn.Module) -> float:
        made = copy.deepcopy(model)
        reestimate_bn(made, batches)
        found = evaluate(made.eval(), batches)
        return -float(F.cross_entropy(found.outputs, found.labels))

    return score
