"""Laws of coupling: what falls together is found for every pattern, and removing it changes nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt.build.prune import apply_prune, check, removal, units_of
from kompakt.graph.coupling import couple
from kompakt.graph.trace import trace
from kompakt.plan.plan import Prune


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.norm, self.c = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1))))


class Chunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.out = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(11, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        return self.out(torch.cat([self.left(a), b], 1))


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 8]
        self.conv, self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(8, 5, 1)
        self.out = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.conv(x), self.sizes, 1)
        return self.out(self.a(a) * torch.sigmoid(self.b(b)))


class SplitBySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 5
        self.conv, self.a, self.c = nn.Conv2d(3, 13, 1), nn.Conv2d(5, 5, 1, groups=5), nn.Conv2d(13, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = torch.split(self.conv(x), self.width, 1)
        return self.c(torch.cat([self.a(first), second + first, third], 1))


class Grouped(nn.Module):
    def __init__(self, channels: int = 16, groups: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 2 * channels, 3, groups=groups)
        self.c = nn.Conv2d(2 * channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.norm(self.a(x)))))


class GroupNormed(nn.Module):
    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 1), nn.GroupNorm(groups, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.relu(self.conv(x)), 1))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        return self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up, self.b = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))))


class ZeroPadded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pad = (2, 2)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(F.relu(self.b(x) + F.pad(x, (0, 0, 0, 0, *self.pad))))


class Free(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.scale, self.place = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.place) * self.scale)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.again, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.again(F.relu(self.again(F.relu(self.a(x)))))))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.c.weight = self.b.weight
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.up(self.a(x))))


class PixelShuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.pixel_shuffle(self.a(x), 2))


EXACT: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "concat": Concat,
    "chunk": Chunk,
    "split": Split,
    "split by size": SplitBySize,
    "grouped, whole groups": Grouped,
    "grouped, places in every group": lambda: Grouped(16, 2),
    "depthwise": Depthwise,
    "group norm": GroupNormed,
    "flatten": Flattened,
    "shuffle": Shuffle,
    "squeeze-excite": SqueezeExcite,
    "zero pad": ZeroPadded,
    "free parameters": Free,
    "called twice": Twice,
    "shared weights": Shared,
    "conv transpose": Transposed,
    "pixel shuffle": PixelShuffled,
}
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def zeroed(model: nn.Module, members: object) -> nn.Module:
    """Set to zero all that a plan's cuts name (a running variance keeps 1: its logarithm is the identity)."""
    import copy

    copied = copy.deepcopy(model)
    for cut in members:
        owner, _, leaf = cut.tensor.rpartition(".")
        tensor = getattr(copied.get_submodule(owner), leaf)
        tensor.data.index_fill_(cut.dim, torch.tensor(cut.removed), 1.0 if leaf == "running_var" else 0.0)
    return copied


@pytest.mark.parametrize("name", EXACT)
def test_removing_units_equals_zeroing_them(name: str) -> None:
    model = build(EXACT[name])
    coupling = couple(trace(model, IMAGE).graph)
    assert coupling.groups
    for group in coupling.groups:
        for unit in range(group.size):
            plan = removal(coupling, {group.name: [unit]})
            pruned = apply_prune(model, plan, IMAGE)
            cuts = [cut for entry in plan.entries if entry.kind == "prune" for cut in entry.cuts]
            torch.testing.assert_close(pruned(IMAGE), zeroed(model, cuts)(IMAGE), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_half_of_every_group_at_once(name: str) -> None:
    model = build(EXACT[name])
    graph = trace(model, IMAGE).graph
    coupling = couple(graph)
    plan = removal(coupling, {group.name: range(0, group.size - 1, 2) for group in coupling.groups})
    pruned = apply_prune(model, plan, IMAGE)
    cuts = [cut for entry in plan.entries if entry.kind == "prune" for cut in entry.cuts]
    torch.testing.assert_close(pruned(IMAGE), zeroed(model, cuts)(IMAGE), atol=1e-5, rtol=1e-4)
    after = trace(pruned, IMAGE).graph
    cost = coupling.cost_after(units_of(coupling, plan))
    assert (cost.macs, cost.params) == (after.macs, after.params)
    assert coupling.cost_after(()).macs == graph.macs


def names(model: nn.Module, example: Tensor = IMAGE) -> dict[str, tuple[int, list[tuple[str, int]]]]:
    coupling = couple(trace(model, example).graph)
    return {g.name: (g.size, [(member.tensor, member.dim) for member in g.members]) for g in coupling.groups}


def test_a_residual_trunk_is_one_group_and_its_inside_another() -> None:
    found = names(build(Residual))
    assert found["stem"] == (
        8,
        [
            ("stem.weight", 0),
            ("stem.bias", 0),
            ("conv1.weight", 1),
            ("conv2.weight", 0),
            ("conv2.bias", 0),
            ("head.weight", 1),
        ],
    )
    assert found["conv1"] == (6, [("conv1.weight", 0), ("conv1.bias", 0), ("conv2.weight", 1)])


def test_padded_channels_fall_apart_from_those_of_the_shortcut() -> None:
    found = names(build(ZeroPadded))
    assert (found["a"][0], found["b"][0]) == (4, 4)


def test_a_channel_owns_its_whole_area_after_flatten() -> None:
    coupling = couple(trace(build(Flattened), IMAGE).graph)
    member = next(m for m in coupling.group("conv").members if m.tensor == "fc.weight")
    assert member.indices[2] == tuple(range(72, 108))


def test_even_pieces_lose_the_same_places() -> None:
    coupling = couple(trace(build(Chunk), IMAGE).graph)
    member = next(m for m in coupling.group("conv").members if m.tensor == "conv.weight")
    assert member.indices == tuple((i, i + 6) for i in range(6))


def test_outputs_and_inputs_are_left_whole_and_said() -> None:
    coupling = couple(trace(build(Residual), IMAGE).graph)
    assert [(left.name, left.reason) for left in coupling.left] == [("head", "the model's output")]


def test_an_unknown_operator_leaves_its_channels_whole_and_says_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cummax(self.a(x), 1)[0])

    coupling = couple(trace(Odd(), torch.zeros(2, 4)).graph)
    assert not coupling.groups
    assert "cummax" in next(left.reason for left in coupling.left if left.name == "a")


def test_no_channel_is_in_two_groups() -> None:
    for make in EXACT.values():
        coupling = couple(trace(build(make), IMAGE).graph)
        seen: set[tuple[str, int, int]] = set()
        for group in coupling.groups:
            for member in group.members:
                for unit in member.indices:
                    for index in unit:
                        assert (member.tensor, member.dim, index) not in seen
                        seen.add((member.tensor, member.dim, index))
        check(coupling, removal(coupling, {}))


def test_a_piece_of_a_single_channel_stays() -> None:
    class OneAndMany(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [1, 6]
            self.a, self.b = nn.Conv2d(3, 7, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            gate, rest = torch.split(self.a(x), self.sizes, 1)
            return self.b(torch.sigmoid(gate) * rest)

    model = build(OneAndMany)
    coupling = couple(trace(model, IMAGE).graph)
    assert [(group.name, group.size) for group in coupling.groups] == [("a", 6)]
    apply_prune(model, removal(coupling, {"a": range(5)}), IMAGE)


def test_a_group_that_keeps_one_unit_leaves_nothing_empty() -> None:
    for make in EXACT.values():
        coupling = couple(trace(build(make), IMAGE).graph)
        plan = removal(coupling, {group.name: range(group.size - 1) for group in coupling.groups})
        assert len(plan.of(Prune)) == len(coupling.groups)
        assert all(len(cut.removed) < cut.size for entry in plan.of(Prune) for cut in entry.cuts)
