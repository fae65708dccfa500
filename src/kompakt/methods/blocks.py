"""Drop whole residual blocks: find those that the identity can stand in for, and choose by measured effect."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from kompakt.build.drop import apply_drop
from kompakt.errors import BudgetError, InputError
from kompakt.graph.graph import Graph, Op
from kompakt.plan.plan import Drop, Plan

PASSES = frozenset(
    {"dropout", "feature_dropout", "alias", "contiguous", "clone", "detach", "relu", "relu6", "hardtanh"}
)
"""Ops after which a residual stream is still that stream (a clamp of a stream that was clamped before)."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A module whose output is its input plus something, of the same shape.

    Args:
        module: its qualified name.
        macs: what it costs for one example.
        params: parameter values that only it reads.
    """

    module: str
    macs: int
    params: int


def residual_blocks(graph: Graph) -> tuple[Block, ...]:
    """Find the modules that can be replaced by the identity, outermost first, in execution order.

    A module counts where all its ops together read one activation, give one of the same shape, and the
    input reaches the output through additions alone (He et al. 2016, arXiv:1603.05027, eq. 1).
    """
    names = dict.fromkeys(op.module for op in graph.ops if op.kind.rstrip("_") == "add" and op.module)
    outputs = {
        name: [op for op in graph.ops if op.module == name or op.module.startswith(f"{name}.")] for name in names
    }
    found = [_block(graph, name, ops) for name, ops in outputs.items()]
    return tuple(block for block in found if block is not None)


def _block(graph: Graph, name: str, ops: Sequence[Op]) -> Block | None:
    inside = {op.name for op in ops}
    sources = list(dict.fromkeys(ref for op in ops for ref in op.refs if ref in graph.by_name and ref not in inside))
    ends = [
        op for op in ops if op.name in graph.outputs or any(user.name not in inside for user in graph.users[op.name])
    ]
    own = {ref for op in ops for ref in op.refs if ref in graph.tensor}
    shared = {t for t in own if any(user.name not in inside for user in graph.users[t])}
    if len(sources) != 1 or len(ends) != 1 or shared or not any(op.macs for op in ops):
        return None
    source, end = graph.by_name[sources[0]], ends[0]
    if source.shape != end.shape or not _reaches(graph, source.name, end.name, inside):
        return None
    params = sum(graph.tensor[t].numel for t in own if graph.tensor[t].kind == "parameter")
    return Block(module=name, macs=sum(op.macs for op in ops), params=params)


def _reaches(graph: Graph, start: str, end: str, inside: set[str]) -> bool:
    """Whether a stream gets from ``start`` to ``end`` through additions and what leaves it alone."""
    seen, added, front = {start}, False, [start]
    while front:
        name = front.pop()
        for user in graph.users[name]:
            kind = user.kind.rstrip("_")
            if user.name in inside and user.name not in seen and (kind == "add" or kind in PASSES):
                added = added or kind == "add"
                seen.add(user.name)
                front.append(user.name)
    return added and end in seen


def drop_blocks(
    model: nn.Module,
    blocks: Sequence[Block],
    score: Callable[[nn.Module], float],
    *,
    count: int | None = None,
    macs: int | None = None,
) -> tuple[Plan, tuple[tuple[str, float], ...]]:
    """Choose blocks to drop, one after the other, each time the one whose loss costs the least score.

    Greedy removal by measured effect (as Elkerdawy et al. 2020, arXiv:1912.10178, by imprinting); every
    candidate is dropped, the model scored, and the best kept.

    Args:
        model: the model; it is left as it was.
        blocks: what can be dropped (``residual_blocks``); nested ones exclude each other.
        score: the higher the better, e.g. accuracy on calibration data.
        count: how many to drop; or
        macs: how many multiply–accumulates to save at least.

    Returns:
        The plan, and for every dropped module the score after it was gone.

    Raises:
        InputError: neither ``count`` nor ``macs`` is given, or both.
        BudgetError: there are not enough blocks.
    """
    if (count is None) == (macs is None):
        raise InputError("say one of count and macs: how many blocks to drop, or what to save")
    plan, saved = Plan(), 0
    history: list[tuple[str, float]] = []
    candidates = list(blocks)
    while len(history) < count if count is not None else saved < (macs or 0):
        if not candidates:
            raise BudgetError(f"only {len(history)} blocks can be dropped, which saves {saved} MACs")
        scored = [(score(apply_drop(model, plan.then(Drop(module=b.module)))), b) for b in candidates]
        value, best = max(scored, key=lambda item: item[0])
        plan = plan.then(Drop(module=best.module))
        history.append((best.module, value))
        saved += best.macs
        candidates = [b for b in candidates if not _overlap(b.module, best.module)]
    return plan, tuple(history)


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
