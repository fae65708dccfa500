"""What a recipe's ``[quantize]`` section asks beyond rounding to nearest, and carrying it out on a job's data."""

from dataclasses import replace

from kompakt.build.equalize import equalized, evened, lifted, with_biases
from kompakt.build.importance import output_importance
from kompakt.build.quantize import codebooks, quantizers
from kompakt.build.rate import Rate
from kompakt.build.refine import Refinement, Rounding, refined
from kompakt.build.stream import fitting
from kompakt.graph.trace import Capture
from kompakt.job import Job
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import QuantizeSection

BATCH = 32
FEW_BITS, BYTE = 4, 8
"""At so many bits of the weights or fewer, rounding to nearest costs points: they are retargeted unless said."""


def rounding(section: QuantizeSection) -> Rounding:
    """Return how weights are rounded: as said, else by retargeting at 4 bits or fewer and to nearest above."""
    if section.rounding is not None:
        return section.rounding
    if section.rate is not None:
        return "retarget"
    if section.codebook_grid != "free":
        return "nearest"
    few = [bits for bits in (section.weight_bits, section.average_bits, section.codebook) if bits is not None]
    return "retarget" if section.mixed or any(bits <= FEW_BITS for bits in few) else "nearest"


def equalizes(section: QuantizeSection) -> bool:
    """Whether scale is moved between layers: as said, else where all channels of a layer share one codebook."""
    if section.equalize is not None:
        return section.equalize
    return section.codebook is not None and section.codebook_granularity == "tensor"


def prepared(job: Job, section: QuantizeSection, capture: Capture) -> Capture:
    """Return the float capture that is calibrated and quantized: equalized, with a bias everywhere, as asked.

    Unless equalization is refused, channels that depthwise convolutions read are evened, which costs nothing.
    """
    if equalizes(section):
        capture = equalized(capture)
    elif section.equalize is None:
        part = job.data.train.subset(min(section.calibration_examples, len(job.data.train)), seed=job.seed)
        capture = evened(capture, (inputs for inputs, _ in part.batches(BATCH)))
    return with_biases(capture) if _how(section).bias_correction else capture


def refine(job: Job, section: QuantizeSection, original: Capture, quantized: Capture, plan: Plan) -> Capture:
    """Return ``quantized`` refined on training examples, or as it is where nothing is asked."""
    how = _how(section, job.seed)
    if how.rounding == "nearest" and not how.bias_correction and section.rate is None:
        return quantized
    count = min(section.calibration_examples, len(job.data.train), fitting(original))
    job.say(f"refining on {count} training examples: {_named(how, section.rate)}")
    inputs = [inputs for inputs, _ in job.data.train.subset(count, seed=job.seed).batches(BATCH)]
    if section.rate is not None:
        how = replace(how, rate=Rate(trade=section.rate, importance=output_importance(original, inputs, job.seed)))
    return refined(original, quantized, plan, inputs, how)


def _how(section: QuantizeSection, seed: int = 0) -> Refinement:
    return Refinement(
        rounding=rounding(section),
        bias_correction=section.bias_correction or section.rate is not None,
        seed=seed,
    )


def notes(section: QuantizeSection, made: Capture, suffix: str, *, taught: bool = False) -> tuple[str, ...]:
    """Say what was done beyond rounding to nearest, and what few bits are good for in a file of ``suffix``.

    A network that was ``taught`` its integers in training was neither prepared for them nor refined after it.
    """
    how = Refinement(rounding="nearest") if taught else _how(section)
    said = ["weights equalized across layers"] if equalizes(section) and not taught else []
    if section.equalize is None and not equalizes(section) and not taught and lifted(made.graph):
        said.append("channels before depthwise convolutions evened")
    if how.rounding != "nearest" or how.bias_correction:
        said.append(_named(how, section.rate))
    if suffix == ".onnx":
        said += _storage(section, made)
    return tuple(said)


def _storage(section: QuantizeSection, made: Capture) -> list[str]:
    """Say where few bits are storage only: ONNX Runtime multiplies bytes on a CPU, nothing narrower."""
    said, found = [], quantizers(made.module)
    weights = sorted({each.spec.bits for name, each in found.items() if name in made.graph.tensor})
    if codebooks(made.module):
        said.append("codebooks are storage only: the runtime looks the values up and multiplies floats, no faster")
    few = [str(bits) for bits in weights if bits < BYTE]
    if few and section.group_size is not None:
        said.append(f"{'-, '.join(few)}-bit weights in groups are storage only: the runtime multiplies floats")
    elif few:
        how = "two to a byte where they have 4 or fewer: layers of such weights run in float" if section.packed else ""
        text = f"{'-, '.join(few)}-bit weights are storage only: in ONNX they stand in int8, smaller as .kpk, no faster"
        said.append(f"{'-, '.join(few)}-bit weights are storage only, {how}" if how else text)
    inputs = sorted({each.spec.bits for name, each in found.items() if name not in made.graph.tensor})
    if section.float_sums:
        said.append(
            "sums stay float: convolutions whose outputs they read multiply floats, slower than fp32; storage only"
        )
    elif inputs and inputs[0] < BYTE:
        said.append(f"activations of {inputs[0]} bits run as 8-bit integers with a clamp: no faster than 8 bits")
    return said


def _named(how: Refinement, rate: float | None) -> str:
    parts = [] if how.rounding == "nearest" else [f"weights rounded by {how.rounding}"]
    if rate is not None:
        parts = [f"integers by rate and distortion, λ = {rate:g} nats a bit"]
    return ", ".join([*parts, *(["biases corrected"] if how.bias_correction else [])])
