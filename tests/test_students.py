"""Laws of students: they start from the teacher, run, are smaller, and come back from class, plan and tensors."""

import pytest
import torch
import torchvision
from safetensors.torch import load, save
from torch import nn

from kompakt.build.factor import apply_factor, chain, reset
from kompakt.build.structure import apply_structure, restructured
from kompakt.errors import InputError, PlanError
from kompakt.methods.students import is_derived, student
from kompakt.plan import Factor, Plan
from kompakt.zoo import resnet20
from tests.nets import tokens, trained_like

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def teacher() -> nn.Module:
    torch.manual_seed(0)
    return trained_like(resnet20())


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "text", ["shallower", "thinner:0.5", "separable", "lowrank:0.5", "lowrank:cp=0.5", "shallower+lowrank:energy=0.8"]
)
def test_a_student_is_smaller_and_comes_back_from_class_plan_and_tensors(text: str) -> None:
    model = teacher()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = student(model, text, IMAGES)
    assert size(made.model) < size(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = restructured(resnet20(), Plan.from_json(made.plan.to_json()), load(save(made.model.state_dict())))
    assert torch.equal(again.eval()(IMAGES), made.model.eval()(IMAGES))
    rebuilt = apply_structure(model, made.plan)
    assert torch.equal(rebuilt.eval()(IMAGES), made.model.eval()(IMAGES))


def test_resnet18_becomes_resnet10() -> None:
    made = student(torchvision.models.resnet18(num_classes=10), "shallower", IMAGES)
    found = [
        child for name, child in made.model.named_modules() if name.count(".") == 1 and "BasicBlock" in repr(child)
    ]
    assert len(found) == 4
    block = torchvision.models.resnet.BasicBlock
    assert size(made.model) == size(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10))


@pytest.mark.parametrize("text", ["shallower+thinner:0.5", "thinner:0.5+lowrank:0.5", "shallower+separable"])
def test_two_kinds_go_together(text: str) -> None:
    first = text.split("+")[0]
    assert size(student(teacher(), text, IMAGES).model) < size(student(teacher(), first, IMAGES).model)


def test_nothing_is_lost_at_full_rank() -> None:
    for model, inputs in ((teacher(), IMAGES), (tokens(), torch.randn(2, 12, 4, 4))):
        made = student(model, "lowrank:1", inputs)
        assert made.plan.entries
        assert torch.allclose(made.model.eval()(inputs), model(inputs), atol=1e-4)


@pytest.mark.parametrize("form", ["tucker2", "cp", "separable"])
def test_a_factored_convolution_keeps_stride_padding_dilation_and_bias(form: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    ranks = {"tucker2": (4, 6), "cp": (24,), "separable": (6,)}[form]
    inputs = torch.randn(2, 4, 9, 8)
    assert torch.allclose(chain(conv, form, ranks)(inputs), conv(inputs), atol=1e-4)


def test_more_rank_is_nearer_to_the_teacher() -> None:
    model = teacher()
    errors = [
        (student(model, f"lowrank:{share}", IMAGES).model.eval()(IMAGES) - model(IMAGES)).norm().item()
        for share in (0.3, 0.9, 1)
    ]
    assert errors == sorted(errors, reverse=True)


def test_a_random_start_forgets_the_teacher_and_follows_the_seed() -> None:
    made = student(teacher(), "shallower", IMAGES).model
    first, again, other = reset(made, 1), reset(made, 1), reset(made, 2)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert not torch.equal(first.conv1.weight, made.conv1.weight)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("smaller", r"student smaller: unknown; use shallower, thinner:0\.5"),
        ("thinner", r"student thinner:: expected a share above 0 and up to 1"),
        ("thinner:1.5", r"thinner:1\.5: expected a share"),
        ("lowrank:rank=3", r"expected lowrank:0\.5, lowrank:energy=0\.9"),
        ("separable:2", "takes no number"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(text: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        student(teacher(), text, IMAGES)


def test_a_model_without_blocks_cannot_become_shallower() -> None:
    with pytest.raises(InputError, match="nothing in Sequential can be made smaller this way"):
        student(nn.Sequential(nn.Conv2d(3, 4, 3)), "shallower", IMAGES)


def test_a_plan_for_another_model_is_refused() -> None:
    for entry, line in (
        (Factor(module="conv9", form="svd", ranks=(1,)), "lacks"),
        (Factor(module="bn1", form="svd", ranks=(1,)), "is a BatchNorm2d"),
        (Factor(module="conv1", form="svd", ranks=(1,)), "svd takes linear maps"),
        (Factor(module="conv1", form="tucker2", ranks=(9, 9)), "ranks"),
    ):
        with pytest.raises(PlanError, match=line):
            apply_factor(teacher(), Plan(entries=(entry,)))
    plan = student(teacher(), "shallower", IMAGES).plan
    with pytest.raises(PlanError, match="only in the saved tensors"):
        restructured(resnet20(), plan, resnet20().state_dict())


def test_a_reference_is_not_a_kind() -> None:
    assert is_derived("shallower+thinner:0.5")
    assert not is_derived("package.module:callable")
