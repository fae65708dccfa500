"""What a quantized model asks of a chip, estimated from facts alone: multiplications, bits and blocks of memory."""

from dataclasses import dataclass
from math import ceil, log2

from kompakt.build.quantize import quantizers
from kompakt.graph.trace import Capture

BRAM_BITS = 18 * 1024
FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one layer, or a whole model, asks of a chip.

    Args:
        name: of the layer.
        multiplications: for one example.
        multipliers: weights, each of which is a multiplier of its own where nothing is reused.
        weight_bits: of one weight; 32 where it stays float.
        activation_bits: of one input.
        accumulator_bits: that no sum of the layer leaves.
        memory_bits: of all weights.
        bram18: blocks of 18 kbit that hold them, packed without a gap; logic holds them where nothing is reused.
    """

    name: str
    multiplications: int
    multipliers: int
    weight_bits: int
    activation_bits: int
    accumulator_bits: int
    memory_bits: int
    bram18: int


def estimate(
    name: str, *, weights: int, fan_in: int, multiplications: int, weight_bits: int, activation_bits: int
) -> Resources:
    """Estimate a layer: a sum of n products of w and a bits needs w + a + ⌈log₂ n⌉ bits, and one more for the bias.

    Args:
        name: of the layer.
        weights: how many it has.
        fan_in: products in one sum.
        multiplications: for one example.
        weight_bits: of one weight.
        activation_bits: of one input.

    Example:
        >>> estimate("fc", weights=80, fan_in=8, multiplications=80, weight_bits=4, activation_bits=8).bram18
        1
    """
    return Resources(
        name=name,
        multiplications=multiplications,
        multipliers=weights,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        accumulator_bits=weight_bits + activation_bits + ceil(log2(max(fan_in, 1))) + 1,
        memory_bits=weights * weight_bits,
        bram18=ceil(weights * weight_bits / BRAM_BITS),
    )


def resources(capture: Capture) -> tuple[Resources, ...]:
    """Estimate every layer of a quantized capture, in execution order."""
    made, graph, found = quantizers(capture.module), capture.graph, []
    for op in graph.layers:
        weight = graph.tensor[str(op.ref("weight"))]
        bits = {role: made[name].spec.bits if (name := str(op.ref(role))) in made else FLOAT_BITS
                for role in ("weight", "input")}  # fmt: skip
        found.append(
            estimate(
                op.module or op.name,
                weights=weight.numel,
                fan_in=weight.numel // max(weight.shape[0], 1),
                multiplications=op.macs,
                weight_bits=bits["weight"],
                activation_bits=bits["input"],
            )
        )
    return tuple(found)


def total(layers: tuple[Resources, ...]) -> Resources:
    """Add up layers; widths are those of the widest."""
    sums = {name: sum(getattr(item, name) for item in layers)
            for name in ("multiplications", "multipliers", "memory_bits", "bram18")}  # fmt: skip
    widest = {name: max((getattr(item, name) for item in layers), default=0)
              for name in ("weight_bits", "activation_bits", "accumulator_bits")}  # fmt: skip
    return Resources(name="all", **sums, **widest)
