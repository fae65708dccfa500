"""Deep Compression on MNIST, then the modern way: python -m examples.deep_compression [--data DIR] [--seeds 3].

Han, Mao, Dally 2016 (arXiv 1510.00149): prune, share weights by k-means, code by Huffman, training after each of the
first two. LeNet-300-100 and LeNet-5 are trained here, every stage is measured, and the stages' bytes are counted as
the paper counts them (``examples.deep_stages``). Then the same networks are trained for rate: integers at the prices of
kompakt's coder, which rise over the training; of several prices of a bit the validation split picks one.

Accuracies are of ONNX Runtime on files read back from ``.kpk``, on the 10,000 test images; the drop is against the
network as first trained. Cells are written as they are done to ``benchmarks/results/deep_compression.jsonl`` and not
measured again; ``--page`` writes docs/deep-compression.md from them.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from examples.deep_page import write_page
from examples.deep_stages import PAPER, clustered, cut, sizes
from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.splice import unpack_file
from kompakt.artifact.targets import target
from kompakt.build.quantize import quantize
from kompakt.build.train import Hooks, TrainSettings, shuffled, train
from kompakt.data import open_data
from kompakt.graph.trace import Capture
from kompakt.job import Job
from kompakt.models import load_model
from kompakt.plan.plan import Plan, Share
from kompakt.plan.recipe import FinetuneSection, Recipe
from kompakt.shrink import NO_STATS, prepare
from kompakt.slim import slim
from kompakt.training import keeper

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "deep_compression.jsonl"
MNIST = {"input_size": 28, "channels": 1, "mean": (0.1307,), "std": (0.3081,)}
EPOCHS = {"lenet300": (8, 4, 2, 25), "lenet5": (3, 2, 1, 12)}
"""Of the first training, after pruning, of centroids, for rate."""
LEARNING_RATE = {"lenet300": 0.02, "lenet5": 0.01}
"""For rate; LeNet-5 has no norms."""
RATES = {"lenet300": (6e-8,), "lenet5": (1.1e-8,)}
AUGMENT = {"lenet300": "shift", "lenet5": "none"}
"""Of the images of that training: what is connected fully knows no shift by itself."""
RISE = 0.6
"""The share of the training for rate over which the price rises."""
MARGIN = 0.1


def trained(model: nn.Module, job: Job, epochs: int, after_step: tuple[Callable, ...] = ()) -> nn.Module:
    """Train in place by Nesterov's SGD and return the model."""
    settings = TrainSettings(epochs=epochs, learning_rate=0.02, weight_decay=5e-4, channels_last=True, seed=job.seed)
    train(model, shuffled(job.data.train, 128, seed=job.seed), settings, hooks=Hooks(after_step=after_step))
    return model.eval()


def packed(job: Job, capture: Capture, split: Any, reference: Any = None) -> dict[str, Any]:
    """Write a capture as ``.kpk``, read it back and score it; the drop in points against ``reference``."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        made = job.target.export(capture, folder / "made.onnx", metadata={})
        size = pack_onnx(made, folder / "made.kpk")
        unpack_file(folder / "made.kpk", folder / "back.onnx")
        score = job.judge.score(folder / "back.onnx", split)
    found = {"kpk_bytes": size, "score": score, "accuracy": 100 * score.accuracy}
    if reference is not None:
        drop = job.judge.drop(reference, score)
        found |= {"drop": drop.points, "drop_ci95": drop.ci95}
    return found


def classic(job: Job, model: nn.Module, name: str, test: Any) -> list[dict[str, Any]]:
    """Prune, share, code: a row a stage, sizes as the paper counts them."""
    after_pruning, after_sharing = EPOCHS[name][1:3]
    masks = cut(model, name)
    keeper(masks)(model, 0)
    trained(model, job, after_pruning, (keeper(masks),))
    rows = [{"stage": "prune"} | packed(job, prepare(replace(job, model=model)).capture, job.data.test, test)]
    books = clustered(model, name)
    project = mean_of(books)
    project(model, 0)
    trained(model, job, after_sharing, (project,))
    shared = prepare(replace(job, model=model)).capture
    entries = tuple(Share(tensor=layer, bits=bits) for layer, (_, bits) in books.items())
    made = packed(job, quantize(shared, Plan(entries=entries), NO_STATS), job.data.test, test)
    counted = sizes(model, {layer: bits for layer, (_, bits) in books.items()})
    rows[0]["bytes"] = counted["prune"]
    return [*rows, {"stage": "share", "bytes": counted["share"]} | made,
            {"stage": "huffman", "bytes": counted["huffman"]} | made]  # fmt: skip


def mean_of(books: dict[str, tuple[Tensor, int]]) -> Callable[[nn.Module, int], None]:
    """Return a hook that gives the weights of a cluster their mean, zeros staying zero: the gradient of a centroid."""

    def after_step(model: nn.Module, step: int) -> None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in books:
                    index = books[name][0].reshape(-1)
                    count = torch.bincount(index).clamp(min=1)
                    mean = torch.bincount(index, weights=weight.detach().reshape(-1)) / count
                    mean[0] = 0
                    weight.copy_(mean[index].reshape(weight.shape))

    return after_step


def modern(job: Job, model: nn.Module, name: str, references: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Train for rate at several prices of a bit: a row each, with its drop on validation too; the control is free."""
    rows = []
    for rate in (None, *RATES[name]):
        section = FinetuneSection(epochs=EPOCHS[name][3], learning_rate=LEARNING_RATE[name], rate=rate,
                                  rise=RISE, augment=AUGMENT[name], channels_last=True)  # fmt: skip
        made = slim(replace(job, model=model, recipe=Recipe(finetune=section)), example(job)).model
        source = prepare(replace(job, model=made))
        ships = source.kept() if rate else source.capture
        row = {"stage": "rate" if rate else "control", "rate": rate} | packed(job, ships, job.data.test, references[1])
        row["validation_drop"] = packed(job, ships, job.data.validation, references[0])["drop"]
        rows.append(row | {"bytes": row["kpk_bytes"]})
        print(f"{name}, seed {job.seed}: {rate} nats a bit, {row['kpk_bytes']:,} bytes, {row['drop']:+.2f}", flush=True)
    return rows


def example(job: Job) -> Tensor:
    """Two inputs."""
    return next(iter(job.data.train.batches(2, limit=2)))[0]


def network(name: str, data: Any, seed: int, cells: list[dict[str, Any]]) -> None:
    """All rows of one network under one seed, those that are missing."""
    if any(cell["network"] == name and cell["seed"] == seed for cell in cells):
        return
    began = time.process_time()
    torch.manual_seed(seed)
    model = load_model(f"kompakt.zoo:{name}")
    job = Job(model=model, name=name, data=data, source="mnist", target=target("onnxruntime"), out=RESULTS.parent,
              seed=seed, progress=False)  # fmt: skip
    trained(model, job, EPOCHS[name][0])
    capture = prepare(job).capture
    full = 4 * sum(p.numel() for p in model.parameters())
    first = packed(job, capture, job.data.test)
    validation, test = packed(job, capture, job.data.validation)["score"], first["score"]
    rows = [{"stage": "float", "bytes": full} | first]
    rows += modern(job, model, name, (validation, test))
    rows += classic(job, model, name, test)
    cell = {"network": name, "seed": seed, "process_s": time.process_time() - began,
            "rows": [{key: value for key, value in row.items() if key != "score"} for row in rows]}  # fmt: skip
    cells.append(cell)
    print(json.dumps(cell), flush=True)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(cell) + "\n")


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/mnist", help="folder of PNG, train/ and test/")
    parser.add_argument("--networks", nargs="+", default=list(PAPER), choices=list(PAPER))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="only write docs/deep-compression.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    cells = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if not arguments.page:
        data = open_data(arguments.data, progress=False, **MNIST)
        for seed in range(arguments.seeds):
            for name in arguments.networks:
                network(name, data, seed, cells)
    write_page(cells, ROOT / "docs" / "deep-compression.md", MARGIN, EPOCHS)


if __name__ == "__main__":
    main()
