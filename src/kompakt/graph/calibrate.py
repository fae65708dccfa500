"""Run the captured model on data and keep what quantizers need to know of its activations."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from kompakt.errors import InputError, ModelError
from kompakt.graph.trace import Capture
from kompakt.numerics.ranges import Histogram, merge, update

SAMPLE = 1 << 10
"""Values of one tensor that enter its histogram for each example; the extremes always do."""
PIECE = 1 << 20
"""Input values that run at once where the batch is symbolic: more leave the caches and take twice as long."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Facts about a captured model on data.

    Args:
        histograms: of each op's output, over the calibration data.
        means: mean of each channel (dimension 1; the last for 2-D and 3-D outputs) of each op's output.
        examples: number of examples seen.
    """

    histograms: Mapping[str, Histogram]
    means: Mapping[str, Tensor]
    examples: int


def calibrate(capture: Capture, batches: Iterable[Tensor], names: Collection[str]) -> Stats:
    """Collect the statistics of the outputs of the ops called ``names``.

    Args:
        capture: the captured model.
        batches: inputs, batch first.
        names: ops to observe.

    Raises:
        InputError: there is not one batch.
        ModelError: an activation holds NaN or infinity; the message names the first such op.
    """
    watch = _Watch(capture, frozenset(names))
    with torch.inference_mode():
        for batch in batches:
            for piece in batch.split(_piece(capture, batch)):
                watch.examples += len(piece)
                watch.run(piece)
    if not watch.examples:
        raise InputError("calibration: the data gave no batch; expected at least one")
    means = {name: total / watch.counts[name] for name, total in watch.sums.items()}
    return Stats(histograms=watch.histograms, means=means, examples=watch.examples)


def pool(stats: Stats, shares: Mapping[str, str]) -> Stats:
    """Add the values of ops to the histograms of those whose range they share.

    Args:
        stats: facts about the activations.
        shares: op → the owner of its range.
    """
    histograms = dict(stats.histograms)
    for name, owner in shares.items():
        histograms[owner] = merge(histograms[owner], stats.histograms[name])
    return replace(stats, histograms=histograms)


def _piece(capture: Capture, batch: Tensor) -> int:
    """Say how many examples run at once; all of them where the model fixes its batch."""
    first = next(node for node in capture.module.graph.nodes if node.op == "placeholder").meta.get("val")
    symbolic = isinstance(first, Tensor) and first.ndim > 0 and isinstance(first.shape[0], torch.SymInt)
    return max(1, PIECE // max(batch[0].numel(), 1)) if symbolic and len(batch) else max(len(batch), 1)


class _Watch(fx.Interpreter):
    """An interpreter that adds the outputs of some nodes to histograms and channel means."""

    def __init__(self, capture: Capture, names: frozenset[str]) -> None:
        super().__init__(capture.module)
        self.extra_traceback = False
        self.graph_facts = capture.graph
        self.names = names
        self.histograms: dict[str, Histogram] = {}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.examples = 0

    def run_node(self, n: fx.Node) -> object:
        """Run one node and observe its output."""
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor):
            self._observe(n.name, value)
        return value

    def _observe(self, name: str, value: Tensor) -> None:
        self.histograms[name] = _counted(self.histograms.get(name), value, self._where(name))
        total, count = _channel_sums(value)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + count

    def _where(self, name: str) -> str:
        op = self.graph_facts.by_name[name]
        return f"{name} ({op.module or 'the model'}{', ' + op.source if op.source else ''})"


def _channel_sums(value: Tensor) -> tuple[Tensor, int]:
    """Sum each channel, float64, and tell how many values a sum has.

    An image's own values are added in float32 first: a sum that converts every value takes ten times as long.
    """
    rows = value.flatten(2).sum(2) if value.ndim == 4 else value.reshape(-1, value.shape[-1] if value.ndim else 1)
    return rows.sum(0, dtype=torch.float64), value.numel() // max(rows.shape[1], 1)


def _counted(histogram: Histogram | None, value: Tensor, where: str) -> Histogram:
    """Add one output to a histogram: a strided sample of it, and its exact extremes."""
    flat = value.flatten()
    low, high = flat.aminmax()
    if not torch.isfinite(low) or not torch.isfinite(high):
        raise ModelError(f"{where}: the activation holds NaN or infinity; check the weights and the input's scaling")
    # An odd stride meets every column of an image, whose width is a power of two more often than not.
    examples = value.shape[0] if value.ndim else 1
    stride = max(1, -(-flat.numel() // (SAMPLE * examples))) | 1
    sample = torch.cat([flat[::stride], low.reshape(1), high.reshape(1)]) if stride > 1 else flat
    return update(histogram, sample)
