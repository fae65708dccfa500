"""Image folders on disk: ``train/`` beside ``val/`` or ``test/``, one folder a class."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kompakt.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The image files of one split, class by class, each class sorted by path.

    Args:
        paths: N files.
        labels: their N classes, as positions in ``Folder.classes``.
        ignored: files that are no images by their suffix.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What an image folder holds.

    Args:
        root: the folder.
        classes: names of the classes, sorted; the position is the label.
        splits: ``train`` and ``val``, ``test`` or both.
    """

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Listing]


def scan_folder(root: Path) -> Folder:
    """List an image folder and check its layout.

    Raises:
        InputError: the folder is missing, empty or unreadable, a split is missing, there are fewer
            than two classes, a class has no image, or the splits' classes differ.
    """
    found = [name for name in SPLITS if (root / name).is_dir()]
    if "train" not in found or len(found) < 2:
        raise InputError(_layout(root, found))
    classes = {name: _folders(root / name) for name in found}
    for name in found[1:]:
        if classes[name] != classes["train"]:
            raise InputError(_difference(root, name, classes["train"], classes[name]))
    if len(classes["train"]) < 2:
        names = ", ".join(classes["train"]) or "none"
        raise InputError(f"{root / 'train'}: expected at least two classes, one folder each; found {names}")
    splits = {name: _listing(root / name, classes["train"]) for name in found}
    return Folder(root=root, classes=classes["train"], splits=splits)


def _listing(split: Path, classes: tuple[str, ...]) -> Listing:
    """The images of every class of one split."""
    paths: list[str] = []
    labels: list[int] = []
    ignored: list[str] = []
    for label, name in enumerate(classes):
        files = tuple(_files(split / name))
        images = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
        if not images:
            hint = f" ({len(files)} files of other kinds)" if files else ""
            raise InputError(f"{split / name}: no image in it{hint}; add some or remove the folder")
        paths += images
        labels += [label] * len(images)
        ignored += [path for path in files if not path.lower().endswith(IMAGE_SUFFIXES)]
    return Listing(paths=tuple(paths), labels=tuple(labels), ignored=tuple(ignored))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted((entry for entry in shown if entry.name.lower() not in SYSTEM_FILES), key=lambda entry: entry.name)


def contents(folder: Path) -> str:
    """Name what lies in a folder, the first four: ``a.txt, train/``; nothing where it is empty."""
    names = [entry.name + "/" * entry.is_dir() for entry in _entries(folder)]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted, hidden ones left out."""
    return tuple(entry.name for entry in _entries(folder) if entry.is_dir())


def _files(folder: str | Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """All files below a folder, in order of name; links are followed, but not in circles."""
    for entry in _entries(folder):
        if entry.is_dir():
            status = entry.stat()
            place = (status.st_dev, status.st_ino)
            if place not in above:
                yield from _files(entry.path, (*above, place))
        else:
            yield entry.path


def _layout(root: Path, found: list[str]) -> str:
    """The line for a folder without the expected splits."""
    expected = "expected train/ beside val/ or test/, one folder a class"
    if not root.exists():
        return f"{root}: there is no such folder; {expected}"
    if not root.is_dir():
        return f"{root}: is a file; unpack it and give the folder: {expected}"
    there = contents(root)
    if not there:
        return f"{root}: is empty; {expected}"
    missing = "no train/ in it" if "train" not in found else "train/ has neither val/ nor test/ beside it"
    return f"{root}: {missing}; {expected}; found {there}"


def _difference(root: Path, split: str, train: tuple[str, ...], other: tuple[str, ...]) -> str:
    """The line for two splits with different classes."""
    lacking = [name for name in train if name not in other]
    extra = [name for name in other if name not in train]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])})"
        for names, what in ((lacking, f"of train/ missing from {split}/"), (extra, f"of {split}/ not in train/"))
        if names
    ]
    return f"{root}: the classes of train/ and {split}/ differ: {', '.join(parts)}; both need the same folders"


def summary(paths: tuple[str, ...], root: Path) -> str:
    """Name the kinds of some files and one of them: ``3 .txt, 1 .heic, e.g. train/cat/notes.txt``."""
    kinds = Counter(Path(path).suffix or "without a suffix" for path in paths)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3))
    return f"{counts}, e.g. {Path(paths[0]).relative_to(root)}"
