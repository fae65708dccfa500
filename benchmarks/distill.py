"""Losses of distillation side by side, and torchdistill: ``python -m benchmarks.distill``.

Every measured cell is a line of ``benchmarks/results/distill/*.jsonl`` with its settings as key; a cell that is there
is not measured again, so the run can be stopped (``--minutes``) and taken up at any time. Students, batches, seeds,
optimizer and learning rates are the same for every row; accuracy is the exported file's on the 10,000 test images.

torchdistill runs in a process of its own: ``--other`` names the Python that has it. Writes ``docs/distill.md``.
"""

import argparse
import json
import os
import subprocess
import time
from functools import partial
from typing import Any

import torch

from benchmarks.distill_cells import LOGITS, STUDENTS, Bench, Schooling, TimeUp, taught
from benchmarks.distill_table import page
from benchmarks.prune_subjects import ROOT
from benchmarks.prune_table import Cells

RESULTS = ROOT / "benchmarks" / "results" / "distill"
PEER = ("soft targets", "attention")


def rows(without: list[str]) -> list[tuple[str, str, str]]:
    """Return (tool, row, start), the most telling first."""
    random = [("kompakt", row, "random") for row in LOGITS]
    teacher = [("kompakt", row, "teacher") for row in LOGITS]
    peer = [("torchdistill", row, "random") for row in PEER]
    return [item for item in (*random, *teacher, *peer) if not any(part in item for part in without)]


def peer(bench: Bench, interpreter: str, row: str, *more: str) -> dict[str, Any]:
    """Let torchdistill train or time, in the Python that has it."""
    given = bench.schooling
    words = [bench.name, row, "--epochs", str(given.epochs), "--cifar", bench.cifar, *more]
    words += ["--images", str(given.images)] if given.images else []
    paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    command = [interpreter, "-m", "benchmarks.peers.torchdistill_train", *words]
    done = subprocess.run(
        command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_losses(cells: Cells, bench: Bench, given: argparse.Namespace) -> None:
    """Train every row, seed by seed."""
    for seed in range(given.seeds):
        for tool, row, start in rows(given.without):
            key = {"part": "losses", "model": bench.name, "tool": tool, "row": row, "start": start, "seed": seed}
            key |= {"images": given.images, "epochs": given.epochs, "rate": bench.schooling.learning_rate}
            if tool == "kompakt":
                cells.get(key, partial(taught, bench, row, start, seed, cells.spent))
            else:
                cells.get(key, partial(peer, bench, given.other, row, "--seed", str(seed)))


def main() -> int:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill")
    parser.add_argument("--only", choices=["losses", "steps", "page"], help="this part; all by default")
    parser.add_argument("--model", choices=list(STUDENTS), default="resnet20")
    parser.add_argument("--images", type=int, help="of the training part; all 45,000 by default")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop cleanly after this time")
    parser.add_argument("--seconds", type=float, default=120.0, help="for timing steps")
    parser.add_argument("--without", nargs="*", default=[], help="leave out rows, starts or tools of these names")
    parser.add_argument("--cifar", default="/tmp/data", help="CIFAR-10 as an image folder")
    parser.add_argument("--other", default=".venv-torchdistill/bin/python", help="the Python that has torchdistill")
    given = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * given.minutes
    cells = Cells(folder=RESULTS, spent=lambda: time.monotonic() > end)
    schooling = Schooling(images=given.images, epochs=given.epochs)
    bench = Bench(name=given.model, cifar=given.cifar, schooling=schooling)
    try:
        if given.only in (None, "losses"):
            run_losses(cells, bench, given)
        if given.only in (None, "steps"):
            key = {"part": "steps", "model": bench.name}
            cells.get(key, partial(peer, bench, given.other, "steps", "--seconds", str(given.seconds)))
    except TimeUp:
        print("the time is used up; the same command goes on from here", flush=True)
    text = page(cells)
    (ROOT / "docs" / "distill.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
