"""Tables for the terminal: a result on one screen of 80 columns."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kompakt.measure.result import Layer, Measurement, Result
from kompakt.report import numbers
from kompakt.report.cards import headline, verdict
from kompakt.report.numbers import MISSING, ratio_text
from kompakt.report.steps import Step, steps_of

STYLE = {"good": "bold green", "bad": "bold red", "plain": "bold"}


def summary_table(result: Result) -> Group:
    """Make the summary of a run: the headline, before and after, the stages, and the verdict."""
    parts: list[Text | Table] = [Text(headline(result), style="bold"), _before_after(result)]
    if len(steps_of(result)) > 2:
        parts.append(stage_table(result))
    said = verdict(result)
    line = Text(said.text, style=STYLE[said.tone])
    if result.drop_points is not None:
        line.append(f" (drop {_drop_words(result)})", style="not bold default")
    return Group(*parts, line)


def stage_table(result: Result) -> Table:
    """Make the table of all steps: accuracy, drop, bytes and time after each."""
    table = _table("Step", ("Accuracy", "Drop", "Size", "p50", "MACs"))
    for step in steps_of(result):
        found = step.measurement
        table.add_row(
            Text(step.label, style="bold" if step.role == "final" else ""),
            numbers.score_text(found.accuracy),
            _step_drop(step),
            numbers.bytes_text(found.size_bytes),
            numbers.ms_text(found.latency_ms.p50 if found.latency_ms else None),
            numbers.count_text(found.macs),
        )
    return table


def layer_table(result: Result, limit: int | None = 30) -> Table:
    """Make the table of layers in the order of the network.

    Args:
        result: the run.
        limit: at most so many layers, those with the most parameters; None for all.
    """
    layers = list(enumerate(result.layers, start=1))
    shown = layers
    if limit is not None and len(layers) > limit:
        largest = sorted(layers, key=lambda item: (-item[1].params, item[0]))[:limit]
        shown = sorted(largest, key=lambda item: item[0])
    table = _table("Layer", ("Params", "MACs", "Bits w/a", "SQNR", "Time"))
    for number, layer in shown:
        table.add_row(_layer_name(number, layer), *_layer_cells(layer))
    if len(shown) < len(layers):
        table.caption = f"the {len(shown)} largest of {numbers.plural(len(layers), 'layer')}"
    return table


def _before_after(result: Result) -> Table:
    before, after = result.baseline, result.compressed
    table = _table("", ("Baseline", "Compressed", "Change"))
    for name, one, other, change in (
        ("Accuracy", numbers.score_text(before.accuracy), numbers.score_text(after.accuracy), _change(result)),
        _row("File size", before.size_bytes, after.size_bytes, numbers.bytes_text, ("smaller", "larger")),
        _row("Latency, p50", _p50(before), _p50(after), numbers.ms_text, ("faster", "slower")),
        _row("MACs", before.macs, after.macs, numbers.count_text, ("fewer", "more")),
        _row("Parameters", before.params, after.params, numbers.count_text, ("fewer", "more")),
        _row("Bits a weight", before.bits_per_weight, after.bits_per_weight, numbers.bits_text, ("fewer", "more")),
        _row("Memory", before.peak_memory_bytes, after.peak_memory_bytes, numbers.bytes_text, ("less", "more")),
    ):
        if (one, other) != (MISSING, MISSING):
            table.add_row(Text(name), one, other, change)
    return table


def _table(first: str, others: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", caption_justify="left")
    table.add_column(first, overflow="fold", min_width=13)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row(name, before, after, write, words) -> tuple[str, str, str, str]:  # type: ignore[no-untyped-def]
    return name, write(before), write(after), ratio_text(before, after, *words)


def _layer_name(number: int, layer: Layer) -> Text:
    return Text.assemble((f"{number:>3} ", "dim"), layer.name)


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


def _step_drop(step: Step) -> str:
    return MISSING if step.drop is None else numbers.points_text(step.drop.points)
