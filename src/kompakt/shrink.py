"""The smallest ``.kpk`` of a model: λ is searched for a budget, or was trained for; judged on files read back."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.splice import unpack_file
from kompakt.build.equalize import with_biases
from kompakt.build.importance import output_importance
from kompakt.build.quantize import quantize, quantizers
from kompakt.build.rate import Rate
from kompakt.build.refine import Refinement, refined
from kompakt.build.stream import fitting
from kompakt.graph.calibrate import Stats
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.job import Job
from kompakt.measure.accuracy import Score
from kompakt.measure.result import Drop
from kompakt.methods.rate import weights_only
from kompakt.numerics.rate_distortion import coarse

EXAMPLES, BATCH = 512, 32
FIRST, STRIDE, LEAST, MOST = 3e-8, 4.0, 1e-12, 1e-3
HALVINGS = 2
SCALE_BITS = 4
"""Of the mantissa of steps that training chose: it cannot mend what their rounding moves."""
NO_STATS = Stats(histograms={}, means={}, examples=0)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file under one λ: its bytes and its drop on the validation split."""

    trade: float
    size_bytes: int
    drop: Drop


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """The file that was kept, and what it is worth on the test split.

    Args:
        chosen: its λ, bytes and drop on the validation split.
        tried: every λ.
        baseline_bytes: of the original as fp32 ONNX.
        baseline, compressed: scores on the test split.
        drop: of the test split, paired.
    """

    chosen: Candidate
    tried: tuple[Candidate, ...]
    baseline_bytes: int
    baseline: Score
    compressed: Score
    drop: Drop


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folded capture with what rate–distortion quantization needs to know of it."""

    capture: Capture
    inputs: list[Tensor]
    importance: dict[str, Tensor]

    def at(self, trade: float) -> Capture:
        """Return the capture with integers chosen for λ."""
        plan = weights_only(self.capture.graph)
        how = Refinement(bias_correction=True, rate=Rate(trade=trade, importance=self.importance))
        return refined(self.capture, quantize(self.capture, plan, NO_STATS), plan, self.inputs, how)

    def kept(self) -> Capture:
        """Return the capture with the integers that its weights lie on already, as training for rate leaves them."""
        plan = weights_only(self.capture.graph, "lattice")
        how = Refinement(rounding="nearest", bias_correction=True, rate=Rate(trade=0.0, importance={}))
        made = quantize(self.capture, plan, NO_STATS)
        for quantizer in quantizers(made.module).values():
            quantizer.scale = coarse(quantizer.scale, SCALE_BITS)
        return refined(self.capture, made, plan, self.inputs, how)


def prepare(job: Job) -> Source:
    """Capture a job's model, fold it and measure the importance of its channels on training examples."""
    example = next(iter(job.data.train.batches(2, limit=2)))[0]
    capture = with_biases(fold(trace(job.model, example)))
    count = min(EXAMPLES, len(job.data.train), fitting(capture))
    inputs = [inputs for inputs, _ in job.data.train.subset(count, seed=job.seed).batches(BATCH)]
    return Source(capture=capture, inputs=inputs, importance=output_importance(capture, inputs, job.seed))


def shrink(job: Job, out: Path, *, size_bytes: int | None = None) -> Shrunk:
    """Write the smallest file that keeps ``job.recipe.budget.max_drop``, or the best within ``size_bytes``.

    Where nothing keeps the budget, the file of the smallest λ tried is written.

    Args:
        job: model, data, budget; decisions are made on the validation split.
        out: the ``.kpk``.
        size_bytes: a limit of bytes instead of a drop.

    Raises:
        InputError, ModelError: the model or the data cannot be used.
    """
    source = prepare(job)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = job.target.export(source.capture, folder / "original.onnx", metadata={})
        reference = job.judge.score(original, job.data.validation)

        def attempt(trade: float) -> Candidate:
            job.say(f"rate–distortion quantization, λ = {trade:.2g} nats a bit")
            path = job.target.export(source.at(trade), folder / f"{trade:.6e}.onnx", metadata={})
            size = pack_onnx(path, folder / f"{trade:.6e}.kpk")
            return Candidate(
                trade=trade, size_bytes=size, drop=job.judge.drop(reference, job.judge.score(path, job.data.validation))
            )

        limit = job.recipe.budget.max_drop
        if size_bytes is not None:
            tried = search(attempt, lambda found: found.size_bytes > size_bytes)
        else:
            tried = search(attempt, lambda found: found.drop.points <= (0.5 if limit is None else limit))
        chosen = _chosen(tried, limit, size_bytes)
        return _written(job, original, folder / f"{chosen.trade:.6e}.kpk", out, chosen, tried)


def settled(job: Job, model: nn.Module, rate: float, out: Path) -> Shrunk:
    """Write the ``.kpk`` of a network that was trained for rate: the integers that its weights lie on.

    Args:
        job: of the original, against which it is judged.
        model: trained with ``[finetune] rate``.
        rate: λ of that training, for the record.
        out: the ``.kpk``.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = job.target.export(prepare(job).capture, folder / "original.onnx", metadata={})
        made = job.target.export(prepare(replace(job, model=model)).kept(), folder / "made.onnx", metadata={})
        size = pack_onnx(made, folder / "made.kpk")
        reference, score = (job.judge.score(path, job.data.validation) for path in (original, made))
        chosen = Candidate(trade=rate, size_bytes=size, drop=job.judge.drop(reference, score))
        return _written(job, original, folder / "made.kpk", out, chosen, (chosen,))


def _written(
    job: Job, original: Path, packed: Path, out: Path, chosen: Candidate, tried: tuple[Candidate, ...]
) -> Shrunk:
    """Read a file back, score it beside the original on the test split, and write it to ``out``."""
    back = packed.with_suffix(".back.onnx")
    unpack_file(packed, back)
    scores = [job.judge.score(path, job.data.test) for path in (original, back)]
    pack_onnx(back, out)
    return Shrunk(
        chosen=chosen,
        tried=tried,
        baseline_bytes=original.stat().st_size,
        baseline=scores[0],
        compressed=scores[1],
        drop=job.judge.drop(*scores),
    )


def search(attempt: Callable[[float], Candidate], goes_up: Callable[[Candidate], bool]) -> tuple[Candidate, ...]:
    """Try λ by strides until the answer changes, then halve the stride.

    Args:
        attempt: makes and judges the file of a λ.
        goes_up: whether a larger λ is wanted: there is room for error, or there are too many bytes.
    """
    found, trade = [attempt(FIRST)], FIRST
    rising = goes_up(found[0])
    while LEAST < trade < MOST and goes_up(found[-1]) == rising:
        trade = trade * STRIDE if rising else trade / STRIDE
        found.append(attempt(trade))
    low, high = sorted(math.log(item.trade) for item in found[-2:])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found.append(attempt(math.exp(middle)))
        low, high = (middle, high) if goes_up(found[-1]) else (low, middle)
    return tuple(found)


def _chosen(tried: tuple[Candidate, ...], limit: float | None, size_bytes: int | None) -> Candidate:
    """The smallest file within the drop, or the best within the bytes; the nearest where there is none."""
    if size_bytes is not None:
        inside = [item for item in tried if item.size_bytes <= size_bytes]
        return max(inside or tried, key=lambda item: item.size_bytes if inside else -item.size_bytes)
    inside = [item for item in tried if item.drop.points <= (0.5 if limit is None else limit)]
    return min(inside, key=lambda item: item.size_bytes) if inside else min(tried, key=lambda item: item.drop.points)
