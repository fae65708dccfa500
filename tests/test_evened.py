"""Channels before depthwise convolutions are evened: the function stays, the integers err less."""

import pytest
import torch
from torch import Tensor, nn

from kompakt.build.equalize import evened, lifted
from kompakt.build.quantize import quantize
from kompakt.graph.calibrate import calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.methods.uniform import uniform
from kompakt.numerics.equalize import lift
from kompakt.plan.rules import ONNXRUNTIME, placed

X = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Inverted(nn.Module):
    """An inverted bottleneck whose wide channels differ a hundredfold."""

    def __init__(self, clamp: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.expand, self.clamp = nn.Conv2d(3, 16, 1), clamp()
        self.deep, self.project = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            reach = torch.logspace(-2, 1, 16)
            self.expand.weight.mul_(reach.view(-1, 1, 1, 1))
            self.expand.bias.mul_(reach)
            self.deep.weight.div_(reach.view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.clamp(self.deep(self.clamp(self.expand(x)))))


def capture(model: nn.Module) -> Capture:
    return fold(trace(model.eval(), X[:2]))


def made(clamp: type[nn.Module] = nn.ReLU6) -> Capture:
    torch.manual_seed(0)
    return capture(Inverted(clamp))


def peaks_of(one: Capture, name: str) -> Tensor:
    class Look(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            return seen.setdefault(n.name, value)

    seen: dict[str, Tensor] = {}
    Look(one.module).run(X)
    return seen[name].amax((0, 2, 3))


@pytest.mark.parametrize(("clamp", "ceiling"), [(nn.ReLU6, 6.0), (nn.ReLU, float("inf"))])
def test_evened_channels_compute_the_same_and_lose_less(clamp: type[nn.Module], ceiling: float) -> None:
    before = made(clamp)
    assert [end for _, end, _ in lifted(before.graph)] == [ceiling]
    after = evened(before, X.split(8))
    wanted = before.module(X)
    assert torch.allclose(after.module(X), wanted, atol=1e-5)
    errors = []
    for one in (before, after):
        stats = calibrate(one, X.split(8), placed(one.graph, ONNXRUNTIME))
        plan, _ = uniform(one.graph, ONNXRUNTIME)
        errors.append(float((quantize(one, plan, stats).module(X) - wanted).square().sum()))
    assert errors[1] < 0.7 * errors[0]


def test_no_channel_is_lifted_to_where_the_clamp_cuts_it() -> None:
    before = made()
    layer = lifted(before.graph)[0][0]
    seen = [peaks_of(one, layer.name) for one in (before, evened(before, X.split(8)))]
    cut = seen[0] >= 5.4
    assert cut.any()
    assert (~cut).any()
    assert torch.allclose(seen[1][cut], seen[0][cut])
    assert (seen[1][~cut] <= 5.4 + 1e-4).all()
    assert (seen[1] >= seen[0] - 1e-5).all()


def test_what_others_read_is_left_alone() -> None:
    class Shared(Inverted):
        def forward(self, x: Tensor) -> Tensor:
            wide = self.clamp(self.expand(x))
            return self.project(self.clamp(self.deep(wide)) + wide)

    torch.manual_seed(0)
    found = capture(Shared())
    assert not lifted(found.graph)
    assert evened(found, []) is found


@pytest.mark.parametrize("clamp", [nn.SiLU, nn.Hardswish])
def test_what_is_no_clamp_is_left_alone(clamp: type[nn.Module]) -> None:
    assert not lifted(made(clamp).graph)


def test_factors_stay_between_one_and_the_most() -> None:
    peaks = torch.tensor([-1.0, 0.0, 1e-9, 0.6, 5.5, 80.0])
    assert torch.allclose(lift(peaks, 6.0), torch.tensor([1.0, 1.0, 16.0, 9.0, 1.0, 1.0]))
    assert torch.allclose(lift(peaks, float("inf")), torch.tensor([1.0, 1.0, 16.0, 16.0, 80 / 5.5, 1.0]))
