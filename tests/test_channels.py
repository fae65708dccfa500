"""Laws of choosing channels: targets are met, budgets exact, saliency beats chance, bad names are refused."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt import zoo
from kompakt.build.prune import apply_prune, units_of
from kompakt.data import Data
from kompakt.errors import BudgetError, InputError
from kompakt.evidence import evidence
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.trace import trace
from kompakt.loaders import loader_split
from kompakt.methods.channels import Knobs, channels
from kompakt.methods.scores import Scoring, unit_rows, unit_scores
from kompakt.methods.widths import knapsack
from kompakt.plan.plan import Prune

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@functools.cache
def resnet() -> tuple[nn.Module, Coupling]:
    torch.manual_seed(0)
    model = zoo.CifarResNet(1).eval()
    return model, couple(trace(model, EXAMPLE).graph)


def kept_widths(coupling: Coupling, plan: object) -> dict[str, int]:
    units = set(units_of(coupling, plan))
    return {group.name: sum(unit not in units for unit in group.units) for group in coupling.groups}


@pytest.mark.parametrize("allocation", ["uniform", "global", "knapsack"])
@pytest.mark.parametrize("times", [1.5, 2.0, 4.0])
def test_a_target_of_macs_is_met(allocation: str, times: float) -> None:
    model, coupling = resnet()
    scores = unit_scores(coupling, model.state_dict())
    plan = channels(coupling, scores, Knobs(fewer_macs=times, allocation=allocation))
    pruned = apply_prune(model, plan, EXAMPLE)
    macs = coupling.cost_after(units_of(coupling, plan)).macs
    assert macs <= coupling.graph.macs / times
    assert macs >= 0.6 * coupling.graph.macs / times
    assert sum(p.numel() for p in pruned.parameters()) < coupling.graph.params


def test_the_knapsack_counts_macs_and_params_as_the_graph_does() -> None:
    from kompakt.methods.widths import _named

    _, coupling = resnet()
    widths = {group.name: [max(1, group.size // 3), group.size] for group in coupling.groups}
    for pick in (0, 1):
        chosen = {name: offered[pick] for name, offered in widths.items()}
        gone = [u for name, width in chosen.items() for u in coupling.group(name).units[width:]]
        exact = coupling.cost_after(gone)
        for kind in ("macs", "params"):
            cost = _named(coupling, widths, kind, 0.0)
            total = cost.fixed + sum(cost.options[name][width] for name, width in chosen.items())
            total += sum(table[chosen[a], chosen[b]] for (a, b), table in (cost.pairs or {}).items())
            assert total == pytest.approx(getattr(exact, kind), rel=1e-6)


def test_the_knapsack_keeps_at_least_as_much_score_as_uniform() -> None:
    model, coupling = resnet()
    scores = unit_scores(coupling, model.state_dict())
    options = {g.name: sorted({max(1, round(g.size * e / 8)) for e in range(1, 9)}) for g in coupling.groups}
    uniform = {g.name: g.size // 2 for g in coupling.groups}
    gone = [u for name, width in uniform.items() for u in coupling.group(name).units[width:]]
    best = knapsack(coupling, scores, options, {"macs": coupling.cost_after(gone).macs})

    def score(widths: dict[str, int]) -> float:
        return sum(float(scores[name].sort(descending=True).values[:width].sum()) for name, width in widths.items())

    assert score(best) >= score(uniform) - 1e-9


def test_the_lowest_scores_go() -> None:
    _, coupling = resnet()
    scores = {group.name: torch.arange(group.size).flip(0).double() for group in coupling.groups}
    plan = channels(coupling, scores, Knobs(ratio=0.25))
    entry = next(entry for entry in plan.of(Prune) if entry.group == "layer1.0.conv1")
    assert entry.cuts[0].removed == (12, 13, 14, 15)


def test_widths_are_aligned_and_not_too_small() -> None:
    model, coupling = resnet()
    scores = unit_scores(coupling, model.state_dict())
    aligned = kept_widths(coupling, channels(coupling, scores, Knobs(ratio=0.4, align=8)))
    assert all(width % 8 == 0 for width in aligned.values())
    wide = kept_widths(coupling, channels(coupling, scores, Knobs(ratio=0.9, min_width=6)))
    assert min(wide.values()) >= 6


def test_ignored_layers_keep_their_channels_and_single_layers_have_their_own_ratio() -> None:
    model, coupling = resnet()
    scores = unit_scores(coupling, model.state_dict())
    plan = channels(coupling, scores, Knobs(ratio=0.5, ignore=("layer1.*",), ratios=(("layer2.0.conv1", 0.75),)))
    widths = kept_widths(coupling, plan)
    assert widths["layer1.0.conv1"] == 16
    assert widths["conv1"] == 16  # layer1.0.conv2 writes to the same channels
    assert widths["layer2.0.conv1"] == 8
    assert widths["layer3.0.conv1"] == 32


def test_unit_rows_hold_all_that_a_unit_owns() -> None:
    model, coupling = resnet()
    member = next(m for m in coupling.group("conv1").members if m.tensor == "layer1.0.conv1.weight")
    weight = model.get_parameter(member.tensor)
    assert torch.equal(unit_rows(member, weight)[3], weight[:, 3].flatten())


def test_zeroed_channels_go_first_and_leave_the_outputs_unchanged() -> None:
    torch.manual_seed(1)
    model = zoo.CifarResNet(1).eval()
    coupling = couple(trace(model, EXAMPLE).graph)
    group = coupling.group("layer3.0.conv1")
    dead = [3, 11, 40, 41]
    for member in group.members:
        owner, _, leaf = member.tensor.rpartition(".")
        if leaf in ("weight", "bias", "running_mean"):
            indices = torch.tensor([i for unit in dead for i in member.indices[unit]])
            getattr(model.get_submodule(owner), leaf).data.index_fill_(member.dim, indices, 0.0)
    plan = channels(
        coupling, unit_scores(coupling, model.state_dict()), Knobs(ratio=0.01, ratios=((group.name, 4 / 64),))
    )
    entry = next(entry for entry in plan.of(Prune) if entry.group == group.name)
    assert entry.cuts[0].removed == tuple(dead)
    only = type(plan)(entries=(entry,))
    torch.testing.assert_close(apply_prune(model, only)(EXAMPLE), model(EXAMPLE), atol=1e-5, rtol=1e-5)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """Train a net with more hidden units than the task needs, with a penalty that makes some of them small."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x[:, 0] > 0).long() * 2 + (x[:, 1] + x[:, 2] > 0).long()
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + 0.002 * sum(p.abs().sum() for p in model.parameters())).backward()
        optimizer.step()
    return model.eval(), x, y


def test_every_criterion_beats_chance_without_any_training() -> None:
    model, x, y = trained()
    coupling = couple(trace(model, x[:2]).graph)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}

    def accuracy(criterion: str, seed: int = 0) -> float:
        scores = unit_scores(coupling, model.state_dict(), Scoring(criterion=criterion, seed=seed), grads)
        pruned = apply_prune(model, channels(coupling, scores, Knobs(ratio=0.6)), x[:2])
        return float((pruned(x).argmax(1) == y).float().mean())

    chance = sum(accuracy("random", seed) for seed in range(5)) / 5
    for criterion in ("l1", "l2", "bn_scale", "taylor", "taylor_sum_abs", "sensitivity", "magnitude"):
        assert accuracy(criterion) > chance + 0.05, criterion


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"ratio": 1.0}, "not between 0 and 1"),
        ({"ratio": 0.0}, "not between 0 and 1"),
        ({}, "say one of"),
        ({"ratio": 0.5, "fewer_macs": 2.0}, "say one of"),
        ({"fewer_macs": 0.5}, "not above 1"),
        ({"ratio": 0.5, "allocation": "magic"}, "allocation 'magic' is unknown"),
    ],
)
def test_bad_knobs_are_refused(knobs: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Knobs(**knobs)


def test_bad_names_are_refused_with_the_nearest() -> None:
    model, coupling = resnet()
    scores = unit_scores(coupling, model.state_dict())
    with pytest.raises(InputError, match=r"layer1.0.konv1: no layer has such a name; the nearest are layer1.0.conv1"):
        channels(coupling, scores, Knobs(ratio=0.5, ignore=("layer1.0.konv1",)))
    with pytest.raises(InputError, match="linear: its channels cannot be removed: the model's output"):
        channels(coupling, scores, Knobs(ratio=0.5, ratios=(("linear", 0.5),)))


def test_a_target_out_of_reach_names_the_smallest_model() -> None:
    model, coupling = resnet()
    with pytest.raises(BudgetError, match="the smallest model has"):
        channels(coupling, unit_scores(coupling, model.state_dict()), Knobs(fewer_macs=5000.0))


def test_criteria_that_need_more_say_so() -> None:
    model, coupling = resnet()
    with pytest.raises(InputError, match="needs gradients"):
        unit_scores(coupling, model.state_dict(), Scoring(criterion="taylor"))
    with pytest.raises(InputError, match="needs input_norm"):
        unit_scores(coupling, model.state_dict(), Scoring(criterion="wanda"))


def test_a_latency_table_made_of_macs_gives_the_budget_of_macs() -> None:
    from math import prod

    from kompakt.methods.latency import cases, latency_cost

    model, coupling = resnet()
    widths = {group.name: [group.size // 4, group.size // 2, group.size] for group in coupling.groups}
    listed = cases(coupling, widths)
    assert len(set(listed)) == len(listed) > len(coupling.graph.layers)
    stem = next(case for case in listed if case.input == (1, 3, 16, 16) and case.weight[0] == 4)
    assert (stem.weight, stem.settings[0]) == ((4, 3, 3, 3), (1, 1))
    times = {case: float(prod(case.weight) * prod(case.input[2:])) for case in listed}
    full = sum(times[case] for case in cases(coupling, {name: [max(w)] for name, w in widths.items()}))
    cost = latency_cost(coupling, widths, times, 0.7 * full)
    scores = unit_scores(coupling, model.state_dict())
    chosen = knapsack(coupling, scores, widths, {}, {"latency_ms": cost})
    assert any(width < max(widths[name]) for name, width in chosen.items())
    with pytest.raises(InputError, match="no time was measured"):
        latency_cost(coupling, widths, {}, 1.0)


def test_the_least_sensitive_group_gives_way() -> None:
    from kompakt.methods.sensitivity import measured_drops

    model, coupling = resnet()
    scores = unit_scores(coupling, model.state_dict())
    nn_output = model(EXAMPLE).detach()
    drops = measured_drops(model, coupling, scores, lambda m: -float((m(EXAMPLE).detach() - nn_output).abs().mean()))
    assert set(drops) == {group.name for group in coupling.groups}
    assert all(drop >= 0 for curve in drops.values() for drop in curve.values())
    cheap = {
        name: {w: (0.0 if name == "layer3.0.conv1" else d + 1.0) for w, d in c.items()} for name, c in drops.items()
    }
    plan = channels(coupling, scores, Knobs(fewer_macs=1.1, allocation="sensitivity"), drops=cheap)
    widths = kept_widths(coupling, plan)
    assert widths["layer3.0.conv1"] < 64
    assert coupling.cost_after(units_of(coupling, plan)).macs <= coupling.graph.macs / 1.1
    with pytest.raises(InputError, match="needs measured drops"):
        channels(coupling, scores, Knobs(ratio=0.5, allocation="sensitivity"))


def test_widths_that_were_not_measured_are_read_off_the_line() -> None:
    _, coupling = resnet()
    scores = {group.name: torch.arange(group.size).float() for group in coupling.groups}
    drops = {group.name: {group.size // 2: 1.0, group.size // 4: 3.0} for group in coupling.groups}
    plan = channels(coupling, scores, Knobs(fewer_macs=1.5, allocation="sensitivity", align=16), drops=drops)
    widths = kept_widths(coupling, plan)
    assert all(width % 16 == 0 for width in widths.values())
    assert all(widths[group.name] == group.size for group in coupling.groups if group.size <= 16)


@pytest.mark.parametrize("allocation", ["knapsack", "sensitivity"])
def test_exact_allocations_take_the_share_of_all_channels(allocation: str) -> None:
    model, coupling = resnet()
    scores = unit_scores(coupling, model.state_dict())
    drops = {g.name: {w: float((g.size - w) ** 2) for w in range(1, g.size + 1)} for g in coupling.groups}
    plan = channels(coupling, scores, Knobs(ratio=0.3, allocation=allocation), drops=drops)
    made = apply_prune(model, plan)
    before, after = (sum(len(m.weight) for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (model, made))
    assert 0.3 <= 1 - after / before < 0.4


def test_measured_criteria_beat_chance_too() -> None:
    model, x, y = trained()
    coupling = couple(trace(model, x[:2]).graph)
    split = loader_split([(x, y)], "toy")
    data = Data(train=split, validation=split, test=split)

    def accuracy(criterion: str, seed: int = 0) -> float:
        measured = evidence(criterion, model, data, 0)
        scores = unit_scores(coupling, model.state_dict(), Scoring(criterion=criterion, seed=seed), measured=measured)
        pruned = apply_prune(model, channels(coupling, scores, Knobs(ratio=0.6)), x[:2])
        return float((pruned(x).argmax(1) == y).float().mean())

    chance = sum(accuracy("random", seed) for seed in range(5)) / 5
    for criterion in ("obd", "wanda", "taylor"):
        assert accuracy(criterion) > chance + 0.05, criterion
