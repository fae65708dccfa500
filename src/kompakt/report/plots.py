"""Plots of the way from the baseline to what ships, as plotly figures: pure functions of a ``Result``.

A figure is plain data, a dict of ``data`` and ``layout``; ``plotly.graph_objects.Figure(figure)``
takes it as it is. Every step is a row: its name above on the left, its value above on the right.
"""

from collections.abc import Sequence
from math import floor, log10

from kompakt.measure.result import Latency, Result
from kompakt.report.frame import BLUE, GREY, GRID, SKY, VERMILLION, Figure, frame, label, note
from kompakt.report.numbers import bytes_text, ms_text, plural, points_text, score_text
from kompakt.report.steps import Step, is_share, steps_of

ROLE_COLOUR = {"baseline": GREY, "stage": SKY, "final": BLUE}
ROW, TOP, BOTTOM = 52, 22, 44
LOG_FROM = 30.0


def accuracy_figure(result: Result) -> Figure | None:
    """Plot the accuracy with its 95 % interval at every step, and the budget; None without accuracy."""
    steps = tuple(step for step in steps_of(result) if step.measurement.accuracy is not None)
    if not steps:
        return None
    unit = 100 if is_share(result) else 1
    points = [unit * (step.measurement.accuracy or 0.0) for step in steps]
    intervals = [_interval(step, unit) for step in steps]
    layout = _rows(steps, [score_text(step.measurement.accuracy) for step in steps])
    reach = [value for interval in intervals for value in interval]
    if steps[0].role == "baseline":
        layout["shapes"].append(_line(points[0], GREY, "dot"))
    limit = _budget_at(result, unit)
    if limit is not None:
        reach.append(limit)
        layout["shapes"].append(_line(limit, VERMILLION, "dash"))
        layout["annotations"].append(note("budget", limit, 1, xref="x", xanchor="center", font={"size": 11}))
    span = (max(reach) - min(reach)) or max(abs(reach[0]), 1.0) / 10
    layout["xaxis"] |= {"range": [min(reach) - 0.12 * span, max(reach) + 0.12 * span]}
    layout["xaxis"] |= {"ticksuffix": " %" if unit == 100 else ""} | _named("Accuracy")
    above = [high - x for x, (_, high) in zip(points, intervals, strict=True)]
    below = [x - low for x, (low, _) in zip(points, intervals, strict=True)]
    data = _dots(steps, points) | {"error_x": _whisker(above, below, GREY)}
    return {"data": [data | _hover([_accuracy_hover(step) for step in steps])], "layout": layout}


def size_figure(result: Result) -> Figure:
    """Plot the bytes of the whole file at every step."""
    steps = steps_of(result)
    sizes = [step.measurement.size_bytes for step in steps]
    unit, divisor = _byte_unit(max(sizes))
    layout = _rows(steps, [bytes_text(size) for size in sizes])
    data = _amounts(steps, [size / divisor for size in sizes], layout)
    layout["xaxis"] |= _named(f"File size, {unit}{_scale_note(layout)}")
    texts = [f"{label(step.label, 60)}<br>{size:,} bytes" for step, size in zip(steps, sizes, strict=True)]
    return {"data": [data | _hover(texts)], "layout": layout}


def latency_figure(result: Result) -> Figure | None:
    """Plot the median time of a call with a whisker to its 90th percentile; None where nothing was timed."""
    found = [(step, step.measurement.latency_ms) for step in steps_of(result)]
    rows = [(step, latency) for step, latency in found if latency is not None]
    if not rows:
        return None
    steps = [step for step, _ in rows]
    layout = _rows(steps, [ms_text(latency.p50) for _, latency in rows])
    data = _amounts(steps, [latency.p50 for _, latency in rows], layout, [latency.p90 for _, latency in rows])
    layout["xaxis"] |= _named(f"Time for one call, ms{_scale_note(layout)}")
    above = [max(0.0, latency.p90 - latency.p50) for _, latency in rows]
    data["error_x"] = _whisker(above, [0.0] * len(rows), VERMILLION)
    return {"data": [data | _hover([_latency_hover(step, latency) for step, latency in rows])], "layout": layout}


def _rows(steps: Sequence[Step], values: Sequence[str]) -> Figure:
    layout = frame(TOP + ROW * len(steps) + BOTTOM, {"l": 6, "r": 12, "t": TOP, "b": BOTTOM})
    layout["yaxis"] = {"range": [len(steps) - 0.6, -0.6], "visible": False, "fixedrange": True}
    layout["xaxis"] = {"gridcolor": GRID, "zeroline": False, "fixedrange": True, "nticks": 6}
    layout["dragmode"] = False
    for row, (step, value) in enumerate(zip(steps, values, strict=True)):
        font = {"size": 13, "weight": 700 if step.role == "final" else 400}
        place = {"yref": "y", "yshift": 9, "font": font}
        layout["annotations"].append(note(label(step.label, 27), 0, row, xshift=-2, **place))
        layout["annotations"].append(note(value, 1, row, xanchor="right", xshift=2, **place))
    return layout


def _amounts(steps: Sequence[Step], values: list[float], layout: Figure, ends: Sequence[float] = ()) -> Figure:
    """Bars from zero, or dots on a log scale where the values differ too much for bars to be read."""
    if min(values) > 0 and max(values) / min(values) > LOG_FROM:
        low, high = floor(log10(min(values))), log10(max(*values, *ends))
        pad = 0.08 * (high - low)
        layout["xaxis"] |= {"type": "log", "range": [low - pad, high + pad], "dtick": 1}
        return _dots(steps, values)
    layout["xaxis"] |= {"range": [0, 1.06 * max(*values, *ends, 1e-9)]}
    marker = {"color": [ROLE_COLOUR[step.role] for step in steps], "line": {"width": 0}}
    rows = list(range(len(steps)))
    return {"type": "bar", "orientation": "h", "width": 0.32, "x": values, "y": rows, "marker": marker}


def _dots(steps: Sequence[Step], values: Sequence[float]) -> Figure:
    marker = {"size": 11, "color": [ROLE_COLOUR[step.role] for step in steps]}
    return {"type": "scatter", "mode": "markers", "x": list(values), "y": list(range(len(steps))), "marker": marker}


def _whisker(above: list[float], below: list[float], colour: str) -> Figure:
    ends = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return ends | {"color": colour, "thickness": 2, "width": 5}


def _line(x: float, colour: str, dash: str) -> Figure:
    line = {"color": colour, "width": 1.5, "dash": dash}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "layer": "below", "line": line}


def _named(title: str) -> Figure:
    return {"title": {"text": title, "standoff": 8}}


def _hover(texts: list[str]) -> Figure:
    return {"customdata": texts, "hovertemplate": "%{customdata}<extra></extra>"}


def _interval(step: Step, unit: int) -> tuple[float, float]:
    accuracy = step.measurement.accuracy or 0.0
    low, high = step.measurement.accuracy_ci95 or (accuracy, accuracy)
    return unit * min(low, accuracy), unit * max(high, accuracy)


def _accuracy_hover(step: Step) -> str:
    found = step.measurement
    lines = [label(step.label, 60), score_text(found.accuracy)]
    if found.accuracy_ci95:
        lines.append(f"95 %: {score_text(found.accuracy_ci95[0])} to {score_text(found.accuracy_ci95[1])}")
    if step.drop:
        lines.append(f"drop {points_text(step.drop.points)} points")
    if found.examples:
        lines.append(plural(found.examples, "example"))
    return "<br>".join(lines)


def _latency_hover(step: Step, latency: Latency) -> str:
    run = f"batch {latency.batch}, {plural(latency.threads, 'thread')}, {plural(latency.runs, 'run')}"
    return f"{label(step.label, 60)}<br>p50 {ms_text(latency.p50)}, p90 {ms_text(latency.p90)}<br>{run}"


def _budget_at(result: Result, unit: int) -> float | None:
    if result.baseline.accuracy is None or result.budget.max_drop is None or unit != 100:
        return None
    return 100 * result.baseline.accuracy - result.budget.max_drop


def _byte_unit(largest: float) -> tuple[str, int]:
    units = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
    return next((unit for unit in units if largest >= unit[1]), ("bytes", 1))


def _scale_note(layout: Figure) -> str:
    return " (log scale)" if layout["xaxis"].get("type") == "log" else ""
