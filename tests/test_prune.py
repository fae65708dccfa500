"""Laws of pruning: keeping everything is the identity, reloading is bit-exact, a bad plan is refused."""

import copy
import functools

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt import zoo
from kompakt.build.follow import follow
from kompakt.build.prune import apply_prune, check, removal, units_of, verify
from kompakt.build.structure import restructured
from kompakt.errors import PlanError
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.trace import trace
from kompakt.plan import Cut, Plan, Prune


def tiny_swin(version: str) -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    more = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == "v2" else {}
    return SwinTransformer([2, 2], 16, [2, 1], [2, 4], [4, 4], num_classes=5, **more)


def tiny_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)


def timm_vit() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5
    )


FAMILIES = {
    "resnet20": zoo.resnet20,
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35),
    "shufflenet_v2": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
    "vit": tiny_vit,
    "timm vit": timm_vit,
    "swin": lambda: tiny_swin("v1"),
    "swin v2": lambda: tiny_swin("v2"),
}
EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@functools.cache
def coupled(name: str) -> Coupling:
    return couple(trace(built(name), EXAMPLE).graph)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def halved(coupling: Coupling) -> Plan:
    return removal(coupling, {group.name: range(0, group.size - 1, 2) for group in coupling.groups})


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_a_family(name: str) -> None:
    model = built(name)
    before = copy.deepcopy(model.state_dict())
    coupling = coupled(name)
    plan = Plan.from_json(halved(coupling).to_json())
    pruned = apply_prune(model, plan, EXAMPLE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    cost = coupling.cost_after(units_of(coupling, plan))
    assert cost.params == sum(parameter.numel() for parameter in pruned.parameters())
    if name in ("shufflenet_v2", "timm vit"):
        assert verify(coupling, plan, pruned, EXAMPLE)
    if name in ("resnet20", "swin v2"):
        assert cost.macs == trace(pruned, EXAMPLE).graph.macs
    reloaded = restructured(FAMILIES[name](), plan, load(save(pruned.state_dict())))
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(EXAMPLE), pruned.eval()(EXAMPLE))


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_is_the_identity(name: str) -> None:
    model = built(name)
    kept = apply_prune(model, Plan(), EXAMPLE)
    with torch.no_grad():
        assert torch.equal(kept(EXAMPLE), model(EXAMPLE))


@pytest.mark.parametrize("name", ["vit", "swin", "swin v2"])
def test_an_attention_without_a_head_equals_one_whose_head_is_zero(name: str) -> None:
    model = built(name)
    coupling = coupled(name)
    heads = [group for group in coupling.groups if group.size in (2, 4)]
    assert heads
    for group in heads:
        plan = removal(coupling, {group.name: [1]})
        zeroed = copy.deepcopy(model)
        for cut in plan.of(Prune)[0].cuts:
            zeroed.get_parameter(cut.tensor).data.index_fill_(cut.dim, torch.tensor(cut.removed), 0)
        with torch.no_grad():
            torch.testing.assert_close(
                apply_prune(model, plan, EXAMPLE)(EXAMPLE), zeroed(EXAMPLE), atol=1e-5, rtol=1e-4
            )


class Attentive(nn.Module):
    def __init__(self, heads: int, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, heads, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mixed, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return self.head(mixed) + (0 if weights is None else weights.mean())


@pytest.mark.parametrize(("batch_first", "need_weights"), [(True, False), (False, True)])
def test_a_multihead_attention_without_heads_equals_one_whose_heads_are_zero(
    batch_first: bool, need_weights: bool
) -> None:
    torch.manual_seed(0)
    model, example = Attentive(4, batch_first, False).eval(), torch.randn(2, 5, 6)
    coupling = couple(trace(model, example).graph)
    plan = removal(coupling, {"attention": [0, 2]})
    zeroed = copy.deepcopy(model)
    for cut in plan.of(Prune)[0].cuts:
        zeroed.get_parameter(cut.tensor).data.index_fill_(cut.dim, torch.tensor(cut.removed), 0)
    pruned = apply_prune(model, plan, example)
    pruned.need_weights = need_weights
    with torch.no_grad():
        seen = pruned(example)
        weights = pruned.attention(*[pruned.stem(example)] * 3)[1].mean() if need_weights else 0
        torch.testing.assert_close(seen - weights, zeroed(example), atol=1e-5, rtol=1e-4)
    assert (pruned.attention.num_heads, pruned.attention.embed_dim) == (2, 16)


def test_an_attention_of_one_head_keeps_its_inner_width() -> None:
    model, example = Attentive(1, True, False).eval(), torch.randn(2, 5, 6)
    coupling = couple(trace(model, example).graph)
    assert [group.name for group in coupling.groups] == ["stem", "attention.out_proj"]
    assert "attention" in {left.name for left in coupling.left}
    apply_prune(model, removal(coupling, {"stem": range(5)}), example)


def test_densenet_cuts_one_input_for_several_groups() -> None:
    model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5).eval()
    coupling = couple(trace(model, EXAMPLE).graph)
    pruned = apply_prune(model, halved(coupling), EXAMPLE)
    assert pruned.features.denseblock1.denselayer2.conv1.in_channels < 16 + 8


def test_a_second_round_cuts_what_the_first_left() -> None:
    model = built("resnet18")
    first = halved(coupled("resnet18"))
    once = apply_prune(model, first, EXAMPLE)
    second = halved(couple(trace(once, EXAMPLE).graph))
    twice = apply_prune(model, first.then(*second.entries), EXAMPLE)
    with torch.no_grad():
        assert torch.equal(twice(EXAMPLE), apply_prune(once, second, EXAMPLE)(EXAMPLE))


def test_gradients_flow_and_training_mode_is_kept() -> None:
    model = built("resnet20").train()
    pruned = apply_prune(model, halved(coupled("resnet20")), EXAMPLE)
    assert pruned.training
    assert all(module.training for module in pruned.modules())
    pruned(EXAMPLE).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


class Square(nn.Module):
    """As many heads as each has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.qkv, self.out = nn.Linear(6, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_where_heads_are_as_many_as_their_channels_the_number_of_heads_is_mended() -> None:
    model, example = Square().eval(), torch.randn(2, 5, 6)
    coupling = couple(trace(model, example).graph)
    pruned = apply_prune(model, removal(coupling, {"qkv": [1, 2]}), example)
    assert (pruned.num_heads, pruned.head_dim) == (2, 4)


class Tied(nn.Module):
    """Attention that computes its head width from the input, so that heads and trunk shrink in step."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.stem, self.qkv, self.out, self.fc = (
            nn.Linear(6, 16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        return self.fc(self.out(mixed).mean(1))


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.relu(self.a(x)).view(-1, 8)))


def test_widths_that_the_code_ties_are_found_by_running_it() -> None:
    model, example = Tied().eval(), torch.randn(2, 5, 6)
    coupling = follow(model, couple(trace(model, example).graph), example)
    assert coupling.ties == (("stem", "qkv"),)
    plan = removal(coupling, {"stem": range(8), "qkv": range(2)})
    assert apply_prune(model, plan, example)(example).shape == (2, 3)


def test_a_hard_coded_width_is_left_whole_and_said() -> None:
    model, example = HardCoded().eval(), torch.randn(2, 6)
    coupling = follow(model, couple(trace(model, example).graph), example)
    assert [group.name for group in coupling.groups] == ["b"]
    assert "cannot follow" in next(left.reason for left in coupling.left if left.name == "a")


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y[:, :8].sum(1, keepdim=True) - y[:, 8:].sum(1, keepdim=True))


def test_a_cut_at_a_fixed_place_that_still_runs_is_found_by_verifying() -> None:
    model, example = Sliced().eval(), torch.randn(2, 6)
    coupling = couple(trace(model, example).graph)
    plan = removal(coupling, {coupling.groups[0].name: range(4)})
    pruned = apply_prune(model, plan, example)
    with pytest.raises(PlanError, match="its code cuts at a fixed place"):
        verify(coupling, plan, pruned, example)
    harmless = removal(coupling, {coupling.groups[1].name: range(4, 8)})  # the channels 12 to 15
    assert verify(coupling, harmless, apply_prune(model, harmless, example), example)


def small() -> tuple[nn.Module, Coupling]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, couple(trace(model, torch.zeros(2, 4)).graph)


def cut(tensor: str, dim: int, size: int, *removed: int) -> Cut:
    return Cut(tensor=tensor, dim=dim, size=size, removed=removed)


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ((cut("0.weight", 0, 6, 1),), "coupled part alone"),
        ((cut("nowhere.weight", 0, 6, 1),), "does not have"),
        ((cut("0.weight", 0, 7, 1),), r"expects size 7 in dimension 0, the model has shape \(6, 4\)"),
        ((cut("0.weight", 0, 6, 9),), "outside 0…5"),
        ((cut("4.weight", 0, 3, 0), cut("4.bias", 0, 3, 0)), "cannot be removed"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(cuts: tuple[Cut, ...], words: str) -> None:
    _, coupling = small()
    with pytest.raises(PlanError, match=words):
        check(coupling, Plan(entries=(Prune(group="0", cuts=cuts),)))


def test_an_incomplete_plan_does_not_run_and_leaves_the_model_alone() -> None:
    model, _ = small()
    plan = Plan(entries=(Prune(group="0", cuts=(cut("0.weight", 0, 6, 1), cut("0.bias", 0, 6, 1))),))
    with pytest.raises(PlanError, match="does not run after pruning"):
        apply_prune(model, plan, torch.zeros(2, 4))
    assert model[0].weight.shape == (6, 4)


def test_an_empty_group_is_refused() -> None:
    _, coupling = small()
    with pytest.raises(PlanError, match="nothing of dimension 0 would be left"):
        removal(coupling, {"0": range(6)})


def test_an_unknown_group_is_refused_with_the_nearest() -> None:
    _, coupling = small()
    with pytest.raises(PlanError, match="nearest are"):
        removal(coupling, {"9": [0]})


def test_saved_tensors_of_another_plan_are_refused() -> None:
    model, coupling = small()
    plan = removal(coupling, {"0": [0]})
    with pytest.raises(PlanError, match=r"0.weight: the plan gives shape \(5, 4\), saved was \(6, 4\)"):
        restructured(model, plan, model.state_dict())
