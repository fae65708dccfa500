"""``kompakt pick``: take another point of a search's frontier."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kompakt.engine import CANDIDATES
from kompakt.errors import InputError
from kompakt.files import writable_folder
from kompakt.measure.result import Result, Tried
from kompakt.report import candidate_table

PAPERS = ("recipe.toml", "plan.json", "candidate.json", "model.kpk")


def pick_command(
    folder: Annotated[Path, typer.Argument(help="folder of a search", metavar="DIR")],
    point: Annotated[int | None, typer.Option(help="number of the candidate; none lists them", min=0)] = None,
    out: Annotated[Path | None, typer.Option(help="folder that gets its files; default: DIR/picked")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the candidates as JSON")] = False,
) -> None:
    """List the candidates of a search, or take one: its artifact, plan and recipe.

    The figures are those of the validation split; `kompakt compress MODEL --recipe OUT/recipe.toml` makes the same
    artifact again and measures it on the test split.
    """
    found = Result.read(folder / "result.json").candidates if (folder / "result.json").exists() else ()
    if not found:
        raise InputError(f"{folder}: holds no candidates; expected the folder of kompakt compress --effort")
    if point is None:
        if as_json:
            print(json.dumps([item.model_dump(mode="json") for item in found], indent=1))
        else:
            Console().print(candidate_table(found))
        return
    chosen = _numbered(found, point)
    where = writable_folder(out or folder / "picked")
    source = folder / CANDIDATES / f"{point:03d}"
    files = [path for path in sorted(source.glob("model.*")) if path.is_file()] + [source / name for name in PAPERS]
    for path in dict.fromkeys(files):
        if path.exists():
            shutil.copyfile(path, where / path.name)
    if as_json:
        print(chosen.model_dump_json(indent=1))
    else:
        Console().print(candidate_table((chosen,)))
        print(f"wrote {where}/: {', '.join(sorted(path.name for path in where.iterdir()))}")


def _numbered(found: tuple[Tried, ...], point: int) -> Tried:
    known = {item.number: item for item in found if item.state == "verified"}
    if point not in known:
        raise InputError(
            f"--point {point}: no candidate of this number was verified; there are {', '.join(map(str, known))}"
        )
    return known[point]
