"""Laws of sparsity plans: the share is met, the plan alone gives the masks again, unfit layers are said."""

import pytest
import torch
from torch import nn

from kompakt.errors import InputError, PlanError
from kompakt.graph.graph import Graph
from kompakt.graph.trace import trace
from kompakt.methods.sparse import SparseKnobs, masked_state, masks, sparse
from kompakt.numerics.masks import keep_largest_globally
from kompakt.plan.plan import Plan, Sparsify


def net() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10))
    return model, trace(model, torch.zeros(2, 3, 8, 8)).graph


def test_every_layer_has_the_share() -> None:
    model, graph = net()
    plan, left = sparse(graph, model.state_dict(), SparseKnobs(sparsity=0.75))
    assert not left
    found = masks(Plan.from_json(plan.to_json()), model.state_dict())
    assert {name: round(1 - float(mask.float().mean()), 2) for name, mask in found.items()} == {
        "0.weight": 0.75,
        "2.weight": 0.75,
        "4.weight": 0.75,
    }


@pytest.mark.parametrize("criterion", ["magnitude", "lamp"])
def test_a_global_threshold_is_written_as_shares_that_give_the_same_masks(criterion: str) -> None:
    from kompakt.numerics.saliency import SALIENCIES

    model, graph = net()
    state = model.state_dict()
    plan, _ = sparse(graph, state, SparseKnobs(sparsity=0.6, scope="global", criterion=criterion))
    names = [entry.tensor for entry in plan.of(Sparsify)]
    expected = keep_largest_globally({n: SALIENCIES[criterion].function(weight=state[n]) for n in names}, 0.6)
    found = masks(plan, state)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert len({entry.sparsity for entry in plan.of(Sparsify)}) > 1


def test_two_of_every_four_inputs_stay_and_other_layers_are_said() -> None:
    model, graph = net()
    plan, left = sparse(graph, model.state_dict(), SparseKnobs(n_of_m=(2, 4)))
    assert [(item.name, item.reason) for item in left] == [("0.weight", "3 inputs are not a multiple of 4")]
    mask = masks(plan, model.state_dict())["4.weight"]
    assert bool((mask.reshape(10, -1, 4).sum(-1) == 2).all())


def test_whole_kernels_go() -> None:
    model, graph = net()
    plan, left = sparse(graph, model.state_dict(), SparseKnobs(sparsity=0.5, block=(1, 1, 3, 3)))
    assert [item.name for item in left] == ["4.weight"]
    mask = masks(plan, model.state_dict())["2.weight"].flatten(2)
    assert bool((mask.all(-1) | ~mask.any(-1)).all())


def test_masked_tensors_are_zero_where_masked_and_else_the_same() -> None:
    model, graph = net()
    plan, _ = sparse(graph, model.state_dict(), SparseKnobs(sparsity=0.9, ignore=("4",)))
    found = masks(plan, model.state_dict())
    state = masked_state(model.state_dict(), found)
    assert torch.equal(state["4.weight"], model[4].weight)
    assert torch.equal(state["2.weight"] != 0, found["2.weight"])
    assert not torch.equal(state["2.weight"], model[2].weight)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({}, "say one of"),
        ({"sparsity": 1.5}, "not between 0 and 1"),
        ({"n_of_m": (4, 4)}, "N must be between"),
        ({"sparsity": 0.5, "scope": "world"}, "scope 'world' is unknown"),
        ({"sparsity": 0.5, "criterion": "l2"}, "scores channels"),
        ({"n_of_m": (2, 4), "scope": "global"}, "not blocks or N:M"),
    ],
)
def test_bad_knobs_are_refused(knobs: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        SparseKnobs(**knobs)


def test_bad_names_and_missing_inputs_are_refused() -> None:
    model, graph = net()
    with pytest.raises(InputError, match="no layer has such a name"):
        sparse(graph, model.state_dict(), SparseKnobs(sparsity=0.5, ignore=("conv9",)))
    with pytest.raises(InputError, match=r"needs grad of 0\.weight"):
        masks(
            sparse(graph, model.state_dict(), SparseKnobs(sparsity=0.5, criterion="sensitivity"))[0], model.state_dict()
        )
    with pytest.raises(PlanError, match="does not have"):
        masks(Plan(entries=(Sparsify(tensor="nowhere", sparsity=0.5),)), model.state_dict())
