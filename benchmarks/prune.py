"""Channel pruning beside torch-pruning, without training and with: ``python -m benchmarks.prune``.

Every measured cell is a line of ``benchmarks/results/prune/*.jsonl`` with its settings as key; a cell that is there
is not measured again, so the run can be stopped (``--minutes``) and taken up at any time. Settings are chosen on a
part of the training images, for both tools in the same way; the choice is then scored on the 10,000 test images.

torch-pruning runs in a process of its own: ``--other`` names the Python that has it. Writes ``docs/prune.md``.
"""

import argparse
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.prune_cells import OURS, Bench, TimeUp, Tuning, latency, one_shot, tuned
from benchmarks.prune_page import page
from benchmarks.prune_subjects import BN_EXAMPLES, RATIOS, ROOT, SUBJECTS
from benchmarks.prune_table import Cells, best
from kompakt.measure.semi_sparse import semi_sparse, unavailable

RESULTS = ROOT / "benchmarks" / "results" / "prune"
TOOLS = ("kompakt", "torch-pruning")
PARTS = ("one-shot", "tuned", "latency", "semi-sparse")


def peers(bench: Bench, interpreter: str, ratios: list[float]) -> list[str]:
    """Let torch-pruning cut to these ratios, once; return its settings."""
    assert bench.gradients
    paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    command = [interpreter, "-m", "benchmarks.peers.torch_pruning_cut", bench.name, str(bench.folder)]
    subprocess.run([*command, *map(str, ratios)], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
    return sorted({file.stem.rpartition("-")[0] for file in bench.folder.glob("*-*-*.pt")})


def settings(tool: str, cuts: list[str], without: list[str]) -> list[str]:
    """Return the settings of a tool that are to be scored."""
    return [name for name in (OURS if tool == "kompakt" else cuts) if not any(part in name for part in without)]


def run_one_shot(cells: Cells, bench: Bench, cuts: list[str], ratios: list[float], given: argparse.Namespace) -> None:
    """Choose on validation images, then score the choices on the test images."""
    for ratio in ratios:
        for tool in TOOLS:
            for setting in settings(tool, cuts, given.without):
                key = _key(bench, ratio, tool, setting, "bn", "validation")
                cells.get(key, lambda k=key: one_shot(bench, *_what(k)))
    for ratio in ratios:
        mine, theirs = (best(cells, bench.name, ratio, tool, bench.validation) for tool in TOOLS)
        control = "uniform-random-inner"
        rows = [("kompakt", mine, "reconstruct"), ("torch-pruning", theirs, "bn"), ("kompakt", mine, "bn")]
        rows += [("kompakt", control, "bn"), ("kompakt", mine, "none"), ("torch-pruning", theirs, "none")]
        for tool, setting, mend in rows[: given.rows]:
            key = _key(bench, ratio, tool, setting, mend, "test")
            cells.get(key, lambda k=key: one_shot(bench, *_what(k)))


def baseline(cells: Cells, bench: Bench) -> None:
    """Score the unpruned network."""
    key = _key(bench, 1.0, "unpruned", "", "none", "test")
    cells.get(key, lambda: one_shot(bench, *_what(key)))


def run_tuned(cells: Cells, bench: Bench, given: argparse.Namespace, ratios: list[float]) -> None:
    """Train the choices of both tools and the unpruned control, alike."""
    tuning = Tuning(
        epochs=given.epochs,
        learning_rate=given.rate,
        distill=given.distill,
        attention=given.attention,
        hint=given.hint,
        steps=given.steps,
    )
    if "torch-pruning" in given.tools:
        peers(bench, given.other, ratios)
    for seed in given.seeds:
        rows = [("unpruned", "", 1.0, "none")]
        for ratio in ratios:
            rows += [("kompakt", best(cells, bench.name, ratio, "kompakt", bench.validation), ratio, "reconstruct")]
            rows += [("torch-pruning", best(cells, bench.name, ratio, "torch-pruning", bench.validation), ratio, "bn")]
        for tool, setting, ratio, mend in (row for row in rows if row[0] in given.tools):
            how = {**asdict(tuning), "distill": tuning.distill if tool == "kompakt" else 0.0}
            for loss in ("attention", "hint"):
                if tool != "kompakt" or loss not in tuning.features:
                    del how[loss]
            key = {**_key(bench, ratio, tool, setting, mend, "test"), "part": "tuned", "seed": seed, **how}
            cells.get(key, lambda k=key: tuned(bench, *_what(k)[:4], k["seed"], tuning, cells.spent))


def run_latency(cells: Cells, seconds: float) -> None:
    """Time resnet18 at 224, whose weights do not matter."""
    for how in ("30 % of channels", "2×", "4×"):
        key = {"part": "latency", "model": "resnet18@224", "how": how, "align": "auto"}
        cells.get(key, lambda h=how: latency(ROOT / "out" / "prune" / "latency", h, seconds))


def run_semi_sparse(cells: Cells) -> None:
    """Time 2:4 linear layers on the sparse tensor cores, where there are any."""
    if (reason := unavailable()) is not None:
        print(reason, flush=True)
        return
    for size, rows in ((1024, 4096), (4096, 4096), (8192, 4096)):
        key = {"part": "semi-sparse", "model": f"linear {size}", "rows": rows}
        weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        cells.get(key, lambda w=weight, n=rows: asdict(semi_sparse(w, n)))


def _key(bench: Bench, ratio: float, tool: str, setting: str, mend: str, split: str) -> dict[str, Any]:
    counts = {"validation": {"images": bench.validation}, "test": {"images": 10_000}}[split]
    examples = {"bn": bench.bn_examples, "reconstruct": bench.reconstruct_examples, "none": 0}[mend]
    return {
        "part": "one-shot",
        "model": bench.name,
        "ratio": ratio,
        "tool": tool,
        "setting": setting,
        "mend": mend,
        "mend_examples": examples,
        "split": split,
        **counts,
    }


def _what(key: dict[str, Any]) -> tuple[Any, ...]:
    return key["tool"], key["setting"], key["ratio"], key["mend"], key["split"]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune")
    parser.add_argument("--only", choices=PARTS, help="this part; all by default")
    parser.add_argument("--model", choices=SUBJECTS, default="resnet20")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="fewer MACs")
    parser.add_argument("--tools", nargs="+", default=["unpruned", *TOOLS], help="that are trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=Tuning().learning_rate, help="highest learning rate")
    parser.add_argument("--distill", type=float, default=Tuning().distill, help="kompakt's share of soft targets")
    parser.add_argument("--attention", type=float, default=0.0, help="weight of attention maps beside them")
    parser.add_argument("--hint", type=float, default=0.0, help="weight of features at the end of stages beside them")
    parser.add_argument("--threads", type=int, default=1, help="of torch; files are always timed with one")
    parser.add_argument("--steps", type=int, default=0, help="stop training after so many steps: a smoke test")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop cleanly after this time")
    parser.add_argument("--validation", type=int, default=5000, help="images that settings are chosen on")
    parser.add_argument("--bn", type=int, default=BN_EXAMPLES, help="images for batch norms' statistics")
    parser.add_argument("--without", nargs="*", default=[], help="leave out settings whose name contains one of these")
    parser.add_argument("--rows", type=int, default=6, help="so many of the kinds of one-shot row on test images")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each pair of files that is timed")
    parser.add_argument("--cifar", default="/tmp/data", help="CIFAR-10 as an image folder")
    parser.add_argument("--other", default=".venv-torch-pruning/bin/python", help="the Python that has torch-pruning")
    return parser


def main() -> int:
    given = options().parse_args()
    torch.set_num_threads(given.threads)
    end = time.monotonic() + 60 * given.minutes
    cells = Cells(folder=RESULTS, spent=_over(end))
    bench = Bench(
        name=given.model,
        folder=ROOT / "out" / "prune" / given.model,
        bn_examples=given.bn,
        validation=given.validation,
        cifar=given.cifar,
    )
    try:
        if given.only in (None, "one-shot"):
            baseline(cells, bench)
            run_one_shot(cells, bench, peers(bench, given.other, given.ratios), given.ratios, given)
        if given.only in (None, "tuned"):
            run_tuned(cells, bench, given, given.ratios)
        if given.only in (None, "latency"):
            run_latency(cells, given.seconds)
        if given.only in (None, "semi-sparse"):
            run_semi_sparse(cells)
    except TimeUp:
        print("the time is used up; the same command goes on from here", flush=True)
    text = page(cells)
    (ROOT / "docs" / "prune.md").write_text(text)
    print(text)
    return 0


def _over(end: float) -> Callable[[], bool]:
    return lambda: time.monotonic() > end


if __name__ == "__main__":
    raise SystemExit(main())
