"""``kompakt pack`` and ``kompakt unpack``: the smallest file, without loss."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.kpk_safetensors import pack_safetensors
from kompakt.artifact.splice import unpack_file
from kompakt.cli.options import RunOptions
from kompakt.errors import InputError
from kompakt.report.numbers import bytes_text

PACKERS = {".onnx": pack_onnx, ".safetensors": pack_safetensors}


def pack(
    source: Annotated[Path, typer.Argument(help=".onnx or .safetensors file, or a folder that compress wrote")],
    run: RunOptions,
    out: Annotated[Path, typer.Option("--out", "-o", help="the .kpk file to write")],
) -> None:
    """Code a model's weights as small as they go; unpack returns the very same bytes."""
    file = source / "model.onnx" if source.is_dir() else source
    if file.suffix not in PACKERS:
        raise InputError(f"{file}: expected a .onnx or .safetensors file")
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    size = PACKERS[file.suffix](file, out)
    _tell(run, source=file, out=out, before=file.stat().st_size, after=size)


def unpack(
    source: Annotated[Path, typer.Argument(help=".kpk file")],
    run: RunOptions,
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write, as it was before packing")],
) -> None:
    """Restore the file that a .kpk was packed from, byte for byte."""
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    unpack_file(source, out)
    _tell(run, source=source, out=out, before=source.stat().st_size, after=out.stat().st_size)


def _tell(run: RunOptions, *, source: Path, out: Path, before: int, after: int) -> None:
    if run.json:
        print(json.dumps({"source": str(source), "out": str(out), "source_bytes": before, "out_bytes": after}))
    elif not run.quiet:
        typer.echo(f"wrote {out}: {bytes_text(before)} → {bytes_text(after)}")
