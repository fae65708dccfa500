"""A progress bar that appears only for work that takes long, and only where someone looks."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

DELAY_S = 2.0


@contextmanager
def progress_bar(total: int, *, done: int = 0, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that advances the bar by one step and sets its text.

    Nothing is printed where stderr is not a terminal, nor in the first ``DELAY_S`` seconds.

    Args:
        total: steps in all.
        done: steps already done.
    """
    if not (show and sys.stderr.isatty()):
        yield lambda text: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=total, completed=done)
    start = time.monotonic()

    def advance(text: str) -> None:
        bar.update(task, advance=1, description=text)
        if not bar.live.is_started and time.monotonic() - start > DELAY_S:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
