"""``kompakt report``: build the page again from ``result.json``."""

from pathlib import Path
from typing import Annotated

import typer

from kompakt.report import rebuild


def report(folder: Annotated[Path, typer.Argument(help="folder that holds result.json")]) -> None:
    """Build report.html again from the result.json of a folder."""
    typer.echo(f"wrote {rebuild(folder)}")
