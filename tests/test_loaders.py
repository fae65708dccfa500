"""Laws of a user's own loaders and scores."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kompakt.data import Data, Split, check_classes, load_metric, open_data
from kompakt.errors import InputError
from kompakt.loaders import loader_split


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


def test_a_loader_with_its_own_generator_repeats_too() -> None:
    dataset = TensorDataset(torch.arange(20.0)[:, None], torch.zeros(20))
    split = loader_split(DataLoader(dataset, 4, shuffle=True, generator=generator(9)), "loader")
    assert torch.equal(everything(split)[0], everything(split)[0])


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
    dataset = TensorDataset(torch.zeros(10, 2), torch.zeros(10))
    for options in ({"batch_size": 4}, {"batch_size": 4, "drop_last": True}, {"batch_size": 3, "sampler": range(5)}):
        split = loader_split(DataLoader(dataset, **options), "loader")  # type: ignore[arg-type]
        assert len(split) == len(everything(split)[1])


def test_a_loader_that_does_not_know_its_length_is_counted() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield from [(torch.zeros(2), torch.tensor(1))] * 7

    class Batches:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield from [(torch.zeros(3, 2), torch.zeros(3))] * 2

    assert len(loader_split(DataLoader(Stream(), 2), "stream")) == 7
    assert len(loader_split(Batches(), "batches")) == 6
    assert len(loader_split(Batches(), "batches").subset(4)) == 4


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
