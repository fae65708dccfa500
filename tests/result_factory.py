"""Fabricated results for the tests of the report: realistic in shape, invented in their figures."""

from kompakt.measure.result import Budget, Drop, Latency, Layer, LeftAlone, Measurement, Parity, Result, Stage

SNIPPET = """import numpy as np
import onnxruntime as ort

session = ort.InferenceSession("model.onnx")
image = np.zeros((1, 3, 32, 32), dtype=np.float32)
scores = session.run(None, {"x": image})[0]
print(scores.argmax(1))
"""
EXAMPLES = 10_000


def latency(p50: float) -> Latency:
    return Latency(p50=p50, p90=round(1.08 * p50, 4), threads=1, batch=1, runs=400)


def measurement(name: str, accuracy: float | None, size: int, ms: float | None, macs: int, params: int) -> Measurement:
    half = 0.0055
    return Measurement(
        name=name,
        file=f"{name}.onnx",
        accuracy=accuracy,
        accuracy_ci95=None if accuracy is None else (accuracy - half, accuracy + half),
        examples=0 if accuracy is None else EXAMPLES,
        size_bytes=size,
        latency_ms=None if ms is None else latency(ms),
        peak_memory_bytes=18_300_000 + 4 * params,
        macs=macs,
        params=params,
        bits_per_weight=min(32.0, round(8 * size / params, 2)),
    )


def resnet_layers() -> tuple[Layer, ...]:
    """The 22 layers of a CIFAR ResNet-20 with its two shortcut convolutions, channels cut by a third."""
    layers = [layer("conv1", (11, 3, 3, 3), 32, 8, 0)]
    widths = ((11, 32), (21, 16), (43, 8))
    before = 11
    for stage, (width, side) in enumerate(widths, start=1):
        for block in range(3):
            prefix = f"layer{stage}.{block}"
            layers.append(layer(f"{prefix}.conv1", (width, before, 3, 3), side, 4, len(layers)))
            layers.append(layer(f"{prefix}.conv2", (width, width, 3, 3), side, 4, len(layers)))
            if block == 0 and stage > 1:
                layers.append(layer(f"{prefix}.shortcut.0", (width, before, 1, 1), side, 8, len(layers)))
            before = width
    layers.append(layer("fc", (10, before), 1, 8, len(layers)))
    return tuple(layers)


def layer(name: str, shape: tuple[int, ...], side: int, bits: float, index: int) -> Layer:
    params = 1
    for size in shape:
        params *= size
    return Layer(
        name=name,
        kind="conv2d" if len(shape) == 4 else "linear",
        shape=shape,
        params=params,
        macs=params * side * side,
        weight_bits=bits,
        activation_bits=8,
        weight_sqnr_db=6.1 * bits - 3.4 + (index * 37 % 11) / 4,
        output_sqnr_db=33.0 - 0.55 * (index % 22) + (index * 53 % 17) / 5,
        latency_ms=round(params * side * side / 4.1e8 + 0.0012 + (index * 29 % 13) / 5000, 5),
        sensitivity=round(0.8 / (1 + index) + (index * 31 % 7) / 90, 4),
        note="kept at 8 bits: first layer" if index == 0 else ("kept at 8 bits: last layer" if name == "fc" else ""),
    )


def result(**changes: object) -> Result:
    """A ResNet-20 through three stages; ``changes`` replace fields."""
    baseline = measurement("baseline", 0.9162, 1_120_340, 0.812, 40_813_184, 272_474)
    pruned = measurement("pruned", 0.9131, 522_911, 0.531, 19_402_112, 124_980)
    mixed = measurement("mixed", 0.9098, 98_420, 0.402, 19_402_112, 124_980)
    tuned = measurement("compressed", 0.9120, 97_913, 0.396, 19_402_112, 124_980)
    fields: dict[str, object] = {
        "command": "kompakt compress kompakt.models:resnet20 --data cifar10 --max-drop 1.0 --out out",
        "model": "kompakt.models:resnet20",
        "data": "cifar10/test",
        "target": "onnxruntime",
        "baseline": baseline,
        "compressed": tuned,
        "drop_points": 0.42,
        "drop_ci95": (0.08, 0.76),
        "budget": Budget(max_drop=1.0, met=True),
        "stages": (
            Stage(
                name="prune",
                did="removed a third of the channels, then 10 epochs with the original as teacher",
                measurement=pruned,
                drop=Drop(points=0.31, ci95=(-0.02, 0.64)),
            ),
            Stage(
                name="mixed precision",
                did="4-bit weights, 8 bits where the error was largest, 8-bit activations",
                measurement=mixed,
                drop=Drop(points=0.64, ci95=(0.29, 0.99)),
            ),
            Stage(
                name="quantization-aware training",
                did="5 epochs, distilled from the original",
                measurement=tuned,
                drop=Drop(points=0.42, ci95=(0.08, 0.76)),
            ),
        ),
        "layers": resnet_layers(),
        "left_alone": (
            LeftAlone(name="avgpool", reason="no weights"),
            LeftAlone(
                name="layer2.0.shortcut.0", reason="its channels are tied to the residual stream, which is 8-bit"
            ),
            LeftAlone(
                name="layer3.0.shortcut.0", reason="its channels are tied to the residual stream, which is 8-bit"
            ),
        ),
        "decisions": (
            "conv1 and fc stay at 8 bits: they hold 0.9 % of the bytes and cost 0.5 points at 4 bits.",
            "layer3.0.conv1 was tried at 3 bits and returned to 4: the drop rose from 0.42 to 1.31 points.",
            "7-bit weights in conv1: this machine saturates 8-bit products (AVX2 without VNNI).",
        ),
        "parity": Parity(top1_agreement=0.9993, max_abs_error=0.0312, output_step=0.0624, sqnr_db=41.7, examples=2000),
        "snippet": SNIPPET,
        "files": {"model": "model.onnx", "packed": "model.kpk", "plan": "plan.json", "result": "result.json"},
        "versions": {"kompakt": "0.1.0", "torch": "2.14.1", "onnxruntime": "1.32.0", "python": "3.11.9"},
        "machine": {"cpu": "AMD EPYC (Zen 3), AVX2", "cores": "2", "memory": "8.0 GB", "system": "Linux 6.1"},
        "seed": 0,
        "wall_s": 1743.2,
    }
    return Result.model_validate(fields | changes)


def bare() -> Result:
    """The least that a result can hold: two files and their sizes."""
    empty = {"macs": 0, "params": 0}
    return Result(
        command="kompakt pack model.onnx -o model.kpk",
        model="model.onnx",
        data="",
        target="onnxruntime",
        baseline=Measurement(name="baseline", file="model.onnx", size_bytes=1000, **empty),
        compressed=Measurement(name="packed", file="model.kpk", size_bytes=0, **empty),
        budget=Budget(max_drop=None, met=True),
    )


def many_layers(count: int, prefix: str = "backbone.stages") -> tuple[Layer, ...]:
    return tuple(
        layer(f"{prefix}.{n // 12}.blocks.{n % 12}.attn.qkv", (8 + 3 * (n % 50), 16, 3, 3), 1 + n % 30, 2 + n % 7, n)
        for n in range(count)
    )
