"""The plot of all layers: bits, error, MACs and time, one track under the other over one axis."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from statistics import median

from kompakt.measure.result import Result
from kompakt.report.frame import BLUE, GREEN, GREY, GRID, VERMILLION, Figure, frame, label, note
from kompakt.report.numbers import count_text, ms_text

HEIGHT, GAP, TOP, NAMES, NUMBERS = 128, 46, 34, 110, 46
NAMED_LAYERS = 80
FEW_LAYERS = 60
LOG_FROM = 30.0


@dataclass(frozen=True, kw_only=True)
class Track:
    """One track: its title (with the key of its marks), its traces and its vertical axis."""

    title: str
    traces: tuple[Figure, ...]
    axis: Figure


def layers_figure(result: Result) -> Figure | None:
    """Plot bits, error, MACs and time of every layer, in the order of the network; None without layers.

    A track without data is left out. Names stand on the axis up to 80 layers, numbers beyond; the
    page falls back to numbers where the names have no room.
    """
    layers = result.layers
    if not layers:
        return None
    tracks = [
        _bits([layer.weight_bits for layer in layers], [layer.activation_bits for layer in layers]),
        _error([layer.weight_sqnr_db for layer in layers], [layer.output_sqnr_db for layer in layers]),
        _amounts("MACs", GREY, [float(layer.macs) for layer in layers], count_text),
        _amounts("Time, ms", VERMILLION, [layer.latency_ms for layer in layers], ms_text),
    ]
    figure = _stack([track for track in tracks if track is not None], [layer.name for layer in layers])
    first = figure["data"][0]
    first["customdata"] = [label(f"{n} · {layer.name}", 60) for n, layer in enumerate(layers, start=1)]
    first["hovertemplate"] = "<b>%{customdata}</b><br>" + first["hovertemplate"]
    return figure


def _stack(tracks: Sequence[Track], names: Sequence[str]) -> Figure:
    total = len(tracks) * HEIGHT + (len(tracks) - 1) * GAP
    numbers = list(range(1, len(names) + 1))
    named = len(names) <= NAMED_LAYERS
    foot = NAMES if named else NUMBERS
    layout = frame(TOP + total + foot, {"l": 48, "r": 10, "t": TOP, "b": foot})
    layout |= {"hovermode": "x unified", "hoversubplots": "axis", "bargap": 0.25 if len(names) <= FEW_LAYERS else 0}
    layout["dragmode"] = "zoom" if len(names) > FEW_LAYERS else False
    layout["xaxis"] = _names_axis(names, numbers) if named else _numbers_axis()
    layout["xaxis"] |= {"anchor": f"y{len(tracks)}" if len(tracks) > 1 else "y", "fixedrange": len(names) <= FEW_LAYERS}
    layout["xaxis"] |= {"unifiedhovertitle": {"text": "Layer"}, "spikecolor": GREY, "spikethickness": 1}
    layout["xaxis"] |= {"range": [0.4, len(names) + 0.6], "showgrid": False, "zeroline": False}
    data = []
    for number, track in enumerate(tracks):
        suffix = "" if number == 0 else str(number + 1)
        top = 1 - number * (HEIGHT + GAP) / total
        place = {"domain": [max(0.0, top - HEIGHT / total), top], "fixedrange": True, "gridcolor": GRID}
        layout[f"yaxis{suffix}"] = {"zeroline": False} | track.axis | place
        layout["annotations"].append(note(track.title, 0, top, yshift=6, xshift=-2, font={"size": 13}))
        data += [{"x": numbers, "xaxis": "x", "yaxis": f"y{suffix}"} | trace for trace in track.traces]
    return {"data": data, "layout": layout}


def _names_axis(names: Sequence[str], numbers: Sequence[int]) -> Figure:
    texts = [label(name, 18) for name in names]
    ticks = {"tickmode": "array", "tickvals": numbers, "ticktext": texts, "tickangle": -90}
    return ticks | {"tickfont": {"size": 10}}


def _numbers_axis() -> Figure:
    return {"nticks": 12, "title": {"text": "Layer number, as in the table", "standoff": 8}}


def _bits(weights: Sequence[float], activations: Sequence[float]) -> Track:
    low, high = max(0.25, min(*weights, *activations, 2)), max(*weights, *activations, 8)
    ticks = [bits for bits in (1, 2, 4, 8, 16, 32, 64) if 0.9 * low <= bits <= 1.1 * high]
    axis = {"type": "log", "tickvals": ticks, "ticktext": [str(bits) for bits in ticks]}
    axis["range"] = [log10(low) - 0.12, log10(high) + 0.12]
    return Track(
        title=f"Bits  {_key(BLUE, '■', 'weights')}  {_key(VERMILLION, '○', 'activations')}",
        traces=(
            _marks(weights, BLUE, "square", "weights: %{y:.3~g} bits"),
            _marks(activations, VERMILLION, "circle-open", "activations: %{y:.3~g} bits"),
        ),
        axis=axis,
    )


def _error(weights: Sequence[float | None], outputs: Sequence[float | None]) -> Track | None:
    found = [
        (_finite(values), colour, symbol, mark, word)
        for values, colour, symbol, mark, word in (
            (weights, BLUE, "square", "■", "weights"),
            (outputs, GREEN, "diamond", "◆", "output"),
        )
        if any(value is not None for value in _finite(values))
    ]
    if not found:
        return None
    keys = "  ".join(_key(colour, mark, word) for _, colour, _, mark, word in found)
    return Track(
        title=f"Signal to noise, dB  {keys}",
        traces=tuple(
            _marks(values, colour, symbol, f"{word}: %{{y:.1f}} dB", line=True)
            for values, colour, symbol, _, word in found
        ),
        axis={"rangemode": "tozero", "nticks": 4},
    )


def _amounts(title: str, colour: str, values: Sequence[float | None], write: Callable[[float], str]) -> Track | None:
    """Bars from zero; from the smallest power of ten on a log scale, where most bars would be too small to see."""
    values = _finite(values)
    positive = [value for value in values if value is not None and value > 0]
    if not positive:
        return None
    trace: Figure = {"type": "bar", "y": values, "marker": {"color": colour, "line": {"width": 0}}}
    trace |= {"customdata": ["" if value is None else write(value) for value in values]}
    trace["hovertemplate"] = f"{title.partition(',')[0]}: %{{customdata}}<extra></extra>"
    if max(positive) / median(positive) < LOG_FROM:
        return Track(title=title, traces=(trace,), axis={"rangemode": "tozero", "nticks": 4})
    low, high = floor(log10(min(positive)) - 0.01), log10(max(positive))
    axis = {"type": "log", "range": [low, high + 0.1], "dtick": max(1, round((high - low) / 4)), "exponentformat": "SI"}
    return Track(title=f"{title}  (log scale)", traces=(trace,), axis=axis)


def _marks(values: Sequence[float | None], colour: str, symbol: str, hover: str, line: bool = False) -> Figure:
    size = 8 if len(values) <= FEW_LAYERS else 5
    return {
        "type": "scatter",
        "mode": "lines+markers" if line else "markers",
        "y": list(values),
        "marker": {"color": colour, "symbol": symbol, "size": size, "line": {"width": 2 if "open" in symbol else 0}},
        "line": {"color": colour, "width": 1.5},
        "hovertemplate": f"{hover}<extra></extra>",
    }


def _key(colour: str, mark: str, text: str) -> str:
    return f'<span style="color:{colour}">{mark}</span> {text}'


def _finite(values: Sequence[float | None]) -> list[float | None]:
    return [value if value is not None and isfinite(value) else None for value in values]
