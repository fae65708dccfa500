"""``docs/prune.md`` from the cells of ``python -m benchmarks.prune`` alone."""

from statistics import mean
from typing import Any

from benchmarks.prune_asked import asked, drop_of, reference, size
from benchmarks.prune_cells import OURS
from benchmarks.prune_subjects import RATIOS, SUBJECTS
from benchmarks.prune_table import Cells
from kompakt.measure.machine import machine


def page(cells: Cells) -> str:
    """Write the page."""
    lines = [
        "# Channel pruning, beside torch-pruning",
        "",
        "Made by `python -m benchmarks.prune` from `benchmarks/results/prune/`; "
        f"machine: {machine()['cpu']}, one thread. CIFAR-10 (JPEG), weights of the zoo, accuracy on the 10,000 test "
        "images with the paired 95 % interval of the drop. *bn*: batch norms' statistics estimated anew on the same "
        "training images for both tools; *reconstruct*: layers that lost inputs refitted by least squares to the "
        "original's outputs (`kompakt.build.reconstruct`), which torch-pruning does not offer; *none*: neither. A "
        "share of the channels is of all convolutions' together: where it goes decides how many MACs are left.",
        "",
        "Settings are chosen by accuracy, batch norms estimated anew, on a part of the training images, which the "
        "weights have been trained on: it ranks settings, its level says nothing. ResNet-20's padded shortcuts are "
        "not followed by torch-pruning (the pruned network does not run), so there it prunes inside the blocks; "
        "importances: magnitude, group norm and Taylor, normalised and not, local and global, from the same "
        "gradients as kompakt's.",
    ]
    lines += ["", "## What was asked", "", *asked(cells)]
    for model in SUBJECTS:
        lines += ["", f"## {model}, without training", "", *_one_shot(cells, model)]
        lines += ["", f"## {model}, trained further", "", *_tuned(cells, model)]
    lines += ["", "## Latency of resnet18 at 224", "", *_latency(cells)]
    return "\n".join(lines) + "\n"


def _one_shot(cells: Cells, model: str) -> list[str]:
    """Write the test figures and the ranking on validation images."""
    rows = [cell for cell in cells.find(part="one-shot", model=model, split="test")]
    ranked = cells.find(part="one-shot", model=model, split="validation")
    if not rows and not ranked:
        return ["Not run yet."]
    lines = [
        "| removed | tool | setting | mend | accuracy, % | drop, points |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in sorted(rows, key=lambda c: (c["key"]["ratio"], c["key"]["tool"], -c["accuracy"])):
        key = cell["key"]
        lines.append(
            f"| {size(key['ratio'])} ({cell['macs_ratio']:.2f}× fewer MACs) | {key['tool']} | {key['setting']} "
            f"| {key['mend']} | "
            f"{100 * cell['accuracy']:.2f} | {drop_of(cells, model, cell)} |"
        )
    wanted = [ratio for ratio in RATIOS if ratio > 1 or model == "resnet18"]
    missing = [ratio for ratio in wanted if not any(cell["key"]["ratio"] == ratio for cell in rows)]
    if missing:
        lines += ["", f"Not scored on the test images yet: {', '.join(map(size, missing))}."]
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
    head = " | ".join(map(size, ratios))
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
        "| removed | tool | epochs | rate | taught | seeds | accuracy, % | drop, points | times faster | threads |",
        "| --- " * 10 + "|",
    ]
    for key in sorted({_recipe(cell) for cell in rows}):
        group = [cell for cell in rows if _recipe(cell) == key]
        ratio, tool, epochs, rate, taught = key
        level = reference(cells, model, epochs, rate)
        found = 100 * mean(cell["accuracy"] for cell in group)
        each = ", ".join(f"{100 * cell['accuracy']:.2f}" for cell in group)
        threads = ", ".join(sorted({str(cell.get("threads", "–")) for cell in group}))
        faster = mean(cell["latency"]["times_faster"] for cell in group)
        lines.append(
            f"| {size(ratio)} | {tool} | {epochs} | {rate:g} | {taught} | {len(group)} "
            f"| {found:.2f} ({each}) | {100 * level - found:.2f} | {faster:.2f} | {threads} |"
        )
    if not any(cell["key"].get("distill") for cell in rows):
        lines += ["", "Not run yet: training taught by the original, which `--only tuned` does by default."]
    return [
        *lines,
        "",
        "A drop is against the better of the original and the control, the unpruned network trained alike (mean over "
        "its seeds; the original alone where the control was not run). *Taught*: the share of the loss that is the "
        "original's soft targets; *attention*, *hint*: its attention maps, or its features, at the end of stages are "
        "added, weighed so; neither torch-pruning's networks nor the control have a teacher. Seeds are few: a "
        "difference of some tenths of a point between rows settles nothing.",
    ]


def _recipe(cell: dict[str, Any]) -> tuple[float, str, int, float, str]:
    key = cell["key"]
    taught = f"{key['distill']:g}" if key.get("distill") else "no"
    taught += "".join(f", {loss} {key[loss]:g}" for loss in ("attention", "hint") if key.get(loss))
    return key["ratio"], key["tool"], key["epochs"], key["learning_rate"], taught


def _latency(cells: Cells) -> list[str]:
    rows = cells.find(part="latency")
    if not rows:
        return ["Not run yet (`--only latency`)."]
    lines = [
        "| removed | widths in | fewer MACs | times faster (95 %) | of the MAC ratio | load |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in rows:
        share = cell["times_faster"] / cell["macs_ratio"]
        lines.append(
            f"| {cell['key']['how']} | {_align(cell)} | {cell['macs_ratio']:.2f}× | {cell['times_faster']:.2f} "
            f"({cell['low']:.2f}–{cell['high']:.2f}) | {share:.2f} | {cell['load']:.1f} |"
        )
    return [*lines, "", "ONNX Runtime, one thread, batch 1, interleaved with the unpruned file; the machine was busy."]


def _align(cell: dict[str, Any]) -> str:
    chosen = cell["key"]["align"]
    return f"multiples of {cell['align']}, measured" if chosen == "auto" else f"multiples of {chosen}, given"
