"""Quantization-aware training by Brevitas and by torchao, as ``benchmarks.bits`` trains kompakt's.

``python -m benchmarks.peers.bits_training train --seed 0 --epochs 1``: ResNet-20 at 4-bit weights and activations in
Brevitas (first and last layer at 8 bits), with the batches, teacher, optimizer and learning rates of kompakt's rows.
``… steps --seconds 60``: one training step in fp32, under kompakt (W4A4), Brevitas (W4A4) and torchao (PT2E, W8A8, the
only width that it trains for convolutions), interleaved in one process. Prints one JSON line. Runs where Brevitas and
torchao are installed.
"""

import argparse
import copy
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.graph.calibrate import calibration_mode
from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchao.quantization.pt2e import move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from benchmarks.bits_cells import BATCH, Bench, aware_of, objective, settings_of
from benchmarks.bits_table import QAT
from benchmarks.prune_cells import packed
from benchmarks.prune_subjects import build
from kompakt.augment import crop_and_flip
from kompakt.build.distill import Teacher
from kompakt.build.train import shuffled, train
from kompakt.measure.latency import interleave
from kompakt.plan.recipe import QuantizeSection

BITS, ENDS = 4, 8


def brevitas_form(model: nn.Module, inputs: Tensor) -> fx.GraphModule:
    """Put Brevitas's layers and activations in the place of a network's own, and calibrate them on ``inputs``."""
    made = fx.symbolic_trace(copy.deepcopy(model))
    layers = [(name, module) for name, module in made.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for number, (name, module) in enumerate(layers):
        bits = ENDS if number in (0, len(layers) - 1) else BITS
        parent, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(parent), leaf, _layer(module, bits))
    relus = [node for node in made.graph.nodes if node.target in (F.relu, torch.relu)]
    for number, node in enumerate(relus):
        # The last ReLU feeds the linear layer, whose inputs have 8 bits in kompakt's rows too.
        bits = ENDS if number == len(relus) - 1 else BITS
        made.add_submodule(f"act{number}", qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits))
        with made.graph.inserting_before(node):
            called = made.graph.call_module(f"act{number}", (node.args[0],))
        node.replace_all_uses_with(called)
        made.graph.erase_node(node)
    image = next(node for node in made.graph.nodes if node.op == "placeholder")
    made.add_submodule("image", qnn.QuantIdentity(bit_width=ENDS))
    with made.graph.inserting_after(image):
        called = made.graph.call_module("image", (image,))
    image.replace_all_uses_with(called, delete_user_cb=lambda user: user is not called)
    made.recompile()
    made.eval()
    with torch.no_grad(), calibration_mode(made):
        made(inputs)
    return made


def _layer(module: nn.Module, bits: int) -> nn.Module:
    """Return Brevitas's layer of the same weights."""
    knobs = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits, "bias": module.bias is not None}
    made: nn.Module
    if isinstance(module, nn.Conv2d):
        size = (module.in_channels, module.out_channels, module.kernel_size)
        made = qnn.QuantConv2d(*size, stride=module.stride, padding=module.padding, **knobs)
    else:
        assert isinstance(module, nn.Linear)
        made = qnn.QuantLinear(module.in_features, module.out_features, **knobs)
    made.load_state_dict(module.state_dict(), strict=False)
    return made


def torchao_form(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Prepare a network for torchao's PT2E training at 8 bits."""
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    captured = torch.export.export(copy.deepcopy(model).eval(), (inputs,)).module()
    made: nn.Module = prepare_qat_pt2e(captured, quantizer)
    return move_exported_model_to_train(made)


def trained(bench: Bench, seed: int, epochs: int) -> dict[str, Any]:
    """Train Brevitas's form and score it in PyTorch, as it stands, on the test images."""
    teacher = build(bench.name)
    part = bench.data.train.subset(QuantizeSection().calibration_examples, seed=0)
    model = brevitas_form(teacher, torch.cat([inputs for inputs, _ in part.batches(32)]))
    loader = shuffled(bench.data.train, BATCH, seed=seed, augment=crop_and_flip)
    given = settings_of(epochs, seed, f"brevitas-{seed}-{epochs}")
    report = train(model, loader, given, objective=objective(True), teachers=(Teacher(model=teacher),))
    model.eval()
    with torch.no_grad():
        right = [model(inputs).argmax(1) == labels for inputs, labels in bench.data.test.batches(250)]
    correct = torch.cat(right).numpy()
    return {"accuracy": float(correct.mean()), "correct": packed(correct), "train_s": report.seconds}


def steps(bench: Bench, seconds: float) -> dict[str, Any]:
    """Time one training step of every form, interleaved; fp32 is the baseline."""
    inputs, labels = next(iter(shuffled(bench.data.train, BATCH, seed=0).batches(0)))
    section = QuantizeSection(**QAT["W4A4"][0] or {})
    model = build(bench.name)
    forms = {
        "fp32": copy.deepcopy(model).train(),
        "kompakt, W4A4": aware_of(bench, section, "steps")[0].module.train(),
        "Brevitas, W4A4": brevitas_form(model, inputs).train(),
        "torchao, W8A8": torchao_form(model, inputs),
    }
    times = interleave({name: _step(form, inputs, labels) for name, form in forms.items()}, rounds=60, seconds=seconds)
    return {name: {"ratio": found.ratio, "ci95": found.ratio_ci95} for name, found in times.items()}


def _step(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return one plain step, the same for all."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, nesterov=True)
    with suppress(RuntimeError):
        model.to(memory_format=torch.channels_last)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return run


def main() -> int:
    """Do what is asked, and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.bits_training")
    parser.add_argument("what", choices=["train", "steps"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cifar", default="/tmp/data")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench("resnet20", given.cifar)
    does = {"train": partial(trained, bench, given.seed, given.epochs), "steps": partial(steps, bench, given.seconds)}
    print(json.dumps(does[given.what]()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
