"""docs/deep-compression.md from the cells that ``examples.deep_compression`` measured."""

from pathlib import Path
from typing import Any

from examples.deep_stages import PAPER

TITLES = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5"}
STAGES = {"prune": "prune", "share": "+ k-means", "huffman": "+ Huffman"}
HEAD = """# Deep Compression, reproduced, and the modern way

Written by `python -m examples.deep_compression --data ../shared/data/mnist` from
`benchmarks/results/deep_compression.jsonl`. MNIST as PNG, trained here; the paper is Han, Mao, Dally 2016 (arXiv
1510.00149). Bytes of the classic stages are counted as the paper counts them (gaps of 5 bits, 8 in convolutions;
codebooks and biases as float32; Huffman codes with their lengths); `.kpk` is the whole file, graph, names and
checksums included. Errors are of ONNX Runtime on the 10,000 test images, from files read back; changes in points of
error against the network as first trained, with 95 % paired intervals. Means over the seeds, each seed's figure
behind it.

The modern way trains for rate (`[finetune] rate` and `rise`): integers at the prices of the coder, the price rising
over 60 % of the training. Of the prices that were trained at, the smallest file counts whose error on the 6,000
validation images rises by at most {margin} points; the test split decided nothing. LeNet-300-100 and its control see
their images shifted by up to two pixels in that training.

The control is the float network trained on for as many epochs as for rate, the first one teaching, as it does there.
Trainings are minutes on one core: {epochs}.
"""


def write_page(cells: list[dict[str, Any]], out: Path, margin: float, epochs: dict[str, tuple[int, ...]]) -> None:
    """Write the tables of all networks that have cells."""
    parts = [HEAD.format(margin=margin, epochs=_told(epochs))]
    for name in PAPER:
        mine = sorted((cell for cell in cells if cell["network"] == name), key=lambda cell: cell["seed"])
        if mine:
            parts.append(_section(name, mine, margin))
    out.write_text("\n".join(parts))


def _told(epochs: dict[str, tuple[int, ...]]) -> str:
    """Say how long each network was trained."""
    parts = [
        f"{TITLES[name]} {a}, {b} after pruning, {c} of centroids, {d} for rate"
        for name, (a, b, c, d) in epochs.items()
    ]
    return "; ".join(parts) + " (epochs)"


def _section(name: str, cells: list[dict[str, Any]], margin: float) -> str:
    paper = PAPER[name]
    lines = [f"## {TITLES[name]}", "", f"{len(cells)} seeds.", "",
             "| stage | bytes | times smaller | the paper | `.kpk` bytes | times | error, % | change of error |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    lines.append(_line(cells, [_row(cell, "float") for cell in cells], "float32", f"{paper['float']} kB"))
    for (stage, title), ratio in zip(STAGES.items(), paper["ratios"], strict=True):
        lines.append(_line(cells, [_row(cell, stage) for cell in cells], title, f"{ratio}×"))
    if all(any(row["stage"] == "control" for row in cell["rows"]) for cell in cells):
        lines.append(_line(cells, [_row(cell, "control") for cell in cells], "control: float, trained as long", ""))
    rates = sorted({row["rate"] for cell in cells for row in cell["rows"] if row["stage"] == "rate"})
    for rate in rates:
        rows = [next(r for r in cell["rows"] if r.get("rate") == rate) for cell in cells]
        lines.append(_line(cells, rows, f"rate, {rate:g} nats a bit", ""))
    picked = [picked_row(cell, margin) for cell in cells]
    if all(picked):
        lines.append(_line(cells, picked, "**picked on validation**", f"asked: {paper['modern']}×"))
    before, after = paper["errors"]
    remark = f"The paper's error goes from {before} to {after} %."
    missing = [str(cell["seed"]) for cell, row in zip(cells, picked, strict=True) if not row]
    if missing:
        remark += f" No price kept the error within {margin} points on validation for seed {', '.join(missing)}."
    return "\n".join([*lines, "", remark, ""])


def picked_row(cell: dict[str, Any], margin: float) -> dict[str, Any] | None:
    """Return the smallest file of a seed that keeps the error on validation, or None."""
    rows = [row for row in cell["rows"] if row["stage"] == "rate" and row["validation_drop"] <= margin]
    return min(rows, key=lambda row: row["kpk_bytes"]) if rows else None


def _row(cell: dict[str, Any], stage: str) -> dict[str, Any]:
    return next(row for row in cell["rows"] if row["stage"] == stage)


def _line(cells: list[dict[str, Any]], rows: list[dict[str, Any]], title: str, paper: str) -> str:
    full = [_row(cell, "float")["bytes"] for cell in cells]
    sizes, packs = [row["bytes"] for row in rows], [row["kpk_bytes"] for row in rows]
    ratio, packed = (_mean([f / size for f, size in zip(full, each, strict=True)]) for each in (sizes, packs))
    changes = "; ".join(_change(row) for row in rows) if "drop" in rows[0] else ""
    errors = ", ".join(f"{100 - row['accuracy']:.2f}" for row in rows)
    own = (f"{_mean(sizes):,.0f}", f"{ratio:.0f}×") if rows[0]["stage"] not in ("rate", "control") else ("", "")
    return f"| {title} | {own[0]} | {own[1]} | {paper} | {_mean(packs):,.0f} | {packed:.0f}× | {errors} | {changes} |"


def _change(row: dict[str, Any]) -> str:
    low, high = row["drop_ci95"]
    return f"{row['drop']:+.2f} ({low:+.2f} to {high:+.2f})"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
