"""The figures that issue 3 asks for, from the cells of ``python -m benchmarks.prune``: reached, missed or not run."""

from statistics import mean
from typing import Any

from benchmarks.prune_cells import unpacked
from benchmarks.prune_subjects import RATIOS, SUBJECTS
from benchmarks.prune_table import Cells
from kompakt.measure.accuracy import Score, paired_drop

TEST_IMAGES = 10_000
EPOCHS = 10
RUN = "python -m benchmarks.prune"
TUNED = (("resnet20", 2.0, 0.5), ("resnet18", 0.3, 0.5), ("resnet18", 4.0, 1.0))
LATENCY_SHARE = 0.8


def size(ratio: float) -> str:
    """Write a ratio: fewer MACs, or below 1 the share of the channels; 1 is the unpruned network."""
    if ratio == 1:
        return "nothing"
    return f"{ratio:g}×" if ratio > 1 else f"{100 * ratio:g} % of channels"


def drop_of(cells: Cells, model: str, cell: dict[str, Any]) -> str:
    """Write a cell's paired drop against the original."""
    whole = cells.find(part="one-shot", model=model, tool="unpruned", split="test")
    if not whole:
        return ""
    before, after = (Score(correct=unpacked(part["correct"], TEST_IMAGES)) for part in (whole[0], cell))
    drop = paired_drop(before, after)
    return f"{drop.points:.2f} ({drop.ci95[0]:.2f} to {drop.ci95[1]:.2f})"


def reference(cells: Cells, model: str, epochs: int, rate: float) -> float:
    """Return the accuracy that drops are against: the better of the original and the control trained alike."""
    whole = cells.find(part="one-shot", model=model, tool="unpruned", split="test")
    control = cells.find(part="tuned", model=model, tool="unpruned", steps=0, epochs=epochs, learning_rate=rate)
    levels = [each["accuracy"] for each in whole[:1]]
    return max([*levels, mean(each["accuracy"] for each in control)] if control else levels, default=0.0)


def asked(cells: Cells) -> list[str]:
    """Write the table."""
    rows = []
    for model in SUBJECTS:
        for ratio in [ratio for ratio in RATIOS if ratio > 1 or model == "resnet18"]:
            what = f"{model}, {size(ratio)}, nothing trained: better than torch-pruning"
            rows.append((what, _one_shot(cells, model, ratio), f"--only one-shot --model {model} --ratios {ratio:g}"))
    for model, ratio, most in TUNED:
        how = f"--only tuned --model {model} --ratios {ratio:g}"
        what = f"{model}, {size(ratio)}, at most {EPOCHS} epochs: drop ≤ {most} points"
        rows.append((what, *_tuned(cells, model, ratio, most, how)))
        rows.append(("the same, in equal epochs: no worse than torch-pruning", *_beside(cells, model, ratio, how)))
    what = f"resnet18 at 224: latency ratio ≥ {LATENCY_SHARE} of the MAC ratio"
    rows.append((what, _latency(cells), "--only latency"))
    rows.append(
        ("2:4 on the sparse tensor cores of an NVIDIA GPU, measured", _semi_sparse(cells), "--only semi-sparse")
    )
    lines = ["| asked | state | command |", "| --- | --- | --- |"]
    return [*lines, *(f"| {what} | {state} | `{RUN} {how}` |" for what, state, how in rows)]


def _one_shot(cells: Cells, model: str, ratio: float) -> str:
    found = {
        tool: max(
            (
                c["accuracy"]
                for c in cells.find(part="one-shot", model=model, ratio=ratio, tool=tool, split="test")
                if c["key"]["setting"] != "uniform-random-inner"
            ),
            default=None,
        )
        for tool in ("kompakt", "torch-pruning")
    }
    ours, theirs = found.values()
    if ours is None or theirs is None:
        return "not measured"
    return f"{'yes' if ours > theirs else 'no'}: {100 * ours:.2f} % against {100 * theirs:.2f}"


def _best(
    cells: Cells, model: str, ratio: float, tool: str, epochs: int | None = None
) -> tuple[float, list[dict[str, Any]]]:
    """Return the recipe with the least drop, of at most ten epochs or of so many: the drop in points, its cells."""
    recipes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells.find(part="tuned", model=model, ratio=ratio, tool=tool, steps=0):
        key = cell["key"]
        if key["epochs"] == epochs or (epochs is None and key["epochs"] <= EPOCHS):
            taught = (key.get("distill"), key.get("attention"), key.get("hint"))
            recipes.setdefault((key["epochs"], key["learning_rate"], taught), []).append(cell)
    drops = [
        (100 * (reference(cells, model, lasting, rate) - mean(c["accuracy"] for c in found)), found)
        for (lasting, rate, _), found in recipes.items()
    ]
    return min(drops, key=lambda item: item[0], default=(float("inf"), []))


def _trained(found: list[dict[str, Any]]) -> str:
    """Write the options that trained some cells."""
    key = found[0]["key"]
    given = {"epochs": key["epochs"], "rate": key["learning_rate"], "distill": key.get("distill", 0)}
    given |= {name: key[name] for name in ("attention", "hint") if key.get(name)}
    return " ".join(f"--{name} {value:g}" for name, value in given.items())


def _tuned(cells: Cells, model: str, ratio: float, most: float, how: str) -> tuple[str, str]:
    drop, found = _best(cells, model, ratio, "kompakt")
    if not found:
        return "not measured", f"{how} --epochs {EPOCHS}"
    many = f"{found[0]['key']['epochs']} epochs, {len(found)} seed{'s' if len(found) > 1 else ''}"
    return f"{'yes' if drop <= most else 'no'}: {drop:.2f} points ({many})", f"{how} {_trained(found)}"


def _beside(cells: Cells, model: str, ratio: float, how: str) -> tuple[str, str]:
    """Compare after as many epochs as both tools were trained for; the most of them."""
    lasting = [
        {cell["key"]["epochs"] for cell in cells.find(part="tuned", model=model, ratio=ratio, tool=tool, steps=0)}
        for tool in ("kompakt", "torch-pruning")
    ]
    if not (both := lasting[0] & lasting[1]):
        return "not measured", f"{how} --epochs {EPOCHS}"
    pair = [_best(cells, model, ratio, tool, max(both)) for tool in ("kompakt", "torch-pruning")]
    (ours, mine), (theirs, other) = pair
    many = f"{max(both)} epochs, {len(mine)} and {len(other)} seeds"
    word = "yes" if ours <= theirs else "no"
    return f"{word}: {ours:.2f} points against {theirs:.2f} ({many})", f"{how} {_trained(mine)}"


def _semi_sparse(cells: Cells) -> str:
    found = cells.find(part="semi-sparse")
    if not found:
        return "not measured: no machine with such a GPU was at hand"
    return ", ".join(f"{cell['key']['model']} {cell['times_faster']:.2f}× faster ({cell['device']})" for cell in found)


def _latency(cells: Cells) -> str:
    found = {cell["key"]["how"]: cell["times_faster"] / cell["macs_ratio"] for cell in cells.find(part="latency")}
    if not found:
        return "not measured"
    shares = ", ".join(f"{how} {share:.2f}" for how, share in found.items())
    return f"{'yes' if min(found.values()) >= LATENCY_SHARE else 'no'}: {shares}"
