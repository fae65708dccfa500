"""The networks and inputs of ``python -m benchmarks.targets``, as references that ``kompakt`` takes.

``KOMPAKT_SUBJECT`` names the folder that ``prepare`` filled for one network, ``KOMPAKT_SHELF`` that of packages which
are only read (``peers/setup.sh``). Inputs without labels get the float model's own decisions: accuracy is then the
agreement with it.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.ptq_subjects import (
    SHARED,
    STATISTICS_IMAGES,
    SUBJECTS,
    Places,
    Subject,
    cifar,
    estimate_statistics,
    photographs,
)
from kompakt.artifact.onnx import export_onnx, open_onnx
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.images import ImageSpec

SUBJECT, SHELF = "KOMPAKT_SUBJECT", "KOMPAKT_SHELF"


def _mobilenet(shelf: Path) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2(weights=None)


def _trained(shelf: Path) -> nn.Module:
    network = torchvision.models.resnet18(num_classes=10)
    network.load_state_dict(load_file(SHARED / "zoo" / "resnet18-cifar10.safetensors"))
    return network


KNOWN: dict[str, Subject] = {
    "resnet20": SUBJECTS["a"],
    "trained18": Subject(
        title="torchvision resnet18 at 48, CIFAR-10", model=_trained, images=cifar, spec=ImageSpec(input_size=48)
    ),
    "lite0": SUBJECTS["b"],
    "resnet18": SUBJECTS["c"],
    "mobilenet": Subject(
        title="torchvision mobilenet_v2 at 224, random weights",
        model=_mobilenet,
        images=photographs,
        spec=ImageSpec(resize=256, interpolation="bicubic"),
        statistics=True,
    ),
}


def prepare(name: str, folder: Path, places: Places, calibration: int, evaluation: int) -> None:
    """Write the weights, inputs and labels of a network."""
    subject = KNOWN[name]
    folder.mkdir(parents=True, exist_ok=True)
    raw, scored, labels = subject.images(places, subject.spec, calibration, evaluation)
    inputs, tests = (subject.spec.normalise(torch.from_numpy(part)) for part in (raw, scored))
    network = subject.model(places.shelf)
    if subject.statistics:
        estimate_statistics(network, inputs[:STATISTICS_IMAGES])
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "float.safetensors")
    if labels is None:
        runtime = open_onnx(export_onnx(fold(trace(network.eval(), inputs[:2])), folder / "decides.onnx"))
        labels = np.concatenate([runtime(part.numpy()).argmax(axis=1) for part in tests.split(16)])
    for part, value in {"calibration": inputs.numpy(), "evaluation": tests.numpy(), "labels": labels}.items():
        np.save(folder / f"{part}.npy", value)


def model() -> nn.Module:
    """Build the network; its weights come from ``--weights``."""
    return KNOWN[Path(os.environ[SUBJECT]).name].model(Path(os.environ[SHELF])).eval()


def data() -> dict[str, DataLoader]:
    """Return the network's inputs; what is validated on is part of what is calibrated on, and decides nothing here."""
    folder = Path(os.environ[SUBJECT])
    calibration, evaluation, labels = (
        torch.from_numpy(np.load(folder / f"{part}.npy")) for part in ("calibration", "evaluation", "labels")
    )
    nothing = torch.zeros(len(calibration), dtype=torch.int64)
    seen = DataLoader(TensorDataset(calibration, nothing), batch_size=16)
    return {
        "train": seen,
        "validation": DataLoader(TensorDataset(calibration[:16], nothing[:16]), batch_size=16),
        "test": DataLoader(TensorDataset(evaluation, labels.to(torch.int64)), batch_size=16),
    }
