"""Laws of data: splits that never mix, batches that repeat, and one clear line for every bad folder."""

import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_image_folder
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from kompakt import cache as cache_module
from kompakt import progress
from kompakt.augment import crop_and_flip, resized_crop_and_flip
from kompakt.data import Data, Split, check_classes, load_metric, open_data
from kompakt.errors import InputError
from kompakt.images import FileStore, ImageSpec, ImageSplit, MemoryStore, decode, stratified
from kompakt.models import load_model

IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


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


# Splits


def test_validation_is_taken_off_train_class_by_class(image_folder: Path) -> None:
    data = open_data(str(image_folder), input_size=16, validation=0.25)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 6, 12)
    assert data.classes == ("green", "red")
    assert torch.bincount(data.validation.labels).tolist() == [3, 3]
    images = [
        tuple(image.flatten().tolist())
        for split in (data.train, data.validation, data.test)
        for image in everything(split)[0]
    ]
    assert len(set(images)) == 36  # no image is in two splits


def test_val_beside_test_is_the_validation_split(tmp_path: Path) -> None:
    data = open_data(str(make_image_folder(tmp_path / "three", {"train": 8, "val": 3, "test": 5})), input_size=16)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 6, 10)


def test_val_alone_is_the_test_split(tmp_path: Path) -> None:
    data = open_data(str(make_image_folder(tmp_path / "two", {"train": 8, "val": 3})), input_size=16, validation=4)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 6)


def test_the_seed_decides_what_is_held_out(image_folder: Path) -> None:
    first, again, other = (
        everything(open_data(str(image_folder), input_size=16, seed=seed).validation)[0] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("n", [1, 7, 50, 99, 100])
def test_stratified_keeps_every_share_within_one(n: int) -> None:
    labels = torch.randint(5, (100,), generator=generator()).clamp(max=3)
    chosen = stratified(labels, n, seed=1)
    assert len(chosen) == len(chosen.unique()) == n
    assert torch.equal(chosen, chosen.sort().values)
    got, expected = torch.bincount(labels[chosen], minlength=4), torch.bincount(labels) * n / 100
    assert (got - expected).abs().max() < 1
    assert torch.equal(chosen, stratified(labels, n, seed=1))


def test_subset_is_part_of_the_split_and_repeats(image_folder: Path) -> None:
    train = open_data(str(image_folder), input_size=16, validation=4).train
    small = train.subset(8, seed=2)
    assert torch.bincount(small.labels).tolist() == [4, 4]
    assert torch.equal(everything(small)[0], everything(train.subset(8, seed=2))[0])
    assert not torch.equal(everything(small)[0], everything(train.subset(8, seed=3))[0])
    assert train.subset(1000) is train


# Batches


def test_batches_hold_every_example_once_in_order(image_folder: Path) -> None:
    test = open_data(str(image_folder), input_size=16, **IDENTITY).test
    sizes = [len(labels) for _, labels in test.batches(5)]
    images, labels = everything(test)
    assert sizes == [5, 5, 2]
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(labels, test.labels)
    assert labels.tolist() == [0] * 6 + [1] * 6
    brightest = images.mean((2, 3)).argmax(1)  # class 0 was painted in channel 0, class 1 in channel 1
    assert torch.equal(brightest, labels)


def test_the_same_generator_gives_the_same_batches(image_folder: Path) -> None:
    train = open_data(str(image_folder), input_size=16).train
    first, again, other = (
        everything(train, shuffle=True, generator=generator(s), augment=crop_and_flip)[0] for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    one = generator()
    epochs = [everything(train, shuffle=True, generator=one)[1] for _ in range(2)]
    assert not torch.equal(*epochs)  # the next epoch has another order
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)


def test_a_limit_stops_after_so_many_examples(image_folder: Path) -> None:
    test = open_data(str(image_folder), input_size=16).test
    assert torch.equal(everything(test, limit=7)[0], everything(test)[0][:7])
    assert not list(test.batches(4, limit=0))


def test_randomness_without_a_generator_is_refused(image_folder: Path) -> None:
    test = open_data(str(image_folder), input_size=16).test
    for options in ({"shuffle": True}, {"augment": crop_and_flip}):
        with pytest.raises(InputError, match="Generator"):
            next(test.batches(4, **options))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch size 0"):
        next(test.batches(0))


def test_images_that_do_not_fit_in_memory_come_out_the_same(image_folder: Path) -> None:
    held, lazy = (open_data(str(image_folder), input_size=12, memory_bytes=limit) for limit in (10**9, 100))
    assert isinstance(held.train, ImageSplit)
    assert isinstance(held.train.store, MemoryStore)
    assert isinstance(lazy.train, ImageSplit)
    assert isinstance(lazy.train.store, FileStore)
    for options in ({}, {"shuffle": True, "generator": 1}, {"limit": 3}):
        pairs = [{**options, "generator": generator()} if "generator" in options else options for _ in range(2)]
        assert torch.equal(everything(held.train, **pairs[0])[0], everything(lazy.train, **pairs[1])[0])


# From a file to a tensor


@pytest.mark.parametrize("size", [(40, 40), (53, 40), (31, 77), (20, 24), (32, 36)])
@pytest.mark.parametrize("resize", [None, 36])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_decoding_equals_torchvision(
    tmp_path: Path, size: tuple[int, int], resize: int | None, interpolation: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    spec = ImageSpec(input_size=32, resize=resize, interpolation=interpolation)  # type: ignore[arg-type]
    expected = transforms.Compose(
        [
            transforms.Resize(resize or 32, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    with Image.open(tmp_path / "image.jpg") as image:
        wanted = expected(image.convert("RGB"))
    got = spec.normalise(torch.tensor(decode(tmp_path / "image.jpg", spec)[None]))[0]
    assert torch.equal(got, wanted)


def test_an_image_of_the_right_size_is_left_alone(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert np.array_equal(decode(tmp_path / "image.png", ImageSpec(input_size=32)), pixels.transpose(2, 0, 1))


def test_every_kind_of_pixel_becomes_three_channels_or_one(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(tmp_path / "deep.png")
    rgb = Image.fromarray(np.stack([grey] * 3, -1))
    rgb.save(tmp_path / "rgb.png")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(tmp_path / "palette.png", transparency=bytes(256))
    for name in ("grey", "deep", "rgb", "alpha", "palette"):
        three = decode(tmp_path / f"{name}.png", ImageSpec(input_size=16))
        one = decode(tmp_path / f"{name}.png", ImageSpec(input_size=16, channels=1))
        assert three.dtype == one.dtype == np.uint8
        assert np.array_equal(three, np.stack([grey] * 3)), name
        assert np.array_equal(one, grey[None]), name


def test_one_channel_takes_one_mean_or_the_average_of_three() -> None:
    images = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert ImageSpec(channels=1, mean=(0.5,), std=(0.25,)).normalise(images)[0, 0, 0, 0] == 2
    value = ImageSpec(channels=1, mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3)).normalise(images)[0, 0, 0, 0]
    assert value == pytest.approx(3.5)


@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 0},
        {"resize": 8},
        {"mean": (0.5, 0.5)},
        {"std": (0.0, 1.0, 1.0)},
        {"channels": 4},
        {"interpolation": "cubic"},
    ],
)
def test_impossible_settings_are_refused(image_folder: Path, options: dict[str, object]) -> None:
    refusal(image_folder, **options)


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


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_cache_is_rebuilt(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("KOMPAKT_CACHE", str(tmp_path / "cache"))
    first = everything(open_data(str(image_folder), input_size=16).train)[0]
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    entry.write_bytes({"flip": flipped, "cut": whole[:-100], "empty": b""}[damage])
    data = open_data(str(image_folder), input_size=16)
    assert torch.equal(everything(data.train)[0], first)
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


# Other sources


def test_digits_need_no_file() -> None:
    data = open_data("sklearn/digits", input_size=16, validation=0.2)
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert next(data.train.batches(3))[0].shape == (3, 3, 16, 16)
    other = open_data("sklearn/digits", input_size=16, validation=0.2, seed=1)
    assert torch.equal(everything(data.test)[0], everything(other.test)[0])  # the test split never moves
    assert not torch.equal(everything(data.validation)[0], everything(other.validation)[0])
    counts = torch.bincount(data.test.labels)
    assert counts.max() - counts.min() <= 3


LOADERS = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def dataset(n):
    return TensorDataset(torch.arange(n).float()[:, None].repeat(1, 4), torch.arange(n) % 3)

def good():
    train, test = (DataLoader(dataset(n), batch, shuffle=True) for n, batch in ((20, 6), (10, 4)))
    return {"train": train, "val": DataLoader(dataset(7), 3), "test": test}

def lists():
    batch = (torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int32))
    return [batch], (batch, batch), [batch] * 3

def empty():
    return {"train": [], "validation": [], "test": []}

def once():
    return (iter([1]), iter([1]), iter([1]))

def triple():
    return ([(1, 2, 3)],) * 3

def uneven():
    return ([(torch.zeros(3, 2), torch.zeros(2))],) * 3

def two():
    return ([1], [2])

def partial():
    return {"train": [], "test": []}

def fails():
    raise OSError("the share is not mounted")

class Bad(torch.utils.data.Dataset):
    def __len__(self): return 3
    def __getitem__(self, index): raise KeyError("label of 7.wav")

def failing():
    return (DataLoader(Bad(), 2),) * 3

def number():
    return 3
"""


@pytest.fixture
def loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_loaders.py").write_text(LOADERS)
    return f"{tmp_path}/own_loaders.py"


def test_loaders_come_in_batches_of_any_size_and_repeat(loaders: str) -> None:
    data = open_data(f"{loaders}:good")
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 7, 10)
    assert [len(labels) for _, labels in data.train.batches(8)] == [8, 8, 4]
    assert sorted(everything(data.train)[0][:, 0].tolist()) == list(range(20))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = everything(data.test)[0]
    torch.manual_seed(2)
    assert torch.equal(everything(data.test)[0], first)  # the loader shuffles, and still the order is the same
    torch.manual_seed(1)
    everything(data.test)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own state is as it was
    assert not torch.equal(everything(data.train, shuffle=True, generator=generator(1))[0], everything(data.train)[0])
    assert torch.equal(*(everything(data.train, shuffle=True, generator=generator(1))[0] for _ in range(2)))


def test_a_subset_or_a_limit_of_a_loader_is_its_beginning(loaders: str) -> None:
    train = open_data(f"{loaders}:good").train
    assert torch.equal(everything(train, limit=9)[0], everything(train)[0][:9])
    assert len(train.subset(9)) == len(everything(train.subset(9))[1]) == 9
    assert torch.equal(train.subset(9).labels, everything(train.subset(9))[1])


def test_lists_of_batches_are_loaders_too(loaders: str) -> None:
    data = open_data(f"{loaders}:lists")
    assert (len(data.train), len(data.validation), len(data.test)) == (4, 8, 12)
    inputs, labels = everything(data.test)
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_the_length_follows_what_a_loader_drops() -> None:
    from kompakt.loaders import loader_split

    dataset = TensorDataset(torch.zeros(10, 2), torch.zeros(10))
    for options in ({"batch_size": 4}, {"batch_size": 4, "drop_last": True}, {"batch_size": 3, "sampler": range(5)}):
        split = loader_split(DataLoader(dataset, **options), "loader")  # type: ignore[arg-type]
        assert len(split) == len(everything(split)[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty", "yields nothing"),
        ("once", "only once"),
        ("triple", "expected (inputs, labels)"),
        ("uneven", "(3, 2) and (2,)"),
        ("two", "a tuple of 2"),
        ("partial", "no loader for validation"),
        ("fails", "OSError: the share is not mounted"),
        ("failing", "KeyError: 'label of 7.wav'"),
        ("number", "returned a int"),
        ("goof", "did you mean good"),
    ],
)
def test_loaders_that_cannot_be_used(loaders: str, name: str, expected: str) -> None:
    line = refusal(f"{loaders}:{name}")
    assert expected in line
    assert loaders in line


def test_labels_of_a_loader_must_fit_the_outputs(loaders: str) -> None:
    data = open_data(f"{loaders}:good")
    check_classes(data, 3)
    with pytest.raises(InputError, match="0 to 2 and the model has 2 outputs"):
        check_classes(data, 2)


def test_a_callable_may_return_data(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_data.py").write_text(
        f"from kompakt.data import open_data\ndef build(): return open_data({str(image_folder)!r}, input_size=16)\n"
    )
    assert isinstance(open_data(f"{tmp_path}/own_data.py:build"), Data)


def test_a_metric_gives_a_score_each_or_one_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_metric.py").write_text(
        "def each(outputs, labels): return outputs.argmax(1) == labels\n"
        "def mean(outputs, labels): return float((outputs.argmax(1) == labels).float().mean())\n"
        "def wrong(outputs, labels): return outputs\n"
        "def nan(outputs, labels): return float('nan')\n"
        "def fails(outputs, labels): return 1 / 0\n"
    )
    outputs, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    each, mean, *bad = (
        load_metric(f"{tmp_path}/own_metric.py:{name}") for name in ("each", "mean", "wrong", "nan", "fails")
    )
    assert each(outputs, labels).tolist() == [1, 1, 1, 0]
    assert mean(outputs, labels).shape == ()
    assert mean(outputs, labels).item() == each(outputs, labels).mean().item()
    for metric in bad:
        with pytest.raises(InputError, match="own_metric"):
            metric(outputs, labels)


# Augmentation


def naive_crop_and_flip(images: torch.Tensor, gen: torch.Generator, pad: int) -> torch.Tensor:
    n, _, height, width = images.shape
    down = torch.randint(2 * pad + 1, (n, 1), generator=gen)
    right = torch.randint(2 * pad + 1, (n, 1), generator=gen)
    coin = torch.rand(n, 1, generator=gen)
    out = []
    for image, y, x, c in zip(images, down, right, coin, strict=True):
        padded = torch.nn.functional.pad(image, (pad,) * 4)[:, y : y + height, x : x + width]
        out.append(padded.flip(-1) if c < 0.5 else padded)
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crop_and_flip_equals_a_loop(dtype: torch.dtype, pad: int) -> None:
    images = torch.randint(1, 255, (40, 3, 8, 10), generator=generator()).to(dtype)
    before = images.clone()
    out = crop_and_flip(images, generator(5), pad=pad)
    assert torch.equal(out, naive_crop_and_flip(images, generator(5), pad))
    assert torch.equal(images, before)
    assert out.dtype == dtype


def test_resized_crops_keep_size_range_and_the_whole_image_where_nothing_is_cut() -> None:
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    out = resized_crop_and_flip(images, generator(1))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    assert not torch.equal(out, images)
    whole = resized_crop_and_flip(images, generator(1), area=(1.0, 1.0), aspect=(1.0, 1.0))
    mirrored = (whole == images.flip(-1)).flatten(1).all(1)
    assert ((whole == images).flatten(1).all(1) | mirrored).all()
    assert 0 < mirrored.sum() < 40
    constant = torch.full((4, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(resized_crop_and_flip(constant, generator()), constant)  # nothing comes in from outside


# Progress


def test_progress_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(5), 5, "quiet")) == list(range(5))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.track(range(5), 5, "fast")) == list(range(5))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    assert list(progress.track(range(5), 5, "slow")) == list(range(5))
    assert "slow" in capsys.readouterr().err


# Real data


def score(model: torch.nn.Module, split: Split) -> float:
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in split.batches(100))
    return 100 * right / len(split)


@pytest.mark.parametrize(
    ("reference", "weights", "input_size", "expected"),
    [("kompakt.zoo:resnet20", "resnet20", 32, 88.31), ("torchvision/resnet18", "resnet18", 48, 84.28)],
)
def test_trained_networks_reach_their_accuracy(
    cifar10: Path, zoo: Path, tmp_path: Path, reference: str, weights: str, input_size: int, expected: float
) -> None:
    for name in ("train", "test"):  # a part of the data set: every class's first 40 images
        for folder in sorted((cifar10 / name).iterdir()):
            part = tmp_path / "part" / name / folder.name
            part.mkdir(parents=True)
            for path in sorted(folder.iterdir())[: 40 if name == "test" else 2]:
                (part / path.name).symlink_to(path)
    data = open_data(str(tmp_path / "part"), input_size=input_size, validation=10)
    model = load_model(reference, arguments={"num_classes": 10}, weights=zoo / f"{weights}-cifar10.safetensors")
    check_classes(data, 10)
    assert score(model, data.test) == pytest.approx(expected, abs=4.5)  # 400 images: one standard error is 1.7
