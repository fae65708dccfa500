"""Laws below eight bits: codebooks, bits by layer, quantization-aware training, 4-bit storage."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from kompakt.artifact.onnx import export_onnx, open_onnx
from kompakt.artifact.targets import target
from kompakt.bits import planned
from kompakt.build.aware import aware, shipped, with_signs
from kompakt.build.quantize import codebooks, quantize, quantizers
from kompakt.build.taps import set_mode
from kompakt.build.train import Loader, TrainSettings, train
from kompakt.data import Data
from kompakt.errors import BudgetError, InputError, KompaktError, PlanError
from kompakt.graph.calibrate import Stats, calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.loaders import loader_split
from kompakt.measure.sensitivity import bit_errors
from kompakt.methods.codebook import Knobs as BookKnobs
from kompakt.methods.codebook import codebook
from kompakt.methods.mixed import FLOAT, Budgets, Pace, ends, mixed
from kompakt.methods.uniform import Knobs, uniform
from kompakt.numerics.codebook import share
from kompakt.numerics.grid import lsq_quantize
from kompakt.numerics.hessian import hessian_traces
from kompakt.pace import kept_pace
from kompakt.plan.plan import Plan, Quantize, Share
from kompakt.plan.recipe import QuantizeSection
from kompakt.plan.rules import ONNXRUNTIME, placed
from kompakt.spec import QuantSpec
from tests.nets import branches, images, residual, tokens

X = images(64)
EMPTY = Stats(histograms={}, means={}, examples=0)


def prepared(model: nn.Module, x: Tensor = X) -> tuple[Capture, Capture, Stats]:
    capture = trace(model, x[:2])
    folded = fold(capture)
    return capture, folded, calibrate(folded, [x], placed(folded.graph, ONNXRUNTIME))


def ort(made: Capture, x: Tensor, folder: Path) -> Tensor:
    return torch.from_numpy(open_onnx(export_onnx(made, folder / "m.onnx"))(x.numpy()))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_more_values_in_a_codebook_no_more_error_and_the_file_computes_the_same(
    granularity: Any, tmp_path: Path
) -> None:
    _, folded, _ = prepared(residual())
    errors = []
    for bits in (1, 2, 4, 7):
        plan, _ = codebook(folded.graph, BookKnobs(bits=bits, granularity=granularity))
        made = quantize(folded, plan, EMPTY)
        with torch.no_grad():
            output, reference = made.module(X), folded.module(X)
        assert torch.allclose(ort(made, X, tmp_path), output, atol=1e-5)
        errors.append(float((output - reference).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_indices_of_up_to_four_bits_stand_two_to_a_byte(tmp_path: Path) -> None:
    _, folded, _ = prepared(residual())
    plan, _ = codebook(folded.graph, BookKnobs(bits=4))
    file = export_onnx(quantize(folded, plan, EMPTY), tmp_path / "m.onnx")
    kinds = [tensor.data_type for tensor in onnx.load(str(file)).graph.initializer]
    assert kinds.count(onnx.TensorProto.UINT4) == len(folded.graph.layers)
    assert onnx.TensorProto.UINT8 not in kinds


@pytest.mark.parametrize("start", ["linear", "density", "random"])
def test_the_exact_codebook_is_no_worse_than_lloyds(start: Any) -> None:
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(3))

    def error(how: Any) -> float:
        indices, books = share(weight, 3, "tensor", how, generator=torch.Generator().manual_seed(0))
        return float((books[0][indices.long()] - weight).square().sum())

    assert error("exact") <= error(start) * (1 + 1e-6)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_constant_layers_lose_nothing_in_a_codebook(value: float) -> None:
    indices, books = share(torch.full((4, 6), value), 4)
    assert torch.equal(books[0][indices.long()], torch.full((4, 6), value))


def test_a_weight_is_quantized_or_shared_not_both() -> None:
    _, folded, stats = prepared(residual())
    name = str(folded.graph.layers[0].ref("weight"))
    plan = Plan(entries=(Quantize(tensor=name, role="weight", spec=QuantSpec(bits=4)), Share(tensor=name, bits=4)))
    with pytest.raises(PlanError, match="keep one of the two"):
        quantize(folded, plan, stats)
    with pytest.raises(PlanError, match="no such tensor"):
        quantize(folded, Plan(entries=(Share(tensor="nowhere", bits=4),)), stats)


@pytest.mark.parametrize(("make", "x"), [(residual, X), (branches, X), (tokens, images(16, size=4, channels=12))])
def test_four_bit_weights_two_to_a_byte_load_in_the_runtime(make: Any, x: Tensor, tmp_path: Path) -> None:
    _, folded, stats = prepared(make(), x)
    asked = QuantizeSection(weight_bits=4, packed=True)
    plan, _, _ = planned(_job(), asked, folded, stats, frozenset())
    made = quantize(folded, plan, stats)
    with torch.no_grad():
        wanted = made.module(x)
    found = ort(made, x, tmp_path)
    kinds = [tensor.data_type for tensor in onnx.load(str(tmp_path / "m.onnx")).graph.initializer]
    assert kinds.count(onnx.TensorProto.INT4) >= len(folded.graph.layers)
    step = float(wanted.max() - wanted.min()) / 255
    assert float((found - wanted).abs().max()) <= 2 * step + 1e-5


def test_the_gradient_of_a_learned_step_is_that_of_finite_differences() -> None:
    spec, generator = QuantSpec(bits=3), torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=generator)
    scale = torch.tensor(0.31, requires_grad=True)
    lsq_quantize(x, scale, torch.tensor(0), spec, 1.0).sum().backward()
    found, value = scale.grad, scale.detach().double()
    steps = (x.double() / value).round().clamp(spec.qmin, spec.qmax)
    # Rounding is passed straight through: x/s - round(x/s) is held while s moves, outside the clamp nothing is.
    inside = (x / value).ge(spec.qmin) & (x / value).le(spec.qmax)
    rest = torch.where(inside, steps - x.double() / value, 0.0)

    def surrogate(s: Tensor) -> Tensor:
        return (s * ((x.double() / s).clamp(spec.qmin, spec.qmax) + rest)).sum()

    difference = (surrogate(value + 1e-6) - surrogate(value - 1e-6)) / 2e-6
    assert found is not None
    assert float(found) == pytest.approx(float(difference), rel=1e-3)


def _trained(make: Any, knobs: Knobs, form: Any = "steps", epochs: int = 1) -> tuple[Any, Stats, list[float]]:
    capture, folded, stats = prepared(make())
    plan, _ = uniform(folded.graph, ONNXRUNTIME, knobs)
    made = aware(capture, with_signs(plan, form), stats, form)
    labels = torch.arange(len(X)) % 4
    loader = Loader(batches=lambda epoch: [(X, labels)] * 15, steps=15)
    history = train(made.module, loader, TrainSettings(epochs=epochs, learning_rate=0.02)).history
    set_mode(made.module, False)
    return made, stats, [record.loss for record in history]


@pytest.mark.parametrize(
    ("bits", "form"), [((8, 8), "steps"), ((4, 4), "steps"), ((2, 8), "ternary"), ((1, 8), "binary")]
)
@pytest.mark.parametrize("make", [residual, branches])
def test_what_was_trained_is_what_ships(make: Any, bits: tuple[int, int], form: Any, tmp_path: Path) -> None:
    made, stats, losses = _trained(make, Knobs(weight_bits=bits[0], activation_bits=bits[1]), form, epochs=2)
    ships, _ = shipped(made, stats)
    with torch.no_grad():
        trained, wanted = made.module(X), ships.module(X)
    assert losses[-1] < losses[0]
    assert float((trained - wanted).abs().max()) < 0.1 * float(trained.abs().max()) + 0.05
    step = float(wanted.max() - wanted.min()) / 255
    assert float((ort(ships, X, tmp_path) - wanted).abs().max()) <= 2 * step + 1e-5
    assert not any(isinstance(each.scale, nn.Parameter) for each in quantizers(ships.module).values())


def test_training_moves_steps_and_leaves_the_capture_alone() -> None:
    capture, folded, stats = prepared(residual())
    before = {name: value.clone() for name, value in capture.module.state_dict().items()}
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(weight_bits=4, activation_bits=4))
    made = aware(capture, plan, stats)
    start = {name: each.scale.detach().clone() for name, each in quantizers(made.module).items()}
    train(made.module, Loader(batches=lambda e: [(X, torch.arange(64) % 4)], steps=1), TrainSettings(learning_rate=0.1))
    moved = [not torch.equal(each.scale, start[name]) for name, each in quantizers(made.module).items()]
    assert all(moved)
    assert all(torch.equal(value, before[name]) for name, value in capture.module.state_dict().items())


def test_a_value_of_a_codebook_gets_the_mean_of_its_weights_gradients() -> None:
    capture, folded, stats = prepared(residual())
    plan, _ = codebook(folded.graph, BookKnobs(bits=3))
    made = aware(capture, plan, stats)
    name = str(folded.graph.layers[1].ref("weight"))
    book = codebooks(made.module)[name]
    shared = book.values.detach()[0][book.indices.long()].requires_grad_(True)
    grads = []
    for replace in (False, True):
        made.module.zero_grad()
        if replace:
            book.forward = lambda weight: shared  # type: ignore[method-assign]
        made.module(X).square().sum().backward()
        grads.append(book.values.grad if not replace else shared.grad)
    places, grad = book.indices.long().flatten(), grads[1].flatten()  # type: ignore[union-attr]
    wanted = torch.zeros(8).scatter_add_(0, places, grad) / places.bincount(minlength=8).clamp_min(1)
    assert torch.allclose(grads[0][0], wanted, rtol=1e-3, atol=1e-4)  # type: ignore[index]


def _job(**changes: Any) -> Any:
    from kompakt.job import Job

    given: dict[str, Any] = {"data": None, **changes}
    return Job(model=nn.Identity(), name="", source="", target=target("onnxruntime"), out=Path(), **given)


def _errors(folded: Capture, stats: Stats) -> dict[str, dict[int, float]]:
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs())
    names = [str(op.ref("weight")) for op in folded.graph.layers]
    inputs = [str(op.ref("input")) for op in folded.graph.layers[:2]]
    return bit_errors(folded, plan, stats, X, dict.fromkeys([*names, *inputs], (2, 4, 8)))


def test_bits_by_layer_keep_the_budget_and_are_no_worse_than_one_width_for_all() -> None:
    _, folded, stats = prepared(residual())
    errors = _errors(folded, stats)
    weights = {name: each for name, each in errors.items() if name in folded.graph.tensor}
    found = mixed(folded.graph, ONNXRUNTIME, weights, Budgets(average_bits=4.0), 8, frozenset())
    numel = {name: folded.graph.tensor[name].numel for name in weights}
    assert sum(found[name] * count for name, count in numel.items()) <= 4.0 * sum(numel.values()) + 1e-6
    assert sum(weights[n][b] for n, b in found.items()) <= sum(each[4] for each in weights.values()) + 1e-12
    joint = mixed(folded.graph, ONNXRUNTIME, errors, Budgets(fewer_bops=4.0), 8, frozenset())
    assert set(joint) == set(errors)
    with pytest.raises(BudgetError, match="smallest"):
        mixed(folded.graph, ONNXRUNTIME, weights, Budgets(average_bits=1.5), 8, frozenset())


def test_ends_are_the_first_and_last_weight_and_what_they_read() -> None:
    _, folded, _ = prepared(residual())
    found = ends(folded.graph, ONNXRUNTIME, frozenset())
    assert {"conv1.weight", "fc.weight", "x"} <= set(found)
    assert set(found.values()) == {8}
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(weight_bits=4, activation_bits=4, bits=found))
    bits = {entry.tensor: entry.spec.bits for entry in plan.of(Quantize)}
    assert bits["conv1.weight"] == bits["x"] == bits["fc.weight"] == 8
    assert bits["conv2.weight"] == 4


def test_the_trace_of_a_hessian_is_exact_for_a_diagonal_one() -> None:
    x, y = (torch.randn(5, requires_grad=True) for _ in range(2))
    found = hessian_traces((x.pow(2) * 3).sum() + y.pow(2).sum(), [x, y], 2, torch.Generator().manual_seed(0))
    assert found == pytest.approx([30.0, 10.0])


def test_layers_stay_float_as_far_as_the_measured_time_allows() -> None:
    _, folded, _ = prepared(residual())
    names = [str(op.ref("weight")) for op in folded.graph.layers]
    errors = {name: {8: float(place + 1), FLOAT: 0.0} for place, name in enumerate(names)}
    pace = Pace(original_ms=20.0, integers_ms=10.0, slower=dict.fromkeys(names, 1.0))

    def at(ms: float) -> dict[str, int]:
        return mixed(folded.graph, ONNXRUNTIME, errors, Budgets(), 8, frozenset(), pace=pace, max_ms=ms)

    for room in range(len(names) + 1):
        floats = [name for name, bits in at(10.0 + room).items() if bits == FLOAT]
        assert floats == names[len(names) - room :]  # those whose integers cost most
    with pytest.raises(BudgetError):
        at(9.0)

    class Slow:
        """Every layer in float costs twice what was measured alone."""

        job = _job()

        def speed(self, floats) -> float:
            return 20.0 / (10.0 + 2 * len(list(floats)))

    bits, speed = kept_pace(at, Slow(), pace, 1.6)  # 12.5 ms: two as measured alone, one in truth
    assert speed >= 1.6
    assert sum(width == FLOAT for width in bits.values()) == 1
    with pytest.raises(BudgetError, match="the fastest that was tried is 2"):
        kept_pace(at, Slow(), pace, 3.0)


def test_a_file_in_which_layers_stay_float_is_timed(tmp_path: Path) -> None:
    _, folded, stats = prepared(residual())
    section = QuantizeSection(times_faster=0.02, widths=(8,))
    job = _job(data=Data(train=loader_split([(X, torch.zeros(len(X)).long())], "x"), validation=None, test=None))
    plan, _, notes = planned(job, section, folded, stats, frozenset())
    assert "stay float; measured" in " ".join(notes)
    assert len(plan.of(Quantize)) < len(planned(job, QuantizeSection(), folded, stats, frozenset())[0].of(Quantize))
    with pytest.raises(BudgetError, match="no assignment of bits is 1000 times faster"):
        planned(job, section.model_copy(update={"times_faster": 1000.0}), folded, stats, frozenset())


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"codebook": 4, "weight_bits": 4}, "codebook and weight_bits"),
        ({"codebook": 4, "average_bits": 4}, "codebook and mixed"),
        ({"rate": 1e-8, "weight_bits": 4}, "rate and weight_bits"),
        ({"average_bits": 4, "weight_bits": 4}, "weight_bits and a budget"),
        ({"average_bits": 4, "dynamic": True}, "static ranges"),
        ({"fewer_bops": 2, "sensitivity": "hessian"}, "weights only"),
    ],
)
def test_keys_that_exclude_each_other_are_refused(section: dict[str, Any], said: str) -> None:
    _, folded, stats = prepared(residual())
    with pytest.raises(InputError, match=said):
        planned(_job(), QuantizeSection(**section), folded, stats, frozenset())


def test_a_plan_of_ones_own_is_carried_out_as_it_stands() -> None:
    _, folded, stats = prepared(residual())
    plan, _ = codebook(folded.graph, BookKnobs(bits=3))
    edited = Plan.from_json(plan.to_json().replace('"bits": 3', '"bits": 5', 1))
    found, _, notes = planned(_job(plan=edited), QuantizeSection(), folded, stats, frozenset())
    assert found == edited
    assert "as it stands" in notes[0]
    assert next(iter(codebooks(quantize(folded, found, stats).module).values())).bits == 5


def test_weights_that_are_not_finite_and_groups_that_do_not_divide_are_named() -> None:
    _, folded, stats = prepared(residual())
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(weight_bits=4, group_size=5))
    with pytest.raises(InputError, match=r"conv1.weight: group size 5 does not divide 27; use 1, 3, 9"):
        quantize(folded, plan, stats)
    folded.module.get_parameter("conv2.weight").data[0] = float("nan")
    shared, _ = codebook(folded.graph, BookKnobs(bits=4))
    with pytest.raises(KompaktError, match=r"conv2.weight: NaN"):
        quantize(folded, shared, EMPTY)
    assert np.isfinite(folded.module.get_parameter("conv1.weight").detach().numpy()).all()
