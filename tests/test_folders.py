"""Laws of image folders and of the cache: one clear line for every bad folder, nothing left out in silence."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kompakt import cache as cache_module
from kompakt.data import Split, check_classes, open_data
from kompakt.errors import InputError
from tests.conftest import make_image_folder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(split: Split, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(split.batches(5, **kwargs))  # type: ignore[arg-type]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def refusal(reference: object, **kwargs: object) -> str:
    """The message with which ``open_data`` refuses; it is always one line."""
    with pytest.raises(InputError) as caught:
        open_data(str(reference), **{"input_size": 16} | kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Bad folders


def test_a_folder_without_the_layout(tmp_path: Path, image_folder: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "is empty" in refusal(tmp_path / "empty")
    (tmp_path / "data.tar").write_bytes(b"x")
    assert "unpack it" in refusal(tmp_path / "data.tar")
    line = refusal(image_folder / "train")
    assert "no train/" in line
    assert "green/, red/" in line
    shutil.rmtree(image_folder / "test")
    assert "neither val/ nor test/" in refusal(image_folder)


def test_a_folder_with_one_class(tmp_path: Path) -> None:
    line = refusal(make_image_folder(tmp_path / "one", {"train": 3, "val": 3}, classes=("cat",)))
    assert "at least two classes" in line
    assert "cat" in line


def test_splits_with_different_classes(image_folder: Path) -> None:
    (image_folder / "test" / "red").rename(image_folder / "test" / "blue")
    line = refusal(image_folder)
    assert "1 of train/ missing from test/ (red)" in line
    assert "1 of test/ not in train/ (blue)" in line


def test_a_class_without_images(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "train" / "red")
    (image_folder / "train" / "red").mkdir()
    (image_folder / "train" / "red" / "notes.txt").write_text("none yet")
    line = refusal(image_folder)
    assert "red: no image" in line
    assert "1 files of other kinds" in line


def test_hidden_and_system_files_are_no_classes_and_no_images(image_folder: Path) -> None:
    whole = everything(open_data(str(image_folder), input_size=16).train)[0]
    (image_folder / "train" / ".ipynb_checkpoints").mkdir()
    for name in (".DS_Store", "Thumbs.db", "._000.png"):
        (image_folder / "train" / "red" / name).write_bytes(b"junk")
    data = open_data(str(image_folder), input_size=16)
    assert torch.equal(everything(data.train)[0], whole)
    assert data.left == ()


def test_other_files_are_ignored_and_counted(image_folder: Path) -> None:
    (image_folder / "train" / "red" / "labels.txt").write_text("red")
    (image_folder / "test" / "red" / "photo.heic").write_bytes(b"?")
    (line,) = open_data(str(image_folder), input_size=16).left
    assert "2 files are no images" in line
    assert "1 .txt, 1 .heic" in line


def test_images_in_folders_below_a_class_belong_to_it(image_folder: Path) -> None:
    below = image_folder / "train" / "red" / "more"
    below.mkdir()
    (image_folder / "train" / "red" / "000.png").rename(below / "000.png")
    (below / "circle").symlink_to(image_folder / "train" / "red", target_is_directory=True)
    assert len(open_data(str(image_folder), input_size=16, validation=2).train) >= 22


def test_links_that_lead_nowhere_are_named(image_folder: Path) -> None:
    (image_folder / "test" / "red" / "gone.png").symlink_to(image_folder / "nothing")
    assert "gone.png: cannot be read" in refusal(image_folder, on_corrupt="skip")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take only Unicode names")
def test_a_name_that_is_no_unicode_is_a_name(image_folder: Path) -> None:
    red = os.fsencode(image_folder / "test" / "red")
    os.rename(red + b"/000.png", red + b"/caf\xe9.png")
    assert len(open_data(str(image_folder), input_size=16).test) == 12


def broken_images(folder: Path) -> None:
    """One image cut short, one that is text, one that is empty."""
    red = folder / "train" / "red"
    whole = (red / "000.png").read_bytes()
    (red / "000.png").write_bytes(whole[: len(whole) // 2])
    (red / "001.png").write_text("not an image")
    (red / "002.png").write_bytes(b"")


@pytest.mark.parametrize("memory_bytes", [None, 100])
def test_corrupt_images_are_refused_by_name(image_folder: Path, memory_bytes: int | None) -> None:
    broken_images(image_folder)
    for _ in range(2):  # the second answer comes from the cache
        line = refusal(image_folder, memory_bytes=memory_bytes)
        assert "3 of 36 images" in line
        assert all(f"train/red/00{n}.png" in line for n in range(3))


@pytest.mark.parametrize("memory_bytes", [None, 100])
def test_corrupt_images_are_skipped_and_counted(image_folder: Path, memory_bytes: int | None) -> None:
    broken_images(image_folder)
    data = open_data(str(image_folder), input_size=16, on_corrupt="skip", validation=3, memory_bytes=memory_bytes)
    assert len(data.train) + len(data.validation) == 24 - 3
    assert torch.bincount(torch.cat([data.train.labels, data.validation.labels])).tolist() == [12, 9]
    assert "3 of 36 images were skipped" in data.left[0]
    assert len(everything(data.train)[1]) == len(data.train)


def test_a_class_of_corrupt_images_cannot_be_skipped(image_folder: Path) -> None:
    for path in (image_folder / "test" / "red").iterdir():
        path.write_bytes(b"junk")
    assert "none of its images" in refusal(image_folder, on_corrupt="skip")


def test_a_file_that_vanishes_later_is_named(image_folder: Path) -> None:
    data = open_data(str(image_folder), input_size=16, memory_bytes=100)
    (image_folder / "test" / "green" / "003.png").unlink()
    with pytest.raises(InputError, match=r"003\.png: cannot be read"):
        everything(data.test)


@pytest.mark.parametrize(("call", "place"), [("os.scandir", "train/red"), ("PIL.Image.open", "train/red/000.png")])
def test_what_may_not_be_read_is_named(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, place: str
) -> None:
    module, _, name = call.rpartition(".")
    real = getattr(sys.modules[module], name)

    def locked(path: str | Path) -> object:  # root, as in many containers, may read everything
        if Path(path) == image_folder / place:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(call, locked)
    for choice in ("refuse", "skip"):  # it may be readable to others: no reason to leave it out
        assert f"{image_folder / place}: cannot be read (Permission denied)" in refusal(image_folder, on_corrupt=choice)


@pytest.mark.parametrize("size", [0, 24, -1, 1.0, 0.0, 23])
def test_a_validation_split_of_all_or_nothing_is_refused(image_folder: Path, size: float) -> None:
    assert "validation" in refusal(image_folder, validation=size)


def test_classes_must_be_as_many_as_outputs(image_folder: Path) -> None:
    data = open_data(str(image_folder), input_size=16)
    check_classes(data, 2)
    with pytest.raises(InputError, match="2 classes and the model 1000 outputs"):
        check_classes(data, 1000)


# The cache


def test_a_second_run_reads_the_cache_and_a_changed_file_is_seen(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "cache"))
    first = everything(open_data(str(image_folder), input_size=16).test)[0]
    (entry,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("kompakt.data.decode_all", lambda *_, **__: pytest.fail("the cache was not read"))
        again = open_data(str(image_folder), input_size=16, mean=(0.1, 0.2, 0.3)).test  # mean is not decoded
        assert not torch.equal(everything(again)[0], first)
        assert torch.equal(everything(open_data(str(image_folder), input_size=16).test)[0], first)
    (image_folder / "test" / "red" / "000.png").write_bytes((image_folder / "test" / "green" / "000.png").read_bytes())
    assert not torch.equal(everything(open_data(str(image_folder), input_size=16).test)[0], first)
    assert entry.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps no time of change beside the time of writing")
def test_other_pixels_under_the_old_size_and_time_are_seen(image_folder: Path) -> None:
    first = everything(open_data(str(image_folder), input_size=16).test)[0]
    path = image_folder / "test" / "red" / "000.bmp"
    for colour in (0, 200):
        Image.new("RGB", (16, 16), (colour, 0, 0)).save(path)
        os.utime(path, (1, 1))
        images = everything(open_data(str(image_folder), input_size=16).test)[0]
        assert not torch.equal(images, first)
        first = images


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_cache_is_rebuilt(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "cache"))
    first = everything(open_data(str(image_folder), input_size=16).test)[0]
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    entry.write_bytes({"flip": flipped, "cut": whole[:-100], "empty": b""}[damage])
    data = open_data(str(image_folder), input_size=16)
    assert torch.equal(everything(data.test)[0], first)  # its images come last, where the damage is
    again, broken = cache_module.read_cache(tmp_path / "cache", entry.stem.removeprefix("decoded-")) or (None, None)
    assert again is not None  # it was written anew
    assert again.shape == (36, 3, 16, 16)
    assert broken == {}


def test_a_cache_that_cannot_be_written_is_noted(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "file"))
    data = open_data(str(image_folder), input_size=16)
    assert len(data.test) == 12
    assert "not cached" in data.left[0]
    monkeypatch.setenv("KOMPAKT_CACHE", "")
    assert open_data(str(image_folder), input_size=16).left == ()


def test_the_cache_keeps_the_latest_within_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "TOTAL_BYTES", 2500)
    images = torch.zeros(1, 1, 30, 30, dtype=torch.uint8)  # 900 bytes and a header
    for number, key in enumerate("abc"):
        assert cache_module.write_cache(tmp_path, key, images, {}) is None
        os.utime(tmp_path / f"decoded-{key}.safetensors", (number + 1, number + 1))
    cache_module.write_cache(tmp_path, "d", images, {})
    assert cache_module.read_cache(tmp_path, "d") is not None
    assert cache_module.read_cache(tmp_path, "a") is None
