"""The files of ``examples.resnet18_pipeline`` side by side, and the page with the article's claims beside them."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.targets import target
from kompakt.data import Data
from kompakt.measure.judge import Judge
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
Every figure is read off the file on disk: accuracy in ONNX Runtime on the test split, points lost with the paired 95 %
interval, once against the original and once against the better of original and control, time as the ratio of an
interleaved loop (one thread, batch 1, {cpu}, other work on the machine).

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
  for more epochs than that.
- The zoo's network was not trained to the end of its learning curve: further training alone gains, so that a student
  may come near its teacher, or pass it. That is why each drop is given against the better of original and control too.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file: what it is, what it costs and what it is worth."""

    name: str
    did: str
    onnx_bytes: int
    kpk_bytes: int
    macs: int
    params: int
    accuracy: float
    drop: Drop
    against_best: Drop
    time: tuple[float, float, float]


def measure(out: Path, data: Data, seconds: float) -> tuple[Row, ...]:
    """Score every file of a pipeline on the test split, time all of them side by side, and pack each.

    Stages that have not been run are left out.

    Args:
        out: the pipeline's folder.
        data: whose test split.
        seconds: for timing.
    """
    judge = Judge(target=target("onnxruntime"), seconds=seconds)
    there = {path.parent.name: Result.read(path) for path in sorted(out.glob("*/result.json"))}
    places = {name: (folder or min(there), index) for name, (folder, index) in FILES.items()}
    places = {name: (folder, index) for name, (folder, index) in places.items() if folder in there}
    stages = {name: there[folder].stages[index] for name, (folder, index) in places.items()}
    paths = {name: out / places[name][0] / stage.measurement.file for name, stage in stages.items()}
    scores = {name: judge.score(path, data.test) for name, path in paths.items()}
    best = max({"original", "control"} & scores.keys(), key=lambda name: scores[name].accuracy)
    one = next(iter(data.test.batches(1, limit=1)))[0].numpy().astype(np.float32)
    times = judge.times(paths, one)
    with tempfile.TemporaryDirectory() as folder:
        packed = {name: pack_onnx(path, Path(folder) / "model.kpk") for name, path in paths.items()}
    return tuple(
        Row(
            name=name,
            did=stage.did,
            onnx_bytes=paths[name].stat().st_size,
            kpk_bytes=packed[name],
            macs=stage.measurement.macs,
            params=stage.measurement.params,
            accuracy=scores[name].accuracy,
            drop=judge.drop(scores["original"], scores[name]),
            against_best=judge.drop(scores[best], scores[name]),
            time=(times[name].ratio, *times[name].ratio_ci95),
        )
        for name, stage in stages.items()
    )


def page(rows: tuple[Row, ...], description: str) -> str:
    """Write the page."""
    found = {row.name: row for row in rows}
    original = found["original"]
    head = HEAD.format(data=description, cpu=machine()["cpu"])
    table = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|\n" + "".join(_line(row) for row in rows)
    asked = "".join(f"- Asked: {_asked(found[name], *limits)}\n" for name, limits in ASKED.items() if name in found)
    missing = [name for name in FILES if name not in found]
    left = f"- Not run yet: {', '.join(missing)}.\n" if missing else ""
    return head + table + "\n" + asked + left + REMARKS.format(params=original.params, mega=4e-6 * original.params)


def _line(row: Row) -> str:
    """Write one file's row."""
    first = row.name == "original"
    ratio, low, high = row.time
    cells = (
        row.name,
        row.did,
        f"{row.onnx_bytes / 1e6:.2f} MB",
        f"{row.kpk_bytes / 1e6:.2f} MB",
        f"{100 * row.accuracy:.2f}",
        "" if first else _drop(row.drop),
        _drop(row.against_best),
        "1" if first else f"{ratio:.2f} ({low:.2f}–{high:.2f})",
        CLAIMS.get(row.name, ""),
    )
    return f"| {' | '.join(cells)} |\n"


def _asked(row: Row, size: float, points: float) -> str:
    """Say whether a file is as small and as good as asked."""
    small, good = row.onnx_bytes <= size, row.drop.points <= points
    state = (
        "reached" if small and good else "missed: " + " and ".join(["size"] * (not small) + ["accuracy"] * (not good))
    )
    return (
        f"{row.name}, ≤ {size / 1e6:g} MB at ≤ {points:g} point: {row.onnx_bytes / 1e6:.2f} MB, "
        f"{row.drop.points:.2f} points against the original — {state}; "
        f"{row.against_best.points:.2f} against the better of original and control."
    )


def _drop(drop: Drop) -> str:
    return f"{drop.points:.2f} ({drop.ci95[0]:.2f} to {drop.ci95[1]:.2f})"
