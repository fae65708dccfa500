"""Curves as SVG text: a picture that a page of documents shows without any script."""

import html
from dataclasses import dataclass

from kompakt.report.frame import BLUE, GREEN, GREY, SKY, VERMILLION

COLOURS = (BLUE, VERMILLION, GREEN, GREY, SKY, "#cc79a7", "#e69f00", "#56b4e9")
WIDE, HIGH, PAD, LEGEND = 560, 320, 48, 150
TICKS = 5


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A named line.

    Args:
        name: in the legend.
        points: x and y, in the order of the line.
    """

    name: str
    points: tuple[tuple[float, float], ...]


def curves_svg(title: str, curves: tuple[Curve, ...], *, low: float | None = None) -> str:
    """Draw curves over common axes.

    Args:
        title: above the picture: what is upwards, and what to the right.
        curves: each in its own colour.
        low: the least y that is shown; the least of all points if it is None.
    """
    xs = [x for curve in curves for x, _ in curve.points] or [0.0, 1.0]
    ys = [y for curve in curves for _, y in curve.points] or [0.0, 1.0]
    left, right, bottom, top = min(xs), max(xs), min(ys) if low is None else low, max(ys)
    across, up = (right - left) or 1.0, (top - bottom) or 1.0
    inner = WIDE - PAD - LEGEND, HIGH - 2 * PAD

    def at(x: float, y: float) -> tuple[float, float]:
        y = max(y, bottom)
        return PAD + inner[0] * (x - left) / across, HIGH - PAD - inner[1] * (y - bottom) / up

    lines = [f'<text x="{PAD}" y="24" font-size="13">{html.escape(title)}</text>']
    for tick in range(TICKS):
        share = tick / (TICKS - 1)
        x, y = at(left + share * across, bottom + share * up)
        lines.append(f'<line x1="{PAD}" y1="{y:.1f}" x2="{PAD + inner[0]}" y2="{y:.1f}" stroke="#8884"/>')
        lines.append(f'<text x="{PAD - 5}" y="{y + 4:.1f}" text-anchor="end">{bottom + share * up:.4g}</text>')
        lines.append(f'<text x="{x:.1f}" y="{HIGH - PAD + 17}" text-anchor="middle">{left + share * across:.3g}</text>')
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(x, y) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
        place = f'x="{WIDE - LEGEND + 14}" y="{PAD + 12 + 18 * number}" fill="{colour}"'
        lines.append(f"<text {place}>{html.escape(curve.name)}</text>")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}"'
    return f'{head} font-family="sans-serif" font-size="11" fill="{GREY}">\n' + "\n".join(lines) + "\n</svg>\n"


def curves_page(title: str, pictures: dict[str, str], table: list[list[str]]) -> str:
    """One HTML page without scripts: pictures, and a table whose first row is its head.

    Args:
        title: of the page.
        pictures: SVG text by name.
        table: rows of text; it is escaped.
    """
    style = (
        "body{font-family:system-ui,sans-serif;margin:2rem;max-width:70rem}td,th{padding:.2rem .8rem;text-align:right}"
    )
    cells = [[html.escape(cell) for cell in row] for row in table]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in cells[1:])
    parts = "\n".join(pictures.values())
    safe = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{safe}"><style>{style}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{parts}<table><tr>{head}</tr>\n{body}</table></body></html>\n"
    )
