"""Bytes against accuracy: python -m benchmarks.size [--networks resnet20 …] [--data DIR] [--rate 1e-6 --epochs 8].

The zoo's networks (CIFAR-10) are packed by kompakt at several prices of a bit and, where it is installed, by NNCodec
at several steps (dependent quantization on, its defaults otherwise). Each file is read back and its network scored in
ONNX Runtime on the validation part of train, by which a user chooses, and on the test images. Beside them: the fp32
file, and it under zstd-19. Cells are written as they are done to ``results/size/NETWORK.jsonl`` and not measured
again; ``--page`` writes docs/size.md from them. With ``--rate``, ``--epochs`` and ``--rise`` the networks are trained
for rate instead (``[finetune] rate``, the original teaching, shifted and mirrored images): one cell. With ``--decode``
a file of kompakt's and one of NNCodec's of about equal accuracy are decoded in turn instead: one cell a pair.

NNCodec wants an environment of its own (``pip install --no-deps nncodec``, pandas, ptflops, torchmetrics, opencv);
run the script there.
"""

import argparse
import base64
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.size_page import write_page
from kompakt.artifact.container import Reader
from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.splice import unpack_file
from kompakt.artifact.targets import target
from kompakt.coding.section import compiled_loops
from kompakt.data import Data, open_data
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.job import Job
from kompakt.measure.latency import interleave
from kompakt.models import load_model
from kompakt.plan.recipe import FinetuneSection, Recipe
from kompakt.shrink import prepare
from kompakt.slim import slim

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "zoo"
RESULTS = ROOT / "benchmarks" / "results" / "size"
NETWORKS = {"resnet20": ("kompakt.zoo:resnet20", 32), "resnet32": ("kompakt.zoo:resnet32", 32),
            "resnet18": ("torchvision/resnet18", 48)}  # fmt: skip
CIFAR = (1.5e-8, 3e-8, 6e-8, 1.2e-7, 7.5e-9, 2.1e-8)
TRADES = {"resnet20": CIFAR, "resnet32": CIFAR, "resnet18": (3e-10, 1e-9, 1e-10, 3e-9)}
STEPS = (-30, -28, -26, -24, -22, -20)
PAIRS = {"resnet20": ((2.1e-8, -26), (6e-8, -20)), "resnet32": ((1.5e-8, -26), (3e-8, -20)),
         "resnet18": ((1e-10, -30),)}  # fmt: skip
"""Prices and steps whose files are about equally accurate (docs/size.md)."""
RUNS = 5
RATE = 0.05
"""Learning rate of training for rate."""


@dataclass(frozen=True)
class Training:
    """Training for rate: its price in nats a bit, how long, and over which share of it the price rises."""

    rate: float
    epochs: int
    rise: float


def measured(cells: list[dict[str, Any]], path: Path, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
    """Do what no cell holds yet, and write it down."""
    if any(all(cell.get(name) == value for name, value in key.items()) and "right" in cell for cell in cells):
        return
    cells.append(key | work())
    print(json.dumps(cells[-1]), flush=True)
    with open(path, "a") as file:
        file.write(json.dumps(cells[-1]) + "\n")


def scores(job: Job, path: Path) -> dict[str, Any]:
    """Accuracy in ONNX Runtime on the validation and the test part, in per cent; which test images were right."""
    test = job.judge.score(path, job.data.test)
    right = base64.b64encode(np.packbits(test.correct.astype(bool)).tobytes()).decode()
    validation = job.judge.score(path, job.data.validation)
    return {"validation": 100 * validation.accuracy, "test": 100 * test.accuracy, "right": right}


def fastest(work: Callable[[], Any]) -> float:
    """Processor seconds of the fastest of several runs."""
    found = []
    for _ in range(RUNS):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def codes(path: Path) -> list[np.ndarray]:
    """All arrays of a file, decoded."""
    with Reader(path) as reader:
        return [array for name in reader.records for array in reader.parts(name).values()]


def ours(job: Job, source: Any, trade: float, folder: Path) -> dict[str, Any]:
    """A file of kompakt's under one price of a bit."""
    start = time.process_time()
    made = job.target.export(source.at(trade), folder / "ours.onnx", metadata={})
    choosing = time.process_time() - start
    size = pack_onnx(made, folder / "ours.kpk")
    unpack_file(folder / "ours.kpk", folder / "back.onnx")
    return {
        "bytes": size,
        "choose_s": choosing,
        "encode_s": fastest(lambda: pack_onnx(made, folder / "ours.kpk")),
        "decode_s": fastest(lambda: codes(folder / "ours.kpk")),
        "compiled": compiled_loops() is not None,
        **scores(job, folder / "back.onnx"),
    }


def trained(job: Job, training: Training, folder: Path) -> dict[str, Any]:
    """A file of kompakt's after training for rate."""
    section = FinetuneSection(**asdict(training), learning_rate=RATE, augment="crop_and_flip")
    recipe = Recipe(finetune=section)
    start = time.process_time()
    made = slim(replace(job, recipe=recipe), next(iter(job.data.train.batches(2, limit=2)))[0]).model
    spent = time.process_time() - start
    path = job.target.export(prepare(replace(job, model=made)).kept(), folder / "trained.onnx", metadata={})
    size = pack_onnx(path, folder / "trained.kpk")
    unpack_file(folder / "trained.kpk", folder / "back.onnx")
    return {
        "bytes": size,
        "choose_s": spent,
        "encode_s": fastest(lambda: pack_onnx(path, folder / "trained.kpk")),
        "decode_s": fastest(lambda: codes(folder / "trained.kpk")),
        "compiled": compiled_loops() is not None,
        **scores(job, folder / "back.onnx"),
    }


def theirs(job: Job, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
    """A file of NNCodec's at one step."""
    from nncodec import nnc

    file = folder / "theirs.nnc"
    encoding = fastest(lambda: compress_theirs(model, step, file))
    found = nnc.decompress(str(file))
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in found.items()}, strict=False)
    example = next(iter(job.data.train.batches(2, limit=2)))[0]
    path = job.target.export(fold(trace(model, example)), folder / "theirs.onnx", metadata={})
    decoding = fastest(lambda: nnc.decompress(str(file)))
    return {"bytes": file.stat().st_size, "encode_s": encoding, "decode_s": decoding, **scores(job, path)}


def compress_theirs(model: nn.Module, step: int, file: Path) -> None:
    """Write a file of NNCodec's."""
    from nncodec import nnc

    state = {name: value.numpy().astype(np.float32) for name, value in model.state_dict().items()
             if "num_batches" not in name}  # fmt: skip
    nnc.compress(state, bitstream_path=str(file), qp=step, use_dq=True)


def raced(job: Job, source: Any, pair: tuple[float, int], model: nn.Module, folder: Path) -> dict[str, Any]:
    """Decode a file of each codec in turn, round after round, in processor time."""
    from nncodec import nnc

    trade, step = pair
    made = job.target.export(source.at(trade), folder / "ours.onnx", metadata={})
    pack_onnx(made, folder / "ours.kpk")
    compress_theirs(model, step, folder / "theirs.nnc")
    runs = {
        "kompakt": lambda: codes(folder / "ours.kpk"),
        "NNCodec": lambda: nnc.decompress(str(folder / "theirs.nnc")),
    }
    times = interleave(runs, seconds=60.0, clock=time.process_time_ns)
    values = sum(array.size for array in codes(folder / "ours.kpk"))
    return {
        "bytes": [(folder / name).stat().st_size for name in ("ours.kpk", "theirs.nnc")],
        "nanoseconds": [1e6 * times[name].p50_ms / values for name in runs],
        "ratio": times["NNCodec"].ratio,
        "ci95": times["NNCodec"].ratio_ci95,
        "rounds": len(times["NNCodec"].samples_ms),
        "compiled": compiled_loops() is not None,
        "right": "",
    }


def plain(job: Job, capture: Any, weights: Path, folder: Path) -> dict[str, Any]:
    """The original, and its bytes under zstd-19 where that is installed."""
    found: dict[str, Any] = {"bytes": weights.stat().st_size}
    if importlib.util.find_spec("zstandard"):
        import zstandard

        found["zstd_bytes"] = len(zstandard.ZstdCompressor(level=19).compress(weights.read_bytes()))
    return found | scores(job, job.target.export(capture, folder / "original.onnx", metadata={}))


def network(name: str, data: Data, training: Training | None, decode: bool = False) -> None:
    """All cells of one network, kompakt's and NNCodec's in turn, or those of training for rate or of decoding."""
    reference, _ = NETWORKS[name]
    weights, arguments = ZOO / f"{name}-cifar10.safetensors", {"num_classes": 10}
    model = load_model(reference, arguments=arguments, weights=weights)
    job = Job(model=model, name=name, data=data, source="cifar10", target=target("onnxruntime"), out=RESULTS,
              progress=False)  # fmt: skip
    path = RESULTS / f"{name}.jsonl"
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if training is not None:
            key = {"codec": "kompakt, trained", "at": training.rate, "epochs": training.epochs, "rise": training.rise}
            measured(cells, path, key, lambda: trained(job, training, folder))
            return
        source = prepare(job)
        for pair in PAIRS[name] if decode else ():
            model.load_state_dict(load_file(weights), strict=False)
            key = {"codec": "decode", "at": pair[0], "qp": pair[1]}
            measured(cells, path, key, lambda p=pair: raced(job, source, p, model, folder))
        if decode:
            return
        measured(cells, path, {"codec": "fp32"}, lambda: plain(job, source.capture, weights, folder))
        for index in range(max(len(TRADES[name]), len(STEPS))):
            for trade in TRADES[name][index : index + 1]:
                measured(cells, path, {"codec": "kompakt", "at": trade}, lambda t=trade: ours(job, source, t, folder))
            for step in STEPS[index : index + 1] if importlib.util.find_spec("nncodec") else ():
                model.load_state_dict(load_file(weights), strict=False)
                measured(cells, path, {"codec": "NNCodec", "at": step}, lambda s=step: theirs(job, model, s, folder))


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--data", default="/tmp/data")
    parser.add_argument("--rate", type=float, help="train for rate: nats a bit")
    parser.add_argument("--epochs", type=int, default=8, help="of training for rate")
    parser.add_argument("--rise", type=float, default=0.5, help="the share of it over which the price rises")
    parser.add_argument("--decode", action="store_true", help="time decoding alone, files of both codecs in turn")
    parser.add_argument("--page", action="store_true", help="only write docs/size.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in [] if arguments.page else arguments.networks:
        training = arguments.rate and Training(arguments.rate, arguments.epochs, arguments.rise)
        network(name, open_data(arguments.data, input_size=NETWORKS[name][1], progress=False), training,
                arguments.decode)  # fmt: skip
    write_page(RESULTS, ROOT / "docs")


if __name__ == "__main__":
    main()
