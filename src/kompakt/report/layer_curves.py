"""Accuracy against the share of channels that goes, layer by layer, as one SVG of small plots."""

from collections.abc import Mapping, Sequence
from html import escape

Curve = Sequence[tuple[float, float]]
WIDE, HIGH, LEFT, TOP, FOOT, COLUMNS = 190, 120, 34, 24, 18, 4
LINE, GREY = "#0072b2", "#999999"


def layer_curves_svg(curves: Mapping[str, Curve], whole: float) -> str:
    """Draw one small plot a layer, all on one scale, in the order given.

    Args:
        curves: layer → pairs (share of its channels that is gone, accuracy in %), by rising share.
        whole: accuracy of the whole network in %, drawn as a grey line.
    """
    values = [value for curve in curves.values() for _, value in curve] + [whole]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    rows = -(-len(curves) // COLUMNS)
    parts = [
        _plot(name, curve, whole, low, span, number % COLUMNS * WIDE, number // COLUMNS * HIGH)
        for number, (name, curve) in enumerate(curves.items())
    ]
    size = f'width="{COLUMNS * WIDE}" height="{max(1, rows) * HIGH}"'
    style = 'font-family="sans-serif" font-size="10"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _plot(name: str, curve: Curve, whole: float, low: float, span: float, x: int, y: int) -> str:
    wide, high = WIDE - LEFT - 8, HIGH - TOP - FOOT

    def at(share: float, value: float) -> tuple[float, float]:
        return x + LEFT + wide * share, y + TOP + high * (1 - (value - low) / span)

    marks = [at(share, value) for share, value in curve]
    points = " ".join(f"{right:.1f},{down:.1f}" for right, down in marks)
    dots = "".join(f'<circle cx="{right:.1f}" cy="{down:.1f}" r="2.5" fill="{LINE}"/>' for right, down in marks)
    level, last = at(0.0, whole)[1], x + LEFT + wide
    foot = y + HIGH - 6
    return (
        f'<rect x="{x + LEFT}" y="{y + TOP}" width="{wide}" height="{high}" fill="none" stroke="#dddddd"/>'
        f'<line x1="{x + LEFT}" x2="{last}" y1="{level:.1f}" y2="{level:.1f}" stroke="{GREY}" stroke-dasharray="3"/>'
        f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="1.5"/>{dots}'
        f'<text x="{x + LEFT}" y="{y + 14}" font-weight="bold">{escape(name)}</text>'
        f'<text x="{x + LEFT - 3}" y="{y + TOP + 8}" text-anchor="end">{low + span:.0f} %</text>'
        f'<text x="{x + LEFT - 3}" y="{y + TOP + high}" text-anchor="end">{low:.0f} %</text>'
        f'<text x="{x + LEFT}" y="{foot}">0</text>'
        f'<text x="{last}" y="{foot}" text-anchor="end">all channels gone</text>'
    )
