"""Splits of images: decoded pixels held in memory or read from files, in batches that repeat."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kompakt.errors import InputError
from kompakt.images import ImageSpec, decode, reason

Augment = Callable[[Tensor, torch.Generator], Tensor]


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


def check_batches(batch_size: int, random: bool, generator: torch.Generator | None) -> None:
    """Check what every ``batches`` is asked for.

    Raises:
        InputError: the size is not positive, or randomness is asked for without a generator.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: expected a positive number")
    if random and generator is None:
        raise InputError("shuffle and augment need a torch.Generator, so that a run can be repeated")
