"""Laws of dropping blocks: what is found can be dropped, the least needed goes first."""

import pytest
import torch
import torchvision
from torch import nn

from kompakt import zoo
from kompakt.build.drop import apply_drop
from kompakt.errors import BudgetError, InputError, PlanError
from kompakt.graph.graph import Graph
from kompakt.graph.trace import trace
from kompakt.methods.blocks import drop_blocks, residual_blocks
from kompakt.plan import Drop, Plan

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def resnet() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    model = zoo.CifarResNet(3, width=4).eval()
    return model, trace(model, EXAMPLE).graph


def test_only_blocks_that_keep_the_shape_are_found() -> None:
    _, graph = resnet()
    found = [block.module for block in residual_blocks(graph)]
    assert found == ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]


def test_a_dropped_block_saves_what_it_said() -> None:
    model, graph = resnet()
    for block in residual_blocks(graph)[::3]:
        dropped = apply_drop(model, Plan(entries=(Drop(module=block.module),)), EXAMPLE)
        after = trace(dropped, EXAMPLE).graph
        assert (after.macs, after.params) == (graph.macs - block.macs, graph.params - block.params)


def test_a_block_that_adds_nothing_changes_nothing_and_goes_first() -> None:
    model, graph = resnet()
    nn.init.zeros_(model.layer2[1].bn2.weight)
    expected = model(EXAMPLE).detach()
    plan, history = drop_blocks(
        model, residual_blocks(graph), lambda m: -float((m(EXAMPLE).detach() - expected).abs().sum()), count=1
    )
    assert plan.entries == (Drop(module="layer2.1"),)
    assert history[0][1] == 0.0
    assert torch.equal(apply_drop(model, plan)(EXAMPLE), expected)


def test_enough_is_dropped_for_a_budget_and_the_model_is_left_alone() -> None:
    model, graph = resnet()
    before = len(list(model.modules()))
    plan, history = drop_blocks(model, residual_blocks(graph), lambda m: 0.0, macs=graph.macs // 3)
    assert graph.macs - trace(apply_drop(model, plan), EXAMPLE).graph.macs >= graph.macs // 3
    assert len(history) == len(plan.entries)
    assert len(list(model.modules())) == before


def test_encoder_blocks_of_a_transformer_are_found() -> None:
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5).eval()
    found = [block.module for block in residual_blocks(trace(model, EXAMPLE).graph)]
    assert found == ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]


def test_what_cannot_be_done_is_said() -> None:
    model, graph = resnet()
    with pytest.raises(InputError, match="say one of count and macs"):
        drop_blocks(model, residual_blocks(graph), lambda m: 0.0)
    with pytest.raises(BudgetError, match="only 2 blocks can be dropped"):
        drop_blocks(model, residual_blocks(graph)[:2], lambda m: 0.0, count=3)
    with pytest.raises(PlanError, match=r"layer9.0: the plan drops a module that CifarResNet lacks"):
        apply_drop(model, Plan(entries=(Drop(module="layer9.0"),)))
