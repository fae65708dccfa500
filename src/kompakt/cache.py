"""Decoded images on disk, so that a second run starts at once. Losing the cache loses only time."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from kompakt.errors import InputError
from kompakt.files import atomic_path
from kompakt.images import ImageSpec

VERSION = 1
LARGEST_BYTES = 2 * 2**30
TOTAL_BYTES = 4 * 2**30


def cache_folder() -> Path | None:
    """The folder of the cache: ``$KOMPAKT_CACHE`` or ``~/.cache/kompakt``; None if it is set to nothing."""
    chosen = os.environ.get("KOMPAKT_CACHE")
    if chosen is None:
        return Path.home() / ".cache" / "kompakt"
    return Path(chosen) if chosen else None


def cache_key(root: Path, paths: Sequence[str], spec: ImageSpec, *, keep: bool) -> str:
    """A name for the decoded form of these files: it changes when any of them does.

    Paths, sizes and the times of change count, and what decoding depends on; mean and std do not.

    Raises:
        InputError: a file cannot be looked up, as at the end of a dangling link.
    """
    digest = hashlib.sha256()
    settings = (VERSION, keep, spec.input_size, spec.resize, spec.channels, spec.interpolation, str(root.resolve()))
    digest.update(json.dumps(settings).encode())
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        facts = f"\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n"
        digest.update(os.fsencode(path) + facts.encode())
    return digest.hexdigest()[:32]


def read_cache(folder: Path, key: str) -> tuple[Tensor, dict[int, str]] | None:
    """The images and the broken files stored under ``key``; None where there are none, or not whole."""
    path = folder / f"decoded-{key}.safetensors"
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            images = file.get_tensor("images")
            metadata = file.metadata() or {}
        if metadata["checksum"] != _checksum(images):
            return None
        os.utime(path)  # the least recently used are removed first
        return images, {int(number): reason for number, reason in json.loads(metadata["broken"]).items()}
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None  # missing or damaged: the caller decodes again and writes it anew


def write_cache(folder: Path, key: str, images: Tensor, broken: dict[int, str]) -> str | None:
    """Store decoded images; returns why they were not stored, or None if they were.

    At most 2 GiB each and 4 GiB in all are kept; the least recently used go first.
    """
    if images.numel() > LARGEST_BYTES:
        return (
            f"the decoded images take {images.numel() / 2**30:.1f} GiB; at most {LARGEST_BYTES / 2**30:.0f} are cached"
        )
    metadata = {"broken": json.dumps(broken), "checksum": _checksum(images)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"decoded-{key}.safetensors") as temporary:
            save_file({"images": images.contiguous()}, temporary, metadata=metadata)
        _remove_oldest(folder)
    except (OSError, InputError, safetensors.SafetensorError) as error:
        return f"decoded images are not cached: {error}"
    return None


def _checksum(images: Tensor) -> str:
    """SHA-256 of the pixels."""
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()


def _remove_oldest(folder: Path) -> None:
    """Remove the least recently used files until the cache is within its size."""
    files = sorted(folder.glob("decoded-*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > TOTAL_BYTES:
            path.unlink(missing_ok=True)
