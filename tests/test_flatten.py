"""Options that commands share: one flat list for the parser, one box each for the reader."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from kompakt.cli.flatten import flatten


@dataclass(frozen=True, kw_only=True)
class FewBitsOptions:
    bits: Annotated[int, typer.Option(help="how many")] = 4


@dataclass(frozen=True, kw_only=True)
class OptionalDataOptions:
    data: Annotated[str, typer.Option(help="which")] = ""


def made() -> tuple[typer.Typer, list[object]]:
    seen: list[object] = []
    app = typer.Typer()

    def show(name: str, few: FewBitsOptions, data: OptionalDataOptions, loud: bool = False) -> None:
        """Show."""
        seen.extend((name, few, data, loud))

    app.command()(flatten(show))
    return app, seen


def test_the_command_gets_its_dataclasses_filled() -> None:
    app, seen = made()
    assert CliRunner().invoke(app, ["x", "--bits", "2", "--loud"]).exit_code == 0
    assert seen == ["x", FewBitsOptions(bits=2), OptionalDataOptions(), True]


def test_the_help_shows_the_options_of_a_dataclass_together() -> None:
    text = CliRunner().invoke(made()[0], ["--help"], terminal_width=80).output
    boxes = [text.index(title) for title in ("─ Options ─", "─ Few bits options ─", "─ Data options ─")]
    assert boxes == sorted(boxes)
    assert boxes[1] < text.index("--bits") < boxes[2] < text.index("--data")
