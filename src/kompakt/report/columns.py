"""The tables of the page as data: columns with a heading, a unit and a cell for every row.

A column in which no row has a value is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kompakt.measure.result import Result, Tried
from kompakt.report import numbers
from kompakt.report.numbers import MISSING
from kompakt.report.steps import Step, steps_of

Row = TypeVar("Row")
LONGEST = 90


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: what is shown and the value that it is sorted by.

    ``full`` is the whole of a text that is shown shortened; ``bar`` is the value as a share of the
    column's greatest; ``more`` is a second, lighter line.
    """

    text: str
    value: float | str | None
    bar: float | None = None
    more: str = ""
    full: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column; ``kind`` is ``name`` (row heading), ``number`` or ``text``."""

    title: str
    kind: str
    cells: tuple[Cell, ...]
    hint: str = ""


def layer_columns(result: Result) -> tuple[Column, ...]:
    """The columns of the table of layers, one row a layer in the order of the network."""
    layers = result.layers
    order = Column(
        title="#",
        kind="number",
        cells=tuple(Cell(text=str(n), value=n) for n in range(1, len(layers) + 1)),
        hint="Place in the network",
    )
    return _present(
        order,
        _words("Layer", layers, lambda layer: layer.name, "name"),
        _words("Kind", layers, lambda layer: layer.kind),
        _words("Weight\nshape", layers, lambda layer: "×".join(map(str, layer.shape))),
        _figures("Params", layers, lambda layer: layer.params, numbers.count_text, bar=True),
        _figures("MACs", layers, lambda layer: layer.macs, numbers.count_text, bar=True),
        _figures("Weight\nbits", layers, lambda layer: layer.weight_bits, numbers.bits_text),
        _figures("Activation\nbits", layers, lambda layer: layer.activation_bits, numbers.bits_text),
        _figures("Weight\nSQNR, dB", layers, lambda layer: layer.weight_sqnr_db, _db),
        _figures("Output\nSQNR, dB", layers, lambda layer: layer.output_sqnr_db, _db),
        _figures("Time,\nms", layers, lambda layer: layer.latency_ms, _plain, bar=True),
        _figures("Sensitivity", layers, lambda layer: layer.sensitivity, _plain),
        _words("Note", layers, lambda layer: layer.note),
    )


def step_columns(result: Result) -> tuple[Column, ...]:
    """The columns of the table of steps: the baseline, every stage, what ships."""
    steps = steps_of(result)
    found = [step.measurement for step in steps]
    return _present(
        Column(
            title="Step",
            kind="name",
            cells=tuple(_text(step.label, step.did) for step in steps),
        ),
        _figures("Accuracy", found, lambda m: m.accuracy, numbers.score_text),
        Column(title="Drop, points\n(95 % interval)", kind="number", cells=tuple(_drop(step) for step in steps)),
        _figures("File\nsize", found, lambda m: m.size_bytes, numbers.bytes_text),
        _figures("p50, ms", found, lambda m: m.latency_ms.p50 if m.latency_ms else None, _plain),
        _figures("p90, ms", found, lambda m: m.latency_ms.p90 if m.latency_ms else None, _plain),
        _figures("MACs", found, lambda m: m.macs or None, numbers.count_text),
        _figures("Params", found, lambda m: m.params or None, numbers.count_text),
        _figures("Bits a\nweight", found, lambda m: m.bits_per_weight, numbers.bits_text),
        _figures("Memory", found, lambda m: m.peak_memory_bytes, numbers.bytes_text),
    )


def candidate_columns(result: Result) -> tuple[Column, ...]:
    """The columns of the table of a search's candidates."""
    found = result.candidates
    return _present(
        _figures("#", found, lambda item: item.number, lambda number: f"{number:.0f}"),
        Column(title="Candidate", kind="name", cells=tuple(_text(item.what, _standing(item)) for item in found)),
        _figures("Points lost,\ncounted", found, lambda item: item.drop_points, numbers.points_text),
        _figures("Points lost,\nexpected", found, lambda item: item.expected_points, numbers.points_text),
        _figures("As\n.kpk", found, lambda item: item.packed_bytes, numbers.bytes_text, bar=True),
        _figures("File\nsize", found, lambda item: item.size_bytes, numbers.bytes_text),
        _figures("Time, of the\noriginal's", found, lambda item: item.latency_ratio, _plain, bar=True),
        _figures("Seconds\nspent", found, lambda item: item.seconds, lambda value: f"{value:.0f}"),
    )


def _standing(item: Tried) -> str:
    if item.chosen:
        return "ships"
    return item.note if item.state == "failed" else "on the front" if item.front else ""


def reasons(result: Result) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Group what was left alone by its reason, in the order in which the reasons first appear."""
    found: dict[str, list[str]] = {}
    for item in result.left_alone:
        found.setdefault(item.reason, []).append(item.name)
    return tuple((reason, tuple(names)) for reason, names in found.items())


def _present(*columns: Column) -> tuple[Column, ...]:
    return tuple(column for column in columns if any(cell.text not in ("", MISSING) for cell in column.cells))


def _words(title: str, rows: Sequence[Row], read: Callable[[Row], str], kind: str = "text") -> Column:
    return Column(title=title, kind=kind, cells=tuple(_text(read(row)) for row in rows))


def _text(text: str, more: str = "") -> Cell:
    shown = numbers.elide(text, LONGEST)
    return Cell(text=shown, value=text, more=more, full=text if shown != text else "")


def _figures(
    title: str,
    rows: Sequence[Row],
    read: Callable[[Row], float | None],
    write: Callable[[float | None], str],
    bar: bool = False,
) -> Column:
    values = [read(row) for row in rows]
    most = max((value for value in values if value is not None), default=0) if bar else 0
    cells = (Cell(text=write(v), value=v, bar=v / most if most > 0 and v is not None else None) for v in values)
    return Column(title=title, kind="number", cells=tuple(cells))


def _drop(step: Step) -> Cell:
    if step.drop is None:
        return Cell(text=MISSING, value=None)
    text = f"{numbers.points_text(step.drop.points)} ({numbers.interval_text(step.drop.ci95)})"
    return Cell(text=text, value=step.drop.points)


def _plain(value: float | None) -> str:
    return MISSING if value is None else numbers.digits(value)


def _db(value: float | None) -> str:
    return numbers.db_text(value).removesuffix(" dB")
