"""What all plots share: colours, the empty layout and how a name becomes a label.

Colours are from Okabe and Ito's palette (safe for colour-blind readers) and hold 3:1 contrast on
white and on near-black, so that one figure serves the light and the dark page; the page colours text
and label backgrounds by its own style sheet.
"""

import html
from typing import Any

from kompakt.report.numbers import elide

Figure = dict[str, Any]

BLUE, VERMILLION, GREEN, GREY = "#0a7bc2", "#d55e00", "#009e73", "#7c8894"
SKY = "#4a95cb"
GRID = "rgba(128,140,152,0.22)"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def frame(height: int, margin: dict[str, int]) -> Figure:
    """Make a layout without data: transparent, no legend, a dark hover label."""
    return {
        "height": height,
        "margin": margin | {"pad": 0},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": GREY},
        "hoverlabel": {
            "bgcolor": "#1c242d",
            "bordercolor": "#1c242d",
            "align": "left",
            "font": {"family": FONT, "color": "#f2f5f8"},
        },
        "showlegend": False,
        "annotations": [],
        "shapes": [],
    }


def note(text: str, x: float, y: float, **more: object) -> Figure:
    """Make an annotation: text without an arrow, placed on the paper unless ``more`` says otherwise."""
    place = {"x": x, "xref": "paper", "xanchor": "left", "y": y, "yref": "paper", "yanchor": "bottom"}
    return place | {"text": text, "showarrow": False, "borderpad": 1, "bgcolor": "rgba(255,255,255,0)"} | more


def label(text: str, width: int) -> str:
    """Shorten and escape a name: plotly reads a little HTML in texts, a name is none."""
    return html.escape(elide(text, width), quote=False)
