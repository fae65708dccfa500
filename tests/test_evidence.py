"""Laws of what criteria measure: equal to naive references, and refused where they cannot be."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt.data import Data
from kompakt.errors import InputError
from kompakt.evidence import activations, curvature, evidence, input_norms
from kompakt.loaders import loader_split
from tests.nets import images


class Net(nn.Module):
    """A grouped, strided convolution, a batch norm, a ReLU and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def case() -> tuple[nn.Module, Data, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = images(12, 6, 4), torch.arange(12) % 3
    split = loader_split([(x, y)], "toy")
    return Net().eval(), Data(train=split, validation=split, test=split), x, y


def test_norms_of_inputs_equal_those_of_patches() -> None:
    model, data, x, _ = case()
    found = input_norms(model, data, 0)
    patches = F.unfold(x, 3, padding=1, stride=2).unflatten(1, (4, 9))  # (N, channels, taps, places)
    norms = patches.square().sum((0, 3)).sqrt()
    for out in range(6):
        own = norms[:2] if out < 3 else norms[2:]
        torch.testing.assert_close(found["conv.weight"][out].flatten(1), own)
    inside = F.relu(model.norm(model.conv(x))).mean((2, 3))
    torch.testing.assert_close(found["fc.weight"], inside.square().sum(0).sqrt().expand(3, 6))


def test_curvature_is_the_mean_of_squared_gradients() -> None:
    model, data, x, y = case()
    wanted = torch.zeros_like(model.fc.weight)
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(model(one[None]), label[None])
        wanted += torch.autograd.grad(loss, model.fc.weight)[0].square() / len(x)
    torch.testing.assert_close(curvature(model, data, 0)["fc.weight"], wanted)


def test_activations_are_those_behind_the_relu() -> None:
    model, data, x, _ = case()
    found = activations(model, data, 0)
    assert set(found) == {"conv.weight"}
    wanted = F.relu(model.norm(model.conv(x))).movedim(1, 0).flatten(1)
    torch.testing.assert_close(found["conv.weight"].sort(1).values, wanted.sort(1).values)


def test_what_cannot_be_measured_is_refused() -> None:
    model, data, *_ = case()
    with pytest.raises(InputError, match="needs input_norm; give --data"):
        evidence("wanda", model, None, 0)
    with pytest.raises(InputError, match="no layer feeds one"):
        activations(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), data, 0)
    assert evidence("l2", model, None, 0) == {}
