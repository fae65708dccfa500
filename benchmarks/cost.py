"""What a compression costs, and what a second worker saves: ``python -m benchmarks.cost``.

Cost: ``compress`` of CIFAR ResNets to 8-bit integers and to integers by rate, every cell in a process of its own, in
seconds of the processor and memory at its peak, against the number of weights and against calibration images. Decoding
the images is not counted; 500 are scored, once for validation and once for test. Workers: one search of so many
candidates, by one ``kompakt compress`` and by two that share its folder, in seconds of the wall clock.

Cells are lines of ``benchmarks/results/cost/*.jsonl``; one that is there is not measured again. Writes ``docs/cost.md``
and its plots.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.prune_subjects import ROOT
from benchmarks.prune_table import Cells
from kompakt.artifact.targets import target
from kompakt.data import open_data
from kompakt.errors import InputError
from kompakt.job import Job
from kompakt.models import load_model
from kompakt.plan.recipe import QuantizeSection, Recipe
from kompakt.report.curves import Curve, curves_svg
from kompakt.search import compress

RESULTS, DOCS = ROOT / "benchmarks" / "results" / "cost", ROOT / "docs"
MODELS, IMAGES = ("resnet20", "resnet32", "resnet56"), (64, 256, 1024)
USUAL, SCORED, CANDIDATES = 256, 500, 8
ROUTES: dict[str, float | None] = {"8-bit integers": None, "integers by rate": 3e-8}
CLI = "from kompakt.cli import main; main()"
HEAD = """# What a compression costs

Written by `python -m benchmarks.cost` from `benchmarks/results/cost`. `compress` of CIFAR ResNets, seconds of one core
and memory of the process at its peak; decoding images is not counted, 500 are scored for validation and for test.
"""


def once(name: str, images: int, rate: float | None, cifar: str) -> dict[str, Any]:
    """Compress one network in this process; tell the seconds of the processor and the peak of memory."""
    torch.set_num_threads(1)
    data = open_data(cifar, input_size=32, validation=SCORED, progress=False)
    data = replace(data, test=data.test.subset(SCORED, seed=0), validation=data.validation.subset(SCORED, seed=0))
    model = load_model(f"kompakt.zoo:{name}").eval()
    asked = Recipe(quantize=QuantizeSection(calibration_examples=images, rate=rate))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model=model, name=name, data=data, source=cifar, target=target("onnxruntime"), out=Path(folder),
            recipe=asked, seconds=1.0, progress=False,
        )  # fmt: skip
        started = time.process_time()
        compress(job)
        spent = time.process_time() - started
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_s": spent, "peak_bytes": peak, "weights": sum(p.numel() for p in model.parameters())}


def apart(name: str, images: int, rate: float | None, cifar: str) -> dict[str, Any]:
    """Do the same in a process of its own."""
    words = ["--cell", name, str(images), str(rate or 0), "--cifar", cifar]
    done = subprocess.run([sys.executable, "-m", "benchmarks.cost", *words], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise InputError(f"{name}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def searched(workers: int, cifar: str) -> dict[str, Any]:
    """Let so many workers share one search; tell the seconds until the last one ends."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["compress", "kompakt.zoo:resnet20", "--data", cifar, "--input-size", "32", "--max-drop", "1"]
        words += ["--candidates", str(CANDIDATES), "--out", folder, "--quiet"]
        weights = ROOT.parent / "shared" / "zoo" / "resnet20-cifar10.safetensors"
        command = [sys.executable, "-c", CLI, *words, *(("--weights", str(weights)) if weights.exists() else ())]
        started = time.monotonic()
        running = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(workers)]
        statuses = [each.wait() for each in running]
    if any(status not in (0, 3) for status in statuses):
        raise InputError(f"workers ended with statuses {statuses}")
    return {"wall_s": time.monotonic() - started, "cores": os.cpu_count()}


def page(cells: Cells) -> str:
    """Write the page."""
    found = sorted(cells.find(part="cost"), key=lambda cell: (cell["weights"], cell["key"]["images"]))
    lines = [HEAD, "![against weights](cost-weights.svg) ![against calibration images](cost-images.svg)", ""]
    lines += ["| network | weights | calibration images | route | seconds | memory at its peak |", "| --- " * 6 + "|"]
    for cell in found:
        key = cell["key"]
        lines.append(
            f"| {key['model']} | {cell['weights']:,} | {key['images']} | {key['route']} | {cell['process_s']:.0f} | "
            f"{cell['peak_bytes'] / 1e6:.0f} MB |"
        )
    alone, two = ({cell["key"]["workers"]: cell for cell in cells.find(part="workers")}.get(n) for n in (1, 2))
    lines += ["", "## Two workers on one search", ""]
    if alone and two:
        sooner = alone["wall_s"] / two["wall_s"]
        lines.append(
            f"{CANDIDATES} candidates of ResNet-20: two workers that share the folder end {sooner:.2f} "
            f"times sooner than one ({two['cores']} cores, load {alone['load']:.1f} and {two['load']:.1f} at the end); "
            "asked were 1.7."
        )
    else:
        lines.append("Not measured yet.")
    return "\n".join([*lines, ""])


def plots(cells: Cells) -> dict[str, str]:
    """Draw seconds against weights and against calibration images."""
    found = sorted(cells.find(part="cost"), key=lambda cell: (cell["weights"], cell["key"]["images"]))
    usual = [cell for cell in found if cell["key"]["images"] == USUAL]
    small = [cell for cell in found if cell["key"]["model"] == MODELS[0]]
    return {
        "cost-weights.svg": _curves("seconds against thousands of weights", usual, lambda cell: cell["weights"] / 1000),
        "cost-images.svg": _curves("seconds against calibration images", small, lambda cell: cell["key"]["images"]),
    }


def _curves(title: str, cells: list[dict[str, Any]], along: Any) -> str:
    curves = (
        Curve(name=route, points=tuple((along(c), c["process_s"]) for c in cells if c["key"]["route"] == route))
        for route in ROUTES
    )
    return curves_svg(title, tuple(curves), low=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost")
    parser.add_argument("--only", choices=["cost", "workers"], help="this part; both by default")
    parser.add_argument("--cifar", default="/tmp/data", help="CIFAR-10 as an image folder")
    parser.add_argument("--page", action="store_true", help="write the page and nothing else")
    parser.add_argument("--cell", nargs=3, metavar=("MODEL", "IMAGES", "RATE"), help="measure one in this process")
    given = parser.parse_args()
    if given.cell:
        name, images, rate = given.cell
        print(json.dumps(once(name, int(images), float(rate) or None, given.cifar)))
        return 0
    cells = Cells(folder=RESULTS, spent=lambda: False)
    wanted = [(name, USUAL) for name in MODELS] + [(MODELS[0], images) for images in IMAGES if images != USUAL]
    for name, images in wanted if given.only != "workers" and not given.page else []:
        for route, rate in ROUTES.items():
            key = {"part": "cost", "model": name, "images": images, "route": route}
            cells.get(key, lambda n=name, i=images, r=rate: apart(n, i, r, given.cifar))
    for workers in (1, 2) if given.only != "cost" and not given.page else ():
        key = {"part": "workers", "model": MODELS[0], "workers": workers}
        cells.get(key, lambda w=workers: searched(w, given.cifar))
    (DOCS / "cost.md").write_text(page(cells))
    for name, picture in plots(cells).items():
        (DOCS / name).write_text(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
