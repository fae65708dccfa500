"""Images: from a file to a uint8 tensor, and splits of images that come in batches."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

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

Augment = Callable[[Tensor, torch.Generator], Tensor]


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


class Store(Protocol):
    """Decoded images by number."""

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield uint8 images n×C×H×W for every chunk of n indices."""
        ...


@dataclass(frozen=True, kw_only=True)
class MemoryStore:
    """All images in memory, uint8 N×C×H×W."""

    images: Tensor

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images of every chunk of indices."""
        for chunk in chunks:
            yield self.images[chunk]


@dataclass(frozen=True, kw_only=True)
class FileStore:
    """Images that are decoded when they are asked for, one chunk ahead, by a pool of threads."""

    paths: tuple[str, ...]
    spec: ImageSpec
    threads: int

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images of every chunk of indices.

        Raises:
            InputError: a file has changed since it was checked and cannot be read.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: Iterator[np.ndarray] | None = None
            for chunk in chunks:
                following = pool.map(self._decode, chunk.tolist())
                if waiting is not None:
                    yield torch.from_numpy(np.stack(list(waiting)))
                waiting = following
            if waiting is not None:
                yield torch.from_numpy(np.stack(list(waiting)))

    def _decode(self, number: int) -> np.ndarray:
        path = self.paths[number]
        try:
            return decode(path, self.spec)
        except Exception as error:
            raise InputError(f"{path}: {reason(error)}; it could be read before, so mend it and try again") from error


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """Part of the images of a store, in batches.

    Args:
        store: the decoded images.
        index: int64, the numbers of this split's images in the store.
        labels: int64, the class of each of this split's images.
        spec: how the images are normalised.
    """

    store: Store
    index: Tensor
    labels: Tensor
    spec: ImageSpec

    def __len__(self) -> int:
        return len(self.index)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augment: Augment | None = None,
        limit: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (float32 N×C×H×W, normalised) and labels (int64 N); the last may be smaller.

        Args:
            batch_size: N.
            shuffle: in an order drawn from ``generator``; otherwise in the order of the files.
            generator: needed by ``shuffle`` and ``augment``; the same state gives the same batches.
            augment: applied to uint8 images before they are normalised.
            limit: the number of examples after which to stop.

        Raises:
            InputError: ``shuffle`` or ``augment`` without a generator, or no positive batch size.
        """
        check_batches(batch_size, shuffle or augment is not None, generator)
        order = torch.randperm(len(self), generator=generator) if shuffle else torch.arange(len(self))
        chunks = order[:limit].split(batch_size) if len(order[:limit]) else ()
        for chunk, images in zip(chunks, self.store.stream(self.index[chunk] for chunk in chunks), strict=True):
            if augment is not None:
                assert generator is not None
                images = augment(images, generator)
            yield self.spec.normalise(images), self.labels[chunk]

    def subset(self, n: int, seed: int = 0) -> "ImageSplit":
        """Take ``n`` examples, each class by its share, drawn from ``seed``; all where there are fewer."""
        return self if n >= len(self) else self.take(stratified(self.labels, n, seed))

    def take(self, chosen: Tensor) -> "ImageSplit":
        """The split with only the examples ``chosen`` (positions, int64)."""
        return replace(self, index=self.index[chosen], labels=self.labels[chosen])


def stratified(labels: Tensor, n: int, seed: int) -> Tensor:
    """Choose ``n`` positions so that each class keeps its share (largest remainders), in order.

    Args:
        labels: int64 N.
        n: how many of the N to choose.
        seed: which ones of each class.

    Returns:
        int64 n, ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    _, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    shares = counts.double() * n / max(len(labels), 1)
    quotas = shares.floor().long()
    rest = torch.argsort(shares - quotas, descending=True, stable=True)[: n - int(quotas.sum())]
    quotas[rest] += 1
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[inverse[order] == number][:quota] for number, quota in enumerate(quotas.tolist())]
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.long)


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


def check_batches(batch_size: int, random: bool, generator: torch.Generator | None) -> None:
    """Check what every ``batches`` is asked for.

    Raises:
        InputError: the size is not positive, or randomness is asked for without a generator.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: expected a positive number")
    if random and generator is None:
        raise InputError("shuffle and augment need a torch.Generator, so that a run can be repeated")


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
