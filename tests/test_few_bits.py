"""Laws of grouped and packed integers, trained grids, one-bit activations, and of the way back to float."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt.artifact.onnx import Options, export_onnx, open_onnx
from kompakt.artifact.targets import target
from kompakt.awareness import begun
from kompakt.bits import unquantized
from kompakt.build.aware import Aware, aware, shipped, with_signs, without_tensors
from kompakt.build.integer import exact
from kompakt.build.layers import TwoValues
from kompakt.build.quantize import codebooks, quantize, quantizers
from kompakt.build.taps import set_mode
from kompakt.build.train import Loader, TrainSettings, train
from kompakt.data import Data, Split
from kompakt.errors import BudgetError, InputError, KompaktError
from kompakt.graph.calibrate import Stats, calibrate
from kompakt.graph.fold import fold
from kompakt.graph.trace import Capture, trace
from kompakt.job import Job
from kompakt.loaders import loader_split
from kompakt.measure.judge import Judge
from kompakt.measure.parity import sqnr_db
from kompakt.methods.codebook import Knobs as BookKnobs
from kompakt.methods.codebook import codebook
from kompakt.methods.uniform import Knobs, uniform
from kompakt.numerics.binary import trained_ternary
from kompakt.numerics.codebook import LEVELS, project
from kompakt.plan.plan import Plan, Quantize
from kompakt.plan.recipe import QuantizeSection, Recipe
from kompakt.plan.rules import ONNXRUNTIME, placed
from kompakt.refinement import notes
from kompakt.search import compress
from kompakt.spec import PerChannel, PerGroup, PerTensor, QuantSpec
from tests.integer_nets import Residual as IntegerResidual
from tests.integer_nets import inputs, seeded
from tests.nets import images, residual

X = images(48)
LABELS = torch.arange(len(X)) % 4


class Flat(nn.Module):
    """Two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3 * 256, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flatten(1))))


def prepared(model: nn.Module, x: Tensor = X) -> tuple[Capture, Capture, Stats]:
    capture = trace(model.eval(), x[:2])
    folded = fold(capture)
    return capture, folded, calibrate(folded, [x], placed(folded.graph, ONNXRUNTIME))


def flat() -> nn.Module:
    torch.manual_seed(0)
    return Flat()


def learn(made: Aware, steps: int = 20) -> list[float]:
    loader = Loader(batches=lambda epoch: [(X, LABELS)] * steps, steps=steps)
    records = train(made.module, loader, TrainSettings(epochs=2, learning_rate=0.02)).history
    set_mode(made.module, False)
    return [record.loss for record in records]


@pytest.mark.parametrize(("make", "bits", "size"), [(residual, 8, 8), (flat, 4, 16), (flat, 8, 32)])
def test_groups_ship_as_integers_and_run_as_simulated(make: Any, bits: int, size: int, tmp_path: Path) -> None:
    _, folded, stats = prepared(make())
    keep = frozenset({"conv2d"}) if make is residual else frozenset()
    knobs = Knobs(weight_bits=bits, group_size=size, keep=keep)
    plan, _ = uniform(folded.graph, ONNXRUNTIME, knobs)
    packed = [replace(e, spec=replace(e.spec, packed=bits == 4)) if e.role == "weight" else e for e in plan.entries]
    made = quantize(folded, Plan(entries=tuple(packed)), stats)
    path = export_onnx(made, tmp_path / "m.onnx")
    model = onnx.load(str(path))
    blocked = [n for n in model.graph.node if any(a.name == "block_size" and a.i > 0 for a in n.attribute)]
    stored = {item.name: item.data_type for item in model.graph.initializer}
    kind = onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8
    assert [stored[node.input[0]] for node in blocked] == [kind] * 2
    with torch.no_grad():
        wanted = made.module(X).numpy()
    assert np.allclose(open_onnx(path)(X.numpy()), wanted, atol=2e-2 * float(np.abs(wanted).max()))
    assert np.allclose(open_onnx(path, options=Options(level="disabled"))(X.numpy()), wanted, atol=1e-4)
    if make is flat:
        assert [node.op_type for node in model.graph.node].count("MatMul") == 2


def test_four_bits_of_a_linear_map_load_as_a_product_and_a_sum(tmp_path: Path) -> None:
    _, folded, stats = prepared(flat())
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(weight_bits=4))
    entries = tuple(replace(e, spec=replace(e.spec, packed=e.role == "weight")) for e in plan.of(Quantize))
    made = quantize(folded, Plan(entries=entries), stats)
    path = export_onnx(made, tmp_path / "m.onnx")
    model = onnx.load(str(path))
    assert [n.op_type for n in model.graph.node].count("MatMul") == 2
    assert [t.data_type for t in model.graph.initializer].count(onnx.TensorProto.INT4) >= 2
    with torch.no_grad():
        wanted = made.module(X).numpy()
    assert np.allclose(open_onnx(path)(X.numpy()), wanted, atol=2e-2 * float(np.abs(wanted).max()))


def test_the_gradient_of_a_grids_scale_is_that_of_finite_differences() -> None:
    levels, generator = LEVELS["apot"](4), torch.Generator().manual_seed(0)
    rows = torch.randn(2, 200, generator=generator).double()
    levels, scale = levels.double(), torch.tensor([[1.1], [0.7]], dtype=torch.float64, requires_grad=True)
    project(rows, scale, levels).sum().backward()
    value = scale.detach()
    inside = (rows / value).clamp(-1, 1)
    rest = project(rows, value, levels) / value - inside  # what rounding moves, held while the scale moves
    rest = torch.where((rows / value).abs() <= 1, rest, 0.0)

    def surrogate(s: Tensor) -> Tensor:
        return (s * ((rows / s).clamp(-1, 1) + rest)).sum(1, keepdim=True)

    difference = (surrogate(value + 1e-6) - surrogate(value - 1e-6)) / 2e-6
    assert torch.allclose(scale.grad, difference, rtol=1e-4)  # type: ignore[arg-type]


def test_ternary_rows_train_as_single_layers_do() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, grad = (torch.randn(3, 40, generator=generator) for _ in range(2))
    ends = [torch.rand(3, 1, generator=generator, requires_grad=True) for _ in range(2)]
    weight = rows.clone().requires_grad_(True)
    (trained_ternary(weight, ends[0], ends[1], 0.1) * grad).sum().backward()
    for row in range(3):
        single = [end.detach()[row, 0].clone().requires_grad_(True) for end in ends]
        alone = rows[row].clone().requires_grad_(True)
        (trained_ternary(alone, single[0], single[1], 0.1) * grad[row]).sum().backward()
        assert torch.allclose(weight.grad[row], alone.grad)  # type: ignore[index, arg-type]
        for whole, one in zip(ends, single, strict=True):
            assert torch.allclose(whole.grad[row, 0], one.grad)  # type: ignore[index, arg-type]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("grid", "bits"), [("apot", 4), ("power_of_two", 3), ("ternary", 2)])
def test_what_was_trained_on_a_grid_is_what_ships(grid: Any, bits: int, granularity: Any, tmp_path: Path) -> None:
    capture, folded, stats = prepared(residual())
    plan, _ = codebook(folded.graph, BookKnobs(bits=bits, grid=grid, granularity=granularity))
    assert Plan.from_json(plan.to_json()) == plan
    made = aware(capture, plan, stats)
    losses = learn(made)
    ships, _ = shipped(made, stats)
    with torch.no_grad():
        trained, wanted = made.module(X), ships.module(X)
    assert losses[-1] < losses[0]
    assert torch.allclose(trained, wanted, atol=1e-4 * float(trained.abs().max()) + 1e-5)
    found = torch.from_numpy(open_onnx(export_onnx(ships, tmp_path / "m.onnx"))(X.numpy()))
    assert torch.allclose(found, wanted, atol=1e-4)
    for book in codebooks(ships.module).values():
        top = book.values.abs().amax(1, keepdim=True)
        if grid == "ternary":
            assert book.values.shape[1] == 3
            assert not book.values[:, 1].any()
        else:
            levels = LEVELS[grid](bits).expand_as(book.values)
            assert torch.allclose((book.values / top).sort(1).values, levels, atol=1e-6)


def test_one_bit_of_activations_is_two_learned_values_that_only_layers_read(tmp_path: Path) -> None:
    capture, folded, stats = prepared(residual())
    knobs = Knobs(weight_bits=1, activation_bits=1, bits={"x": 8, "conv1.weight": 8})
    plan, _ = uniform(folded.graph, ONNXRUNTIME, knobs)
    made = aware(capture, with_signs(plan, "binary"), stats, "binary")
    losses = learn(made)
    ships, _ = shipped(made, stats)
    assert losses[-1] < losses[0]
    found = [node for node in ships.module.graph.nodes if node.op == "call_module"
             and isinstance(ships.module.get_submodule(str(node.target)), TwoValues)]  # fmt: skip
    assert found
    for node in found:
        assert {user.target for user in node.users} <= {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
        two = ships.module.get_submodule(str(node.target))
        with torch.no_grad():
            seen = two(torch.randn(8, len(two.shift), 4, 4) * 3)  # type: ignore[arg-type]
        assert all(len(seen[:, channel].unique()) == 2 for channel in range(seen.shape[1]))
    with torch.no_grad():
        trained, wanted = made.module(X), ships.module(X)
    # A sum that lies on the threshold may fall to either side once the batch norm is folded.
    assert float(((trained - wanted).abs() < 1e-3 * float(trained.abs().max()) + 1e-4).float().mean()) > 0.9
    runtime = torch.from_numpy(open_onnx(export_onnx(ships, tmp_path / "m.onnx"))(X.numpy()))
    assert float(((runtime - wanted).abs() < 1e-3 * float(wanted.abs().max()) + 1e-4).float().mean()) > 0.98


def test_float_sums_leave_few_bits_to_what_layers_multiply(tmp_path: Path) -> None:
    capture, folded, stats = prepared(residual())
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(weight_bits=3, activation_bits=3, float_sums=True))
    made = aware(capture, plan, stats)
    losses = learn(made)
    ships, _ = shipped(made, stats)
    assert losses[-1] < losses[0]
    for node in ships.module.graph.nodes:
        if node.op == "call_module" and str(node.target) in {f"quantizers.{e.tensor}" for e in plan.of(Quantize)}:
            assert {user.target for user in node.users} <= {
                torch.ops.aten.conv2d.default,
                torch.ops.aten.linear.default,
            }
    said = notes(QuantizeSection(weight_bits=3, activation_bits=3, float_sums=True), ships, ".onnx", taught=True)
    assert any("sums stay float" in line for line in said)
    branch = next(op for op in folded.graph.ops if op.kind == "add")
    assert not {branch.name, *branch.refs} & {e.tensor for e in plan.of(Quantize) if e.readers == "all"}
    with torch.no_grad():
        wanted = ships.module(X)
    runtime = torch.from_numpy(open_onnx(export_onnx(ships, tmp_path / "m.onnx"))(X.numpy()))
    assert torch.allclose(runtime, wanted, atol=1e-4)


def test_groups_are_trained_and_ship(tmp_path: Path) -> None:
    capture, folded, stats = prepared(flat())
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(weight_bits=3, group_size=16))
    made = aware(capture, plan, stats)
    learn(made, 5)
    ships, _ = shipped(made, stats)
    with torch.no_grad():
        assert torch.allclose(made.module(X), ships.module(X), atol=1e-3 * float(made.module(X).abs().max()))


def test_a_trained_layer_goes_back_to_the_float_weight_that_was_trained() -> None:
    capture, folded, stats = prepared(residual())
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(weight_bits=2, activation_bits=4))
    made = aware(capture, plan, stats)
    learn(made, 5)
    gone = unquantized(folded, ONNXRUNTIME, frozenset({"conv2d_1"}))
    assert "conv2.weight" in gone
    ships, _ = shipped(made, stats, gone)
    assert "conv2.weight" not in quantizers(ships.module)
    assert set(quantizers(ships.module)) == {entry.tensor for entry in without_tensors(plan, gone).of(Quantize)}
    everything = frozenset({entry.tensor for entry in plan.of(Quantize)})
    free, below = shipped(made, stats, everything)
    with torch.no_grad():
        assert torch.equal(free.module(X), below.module(X))
        floats = set_float(made)
        assert torch.allclose(free.module(X), floats(X), atol=1e-4)


def set_float(made: Aware) -> nn.Module:
    """The trained network with every quantizer taken out: a reference."""
    for name in list(made.module.get_submodule("quantizers")._modules):
        made.module.get_submodule("quantizers").register_module(name, nn.Identity())
    return made.module


def tiny_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    x = torch.randn(96, 3, 8, 8, generator=generator) + labels.reshape(-1, 1, 1, 1) - 1.5

    def split(part: slice) -> Split:
        return loader_split([(x[part], labels[part])], "tiny")

    return Data(train=split(slice(0, 64)), validation=split(slice(64, 80)), test=split(slice(80, 96)))


def tiny_job(out: Path, recipe: str, plan: Plan | None = None) -> Job:
    torch.manual_seed(0)
    return Job(
        model=residual(), name="tiny", data=tiny_data(), source="tiny", target=target("onnxruntime"), out=out,
        recipe=Recipe.from_toml(recipe), plan=plan, seconds=0.2, progress=False,
    )  # fmt: skip


def judged(job: Job, points: list[float], monkeypatch: pytest.MonkeyPatch) -> Job:
    """Let the candidates of a job be judged to drop by so many points, one after the other."""
    drop, left = Judge.drop, iter(points)

    def said(self: Judge, a: Any, b: Any) -> Any:
        found = drop(self, a, b)
        return found.model_copy(update={"points": next(left, found.points)})

    monkeypatch.setattr(Judge, "drop", said)
    return job


BROKEN = (
    "[quantize]\nweight_bits = 2\nactivation_bits = 2\n[qat]\nepochs = 1\nbatch_size = 16\n[budget]\nmax_drop = 0.0\n"
)


def test_prune_teacher_training_and_integers_compose_and_the_text_names_no_rounding(tmp_path: Path) -> None:
    recipe = "[prune]\nchannels = 0.25\n[finetune]\nepochs = 1\nbatch_size = 16\n" + BROKEN.replace("= 0.0", "= 100.0")
    found = compress(tiny_job(tmp_path, recipe))
    assert [stage.name for stage in found.stages] == ["original", "pruned", "quantized"]
    assert found.budget.met
    text = " ".join(found.decisions)
    assert "rounded by" not in text
    assert "equalized" not in text
    assert "storage only" in text
    assert {layer.weight_bits for layer in found.layers} == {2}
    kinds = {entry.kind for entry in Plan.read(tmp_path / "plan.json").entries}
    assert kinds == {"prune", "mend", "quantize"}


def test_prune_teacher_and_a_trained_codebook_compose(tmp_path: Path) -> None:
    recipe = "[prune]\nchannels = 0.25\n[quantize]\ncodebook = 3\n[qat]\nepochs = 1\nbatch_size = 16\n"
    found = compress(tiny_job(tmp_path, recipe))
    assert {layer.weight_bits for layer in found.layers} == {3}
    assert any("codebooks are storage only" in text for text in found.decisions)


def test_training_a_codebook_of_wide_layers_stays_near_its_start(tmp_path: Path) -> None:
    """Sums of a hundred thousand gradients would carry four values away at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 600), nn.ReLU(), nn.Linear(600, 4))
    job = replace(tiny_job(tmp_path, "[quantize]\ncodebook = 2\n"), model=model)
    capture = trace(model.eval(), images(2, size=8))
    folded = fold(capture)
    plan, _ = codebook(folded.graph, BookKnobs(bits=2))
    stats = calibrate(folded, [images(16, size=8)], placed(folded.graph, ONNXRUNTIME))
    made = begun(job, job.recipe.quantize, capture, plan, stats)
    plain = aware(capture, plan, stats)
    assert any(
        not torch.equal(book.indices, codebooks(plain.module)[name].indices)
        for name, book in codebooks(made.module).items()
    )
    start = {name: book.values.detach().clone() for name, book in codebooks(made.module).items()}
    batches = list(job.data.train.batches(16))
    loader = Loader(batches=lambda epoch: batches * 5, steps=5 * len(batches))
    losses = train(made.module, loader, TrainSettings(epochs=2, learning_rate=0.02)).history
    assert losses[-1].loss < losses[0].loss
    for name, book in codebooks(made.module).items():
        assert (book.values - start[name]).norm() < 0.5 * start[name].norm()


def test_a_budget_that_training_breaks_gives_layers_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compress(judged(tiny_job(tmp_path, BROKEN), [9.0, 5.0, 0.0], monkeypatch))
    assert sum("back to float" in text for text in found.decisions) == 2
    assert sum(layer.weight_bits is None or layer.weight_bits == 32 for layer in found.layers) == 2


def test_a_plan_given_is_given_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folded, _ = prepared(residual(), images(16, size=8))
    plan, _ = codebook(folded.graph, BookKnobs(bits=1))
    found = compress(judged(tiny_job(tmp_path, "[budget]\nmax_drop = 0.0\n", plan), [9.0, 0.0], monkeypatch))
    assert sum("back to float" in text for text in found.decisions) == 1
    assert len(Plan.read(tmp_path / "plan.json").entries) == len(plan.entries) - 1


def test_what_was_trained_is_not_said_to_be_rounded() -> None:
    _, folded, stats = prepared(residual())
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(weight_bits=4))
    section, made = QuantizeSection(weight_bits=4), quantize(folded, plan, stats)
    assert any("rounded by retarget" in text for text in notes(section, made, ".onnx"))
    assert not any("rounded by" in text for text in notes(section, made, ".onnx", taught=True))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_outside_of_the_grid_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="1 to 8 bits"):
        QuantSpec(bits=bits)


@pytest.mark.parametrize(
    ("grid", "bits", "said"), [("apot", 1, "2 to 8"), ("power_of_two", 6, "2 to 5"), ("ternary", 3, "say codebook 2")]
)
def test_bits_outside_of_a_fixed_grid_are_refused(grid: Any, bits: int, said: str) -> None:
    _, folded, stats = prepared(residual())
    with pytest.raises(InputError, match=said):
        quantize(folded, codebook(folded.graph, BookKnobs(bits=bits, grid=grid))[0], stats)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_constant_weights_and_dead_activations_are_quantized_and_run(value: float, bits: int, tmp_path: Path) -> None:
    model = residual()
    for weight in (model.conv1.weight, model.conv2.weight, model.fc.weight):
        weight.data.fill_(value)
    model.bn1.weight.data.zero_()
    model.bn1.bias.data.fill_(-1.0)  # behind the ReLU nothing is left
    _, folded, stats = prepared(model)
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(weight_bits=bits))
    made = quantize(folded, plan, stats)
    with torch.no_grad():
        wanted = made.module(X)
    assert torch.isfinite(wanted).all()
    found = torch.from_numpy(open_onnx(export_onnx(made, tmp_path / "m.onnx"))(X.numpy()))
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()) + 1e-6)


def test_nan_is_named() -> None:
    _, folded, stats = prepared(residual())
    folded.module.get_parameter("conv2.weight").data[0] = float("nan")
    plan, _ = uniform(folded.graph, ONNXRUNTIME)
    with pytest.raises(KompaktError, match=r"conv2\.weight: .*NaN"):
        quantize(folded, plan, stats)
    capture = fold(trace(residual(), X[:2]))
    with pytest.raises(KompaktError, match="NaN"):
        calibrate(capture, [X * float("nan")], placed(capture.graph, ONNXRUNTIME))


def test_a_group_that_does_not_divide_says_which_do() -> None:
    with pytest.raises(InputError, match="group size 0"):
        PerGroup(size=0)
    _, folded, stats = prepared(flat())
    plan, _ = uniform(folded.graph, ONNXRUNTIME, Knobs(group_size=7))
    with pytest.raises(InputError, match=r"first\.weight: group size 7 does not divide 768; use 1, 2, 3, 4"):
        quantize(folded, plan, stats)


def test_a_budget_that_nothing_meets_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smallest"):
        compress(tiny_job(tmp_path, "[quantize]\naverage_bits = 1.1\n"))


@pytest.mark.parametrize("activation", ["u8 affine", "s8 affine", "s8 symmetric"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()])
@pytest.mark.parametrize("narrow", [True, False])
def test_the_runtime_computes_what_every_8_bit_spec_simulates(
    activation: str, granularity: Any, narrow: bool, tmp_path: Path
) -> None:
    weight = QuantSpec(granularity=granularity, narrow=narrow, saturation_free=True)
    inputs_as = QuantSpec(signed=activation[0] == "s", symmetric="symmetric" in activation)
    rules = replace(ONNXRUNTIME, weight=weight, weight_depthwise=weight, activation=inputs_as)
    capture = seeded(IntegerResidual, rules=rules)
    x = inputs(48, seed=2)
    with torch.no_grad():
        wanted = exact(capture).module(x).numpy()
    found = open_onnx(export_onnx(capture, tmp_path / "m.onnx"))(x.numpy())
    step = float(wanted.max() - wanted.min()) / 255
    assert float(np.abs(found - wanted).max()) <= 2 * step
    assert sqnr_db(wanted, found) > 40
