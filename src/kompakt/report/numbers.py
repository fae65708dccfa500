"""Numbers as people read them, one way for the terminal, the page and the plots.

Bytes are decimal (1 kB = 1000 bytes), three significant digits; a value that is missing is ``–``.
"""

from math import isfinite, log10

from kompakt.measure.result import Latency

MISSING = "–"


def bytes_text(size: float | None) -> str:
    """Write a number of bytes, as in ``97.9 kB``."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: float | None) -> str:
    """Write a count (parameters, MACs), as in ``40.8 M``."""
    return _scaled(count, ("", "k", "M", "G", "T")).strip()


def ms_text(ms: float | None) -> str:
    """Write milliseconds, as in ``2.01 ms``."""
    return MISSING if ms is None else f"{digits(ms)} ms"


def bits_text(bits: float | None) -> str:
    """Write a width in bits, as in ``4`` or ``3.62``."""
    return MISSING if bits is None else f"{bits:.2f}".rstrip("0").rstrip(".")


def db_text(ratio: float | None) -> str:
    """Write a signal-to-noise ratio in decibels; an infinite one is ``exact``."""
    if ratio is None:
        return MISSING
    return f"{ratio:.1f} dB" if isfinite(ratio) else "exact"


def points_text(points: float | None) -> str:
    """Write a difference in percentage points without its unit, as in ``0.42`` or ``−0.10``."""
    if points is None:
        return MISSING
    text = f"{points:.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def share_text(share: float | None) -> str:
    """Write a share of 1 as per cent, as in ``91.62 %``."""
    return MISSING if share is None else f"{100 * share:.2f} %"


def score_text(score: float | None) -> str:
    """Write an accuracy: per cent where it is a share of 1, the plain number for any other metric."""
    if score is None:
        return MISSING
    return share_text(score) if 0 <= score <= 1 else digits(score, 4)


def interval_text(interval: tuple[float, float] | None) -> str:
    """Write an interval in points, as in ``0.10 to 0.74``."""
    return MISSING if interval is None else f"{points_text(interval[0])} to {points_text(interval[1])}"


def ratio_text(before: float | None, after: float | None, better: str, worse: str) -> str:
    """Write how many times less ``after`` is than ``before``.

    Args:
        before: the baseline's figure.
        after: the compressed model's figure, same unit.
        better: the word for a smaller figure, e.g. ``smaller``.
        worse: the word for a greater figure, e.g. ``larger``.

    Returns:
        ``11.4× smaller``, ``1.3× larger``, ``unchanged``, or an empty string where there is no ratio.
    """
    if before is None or after is None:
        return ""
    if before == after:
        return "unchanged"
    if before <= 0 or after <= 0:
        return ""
    factor = max(before / after, after / before)
    if factor < 1.005:
        return "unchanged"
    return f"{times(factor)} {better if after < before else worse}"


def speed_text(before: Latency, after: Latency) -> str:
    """Write how much faster ``after`` is: by the rounds of both, side by side, where they were taken so.

    The medians of two artifacts may come from different moments of a busy machine; the ratio of each round does
    not. A ratio whose interval holds 1 is ``unchanged``.
    """
    if after.ratio is None:
        return ratio_text(before.p50, after.p50, "faster", "slower")
    low, high = after.ratio_ci95 or (after.ratio, after.ratio)
    return "unchanged" if low <= 1 <= high else ratio_text(1.0, after.ratio, "faster", "slower")


def times(factor: float) -> str:
    """Write a factor with its sign, as in ``1.35×``, ``11.4×`` or ``124×``."""
    if factor < 9.995:
        return f"{factor:.2f}×"
    return f"{factor:.1f}×" if factor < 99.95 else f"{factor:,.0f}×"


def duration_text(seconds: float) -> str:
    """Write a run time, as in ``3.2 s``, ``14 min 3 s`` or ``2 h 5 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun, as in ``1 layer`` or ``10,000 examples``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def elide(text: str, width: int) -> str:
    """Shorten ``text`` to at most ``width`` characters, its middle replaced by ``…``."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def digits(value: float, significant: int = 3) -> str:
    """Write a number with so many significant digits, never in powers of ten above 1e-4."""
    if value == 0 or not isfinite(value):
        return "0" if value == 0 else str(value)
    value = float(f"{value:.{significant - 1}e}")
    if abs(value) < 1e-4:
        return f"{value:.{significant - 1}e}".replace("-", "−")
    decimals = max(0, significant - 1 - _exponent(value))
    return f"{value:,.{decimals}f}".replace("-", "−")


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return MISSING
    step = 0
    while step < len(units) - 1 and float(f"{value / 1000**step:.2e}") >= 1000:
        step += 1
    number = f"{value:,.0f}" if step == 0 else digits(value / 1000**step)
    return f"{number} {units[step]}"


def _exponent(value: float) -> int:
    return int(log10(abs(value)) // 1)
