"""torch-pruning, fine-tuning and ONNX Runtime's int8, one after the other, as a user puts them together.

``python -m benchmarks.peers.torch_pruning_chain NAME IMAGES CALIBRATION OUT RATIO EPOCHS``: groups of channels go
by their norms until the multiplications are ``RATIO`` times fewer, in the way that docs/prune.md finds best for this
network; then SGD on the labels with crops and flips; then ``quantize_static`` with 7-bit weights, as ONNX Runtime
advises for processors without VNNI.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torchvision import datasets, transforms

from benchmarks.peers.clock import tell, timed
from benchmarks.peers.ort_static import run as quantize
from benchmarks.prune_subjects import SUBJECTS, build, example

RATE, MOMENTUM, DECAY, BATCH, STEPS = 0.02, 0.9, 5e-4, 128, 60
WHOLE = {"resnet18": True, "resnet20": False}
"""Whether residual streams lose channels too; it cannot follow ResNet-20's."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prune(
    model: torch.nn.Module, inputs: torch.Tensor, kept: list[torch.nn.Module], ratio: float, compare: bool
) -> None:
    """Remove channels in small steps until the multiplications are few enough; ``compare`` layers with one another."""
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=compare,
        pruning_ratio=0.9,
        max_pruning_ratio=0.9,
        iterative_steps=STEPS,
        ignored_layers=kept,
    )
    budget = tp.utils.count_ops_and_params(model, inputs)[0] / ratio
    for _ in range(STEPS):
        if tp.utils.count_ops_and_params(model, inputs)[0] <= budget:
            return
        pruner.step()


def finetune(model: torch.nn.Module, folder: Path, size: int, epochs: int) -> None:
    """Train on all of the training images."""
    steps = [transforms.Resize(size), transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    images = datasets.ImageFolder(str(folder / "train"), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * len(loader), pct_start=0.1)
    model.train()
    for epoch in range(epochs):
        for inputs, labels in loader:
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: last loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


def run(name: str, images: Path, calibration: Path, out: Path, ratio: float, epochs: int) -> None:
    """Make ``out / model.onnx``, and ``out / float.onnx`` on the way."""
    torch.manual_seed(0)
    model, inputs = build(name), example(name)
    ends = ("linear" if name == "resnet20" else "fc", *(() if WHOLE[name] else SUBJECTS[name].ends))
    compare = name == "resnet20" and ratio <= 2
    prune(model, inputs, [model.get_submodule(end) for end in ends], ratio, compare)
    finetune(model, images, SUBJECTS[name].size, epochs)
    batch = {0: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        model, (inputs,), str(out / "float.onnx"), dynamo=True, dynamic_shapes=(batch,), external_data=False
    )
    quantize(out / "float.onnx", np.load(calibration), out, "u8s8-per-channel-7bit")


def main() -> None:
    name, (images, calibration, out) = sys.argv[1], map(Path, sys.argv[2:5])
    ratio, epochs = float(sys.argv[5]), int(sys.argv[6])
    torch.set_num_threads(int(sys.argv[7]) if len(sys.argv) > 7 else 1)
    _, seconds = timed(lambda: run(name, images, calibration, out, ratio, epochs))
    tell(seconds, ("torch-pruning", "torch", "onnxruntime"))


if __name__ == "__main__":
    main()
