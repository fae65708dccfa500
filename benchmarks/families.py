"""Trace, quantize, export and run one model of every classification family of torchvision.

``python -m benchmarks.families`` prints a Markdown table and writes it to ``docs/families.md``;
``--only resnet18 --only swin_t`` runs some, and prints them. Every model has a process of its own
and a time limit. The weights are random (nothing is downloaded), so nothing here says how much
accuracy a trained model loses: it says what is captured, what runs in integers, and whether ONNX
Runtime computes what was simulated.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional as F

from kompakt.artifact.onnx import HEAVY_FLOAT_OPS, INTEGER_OPS, export_onnx, open_onnx, runtime_ops
from kompakt.build.integer import exact
from kompakt.build.quantize import quantize
from kompakt.errors import KompaktError
from kompakt.graph.calibrate import calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.measure.accuracy import top_1
from kompakt.measure.latency import interleave
from kompakt.measure.machine import machine, versions
from kompakt.measure.parity import compare, sqnr_db
from kompakt.measure.size import size_bytes
from kompakt.methods.uniform import uniform
from kompakt.plan.plan import Quantize
from kompakt.plan.rules import ONNXRUNTIME

FAMILIES = {
    "alexnet": {},
    "convnext_tiny": {},
    "densenet121": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "maxvit_t": {},
    "mnasnet1_0": {},
    "mobilenet_v2": {},
    "mobilenet_v3_large": {},
    "mobilenet_v3_small": {},
    "regnet_x_400mf": {},
    "regnet_y_400mf": {},
    "resnet18": {},
    "resnet50": {},
    "resnext50_32x4d": {},
    "shufflenet_v2_x1_0": {},
    "squeezenet1_1": {},
    "swin_t": {},
    "swin_v2_t": {},
    "vgg11_bn": {},
    "vit_b_16": {},
    "wide_resnet50_2": {},
}
T = TypeVar("T")
INPUT_SIZE = {"inception_v3": 299}
BATCH, FIT, TEST, CLASSES = 8, 64, 64, 10
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
SHOWN = frozenset({"torch", "torchvision", "onnxruntime"})
PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"


INTRODUCTION = """# Every classification family of torchvision

Made by `python -m benchmarks.families`. Each model is captured, its batch norms folded, quantized post-training
to 8 bits, exported to QDQ ONNX and run by ONNX Runtime. Nothing is downloaded: the weights are random, batch
norms are settled on images, and only the last layer is fitted (ridge regression on 64 crops of scikit-learn's two
photographs; 10 classes: which photograph, which place; 224×224, 299×299 for inception). So the table says little
of the accuracy that a trained model loses. It says what can be captured, what runs in integers, and whether the
runtime computes what was simulated.

- **in integers**: layers (convolutions and linear maps) whose weights ship as integers.
- **integer kernels**, **float Conv/Gemm/MatMul**, **Q and DQ left**: nodes of the graph that ONNX Runtime made of
  the file; products of two activations (attention) are among the float ones.
- **simulated = runtime**: the integers computed in PyTorch (`kompakt.build.integer.exact`) against ONNX Runtime on
  64 other crops: share of equal classes, signal-to-noise ratio (200 = equal), largest difference in 1/255 of the
  outputs' range. Where float ops stand between integer ones, a value in a thousand falls on the other side of a
  rounding, and random deep networks amplify that.
- **accuracy**, **int8 to float**: on the same crops: the original model, and the int8 file in ONNX Runtime.
- **time**: one thread, a batch of one, interleaved; below 1 is faster.
"""
COLUMNS = {
    "model": lambda row: row.name,
    "layers": lambda row: str(row.layers),
    "in integers": lambda row: str(row.integer_layers),
    "integer kernels": lambda row: str(row.integer_kernels),
    "float Conv/Gemm/MatMul": lambda row: str(row.float_layers),
    "Q and DQ left": lambda row: str(row.conversions),
    "simulated = runtime, top-1": lambda row: f"{100 * row.agreement:.1f} %",
    "dB": lambda row: f"{row.parity_db:.0f}",
    "largest difference": lambda row: f"{row.difference:.2f}",
    "accuracy, float → int8": lambda row: f"{100 * row.float_accuracy:.0f} → {100 * row.integer_accuracy:.0f} %",
    "int8 to float, dB": lambda row: f"{row.float_db:.1f}",
    "MB": lambda row: f"{row.float_mb:.1f} → {row.integer_mb:.1f}",
    "time, int8 / float": lambda row: f"{row.time_ratio:.2f}",
    "trace + quantize + export, s": lambda row: f"{row.trace_s:.0f} + {row.quantize_s:.0f} + {row.export_s:.0f}",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one model gave; ``reason`` says what stopped it, and is empty otherwise."""

    name: str
    reason: str = ""
    layers: int = 0
    integer_layers: int = 0
    integer_kernels: int = 0
    float_layers: int = 0
    conversions: int = 0
    agreement: float = 0.0
    parity_db: float = 0.0
    difference: float = 0.0
    float_db: float = 0.0
    float_accuracy: float = 0.0
    integer_accuracy: float = 0.0
    float_mb: float = 0.0
    integer_mb: float = 0.0
    time_ratio: float = 0.0
    trace_s: float = 0.0
    quantize_s: float = 0.0
    export_s: float = 0.0


def measure(name: str, folder: Path) -> Row:
    """Take one model through the whole line and compare its forms."""
    torch.manual_seed(0)
    images, labels = photographs(INPUT_SIZE.get(name, 224))
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **FAMILIES[name])
    settled(model, images[:FIT], labels[:FIT])
    test, truth, files = images[FIT:], labels[FIT:].numpy(), (folder / "float.onnx", folder / "int8.onnx")

    capture, trace_s = timed(lambda: fold(trace(model, images[:2])))
    (integers, quantized), quantize_s = timed(lambda: quantized_capture(capture, images[:FIT]))
    _, export_s = timed(lambda: export_onnx(quantized, files[1]))
    export_onnx(capture, files[0])

    before, simulated, actual = (run(form, test) for form in (model, exact(quantized).module, from_file(files[1])))
    parity = compare(simulated, actual, step=float(np.ptp(simulated)) / 255)
    ops = runtime_ops(files[1])
    return Row(
        name=name,
        layers=len(capture.graph.layers),
        integer_layers=integers,
        integer_kernels=sum(count for op, count in ops.items() if op in INTEGER_OPS),
        float_layers=sum(count for op, count in ops.items() if op in HEAVY_FLOAT_OPS),
        conversions=ops.get("QuantizeLinear", 0) + ops.get("DequantizeLinear", 0),
        agreement=parity.top1_agreement,
        parity_db=parity.sqnr_db,
        difference=parity.max_abs_error / parity.output_step,
        float_db=sqnr_db(before, actual),
        float_accuracy=float(top_1(before, truth).mean()),
        integer_accuracy=float(top_1(actual, truth).mean()),
        float_mb=size_bytes(files[0]) / 1e6,
        integer_mb=size_bytes(files[1]) / 1e6,
        time_ratio=time_ratio(*files, np.ascontiguousarray(test[:1].numpy())),
        trace_s=trace_s,
        quantize_s=quantize_s,
        export_s=export_s,
    )


def quantized_capture(capture: Capture, data: torch.Tensor) -> tuple[int, Capture]:
    """Quantize a folded capture post-training; also tell how many layers that makes integer."""
    plan, _ = uniform(capture.graph, ONNXRUNTIME)
    entries = plan.of(Quantize)
    observed = [entry.tensor for entry in entries if entry.role == "activation" and entry.like is None]
    stats = calibrate(capture, data.split(BATCH), observed)
    weights = {entry.tensor for entry in entries if entry.role == "weight"}
    integers = sum(capture.graph.weight(op).name in weights for op in capture.graph.layers)
    return integers, quantize(capture, plan, stats)


def photographs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut crops out of the two photographs of scikit-learn: ten classes, five places in each.

    Returns:
        Images (n, 3, size, size), and labels (n,): which photograph, which fifth of its width.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    labels = torch.randint(0, CLASSES, (FIT + TEST,), generator=generator)
    crops = []
    for label in labels.tolist():
        picture = pictures[label // 5]
        side, top = (int(torch.randint(*limits, (), generator=generator)) for limits in ((112, 225), (0, 200)))
        left = (picture.shape[2] - side) * (label % 5) // 4
        crop = picture[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return (torch.cat(crops) - MEAN) / STD, labels


def settled(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Give a network of random weights a task, so that its classes stand apart as in a trained one.

    Batch norms get the statistics of the images, ConvNeXt's layer scale a usual size, and the last
    layer is fitted to the labels by ridge regression on the random features below it.
    """
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.constant_(parameter, 0.1)
    for module in model.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    run(model, images)
    head = [module for module in model.eval().modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(2).mean(2) if inputs[0].ndim == 4 else inputs[0])
    )
    run(model, images)
    hook.remove()
    fit(head, torch.cat(seen), F.one_hot(labels, CLASSES).float())
    return model


def fit(head: nn.Module, features: torch.Tensor, wanted: torch.Tensor) -> None:
    """Set a last layer to the ridge regression of ``wanted`` (n, classes) on ``features`` (n, d)."""
    centre = features.mean(dim=0) if head.bias is not None else torch.zeros(features.shape[1])
    centred = features - centre
    gram = centred @ centred.T
    ridge = 0.1 * gram.trace() / len(gram) * torch.eye(len(gram))
    weight = (torch.linalg.solve(gram + ridge, wanted - wanted.mean(dim=0)).T @ centred).contiguous()
    with torch.no_grad():
        head.weight.copy_(weight.reshape(head.weight.shape))
        if head.bias is not None:
            # Squeezenet puts a ReLU behind its last layer: the offset keeps its outputs out of reach.
            offset = 1.0 if isinstance(head, nn.Conv2d) else 0.0
            head.bias.copy_(wanted.mean(dim=0) - weight @ centre + offset)


def run(model: Callable[[torch.Tensor], torch.Tensor], data: torch.Tensor) -> np.ndarray:
    """Run a model over the data, batch by batch."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in data.split(BATCH)]).numpy()


def from_file(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Open an ONNX file as a function of tensors."""
    session = open_onnx(path)
    return lambda batch: torch.from_numpy(session(batch.numpy()))


def time_ratio(before: Path, after: Path, example: np.ndarray) -> float:
    """Measure the time of the second file over that of the first: one thread, batch of one, interleaved."""
    sessions = {"float": open_onnx(before), "int8": open_onnx(after)}
    calls = {name: partial(session, example) for name, session in sessions.items()}
    return interleave(calls, seconds=8)["int8"].ratio


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Do some work and tell how many seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def in_own_process(name: str, limit_s: float) -> Row:
    """Measure one model in a process of its own; what stops it becomes the row's reason."""
    command = [sys.executable, "-m", "benchmarks.families", "--one", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, cwd=PAGE.parents[1], env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return Row(name=name, reason=f"no answer in {limit_s:.0f} s")
    if done.returncode == 0:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    return Row(name=name, reason=(done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])


def one(name: str) -> Row:
    """Measure one model in this process; an error of kompakt's becomes the row's reason."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return measure(name, Path(folder))
        except KompaktError as error:
            return Row(name=name, reason=str(error))


def line(row: Row) -> str:
    """Write a row of the table."""
    if row.reason:
        return f"| {row.name} | {row.reason.replace('|', '/')} |" + " |" * (len(COLUMNS) - 2)
    return "| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |"


def table(rows: list[Row]) -> str:
    """Write the whole table."""
    return "\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), *map(line, rows)])


def page(rows: list[Row]) -> str:
    """Write docs/families.md."""
    done = sum(not row.reason for row in rows)
    where = machine()
    packages = ", ".join(f"{name} {version}" for name, version in versions().items() if name in SHOWN)
    return f"""{INTRODUCTION}
{done} of {len(rows)} went through. Measured on {where["cpu"]}, {where["cores"]} cores, {where["isa"]}; {packages}.

{table(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families")
    parser.add_argument("--only", action="append", choices=FAMILIES, help="run this model and write no page")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for each model")
    parser.add_argument("--one", choices=FAMILIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(asdict(one(arguments.one))))
        return 0
    rows = []
    for name in arguments.only or FAMILIES:
        rows.append(in_own_process(name, arguments.limit))
        print(line(rows[-1]), flush=True)
        if not arguments.only:
            PAGE.write_text(page(rows))
    if not arguments.only:
        print(f"wrote {PAGE}")
    return int(any(row.reason for row in rows))


if __name__ == "__main__":
    sys.exit(main())
