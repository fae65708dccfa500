"""How ``kompakt bench`` shows what it measured: tables of 80 columns, and a picture."""

from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kompakt.report.bars import Bar, bars
from kompakt.report.numbers import bytes_text, digits, ms_text, score_text

SLOWEST = 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One artifact's figures with one number of threads and one batch.

    ``throughput`` is examples a second; ``layers_ms`` are the runtime's own times of its nodes, and ``options``
    those of ONNX Runtime that suit the file best, with the lines that open it so; both stand in the first row.
    """

    file: str
    runtime: str
    name: str
    threads: int
    batch: int
    size_bytes: int
    peak_memory_bytes: int
    latency_ms: dict[str, float]
    ratio: float
    ratio_ci95: tuple[float, float]
    throughput: float
    accuracy: float | None = None
    accuracy_ci95: tuple[float, float] | None = None
    layers_ms: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def tables(rows: list[Row]) -> list[Table]:
    """Make a table for each number of threads and each batch."""
    groups = dict.fromkeys((row.threads, row.batch) for row in rows)
    return [_table([row for row in rows if (row.threads, row.batch) == group], *group) for group in groups]


def _table(rows: list[Row], threads: int, batch: int) -> Table:
    title = f"{threads} thread{'s' if threads > 1 else ''}, batch {batch}; ms a call, interleaved"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("artifact", overflow="fold", min_width=12)
    for heading in ("bytes", "memory", "p50", "p90", "÷ first", "1/s", "accuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            bytes_text(row.size_bytes),
            bytes_text(row.peak_memory_bytes),
            digits(row.latency_ms["p50"]),
            digits(row.latency_ms["p90"]),
            f"{row.ratio:.3f}",
            digits(row.throughput),
            score_text(row.accuracy),
        )
    return table


def layer_lines(rows: list[Row]) -> list[str]:
    """Write the slowest nodes of each artifact, and the options that were chosen for it."""
    lines = []
    for row in rows:
        whole = sum(row.layers_ms.values())
        slowest = sorted(row.layers_ms.items(), key=lambda item: -item[1])[:SLOWEST]
        lines += [f"{row.name}: {name} {ms_text(ms)}, {ms / whole:.0%}" for name, ms in slowest]
        if row.options:
            lines += [f"{row.name}: {row.options['why']}", row.options["snippet"]]
    return lines


def plot(rows: list[Row]) -> str:
    """Draw the median latencies of all rows."""
    found = [
        Bar(
            label=row.name if len({(item.threads, item.batch) for item in rows}) == 1 else _label(row),
            group=row.runtime,
            p50_ms=row.latency_ms["p50"],
            p90_ms=row.latency_ms["p90"],
        )
        for row in rows
    ]
    return bars("latency: median, line to the 90th percentile", found)


def _label(row: Row) -> str:
    return f"{row.name}, {row.threads} thr., batch {row.batch}"
