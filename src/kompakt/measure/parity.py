"""Parity: the simulated model against the artifact in its runtime, on the same examples."""

from collections.abc import Mapping
from math import log10

import numpy as np

from kompakt.errors import InputError
from kompakt.measure.result import Parity

SQNR_LIMIT_DB = 200.0


def sqnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """Compute the signal-to-quantization-noise ratio in decibels.

    ``10·log10(Σ reference² / Σ (reference - value)²)``, limited to ±200 dB: +200 stands for
    equality (float32 itself ends near 150), so that every ratio survives JSON.

    Args:
        reference: any shape.
        value: same shape.

    Raises:
        InputError: the shapes differ, or a value is NaN or infinite.
    """
    reference, value = _same_shape("output", reference, value)
    if not (np.isfinite(reference).all() and np.isfinite(value).all()):
        raise InputError("the signal-to-noise ratio is not defined: a value is NaN or infinite")
    signal, noise = float(np.square(reference).sum()), float(np.square(reference - value).sum())
    if noise == 0:
        return SQNR_LIMIT_DB
    if signal == 0:
        return -SQNR_LIMIT_DB
    return min(SQNR_LIMIT_DB, max(-SQNR_LIMIT_DB, 10 * (log10(signal) - log10(noise))))


def compare(simulated: np.ndarray, actual: np.ndarray, step: float) -> Parity:
    """Compare the outputs of the simulated model with those of the artifact.

    Args:
        simulated: shape (n, classes).
        actual: shape (n, classes), from the artifact in its runtime.
        step: scale of the output's quantizer (0 where the output is not quantized).

    Raises:
        InputError: the shapes differ or hold no example, or a value is NaN or infinite.
    """
    simulated, actual = _same_shape("output", simulated, actual)
    if not simulated.size:
        raise InputError("parity needs at least one example")
    rows = simulated.reshape(len(simulated), -1), actual.reshape(len(actual), -1)
    return Parity(
        top1_agreement=float((rows[0].argmax(axis=1) == rows[1].argmax(axis=1)).mean()),
        max_abs_error=float(np.abs(simulated - actual).max()),
        output_step=step,
        sqnr_db=sqnr_db(simulated, actual),
        examples=len(simulated),
    )


def first_departure(
    reference: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], tolerance: float
) -> str | None:
    """Find the first layer at which two runs of one model part.

    Args:
        reference: layer → output, in execution order.
        actual: layer → output; layers that the runtime fused away may be missing.
        tolerance: largest ``max|reference - actual| / max|reference|`` that passes; NaN never does.

    Returns:
        The layer's name, or None where all common layers agree.

    Raises:
        InputError: the two have no layer in common, or the shapes of one differ.
    """
    common = [name for name in reference if name in actual]
    if not common:
        raise InputError("the two runs have no layer in common; give both the names of the same graph")
    for name in common:
        expected, found = _same_shape(name, reference[name], actual[name])
        scale = np.abs(expected).max(initial=0.0)
        if not np.abs(expected - found).max(initial=0.0) <= tolerance * scale:
            return name
    return None


def _same_shape(name: str, reference: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    reference, value = np.asarray(reference, dtype=np.float64), np.asarray(value, dtype=np.float64)
    if reference.shape != value.shape:
        raise InputError(f"{name}: cannot compare shape {reference.shape} with {value.shape}")
    return reference, value
