"""Mixed precision after training by Sony's Model Compression Toolkit: ``python -m benchmarks.peers.mct_mixed 4``.

Weights of ResNet-20 at so many bits on average, each layer at 8, 4 or 2 (the toolkit's own candidates), activations at
8; its defaults otherwise, on the same 512 calibration images as kompakt's rows. Scored in PyTorch, as it stands, on
the test images. Prints one JSON line. Runs where ``model-compression-toolkit`` is installed.
"""

import argparse
import json
import time
from collections.abc import Iterator

import model_compression_toolkit as mct
import torch
from torch import Tensor, nn

from benchmarks.bits_cells import Bench
from benchmarks.prune_cells import packed
from benchmarks.prune_subjects import build
from kompakt.plan.recipe import QuantizeSection

SENSITIVITY_IMAGES = 32


def main() -> int:
    """Quantize, score, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.mct_mixed")
    parser.add_argument("bits", type=float, help="of a weight, on average")
    parser.add_argument("--cifar", default="/tmp/data")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench("resnet20", given.cifar)
    network = build(bench.name).eval()
    part = bench.data.train.subset(QuantizeSection().calibration_examples, seed=0)
    seen = [inputs for inputs, _ in part.batches(32)]

    def representative() -> Iterator[list[Tensor]]:
        for inputs in seen:
            yield [inputs]

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    budget = sum(layer.weight.numel() for layer in layers) * given.bits / 8
    mixed = mct.core.MixedPrecisionQuantizationConfig(num_of_images=SENSITIVITY_IMAGES)
    begun = time.perf_counter()
    made, info = mct.ptq.pytorch_post_training_quantization(
        network,
        representative,
        mct.core.ResourceUtilization(weights_memory=budget),
        core_config=mct.core.CoreConfig(mixed_precision_config=mixed),
        target_platform_capabilities=mct.get_target_platform_capabilities(),
    )
    seconds = time.perf_counter() - begun
    made.eval()
    with torch.no_grad():
        right = [made(inputs).argmax(1) == labels for inputs, labels in bench.data.test.batches(250)]
    correct = torch.cat(right).numpy()
    found = {"accuracy": float(correct.mean()), "correct": packed(correct), "seconds": seconds}
    print(json.dumps(found | {"weight_bytes": float(info.final_resource_utilization.weights_memory)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
