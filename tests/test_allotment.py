"""How much goes where, measured: tables of layer times, plans that are verified to be faster, masks that stay."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from kompakt import allotment
from kompakt.allotment import Timing, allotted, faster, loss_on
from kompakt.artifact.targets import target
from kompakt.data import Data
from kompakt.errors import BudgetError, InputError
from kompakt.graph.coupling import couple
from kompakt.graph.trace import trace
from kompakt.loaders import loader_split
from kompakt.measure.layer_times import layer_times, table_key, write
from kompakt.methods.channels import Knobs
from kompakt.methods.latency import Case
from kompakt.methods.scores import Scoring, unit_scores
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import PruneSection, SparsifySection
from kompakt.slim import pruned
from kompakt.sparsity import sparsified
from kompakt.training import Slim, keeper

CASE = Case(kind="conv2d", input=(1, 4, 8, 8), weight=(6, 4, 3, 3), settings=((1, 1), (1, 1), (1, 1)))


def net() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


EXAMPLE = torch.zeros(2, 3, 8, 8)


def test_a_table_on_disk_is_read_and_not_measured_again(tmp_path: Path) -> None:
    ort = target("onnxruntime")
    first = layer_times([CASE], ort, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == f"latency-{table_key('onnxruntime', 1)}.json"

    def stopped() -> int:
        raise AssertionError("measured again")

    assert layer_times([CASE], ort, folder=tmp_path, clock=stopped) == first


def test_a_broken_table_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / f"latency-{table_key('onnxruntime', 1)}.json").write_text("{")
    assert layer_times([CASE], target("onnxruntime"), folder=tmp_path)[CASE] > 0
    (file,) = tmp_path.iterdir()
    assert all(ms > 0 for ms in json.loads(file.read_text()).values())


def test_a_layer_is_timed_in_integers_where_it_will_ship_so(tmp_path: Path) -> None:
    ort = target("onnxruntime")
    path = tmp_path / "layer.onnx"
    write(net(), torch.randn(2, 3, 8, 8), ort, path, quantized=True)
    weights = [item for item in onnx.load(path).graph.initializer if len(item.dims) == 4]
    assert {item.data_type for item in weights} == {onnx.TensorProto.INT8}
    assert layer_times([CASE], ort, quantized=True, folder=tmp_path)[CASE] > 0
    assert (tmp_path / f"latency-{table_key('onnxruntime', 1, quantized=True)}.json").exists()


def test_threads_and_runtime_have_tables_of_their_own() -> None:
    assert len({table_key("onnxruntime", 1), table_key("onnxruntime", 2), table_key("openvino", 1)}) == 3


def test_a_layer_that_cannot_be_timed_is_said() -> None:
    with pytest.raises(InputError, match="conv1d"):
        layer_times([Case(kind="conv1d", input=(1, 4, 8), weight=(4, 4, 3))], target("onnxruntime"))


@pytest.mark.parametrize(
    ("speeds", "best"), [([2.1], 2.1), ([1.2, 1.6, 2.1], 2.1), ([1.5, 1.7, 1.6, 1.5, 1.5], 1.7), ([3.0, 1.9, 2.2], 2.2)]
)
def test_the_budget_follows_what_the_file_measures(
    monkeypatch: pytest.MonkeyPatch, speeds: list[float], best: float
) -> None:
    plan, speed, sizes = _faster(monkeypatch, list(speeds))
    assert (speed, len(sizes)) == (best, len(speeds))
    assert all((b <= a) if s < 2 else (b >= a) for a, b, s in zip(sizes, sizes[1:], speeds, strict=False))
    assert plan.entries


def test_a_plan_that_is_not_faster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match="no plan is faster in onnxruntime"):
        _faster(monkeypatch, [0.9] * 9)


def _faster(monkeypatch: pytest.MonkeyPatch, speeds: list[float]) -> tuple[Plan, float, list[int]]:
    model, seen = net(), []

    def speed(self: Timing, before: nn.Module, after: nn.Module, example: Tensor) -> float:
        seen.append(sum(p.numel() for p in after.parameters()))
        return speeds.pop(0)

    def times(wanted: list[Case], *_: object, **__: object) -> dict[Case, float]:
        return {case: float(np.prod(case.weight)) for case in wanted}

    monkeypatch.setattr(Timing, "speed", speed)
    monkeypatch.setattr(allotment, "layer_times", times)
    coupling = couple(trace(model, EXAMPLE).graph)
    scores = unit_scores(coupling, model.state_dict(), Scoring(criterion="l2"))
    timing = Timing(target=target("onnxruntime"))
    plan, found = faster(model, coupling, scores, Knobs(allocation="latency"), EXAMPLE, timing, 2.0)
    return plan, found, seen


def test_what_an_allocation_lacks_is_said() -> None:
    model = net()
    coupling = couple(trace(model, EXAMPLE).graph)
    scores = unit_scores(coupling, model.state_dict(), Scoring(criterion="l2"))
    with pytest.raises(InputError, match="--data"):
        allotted(model, coupling, scores, Knobs(ratio=0.5, allocation="sensitivity"), None, 0)
    with pytest.raises(InputError, match="--times-faster"):
        pruned(model, None, PruneSection(allocation="latency"), EXAMPLE, 0)
    with pytest.raises(InputError, match="--data"):
        pruned(model, None, PruneSection(channels=0.5, drop_blocks=1), EXAMPLE, 0)


def test_zeros_are_where_the_plan_says_and_stay_in_training() -> None:
    model = net()
    found = sparsified(Slim(model=model, plan=Plan(), did=""), SparsifySection(n_of_m="2:4"), EXAMPLE, None, 0)
    weight = found.model.get_parameter("2.weight")
    assert ((weight != 0).reshape(16, 4, 4, 9).sum(2) == 2).all()
    assert [item.name for item in found.left] == ["0.weight"]
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(1.0)
    keeper(found.masks)(found.model, 1)
    assert torch.equal(found.model.get_parameter("2.weight") != 0, found.masks["2.weight"])
    assert torch.equal(model.get_parameter("2.weight"), net().get_parameter("2.weight"))


def test_a_share_of_single_weights_goes() -> None:
    found = sparsified(Slim(model=net(), plan=Plan(), did=""), SparsifySection(sparsity=0.75), EXAMPLE, None, 0)
    for name in ("0.weight", "2.weight", "6.weight"):
        assert float((found.model.get_parameter(name) == 0).float().mean()) == pytest.approx(0.75, abs=0.01)


def test_effects_are_measured_on_batches_of_mixed_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = _in_order_of_classes(), []
    monkeypatch.setattr(allotment, "reestimate_bn", lambda model, batches: seen.extend(batches))
    loss_on(data, seed=0)(net())
    assert len(seen) == 4
    assert all(len(labels.unique()) == 4 for _, labels in seen)


def _in_order_of_classes() -> Data:
    labels = torch.arange(4).repeat_interleave(64)
    images = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    split = loader_split([(images, labels)], "train")
    return Data(train=split, validation=split, test=split)


def test_single_weights_have_criteria_of_their_own() -> None:
    from kompakt.cli.thin import SparsityOptions

    def chosen(criterion: str, *, alone: bool = True) -> str:
        section = SparsityOptions(unstructured=0.5).section(criterion, 1, (), alone=alone)
        assert section is not None
        return section.criterion

    assert chosen("l2") == "magnitude"
    assert chosen("lamp") == "lamp"
    assert chosen("taylor", alone=False) == "magnitude"
    with pytest.raises(InputError, match="--criterion taylor"):
        chosen("taylor")
