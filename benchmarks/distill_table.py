"""``docs/distill.md`` from the cells of ``python -m benchmarks.distill`` alone."""

from statistics import mean
from typing import Any

from benchmarks.prune_table import Cells
from kompakt.measure.machine import machine

NAMES = {
    "resnet20": "ResNet-20 (88.31 %) teaches ResNet-20 at half width",
    "resnet18": "ResNet-18 (84.28 %) teaches ResNet-10",
}
ALL = 45_000
HEAD = """# Distillation, loss by loss, beside torchdistill

Made by `python -m benchmarks.distill` from `benchmarks/results/distill/`; machine: {cpu}, one thread, other work on it.
CIFAR-10 (JPEG), teachers from the zoo. Every row of a table has the same students, first weights, batches, optimizer
and learning rates by seed. Weights of the losses are the papers', but for DKD and DIST: with the papers' weights, for a
hundred classes and more, students of ten classes ended 26 and 5 points behind the student alone, so theirs were chosen
among three on 5,000 validation images. Accuracy is the exported file's on the 10,000 test images, in ONNX Runtime; the
gain is over the student alone of the same seed.
"""


def page(cells: Cells) -> str:
    """Write the page."""
    parts = [HEAD.format(cpu=machine()["cpu"])]
    for model, title in NAMES.items():
        parts.append(f"\n## {title}\n\n")
        found = cells.find(part="losses", model=model)
        sizes = sorted({(cell["key"]["images"] or ALL, cell["key"]["epochs"]) for cell in found}, reverse=True)
        parts += [_losses(found, images, epochs) for images, epochs in sizes] or ["Not run yet.\n"]
        parts.append(_steps(cells, model))
    return "".join(parts)


def _losses(found: list[dict[str, Any]], images: int, epochs: int) -> str:
    """Write the table of one number of images and epochs."""
    cells = [cell for cell in found if (cell["key"]["images"] or ALL, cell["key"]["epochs"]) == (images, epochs)]
    short = "" if images == ALL else ": a short form, which ranks early training and says nothing of the end"
    lines = [f"Trained for {epochs} epochs on {images:,} of the {ALL:,} training images{short}."]
    lines += ["", "| first weights | loss | tool | accuracy, % (mean; seeds) | gain over alone, points (mean; seeds) |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    groups: dict[tuple[str, str, str], dict[int, float]] = {}
    for cell in cells:
        key = cell["key"]
        groups.setdefault((key["start"], key["row"], key["tool"]), {})[key["seed"]] = 100 * cell["accuracy"]
    for (start, row, tool), scores in sorted(groups.items(), key=lambda item: (item[0][0], -mean(item[1].values()))):
        alone = groups.get((start, "alone", "kompakt"), {})
        gains = [scores[seed] - alone[seed] for seed in sorted(scores) if seed in alone]
        shown = _values(gains, "+.2f") if gains and row != "alone" else ""
        values = _values([scores[seed] for seed in sorted(scores)], ".2f")
        lines.append(f"| {start} | {row} | {tool} | {values} | {shown} |")
    return "\n".join([*lines, "", *(_verdict(groups, start) for start in ("random", "teacher")), ""])


def _verdict(groups: dict[tuple[str, str, str], dict[int, float]], start: str) -> str:
    """Say whether every loss beats the student alone from the same first weights, and by how much the best does."""
    alone = groups.get((start, "alone", "kompakt"), {})
    gains = {}
    for (first, row, tool), scores in groups.items():
        both = [scores[seed] - alone[seed] for seed in scores if seed in alone]
        if (first, tool) == (start, "kompakt") and row != "alone" and both:
            gains[row] = mean(both)
    if not gains:
        return ""
    best = max(gains, key=lambda row: gains[row])
    behind = [row for row, gain in gains.items() if gain <= 0]
    every = f"behind the student alone: {', '.join(behind)}: missed" if behind else "every loss beats it: reached"
    state = "reached" if gains[best] >= 1 else "missed"
    asked = "Asked: every loss beats the student alone, the best by ≥ 1 point"
    return f"{asked}. Found with {start} first weights: {every}; best {best}, {gains[best]:+.2f}: {state}.\n"


def _values(values: list[float], form: str) -> str:
    seeds = ", ".join(format(value, form) for value in values)
    return f"{format(mean(values), form)} ({seeds})"


def _steps(cells: Cells, model: str) -> str:
    """Write the times of a training step."""
    found = cells.find(part="steps", model=model)
    if not found:
        return "\nTime of a step: not measured yet (`--only steps`).\n"
    lines = ["", "| one training step, batch of 128 | time, against the student alone (95 %) |", "| --- | --- |"]
    for name, value in found[-1].items():
        if isinstance(value, dict) and "ratio" in value:
            low, high = value["ci95"]
            lines.append(f"| {name} | {value['ratio']:.2f} ({low:.2f}–{high:.2f}) |")
    return "\n".join([*lines, "", f"Interleaved in one process, load {found[-1]['load']:.1f}. Asked: ≤ 1.5.", ""])
