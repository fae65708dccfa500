"""Measure what each group of channels is worth: the model's score with that group alone made narrower."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from kompakt.build.prune import apply_prune, removal
from kompakt.errors import InputError
from kompakt.graph.coupling import Coupling

SHARES = (0.25, 0.5, 0.75)


def measured_drops(
    model: nn.Module,
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    score: Callable[[nn.Module], float],
    shares: Sequence[float] = SHARES,
) -> dict[str, dict[int, float]]:
    """Measure the drop of a model's score when a share of one group goes, for every group and share.

    The curves that ``kompakt analyze`` plots (Li et al. 2017, arXiv:1608.08710, §3.2); one model run
    for each group and share.

    Args:
        model: the model; it is left as it was.
        coupling: its groups. Groups that can only shrink in step are left out.
        scores: group name → (size,) scores; the lowest go first.
        score: the higher the better, e.g. accuracy in points on calibration data.
        shares: the shares that go, between 0 and 1.

    Returns:
        Group name → width in units → drop (positive: worse), the full width with 0.

    Raises:
        InputError: a share that is not between 0 and 1.
    """
    wrong = next((share for share in shares if not 0 < share < 1), None)
    if wrong is not None:
        raise InputError(f"share {wrong} is not between 0 and 1")
    whole = score(model)
    tied = {name for tie in coupling.ties for name in tie}
    found: dict[str, dict[int, float]] = {}
    for group in coupling.groups:
        if group.name in tied:
            continue
        order = scores[group.name].argsort().tolist()
        found[group.name] = {group.size: 0.0}
        for share in shares:
            count = min(max(1, round(group.size * share)), group.size - 1)
            narrow = apply_prune(model, removal(coupling, {group.name: order[:count]}))
            found[group.name][group.size - count] = whole - score(narrow)
    return found
