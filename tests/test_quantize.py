"""Laws of calibration, planning and the simulated integer model."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kompakt.build.quantize import quantize, quantizers
from kompakt.errors import InputError, ModelError, PlanError
from kompakt.graph.calibrate import Stats, calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.measure.parity import sqnr_db
from kompakt.measure.sensitivity import sensitivities
from kompakt.methods.uniform import Knobs, uniform
from kompakt.plan.plan import Plan, Quantize, diff
from kompakt.plan.rules import ONNXRUNTIME, placed
from kompakt.spec import PerChannel, QuantSpec
from tests.nets import branches, images, residual, tokens


def prepared(model: nn.Module, x: torch.Tensor) -> tuple[Capture, Stats]:
    capture = fold(trace(model, x[:2]))
    return capture, calibrate(capture, [x], placed(capture.graph, ONNXRUNTIME))


def simulated(capture: Capture, stats: Stats, x: torch.Tensor, **knobs: object) -> np.ndarray:
    plan, _ = uniform(capture.graph, ONNXRUNTIME, Knobs(**knobs))  # type: ignore[arg-type]
    with torch.no_grad():
        return quantize(capture, plan, stats).module(x).numpy()


def test_more_bits_no_more_error() -> None:
    x = images(64)
    capture, stats = prepared(residual(), x)
    with torch.no_grad():
        reference = capture.module(x).numpy()
    found = [
        sqnr_db(reference, simulated(capture, stats, x, weight_bits=bits, activation_bits=bits))
        for bits in (2, 4, 6, 8)
    ]
    assert found == sorted(found)
    assert found[-1] > 25


@pytest.mark.parametrize("make", [residual, branches])
def test_eight_bits_are_close_to_float(make: object) -> None:
    x = images(64)
    capture, stats = prepared(make(), x)  # type: ignore[operator]
    with torch.no_grad():
        assert sqnr_db(capture.module(x).numpy(), simulated(capture, stats, x)) > 25


def test_quantize_changes_neither_the_capture_nor_the_plan() -> None:
    x = images(8)
    capture, stats = prepared(residual(), x)
    plan, _ = uniform(capture.graph, ONNXRUNTIME)
    before, nodes = copy.deepcopy(capture.module.state_dict()), len(capture.module.graph.nodes)
    made = quantize(capture, plan, stats)
    assert made.module is not capture.module
    assert len(capture.module.graph.nodes) == nodes
    for name, value in capture.module.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_same_plan_and_stats_give_the_same_outputs_to_the_bit() -> None:
    x = images(8)
    capture, stats = prepared(branches(), x)
    assert np.array_equal(simulated(capture, stats, x), simulated(capture, stats, x))


def test_a_plan_survives_json_and_holds_no_tensor() -> None:
    capture, _ = prepared(branches(), images(4))
    plan, _ = uniform(capture.graph, ONNXRUNTIME)
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert len(text) < 40_000
    assert diff(plan, Plan.from_json(text)) == ((), ())


def test_a_residual_sum_gets_integers_on_both_inputs_and_its_output() -> None:
    capture, _ = prepared(residual(), images(4))
    sites = placed(capture.graph, ONNXRUNTIME)
    add = next(op for op in capture.graph.ops if op.kind == "add")
    assert all(name in sites for name in add.refs)
    assert "relu_1" in sites
    assert "add_1" not in sites
    assert "add" not in sites, "the sum is rounded once, behind its ReLU"


def test_a_sum_made_inside_a_convolution_is_rounded_once() -> None:
    capture, stats = prepared(residual(), images(4))
    rules = replace(ONNXRUNTIME, sums_in_layer=True)
    add = next(op for op in capture.graph.ops if op.kind == "add")
    first, last = (name for name in placed(capture.graph, ONNXRUNTIME) if name in add.refs)
    sites = placed(capture.graph, rules)
    assert first in sites
    assert last not in sites
    assert set(placed(capture.graph, ONNXRUNTIME)) - set(sites) == {last}
    plan, _ = uniform(capture.graph, rules)
    assert last not in quantizers(quantize(capture, plan, stats).module)


def test_an_op_that_only_moves_values_shares_the_grid_of_its_source() -> None:
    x = images(8)
    capture, stats = prepared(residual(), x)
    plan, _ = uniform(capture.graph, ONNXRUNTIME)
    made = quantizers(quantize(capture, plan, stats).module)
    assert placed(capture.graph, ONNXRUNTIME)["max_pool2d"] == "relu_1"
    assert torch.equal(made["max_pool2d"].scale, made["relu_1"].scale)


def test_a_transformer_keeps_its_residual_stream_in_float() -> None:
    capture = fold(trace(tokens(), images(2, size=4, channels=12)))
    sites = placed(capture.graph, ONNXRUNTIME)
    add = next(op for op in capture.graph.ops if op.kind == "add")
    assert add.name not in sites
    assert {"layer_norm", "gelu"} <= set(sites)


def test_layers_that_are_kept_stay_float_and_are_named() -> None:
    x = images(8)
    capture, stats = prepared(residual(), x)
    plan, left = uniform(capture.graph, ONNXRUNTIME, Knobs(keep=frozenset({"conv2d_1"})))
    made = quantizers(quantize(capture, plan, stats).module)
    assert "conv2.weight" not in made
    assert "conv1.weight" in made
    assert [item.name for item in left] == ["conv2"]


def test_keeping_every_layer_is_the_identity() -> None:
    x = images(8)
    capture, stats = prepared(residual(), x)
    everything = frozenset(op.name for op in capture.graph.layers)
    with torch.no_grad():
        expected = capture.module(x).numpy()
    assert np.array_equal(simulated(capture, stats, x, keep=everything), expected)


def test_the_layer_that_was_made_fragile_is_the_most_sensitive() -> None:
    model = residual()
    with torch.no_grad():
        model.conv2.weight[:, 0] *= 200  # one input channel dwarfs the others; the rest loses its bits
    x = images(32)
    capture, stats = prepared(model, x)
    names = [op.name for op in capture.graph.layers]
    found = sensitivities(capture, ONNXRUNTIME, Knobs(weight_bits=4), stats, x, names)
    assert max(found, key=lambda name: found[name]) == "conv2d_1"


def test_dynamic_quantization_follows_each_input() -> None:
    x = images(8, size=4, channels=12)
    capture = fold(trace(tokens(), x[:2]))
    plan, _ = uniform(capture.graph, ONNXRUNTIME, Knobs(dynamic=True))
    made = quantize(capture, plan, Stats(histograms={}, means={}, examples=0))
    with torch.no_grad():
        for scale in (1.0, 100.0):
            assert sqnr_db(capture.module(x * scale).numpy(), made.module(x * scale).numpy()) > 25


def test_calibration_over_batches_equals_calibration_at_once() -> None:
    x = images(32)
    capture = fold(trace(residual(), x[:2]))
    sites = placed(capture.graph, ONNXRUNTIME)
    whole, parts = calibrate(capture, [x], sites), calibrate(capture, x.split(8), sites)
    for name in sites:
        assert whole.histograms[name].maximum == parts.histograms[name].maximum
        torch.testing.assert_close(whole.means[name], parts.means[name])


def test_calibration_without_a_batch_is_refused() -> None:
    capture = fold(trace(residual(), images(2)))
    with pytest.raises(InputError, match="no batch"):
        calibrate(capture, [], {"relu"})


def test_nan_in_an_activation_names_the_layer() -> None:
    model = residual()
    with torch.no_grad():
        model.conv2.bias[0] = float("inf")
    capture = fold(trace(model, images(2)))
    with pytest.raises(ModelError, match=r"conv2d_1 \(conv2, .*NaN or infinity"):
        calibrate(capture, [images(2)], placed(capture.graph, ONNXRUNTIME))


def test_a_plan_for_another_model_is_refused() -> None:
    x = images(4)
    capture, stats = prepared(residual(), x)
    entry = Quantize(tensor="layer9.weight", role="weight", spec=QuantSpec(granularity=PerChannel()))
    with pytest.raises(PlanError, match=r"layer9\.weight"):
        quantize(capture, Plan(entries=(entry,)), stats)
    with pytest.raises(PlanError, match="relu_9"):
        quantize(capture, Plan(entries=(replace(entry, tensor="relu_9", role="activation"),)), stats)


def test_a_group_size_that_does_not_divide_names_the_layer_and_the_sizes() -> None:
    x = images(4)
    capture, stats = prepared(residual(), x)
    plan, _ = uniform(capture.graph, ONNXRUNTIME, Knobs(group_size=48))
    with pytest.raises(InputError, match=r"conv1\.weight: group size 48 does not divide 27"):
        quantize(capture, plan, stats)


def test_an_unknown_layer_to_keep_is_refused() -> None:
    capture, _ = prepared(residual(), images(4))
    with pytest.raises(InputError, match="conv2d_7"):
        uniform(capture.graph, ONNXRUNTIME, Knobs(keep=frozenset({"conv2d_7"})))


def test_gradients_pass_straight_through_in_training() -> None:
    x = images(8)
    capture, stats = prepared(residual(), x)
    plan, _ = uniform(capture.graph, ONNXRUNTIME)
    module = quantize(capture, plan, stats).module.requires_grad_(True)
    for part in quantizers(module).values():
        part.train()
    module(x).square().mean().backward()
    gradient = module.get_submodule("conv1").weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
