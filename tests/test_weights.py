"""Laws of weights files: what is saved comes back, and nothing in a file is run."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kompakt import zoo as networks
from kompakt.errors import FormatError, InputError, KompaktError, ModelError
from kompakt.models import load_model
from kompakt.weights import load_weights, read_weights, save_weights

REFERENCE = "kompakt.zoo:resnet20"


def refusal(error: type[KompaktError], *args: object, **kwargs: object) -> str:
    """The message with which ``load_model`` refuses; it is always one line."""
    with pytest.raises(error) as caught:
        load_model(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Tied(nn.Module):
    """A model whose two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_saved_weights_come_back_and_have_the_same_bytes(tmp_path: Path) -> None:
    model = load_model(REFERENCE)
    save_weights(model, tmp_path / "a.safetensors")
    save_weights(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert same(load_model(REFERENCE, weights=tmp_path / "a.safetensors"), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_shared_tensors_are_written_once_and_restored(tmp_path: Path) -> None:
    model, fresh = Tied(), Tied()
    save_weights(model, tmp_path / "tied.safetensors")
    assert set(read_weights(tmp_path / "tied.safetensors")) == set(model.state_dict())
    assert (tmp_path / "tied.safetensors").stat().st_size < 4 * 16 * 2 + 400
    load_weights(fresh, tmp_path / "tied.safetensors")
    assert same(fresh, model)
    assert fresh.second.weight is fresh.first.weight


def test_the_record_of_shared_tensors_has_one_order(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2)] * 6)  # five more names for one layer
    for number in range(5):
        save_weights(model, tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_safetensors_own_reader_takes_what_was_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_model as theirs

    model, fresh = Tied(), Tied()
    save_weights(model, tmp_path / "tied.safetensors")
    theirs(fresh, tmp_path / "tied.safetensors")
    assert same(fresh, model)


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict", "net", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_checkpoints_of_many_shapes_load(tmp_path: Path, nest: str | None, prefix: str) -> None:
    model, fresh = networks.lenet300(), networks.lenet300()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "w.pt")
    assert same(load_weights(fresh, tmp_path / "w.pt"), model)


def test_old_checkpoints_without_batch_counters_load(tmp_path: Path) -> None:
    model = load_model(REFERENCE)
    torch.save({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, tmp_path / "w.pt")
    assert same(load_model(REFERENCE, weights=tmp_path / "w.pt"), model)


def test_misfits_are_named_and_counted(tmp_path: Path) -> None:
    state = networks.resnet32().state_dict()
    state["extra.weight"] = torch.zeros(2)
    state["conv1.weight"] = torch.zeros(16, 3, 5, 5)
    del state["bn1.weight"]
    save_file(state, tmp_path / "w.safetensors")
    line = refusal(InputError, "kompakt.zoo:resnet32", weights=tmp_path / "w.safetensors")
    for part in (
        "1 missing (bn1.weight)",
        "1 unexpected (extra.weight)",
        "16×3×5×5 in the file and 16×3×3×3 in the model",
    ):
        assert part in line
    assert "num_classes" not in line
    assert "…" in refusal(InputError, REFERENCE, weights=tmp_path / "w.safetensors")  # many: only the first are named


def test_another_number_of_classes_is_recognised(tmp_path: Path) -> None:
    save_weights(networks.resnet20(37), tmp_path / "w.safetensors")
    line = refusal(InputError, REFERENCE, weights=tmp_path / "w.safetensors")
    assert "--model-arg num_classes=37" in line


def test_integers_are_not_taken_for_weights(tmp_path: Path) -> None:
    state = networks.lenet300().state_dict()
    state["fc3.weight"] = torch.zeros(10, 100, dtype=torch.int8)
    save_file(state, tmp_path / "w.safetensors")
    assert "10×100 (int8)" in refusal(InputError, "kompakt.zoo:lenet300", weights=tmp_path / "w.safetensors")


def test_a_checkpoint_that_needs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(marker),)

    for content, wanted in ((argparse.Namespace(lr=1), "argparse.Namespace"), (Hostile(), "posix.mkdir")):
        torch.save({"state_dict": networks.lenet300().state_dict(), "args": content}, tmp_path / "w.pt")
        line = refusal(InputError, "kompakt.zoo:lenet300", weights=tmp_path / "w.pt")
        assert wanted in line.replace("nt.mkdir", "posix.mkdir")
        assert "model.state_dict()" in line
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Hostile()))
    refusal(KompaktError, "kompakt.zoo:lenet300", weights=tmp_path / "raw.pkl")
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_truncated_files_are_recognised(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(networks.lenet300().state_dict(), path)
    else:
        save_weights(networks.lenet300(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refusal(FormatError, "kompakt.zoo:lenet300", weights=path)


def test_other_files_are_not_weights(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    for name in ("text.pt", "list.pt", "empty.pt"):
        refusal(FormatError, REFERENCE, weights=tmp_path / name)
    assert "no such" in refusal(InputError, REFERENCE, weights=tmp_path / "none.pt")
    assert "folder" in refusal(InputError, REFERENCE, weights=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_var"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, value: float) -> None:
    state = networks.resnet20().state_dict()
    state[name].view(-1)[3] = value
    save_file(state, tmp_path / "w.safetensors")
    assert name in refusal(ModelError, REFERENCE, weights=tmp_path / "w.safetensors")
