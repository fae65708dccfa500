"""The cells of ``python -m benchmarks.prune`` on disk, and ``docs/prune.md`` from them alone."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.prune_cells import OURS, TimeUp, unpacked
from benchmarks.prune_subjects import RATIOS, SUBJECTS
from kompakt.errors import InputError
from kompakt.measure.accuracy import Score, paired_drop
from kompakt.measure.machine import machine

TEST_IMAGES = 10_000
RULE = "| --- | --- | --- | --- | --- | --- |"


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Measured cells by their settings, one JSON line each."""

    folder: Path
    spent: Callable[[], bool]

    def all(self) -> list[dict[str, Any]]:
        """Read every cell."""
        files = sorted(self.folder.glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the cells whose keys have these values."""
        return [cell for cell in self.all() if all(cell["key"].get(name) == value for name, value in wanted.items())]

    def get(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a cell; measure it where it is not there.

        Raises:
            TimeUp: it is not there and no time is left.
        """
        found = next((cell for cell in self.all() if cell["key"] == key), None)
        if found is not None:
            return found
        if self.spent():
            raise TimeUp
        cell = {
            "key": key,
            **measure(),
            "load": os.getloadavg()[0],
            "threads": torch.get_num_threads(),
            "machine": machine()["cpu"],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{key['part']}-{key['model']}.jsonl").open("a") as file:
            file.write(json.dumps(cell) + "\n")
        shown = {name: value for name, value in cell.items() if name not in ("correct", "machine")}
        print(json.dumps(shown), flush=True)
        return cell


def best(cells: Cells, model: str, ratio: float, tool: str, images: int) -> str:
    """Return the setting of a tool that is best on the validation part.

    Raises:
        InputError: none was measured.
    """
    found = cells.find(
        part="one-shot", model=model, ratio=ratio, tool=tool, split="validation", mend="bn", images=images
    )
    found = [cell for cell in found if tool != "kompakt" or OURS[cell["key"]["setting"]][3]]
    if ratio < 1:  # a share of the channels: what an allocation of MACs removes may be less
        found = [cell for cell in found if cell["channels_gone"] > ratio - 0.005]
    if not found:
        raise InputError(f"{model} at {ratio}×: no setting of {tool} was scored; run --only one-shot first")
    return str(max(found, key=lambda cell: cell["accuracy"])["key"]["setting"])


def page(cells: Cells) -> str:
    """Write the page."""
    lines = [
        "# Channel pruning, beside torch-pruning",
        "",
        "Made by `python -m benchmarks.prune` from `benchmarks/results/prune/`; "
        f"machine: {machine()['cpu']}, one thread. CIFAR-10 (JPEG), weights of the zoo, accuracy on the 10,000 test "
        "images with the paired 95 % interval of the drop. *bn*: batch norms' statistics estimated anew on the same "
        "training images for both tools; *reconstruct*: layers that lost inputs refitted by least squares to the "
        "original's outputs (`kompakt.build.reconstruct`), which torch-pruning does not offer; *none*: neither.",
        "",
        "Settings are chosen by accuracy, batch norms estimated anew, on a part of the training images, which the "
        "weights have been trained on: it ranks settings, its level says nothing. ResNet-20's padded shortcuts are "
        "not followed by torch-pruning (the pruned network does not run), so there it prunes inside the blocks; "
        "importances: magnitude, group norm and Taylor, normalised and not, local and global, from the same "
        "gradients as kompakt's.",
    ]
    for model in SUBJECTS:
        lines += ["", f"## {model}, without training", "", *_one_shot(cells, model)]
        lines += ["", f"## {model}, trained further", "", *_tuned(cells, model)]
    lines += ["", "## Latency of resnet18 at 224", "", *_latency(cells)]
    return "\n".join(lines) + "\n"


def _drop(cells: Cells, model: str, cell: dict[str, Any]) -> str:
    whole = cells.find(part="one-shot", model=model, tool="unpruned", split="test")
    if not whole:
        return ""
    before, after = (Score(correct=unpacked(part["correct"], TEST_IMAGES)) for part in (whole[0], cell))
    drop = paired_drop(before, after)
    return f"{drop.points:.2f} ({drop.ci95[0]:.2f} to {drop.ci95[1]:.2f})"


def _one_shot(cells: Cells, model: str) -> list[str]:
    """Write the test figures and the ranking on validation images."""
    rows = [cell for cell in cells.find(part="one-shot", model=model, split="test")]
    ranked = cells.find(part="one-shot", model=model, split="validation")
    if not rows and not ranked:
        return ["Not run yet."]
    lines = [
        "| fewer MACs | tool | setting | mend | accuracy, % | drop, points |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in sorted(rows, key=lambda c: (c["key"]["ratio"], c["key"]["tool"], -c["accuracy"])):
        key = cell["key"]
        lines.append(
            f"| {cell['macs_ratio']:.2f}× | {key['tool']} | {key['setting']} | {key['mend']} | "
            f"{100 * cell['accuracy']:.2f} | {_drop(cells, model, cell)} |"
        )
    missing = [ratio for ratio in RATIOS if not any(cell["key"]["ratio"] == ratio for cell in rows)]
    if missing:
        lines += ["", f"Not scored on the test images yet: {', '.join(f'{ratio}×' for ratio in missing)}."]
    absent = [name for name in OURS if not any(cell["key"]["setting"] == name for cell in ranked)]
    if absent:
        lines += ["", f"Settings of kompakt that were not scored at any ratio: {', '.join(absent)}."]
    return [*lines, "", *_ranking(ranked)]


def _ranking(ranked: list[dict[str, Any]]) -> list[str]:
    """Write what the choice was made from."""
    ratios = sorted({cell["key"]["ratio"] for cell in ranked})
    names = sorted({(cell["key"]["tool"], cell["key"]["setting"], cell["key"]["mend"]) for cell in ranked})
    counts = sorted({cell["key"]["images"] for cell in ranked})
    examples = sorted({cell["key"]["mend_examples"] for cell in ranked if cell["key"]["mend"] == "bn"})
    if not ranked:
        return []
    head = " | ".join(f"{ratio}×" for ratio in ratios)
    lines = [
        f"Accuracy in % on {' and '.join(map(str, counts))} images of the training part (choices are made among the "
        f"*bn* rows, statistics from {' and '.join(map(str, examples))} images; – is not measured):",
        "",
        f"| tool | setting | mend | {head} |",
        "| --- " * (3 + len(ratios)) + "|",
    ]
    for tool, setting, mend in names:
        shown = []
        for ratio in ratios:
            wanted = {"tool": tool, "setting": setting, "mend": mend, "ratio": ratio}
            found = [cell for cell in ranked if wanted.items() <= cell["key"].items()]
            most = max(found, key=lambda cell: cell["key"]["images"], default=None)
            shown.append(f"{100 * most['accuracy']:.1f}" if most else "–")
        lines.append(f"| {tool} | {setting} | {mend} | {' | '.join(shown)} |")
    return lines


def _tuned(cells: Cells, model: str) -> list[str]:
    """Write means over seeds; smoke tests are no figures."""
    rows = cells.find(part="tuned", model=model, steps=0)
    if not rows:
        return ["Not run yet: it needs hours on a quiet machine (`--only tuned`)."]
    lines = [
        "| fewer MACs | tool | epochs | seeds | accuracy, % | times faster |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ratio, tool, epochs in sorted({(c["key"]["ratio"], c["key"]["tool"], c["key"]["epochs"]) for c in rows}):
        group = [c for c in rows if (c["key"]["ratio"], c["key"]["tool"], c["key"]["epochs"]) == (ratio, tool, epochs)]
        accuracies = ", ".join(f"{100 * cell['accuracy']:.2f}" for cell in group)
        faster = mean(cell["latency"]["times_faster"] for cell in group)
        lines.append(
            f"| {ratio}× | {tool} | {epochs} | {len(group)} | "
            f"{100 * mean(c['accuracy'] for c in group):.2f} ({accuracies}) | {faster:.2f} |"
        )
    return [*lines, "", "The control is the row of the unpruned network: a drop is against the better of it and 1.0×."]


def _latency(cells: Cells) -> list[str]:
    rows = cells.find(part="latency")
    if not rows:
        return ["Not run yet (`--only latency`)."]
    lines = [
        "| removed | fewer MACs | times faster (95 %) | of the MAC ratio | load |",
        "| --- | --- | --- | --- | --- |",
    ]
    for cell in rows:
        share = cell["times_faster"] / cell["macs_ratio"]
        lines.append(
            f"| {cell['key']['how']} | {cell['macs_ratio']:.2f}× | {cell['times_faster']:.2f} "
            f"({cell['low']:.2f}–{cell['high']:.2f}) | {share:.2f} | {cell['load']:.1f} |"
        )
    return [*lines, "", "ONNX Runtime, one thread, batch 1, interleaved with the unpruned file; widths in eights."]
