"""docs/federated.md and its curves from the cells of ``benchmarks.federated``."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.federated_data import SETTINGS
from kompakt.report.curves import Curve, curves_svg

Cell = dict[str, Any]
REFERENCE = "uncompressed"
ASKED = {"fewer": 100, "points": 0.5, "share": 10}
REMARKS = Path(__file__).with_name("federated_remarks.md")


def write_page(results: Path, docs: Path) -> None:
    """Write the page and one SVG a network and partition."""
    head, method = REMARKS.read_text().split("<!-- tables -->\n")
    parts = [head.rstrip()]
    for network in SETTINGS:
        path = results / f"{network}.jsonl"
        if not path.exists():
            parts.append(f"\n## {network}\n\nNot run yet.")
            continue
        cells = [json.loads(line) for line in path.read_text().splitlines()]
        parts.append(f"\n## {path.stem}\n")
        for kind in dict.fromkeys(cell["partition"] for cell in cells):
            mine = [cell for cell in cells if cell["partition"] == kind]
            picture = f"federated-{path.stem}-{kind}.svg"
            (docs / picture).write_text(_curves(path.stem, kind, mine))
            parts += [*_table(kind, mine), "", f"![accuracy by round]({picture})\n"]
    if (results / "same-updates.json").exists():
        parts += _same(json.loads((results / "same-updates.json").read_text()))
    (docs / "federated.md").write_text("\n".join([*parts, method]))


def _same(found: dict[str, list[Cell]]) -> list[str]:
    rows = [
        "\n## The same updates under both coders\n",
        "The first update of one client (600 images), no feedback; NNCodec without its sparsification, kompakt at",
        "the bytes that NNCodec takes at a `qp`. Lost is the length of the error of the weights, over the update's;",
        "encoding is over one epoch of local training.\n",
        "| network | `qp` | bytes: NNCodec | kompakt | lost: NNCodec | kompakt | encoding: NNCodec | kompakt |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for network, cells in found.items():
        for cell in cells:
            theirs, ours = cell["NNCodec"], cell["kompakt"]
            shares = [100 * one["encode_s"] / cell["train_s"] for one in (theirs, ours)]
            rows.append(
                f"| {network} | {cell['step']} | {theirs['bytes']:,} | {ours['bytes']:,} | {theirs['lost']:.3f} "
                f"| {ours['lost']:.3f} | {shares[0]:.1f} % | {shares[1]:.1f} % |"
            )
    return rows


def _table(kind: str, cells: list[Cell]) -> list[str]:
    rows = [
        f"\n{'IID' if kind == 'iid' else 'Dirichlet, α = 0.3'}, {len(cells[0]['up_bytes'])} rounds:\n",
        "| coder | seeds | test, % | points below | bytes up | times fewer | bytes down | encoding / training |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    verdict = ""
    for coder, mine in _by_coder(cells).items():
        same = [c for c in cells if c["coder"] == REFERENCE and c["seed"] in {cell["seed"] for cell in mine}]
        drops = [next(c for c in same if c["seed"] == cell["seed"])["test"] - cell["test"] for cell in mine if same]
        up = [sum(map(sum, cell["up_bytes"])) for cell in mine]
        fewer = sum(sum(map(sum, cell["up_bytes"])) for cell in same) / sum(up)
        down = statistics.mean(sum(cell["down_bytes"]) * len(cell["up_bytes"][0]) for cell in mine)
        share = 100 * sum(cell["encode_s"] for cell in mine) / sum(cell["train_s"] for cell in mine)
        rows.append(
            f"| {coder} | {len(mine)} | {_mean([c['test'] for c in mine])} | {_mean(drops)} "
            f"| {statistics.mean(up):,.0f} | {fewer:.1f} | {down:,.0f} | {share:.0f} % |"
        )
        if coder == "kompakt" and drops:
            right = fewer >= ASKED["fewer"] and statistics.mean(drops) <= ASKED["points"]
            quick = share <= ASKED["share"]
            verdict = (
                f"\nAsked: {ASKED['fewer']}× fewer bytes up at {ASKED['points']} points or less: "
                f"{'reached' if right else 'missed'} beside the uncompressed run as it is, which has no momentum on "
                f"the server.{_alike(cells)} "
                f"Encoding within {ASKED['share']} % of training: "
                f"{'reached' if quick else f'missed: {share:.1f} %'}."
            )
    return [*rows, verdict]


def _alike(cells: list[Cell]) -> str:
    """Say how far kompakt's runs are below uncompressed ones with the same momentum, on the seeds that both have."""
    said = []
    for ours, theirs, what in (
        ("kompakt", "uncompressed, momentum", "the server's momentum in both"),
        ("kompakt, no momentum", REFERENCE, "in neither"),
    ):
        scores = {c["seed"]: c["test"] for c in cells if c["coder"] == theirs}
        drops = [scores[c["seed"]] - c["test"] for c in cells if c["coder"] == ours and c["seed"] in scores]
        said += [f"{what} {_mean(drops)} points below ({len(drops)} seeds)"] if drops else []
    return f" Like for like: {'; '.join(said)}." if said else ""


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.2f}" + (f" ± {half:.2f}" if len(values) > 1 else "")


def _by_coder(cells: list[Cell]) -> dict[str, list[Cell]]:
    return {coder: [c for c in cells if c["coder"] == coder] for coder in dict.fromkeys(c["coder"] for c in cells)}


def _curves(network: str, kind: str, cells: list[Cell]) -> str:
    curves = []
    for coder, mine in _by_coder(cells).items():
        means = [statistics.mean(values) for values in zip(*(cell["validation"] for cell in mine), strict=True)]
        curves.append(Curve(name=coder, points=tuple((float(number), value) for number, value in enumerate(means))))
    low = sorted(value for curve in curves for _, value in curve.points)
    return curves_svg(f"{network}, {kind}: validation accuracy by round, %", tuple(curves), low=low[len(low) // 4])
