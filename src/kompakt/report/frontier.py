"""The candidates of a search: two plots of what an accuracy costs, and a table."""

from collections.abc import Callable

from rich.table import Table
from rich.text import Text

from kompakt.measure.result import Result, Tried
from kompakt.report import numbers
from kompakt.report.frame import BLUE, GREY, GRID, VERMILLION, Figure, frame, label, note

HEIGHT = 300
MARGIN = {"l": 58, "r": 18, "t": 14, "b": 46}


def bytes_figure(result: Result) -> Figure | None:
    """Plot the drop of every candidate against its bytes as ``.kpk``; None without a search."""
    return _figure(result, lambda item: (item.packed_bytes or 0) / 1000, "Bytes as .kpk, kB")


def speed_figure(result: Result) -> Figure | None:
    """Plot the drop of every candidate against its time, as a share of the original's; None without a search."""
    return _figure(result, lambda item: item.latency_ratio or 0.0, "Time, of the original's")


def candidate_table(candidates: tuple[Tried, ...]) -> Table:
    """List candidates for a terminal; ``*`` marks the one that ships, ``+`` those that none is better than."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("Candidate", overflow="fold")
    for title in ("Drop", ".kpk", "Time"):
        table.add_column(title, justify="right", no_wrap=True)
    for item in candidates:
        mark = "*" if item.chosen else "+" if item.front else " "
        what = item.what if item.state == "verified" else f"{item.what}: {item.note}"
        table.add_row(Text(f"{item.number}{mark}"), Text(what), *_figures(item))
    return table


def _figures(item: Tried) -> tuple[str, str, str]:
    drop = numbers.MISSING if item.points is None else numbers.points_text(item.points)
    time = numbers.MISSING if item.latency_ratio is None else f"{item.latency_ratio:.2f}×"
    return drop, numbers.bytes_text(item.packed_bytes), time


def _figure(result: Result, read: Callable[[Tried], float], title: str) -> Figure | None:
    shown = [item for item in result.candidates if item.points is not None]
    if not shown:
        return None
    layout = frame(HEIGHT, MARGIN)
    layout["xaxis"] = {"title": {"text": title}, "gridcolor": GRID, "zeroline": False, "rangemode": "tozero"}
    layout["yaxis"] = {"title": {"text": "Points lost, validation"}, "gridcolor": GRID, "zerolinecolor": GRID}
    if (limit := result.budget.max_drop) is not None:
        line = {"color": VERMILLION, "dash": "dash", "width": 1}
        layout["shapes"].append(
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit, "line": line}
        )
        layout["annotations"].append(note("budget", 0.01, limit, yref="y", font={"size": 11}))
    front = _stairs([item for item in shown if item.front], read)
    path = {
        "type": "scatter",
        "mode": "lines",
        "x": [read(item) for item in front],
        "y": [item.points for item in front],
        "line": {"color": GREY, "width": 1, "shape": "hv"},
        "hoverinfo": "skip",
    }
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [read(item) for item in shown],
        "y": [item.points for item in shown],
        "marker": {
            "color": [BLUE if item.chosen or item.front else GREY for item in shown],
            "size": [14 if item.chosen else 8 for item in shown],
            "symbol": ["star" if item.chosen else "circle" for item in shown],
        },
        "text": [_hover(item) for item in shown],
        "hovertemplate": "%{text}<extra></extra>",
    }
    return {"data": [path, dots], "layout": layout}


def _stairs(front: list[Tried], read: Callable[[Tried], float]) -> list[Tried]:
    """Keep of the front, in the order of one figure, those that lose less than all before them."""
    kept: list[Tried] = []
    for item in sorted(front, key=lambda item: (read(item), item.points or 0.0)):
        if not kept or (item.points or 0.0) < (kept[-1].points or 0.0):
            kept.append(item)
    return kept


def _hover(item: Tried) -> str:
    drop, size, time = _figures(item)
    return f"{item.number}: {label(item.what, 80)}<br>{drop} points, {size}, {time} of the time"
