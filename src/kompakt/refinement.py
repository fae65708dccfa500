"""What a recipe's ``[quantize]`` section asks beyond rounding to nearest, and carrying it out on a job's data."""

from kompakt.build.equalize import equalized, with_biases
from kompakt.build.refine import Refinement, Rounding, refined
from kompakt.build.stream import fitting
from kompakt.graph.trace import Capture
from kompakt.job import Job
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import QuantizeSection

BATCH = 32
FEW_BITS = 4
"""At so many bits of the weights or fewer, rounding to nearest costs points: they are retargeted unless said."""


def rounding(section: QuantizeSection) -> Rounding:
    """Return how weights are rounded: as said, else by retargeting at 4 bits or fewer and to nearest above."""
    if section.rounding is not None:
        return section.rounding
    return "retarget" if section.weight_bits is not None and section.weight_bits <= FEW_BITS else "nearest"


def prepared(section: QuantizeSection, capture: Capture) -> Capture:
    """Return the float capture that is calibrated and quantized: equalized, with a bias everywhere, as asked."""
    if section.equalize:
        capture = equalized(capture)
    return with_biases(capture) if section.bias_correction else capture


def refine(job: Job, section: QuantizeSection, original: Capture, quantized: Capture, plan: Plan) -> Capture:
    """Return ``quantized`` refined on training examples, or as it is where nothing is asked."""
    how = Refinement(rounding=rounding(section), bias_correction=section.bias_correction, seed=job.seed)
    if how.rounding == "nearest" and not how.bias_correction:
        return quantized
    count = min(section.calibration_examples, len(job.data.train), fitting(original))
    job.say(f"refining on {count} training examples: {_named(how)}")
    part = job.data.train.subset(count, seed=job.seed)
    return refined(original, quantized, plan, (inputs for inputs, _ in part.batches(BATCH)), how)


def notes(section: QuantizeSection, suffix: str) -> tuple[str, ...]:
    """Say what was done beyond rounding to nearest, and what few bits are good for in a file of ``suffix``."""
    how = Refinement(rounding=rounding(section), bias_correction=section.bias_correction)
    said = ["weights equalized across layers"] if section.equalize else []
    if how.rounding != "nearest" or how.bias_correction:
        said.append(_named(how))
    few = section.weight_bits is not None and section.weight_bits < 8 and section.group_size is None
    if few and suffix == ".onnx":
        said.append(f"{section.weight_bits}-bit weights are stored in int8 in ONNX: smaller as .kpk, no faster")
    return tuple(said)


def _named(how: Refinement) -> str:
    parts = [] if how.rounding == "nearest" else [f"weights rounded by {how.rounding}"]
    return ", ".join([*parts, *(["biases corrected"] if how.bias_correction else [])])
