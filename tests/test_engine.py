"""The search: what is tried next, what ships, and that it goes on after anything that stops it."""

import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import nn

from kompakt.artifact.targets import target
from kompakt.build.train import TrainSettings, shuffled, train
from kompakt.cli.pick import pick_command
from kompakt.data import Data
from kompakt.engine.candidate import all_tried, folder_of
from kompakt.engine.choice import Choice
from kompakt.engine.effort import Effort
from kompakt.engine.explore import Asked, explore
from kompakt.engine.frontier import Limits, choose, fronted, one_point_more
from kompakt.engine.ledger import Ledger, open_ledger
from kompakt.engine.shipping import shipped_since
from kompakt.engine.strategy import FIRST_PRICE, PRICES, Space, propose, rates_for, within_reach
from kompakt.errors import BudgetError, InputError
from kompakt.job import Job
from kompakt.loaders import loader_split
from kompakt.measure.result import Result, Tried
from kompakt.plan.recipe import BudgetSection, DistillSection, FinetuneSection, PruneSection, QuantizeSection, Recipe
from kompakt.search import compress
from kompakt.weights import save_weights

module = importlib.import_module("kompakt.engine.explore")
SMALL = Space(max_drop=1.0, epochs=3, blocks=1)


def walk(truth, space: Space) -> list[Choice]:
    """Carry the plan of a search out where ``truth`` tells the drop of every choice."""
    drops: dict[Choice, float] = {}
    while (choice := propose(drops, space)) is not None:
        assert choice not in drops
        drops[choice] = truth(choice)
        assert len(drops) < 80
    return list(drops)


@given(st.floats(0.05, 8), st.floats(0.0, 2.0), st.floats(0.0, 1.0), st.sampled_from(["size", "latency", "both"]))
@settings(max_examples=60, deadline=None)
def test_the_plan_of_a_search_ends_and_finds_the_largest_factor(slope, bits, taught, objective) -> None:
    space = Space(max_drop=1.0, epochs=3, objective=objective)

    def truth(choice: Choice) -> float:
        steep = slope * (taught if choice.epochs else 1.0)
        return steep * (choice.fewer_macs - 1) + bits * choice.rate / 1e-7

    tried = walk(truth, space)
    assert tried[0] == Choice()
    inside = [choice for choice in tried if truth(choice) <= 1]
    best = max(choice.fewer_macs for choice in inside)
    price = 0.0 if objective == "latency" else space.prices[FIRST_PRICE]
    beyond = Choice(fewer_macs=min(space.most, 1.35 * best), epochs=3, rate=price)
    assert truth(beyond) > 1 or best == space.most or taught == 0
    if objective == "latency":
        assert {choice.rate for choice in tried} == {0.0}
    begun = next(place for place, choice in enumerate(tried) if choice.epochs)
    cheap = tried[:begun]  # what is cheap comes first, and only the whole network is coded among it
    assert all(not choice.epochs and (choice.fewer_macs == 1 or not choice.rate) for choice in cheap)
    coded = [choice.rate > 0 and not choice.epochs for choice in tried[begun:]]
    assert coded == sorted(coded)  # and what was not trained is coded last
    worth = [choice for choice in cheap if choice.rate and truth(choice) <= 1]
    assert worth or objective == "latency" or truth(Choice(rate=space.rates[0])) > 1  # there is something to ship


def trained_on(choice: Choice) -> bool:
    """Whether it is the network before it, at its price or a lower one."""
    before = choice.after
    return before is not None and choice == replace(before, rate=min(choice.rate, before.rate), after=before)


def test_a_trained_network_goes_on_from_one_that_kept_the_budget() -> None:
    """And each training is worth something to those after it: what comes near the budget is trained once more."""

    def truth(choice: Choice) -> float:
        learnt = sum(each.epochs for each in choice.rounds)
        return 2.0 * (choice.fewer_macs - 1) / (1 + 0.5 * learnt) + choice.rate / SMALL.prices[-1]

    tried = walk(truth, SMALL)
    trained = [choice for choice in tried if choice.epochs]
    # 1.84 lost 1.7 points untrained: training begins there, not at what was free.
    assert trained[0].fewer_macs > max(c.fewer_macs for c in tried if not c.epochs and not c.rate and truth(c) <= 1)
    assert trained[0].after is None
    begun = [choice for choice in trained if choice.after is None]
    factors = [choice.fewer_macs for choice in begun]
    assert factors == sorted(factors, reverse=True)  # too bold, then as far as what it lost tells
    assert len(begun) <= 3
    for choice in trained[len(begun) :]:
        assert choice.after in trained
        assert choice.fewer_macs >= choice.after.fewer_macs
        assert truth(choice.after) <= 1 or trained_on(choice)
    again = [choice for choice in trained if trained_on(choice)]
    assert again
    best = max((choice for choice in trained if truth(choice) <= 1), key=lambda choice: choice.fewer_macs)
    assert truth(replace(best, after=None)) > 1  # from the original it would not have kept the budget


def test_a_network_that_stays_near_is_trained_on_at_a_lower_price() -> None:
    def truth(choice: Choice) -> float:
        return 1.0 + choice.rate / SMALL.prices[-1] if choice.epochs else 4.0 * (choice.fewer_macs - 1)

    def mended(choice: Choice) -> float:
        return truth(choice) - (0.2 if choice.after else 0.0)

    tried = walk(mended, SMALL)
    eased = [choice for choice in tried if choice.after and 0 < choice.rate < choice.after.rate]
    assert eased
    assert mended(eased[0]) <= 1 < mended(eased[0].after)


def test_what_is_close_is_trained_on_at_its_own_price_and_what_is_only_near_at_a_lower_one() -> None:
    for first, lower in ((1.1, 0), (1.6, 1)):

        def truth(choice: Choice, first: float = first) -> float:
            return first - 0.3 * (len(choice.rounds) - 1) if choice.epochs else 4.0 * (choice.fewer_macs - 1)

        begun, again = [choice for choice in walk(truth, SMALL) if choice.epochs][:2]
        assert again == replace(begun, rate=SMALL.prices[FIRST_PRICE - lower], after=begun)


def test_where_training_would_begin_is_made_without_it_first() -> None:
    """Widths are multiples of something: what a stride tells of the factors below it may be far off."""

    def truth(choice: Choice) -> float:
        return 0.5 if choice.epochs else 0.0 if choice.fewer_macs < 1.2 else 9.0  # a step, not a slope

    tried = walk(truth, SMALL)
    first = next(place for place, choice in enumerate(tried) if choice.epochs)
    probes = [choice for choice in tried[:first] if 1 < choice.fewer_macs < 1.5]
    assert probes
    assert truth(probes[0]) == 9.0
    assert tried[first].fewer_macs < probes[0].fewer_macs


@pytest.mark.parametrize(("means", "least", "most"), [(0.5, 1.5, 2.3), (2.0, 2.3, 4.0), (6.0, 4.0, 8.0)])
def test_the_more_time_there_is_the_smaller_the_network_where_training_begins(means, least, most) -> None:
    """It begins between the strides where as much is lost as the epochs give back, and small ones have more epochs."""
    space = Space(max_drop=1.0, means=means)
    tried = walk(lambda choice: 0.5 if choice.epochs else 3.0 * (choice.fewer_macs - 1) ** 1.5, space)
    first = next(choice for choice in tried if choice.epochs)
    assert least < first.fewer_macs < most
    assert first.epochs == space.epochs_at(first.fewer_macs)
    assert {choice.epochs for choice in walk(lambda choice: 0.0, replace(space, means=0.01))} == {0}


def tried_where(
    suffices, epochs: int, candidates: int, net: nn.Module, out: Path, patch: pytest.MonkeyPatch
) -> list[Choice]:
    """Search where the time suffices for some choices only and nothing loses a point; return what was tried."""
    seen: list[Choice] = []
    patch.setattr(module.Effort, "suffices", lambda self, job, choice, *given: suffices(choice))
    patch.setattr(module, "verify", lambda job, original, number, choice: seen.append(choice) or tried(number, 0.0))
    patch.setattr(module, "all_tried", lambda out: [tried(number, 0.0) for number in range(len(seen))])
    patch.setattr(module, "shipped", lambda *given: None)
    recipe = Recipe(budget=BudgetSection(max_drop=1.0), finetune=FinetuneSection(epochs=epochs))
    explore(job(net, out, recipe=recipe), Asked(candidates=candidates))
    return seen


def test_where_the_time_of_a_round_is_not_left_a_shorter_one_is_made(
    net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tried_where(lambda choice: choice.epochs <= 2, 4, 10, net, tmp_path, monkeypatch)
    assert {choice.epochs for choice in seen} == {0, 2}


def test_what_is_in_other_hands_is_not_proposed_again() -> None:
    first = propose({}, SMALL)
    assert propose({first: float("inf")}, SMALL) not in (None, first)
    assert Choice(fewer_macs=1.5) in walk(lambda choice: 0.0, SMALL)
    assert 3 in {choice.epochs for choice in walk(lambda choice: float("inf"), SMALL)}


def test_the_sampler_draws_what_is_near_to_what_kept_the_budget(tmp_path: Path) -> None:
    drops = {Choice(): 0.0, Choice(fewer_macs=1.2): 0.9, Choice(fewer_macs=3.0): 9.0, Choice(drop_blocks=1): 5.0}
    reach = within_reach(drops, SMALL)
    assert (reach.most, reach.blocks) == (1.8, 0)
    assert within_reach({Choice(): 0.0}, SMALL).blocks == 1
    ledger = open_ledger(tmp_path, None, {}, 0)
    for number in range(6):
        with ledger.taken(None, SMALL, reach) as (trial, choice):
            assert 1 <= choice.fewer_macs <= 1.8
            assert choice.drop_blocks == 0
            ledger.tell(trial, tried(number, choice.fewer_macs))
    with ledger.taken(Choice(fewer_macs=7.0), SMALL, reach) as (_, choice):
        assert choice == Choice(fewer_macs=7.0)


def tried(number: int, drop: float | None, size: int = 100, ratio: float = 1.0, half: float = 0.1) -> Tried:
    ends = None if drop is None else (drop - half, drop + half)
    state = "failed" if drop is None else "verified"
    return Tried(number=number, what=f"c{number}", state=state, drop_points=drop, drop_ci95=ends,
                 size_bytes=4 * size, packed_bytes=size, latency_ratio=ratio)  # fmt: skip


POINTS = [tried(0, 0.0), tried(1, 0.5, 50, 0.8), tried(2, 0.9, 20, 0.9), tried(3, 1.8, 10, 0.3), tried(4, None),
          tried(5, 0.95, 60, 0.95)]  # fmt: skip


def test_what_decides_is_what_was_counted_and_what_was_expected() -> None:
    found = tried(0, 0.4)
    assert found.points == Limits().judged(found) == 0.4
    believed = found.model_copy(update={"expected_points": 1.5})
    assert believed.points == Limits().judged(believed) == Limits(confident=True).judged(believed) == 1.5
    assert not Limits(max_drop=1.0).keeps(believed)
    taught = believed.model_copy(update={"epochs": 2})  # it knows what the original does not
    assert taught.points == 1.5
    assert taught.model_copy(update={"expected_points": 0.2}).points == 0.2  # both were asked
    assert Limits(confident=True).judged(found) == 0.5


def test_the_best_within_the_limits_ships() -> None:
    assert choose(POINTS, Limits(max_drop=1.0), "size").number == 2
    assert choose(POINTS, Limits(max_drop=1.0), "latency").number == 1
    assert choose(POINTS, Limits(max_drop=0.95, confident=True), "size").number == 1
    assert choose(POINTS, Limits(max_drop=2.0), "both").number == 3
    assert choose(POINTS, Limits(max_drop=2.0, max_ratio=0.85, max_bytes=200), "size").number == 3
    assert choose(POINTS, Limits(max_drop=-1.0), "size").number == 0  # nothing keeps it: the nearest
    assert choose([POINTS[4]], Limits(), "size") is None


@given(
    st.lists(st.tuples(st.floats(-1, 3), st.integers(1, 9), st.sampled_from([0.2, 0.5, 1.0])), min_size=1, max_size=9)
)
def test_every_candidate_is_bettered_by_one_of_the_front_or_is_on_it(figures) -> None:
    marked = fronted([tried(number, *rest) for number, rest in enumerate(figures)], 0)
    front = [item for item in marked if item.front]
    assert front
    assert [item.chosen for item in marked] == [item.number == 0 for item in marked]
    for item in marked:
        assert item.front or any(
            other.drop_points <= item.drop_points
            and other.packed_bytes <= item.packed_bytes
            and other.latency_ratio <= item.latency_ratio
            for other in front
        )


def test_what_one_more_point_would_buy_is_said() -> None:
    assert "candidate 3" in one_point_more(POINTS, Limits(max_drop=1.0), "size", POINTS[2])
    assert "nothing" in one_point_more(POINTS[:3], Limits(max_drop=1.0), "size", POINTS[2])


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Choice(fewer_macs=1.5, rate=4e-8, epochs=2).recipe(Recipe()),
        Choice(drop_blocks=1).recipe(
            Recipe(finetune=FinetuneSection(learning_rate=1e-5, teacher=("a.onnx", "b.onnx")))
        ),
        Recipe(quantize=QuantizeSection(keep=("a b", 'c"d'), average_bits=4.0), budget=BudgetSection(max_drop=0.5)),
        Recipe(prune=PruneSection(channels=0.5), distill=DistillSection(student="shallower")),
    ],
)
def test_recipes_are_written_as_they_are_read(recipe: Recipe) -> None:
    assert Recipe.from_toml(recipe.to_toml()) == recipe


# The whole search, on a small network that learns coloured squares.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


def squares() -> Data:
    """A data reference: noise with a bright square, whose place is the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 4
    inputs = torch.randn(600, 3, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        inputs[index, label % 3, 2:5, 2:5] += 1.2 if label < 3 else -1.2
    cuts = [(0, 400), (400, 500), (500, 600)]
    train, validation, test = (loader_split([(inputs[a:b], labels[a:b])], "squares") for a, b in cuts)
    return Data(train=train, validation=validation, test=test)


def trained() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    train(net, shuffled(squares().train, 40, seed=0), TrainSettings(epochs=8, learning_rate=0.05, seed=0))
    return net.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return trained()


def job(net: nn.Module, out: Path, **more: object) -> Job:
    recipe = Recipe(budget=BudgetSection(max_drop=20.0), quantize=QuantizeSection(calibration_examples=32))
    made = Job(model=net, name="net", data=squares(), source="squares", target=target("onnxruntime"), out=out,
               recipe=recipe, seconds=0.2, progress=False)  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


THREE = Asked(objective="size", candidates=3)


@pytest.fixture(scope="module")
def searched(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("searched")
    return out, explore(job(net, out), THREE)


def test_a_search_ships_the_best_candidate_and_its_recipe_makes_it_again(searched, net, tmp_path: Path) -> None:
    out, result = searched
    assert [item.number for item in result.candidates] == [0, 1, 2]
    (chosen,) = [item for item in result.candidates if item.chosen]
    assert chosen.packed_bytes == min(item.packed_bytes for item in result.candidates)
    assert result.budget.met
    assert (out / "model.onnx").read_bytes() == (folder_of(out, chosen.number) / "model.onnx").read_bytes()
    again = compress(job(net, tmp_path, recipe=Recipe.read(out / "recipe.toml")))
    for name in ("model.onnx", "model.kpk", "plan.json"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert again.drop_points == result.drop_points


def test_the_same_search_again_makes_nothing_anew(searched, net, monkeypatch: pytest.MonkeyPatch) -> None:
    out, result = searched
    monkeypatch.setattr(module, "verify", lambda *given: pytest.fail("made anew"))
    assert explore(job(net, out), THREE).candidates == result.candidates


def test_a_network_is_trained_at_the_price_of_its_bits_and_made_once(
    net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(budget=BudgetSection(max_drop=30.0), quantize=QuantizeSection(calibration_examples=32))
    price = rates_for(sum(parameter.numel() for parameter in net.parameters()), PRICES)[-1]
    plan = [Choice(fewer_macs=1.3, rate=rate, epochs=1) for rate in (0.0, price)]
    monkeypatch.setattr(module, "propose", lambda drops, space: next((c for c in plan if c not in drops), None))
    one = job(net, tmp_path, recipe=recipe.model_copy(update={"finetune": FinetuneSection(epochs=1, batch_size=50)}))
    result = explore(one, Asked(candidates=2))
    assert len(list((tmp_path / "networks").glob("*/told.json"))) == 2
    assert [item.epochs for item in result.candidates] == [1, 1]
    assert result.candidates[1].packed_bytes < result.candidates[0].packed_bytes


def test_a_candidate_that_cannot_be_made_is_told_and_the_search_goes_on(
    net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.verify

    def broken(*given):
        if given[2] == 1:
            raise RuntimeError("out of luck\nand more")
        return real(*given)

    monkeypatch.setattr(module, "verify", broken)
    result = explore(job(net, tmp_path), THREE)
    assert [item.state for item in result.candidates] == ["verified", "failed", "verified"]
    assert any("out of luck" in line for line in result.decisions)
    assert "more" not in result.candidates[1].note


def test_an_interrupted_search_saves_the_best_so_far_and_goes_on(
    net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.verify

    def interrupted(*given):
        if given[2] == 1:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(module, "verify", interrupted)
        result = explore(job(net, tmp_path), THREE)
    assert len(result.candidates) == 1
    assert any("interrupted" in line for line in result.decisions)
    assert (tmp_path / "model.onnx").exists()
    assert len(explore(job(net, tmp_path), THREE).candidates) == 3


def test_effort_ends_the_search(net, tmp_path: Path) -> None:
    result = explore(job(net, tmp_path), Asked(minutes=0.01))
    assert 1 <= len(result.candidates) <= 2
    assert any("effort" in line for line in result.decisions)


def test_a_full_disk_is_one_clear_line(net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "verify", full)
    with pytest.raises(InputError, match="No space left on device; the same command goes on"):
        explore(job(net, tmp_path), THREE)


def test_no_candidate_at_all_is_one_clear_line(net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "verify", lambda *given: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(BudgetError, match="no candidate could be made: broken"):
        explore(job(net, tmp_path), Asked(candidates=1))


def test_a_budget_that_nothing_keeps_is_not_met(net, tmp_path: Path) -> None:
    result = explore(job(net, tmp_path), Asked(candidates=1, max_bytes=10))
    assert not result.budget.met
    assert result.budget.max_bytes == 10
    assert (tmp_path / "model.onnx").exists()


def test_a_metric_that_changes_is_refused(net, tmp_path: Path) -> None:
    draws = iter(range(10**6))

    def metric(outputs, labels):
        return torch.full((len(labels),), float(next(draws))).numpy()

    with pytest.raises(InputError, match="must be fixed"):
        explore(job(net, tmp_path, metric=metric), THREE)


def test_a_study_of_another_model_is_refused(searched, tmp_path: Path) -> None:
    out, _ = searched
    with pytest.raises(InputError, match=r"of something else \(model .* there"):
        explore(job(Net().eval(), out), THREE)


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "nonsense://x"])
def test_a_storage_that_cannot_be_reached_is_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        open_ledger(tmp_path, url, {}, 0)


def test_workers_that_share_a_study_share_its_folder(tmp_path: Path) -> None:
    """Candidates of another folder would count as lost, and live trials there as left by the dead."""
    url = f"sqlite:///{tmp_path}/study.db"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with open_ledger(tmp_path / "a", url, {}, 0).taken(Choice(fewer_macs=1.5), SMALL):
        again = open_ledger(tmp_path / "a", url, {}, 0)
        assert again.in_hand() == 1
        with pytest.raises(InputError, match="all workers share one --out"):
            open_ledger(tmp_path / "b", url, {}, 0)
    assert again.in_hand() == 0


def test_a_study_of_another_version_is_refused(net, tmp_path: Path) -> None:
    one = job(net, tmp_path)
    explore(one, Asked(candidates=1))
    study = journal(tmp_path)
    study.set_user_attr("space", {name: value for name, value in study.user_attrs["space"].items() if name != "prices"})
    with pytest.raises(InputError, match="another version of kompakt"):
        explore(one, Asked(candidates=2))


def test_a_journal_cut_in_the_middle_of_a_line_is_read(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, None, {"a": "b"}, 0)
    with ledger.taken(Choice(), SMALL) as (trial, choice):
        ledger.tell(trial, tried(0, 0.5))
    assert choice == Choice()
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code": 4, "work')
    again = open_ledger(tmp_path, None, {"a": "b"}, 0)
    assert list(again.drops({0: 0.5}).values()) == [0.5]
    with again.taken(Choice(fewer_macs=2.0), SMALL) as (trial, choice):
        assert trial.number == 1


def test_a_trial_of_a_dead_worker_is_taken_over_and_one_of_a_live_worker_is_not(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, None, {}, 0)
    other = open_ledger(tmp_path, None, {}, 0)
    with (
        ledger.taken(Choice(fewer_macs=1.5), SMALL) as (first, _),
        other.taken(Choice(fewer_macs=2.0), SMALL) as (second, choice),
    ):
        assert (first.number, second.number) == (0, 1)
        assert choice == Choice(fewer_macs=2.0)
    with open_ledger(tmp_path, None, {}, 0).taken(Choice(), SMALL) as (third, choice):
        assert third.number == 0
        assert choice == Choice(fewer_macs=1.5)


def test_beyond_the_plan_the_sampler_draws_the_same_for_the_same_seed(tmp_path: Path) -> None:
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ledger = open_ledger(tmp_path / name, None, {}, 5)
        for number in range(8):
            with ledger.taken(None, SMALL) as (trial, choice):
                drawn.append(choice)
                ledger.tell(trial, tried(number, choice.fewer_macs, 100 - number))
    assert drawn[:8] == drawn[8:]
    assert len(set(drawn)) > 4


WORKER = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from kompakt.engine.explore import explore
from tests.test_engine import THREE, Net, job
net = Net()
net.load_state_dict(load_file(sys.argv[2]))
explore(job(net.eval(), Path(sys.argv[1])), THREE)
"""


def worker(out: Path, weights: Path) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", WORKER, str(out), str(weights)], env=environment,
                            cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE)  # fmt: skip


@pytest.fixture(scope="module")
def weights(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_weights(net, path)
    return path


def killed(out: Path, weights: Path, times: int, seed: int) -> None:
    """Kill a worker so many times, each at a moment of its own, then let one come to its end."""
    moments = random.Random(seed)
    for _ in range(times):
        process = worker(out, weights)
        while process.poll() is None and not (out / "study.journal").exists():
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 3.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = worker(out, weights)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def test_a_search_killed_at_any_moment_ends_with_the_same_artifact(searched, weights, tmp_path: Path) -> None:
    out, result = searched
    killed(tmp_path, weights, 2, seed=1)
    for name in ("model.onnx", "model.kpk", "plan.json", "recipe.toml"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    found = Result.read(tmp_path / "result.json").candidates
    assert [(item.number, item.what, item.packed_bytes) for item in found] == [
        (item.number, item.what, item.packed_bytes) for item in result.candidates
    ]


def test_who_looks_for_something_to_do_is_alone(tmp_path: Path) -> None:
    """What another worker takes at the same time is another trial, of another choice."""
    ledgers = [open_ledger(tmp_path, None, {}, 0) for _ in range(2)]
    space = Space(max_drop=1.0)
    taken: list[tuple[int, Choice]] = []
    together = threading.Barrier(2)

    def take(ledger: Ledger) -> None:
        together.wait()
        with ExitStack() as held:
            with ledger.alone():
                proposed = propose({Choice(): 0.0} | ledger.drops({}), space)
                trial, choice = held.enter_context(ledger.taken(proposed, space))
            taken.append((trial.number, choice))
            together.wait()

    threads = [threading.Thread(target=take, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(number for number, _ in taken) == [0, 1]
    assert len({choice for _, choice in taken}) == 2


def test_two_workers_share_a_study(weights, tmp_path: Path) -> None:
    both = [worker(tmp_path, weights) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    found = all_tried(tmp_path)
    assert len(found) == 3  # what is in the other's hands counts
    assert len({item.what for item in found}) == len(found)
    study = journal(tmp_path)
    assert sorted(trial.number for trial in study.trials) == [item.number for item in found]
    assert set(open_ledger(tmp_path, None, {}, 0).choices()) == {item.number for item in found}


def test_what_another_worker_shipped_of_all_candidates_is_not_made_again(searched, tmp_path: Path) -> None:
    out = shutil.copytree(searched[0], tmp_path / "out")
    written = (out / "result.json").stat().st_mtime
    assert shipped_since(out, written - 1) == Result.read(out / "result.json")
    assert shipped_since(out, written + 1) is None  # it lay there before this worker came to its end
    folder_of(out, 7).mkdir()
    (folder_of(out, 7) / "candidate.json").write_text(tried(7, 0.0).model_dump_json())
    assert shipped_since(out, written - 1) is None  # one more has come since
    assert shipped_since(tmp_path, 0.0) is None


def journal(out: Path) -> optuna.Study:
    """Open a study as anybody would, optuna-dashboard among them."""
    storage = JournalStorage(JournalFileBackend(str(out / "study.journal")))
    return optuna.load_study(study_name="kompakt", storage=storage)


def test_picking_from_a_folder_without_a_search_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match="holds no candidates; expected the folder of kompakt compress --effort"):
        pick_command(tmp_path)


def test_how_long_training_took_tells_how_long_the_next_will_take(net, tmp_path: Path) -> None:
    choices = {0: Choice(), 1: Choice(fewer_macs=2.0, epochs=4)}
    made = [tried(0, 0.0).model_copy(update={"seconds": 10.0})]
    one, next_round = job(net, tmp_path), Choice(fewer_macs=2.0, epochs=2, after=choices[1])

    def suffices(left: float, choice: Choice, found: list[Tried]) -> bool:
        now = time.monotonic()
        effort = Effort(started=now, before=0.0, minutes=left / 60, epoch_seconds=50.0, teaching_seconds=40.0)
        return effort.suffices(one, choice, one.recipe, found, choices)

    # 25 to make it and measure the end, 40 for the teacher, 4 epochs at half of 50
    assert not suffices(160, choices[1], made)
    assert suffices(170, choices[1], made)
    took = [*made, tried(1, 0.0).model_copy(update={"seconds": 10.0 + 280.0, "epochs": 4})]  # twice as long
    assert not suffices(25 + 2 * 150 - 5, next_round, took)  # no network is kept here: both rounds count
    assert suffices(25 + 2 * 150 + 5, next_round, took)


def test_what_the_time_does_not_suffice_for_is_left_out_and_the_cheap_goes_on(net, tmp_path: Path, monkeypatch) -> None:
    seen = tried_where(lambda choice: not choice.epochs, 1, 12, net, tmp_path, monkeypatch)
    assert len(seen) == 12
    assert {choice.epochs for choice in seen} == {0}


def test_images_are_mirrored_in_training_where_the_original_does_not_mind(net, tmp_path: Path) -> None:
    """Columns alone decide in one of two data sets that are otherwise alike."""
    one = job(net, tmp_path, recipe=Recipe(finetune=FinetuneSection(epochs=1)))
    explore(one, Asked(candidates=1))
    assert journal(tmp_path).user_attrs["space"]["augment"] == "flip"

    def sided(split):
        ((inputs, _),) = split.batches(len(split))
        left, right = inputs[..., :4].mean((1, 2, 3)), inputs[..., 4:].mean((1, 2, 3))
        return loader_split([(inputs, (left > right).long())], "sides")

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.fc = nn.Linear(4 * 64, 4)
            with torch.no_grad():
                self.conv.weight.fill_(1 / 3)
                self.conv.bias.fill_(9.0)
                weight = torch.zeros(4, 4, 8, 8)
                weight[0, :, :, 4:], weight[1, :, :, :4] = 1.0, 1.0
                self.fc.weight.copy_(weight.flatten(1))
                self.fc.bias.fill_(0.0)
                self.fc.bias[2:] = -1e4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).relu().flatten(1))

    data = Data(**{name: sided(getattr(squares(), name)) for name in ("train", "validation", "test")})
    (tmp_path / "sides").mkdir()
    explore(replace(one, model=Sides().eval(), data=data, out=tmp_path / "sides"), Asked(candidates=1))
    assert journal(tmp_path / "sides").user_attrs["space"]["augment"] == "none"


def test_a_round_goes_on_from_the_network_before_it_and_the_recipe_makes_it_again(
    net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is not done twice in a search, and a recipe without its networks gives the same bytes."""
    budget, section = BudgetSection(max_drop=60.0), QuantizeSection(calibration_examples=32)
    tune = FinetuneSection(epochs=1, batch_size=50, augment="none", learning_rate=0.005)
    recipe = Recipe(budget=budget, quantize=section, finetune=tune)
    price, dearer, *_ = rates_for(sum(parameter.numel() for parameter in net.parameters()), PRICES)
    first = Choice(fewer_macs=1.3, rate=price, epochs=1)
    second = Choice(fewer_macs=2.0, rate=price, epochs=1, after=first)
    plan = [first, second, replace(second, rate=dearer, after=second)]
    monkeypatch.setattr(module, "propose", lambda drops, space: next((c for c in plan if c not in drops), None))
    trained, real = [], importlib.import_module("kompakt.training").train
    monkeypatch.setattr("kompakt.training.train", lambda *given, **more: trained.append(1) or real(*given, **more))
    searching = tmp_path / "search"
    searching.mkdir()
    result = explore(job(net, searching, recipe=recipe), Asked(candidates=3))
    assert len(trained) == 3
    assert [item.what.count("→") for item in result.candidates] == [0, 1, 2]
    assert [item.state for item in result.candidates] == ["verified"] * 3
    again = tmp_path / "again"
    again.mkdir()
    made = Recipe.read(folder_of(searching, 2) / "recipe.toml")
    assert Recipe.from_toml(made.to_toml()) == made
    assert [each.fewer_macs for each in made.before] == [1.3, 2.0]
    compress(job(net, again, recipe=made.model_copy(update={"budget": BudgetSection()})))
    assert (again / "model.onnx").read_bytes() == (folder_of(searching, 2) / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[before]]\nfewer_macs = 2.0\n[prune]\nfewer_macs = 1.5\n[finetune]\nepochs = 1", "order the rounds"),
        ("[[before]]\n[prune]\nchannels = 0.5\n[finetune]\nepochs = 1", "goes with .prune. fewer_macs"),
        ("[[before]]\n[prune]\nfewer_macs = 2.0", "no training"),
    ],
)
def test_rounds_that_do_not_lead_to_the_recipe_are_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Recipe.from_toml(text)


def test_widths_are_what_the_runtime_likes_unless_a_group_is_too_narrow(net, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "alignment", lambda coupling, times: 16)
    explore(
        job(net, tmp_path), Asked(candidates=2, objective="latency")
    )  # its groups have 16 channels: 8 leaves two widths
    assert journal(tmp_path).user_attrs["space"]["align"] == 8
    assert Recipe.read(folder_of(tmp_path, 1) / "recipe.toml").prune.align == 8
