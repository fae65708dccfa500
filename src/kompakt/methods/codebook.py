"""Choose codebooks: every layer's weights become indices into a few shared values."""

from dataclasses import dataclass, replace
from typing import Literal

from kompakt.errors import InputError
from kompakt.graph.graph import Graph, Left
from kompakt.plan.plan import Plan, Share

TERNARY_BITS = 2


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What a recipe may say about codebooks.

    Args:
        bits: of an index; 2^bits values in a codebook.
        granularity: one codebook a tensor, or one a channel.
        start: where k-means begins; ``exact`` is the optimum.
        grid: of the values, see ``kompakt.plan.plan.Share``; ``ternary`` has 2 bits.
        ends: bits of the first and the last layer; None as all others.
        keep: names of layers (ops) that stay float.
    """

    bits: int
    granularity: Literal["tensor", "channel"] = "tensor"
    start: Literal["linear", "density", "random", "exact"] = "exact"
    grid: Literal["free", "apot", "power_of_two", "ternary"] = "free"
    ends: int | None = None
    keep: frozenset[str] = frozenset()


def codebook(graph: Graph, knobs: Knobs) -> tuple[Plan, tuple[Left, ...]]:
    """Plan a codebook for the weight of every layer (Deep Compression, Han et al. 2016, arXiv:1510.00149, §3).

    Args:
        graph: facts of the folded capture.
        knobs: what the recipe says.

    Returns:
        The plan, and the layers that stay float with the reason.

    Raises:
        InputError: ``keep`` names a layer that the model has not, or leaves none.
    """
    if knobs.grid == "ternary" and knobs.bits != TERNARY_BITS:
        raise InputError(f"{knobs.bits} bits: ternary weights have three values, {TERNARY_BITS} bits; say codebook 2")
    names = [op.name for op in graph.layers]
    for name in sorted(knobs.keep):
        if name not in names:
            raise InputError(f"{name}: the model has no such layer; its layers are {', '.join(names[:5])} …")
    chosen = [op for op in graph.layers if op.name not in knobs.keep]
    if not chosen:
        raise InputError("no layer is left to share weights in; keep fewer layers")
    ends = {chosen[0].name, chosen[-1].name} if knobs.ends is not None else set()
    entries: dict[str, Share] = {}
    for op in chosen:
        tensor, kept = str(op.ref("weight")), op.name in ends
        made = Share(tensor=tensor, bits=knobs.bits, granularity=knobs.granularity, start=knobs.start, grid=knobs.grid)
        entries.setdefault(tensor, replace(made, bits=knobs.ends, grid="free") if kept and knobs.ends else made)
    left = [Left(name=graph.by_name[n].module or n, reason="kept in float by choice") for n in sorted(knobs.keep)]
    return Plan(entries=tuple(entries.values())), tuple(left)
