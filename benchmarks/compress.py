"""kompakt's one command beside what can be put together from PyPI: ``python -m benchmarks.compress``.

Every tool starts from the same trained network and the same CIFAR-10 images and leaves an int8 artifact; then one
process scores all artifacts on the same test images and times them, one thread, batch 1, interleaved with the fp32
network in ONNX Runtime and in OpenVINO. 2,000 of the 10,000 test images become kompakt's ``val/``, which the
network has not seen; all tools are scored on the other 8,000. The peers' settings are all shown, so each is as good
as its best row.

Cells are lines of ``benchmarks/results/compress/*.jsonl``; a cell that is there is not measured again, so the run
can be stopped and taken up. ``sh benchmarks/peers/setup.sh`` makes the peers' environment, ``sh
benchmarks/peers/setup_more.sh`` those of torch-pruning, Olive and ModelOpt, on top of ``.venv``. Writes
``docs/compress-figures.md`` and its plots.
"""

import argparse
import time

import torch

from benchmarks.compress_cells import TOOLS, Bench, make, race
from benchmarks.compress_page import page, plot
from benchmarks.prune_cells import TimeUp
from benchmarks.prune_subjects import ROOT
from benchmarks.prune_table import Cells

RESULTS, DOCS = ROOT / "benchmarks" / "results" / "compress", ROOT / "docs"


def run(cells: Cells, bench: Bench, tools: list[str], effort: float, epochs: int) -> None:
    """Let the tools work, then run what they left side by side."""
    for tool in tools:
        key = {"part": "made", "model": bench.name, "tool": tool}
        key |= {"effort": effort} if tool == "kompakt" else {}
        key |= {"epochs": epochs} if tool.startswith("torch-pruning") else {}
        cells.get(key, lambda t=tool: make(bench, t, effort, epochs))
    made = [cell["key"]["tool"] for cell in cells.find(part="made", model=bench.name) if "error" not in cell]
    present = sorted(tool for tool in dict.fromkeys(made) if bench.artifact(tool).exists())
    if present:
        cells.get({"part": "race", "model": bench.name, "tools": present}, lambda: race(bench, present))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compress")
    parser.add_argument("--models", nargs="+", choices=["resnet20", "resnet18"], default=["resnet20"])
    parser.add_argument("--tools", nargs="*", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--effort", type=float, default=40.0, help="minutes of kompakt's search")
    parser.add_argument("--epochs", type=int, default=3, help="of training after torch-pruning")
    parser.add_argument("--threads", type=int, default=1, help="of training; files are always timed with one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after this time")
    parser.add_argument("--cifar", default="/tmp/data", help="CIFAR-10 as an image folder")
    parser.add_argument("--peers", default=".venv-peers/bin/python", help="the Python that has NNCF and OpenVINO")
    parser.add_argument("--pruner", default=".venv-torch-pruning/bin/python", help="the Python that has torch-pruning")
    parser.add_argument("--olive", default=".venv-olive/bin/python", help="the Python that has Olive")
    parser.add_argument("--modelopt", default=".venv-modelopt/bin/python", help="the Python that has ModelOpt")
    parser.add_argument("--page", action="store_true", help="write the page and nothing else")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    end = time.monotonic() + 60 * given.minutes
    cells = Cells(folder=RESULTS, spent=lambda: time.monotonic() > end)
    try:
        for name in [] if given.page else given.models:
            bench = Bench(
                name=name,
                cifar=given.cifar,
                peers=given.peers,
                pruner=given.pruner,
                threads=given.threads,
                olive=given.olive,
                modelopt=given.modelopt,
            )
            run(cells, bench, given.tools, given.effort, given.epochs)
    except TimeUp:
        print("the time is used up; the same command goes on from here", flush=True)
    (DOCS / "compress-figures.md").write_text(page(cells))
    for cell in cells.find(part="made", tool="kompakt"):
        (DOCS / f"compress-{cell['key']['model']}.svg").write_text(plot(cell["candidates"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
