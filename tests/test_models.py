"""Laws of model references and of the reference networks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kompakt import zoo as networks
from kompakt.errors import InputError, KompaktError, MissingExtraError
from kompakt.models import load_model, parse_arguments

REFERENCE = "kompakt.zoo:resnet20"


def refusal(error: type[KompaktError], *args: object, **kwargs: object) -> str:
    """The message with which ``load_model`` refuses; it is always one line."""
    with pytest.raises(error) as caught:
        load_model(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert load_model("torchvision/ssdlite320_mobilenet_v3_large").backbone is not None


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


def test_wrappers_are_taken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "wrapped_net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def parallel(): return nn.DataParallel(nn.Linear(2, 2))\n"
        "def compiled(): return torch.compile(nn.Linear(2, 2))\n"
        "def half(): return nn.Linear(2, 2).half().train()\n"
    )
    for name in ("parallel", "compiled", "half"):
        model = load_model(f"{tmp_path}/wrapped_net.py:{name}")
        assert type(model) is nn.Linear
        assert model.weight.dtype == torch.float32
        assert not model.training


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
    path = zoo / f"{name}-cifar10.safetensors"
    loaded = load_model(f"kompakt.zoo:{name}", weights=path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in load_file(path).items())
