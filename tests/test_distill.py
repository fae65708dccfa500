"""Laws of the wiring of distillation: taps, stages, projections, teachers and their cache."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from kompakt.build.distill import Objective, Student, Teacher, Term, bridge, stage_terms, teacher_features
from kompakt.build.settings import Loader, TrainSettings
from kompakt.build.taps import capture, pair_stages, resolve_tap, stage_taps, stages
from kompakt.build.teacher_cache import TeacherCache, weights_digest
from kompakt.build.train import evaluate, train
from kompakt.errors import FormatError, InputError
from kompakt.zoo import resnet20, resnet32
from tests.train_toy import CLASSES, toy_data, toy_loader, toy_net

SETTINGS = TrainSettings(epochs=4, learning_rate=0.05)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOFT = Objective(terms=(Term(loss="soft_targets", knobs={"temperature": 2.0}),), task_weight=0.0)


def state(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in model.state_dict().values()])


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    model = toy_net(1, width=12)
    train(model, toy_loader(), TrainSettings(epochs=10, learning_rate=0.05))
    return model.eval()


def distance(teacher: nn.Module, student: nn.Module) -> float:
    images, labels = toy_data()
    theirs, ours = (evaluate(model, [(images, labels)]).outputs for model in (teacher, student))
    return F.kl_div(F.log_softmax(ours, 1), F.log_softmax(theirs, 1), reduction="batchmean", log_target=True).item()


# ---------------------------------------------------------------- taps


def test_a_tap_is_a_name_or_a_pattern_that_means_one_module():
    model = resnet20()
    names = [name for name, _ in model.named_modules()]
    assert all(resolve_tap(model, name) == name for name in names)
    unique = next(name for name in names if name.count(".") == 2)
    assert resolve_tap(model, unique[:-1] + "[" + unique[-1] + "]") == unique


def test_a_tap_that_matches_nothing_or_several_is_refused():
    model = torchvision.models.resnet18(num_classes=10)
    with pytest.raises(InputError, match=r"tap layr4: matches no module; the nearest are layer4"):
        resolve_tap(model, "layr4")
    with pytest.raises(InputError, match=r"tap layer\?: matches 4 modules \(layer1, layer2, layer3 and 1 more\)"):
        resolve_tap(model, "layer?")


def test_captured_tensors_are_the_modules_outputs_and_hooks_go_away():
    model = toy_net().eval()
    images, _ = toy_data()
    with capture(model, {"2", "4"}) as seen:
        model(images)
    assert torch.equal(seen["2"], model[:3](images))
    assert torch.equal(seen["4"], model[:5](images))
    assert not any(module._forward_hooks for module in model.modules())
    pair = nn.Sequential(nn.LSTM(3, 4), nn.Identity())
    with pytest.raises(InputError, match="tap 0: the module returns tuple"), capture(pair, {"0"}):
        pair[0](torch.zeros(2, 3))


def test_stages_of_a_resnet_are_its_layers():
    model = torchvision.models.resnet18(num_classes=10).train()
    before = state(model)
    assert stage_taps(model, torch.zeros(2, 3, 64, 64)) == ("relu", "layer1", "layer2", "layer3", "layer4")
    found = {stage.size: stage for stage in stages(model, torch.zeros(2, 3, 64, 64))}
    assert found[(8, 8)].last_width == 128
    assert model.training
    assert torch.equal(state(model), before)


def test_stages_pair_by_resolution():
    pairs = pair_stages(resnet32(), resnet20(width=8), IMAGES)
    assert [t.size for t, _ in pairs] == [(32, 32), (16, 16), (8, 8)]
    assert all(t.last_width == 2 * s.last_width for t, s in pairs)
    with pytest.raises(InputError, match=r"share no resolution \(teacher 32×32, 16×16, 8×8; student 31×31\)"):
        pair_stages(resnet20(), nn.Sequential(nn.Conv2d(3, 4, 2), nn.AdaptiveAvgPool2d(1)), IMAGES)
    with pytest.raises(InputError, match="name the taps"):
        stages(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), IMAGES)


class CalledTwice(nn.Module):
    """As a quantized shortcut reads its tensor again, through the same quantizer, on a slice."""

    def __init__(self):
        super().__init__()
        self.layer, self.quantizer = nn.Conv2d(3, 4, 3, padding=1), nn.Identity()

    def forward(self, x):
        x = self.layer(x)
        return self.quantizer(x).mean() + self.quantizer(x[:, :, ::2, ::2]).mean()


def test_a_call_on_a_slice_is_no_tap():
    model, images = CalledTwice(), torch.zeros(2, 3, 8, 8)
    assert [stage.last for stage in stages(model, images)] == ["quantizer"]
    with capture(model, {"quantizer"}) as seen:
        model(images)
    assert seen["quantizer"].shape == (2, 4, 8, 8)


# ---------------------------------------------------------------- terms


def test_weights_warm_up_and_decay():
    term = Term(loss="dist", weight=2.0, warmup_epochs=4, decay_epochs=2)
    assert [term.weight_at(epoch, 10) for epoch in (0, 1, 4, 8, 9, 10)] == [0.0, 0.5, 2.0, 2.0, 1.0, 0.0]
    assert Objective(terms=(term,), task_weight=3.0).weights_at(1, 10) == (3.0, 0.5)
    assert Term(loss="dist").weight_at(0, 1) == Term(loss="dist").weight_at(1, 1) == 1.0


def test_terms_that_cannot_be_are_refused():
    refused = {
        "no such distillation loss; there are soft_targets": {"loss": "soft"},
        "no knob tau; it has temperature": {"loss": "soft_targets", "knobs": {"tau": 1.0}},
        "temperature 0: expected a positive": {"loss": "decoupled", "knobs": {"temperature": 0}},
        "must not be negative": {"loss": "dist", "weight": -1.0},
        "only losses on logits": {"loss": "hint", "standardize": True},
        "as many taps": {"loss": "fsp", "teacher": ("a", "b"), "student": "a"},
    }
    for line, given in refused.items():
        with pytest.raises(InputError, match=line):
            Term(**given)
    with pytest.raises(InputError, match="nothing to minimise"):
        Objective(task_weight=0)
    with pytest.raises(InputError, match="positive"):
        Teacher(model=nn.Identity(), weight=0)


def test_stage_terms_share_the_weight():
    terms = stage_terms("attention", resnet32(), resnet20(), IMAGES, weight=6.0, power=1.0)
    assert [term.weight for term in terms] == [2.0] * 3
    assert terms[0].knobs == {"power": 1.0}
    assert len(stage_terms("fsp", resnet32(), resnet20(), IMAGES)[0].teacher_taps) == 2


# ---------------------------------------------------------------- projections


def test_projections_only_where_widths_differ_and_a_loss_asks_for_it():
    wide, narrow = resnet20(), resnet20(width=8)
    for loss, student, count in (("hint", narrow, 3), ("hint", wide, 0), ("attention", narrow, 0), ("fsp", narrow, 6)):
        guide = resnet32()
        objective = Objective(terms=stage_terms(loss, guide, student, IMAGES))
        wrapper = Student(student, objective, (Teacher(model=guide),))
        wrapper.add_projections((Teacher(model=guide),), IMAGES)
        assert len(wrapper.projections) == count, loss
        _, ours = wrapper(IMAGES)
        theirs = teacher_features(Teacher(model=guide), objective.terms, IMAGES)
        if loss == "hint":
            assert [x[0].shape for x, *_ in ours] == [y[0].shape for y in theirs]


def test_shapes_that_no_projection_can_bridge_are_refused():
    with pytest.raises(InputError, match=r"hint: tap 2: 4×8×6×6 cannot be projected to the teacher's 4×8×3×3"):
        bridge(torch.zeros(4, 8, 6, 6), torch.zeros(4, 8, 3, 3), "hint: tap 2")
    with pytest.raises(InputError, match="cannot be projected"):
        bridge(torch.zeros(4, 8), torch.zeros(4, 8, 3, 3), "hint")
    assert bridge(torch.zeros(4, 8), torch.zeros(4, 12), "hint")(torch.zeros(4, 8)).shape == (4, 12)


def test_projections_are_trained_along_and_thrown_away(teacher):
    student = toy_net(width=6)
    names = set(student.state_dict())
    objective = Objective(terms=(Term(loss="hint", teacher="4", student="4"),), task_weight=0.0)
    settings = TrainSettings(epochs=6, optimizer="adamw", learning_rate=0.01)
    report = train(student, toy_loader(), settings, objective=objective, teachers=(Teacher(model=teacher),))
    assert set(student.state_dict()) == names
    assert report.history[-1].losses["hint 4"] < 0.9 * report.history[0].losses["hint 4"]


# ---------------------------------------------------------------- teachers


def test_a_student_comes_nearer_to_its_teacher_than_one_alone_and_the_teacher_stays(teacher):
    before = state(teacher)
    alone, taught = toy_net(), toy_net()
    train(alone, toy_loader(), SETTINGS)
    train(taught, toy_loader(), SETTINGS, objective=SOFT, teachers=(Teacher(model=teacher),))
    assert distance(teacher, taught) < distance(teacher, alone)
    assert torch.equal(state(teacher), before)
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("loss", ["soft_targets", "decoupled", "dist", "attention", "similarity", "relational", "fsp"])
def test_every_loss_falls_in_the_loop(teacher, loss):
    taps = {"fsp": ("2", "4"), "attention": "4", "similarity": "4", "relational": "7"}.get(loss, "")
    term = Term(loss=loss, teacher=taps, student=taps)
    objective = Objective(terms=(term,), task_weight=0.0)
    settings = TrainSettings(epochs=6, optimizer="adamw", learning_rate=0.01)
    report = train(toy_net(width=8), toy_loader(), settings, objective=objective, teachers=(Teacher(model=teacher),))
    assert report.history[-1].loss < 0.9 * report.history[0].loss


def test_any_callable_teaches_like_the_module_it_wraps(teacher):
    def session(inputs: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return teacher(inputs).numpy()

    first, second = toy_net(), toy_net()
    train(first, toy_loader(), SETTINGS, objective=SOFT, teachers=(Teacher(model=teacher),))
    train(second, toy_loader(), SETTINGS, objective=SOFT, teachers=(Teacher(model=session),))
    assert torch.equal(state(first), state(second))


def test_teachers_mix_by_weight(teacher):
    other = toy_net(2).eval()

    def distances(weights: tuple[float, float]) -> tuple[float, float]:
        student = toy_net()
        teachers = tuple(Teacher(model=m, weight=w) for m, w in zip((teacher, other), weights, strict=True))
        train(student, toy_loader(), SETTINGS, objective=SOFT, teachers=teachers)
        return distance(teacher, student), distance(other, student)

    near_first, near_second = distances((9.0, 1.0)), distances((1.0, 9.0))
    assert near_first[0] < near_second[0]
    assert near_first[1] > near_second[1]


def test_standardized_terms_train(teacher):
    term = Term(loss="soft_targets", standardize=True, knobs={"temperature": 2.0})
    report = train(
        toy_net(), toy_loader(), SETTINGS, objective=Objective(terms=(term,)), teachers=(Teacher(model=teacher),)
    )
    assert report.history[-1].losses["soft_targets"] < report.history[0].losses["soft_targets"]


def test_teachers_that_do_not_fit_are_refused(teacher):
    student = toy_net()

    def attempt(match: str, *terms: Term, teachers: tuple[Teacher, ...]) -> None:
        before = state(student)
        with pytest.raises(InputError, match=match):
            train(student, toy_loader(), SETTINGS, objective=Objective(terms=terms), teachers=teachers)
        assert torch.equal(state(student), before)

    soft, guide = Term(loss="soft_targets"), Teacher(model=teacher)
    attempt("no teacher was given", soft, teachers=())
    attempt("has no distillation term", teachers=(guide,))
    attempt("the very module", soft, teachers=(Teacher(model=student),))
    attempt("matches no module", Term(loss="hint", teacher="9", student="4"), teachers=(guide,))
    attempt("matches no module", Term(loss="hint", teacher="4", student="9"), teachers=(guide,))
    attempt("cannot be projected", Term(loss="hint", teacher="4", student="2"), teachers=(guide,))
    session = Teacher(model=lambda inputs: inputs)
    attempt("a teacher that is a module", Term(loss="attention", teacher="4", student="4"), teachers=(session,))
    many = nn.Sequential(nn.Flatten(), nn.Linear(108, 7))
    attempt(f"the teacher has 7 classes, the student {CLASSES}", soft, teachers=(Teacher(model=many),))


# ---------------------------------------------------------------- the cache


class Counting(nn.Module):
    """A teacher that counts the images it is asked."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.images += len(inputs)
        return self.model(inputs)


def fixed_loader() -> Loader:
    images, labels = toy_data()
    flips = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.5

    def batches(epoch: int):
        turned = flips if epoch % 2 else ~flips
        for i in torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).split(16):
            yield torch.where(turned[i, None, None, None], images[i].flip(3), images[i]), labels[i]

    return Loader(batches=batches, steps=6)


def test_a_cached_teacher_is_asked_once_for_every_image(teacher, tmp_path):
    counting = Counting(copy.deepcopy(teacher)).eval()
    plain, cached = toy_net(), toy_net()
    train(plain, fixed_loader(), SETTINGS, objective=SOFT, teachers=(Teacher(model=teacher),))
    cache = TeacherCache(counting, tmp_path, capacity=200)
    train(cached, fixed_loader(), SETTINGS, objective=SOFT, teachers=(Teacher(model=cache),))
    assert counting.images == 192  # both flips of 96 images, in four epochs
    assert cache.answered == 16 + 4 * 96 - 192  # the first batch is rehearsed once
    assert (state(plain) - state(cached)).abs().max() < 1e-4
    again = TeacherCache(Counting(copy.deepcopy(teacher)).eval(), tmp_path, capacity=200)
    images, _ = toy_data()
    with torch.no_grad():
        assert torch.allclose(again(images), teacher(images), atol=1e-5)
    assert again.asked == 0


def test_a_full_cache_still_answers(teacher, tmp_path):
    images, _ = toy_data()
    cache = TeacherCache(teacher, tmp_path, capacity=10)
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(cache(images), teacher(images), atol=1e-5)
    assert cache.answered == 10
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.npy")) == 10 * (16 + 4 * CLASSES) + 2 * 128


def test_a_cache_of_another_teacher_or_damaged_is_refused(teacher, tmp_path):
    images, _ = toy_data()
    TeacherCache(teacher, tmp_path, capacity=10)(images)
    with pytest.raises(InputError, match="another teacher"):
        TeacherCache(toy_net(5), tmp_path, capacity=10)
    with pytest.raises(InputError, match="needs an identity"):
        TeacherCache(lambda x: x, tmp_path, capacity=10)
    with pytest.raises(InputError, match="capacity 0"):
        TeacherCache(teacher, tmp_path, capacity=0)
    path = next(tmp_path.rglob("outputs.npy"))
    for damage in (path.read_bytes()[:-8], b"", np.lib.format.magic(1, 0) + b"\x02\x00xx"):
        path.write_bytes(damage)
        with pytest.raises(FormatError, match=r"outputs\.npy: not a readable array"):
            TeacherCache(teacher, tmp_path, capacity=10)
    next(tmp_path.rglob("cache.json")).write_text("{}")
    with pytest.raises(FormatError, match=r"cache\.json: not a teacher's cache"):
        TeacherCache(teacher, tmp_path, capacity=10)


def test_a_digest_tells_weights_apart():
    assert weights_digest(toy_net(0)) == weights_digest(toy_net(0)) != weights_digest(toy_net(1))
