"""The rows of ``python -m benchmarks.bits``, and ``docs/bits.md`` from its cells."""

from statistics import mean
from typing import Any

from benchmarks.prune_cells import unpacked
from benchmarks.prune_table import Cells
from kompakt.measure.accuracy import Score, paired_drop

IMAGES = 10_000
FLOAT_SUMS = {"keep_ends": True, "float_sums": True}
PTQ: dict[str, tuple[dict[str, Any], str]] = {
    "W8A8": ({}, "kompakt quantize Z"),
    "W4A8": ({"weight_bits": 4}, "kompakt quantize Z --weight-bits 4"),
    "W4A4": (
        {"weight_bits": 4, "activation_bits": 4, "keep_ends": True},
        "kompakt quantize Z --weight-bits 4 --activation-bits 4 --keep-ends",
    ),
    "W4A4, float sums": (
        FLOAT_SUMS | {"weight_bits": 4, "activation_bits": 4},
        "kompakt quantize Z --weight-bits 4 --activation-bits 4 --keep-ends --float-sums",
    ),
    "W3A3, float sums": (
        FLOAT_SUMS | {"weight_bits": 3, "activation_bits": 3},
        "kompakt quantize Z --weight-bits 3 --activation-bits 3 --keep-ends --float-sums",
    ),
    "W4A8 nearest": (
        {"weight_bits": 4, "rounding": "nearest"},
        "kompakt quantize Z --weight-bits 4 --rounding nearest",
    ),
    "W3A8": ({"weight_bits": 3}, "kompakt quantize Z --weight-bits 3"),
    "W2A8": ({"weight_bits": 2}, "kompakt quantize Z --weight-bits 2"),
    "codebook 4": ({"codebook": 4}, "kompakt quantize Z --codebook 4"),
    "codebook 3": ({"codebook": 3}, "kompakt quantize Z --codebook 3"),
    "codebook 2": ({"codebook": 2}, "kompakt quantize Z --codebook 2"),
    "mixed 4": ({"average_bits": 4.0}, "kompakt quantize Z --mixed --average-bits 4"),
    "mixed 3": ({"average_bits": 3.0}, "kompakt quantize Z --mixed --average-bits 3"),
}
QAT: dict[str, tuple[dict[str, Any] | None, str, float | None]] = {
    "control": (None, "", None),
    "W4A4": ({"weight_bits": 4, "activation_bits": 4, "keep_ends": True}, "steps", 0.5),
    "W3A3": ({"weight_bits": 3, "activation_bits": 3, "keep_ends": True}, "steps", 1.0),
    "W2A2": ({"weight_bits": 2, "activation_bits": 2, "keep_ends": True}, "steps", 2.5),
    "W4A4, float sums": (FLOAT_SUMS | {"weight_bits": 4, "activation_bits": 4}, "steps", 0.5),
    "W3A3, float sums": (FLOAT_SUMS | {"weight_bits": 3, "activation_bits": 3}, "steps", 1.0),
    "W2A2, float sums": (FLOAT_SUMS | {"weight_bits": 2, "activation_bits": 2}, "steps", 2.5),
    "codebook 4": ({"codebook": 4}, "steps", 0.2),
    "ternary W, A8": ({"weight_bits": 2, "keep_ends": True}, "ternary", 1.0),
    "binary W, A8": ({"weight_bits": 1, "keep_ends": True}, "binary", 2.5),
    "W1A1": ({"weight_bits": 1, "activation_bits": 1, "keep_ends": True}, "binary", None),
}
PEER, MIXED_PEER = "Brevitas W4A4", "MCT mixed"
HEAD = """# Below eight bits

Written by `python -m benchmarks.bits` from `benchmarks/results/bits/`; every accuracy is of the exported file,
loaded in ONNX Runtime, on the 10,000 test images of CIFAR-10 (as JPEG). The network is the zoo's ResNet-20; drops
are against its float file, paired on the same images, with 95 % intervals. `Z` stands for `kompakt.zoo:resnet20
--weights resnet20-cifar10.safetensors --data cifar10 --input-size 32 --out DIR`. W: bits of weights, A: of
activations. No row below 8 bits is faster than 8 bits: ONNX Runtime multiplies bytes on a CPU. Bytes are of the
ONNX file (weights of 2 to 7 bits stand in int8 there, codebooks of up to 4 bits in two indices to a byte) and of
the same file as `.kpk`, coded without loss.
"""


def page(cells: Cells) -> str:
    """Write the page."""
    floats = cells.find(part="ptq", row="fp32")
    if not floats:
        return HEAD + "\nNot run yet.\n"
    base = floats[0]
    return "\n".join([HEAD, *_ptq(cells, base), "", *_qat(cells, base), ""])


def _ptq(cells: Cells, base: dict[str, Any]) -> list[str]:
    lines = ["## Without training", "", "| | command | accuracy, % | drop, points | ONNX, kB | `.kpk`, kB | seconds |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |", f"| fp32 | | {_accuracy(base)} | | {_sizes(base)} | |"]
    for name, (_, command) in PTQ.items():
        for cell in cells.find(part="ptq", row=name) or [None]:
            if cell is None:
                lines.append(f"| {name} | `{command}` | not run yet | | | | |")
                continue
            row = f"| {name} | `{command}` | {_accuracy(cell)} | {_drop(base, cell)} | {_sizes(cell)} |"
            lines.append(f"{row} {cell['seconds']:.0f} |")
    for bits in (4, 3):
        for cell in cells.find(part="ptq", row=f"{MIXED_PEER} {bits}"):
            row = f"| {MIXED_PEER} {bits} | `benchmarks.peers.mct_mixed {bits}` | {_accuracy(cell)}"
            size = f"{cell['weight_bytes'] / 1e3:.0f} (weights)"
            lines.append(f"{row} | {_drop(base, cell)} | {size} | | {cell['seconds']:.0f} |")
    return [*lines, "", *_compared(cells, base)]


def _compared(cells: Cells, base: dict[str, Any]) -> list[str]:
    """Say what the rows without training show, from the cells."""
    said = []
    for better, worse, claim in (
        ("mixed 4", f"{MIXED_PEER} 4", "bits by layer at 4 on average against MCT's"),
        ("mixed 3", f"{MIXED_PEER} 3", "bits by layer at 3 on average against MCT's"),
        ("mixed 4", "W4A8", "bits by layer at 4 on average against 4 bits everywhere"),
        ("mixed 3", "W3A8", "bits by layer at 3 on average against 3 bits everywhere"),
        (
            "codebook 4",
            "W4A8 nearest",
            "a codebook of 16 values a tensor against 4-bit integers a channel (nearest)",
        ),
    ):
        a, b = cells.find(part="ptq", row=better), cells.find(part="ptq", row=worse)
        if a and b:
            drop = paired_drop(_score(b[0]), _score(a[0]))
            low, high = drop.ci95
            said.append(f"- {claim}: {-drop.points:+.2f} points ({-high:+.2f} to {-low:+.2f}).")
    return [f"Side by side on the same images (more is better):\n\n{chr(10).join(said)}"] if said else []


def _qat(cells: Cells, base: dict[str, Any]) -> list[str]:
    lines = ["## With training", ""]
    lines += [
        "Learned steps (LSQ, LSQ+), batch norms trained and folded into the scales of the channels, the float",
        "network as teacher (half of the loss, temperature 4), random crops and mirrors, batch 128, cosine from",
        "0.02. *Hint*: the mean squared error of its features at the end of the three stages, weighed so, is added",
        '(`--hint`; in a recipe `[[distill.terms]]`, `loss = "hint"`). The first and the last layer have 8 bits. Two',
        "bits of weights are −1, 0 and 1 with a scale a channel. Where nothing is said, sums of branches are integers",
        "of as few bits as the rest; *float sums*: only what layers multiply has few bits (`--float-sums`), as most",
        "papers count them. The control is the float network given the same training.",
        "",
        "| | epochs | hint | seeds | accuracy, % | drop, points, by seed | asked for | `.kpk`, kB | minutes a seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, limit in [*((name, limit) for name, (_, _, limit) in QAT.items()), (PEER, None)]:
        found = cells.find(part="qat", row=name)
        asked = "" if limit is None else f"≤ {limit:g} within 15 epochs"
        if not found:
            lines.append(f"| {name} | | | | not run yet | | {asked} | | |")
        for epochs, hint, cycles in sorted({_training(cell) for cell in found}):
            same = [cell for cell in found if _training(cell) == (epochs, hint, cycles)]
            accuracy = f"{100 * mean(cell['accuracy'] for cell in same):.2f}"
            drops = "; ".join(_drop(base, cell) for cell in same)
            sizes, minutes = [c["kpk_bytes"] for c in same if "kpk_bytes" in c], mean(c["train_s"] for c in same) / 60
            size = f"{mean(sizes) / 1e3:.0f}" if sizes else ""
            passes = f"{epochs} in {cycles} cycles" if cycles > 1 else epochs
            lines.append(
                f"| {name} | {passes} | {f'{hint:g}' if hint else ''} | {len(same)} | {accuracy} | {drops} | {asked} "
                f"| {size} | {minutes:.1f} |"
            )
    return [*lines, "", *_steps(cells)]


def _training(cell: dict[str, Any]) -> tuple[int, float, int]:
    """Epochs, the weight of hints, and how many times the cosine begins anew."""
    return cell["key"]["epochs"], cell["key"].get("hint", 0.0), cell["key"].get("cycles", 1)


def _steps(cells: Cells) -> list[str]:
    """Write the times of a training step."""
    lines = [
        f"{PEER}: its quantizers' defaults (scale a channel from the weights' largest, learned steps of activations),",
        "calibrated first; the same batches, teacher and learning rates; branches added in float; scored in PyTorch.",
        "",
        "| one training step, batch of 128, no teacher | time, against fp32 (95 %) |",
        "| --- | --- |",
    ]
    found = cells.find(part="steps")
    if not found:
        return [*lines, "| not measured yet (`--only peers`) | |"]
    for name, value in found[-1].items():
        if isinstance(value, dict) and "ratio" in value:
            low, high = value["ci95"]
            lines.append(f"| {name} | {value['ratio']:.2f} ({low:.2f}–{high:.2f}) |")
    return [*lines, "", f"Interleaved in one process, load {found[-1]['load']:.1f}. Asked for: ≤ 1.5."]


def _score(cell: dict[str, Any]) -> Score:
    return Score(correct=unpacked(cell["correct"], IMAGES))


def _drop(base: dict[str, Any], cell: dict[str, Any]) -> str:
    found = paired_drop(_score(base), _score(cell))
    return f"{found.points:.2f} ({found.ci95[0]:.2f} to {found.ci95[1]:.2f})"


def _accuracy(cell: dict[str, Any]) -> str:
    return f"{100 * cell['accuracy']:.2f}"


def _sizes(cell: dict[str, Any]) -> str:
    return f"{cell['onnx_bytes'] / 1e3:.0f} | {cell['kpk_bytes'] / 1e3:.0f}"
