"""What ``kompakt bench`` compares: artifacts, the runtime of each, and the interpreter that has it."""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kompakt.artifact.targets import TARGETS, Runtime, runtime_of, target
from kompakt.errors import InputError, MissingExtraError
from kompakt.measure.memory import peak_memory
from kompakt.measure.remote import Remote


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One artifact in one runtime.

    Args:
        name: how it is called in tables.
        path: the artifact.
        runtime: name of the target.
        python: the interpreter that has the runtime; None is this one.
    """

    name: str
    path: Path
    runtime: str
    python: str | None

    def memory(self, threads: int) -> int:
        """Measure what loading and running it adds, in bytes."""
        return peak_memory(self.path, threads, runtime=self.runtime, python=self.python or sys.executable)

    def open(self, threads: int, stack: ExitStack) -> Runtime | Remote:
        """Open the artifact here, or in a worker that ends with ``stack``."""
        if self.python is None:
            return target(self.runtime).open(self.path, threads)
        remote = Remote(self.python, self.runtime, self.path, threads)
        stack.callback(remote.close)
        return remote

    def example_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of a batch."""
        return (batch, *target(self.runtime).open(self.path, 1).shape[1:])


def interpreters(given: list[str]) -> dict[str, str]:
    """Read ``--python RUNTIME=INTERPRETER``.

    Raises:
        InputError: the runtime is unknown or the interpreter is not there.
    """
    found = {}
    for text in given:
        name, equals, python = text.partition("=")
        if not equals or name not in TARGETS:
            raise InputError(f"--python {text}: expected RUNTIME=INTERPRETER, with one of {', '.join(TARGETS)}")
        if not os.access(python, os.X_OK):
            raise InputError(f"--python {text}: {python} is not an interpreter that can be started")
        found[name] = python
    return found


def entrants(artifacts: list[str], pythons: Mapping[str, str]) -> tuple[Entrant, ...]:
    """Find the runtime of every artifact.

    Raises:
        InputError: an artifact is not there, or no runtime takes it.
        MissingExtraError: a runtime is not installed here and no interpreter is given for it.
    """
    split = [_split(text) for text in artifacts]
    found = [
        Entrant(name=name, path=path, runtime=runtime, python=pythons.get(runtime))
        for name, (runtime, path) in zip(_names(split), split, strict=True)
    ]
    for item in found:
        if item.python is None:
            try:
                target(item.runtime)
            except MissingExtraError as error:
                more = f"or run it elsewhere: --python {item.runtime}=/path/to/python"
                raise MissingExtraError(f"{item.path}: {error}; {more}") from None
    return tuple(found)


def _split(text: str) -> tuple[str, Path]:
    """Read ``RUNTIME:FILE`` or ``FILE``."""
    name, colon, rest = text.partition(":")
    if colon and name in TARGETS:
        path = Path(rest)
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        return name, path
    return runtime_of(Path(text)), Path(text)


def _names(split: list[tuple[str, Path]]) -> list[str]:
    """Name artifacts by file; with the folder where names repeat, and the runtime where it is not the usual one."""
    short = [path.name for path in {path for _, path in split}]
    plain = [str(path) if short.count(path.name) > 1 else path.name for _, path in split]
    whole = [
        text if runtime == runtime_of(path) else f"{runtime}:{text}"
        for text, (runtime, path) in zip(plain, split, strict=True)
    ]
    repeated = next((text for text in whole if whole.count(text) > 1), None)
    if repeated is not None:
        raise InputError(f"{repeated}: is given twice")
    return whole
