"""Learn the integers of a whole block's weights together with the steps of its activations, for the block's output.

Li et al. 2021 (BRECQ), arXiv 2102.05426: what a layer rounds wrongly the next of its block can mend, and errors of the
block's output are weighed by the diagonal of the Fisher matrix. Wei et al. 2022 (QDrop), arXiv 2203.05740: while
it learns, half of the activations, drawn anew for every value, stay float, so that the loss becomes flat. Steps of
activations are learned as in Esser et al. 2020 (LSQ), arXiv 1902.08153.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kompakt.build.importance import value_importance
from kompakt.build.layers import Quantizer
from kompakt.build.stream import Stream, is_constant
from kompakt.graph.fold import set_parameter
from kompakt.graph.segments import Segment, segments
from kompakt.graph.trace import Capture, attribute
from kompakt.numerics.adaround import Annealing, Rounded, learn_rounding
from kompakt.numerics.grid import lsq_grad_scale, lsq_quantize

DROPPED = {"brecq": 0.0, "qdrop": 0.5}
"""Share of the activations that stay float while a block learns."""
REACH = 2.0
"""A step becomes so many times larger or smaller at most, which leaves biases the room that they were given."""
BATCH = 64


class Blocks:
    """The blocks of a model while two streams, float and quantized, pass through them.

    Args:
        original: the folded float capture.
        batches: calibration inputs.
        dropped: share of the activations that stay float while a block learns.
        annealing: iterations, batch, rates.
        seed: of all that is drawn.
    """

    def __init__(
        self, original: Capture, batches: Sequence[Tensor], dropped: float, annealing: Annealing, seed: int
    ) -> None:
        self._first: dict[str, Segment] = {}
        self._last: dict[str, Segment] = {}
        for segment in segments(original.graph):
            self._first[segment.layers[0]] = self._last[segment.layers[-1]] = segment
        ends = [segment.end for segment in self._last.values()]
        outputs = original.graph.outputs
        classifies = len(outputs) == 1 and len(original.graph.by_name[outputs[0]].shape) == 2
        self._importance = value_importance(original, ends, batches, seed) if classifies else {}
        self._dropped, self._annealing, self._seed = dropped, annealing, seed
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._rounded: dict[str, Rounded] = {}

    def before(self, layer: str, ours: Stream, theirs: Stream) -> None:
        """Keep the inputs of the block that a layer is the first of; both streams stand before the layer or earlier."""
        if layer in self._first:
            starts = [_arrive(stream, self._first[layer].start) for stream in (ours, theirs)]
            kept = [torch.cat(stream.values(node)) for stream, node in zip((ours, theirs), starts, strict=True)]
            self._inputs, self._rounded = (kept[0], kept[1]), {}

    def add(self, tensor: str, rounded: Rounded) -> None:
        """Take note of a weight of the block that got its integers on its own."""
        self._rounded[tensor] = rounded

    def after(self, layer: str, ours: Stream, theirs: Stream) -> None:
        """Learn the block that a layer is the last of, and let what follows see what it became."""
        if layer not in self._last or self._inputs is None or not self._rounded:
            return
        segment = self._last[layer]
        end, reference = (_arrive(stream, segment.end) for stream in (ours, theirs))
        targets = torch.cat(theirs.values(reference))
        run = _Run(ours.module, segment, tuple(self._rounded))
        generator = torch.Generator().manual_seed(self._seed)
        importance = self._importance.get(segment.end, torch.ones(()))
        task = _Whole(
            run=run,
            inputs=self._inputs[0],
            floats=self._inputs[1],
            targets=targets,
            importance=importance / importance.mean().clamp_min(torch.finfo(torch.float32).tiny),
            dropped=self._dropped,
            generator=generator,
        )
        weights = tuple(self._rounded.values())
        found = learn_rounding(weights, task, self._annealing, generator, tuple(run.steps.values()))
        if found is not None:
            for (tensor, rounded), q in zip(self._rounded.items(), found, strict=True):
                set_parameter(ours.module, tensor, rounded.on_grid(q).contiguous())
            run.settle()
            made = task.outputs([each.on_grid(q) for each, q in zip(weights, found, strict=True)])
            ours.replace(end, list(made.split([len(value) for value in ours.values(end)])))
        self._inputs = None


def _arrive(stream: Stream, name: str) -> fx.Node:
    """Run a stream until the op called ``name`` is the last that ran, and return its node."""
    node = next(node for node in stream.module.graph.nodes if node.name == name)
    stream.before(node.next.name)
    return node


class _Run:
    """A block of a quantized graph as a function of its input and its weights, steps of activations as parameters."""

    def __init__(self, module: fx.GraphModule, segment: Segment, tensors: tuple[str, ...]) -> None:
        nodes = list(module.graph.nodes)
        names = [node.name for node in nodes]
        self.module, self.tensors = module, tensors
        self.start, self.end = nodes[names.index(segment.start)], nodes[names.index(segment.end)]
        self.nodes = nodes[names.index(segment.start) + 1 : names.index(segment.end) + 1]
        self.steps = {
            target: made.scale.detach().clone().requires_grad_()
            for target, made in self._quantizers().items()
            if not (made.spec.dynamic or made.spec.power_of_two)
        }

    def _quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of activations that are called nowhere but in the block."""
        inside = set(self.nodes)
        calls: dict[str, list[fx.Node]] = {}
        for node in self.module.graph.nodes:
            if node.op == "call_module" and not is_constant(node):
                calls.setdefault(str(node.target), []).append(node)
        made = {
            target: self.module.get_submodule(target) for target, found in calls.items() if inside.issuperset(found)
        }
        return {target: module for target, module in made.items() if isinstance(module, Quantizer)}

    def step(self, target: str) -> Tensor:
        """Return the step of a quantizer, within reach of what it was."""
        was = self.module.get_submodule(target).scale
        assert isinstance(was, Tensor)
        return self.steps[target].clamp(was / REACH, was * REACH)

    def settle(self) -> None:
        """Write the learned steps into the module."""
        for target, step in {target: self.step(target).detach().clone() for target in self.steps}.items():
            self.module.get_submodule(target).scale = step

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], dropped: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Compute the block's output; a share ``dropped`` of the activations is not rounded."""
        values: dict[fx.Node, Any] = {self.start: x}
        given = dict(zip(self.tensors, weights, strict=True))

        def load(node: fx.Node) -> Any:
            if node not in values:
                values[node] = self._outside(node, given, len(x), load)
            return values[node]

        for node in self.nodes:
            if is_constant(node) or node.op == "placeholder":
                continue
            if node.op == "call_module" and str(node.target) in self.steps:
                values[node] = self._rounded(node, load(node.all_input_nodes[0]), dropped, generator)
            else:
                values[node] = self._called(node, load)
        return values[self.end]

    def _rounded(self, node: fx.Node, x: Tensor, dropped: float, generator: torch.Generator | None) -> Tensor:
        target = str(node.target)
        made = self.module.get_submodule(target)
        assert isinstance(made, Quantizer)
        q = lsq_quantize(x, self.step(target), made.zero_point, made.spec, lsq_grad_scale(x.numel(), made.spec))
        return q if generator is None or not dropped else torch.where(_drawn(x, dropped, generator), x, q)

    def _outside(self, node: fx.Node, given: Mapping[str, Tensor], examples: int, load: Any) -> Any:
        """Compute what does not depend on the block's input: weights, other tensors, the number of examples."""
        if node.op == "get_attr":
            return attribute(self.module, str(node.target)).detach()
        source = node.all_input_nodes[0] if node.all_input_nodes else node
        if node.op == "call_module" and source.op == "get_attr" and str(source.target) in given:
            return given[str(source.target)]
        if node.target is torch.ops.aten.sym_size.int:
            return examples
        with torch.no_grad():
            return self._called(node, load)

    def _called(self, node: fx.Node, load: Any) -> Any:
        called: Any = self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        args: Any = fx.map_arg(node.args, load)
        kwargs: Any = fx.map_arg(node.kwargs, load)
        writes = getattr(getattr(called, "_schema", None), "is_mutable", False)
        return called(args[0].clone(), *args[1:], **kwargs) if writes else called(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """What a block should do: see ``kompakt.numerics.adaround.Task``."""

    run: _Run
    inputs: Tensor
    floats: Tensor
    targets: Tensor
    importance: Tensor
    dropped: float
    generator: torch.Generator

    @property
    def examples(self) -> int:
        return len(self.inputs)

    def loss(self, weights: Sequence[Tensor], picked: Tensor) -> Tensor:
        x = self.inputs[picked]
        if self.dropped:
            x = torch.where(_drawn(x, self.dropped, self.generator), self.floats[picked], x)
        return self._weighed(self.run(x, weights, self.dropped, self.generator) - self.targets[picked])

    def error(self, weights: Sequence[Tensor]) -> float:
        parts = zip(self.inputs.split(BATCH), self.targets.split(BATCH), strict=True)
        with torch.no_grad():
            total = sum(float(self._weighed(self.run(x, weights) - y)) for x, y in parts)
        return total / max(self.examples, 1)

    def outputs(self, weights: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.run(x, weights) for x in self.inputs.split(BATCH)])

    def _weighed(self, difference: Tensor) -> Tensor:
        return (difference.square() * self.importance).sum()


def _drawn(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator) < share
