"""``Segment``: stretches of a graph that one value enters and one value leaves, as a residual block is."""

from dataclasses import dataclass

from kompakt.graph.graph import Graph, Op


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Ops between two places where a single value carries everything.

    Args:
        start: the op whose value enters; it is not inside.
        end: the op whose value leaves.
        layers: the layers inside, in execution order.
    """

    start: str
    end: str
    layers: tuple[str, ...]


def segments(graph: Graph) -> tuple[Segment, ...]:
    """Cut a graph wherever one value alone is alive, into the shortest stretches that hold a layer.

    Ops behind a stretch that keep the shape, as its last ReLU does, belong to it; others, such as pooling, to the
    next. A place counts where the value is one float tensor with the examples first. A residual block is one stretch,
    since its input stays alive to its end; a layer of a chain is one; ops behind the last place are in none.

    Args:
        graph: any.

    Returns:
        In execution order; no op is in two.
    """
    layers = {op.name for op in graph.layers}
    places = _places(graph)
    found: list[Segment] = []
    start, inside, behind = "", list[str](), False
    for op in graph.ops:
        if op.name in layers:
            inside.append(op.name)
        if op.name not in places:
            behind = False
        elif inside and start:
            found.append(Segment(start=start, end=op.name, layers=tuple(inside)))
            behind = True
        elif behind and found and op.shape == graph.by_name[found[-1].end].shape:
            found[-1] = Segment(start=found[-1].start, end=op.name, layers=found[-1].layers)
        else:
            behind = False
        if op.name in places:
            start, inside = op.name, []
    return tuple(found)


def _places(graph: Graph) -> set[str]:
    """The ops after which their own value is the only one that is still to be read."""
    last = {name: index for index, op in enumerate(graph.ops) for name in op.refs if name in graph.by_name}
    last |= dict.fromkeys(graph.outputs, len(graph.ops))
    examples = next((op.shape[0] for op in graph.ops if op.kind == "input" and op.shape), 0)
    alive: set[str] = set()
    found = set()
    for index, op in enumerate(graph.ops):
        alive = {name for name in alive if last[name] > index}
        if last.get(op.name, -1) > index:
            alive.add(op.name)
        if alive == {op.name} and _carries(op, examples):
            found.add(op.name)
    return found


def _carries(op: Op, examples: int) -> bool:
    return len(op.shapes) < 2 and op.dtype == "float32" and len(op.shape) > 1 and op.shape[0] == examples
