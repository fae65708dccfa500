"""Run a captured graph node by node over a whole set of batches, so that a layer can be changed before it runs.

A forward pass for every layer would cost the square of the depth; here each node runs once, over all batches, and
a value is let go of, batch by batch, as soon as its last reader has run.
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from kompakt.errors import InputError
from kompakt.graph.graph import Graph
from kompakt.graph.trace import Capture, attribute


class Stream:
    """A graph on its way through a set of batches.

    Args:
        module: the graph; read anew at every step, so that a tensor changed before its readers run has effect.
        batches: inputs, batch first; copied, as a graph may write over its input.
    """

    def __init__(self, module: fx.GraphModule, batches: Iterable[Tensor]) -> None:
        self.module = module
        self._batches = [batch.clone() for batch in batches]
        if not self._batches:
            raise InputError("refinement: the data gave no batch; expected at least one")
        self._values: dict[fx.Node, list[Any]] = {}
        self._todo = list(module.graph.nodes)
        self._last = {value: node for node in module.graph.nodes for value in node.all_input_nodes}

    def before(self, name: str) -> fx.Node:
        """Run all nodes that come before the one called ``name``, which is returned."""
        while self._todo and self._todo[0].name != name:
            self._run(self._todo.pop(0))
        assert self._todo, f"the graph has no node {name} ahead"
        return self._todo[0]

    def values(self, node: fx.Node) -> list[Tensor]:
        """Return the value of a node that has run and has readers ahead, for each batch."""
        return self._values[node]

    def replace(self, node: fx.Node, values: list[Tensor]) -> None:
        """Let what follows read other values of a node that has run and has readers ahead."""
        assert node in self._values, f"nothing reads {node.name} any more"
        self._values[node] = list(values)

    def peek(self) -> list[Tensor]:
        """Compute the next node without leaving it behind, for each batch."""
        run = self._ready(self._todo[0])
        return [run(index) for index in range(len(self._batches))]

    def _run(self, node: fx.Node) -> None:
        if node.op == "output" or is_constant(node):
            return
        if node.op == "placeholder":
            self._values[node] = list(self._batches)
            return
        run = self._ready(node)
        dying = [item for item in node.all_input_nodes if self._last[item] is node and item in self._values]
        made: list[Any] = []
        for index in range(len(self._batches)):
            made.append(run(index))
            for item in dying:
                self._values[item][index] = None
        for item in dying:
            del self._values[item]
        if node in self._last:
            self._values[node] = made

    def _ready(self, node: fx.Node) -> Callable[[int], Any]:
        """Return what computes a node for the batch of an index; tensors of the model are read once."""
        constants = {item: self._constant(item) for item in node.all_input_nodes if is_constant(item)}

        def run(index: int) -> Any:
            def load(item: fx.Node) -> Any:
                return constants[item] if item in constants else self._values[item][index]

            return self._call(node, load)

        return run

    def _constant(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return attribute(self.module, str(node.target))
        return self._call(node, self._constant)

    def _call(self, node: fx.Node, load: Callable[[fx.Node], Any]) -> Any:
        called: Any = self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        args: Any = fx.map_arg(node.args, load)
        kwargs: Any = fx.map_arg(node.kwargs, load)
        with torch.no_grad():
            return called(*args, **kwargs)


def is_constant(node: fx.Node) -> bool:
    """Whether a node depends on the model's tensors alone: a weight, a bias, their rounded forms."""
    if node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    return node.op == "call_module" and len(inputs) == 1 and is_constant(inputs[0])


def peak_bytes(graph: Graph, batch: int) -> int:
    """Return the most bytes that the values of one example take at once when a graph is streamed.

    Args:
        graph: facts, whose shapes have ``batch`` examples.
        batch: examples in the shapes.
    """
    last = {name: index for index, op in enumerate(graph.ops) for name in op.refs if name in graph.by_name}
    alive: dict[str, int] = {}
    peak = 0
    for index, op in enumerate(graph.ops):
        alive[op.name] = 4 * sum(prod(shape) for shape in op.shapes or (op.shape,))
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last.get(name, -1) > index}
    return peak // max(batch, 1)


def fitting(capture: Capture, memory_bytes: int = 2**31) -> int:
    """Return how many examples two streams of a capture, float and quantized, may hold in ``memory_bytes``."""
    batch = capture.example[0].shape[0] if capture.example[0].ndim else 1
    return max(1, memory_bytes // max(2 * peak_bytes(capture.graph, batch), 1))
