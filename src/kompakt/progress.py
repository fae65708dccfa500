"""A progress bar that appears only where a person waits: after two seconds, on a terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
PATIENCE_S = 2.0


def track(items: Iterable[T], total: int, title: str, *, show: bool = True) -> Iterator[T]:
    """Yield ``items``; if that takes more than two seconds and stderr is a terminal, show a bar.

    Args:
        items: what to pass on.
        total: how many there are.
        title: what is going on, e.g. ``decoding images``.
        show: False never shows the bar.
    """
    if not (show and sys.stderr.isatty()):
        yield from items
        return
    started, done = time.monotonic(), 0
    iterator = iter(items)
    while time.monotonic() - started < PATIENCE_S and done < total:
        yield next(iterator)
        done += 1
    if done < total:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(iterator, total, completed=done, description=title)
