"""Bars of latency as a picture (SVG) that stands alone: the median, and a line that reaches to the 90th percentile."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kompakt.report.numbers import ms_text

_WIDE, _LABEL, _ROW, _TOP = 760, 250, 30, 46
_COLOURS = ("#31688e", "#35b779", "#fde725", "#440154", "#e76f51", "#8d99ae")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Args:
        label: beside it.
        group: bars of a group share a colour.
        p50_ms, p90_ms: how long it is, how far its line reaches.
    """

    label: str
    group: str
    p50_ms: float
    p90_ms: float


def bars(title: str, found: Sequence[Bar]) -> str:
    """Draw bars from the top down.

    Args:
        title: above them.
        found: at least one.
    """
    scale = (_WIDE - _LABEL - 110) / max(bar.p90_ms for bar in found)
    groups = list(dict.fromkeys(bar.group for bar in found))
    high = _TOP + _ROW * len(found) + 12
    drawn = [_drawn(bar, _TOP + _ROW * row, scale, groups.index(bar.group)) for row, bar in enumerate(found)]
    style = 'font-family="system-ui, sans-serif" font-size="13"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDE}" height="{high}" role="img" {style}>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="12" y="26" font-size="15" font-weight="600">{escape(title)}</text>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def _drawn(bar: Bar, y: int, scale: float, group: int) -> str:
    middle, end, far = y + _ROW // 2, _LABEL + bar.p50_ms * scale, _LABEL + bar.p90_ms * scale
    colour = _COLOURS[group % len(_COLOURS)]
    return (
        f'<text x="{_LABEL - 8}" y="{middle + 4}" text-anchor="end">{escape(bar.label)}</text>'
        f'<rect x="{_LABEL}" y="{y + 4}" width="{max(end - _LABEL, 1):.1f}" height="{_ROW - 10}" fill="{colour}"/>'
        f'<line x1="{end:.1f}" x2="{far:.1f}" y1="{middle - 1}" y2="{middle - 1}" stroke="#555"/>'
        f'<text x="{far + 6:.1f}" y="{middle + 4}">{escape(ms_text(bar.p50_ms))}</text>'
    )
