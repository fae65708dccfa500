"""Laws of model references, weights files, the reference networks and atomic writing."""

import argparse
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kompakt import zoo as networks
from kompakt.errors import FormatError, InputError, KompaktError, MissingExtraError, ModelError
from kompakt.files import atomic_path, atomic_write, writable_folder
from kompakt.models import load_model, parse_arguments
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


# References


def test_model_is_ready_to_be_evaluated() -> None:
    model = load_model(REFERENCE, arguments={"num_classes": 7})
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_initialisation_follows_the_callers_seed() -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(load_model(REFERENCE))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_torchvision_and_timm_by_name() -> None:
    assert load_model("torchvision/squeezenet1_1", arguments={"num_classes": 3})(torch.zeros(1, 3, 64, 64)).shape == (
        1,
        3,
    )
    pytest.importorskip("timm")
    assert load_model("timm/resnet10t", arguments={"num_classes": 3})(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_a_detector_is_built_without_fetching_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were about to be downloaded")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", refuse)
    load_model("torchvision/ssdlite320_mobilenet_v3_large")


def test_missing_timm_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert 'pip install "kompakt[timm]"' in refusal(MissingExtraError, "timm/resnet18")


def test_module_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_here.py").write_text(
        "from torch import nn\ndef build(n=2): return nn.Linear(n, n)\nready = build(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_model("mine_here:build", arguments={"n": 5}).in_features == 5
    assert load_model("mine_here.py:build").in_features == 2
    first, second = load_model("mine_here:ready"), load_model("mine_here:ready")
    assert first is not second  # a finished module is copied, never handed out


def test_file_by_its_path_finds_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "neighbour_a.py").write_text("SIZE = 6\n")
    (tmp_path / "net_b.py").write_text(
        "from neighbour_a import SIZE\nfrom torch import nn\ndef build(): return nn.Linear(SIZE, 1)\n"
    )
    assert load_model(f"{tmp_path}/net_b.py:build").in_features == 6


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("torchvision/resnet19", "resnet18"),
        ("torchvison/resnet18", "torchvision"),
        ("resnet18", "torchvision/resnet18"),
        ("kompakt.zoo:resnet21", "resnet20"),
        ("kompakt.zo:resnet20", "no module kompakt.zo"),
        ("no_such_package.models:net", "no module no_such_package"),
        ("nowhere.py:net", "no file nowhere.py"),
        ("kompakt.zoo:", "package.module:callable"),
        ("kompakt.errors:__doc__", "expected something that can be called"),
        ("net.onnx", "kompakt bench"),
        ("net.kpk", "kompakt unpack"),
        ("net.pt2", "kompakt bench"),
        ("net.safetensors", "--weights"),
    ],
)
def test_unknown_references_say_what_to_try(reference: str, expected: str) -> None:
    assert expected in refusal(InputError, reference)


def test_timm_offers_the_nearest_names() -> None:
    pytest.importorskip("timm")
    assert "resnet18" in refusal(InputError, "timm/resnet19")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def build(): raise ValueError('width must be\\neven')", "ValueError: width must be even (FILE:1 in build)"),
        ("def build(): return 3", "returned int"),
        ("def build(width): ...", "missing a required argument: 'width'"),
        ("import sys\nsys.exit(4)", "SystemExit: 4 (FILE:2"),
        ("def build(:", "SyntaxError"),
        ("import no_such_library", "no_such_library"),
        ("import torch\ndef build(): return torch.nn.Linear(2, 2, device='meta')", "meta device"),
        ("import torch\ndef build(): return torch.nn.LazyLinear(2)", "lazy"),
    ],
)
def test_failures_of_a_users_code_are_one_line_with_the_place(tmp_path: Path, code: str, expected: str) -> None:
    file = tmp_path / f"broken_{abs(hash(code))}.py"
    file.write_text(code)
    assert expected.replace("FILE", str(file)) in refusal(KompaktError, f"{file}:build")


def test_wrong_arguments_name_the_signature() -> None:
    line = refusal(InputError, REFERENCE, arguments={"classes": 3})
    assert "classes" in line
    assert "num_classes: int = 10" in line


def test_nothing_is_downloaded() -> None:
    assert "--weights" in refusal(InputError, "torchvision/resnet18", arguments={"weights": "DEFAULT"})


def test_arguments_are_literals() -> None:
    pairs = ["a=10", "b=0.5", "c=True", "d=None", "e=relu", "f=false", "g='7'", "h=(1, 2)", "i=a=b", "j=-1e-3"]
    found = parse_arguments(pairs)
    expected = dict(a=10, b=0.5, c=True, d=None, e="relu", f=False, g="7", h=(1, 2), i="a=b", j=-1e-3)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("pairs", [["num_classes"], ["=3"], ["a b=3"], ["a=1", "a=2"]])
def test_arguments_of_another_form_are_refused(pairs: list[str]) -> None:
    with pytest.raises(InputError, match="--model-arg"):
        parse_arguments(pairs)


# Weights


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


# The reference networks


@pytest.mark.parametrize(
    ("build", "shape", "params"),
    [
        (networks.resnet20, (3, 32, 32), 269_722),
        (networks.resnet32, (3, 32, 32), 464_154),
        (networks.resnet56, (3, 32, 32), 853_018),
        (networks.lenet300, (1, 28, 28), 266_610),
        (networks.lenet5, (1, 28, 28), 431_080),
    ],
)
def test_networks_have_the_published_number_of_parameters(build: type, shape: tuple[int, ...], params: int) -> None:
    model = build().eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


def test_shortcut_without_parameters_is_option_a() -> None:
    block = networks.BasicBlock(4, 8, stride=2)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    out = block.shortcut(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])  # C/4 = 2 channels of zeros on each side
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_trained_weights_load_strictly(zoo: Path, name: str) -> None:
    load_model(f"kompakt.zoo:{name}", weights=zoo / f"{name}-cifar10.safetensors")


# Files


def write_half(path: Path, error: Exception) -> None:
    """Fail with ``error`` after a part of ``path`` was written."""
    with atomic_path(path) as temporary:
        assert temporary.suffix == path.suffix
        temporary.write_bytes(b"part")
        raise error


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    atomic_write(path, b"old")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(path, RuntimeError("half way"))
    assert path.read_bytes() == b"old"
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "raised", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, raised: Exception) -> None:
    with pytest.raises(InputError, match="disk is full"):
        write_half(tmp_path / "file.bin", raised)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="in the way"):
            writable_folder(path)
    with pytest.raises(InputError, match="does not exist"):
        atomic_write(tmp_path / "none" / "file", b"")
    with pytest.raises(InputError, match="is a folder"):
        atomic_write(tmp_path, b"")
    assert writable_folder(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for method in ("touch", "write_bytes"):
        monkeypatch.setattr(Path, method, refuse)
    expected = "disk is full" if number == errno.ENOSPC else rf"cannot be written \({os.strerror(number)}\)"
    for attempt in (lambda: writable_folder(tmp_path), lambda: atomic_write(tmp_path / "file", b"")):
        with pytest.raises(InputError, match=expected):
            attempt()
