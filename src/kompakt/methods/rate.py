"""Choose integers for weights alone: activations stay float, as only the bytes of the file count."""

from dataclasses import replace

from kompakt.build.refine import REFINABLE
from kompakt.graph.graph import Graph
from kompakt.plan.plan import Plan, Quantize
from kompakt.spec import PerChannel, QuantSpec

SPEC = QuantSpec(bits=8, narrow=True, granularity=PerChannel(axis=0))


def weights_only(graph: Graph, estimator: str = "minmax") -> Plan:
    """Plan 8-bit integers, a scale a channel, for the weights of convolutions and linear layers.

    Args:
        graph: facts of the folded capture.
        estimator: of the steps; ``lattice`` keeps those that training has chosen.
    """
    weights = [graph.weight(op) for op in graph.layers if op.kind in REFINABLE]
    entries = [
        Quantize(tensor=weight.name, role="weight", spec=replace(SPEC), range=estimator)
        for weight in weights
        if weight is not None
    ]
    return Plan(entries=tuple(dict.fromkeys(entries)))
