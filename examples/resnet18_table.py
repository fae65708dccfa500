"""The files of ``examples.resnet18_pipeline`` side by side, and the page with the article's claims beside them."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from kompakt.artifact.targets import target
from kompakt.measure.latency import interleave
from kompakt.measure.machine import machine
from kompakt.measure.result import Drop, Result

FILES = {
    "original": ("", 0),
    "int8": ("int8", -1),
    "30 % of channels": ("thirty", 1),
    "30 % of channels, int8": ("thirty", -1),
    "channels for 4 MB": ("pruned", 1),
    "channels for 4 MB, int8": ("pruned", -1),
    "student": ("student", 1),
    "student, int8": ("student", -1),
    "control": ("control", 1),
}
"""Row → folder (any, for the original), and which of its stages."""
CLAIMS = {
    "original": "90 MB",
    "int8": "22 MB (÷4) at ≤ 1 point",
    "30 % of channels, int8": "15 MB at ≤ 2 points",
    "student, int8": "4 MB at ≤ 3 points",
}
ASKED = {"channels for 4 MB, int8": (4e6, 1.0), "student, int8": (1.2e6, 1.0)}
"""Row → bytes of the ONNX file and points at the most."""
HEAD = """# The article's ResNet-18, stage by stage

Made by `python -m examples.resnet18_pipeline --page docs/pipeline.md` (with `--weights` and `--data` as its help says)
from `examples/resnet18_pipeline.toml`: torchvision's unmodified `resnet18`, ten classes, 48×48 pixels.
Every figure is read off the file on disk: accuracy in ONNX Runtime on the test split, points lost against the original
with the paired 95 % interval, then the difference to the better of original and control; time as the
ratio to the original of the processor's time of one call, in an interleaved loop (one thread, batch 1, {cpu}; other
work on the machine slows long calls more than short ones, so the clock on the wall would flatter the small files).

{data}.

"""
COLUMNS = (
    "file",
    "what was done",
    "ONNX",
    "`.kpk`",
    "accuracy, %",
    "points lost",
    "against the better",
    "time",
    "the article says",
)
REMARKS = """\
- ResNet-18 is not 90 MB in fp32, as the article says: {params:,} parameters of 4 bytes are {mega:.1f} MB. What can be
  compared is the ratio.
- The control is the original trained further without a teacher, for as long as its row says; the student was trained
  for more epochs than that. {parts}
- The zoo's network was not trained to the end of its learning curve: with enough epochs further training alone gains.
  That is why the difference to the better of original and control is given too.
- Tried for the student at 8 bits, one seed each: 6 epochs 2.25 points, 20 epochs 1.44 (the row above), 12 epochs of
  shifted and mirrored images with the int8 file as teacher and nine tenths of the loss 1.94. On its training images
  it was right for 92 % after 12 of the 20 epochs.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file: what it is, what it costs and what it is worth.

    Args:
        name, did: of its stage.
        onnx_bytes, kpk_bytes: of the file, and packed without loss, where it was.
        params: of the network.
        accuracy: a share.
        drop: against the original, paired; None for the original itself.
        time: ratio of the processor's time to the original's, in an interleaved loop.
    """

    name: str
    did: str
    onnx_bytes: int
    kpk_bytes: int | None
    params: int
    accuracy: float
    drop: Drop | None
    time: float


def collect(out: Path, example: np.ndarray, seconds: float) -> tuple[Row, ...]:
    """Return the rows of the stages that have been run, from what each measured on its files, and time all of them.

    Args:
        out: the pipeline's folder.
        example: one input.
        seconds: of the processor, for timing.
    """
    there = {path.parent.name: Result.read(path) for path in sorted(out.glob("*/result.json"))}
    rows, files = [], {}
    for name, (folder, index) in FILES.items():
        found = there.get(folder or min(there, default=""))
        if found is None:
            continue
        stage = found.stages[index]
        seen, last = stage.measurement, stage is found.stages[-1]
        assert seen.accuracy is not None
        files[name] = out / (folder or min(there)) / seen.file
        rows.append(
            Row(
                name=name,
                did=stage.did,
                onnx_bytes=seen.size_bytes,
                kpk_bytes=found.packed_bytes if last else None,
                params=seen.params,
                accuracy=seen.accuracy,
                drop=stage.drop,
                time=1.0,
            )
        )
    runs = {name: partial(target("onnxruntime").open(path, 1), example) for name, path in files.items()}
    times = interleave(runs, seconds=seconds, clock=time.process_time_ns)
    return tuple(replace(row, time=times[row.name].ratio) for row in rows)


def page(rows: tuple[Row, ...], description: str, parts: str = "") -> str:
    """Write the page; ``parts`` says which stages were trained on a part of the images."""
    found = {row.name: row for row in rows}
    original = found["original"]
    best = max(found[name].accuracy for name in ("original", "control") if name in found)
    head = HEAD.format(data=description, cpu=machine()["cpu"])
    table = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|\n" + "".join(_line(row, best) for row in rows)
    asked = "".join(
        f"- Asked: {_asked(found[name], best, *limits)}\n" for name, limits in ASKED.items() if name in found
    )
    missing = [name for name in FILES if name not in found]
    left = f"- Not run yet: {', '.join(missing)}.\n" if missing else ""
    remarks = REMARKS.format(params=original.params, mega=4e-6 * original.params, parts=parts)
    return head + table + "\n" + asked + left + remarks


def _line(row: Row, best: float) -> str:
    """Write one file's row."""
    cells = (
        row.name,
        row.did,
        f"{row.onnx_bytes / 1e6:.2f} MB",
        "" if row.kpk_bytes is None else f"{row.kpk_bytes / 1e6:.2f} MB",
        f"{100 * row.accuracy:.2f}",
        "" if row.drop is None else f"{row.drop.points:.2f} ({row.drop.ci95[0]:.2f} to {row.drop.ci95[1]:.2f})",
        f"{100 * (best - row.accuracy):.2f}",
        f"{row.time:.2f}",
        CLAIMS.get(row.name, ""),
    )
    return f"| {' | '.join(cells)} |\n"


def _asked(row: Row, best: float, size: float, points: float) -> str:
    """Say whether a file is as small and as good as asked."""
    assert row.drop is not None
    small, good = row.onnx_bytes <= size, row.drop.points <= points
    missed = ["size"] * (not small) + ["accuracy"] * (not good)
    state = f"missed: {' and '.join(missed)}" if missed else "reached"
    return (
        f"{row.name}, ≤ {size / 1e6:g} MB at ≤ {points:g} point: {row.onnx_bytes / 1e6:.2f} MB, "
        f"{row.drop.points:.2f} points against the original — {state}; "
        f"{100 * (best - row.accuracy):.2f} against the better of original and control."
    )
