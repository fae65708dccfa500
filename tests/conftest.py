"""Fixtures that several test files share: image folders, the data sets and weights beside the repository."""

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex

import numpy as np
import pytest
from PIL import Image

from kompakt.cli import main

Run = Callable[..., tuple[int, str]]
SHARED = Path(__file__).resolve().parents[2] / "shared"
SCRATCH = Path(tempfile.gettempdir()) / "kompakt-tests"


@pytest.fixture(autouse=True, scope="session")
def decoded_cache() -> Iterator[Path]:
    """Keep decoded images of test runs out of the user's cache; a later run finds them again."""
    folder = SCRATCH / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOMPAKT_CACHE", str(folder))
        yield folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process: status and standard error."""

    def go(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kompakt", *map(str, arguments), "--quiet"])
        status = 0
        try:
            main()
        except SystemExit as done:
            status = int(done.code or 0)
        return status, capsys.readouterr().err

    return go


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A data folder: red and green 16×16 images, 12 + 12 for training and 6 + 6 for testing."""
    return make_image_folder(tmp_path / "colours", {"train": 12, "test": 6})


def make_image_folder(root: Path, splits: dict[str, int], classes: tuple[str, ...] = ("green", "red")) -> Path:
    """Write PNG images of noise around one colour a class; ``splits`` says how many a class."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
                pixels[:, :, number % 3] += 150
                Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return root


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder of CIFAR-10 as JPEG, ``train/`` and ``test/``, unpacked once on a machine."""
    return _unpacked("cifar10-jpeg")


@pytest.fixture(scope="session")
def mnist() -> Path:
    """The folder of MNIST as PNG, ``train/`` and ``test/``, unpacked once on a machine."""
    return _unpacked("mnist-png")


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of trained weights: resnet20-, resnet32- and resnet18-cifar10.safetensors."""
    folder = SHARED / "zoo"
    if not folder.is_dir():
        pytest.skip(f"trained weights are not at {folder}")
    return folder


def _unpacked(name: str) -> Path:
    """Unpack a data set beside its final place and rename it, so that runs side by side do not clash."""
    archive = SHARED / "data" / f"{name}.tar.xz"
    if not archive.is_file():
        pytest.skip(f"the data set is not at {archive}")
    status = archive.stat()
    folder = SCRATCH / f"{name}-{status.st_size}-{int(status.st_mtime)}"
    if not folder.is_dir():
        SCRATCH.mkdir(parents=True, exist_ok=True)
        fresh = SCRATCH / f".{name}-{os.getpid()}-{token_hex(4)}"
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(fresh, filter="data")
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run was faster
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder
