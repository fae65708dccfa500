"""Below eight bits on ResNet-20, after training and in training: ``python -m benchmarks.bits``.

Every measured cell is a line of ``benchmarks/results/bits/*.jsonl`` with its settings as key; a cell that is there is
not measured again, so the run can be stopped (``--minutes``) and taken up at any time. All accuracies are of the
exported file in ONNX Runtime on the 10,000 test images. Writes ``docs/bits.md`` from the cells alone.

Brevitas and torchao train in a process of their own: ``--other`` names a Python that has both (``pip install brevitas
torchao`` beside kompakt).
"""

import argparse
import json
import os
import subprocess
import time
from typing import Any

import torch

from benchmarks import bits_mnist
from benchmarks.bits_cells import RATE, Bench, ptq, qat
from benchmarks.bits_table import PEER, PTQ, QAT, page
from benchmarks.prune_cells import TimeUp
from benchmarks.prune_subjects import ROOT
from benchmarks.prune_table import Cells
from kompakt.plan.recipe import QuantizeSection

RESULTS = ROOT / "benchmarks" / "results" / "bits"


def run_ptq(cells: Cells, bench: Bench) -> None:
    """Measure the float network, then every row without training."""
    rows: dict[str, dict[str, Any] | None] = {"fp32": None, **{name: knobs for name, (knobs, _) in PTQ.items()}}
    for name, knobs in rows.items():
        section = None if knobs is None else QuantizeSection(**knobs)
        key = {"part": "ptq", "model": bench.name, "row": name, "knobs": knobs or {}, "images": 10_000}
        cells.get(key, lambda n=name, s=section: ptq(bench, f"ptq-{n}".replace(" ", "-").replace("/", "-"), s, "test"))


def run_qat(cells: Cells, bench: Bench, names: list[str], seeds: int, epochs: int) -> None:
    """Train the rows that are named, seed by seed."""
    for seed in range(seeds):
        for name in names:
            knobs, form, _ = QAT[name]
            section = None if knobs is None else QuantizeSection(**knobs)
            key = {"part": "qat", "model": bench.name, "row": name, "knobs": knobs or {}, "form": form, "seed": seed}
            key |= {"epochs": epochs, "learning_rate": RATE, "teacher": True, "images": 10_000}
            label = f"qat-{name}-{seed}-{epochs}".replace(" ", "-")
            cells.get(key, lambda k=key, s=section, f=form, n=label: qat(bench, n, k, s, f, cells.spent))


def run_peers(cells: Cells, interpreter: str, cifar: str, seeds: int, epochs: int) -> None:
    """Time a training step beside Brevitas's and torchao's, and train Brevitas's W4A4, seed by seed."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))

    def peer(*words: str) -> dict[str, Any]:
        command = [interpreter, "-W", "ignore", "-m", "benchmarks.peers.bits_training", *words, "--cifar", cifar]
        given = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run(command, check=True, cwd=ROOT, env=given, stdout=subprocess.PIPE, text=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    cells.get({"part": "steps", "model": "resnet20"}, lambda: peer("steps", "--seconds", "120"))
    for seed in range(seeds):
        key = {"part": "qat", "model": "resnet20", "row": PEER, "seed": seed, "epochs": epochs, "learning_rate": RATE}
        cells.get(key, lambda s=str(seed): peer("train", "--seed", s, "--epochs", str(epochs)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits")
    parser.add_argument("--only", choices=["ptq", "qat", "peers", "mnist", "page"], help="this part; all by default")
    parser.add_argument("--rows", nargs="+", default=list(QAT), choices=list(QAT), help="of the part that trains")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop cleanly after this time")
    parser.add_argument("--cifar", default="/tmp/data", help="CIFAR-10 as an image folder")
    parser.add_argument("--mnist", default="/tmp/mnist", help="MNIST as an image folder")
    parser.add_argument("--other", default="/work/env/bits/bin/python", help="the Python that has Brevitas and torchao")
    given = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * given.minutes
    cells, bench = Cells(folder=RESULTS, spent=lambda: time.monotonic() > end), Bench("resnet20", given.cifar)
    try:
        if given.only in (None, "ptq"):
            run_ptq(cells, bench)
        if given.only in (None, "qat"):
            run_qat(cells, bench, given.rows, given.seeds, given.epochs)
        if given.only in (None, "peers"):
            run_peers(cells, given.other, given.cifar, given.seeds, given.epochs)
        if given.only in (None, "mnist"):
            bits_mnist.run(cells, given.mnist, given.seeds)
    except TimeUp:
        print("the time is used up; the same command goes on from here", flush=True)
    text = "\n".join([page(cells), *bits_mnist.page(cells)])
    (ROOT / "docs" / "bits.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
