"""Choose by measurement which multiples of channels a runtime likes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from statistics import median

from kompakt.graph.coupling import Coupling
from kompakt.methods.channels import Knobs, offered_widths
from kompakt.methods.latency import Case, cases

CANDIDATES = (2, 4, 8, 16)
LAYERS = 4
WIDTHS = (17, 33, 49)
"""Widths that are looked at: just above a multiple of every candidate, and small, where a block is a large part."""
FREE = 1 / 3
"""Channels that are rounded up are free where time grows by less than this share of the channels' growth."""
Times = Callable[[Sequence[Case]], Mapping[Case, float]]


def alignment(coupling: Coupling, times: Times) -> int:
    """Find the largest multiple to which widths can be rounded up without taking longer in the runtime.

    The layers with the most work are timed at a few widths and at the same widths rounded up: where kernels work on
    blocks of channels, the channels that fill a block are free, and a width that is no multiple wastes the rest.

    Args:
        coupling: what can be removed.
        times: measures cases in milliseconds (``kompakt.measure.layer_times``).

    Returns:
        1, 2, 4, 8 or 16.
    """
    pairs = {step: [(narrow, _rounded(narrow, step)) for narrow in _narrow(coupling)] for step in CANDIDATES}
    wanted = dict.fromkeys(case for found in pairs.values() for pair in found for case in pair)
    if not wanted:
        return 1
    known = times(tuple(wanted))
    free = [step for step in CANDIDATES if median(_growth(known, *pair) for pair in pairs[step]) <= FREE]
    return max(free, default=1)


def _growth(known: Mapping[Case, float], odd: Case, up: Case) -> float:
    """Return by how much time grows, as a share of the growth of the channels."""
    return (known[up] / known[odd] - 1) / (up.weight[0] / odd.weight[0] - 1)


def _narrow(coupling: Coupling) -> list[Case]:
    """List the heaviest layers at the widths that are looked at."""
    whole = offered_widths(coupling, Knobs(ratio=0.5))
    full = {name: (max(widths),) for name, widths in whole.items()}
    timed = [case for case in cases(coupling, full) if case.kind in ("conv2d", "linear") and case.groups == 1]
    layers = [case for case in timed if case.weight[0] >= max(WIDTHS)]
    heavy = sorted(layers, key=_work, reverse=True)[:LAYERS]
    return [_wide(case, width) for case in heavy for width in WIDTHS]


def _work(case: Case) -> float:
    total = 1.0
    for size in (*case.weight, *case.input[2:]):
        total *= size
    return total


def _wide(case: Case, width: int) -> Case:
    return replace(case, weight=(width, *case.weight[1:]))


def _rounded(case: Case, step: int) -> Case:
    return _wide(case, ceil(case.weight[0] / step) * step)
