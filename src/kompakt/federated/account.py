"""The account of a federation, written down: JSON, curves, and a page with both."""

import json
from pathlib import Path
from typing import Any

from kompakt.federated.ledger import Ledger
from kompakt.files import atomic_write
from kompakt.report.curves import Curve, curves_page, curves_svg


def write_account(ledger: Ledger, folder: str | Path) -> None:
    """Write ``federated.json``, two ``.svg`` of curves and ``federated.html`` with both into a folder."""
    folder, data = Path(folder), ledger.data()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"bytes": _bytes_svg(data["clients"]), "scores": _scores_svg(data["scores"])}
    atomic_write(folder / "federated.json", json.dumps(data, indent=1).encode())
    for name, picture in pictures.items():
        atomic_write(folder / f"federated-{name}.svg", picture.encode())
    atomic_write(folder / "federated.html", curves_page("A federation", pictures, _table(data)).encode())


def _bytes_svg(rows: list[dict[str, Any]]) -> str:
    curves = []
    for name in ("up", "down"):
        sums: dict[int, int] = {}
        for row in rows:
            sums[row["round"]] = sums.get(row["round"], 0) + row[f"{name}_bytes"]
        curves.append(Curve(name=name, points=tuple((float(n), size / 1000) for n, size in sorted(sums.items()))))
    return curves_svg("kilobytes of all clients, by round", tuple(curves), low=0.0)


def _scores_svg(scores: list[dict[str, Any]]) -> str:
    names = sorted({name for found in scores for name in found} - {"round"})
    curves = [Curve(name=n, points=tuple((float(s["round"]), s[n]) for s in scores if n in s)) for n in names]
    return curves_svg("scores, by round", tuple(curves))


def _table(data: dict[str, Any]) -> list[list[str]]:
    rows = [
        [str(row["round"]), row["client"], f"{row['down_bytes']:,}", f"{row['up_bytes']:,}", "; ".join(row["reasons"])]
        for row in data["clients"]
    ]
    totals = ["all", "", f"{data['totals']['down_bytes']:,}", f"{data['totals']['up_bytes']:,}", ""]
    return [["round", "client", "bytes down", "bytes up", "not taken"], *rows, totals]
