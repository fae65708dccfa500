"""Laws of the capture: it computes what the model computes, changes nothing, and states facts."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from kompakt.errors import ModelError, PlanError
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from tests.nets import Picky, branches, images, residual, tokens

NETS = {"residual": residual, "branches": branches}


@pytest.mark.parametrize("name", NETS)
def test_capture_and_folded_capture_compute_what_the_model_computes(name: str) -> None:
    model, x = NETS[name](), images(5)
    capture = trace(model, images(2))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(capture.module(x), expected)
        torch.testing.assert_close(fold(capture).module(x), expected, rtol=1e-4, atol=1e-5)


def test_capture_of_tokens_computes_what_the_model_computes() -> None:
    model, x = tokens(), images(5, size=4, channels=12)
    with torch.no_grad():
        torch.testing.assert_close(trace(model, x[:2]).module(x), model(x))


def test_neither_tracing_nor_folding_changes_the_model() -> None:
    model = residual()
    model.train()
    before = copy.deepcopy(model.state_dict())
    fold(trace(model, images(2)))
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_folding_removes_batch_norm_and_dropout() -> None:
    kinds = {op.kind for op in fold(trace(residual(), images(2))).graph.ops}
    assert not kinds & {"batch_norm", "dropout"}


def test_a_batch_norm_before_a_layer_is_not_folded() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    assert "batch_norm" in {op.kind for op in fold(trace(model, images(2))).graph.ops}


def test_a_convolution_used_twice_is_not_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)
            self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.conv(x)) + self.b(self.conv(x))

    model = Twice().eval()
    model.a.running_mean.fill_(1.0)
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(fold(trace(model, x[:2])).module(x), model(x))


def test_shared_weights_are_one_tensor_with_an_alias() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    graph = trace(Tied(), torch.zeros(2, 4)).graph
    assert graph.params == 4 * 4 + 4 + 4
    assert all(graph.weight(op).shape == (4, 4) for op in graph.layers)


def test_facts_of_resnet18_are_the_known_ones() -> None:
    graph = trace(torchvision.models.resnet18(weights=None), torch.zeros(2, 3, 224, 224)).graph
    assert graph.params == 11_689_512
    assert graph.macs == 1_814_073_344
    assert len(graph.layers) == 21
    assert graph.layers[0].module == "conv1"
    assert "resnet.py:" in graph.layers[0].source


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 6, 6), 6 * 6 * 8 * 4 * 9),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 6), 6 * 6 * 8 * 2 * 9),
        (nn.ConvTranspose2d(4, 8, 2, stride=2), (2, 4, 6, 6), 6 * 6 * 4 * 8 * 4),
        (nn.Linear(4, 8), (2, 5, 4), 5 * 4 * 8),
        (nn.Conv1d(4, 8, 3), (2, 4, 6), 4 * 8 * 4 * 3),
    ],
)
def test_macs_equal_the_formula(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert trace(layer, torch.zeros(shape)).graph.macs == macs


def test_an_untraceable_model_names_the_line_of_its_code() -> None:
    with pytest.raises(ModelError, match=r"Picky: cannot be captured at .*nets\.py:\d+") as caught:
        trace(Picky(), torch.zeros(2, 4))
    assert "\n" not in str(caught.value)


def test_in_place_ops_become_pure_and_later_reads_see_the_new_value() -> None:
    class Mutates(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 1.0
            y.add_(1.0)
            return y * 2

    x = torch.ones(2, 3)
    capture = trace(Mutates(), x)
    assert not any(op.kind.endswith("_") for op in capture.graph.ops)
    torch.testing.assert_close(capture.module(x), torch.full((2, 3), 4.0))


def test_an_unknown_op_name_offers_the_nearest() -> None:
    graph = trace(residual(), images(2)).graph
    with pytest.raises(PlanError, match="conv2d"):
        graph.op("conv2")
