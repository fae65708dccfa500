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
SHARES = (0.35, 0.6, 0.85)
"""Of a layer's outputs: widths that are looked at, each made odd."""
FREE = 1.03
"""Channels that are rounded up cost nothing where time grows by less than this."""
Times = Callable[[Sequence[Case]], Mapping[Case, float]]


def alignment(coupling: Coupling, times: Times) -> int:
    """Find the largest multiple to which widths can be rounded up without taking longer in the runtime.

    The layers with the most work are timed at a few odd widths and at the same widths rounded up: where kernels work
    on blocks of channels, the channels that fill a block are free, and a width that is no multiple wastes the rest.

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
    free = [step for step in CANDIDATES if median(known[up] / known[odd] for odd, up in pairs[step]) <= FREE]
    return max(free, default=1)


def _narrow(coupling: Coupling) -> list[Case]:
    """List the heaviest layers at odd widths."""
    whole = offered_widths(coupling, Knobs(ratio=0.5))
    full = {name: (max(widths),) for name, widths in whole.items()}
    timed = [case for case in cases(coupling, full) if case.kind in ("conv2d", "linear") and case.groups == 1]
    layers = [case for case in timed if case.weight[0] >= 2 * max(CANDIDATES)]
    heavy = sorted(layers, key=_work, reverse=True)[:LAYERS]
    return [_wide(case, int(share * case.weight[0]) // 2 * 2 + 1) for case in heavy for share in SHARES]


def _work(case: Case) -> float:
    total = 1.0
    for size in (*case.weight, *case.input[2:]):
        total *= size
    return total


def _wide(case: Case, width: int) -> Case:
    return replace(case, weight=(width, *case.weight[1:]))


def _rounded(case: Case, step: int) -> Case:
    return _wide(case, ceil(case.weight[0] / step) * step)
