"""Below eight bits on LeNet-5 and LeNet-300-100: ``python -m benchmarks.bits --only mnist``.

Every row is a recipe, carried out as ``kompakt compress --recipe`` does it; the networks are trained here first, in
about a minute. The control is the float network given the same further training. Peers are measured on ResNet-20.
*Ends at 8*: the first and the last layer have 8 bits; the first has 88 % of the weights of LeNet-300-100.
"""

from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.prune_cells import packed, unpacked
from benchmarks.prune_subjects import ROOT
from benchmarks.prune_table import Cells
from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.targets import target
from kompakt.build.train import TrainSettings, shuffled, train
from kompakt.data import Data, open_data
from kompakt.job import Job
from kompakt.measure.accuracy import Score, paired_drop
from kompakt.plan.recipe import Recipe
from kompakt.search import make
from kompakt.zoo import lenet5, lenet300

IMAGES, EPOCHS, TAUGHT = 10_000, 6, 2
NETS = {"lenet300": lenet300, "lenet5": lenet5}
FOLDER = ROOT / "out" / "bits-mnist"
QAT = f"[qat]\nepochs = {TAUGHT}\nlearning_rate = 0.01\n"
ROWS: dict[str, str] = {
    "fp32": "",
    "control": f"[finetune]\nepochs = {TAUGHT}\nlearning_rate = 0.01\n",
    "W8A8": "[quantize]\n",
    "codebook 4, not trained": "[quantize]\ncodebook = 4\n",
    "codebook 2, not trained": "[quantize]\ncodebook = 2\n",
    "W4A4": f"[quantize]\nweight_bits = 4\nactivation_bits = 4\n{QAT}",
    "W2A2": f"[quantize]\nweight_bits = 2\nactivation_bits = 2\nkeep_ends = true\n{QAT}",
    "ternary W (TWN), A8": f'[quantize]\nweight_bits = 2\n{QAT}weights = "ternary"\n',
    "ternary W (TTQ)": f'[quantize]\ncodebook = 2\ncodebook_grid = "ternary"\ncodebook_granularity = "channel"\n{QAT}',
    "binary W, A8": f'[quantize]\nweight_bits = 1\n{QAT}weights = "binary"\n',
    "binary W, binary A": (
        f'[quantize]\nweight_bits = 1\nactivation_bits = 1\nkeep_ends = true\n{QAT}weights = "binary"\n'
    ),
    "APoT 3 W": f'[quantize]\ncodebook = 3\ncodebook_grid = "apot"\ncodebook_granularity = "channel"\n{QAT}',
    "codebook 2": f"[quantize]\ncodebook = 2\n{QAT}",
}


@dataclass(frozen=True)
class Mnist:
    """The data and the trained networks that every row starts from."""

    folder: str

    @cached_property
    def data(self) -> Data:
        """MNIST with a validation part that is taken off train."""
        numbers: dict[str, Any] = {"input_size": 28, "channels": 1, "mean": (0.1307,), "std": (0.3081,)}
        return open_data(self.folder, validation=5000, progress=False, **numbers)

    def network(self, name: str) -> nn.Module:
        """Return a trained network; the first call trains it."""
        torch.manual_seed(0)
        model, path = NETS[name](), FOLDER / f"{name}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            settings = TrainSettings(epochs=EPOCHS, learning_rate=0.05, warmup_epochs=0.5, seed=0)
            train(model, shuffled(self.data.train, 128, seed=0), settings)
            save_file(model.state_dict(), path)
        model.load_state_dict(load_file(path))
        return model.eval()

    def measure(self, name: str, row: str, seed: int) -> dict[str, Any]:
        """Carry out a row's recipe, score the file on the test split, count its bytes."""
        out = FOLDER / f"{name}-{row}-{seed}".replace(" ", "-").replace(",", "")
        out.mkdir(parents=True, exist_ok=True)
        recipe = Recipe.from_toml(ROWS[row])
        if "[quantize]" not in ROWS[row]:
            recipe = recipe.model_copy(update={"quantize": None})
        job = Job(
            model=self.network(name), name=name, data=self.data, source=self.folder, target=target("onnxruntime"),
            out=out, recipe=recipe, seed=seed, progress=False,
        )  # fmt: skip
        path = make(job).chosen.path
        correct = job.judge.score(path, self.data.test).correct
        sizes = {"onnx_bytes": path.stat().st_size, "kpk_bytes": pack_onnx(path, out / "model.kpk")}
        return {"accuracy": float(correct.mean()), "correct": packed(correct), **sizes}


def run(cells: Cells, folder: str, seeds: int) -> None:
    """Measure every row of both networks, seed by seed; rows that are not trained once."""
    mnist = Mnist(folder)
    for name in NETS:
        for row, text in ROWS.items():
            for seed in range(seeds if "epochs" in text else 1):
                key = {"part": "mnist", "model": name, "row": row, "recipe": text, "seed": seed}
                cells.get(key, lambda n=name, r=row, s=seed: mnist.measure(n, r, s))


def page(cells: Cells) -> list[str]:
    """Write the section of ``docs/bits.md``."""
    lines = ["## MNIST: LeNet-300-100 and LeNet-5", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    for name in NETS:
        bases = cells.find(part="mnist", model=name, row="fp32")
        lines += [
            f"### {name}",
            "",
            "| | ends at 8 | seeds | error, % | drop, points, by seed | ONNX, kB | `.kpk`, kB |",
        ]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |", *(_row(cells, name, row, bases) for row in ROWS)]
        lines.append("")
    return lines


def _row(cells: Cells, name: str, row: str, bases: list[dict[str, Any]]) -> str:
    found = cells.find(part="mnist", model=name, row=row)
    if not found or not bases:
        return f"| {row} | | | not run yet | | | |"
    base = Score(correct=unpacked(bases[0]["correct"], IMAGES))
    drops = [paired_drop(base, Score(correct=unpacked(cell["correct"], IMAGES))) for cell in found]
    said = "; ".join(f"{drop.points:.2f} ({drop.ci95[0]:.2f} to {drop.ci95[1]:.2f})" for drop in drops)
    sizes = " | ".join(f"{mean(cell[kind] for cell in found) / 1e3:.1f}" for kind in ("onnx_bytes", "kpk_bytes"))
    error = 100 * (1 - mean(cell["accuracy"] for cell in found))
    ends = "yes" if "keep_ends" in ROWS[row] else ""
    return f"| {row} | {ends} | {len(found)} | {error:.2f} | {'' if row == 'fp32' else said} | {sizes} |"
