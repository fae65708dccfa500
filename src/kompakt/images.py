"""Images: from a file to a uint8 tensor of a model's size."""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kompakt.errors import InputError
from kompakt.progress import track

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How an image becomes a model's input.

    Args:
        input_size: height and width of the input, in pixels.
        resize: length of the shorter side before the centre crop, in pixels; None takes
            ``input_size``, and leaves images of exactly that size untouched.
        mean: of each channel, for values in 0…1.
        std: of each channel, for values in 0…1.
        channels: 3 (grey becomes RGB) or 1 (RGB becomes grey; a mean and std of three values are
            averaged).
        interpolation: ``bilinear`` (the default of torchvision) or ``bicubic``, both antialiased.
    """

    input_size: int = 224
    resize: int | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    channels: int = 3
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.input_size < 1:
            raise InputError(f"input size {self.input_size}: expected a positive number of pixels")
        if self.resize is not None and self.resize < self.input_size:
            raise InputError(f"resize {self.resize} is smaller than the input size {self.input_size}; leave it out")
        if self.channels not in (1, 3):
            raise InputError(f"{self.channels} channels: images have 1 or 3")
        if self.interpolation not in FILTERS:
            raise InputError(f"interpolation {self.interpolation}: expected bilinear or bicubic")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, 3):
                raise InputError(f"{name} has {len(values)} values; expected 1 or 3")
            if not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
                raise InputError(f"{name} {tuple(values)}: expected finite values, and a positive std")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        return self.channels, self.input_size, self.input_size

    def normalise(self, images: Tensor) -> Tensor:
        """Map uint8 N×C×H×W to float32: ``(x / 255 - mean) / std``."""
        mean, std = _per_channel(self.mean, self.channels), _per_channel(self.std, self.channels)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def decode(path: str | Path, spec: ImageSpec) -> np.ndarray:
    """Read one image file as uint8 C×H×W: convert, resize the shorter side, crop the centre.

    As in torchvision's folders, the rotation that a camera notes in EXIF is not applied.
    """
    with Image.open(path) as image:
        return to_array(image, spec)


def to_array(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Turn an image into uint8 C×H×W of the spec's size."""
    image = _cropped(_resized(_converted(image, spec.channels), spec), spec.input_size)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def decode_all(
    paths: Sequence[str], spec: ImageSpec, *, keep: bool, threads: int, progress: bool
) -> tuple[Tensor, dict[int, str]]:
    """Decode every file, with a pool of threads.

    Args:
        paths: N image files.
        spec: how to decode them.
        keep: return the images; otherwise they are only checked.
        threads: size of the pool.
        progress: whether a bar may be shown.

    Returns:
        The images, uint8 N×C×H×W (zeros where a file is broken; 0×C×H×W if not kept), and the
        reason for each broken file by its position.

    Raises:
        InputError: the system refuses to read a file.
    """
    images = np.zeros((len(paths) if keep else 0, *spec.shape), dtype=np.uint8)
    broken: dict[int, str] = {}

    def work(start: int) -> None:
        for number, path in enumerate(paths[start : start + CHUNK], start):
            try:
                pixels = decode(path, spec)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO):
                    raise InputError(f"{path}: cannot be read ({error.strerror})") from error
                broken[number] = reason(error)
                continue
            if keep:
                images[number] = pixels

    starts = range(0, len(paths), CHUNK)
    with ThreadPoolExecutor(threads) as pool:
        for _ in track(pool.map(work, starts), len(starts), "decoding images", show=progress):
            pass
    return torch.from_numpy(images), dict(sorted(broken.items()))


def reason(error: Exception) -> str:
    """Why a file is no image, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "is not an image of a known format"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({os.strerror(error.errno)})"
    return "is corrupt: " + (" ".join(str(error).split()) or type(error).__name__)


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    """The values as channels×1×1."""
    if channels == 1 and len(values) == 3:
        values = (sum(values) / 3,)
    return torch.tensor(values, dtype=torch.float32).expand(channels)[:, None, None]


def _converted(image: Image.Image, channels: int) -> Image.Image:
    """To RGB or to grey, 8 bits a channel."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow would clip it at 255 instead of scaling it
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("float pixels have no agreed range; save it with 8 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB" if channels == 3 else "L")


def _resized(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Bring the shorter side to its length, as torchvision's ``Resize`` does."""
    length = spec.resize or spec.input_size
    width, height = image.size
    short, long = sorted((width, height))
    if short == length:
        return image
    other = int(length * long / short)
    size = (length, other) if width <= height else (other, length)
    return image.resize(size, FILTERS[spec.interpolation])


def _cropped(image: Image.Image, size: int) -> Image.Image:
    """The centre, as torchvision's ``CenterCrop`` takes it."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))
