"""Data references: what ``--data`` stands for, as three splits that come in batches.

An image folder, ``package.module:callable`` for a user's own loaders, or ``sklearn/digits``.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypedDict, Unpack

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from kompakt.cache import cache_folder, cache_key, read_cache, write_cache
from kompakt.errors import InputError
from kompakt.folders import Folder, scan_folder, summary
from kompakt.images import IMAGENET_MEAN, IMAGENET_STD, ImageSpec, decode_all, to_array
from kompakt.loaders import Metric, load_metric, loader_split
from kompakt.references import call, load_callable
from kompakt.splits import Augment, FileStore, ImageSplit, MemoryStore, Store, stratified

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Data", "Metric", "Split", "check_classes", "load_metric", "open_data"]

Corrupt = Literal["refuse", "skip"]
DIGITS = "sklearn/digits"
SHOWN = 3


class Split(Protocol):
    """Examples that come in batches; see ``splits.ImageSplit`` and ``loaders.LoaderSplit``."""

    @property
    def labels(self) -> Tensor:
        """All labels, in order."""
        ...

    def __len__(self) -> int: ...

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augment: Augment | None = None,
        limit: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs float32 N×C×H×W, labels int64 N)."""
        ...

    def subset(self, n: int, seed: int = 0) -> "Split":
        """Take ``n`` examples, the same ones for the same seed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """Three splits that share no example.

    Args:
        train: what is trained and calibrated on.
        validation: what decisions are made on.
        test: what is reported.
        classes: names of the classes by label; empty where a user's loaders do not tell.
        description: one line for a report.
        left: what was left out and why, one line each.
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...] = ()
    description: str = ""
    left: tuple[str, ...] = ()


class ImageOptions(TypedDict, total=False):
    """The keywords of ``images.ImageSpec``."""

    input_size: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    interpolation: Literal["bilinear", "bicubic"]


def open_data(
    reference: str,
    *,
    validation: float | int = 0.1,
    seed: int = 0,
    on_corrupt: Corrupt = "refuse",
    memory_bytes: int | None = None,
    progress: bool = True,
    **image: Unpack[ImageOptions],
) -> Data:
    """Open what ``reference`` names: an image folder, ``package.module:callable`` or ``sklearn/digits``.

    A folder holds ``train/`` beside ``val/`` or ``test/``. With both, they are the validation and
    the test split; with one, it is the test split, and the validation split is taken off ``train/``,
    class by class. A callable returns a ``Data``, or a mapping or tuple of iterables of (inputs,
    labels) for train, validation and test, and the image options do not concern it.

    Args:
        reference: see above.
        validation: size of a validation split that is taken off train: a share below 1, or a number.
        seed: which examples those are.
        on_corrupt: ``refuse`` images that cannot be decoded, or ``skip`` them and say so in ``left``.
        memory_bytes: hold decoded images in memory up to this size, and decode them batch by batch
            above; None takes a quarter of what is free.
        progress: whether a bar may be shown on a terminal.
        image: ``input_size`` (224), ``resize``, ``mean``, ``std``, ``channels`` (3) and
            ``interpolation``: see ``images.ImageSpec``.

    Raises:
        InputError: there is no such data, its layout is another, or an image is corrupt.
    """
    spec = ImageSpec(**image)
    if on_corrupt not in ("refuse", "skip"):
        raise InputError(f"on_corrupt {on_corrupt}: expected refuse or skip")
    if reference == DIGITS:
        return _digits(spec, validation, seed)
    if ":" in reference and not Path(reference).expanduser().exists():
        return _from_callable(reference)
    folder = scan_folder(Path(reference).expanduser())
    store, broken, note = _decoded(folder, spec, memory_bytes, progress)
    left = _left(folder, broken, on_corrupt) + ((note,) if note else ())
    splits = _image_splits(folder, store, broken, spec)
    if "val" in splits and "test" in splits:
        return _data(folder.root.name, splits["train"], splits["val"], splits["test"], folder.classes, left)
    train, held = _hold_out(splits["train"], validation, seed)
    return _data(folder.root.name, train, held, splits["test" if "test" in splits else "val"], folder.classes, left)


def check_classes(data: Data, outputs: int) -> None:
    """Check that a model's outputs are as many as the data's classes.

    Args:
        data: where the classes are unknown, the labels of the first test batch must fit.
        outputs: the size of the model's last dimension.

    Raises:
        InputError: they differ.
    """
    if data.classes and len(data.classes) != outputs:
        raise InputError(
            f"the data has {len(data.classes)} classes and the model {outputs} outputs; "
            f"use the model trained on this data, as with --model-arg num_classes={len(data.classes)}"
        )
    if not data.classes:
        _, labels = next(data.test.batches(256))
        if (
            not labels.is_floating_point()
            and labels.numel()
            and not 0 <= int(labels.min()) <= int(labels.max()) < outputs
        ):
            span = f"{int(labels.min())} to {int(labels.max())}"
            raise InputError(f"the labels run from {span} and the model has {outputs} outputs; labels start at 0")


def _data(
    name: str,
    train: ImageSplit,
    validation: ImageSplit,
    test: ImageSplit,
    classes: tuple[str, ...],
    left: tuple[str, ...],
) -> Data:
    """Put the splits together with a description."""
    size = "×".join(str(n) for n in train.spec.shape)
    counts = f"{len(train):,} training, {len(validation):,} validation, {len(test):,} test images"
    description = f"{name}: {counts}, {len(classes)} classes, {size}"
    return Data(train=train, validation=validation, test=test, classes=classes, description=description, left=left)


def _decoded(
    folder: Folder, spec: ImageSpec, memory_bytes: int | None, progress: bool
) -> tuple[Store, dict[int, str], str | None]:
    """All images of a folder (in memory or from files), which ones are broken, and why they are not cached."""
    paths = tuple(path for listing in folder.splits.values() for path in listing.paths)
    limit = _free_bytes() // 4 if memory_bytes is None else memory_bytes
    keep = len(paths) * int(np.prod(spec.shape)) <= limit
    threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    place = cache_folder()
    key = cache_key(folder.root, paths, spec, keep=keep) if place else ""
    cached = read_cache(place, key) if place else None
    images, broken = cached or decode_all(paths, spec, keep=keep, threads=threads, progress=progress)
    note = write_cache(place, key, images, broken) if place and cached is None else None
    store = MemoryStore(images=images) if keep else FileStore(paths=paths, spec=spec, threads=threads)
    return store, broken, note


def _free_bytes() -> int:
    """Memory that can be taken, within the limit of a container where there is one."""
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return min(free, max(limit - used, 0))


def _left(folder: Folder, broken: dict[int, str], on_corrupt: Corrupt) -> tuple[str, ...]:
    """The notes about skipped and ignored files.

    Raises:
        InputError: images are broken and are to be refused.
    """
    paths = [path for listing in folder.splits.values() for path in listing.paths]
    ignored = tuple(path for listing in folder.splits.values() for path in listing.ignored)
    notes = []
    if broken:
        first = "; ".join(f"{Path(paths[n]).relative_to(folder.root)} {broken[n]}" for n in list(broken)[:SHOWN])
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        count = f"{len(broken)} of {len(paths)} images"
        if on_corrupt == "refuse":
            raise InputError(f"{folder.root}: {count} cannot be decoded: {first}{more}; mend, remove or skip them")
        notes.append(f"{count} were skipped: {first}{more}")
    if ignored:
        notes.append(f"{len(ignored)} files are no images and were ignored: {summary(ignored, folder.root)}")
    return tuple(notes)


def _image_splits(folder: Folder, store: Store, broken: dict[int, str], spec: ImageSpec) -> dict[str, ImageSplit]:
    """The splits of a folder without its broken images.

    Raises:
        InputError: a class has no image left.
    """
    splits = {}
    start = 0
    for name, listing in folder.splits.items():
        whole = torch.tensor([n not in broken for n in range(start, start + len(listing.paths))])
        index = torch.arange(start, start + len(listing.paths))[whole]
        labels = torch.tensor(listing.labels)[whole]
        start += len(listing.paths)
        for label, count in enumerate(torch.bincount(labels, minlength=len(folder.classes)).tolist()):
            if not count:
                raise InputError(f"{folder.root / name / folder.classes[label]}: none of its images can be decoded")
        splits[name] = ImageSplit(store=store, index=index, labels=labels, spec=spec)
    return splits


def _hold_out(split: ImageSplit, size: float | int, seed: int) -> tuple[ImageSplit, ImageSplit]:
    """Split off ``size`` examples (a share below 1, or a number), class by class.

    Raises:
        InputError: nothing would be left on one side, or a class would lose all its examples.
    """
    n = max(round(size * len(split)), 1) if isinstance(size, float) else size
    if not 0 < n < len(split) or (isinstance(size, float) and not 0 < size < 1):
        raise InputError(f"validation {size}: expected a share between 0 and 1 or a number below {len(split)}")
    chosen = stratified(split.labels, n, seed)
    rest = torch.ones(len(split), dtype=torch.bool)
    rest[chosen] = False
    kept = split.take(rest.nonzero()[:, 0])
    if len(kept.labels.unique()) < len(split.labels.unique()):
        raise InputError(f"validation {size}: a class would lose all its training images; take a smaller part")
    return kept, split.take(chosen)


def _digits(spec: ImageSpec, validation: float | int, seed: int) -> Data:
    """scikit-learn's 1797 handwritten digits, 8×8, resized; a fifth of them is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(np.stack([to_array(Image.fromarray(image), spec) for image in pixels]))
    labels = torch.from_numpy(bunch.target).long()
    whole = ImageSplit(store=MemoryStore(images=images), index=torch.arange(len(labels)), labels=labels, spec=spec)
    rest, test = _hold_out(whole, 0.2, 0)  # the test split is the same for every seed
    train, held = _hold_out(rest, validation, seed)
    return _data("digits (scikit-learn)", train, held, test, tuple("0123456789"), ())


def _from_callable(reference: str) -> Data:
    """Call a user's function for his data.

    Raises:
        InputError: it fails, or returns something else than data.
    """
    found = call(load_callable(reference), reference, {})
    if isinstance(found, Data):
        return found
    if isinstance(found, Mapping):
        names = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
        parts = {names[key]: value for key, value in found.items() if key in names}
    elif isinstance(found, tuple) and len(found) == 3:
        parts = dict(zip(("train", "validation", "test"), found, strict=True))
    else:
        what = f"a {type(found).__name__}" + (f" of {len(found)}" if isinstance(found, tuple) else "")
        raise InputError(f"{reference}: returned {what}, expected loaders for train, validation and test")
    missing = [name for name in ("train", "validation", "test") if name not in parts]
    if missing:
        raise InputError(
            f"{reference}: returned no loader for {', '.join(missing)}; expected train, validation and test"
        )
    train, validation, test = (
        loader_split(parts[name], f"{reference} ({name})") for name in ("train", "validation", "test")
    )
    classes = tuple(str(name) for name in getattr(getattr(parts["train"], "dataset", None), "classes", ()))
    return Data(train=train, validation=validation, test=test, classes=classes, description=f"loaders of {reference}")
