"""Laws of training for rate: integers at the coder's prices, found again in the file."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kompakt.artifact.container import Reader
from kompakt.build.priced import Start, attach, latents, priced_bits, refit, rising, settle, trainable
from kompakt.build.train import Hooks, Loader, TrainSettings, train
from kompakt.cli import main
from kompakt.coding.rate import rate_model
from kompakt.errors import InputError
from kompakt.numerics.grid import affine_params
from kompakt.numerics.lattice import lattice
from kompakt.numerics.priced import SHIFT, price_share, priced, priced_round
from kompakt.numerics.ranges import weight_range
from kompakt.plan.recipe import Recipe
from kompakt.spec import PerChannel, QuantSpec
from kompakt.training import keeper


def net() -> nn.Sequential:
    """A tiny network on digits of 8×8 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)).eval()


def starts(model: nn.Module, step: float) -> dict[str, Start]:
    weights = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    return {
        name: Start(weight=(w / step).round() * step, steps=torch.full((len(w),), step)) for name, w in weights.items()
    }


@pytest.fixture
def slopes() -> Tensor:
    return torch.rand(3, 4000, generator=torch.Generator().manual_seed(1)) * 6


def cost(q: Tensor, slopes: Tensor) -> Tensor:
    """Bits of whole magnitudes, one by one."""
    first, second, rest = slopes
    return first * (q >= 1) + second * (q >= 2) + rest * (q - 2).clamp(min=0)


def test_rounding_is_the_best_of_all_integers(slopes: Tensor) -> None:
    z = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 2.5
    every = torch.arange(-12.0, 13.0)[:, None]
    paid = (z - every).square() / 2 + SHIFT * cost(every.abs(), slopes)
    found = priced_round(z, slopes, 127)
    least = (z - found).square() / 2 + SHIFT * cost(found.abs(), slopes)
    assert torch.allclose(least, paid.min(0).values, atol=1e-5)


def test_what_lies_on_an_integer_stays_there(slopes: Tensor) -> None:
    z = torch.randint(-9, 10, (4000,), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(priced_round(z, 100 * slopes, 127), z)


def test_no_integer_is_beyond_the_most() -> None:
    z = torch.tensor([-300.0, -6.0, 6.0, 300.0])
    assert torch.equal(priced_round(z, torch.zeros(3, 4), 5), torch.tensor([-5.0, -5.0, 5.0, 5.0]))


def test_gradients_go_straight_through_rounding_and_down_the_price(slopes: Tensor) -> None:
    z = (torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()
    assert torch.equal(torch.autograd.grad(priced_round(z, slopes, 127).sum(), z)[0], torch.ones(4000))
    down = torch.autograd.grad(priced(z, slopes).sum(), z)[0]
    assert bool((down.sign() * z.sign() >= 0).all())


def test_the_price_between_integers_is_theirs_mixed(slopes: Tensor) -> None:
    z = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 6
    low, part = z.floor(), z.frac()
    assert torch.allclose(priced(z, slopes), (1 - part) * cost(low, slopes) + part * cost(low + 1, slopes), atol=1e-4)
    assert torch.equal(priced(-z, slopes), priced(z, slopes))


def test_the_penalty_is_what_the_coders_model_says() -> None:
    """With the same scales, but without the prediction, which depends on the neighbours."""
    values = np.random.default_rng(0).laplace(0, 0.7, (16, 8, 1, 1)).round().astype(np.int8)
    model = nn.Sequential(nn.Conv2d(8, 16, 1))
    attach(model, {"0.weight": Start(weight=torch.from_numpy(values * np.float32(0.5)), steps=torch.full((16,), 0.5))})
    prices = rate_model(values)
    bits = prices.bits(values)[0].sum() - prices.bits(np.zeros_like(values))[0].sum()
    assert float(priced_bits(1.0)(model).detach()) == pytest.approx(float(bits), rel=0.02)


def test_steps_of_a_grid_are_found_again_after_folding() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-30, 31, (20, 40), generator=generator) * torch.tensor([1, 0]).repeat(20)
    steps = torch.rand(20, generator=generator) + 0.01
    found = lattice(q * steps[:, None], 127)
    greatest = torch.tensor([float(np.gcd.reduce(row.numpy())) for row in q])
    assert torch.allclose(found, steps * greatest, rtol=1e-5)
    assert bool(lattice(torch.randn(20, 40, generator=generator), 127).isnan().all())


def test_a_range_that_keeps_the_grid_has_its_steps_as_scales() -> None:
    spec = QuantSpec(bits=8, granularity=PerChannel(axis=0))
    w = torch.tensor([[0.3, -0.6, 0.0], [0.0, 0.0, 0.0], [0.5, 0.1234, 0.9]])
    scale, _ = affine_params(*weight_range(w, spec, "lattice"), spec)
    assert float(scale[0]) == pytest.approx(0.3)
    plain, _ = affine_params(*weight_range(w, spec), spec)
    assert torch.equal(scale[1:], plain[1:])


def test_a_network_computes_on_its_grid_and_keeps_it_when_it_settles() -> None:
    model = net()
    names, x = [name for name, _ in model.named_parameters()], torch.randn(2, 3, 8, 8)
    attach(model, starts(model, 0.05))
    assert sorted(trainable(model)) == sorted(names)
    assert set(latents(model)) == {"0.weight", "4.weight"}
    with torch.no_grad():
        latents(model)["4.weight"][1].add_(0.02 * torch.randn(10, 216))
    before = model(x)
    settle(model)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    assert torch.equal(model(x), before)
    assert bool(torch.isfinite(lattice(model[4].weight.detach(), 127)).all())


def test_pruned_weights_stay_zero_on_the_grid() -> None:
    model = net()
    masks = {"4.weight": torch.rand(10, 216) < 0.3}
    attach(model, starts(model, 0.01))
    with torch.no_grad():
        latents(model)["4.weight"][1].add_(1.0)
    keeper(masks)(model, 1)
    assert not model[4].weight.detach()[~masks["4.weight"]].any()


def test_prices_follow_the_integers() -> None:
    model = net()
    attach(model, starts(model, 0.02))
    made, weight = latents(model)["4.weight"]
    before = made.slopes.clone()
    with torch.no_grad():
        weight.mul_(0.2)
    refit(model, 50)
    assert torch.equal(made.slopes, before)
    refit(model, 100)
    # Small integers are the rule now: a first step away from zero is dearer.
    assert float(made.slopes[0].mean()) > float(before[0].mean())


def packed(rate: float, folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``kompakt pack`` says of a tiny network on digits that it trained for rate."""
    model = ["tests.test_priced:net", "--data", "sklearn/digits", "--input-size", "8"]
    asked = ["--epochs", "3", "--rate", str(rate), "--max-drop", "100", "--json", "-o", str(folder / f"{rate:g}.kpk")]
    patch.setattr(sys, "argv", ["kompakt", "pack", *model, *asked])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    return json.loads(capsys.readouterr().out)


def test_training_for_rate_writes_its_integers_and_a_dearer_bit_takes_fewer_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap, dear = (packed(rate, tmp_path, monkeypatch, capsys) for rate in (1e-5, 1e-3))
    assert (tmp_path / "1e-05.kpk").stat().st_size == cheap["out_bytes"] > dear["out_bytes"]
    assert cheap["accuracy"] > cheap["baseline_accuracy"] + 0.05
    with Reader(tmp_path / "0.001.kpk") as reader:
        codes = [a for name in reader.records for a in reader.parts(name).values() if a.dtype == np.int8]
    assert len(codes) == 2
    assert max(int(np.abs(a.astype(int)).max()) for a in codes) < 32


def test_compressing_a_network_that_was_trained_for_rate_keeps_its_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "r.toml", tmp_path / "out"
    recipe.write_text("[finetune]\nepochs = 1\nrate = 1e-3\n")
    words = ["tests.test_priced:net", "--data", "sklearn/digits", "--input-size", "8", "--recipe", str(recipe)]
    monkeypatch.setattr(sys, "argv", ["kompakt", "compress", *words, "--out", str(out), "--quiet"])
    with pytest.raises(SystemExit):
        main()
    with Reader(out / "model.kpk") as reader:
        codes = [
            a for name in reader.records for a in reader.parts(name).values() if a.dtype == np.int8 and a.size > 99
        ]
    assert len(codes) == 2
    assert max(int(np.abs(a.astype(int)).max()) for a in codes) < 32


def test_a_recipe_says_what_a_bit_is_worth() -> None:
    assert Recipe.from_toml("[finetune]\nepochs = 1\nrate = 1e-6").finetune.rate == 1e-6
    for text in ("[finetune]\nrate = 0", "[qat]\nrate = 1e-6"):
        with pytest.raises(InputError, match="rate"):
            Recipe.from_toml(text)
    for text in ("[finetune]\nrise = 1", "[finetune]\nrise = -0.1", "[qat]\nrise = 0.5"):
        with pytest.raises(InputError, match="rise"):
            Recipe.from_toml(text)


def test_weights_are_trained_in_any_layout() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 3))
    starts = {f"{place}.weight": Start(weight=model[place].weight.detach().clone(), steps=torch.full((rows,), 0.01))
              for place, rows in ((0, 6), (1, 5))}  # fmt: skip
    attach(model, starts)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, bits = model(x), priced_bits(1.0)(model)
    model = model.to(memory_format=torch.channels_last)
    refit(model, 0)
    assert torch.allclose(model(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-5)
    assert torch.allclose(priced_bits(1.0)(model), bits)


@pytest.mark.parametrize(("rise", "first"), [(0.5, 0.01), (0.9, 0.3)])
def test_the_price_rises_evenly_in_its_logarithm_and_then_stays(rise: float, first: float) -> None:
    shares = [price_share(rise * done / 8, rise, first) for done in range(9)]
    assert shares[0] == pytest.approx(first)
    ratios = [after / before for before, after in itertools.pairwise(shares)]
    assert ratios == pytest.approx([first ** (-1 / 8)] * 8)
    assert price_share(1.0, rise, first) == price_share(0.0, 0.0, first) == shares[-1] == 1


def test_steps_grow_with_the_root_of_the_price_from_those_that_were_chosen() -> None:
    model, x = net(), torch.randn(2, 3, 8, 8)
    begun = starts(model, 0.02)
    with torch.no_grad():
        for name, start in begun.items():
            model.get_parameter(name).copy_(start.weight)
        expected = model(x)
    attach(model, begun, 0.04)
    assert torch.allclose(model(x), expected, atol=1e-5)
    made, weight = latents(model)["4.weight"]
    low, bits = priced_bits(1.0)(model), sum(float(part.bits(w).detach()) for part, w in latents(model).values())
    assert float(low.detach()) == pytest.approx(0.04 * bits, rel=1e-5)
    hook = rising(0.5, 100, 0.04)
    for step, size in ((0, 0.02), (25, 0.02 * 5**0.5), (50, 0.1), (99, 0.1)):
        hook(model, step)
        assert torch.allclose(made.steps, torch.tensor(size))
        q = made(weight) / size
        assert torch.allclose(q, q.round(), atol=1e-4)


class Stopped(Exception):
    """What a test stops a run with."""


@pytest.mark.parametrize("stop", [7, 100, 101, 140])
def test_a_run_that_was_stopped_goes_on_to_the_same_integers(tmp_path: Path, stop: int) -> None:
    def run(folder: Path, last: int) -> list[Tensor]:
        model = net()
        attach(model, starts(model, 0.005), 0.03)

        def interrupt(_model: nn.Module, step: int) -> None:
            if step == last:
                raise Stopped

        settings = TrainSettings(epochs=2, learning_rate=0.01, checkpoint=folder, checkpoint_every=10)
        hooks = Hooks(after_step=(rising(0.6, 160), refit, interrupt), progress=False)
        train(model, Loader(batches=noise, steps=80), settings, regularizers=(priced_bits(1e-4),), hooks=hooks)
        settle(model)
        return [p.detach() for p in model.parameters()]

    whole = run(tmp_path / "whole", -1)
    with pytest.raises(Stopped):
        run(tmp_path / "part", stop)
    assert all(map(torch.equal, run(tmp_path / "part", -1), whole))


def noise(epoch: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of noise."""
    generator = torch.Generator().manual_seed(epoch)
    draws = range(80)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in draws]
