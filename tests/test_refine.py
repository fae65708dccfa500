"""Laws of refinement: the function kept by equalization, less error by rounding on data, one set of integers."""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.artifact.onnx import export_onnx, open_onnx
from kompakt.build.equalize import chains, equalized, with_biases
from kompakt.build.importance import output_importance
from kompakt.build.integer import exact
from kompakt.build.quantize import codebooks, quantize, quantizers
from kompakt.build.rate import Rate
from kompakt.build.refine import Refinement, bias_corrected, refined
from kompakt.build.stream import Stream, fitting, peak_bytes
from kompakt.errors import InputError
from kompakt.graph.calibrate import Stats, calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, attribute, trace
from kompakt.measure.layers import outputs_of
from kompakt.methods.codebook import Knobs as CodebookKnobs
from kompakt.methods.codebook import codebook
from kompakt.methods.uniform import Knobs, uniform
from kompakt.numerics.adaround import Annealing
from kompakt.numerics.grid import quantize as integers
from kompakt.numerics.grid import saturation_free
from kompakt.plan.plan import Plan, Quantize
from kompakt.plan.rules import ONNXRUNTIME, placed
from kompakt.spec import PerTensor, QuantSpec
from tests.nets import branches, images, residual, tokens, trained_like

LEARNING = Annealing(iterations=400)
SHORT = Refinement(rounding="adaround", annealing=Annealing(iterations=20))
HOWS = {
    "gptq": Refinement(rounding="gptq"),
    "retarget": Refinement(rounding="retarget"),
    "retarget and bias": Refinement(rounding="retarget", bias_correction=True),
    "adaround": Refinement(rounding="adaround", annealing=LEARNING),
}


class Chain(nn.Module):
    """Convolutions, one depthwise, and a linear layer, with ReLUs and pooling between; scales badly apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.leaky_relu(self.depthwise(x), 0.1)
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


def chain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = trained_like(Chain(), seed)
    with torch.no_grad():
        model.first.weight.mul_(torch.logspace(-2, 1, 8)[:, None, None, None])
        model.norm.running_var.mul_(torch.logspace(-4, 2, 8))
        model.norm.weight.mul_(torch.logspace(-2, 1, 8))
        model.depthwise.weight.mul_(torch.logspace(1.5, -1, 8)[:, None, None, None])
    return model


def prepared(model: nn.Module, bits: int, x: Tensor | None = None) -> tuple[Capture, Capture, Plan, list[Tensor]]:
    """Return the float capture, its integers rounded to nearest, the plan and the calibration batches."""
    x = images(96, seed=1) if x is None else x
    capture = fold(trace(model, x[:2]))
    stats = calibrate(capture, [x], placed(capture.graph, ONNXRUNTIME))
    plan, _ = uniform(capture.graph, ONNXRUNTIME, Knobs(weight_bits=bits))
    return capture, quantize(capture, plan, stats), plan, list(x.split(32))


def error(capture: Capture, other: Capture, x: Tensor) -> float:
    with torch.no_grad():
        return float((capture.module(x) - other.module(x)).square().mean())


def per_tensor_error(capture: Capture, x: Tensor) -> float:
    """Squared error of the output with one scale for each weight tensor, activations in float, over its variance."""
    plan, _ = uniform(capture.graph, ONNXRUNTIME, Knobs(weight_range="minmax"))
    spec = QuantSpec(narrow=True, granularity=PerTensor())
    entries = tuple(replace(entry, spec=spec) for entry in plan.of(Quantize) if entry.role == "weight")
    made = quantize(capture, Plan(entries=entries), Stats(histograms={}, means={}, examples=0))
    with torch.no_grad():
        return error(capture, made, x) / float(capture.module(x).var())


def state(capture: Capture) -> dict[str, Tensor]:
    return copy.deepcopy(dict(capture.module.state_dict()))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_equalization_keeps_the_function_and_its_input() -> None:
    x = images(16)
    for model in (chain(), residual(), branches()):
        capture = fold(trace(model, x[:2]))
        before = state(capture)
        made = equalized(capture)
        assert same(state(capture), before)
        with torch.no_grad():
            wanted, given = capture.module(x), made.module(x)
        assert float((wanted - given).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_equalization_lowers_the_error_of_one_scale_a_tensor() -> None:
    x = images(32)
    capture = fold(trace(chain(), x[:2]))
    assert per_tensor_error(equalized(capture), x) < per_tensor_error(capture, x) / 4


def test_chains_stop_at_sums_and_at_what_is_not_homogeneous() -> None:
    def named(model: nn.Module) -> list[list[str]]:
        graph = fold(trace(model, images(2))).graph
        return [[op.module for op in run] for run in chains(graph)]

    assert named(chain()) == [["first", "depthwise", "last", "fc"]]
    assert named(residual()) == []
    assert named(branches()) == []  # ReLU6, a concatenation, SiLU


def test_neighbours_reach_equally_far_after_equalization() -> None:
    made = equalized(fold(trace(chain(), images(2))))
    first, depthwise = (attribute(made.module, f"{name}.weight") for name in ("first", "depthwise"))
    torch.testing.assert_close(first.abs().flatten(1).amax(1), depthwise.abs().flatten(1).amax(1), rtol=0.02, atol=0)


def test_biases_are_added_where_there_are_none_and_change_nothing() -> None:
    x = images(4)
    capture = fold(trace(chain(), x[:2]))
    made = with_biases(capture)
    assert [op.ref("bias") is None for op in capture.graph.layers] == [False, False, False, True]
    assert all(op.ref("bias") is not None for op in made.graph.layers)
    with torch.no_grad():
        assert torch.equal(capture.module(x), made.module(x))


def test_a_stream_computes_what_the_model_computes_and_keeps_its_inputs() -> None:
    x = images(6)
    capture = fold(trace(branches(), x[:2]))
    names = [op.name for op in capture.graph.layers]
    wanted = outputs_of(capture, x, names)
    batches = list(x.clone().split(2))
    stream = Stream(capture.module, batches)
    for name in names:
        stream.before(name)
        np.testing.assert_allclose(torch.cat(stream.peek()).numpy(), wanted[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat(batches), x)


def test_the_memory_of_a_stream_bounds_the_examples() -> None:
    capture = fold(trace(nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 2)), torch.zeros(2, 10)))
    assert peak_bytes(capture.graph, 2) == 4 * (30 + 30)
    assert fitting(capture, memory_bytes=4 * 60 * 2 * 7) == 7
    assert fitting(capture, memory_bytes=1) == 1


@pytest.mark.parametrize(
    ("how", "bits"),
    [*((how, bits) for how in ("gptq", "retarget", "retarget and bias") for bits in (3, 4)), ("adaround", 3)],
)
def test_rounding_on_data_beats_nearest_on_data_not_seen(how: str, bits: int) -> None:
    unseen = images(96, seed=2)
    capture, nearest, plan, batches = prepared(residual(), bits)
    made = refined(capture, nearest, plan, batches, HOWS[how])
    assert error(capture, made, unseen) < error(capture, nearest, unseen)


def test_bias_correction_lowers_the_error_of_the_mean_of_every_layer() -> None:
    capture, nearest, plan, batches = prepared(residual(), 3)
    made = bias_corrected(capture, nearest, plan, batches)
    names = [op.name for op in capture.graph.layers]
    x = torch.cat(batches)
    wanted, before, after = (outputs_of(each, x, names) for each in (capture, nearest, made))
    for name in names:
        rest = tuple(dim for dim in range(wanted[name].ndim) if dim != 1)
        off = [np.abs((each[name] - wanted[name]).mean(rest)) for each in (before, after)]
        assert off[1].max() < off[0].max() / 2
        # What is left is the rounding of the bias itself.
        assert (off[1] <= 0.51 * made.module.get_submodule(f"quantizers.{name}_bias").scale.numpy() + 1e-6).all()


def test_refinement_leaves_its_inputs_alone_and_repeats_to_the_bit() -> None:
    capture, nearest, plan, batches = prepared(branches(), 4)
    before, kept, given = state(capture), state(nearest), [batch.clone() for batch in batches]
    for how in (HOWS["retarget and bias"], SHORT):
        first, second = (refined(capture, nearest, plan, batches, how) for _ in range(2))
        assert same(state(first), state(second))
        assert not same(state(first), kept)
    assert same(state(capture), before)
    assert same(state(nearest), kept)
    assert all(torch.equal(a, b) for a, b in zip(batches, given, strict=True))


@pytest.mark.parametrize("how", [HOWS["gptq"], HOWS["retarget and bias"], SHORT], ids=lambda how: how.rounding)
def test_weights_lie_on_the_grid_that_their_quantizers_have(how: Refinement) -> None:
    capture, nearest, plan, batches = prepared(residual(), 4)
    made = refined(capture, nearest, plan, batches, how)
    found = quantizers(made.module)
    for op in made.graph.layers:
        weight = attribute(made.module, str(op.ref("weight")))
        assert torch.equal(found[str(op.ref("weight"))](weight), weight)


@pytest.mark.parametrize(("make", "bits"), [(residual, 4), (branches, 8)])
def test_the_exported_file_computes_what_was_simulated(make: object, bits: int, tmp_path: Path) -> None:
    capture, nearest, plan, batches = prepared(make(), bits)  # type: ignore[operator]
    made = refined(capture, nearest, plan, batches, Refinement(bias_correction=True))
    runtime = open_onnx(export_onnx(made, tmp_path / "model.onnx"), 1)
    x = images(64, seed=3)
    with torch.no_grad():
        wanted = made.module(x).numpy()
    given = runtime(x.numpy())
    assert np.abs(wanted - given).max() <= 0.02 * np.abs(wanted).max()
    assert (np.abs(wanted - given) > 1e-4).mean() < 0.1


def test_linear_layers_on_tokens_are_refined_too() -> None:
    x = images(96, size=4, channels=12)
    capture, nearest, plan, batches = prepared(tokens(), 3, x)
    made = refined(capture, nearest, plan, batches, Refinement(bias_correction=True))
    unseen = images(96, size=4, channels=12, seed=5)
    assert error(capture, made, unseen) < error(capture, nearest, unseen)


def test_a_weight_read_by_two_layers_is_left_as_it_was() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.fc(x)))

    torch.manual_seed(0)
    capture, nearest, plan, batches = prepared(Twice().eval(), 4, torch.randn(64, 6))
    made = refined(capture, nearest, plan, batches)
    assert same(state(made), state(nearest))


def test_no_batch_is_refused() -> None:
    capture, nearest, plan, _ = prepared(residual(), 4)
    with pytest.raises(InputError, match="no batch"):
        refined(capture, nearest, plan, [])


def test_more_bits_no_more_error_after_refinement() -> None:
    x = images(64, seed=4)
    found = []
    for bits in (2, 3, 4, 6):
        capture, nearest, plan, batches = prepared(residual(), bits)
        found.append(error(capture, refined(capture, nearest, plan, batches), x))
    assert all(a >= b for a, b in pairwise(found))


@pytest.mark.parametrize("rounding", ["gptq", "retarget"])
@pytest.mark.parametrize("model", [chain, lambda: trained_like(residual())], ids=["chain", "residual"])
def test_codebooks_are_chosen_for_the_inputs_too(model, rounding, tmp_path: Path) -> None:
    x = images(96, seed=1)
    capture = fold(trace(model(), x[:2]))
    plan, _ = codebook(capture.graph, CodebookKnobs(bits=2))
    nearest = quantize(capture, plan, Stats(histograms={}, means={}, examples=0))
    made = refined(capture, nearest, plan, x.split(32), Refinement(rounding=rounding))
    assert error(capture, made, x) < 0.8 * error(capture, nearest, x)
    for name, book in codebooks(made.module).items():
        assert torch.equal(book(attribute(made.module, name)), attribute(made.module, name))
    runtime = open_onnx(export_onnx(made, tmp_path / "m.onnx"), 1)
    with torch.no_grad():
        np.testing.assert_allclose(runtime(x[:8].numpy()), made.module(x[:8]).numpy(), rtol=1e-3, atol=1e-4)


def test_adaround_is_refused_for_codebooks() -> None:
    capture = fold(trace(chain(), images(2)))
    plan, _ = codebook(capture.graph, CodebookKnobs(bits=2))
    with pytest.raises(InputError, match="adaround learns to round up or down"):
        refined(capture, quantize(capture, plan, Stats(histograms={}, means={}, examples=0)), plan, [images(8)], SHORT)


def test_integers_by_rate_and_distortion_code_small_and_cannot_saturate(tmp_path: Path) -> None:
    capture, nearest, plan, batches = prepared(trained_like(residual()), 8)
    importance = output_importance(capture, batches)
    sizes, errors = [], []
    for trade in (1e-7, 1e-4):
        how = Refinement(bias_correction=True, rate=Rate(trade=trade, importance=importance))
        made = refined(capture, nearest, plan, batches, how)
        for name, each in quantizers(made.module).items():
            if name in made.graph.tensor:
                weight = attribute(made.module, name)
                q = integers(weight, each.scale, each.zero_point, each.spec)
                assert bool(saturation_free(q).all())
        path = export_onnx(made, tmp_path / f"{trade}.onnx")
        x = images(64, seed=3)
        with torch.no_grad():
            assert np.array_equal(open_onnx(path, 1)(x.numpy()), exact(made).module(x).numpy())
        sizes.append(pack_onnx(path, tmp_path / f"{trade}.kpk"))
        errors.append(error(capture, made, torch.cat(batches)))
    assert sizes[1] < sizes[0] < pack_onnx(export_onnx(nearest, tmp_path / "n.onnx"), tmp_path / "n.kpk")
    assert errors[0] < errors[1]
