"""Below eight bits on ResNet-20, after training and in training: ``python -m benchmarks.bits``.

Every measured cell is a line of ``benchmarks/results/bits/*.jsonl`` with its settings as key; a cell that is there is
not measured again, so the run can be stopped (``--minutes``) and taken up at any time. All accuracies are of the
exported file in ONNX Runtime on the 10,000 test images. Writes ``docs/bits.md`` from the cells alone.

Peers run in processes of their own: ``--other`` names a Python with Brevitas and torchao (``pip install brevitas
torchao`` beside kompakt), ``--mixed-other`` one with MCT (``pip install model-compression-toolkit``).
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
from benchmarks.bits_table import MIXED_PEER, PEER, PTQ, QAT, page
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


def run_qat(cells: Cells, bench: Bench, given: argparse.Namespace) -> None:
    """Train the rows that are named, seed by seed."""
    for seed in range(given.seeds):
        for name in given.rows:
            knobs, form, _ = QAT[name]
            section = None if knobs is None else QuantizeSection(**knobs)
            key = {"part": "qat", "model": bench.name, "row": name, "knobs": knobs or {}, "form": form, "seed": seed}
            key |= {"epochs": given.epochs, "learning_rate": RATE, "teacher": True, "images": 10_000}
            key |= {"hint": given.hint} if given.hint else {}
            key |= {"cycles": given.cycles} if given.cycles > 1 else {}
            words = (seed, given.epochs, given.hint, *([given.cycles] if given.cycles > 1 else []))
            label = "-".join(("qat", name, *map(str, words))).replace(" ", "-")
            cells.get(key, lambda k=key, s=section, f=form, n=label: qat(bench, n, k, s, f, cells.spent))


def peer(interpreter: str, module: str, *words: str) -> dict[str, Any]:
    """Let another tool work in the Python that has it, and read the line that it prints."""
    command = [interpreter, "-W", "ignore", "-m", f"benchmarks.peers.{module}", *words]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))}
    done = subprocess.run(command, check=True, cwd=ROOT, env=given, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_peers(cells: Cells, given: argparse.Namespace) -> None:
    """Mixed precision by MCT; a training step beside Brevitas's and torchao's; Brevitas's W4A4, seed by seed."""
    where = ("--cifar", given.cifar)
    for bits in ("4", "3"):
        key = {"part": "ptq", "model": "resnet20", "row": f"{MIXED_PEER} {bits}", "images": 10_000}
        cells.get(key, lambda b=bits: peer(given.mixed_other, "mct_mixed", b, *where))
    key = {"part": "steps", "model": "resnet20"}
    cells.get(key, lambda: peer(given.other, "bits_training", "steps", "--seconds", "120", *where))
    for seed in range(given.seeds):
        words = ("train", "--seed", str(seed), "--epochs", str(given.epochs), *where)
        key = {"part": "qat", "model": "resnet20", "row": PEER, "seed": seed}
        key |= {"epochs": given.epochs, "learning_rate": RATE}
        cells.get(key, lambda w=words: peer(given.other, "bits_training", *w))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits")
    parser.add_argument("--only", choices=["ptq", "qat", "peers", "mnist", "page"], help="this part; all by default")
    parser.add_argument("--rows", nargs="+", default=list(QAT), choices=list(QAT), help="of the part that trains")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--cycles", type=int, default=1, help="how many times the cosine begins anew")
    parser.add_argument("--hint", type=float, default=0.0, help="weight of the teacher's features at the end of stages")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop cleanly after this time")
    parser.add_argument("--cifar", default="/tmp/data", help="CIFAR-10 as an image folder")
    parser.add_argument("--mnist", default="/tmp/mnist", help="MNIST as an image folder")
    parser.add_argument("--other", default=".venv-brevitas/bin/python", help="the Python that has Brevitas and torchao")
    parser.add_argument("--mixed-other", default=".venv-mct/bin/python", help="the Python that has MCT")
    given = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * given.minutes
    cells, bench = Cells(folder=RESULTS, spent=lambda: time.monotonic() > end), Bench("resnet20", given.cifar)
    try:
        if given.only in (None, "ptq"):
            run_ptq(cells, bench)
        if given.only in (None, "qat"):
            run_qat(cells, bench, given)
        if given.only in (None, "peers"):
            run_peers(cells, given)
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
