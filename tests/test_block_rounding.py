"""Laws of rounding by blocks: a block computes what its graph computes, and learning it lowers the error."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kompakt.artifact.onnx import export_onnx, open_onnx
from kompakt.build.block_rounding import _arrive, _Run
from kompakt.build.importance import value_importance
from kompakt.build.integer import exact
from kompakt.build.quantize import quantize, quantizers
from kompakt.build.refine import Refinement, refined
from kompakt.build.stream import Stream
from kompakt.errors import InputError
from kompakt.graph.calibrate import calibrate
from kompakt.graph.fold import fold
from kompakt.graph.segments import segments
from kompakt.graph.trace import Capture, attribute, trace
from kompakt.measure.layers import outputs_of
from kompakt.methods.codebook import Knobs as CodebookKnobs
from kompakt.methods.codebook import codebook
from kompakt.methods.uniform import Knobs, uniform
from kompakt.numerics.adaround import Annealing
from kompakt.numerics.grid import quantize as integers
from kompakt.plan.plan import Plan
from kompakt.plan.rules import ONNXRUNTIME, placed
from tests.nets import branches, images, residual, tokens

LEARNING = Annealing(iterations=60, batch=16)
SHORT = Annealing(iterations=15)


class Twice(nn.Module):
    """A stem, two residual blocks of two convolutions, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for one, two in (self.layers[:2], self.layers[2:]):
            x = (x + two(one(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


def twice() -> nn.Module:
    torch.manual_seed(0)
    return Twice().eval()


def prepared(model: nn.Module, x: Tensor, weights: int, activations: int = 8) -> tuple[Capture, Capture, Plan]:
    capture = fold(trace(model, x[:2]))
    stats = calibrate(capture, [x], placed(capture.graph, ONNXRUNTIME))
    plan, _ = uniform(capture.graph, ONNXRUNTIME, Knobs(weight_bits=weights, activation_bits=activations))
    return capture, quantize(capture, plan, stats), plan


def test_a_residual_block_is_one_segment_and_a_layer_of_a_chain_is_one() -> None:
    found = segments(trace(twice(), images(2)).graph)
    assert [len(each.layers) for each in found] == [1, 2, 2, 1]
    for before, after in pairwise(found[:-1]):
        assert before.end == after.start, "the ReLU behind a sum belongs to its block"
    assert found[-1].end == "linear"


@pytest.mark.parametrize(
    ("make", "x"), [(twice, images(8)), (residual, images(8)), (branches, images(8)), (tokens, images(8, 4, 12))]
)
def test_a_block_computes_what_the_graph_computes(make, x: Tensor) -> None:
    capture, made, plan = prepared(make(), x, 4)
    weights = [entry.tensor for entry in plan.entries if entry.role == "weight"]
    ours = Stream(made.module, [x])
    found = segments(capture.graph)
    assert sum(len(each.layers) for each in found) == len(capture.graph.layers)
    for segment in found:
        entering = ours.values(_arrive(ours, segment.start))[0]
        own = tuple(name for name in weights if capture.graph.users[name][0].name in segment.layers)
        run = _Run(made.module, segment, own)
        rounded = [quantizers(made.module)[name](attribute(made.module, name)) for name in own]
        with torch.no_grad():
            given = run(entering, rounded)
        assert torch.allclose(given, ours.values(_arrive(ours, segment.end))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["brecq", "qdrop"])
def test_learning_keeps_the_start_or_betters_the_first_block(how) -> None:
    x = images(64, 8)
    capture, made, plan = prepared(twice(), x, 2)
    batches = list(x.split(32))
    stem = segments(capture.graph)[0].end
    importance = value_importance(capture, [stem], batches)[stem].numpy()
    wanted = outputs_of(capture, x, [stem])[stem]
    errors = []
    for each in (Refinement(rounding="retarget"), Refinement(rounding=how, annealing=LEARNING)):
        given = outputs_of(refined(capture, made, plan, batches, each), x, [stem])[stem]
        errors.append(float((importance * (given - wanted) ** 2).mean()))
    assert errors[1] <= errors[0]


def test_blocks_repeat_to_the_bit_leave_their_inputs_alone_and_lie_on_the_grid() -> None:
    x = images(32)
    capture, made, plan = prepared(twice(), x, 3, 4)
    before = copy.deepcopy(dict(made.module.state_dict()))
    how = Refinement(rounding="qdrop", annealing=SHORT)
    one, two = (refined(capture, made, plan, [x], how).module.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(before[name], value) for name, value in made.module.state_dict().items())
    after = refined(capture, made, plan, [x], how)
    for name, each in quantizers(after.module).items():
        if name in after.graph.tensor:
            weight = attribute(after.module, name)
            steps = integers(weight, each.scale, each.zero_point, each.spec)
            assert torch.allclose(weight, steps * each.scale.reshape(-1, *[1] * (weight.ndim - 1)), atol=1e-6)


def test_the_file_computes_what_was_learned(tmp_path: Path) -> None:
    x = images(32)
    capture, made, plan = prepared(twice(), x, 4)
    learned = refined(capture, made, plan, [x], Refinement(rounding="brecq", annealing=SHORT))
    run = open_onnx(export_onnx(learned, tmp_path / "model.onnx", metadata={}), threads=1)
    with torch.no_grad():
        simulated = exact(learned).module(x[:8])
    given = torch.cat([torch.from_numpy(run(each[None].numpy())) for each in x[:8]])
    assert torch.allclose(simulated, given, rtol=1e-4, atol=1e-4)


def test_importance_of_a_blocks_output_has_its_shape_and_is_nowhere_negative() -> None:
    capture = fold(trace(twice(), images(2)))
    ends = [each.end for each in segments(capture.graph)]
    found = value_importance(capture, ends, [images(8), images(8, seed=3)])
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: capture.graph.by_name[name].shape[1:] for name in ends
    }
    assert all(float(value.min()) >= 0 and float(value.max()) > 0 for value in found.values())


def test_codebooks_have_no_up_and_down_to_learn() -> None:
    x = images(8)
    capture = fold(trace(twice(), x[:2]))
    plan, _ = codebook(capture.graph, CodebookKnobs(bits=2))
    made = quantize(capture, plan, calibrate(capture, [x], {}))
    with pytest.raises(InputError, match="a codebook does not"):
        refined(capture, made, plan, [x], Refinement(rounding="adaround"))
