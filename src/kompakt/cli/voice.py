"""How commands talk: a line of status while they work, a table at the end, JSON for machines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status

from kompakt.cli.options import RunOptions
from kompakt.measure.result import Result
from kompakt.report import layer_table, stage_table, summary_table
from kompakt.report.numbers import bytes_text


@contextmanager
def speaking(run: RunOptions) -> Iterator[Callable[[str], None]]:
    """Yield ``say``: a spinner with the step in hand on a terminal, lines with ``--verbose``, else silence."""
    console = Console(stderr=True)
    started = time.monotonic()
    if run.verbose:
        yield lambda text: console.print(f"[dim]{time.monotonic() - started:6.1f} s[/dim]  {text}", highlight=False)
    elif run.quiet or run.json or not sys.stderr.isatty():
        yield lambda text: None
    else:
        with Status("starting", console=console) as status:
            yield lambda text: status.update(f"{text} [dim]({time.monotonic() - started:.0f} s)[/dim]")


def show(result: Result, run: RunOptions, folder: str) -> None:
    """Print what was measured."""
    if run.json:
        print(result.model_dump_json(indent=1))
        return
    if run.quiet:
        return
    console = Console()
    console.print(summary_table(result))
    if run.verbose:
        console.print(stage_table(result))
        console.print(layer_table(result))
    for line in result.decisions:
        console.print(f"[dim]·[/dim] {line}", highlight=False)
    if result.packed_bytes is not None:
        ratio = result.baseline.size_bytes / result.packed_bytes
        console.print(
            f"as .kpk: {bytes_text(result.packed_bytes)}, {ratio:.2f}× smaller than the original", highlight=False
        )
    files = ", ".join(sorted({*result.files.values(), "report.html"}))
    console.print(f"wrote {folder}/: {files}", highlight=False, soft_wrap=True)
