"""Tables for the terminal: a result on one screen of 80 columns."""

from collections.abc import Callable, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kompakt.measure.result import Layer, Measurement, Result
from kompakt.report import numbers
from kompakt.report.cards import headline, verdict
from kompakt.report.numbers import MISSING, ratio_text
from kompakt.report.steps import Step, steps_of

STYLE = {"good": "bold green", "bad": "bold red", "plain": "bold"}
LONGEST = 60


def summary_table(result: Result) -> Group:
    """Make the summary of a run: the headline, before and after, the stages, and the verdict."""
    parts: list[Text | Table] = [Text(headline(result), style="bold"), Text(), _before_after(result), Text()]
    if len(steps_of(result)) > 2:
        parts += [stage_table(result), Text()]
    said = verdict(result)
    line = Text(said.text, style=STYLE[said.tone])
    if result.drop_points is not None:
        line.append(f" (drop {_drop_words(result)})", style="not bold default")
    return Group(*parts, line)


def stage_table(result: Result) -> Table:
    """Make the table of all steps: accuracy, drop, bytes and time after each."""
    steps = steps_of(result)
    names = [Text(numbers.elide(step.label, LONGEST), style="bold" if step.role == "final" else "") for step in steps]
    return _table({"Step": names}, ("Accuracy", "Drop", "Size", "p50", "MACs"), [_step_cells(step) for step in steps])


def layer_table(result: Result, limit: int | None = 30) -> Table:
    """Make the table of layers in the order of the network.

    Args:
        result: the run.
        limit: at most so many layers, those with the most parameters; None for all.
    """
    layers = list(enumerate(result.layers, start=1))
    shown = layers
    if limit is not None and len(layers) > limit:
        shown = sorted(sorted(layers, key=lambda item: (-item[1].params, item[0]))[:limit], key=lambda item: item[0])
    first = {
        "#": [Text(str(number), style="dim") for number, _ in shown],
        "Layer": [Text(numbers.elide(layer.name, LONGEST)) for _, layer in shown],
    }
    titles = ("Params", "MACs", "Bits w/a", "SQNR", "Time")
    table = _table(first, titles, [_layer_cells(layer) for _, layer in shown])
    if len(shown) < len(layers):
        table.caption = f"the {len(shown)} largest of {numbers.plural(len(layers), 'layer')}"
    return table


def _before_after(result: Result) -> Table:
    before, after = result.baseline, result.compressed
    accuracy = (numbers.score_text(before.accuracy), numbers.score_text(after.accuracy), _change(result))
    rows = {
        "Accuracy": accuracy,
        "File size": _row(before.size_bytes, after.size_bytes, numbers.bytes_text, ("smaller", "larger")),
        "Latency, p50": (numbers.ms_text(_p50(before)), numbers.ms_text(_p50(after)), _speed(before, after)),
        "MACs": _row(before.macs or None, after.macs or None, numbers.count_text, ("fewer", "more")),
        "Parameters": _row(before.params or None, after.params or None, numbers.count_text, ("fewer", "more")),
        "Bits a weight": _row(before.bits_per_weight, after.bits_per_weight, numbers.bits_text, ("fewer", "more")),
        "Memory": _row(before.peak_memory_bytes, after.peak_memory_bytes, numbers.bytes_text, ("less", "more")),
    }
    measured = {name: row for name, row in rows.items() if row[:2] != (MISSING, MISSING)}
    names = [Text(name) for name in measured]
    return _table({"": names}, ("Baseline", "Compressed", "Change"), list(measured.values()))


def _table(first: dict[str, list[Text]], titles: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table of some columns of texts, then of figures; figures that no row has are left out."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", caption_justify="left")
    for title in first:
        table.add_column(title, overflow="fold", justify="right" if title == "#" else "left")
    kept = [column for column in range(len(titles)) if any(row[column] != MISSING for row in rows)]
    for column in kept:
        table.add_column(titles[column], justify="right", no_wrap=True)
    for names, row in zip(zip(*first.values(), strict=True), rows, strict=True):
        table.add_row(*names, *(row[column] for column in kept))
    return table


def _row(
    before: float | None, after: float | None, write: Callable[[float | None], str], words: tuple[str, str]
) -> tuple[str, str, str]:
    return write(before), write(after), ratio_text(before, after, *words)


def _speed(before: Measurement, after: Measurement) -> str:
    if before.latency_ms is None or after.latency_ms is None:
        return ""
    return numbers.speed_text(before.latency_ms, after.latency_ms)


def _step_cells(step: Step) -> tuple[str, ...]:
    found = step.measurement
    return (
        numbers.score_text(found.accuracy),
        MISSING if step.drop is None else numbers.points_text(step.drop.points),
        numbers.bytes_text(found.size_bytes),
        numbers.ms_text(_p50(found)),
        numbers.count_text(found.macs or None),
    )


def _layer_cells(layer: Layer) -> tuple[str, ...]:
    sqnr = layer.output_sqnr_db if layer.output_sqnr_db is not None else layer.weight_sqnr_db
    return (
        numbers.count_text(layer.params),
        numbers.count_text(layer.macs),
        f"{numbers.bits_text(layer.weight_bits)}/{numbers.bits_text(layer.activation_bits)}",
        numbers.db_text(sqnr),
        numbers.ms_text(layer.latency_ms),
    )


def _p50(found: Measurement) -> float | None:
    return found.latency_ms.p50 if found.latency_ms else None


def _change(result: Result) -> str:
    if result.drop_points is None:
        return ""
    text = numbers.points_text(-result.drop_points)
    return f"{text} points" if text.startswith("−") or text == "0.00" else f"+{text} points"


def _drop_words(result: Result) -> str:
    interval = "" if result.drop_ci95 is None else f", 95 %: {numbers.interval_text(result.drop_ci95)}"
    return f"{numbers.points_text(result.drop_points)} points{interval}"
