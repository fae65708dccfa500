"""Laws of data: splits that never mix, batches that repeat, real networks that reach their accuracy."""

from pathlib import Path

import pytest
import torch

from kompakt.augment import crop_and_flip
from kompakt.data import Split, check_classes, open_data
from kompakt.errors import InputError
from kompakt.models import load_model
from kompakt.splits import FileStore, ImageSplit, MemoryStore, stratified
from tests.conftest import make_image_folder

IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(split: Split, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(split.batches(5, **kwargs))  # type: ignore[arg-type]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


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
