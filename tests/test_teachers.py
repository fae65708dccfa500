"""Laws of teachers and of the sections that train: who answers, what is kept, what a stopped run goes on from."""

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from kompakt import teachers as module
from kompakt.artifact.onnx import export_onnx
from kompakt.artifact.targets import target
from kompakt.augment import AUGMENTATIONS, FORMS, flip
from kompakt.build.teacher_cache import TeacherCache
from kompakt.build.train import Hooks, train
from kompakt.data import Data, open_data
from kompakt.errors import InputError
from kompakt.job import Job
from kompakt.plan.recipe import DistillSection, FinetuneSection, Recipe, TermSection
from kompakt.ship import quantized
from kompakt.teachers import swift, teachers
from kompakt.teaching import batches, settings, taught
from kompakt.zoo import resnet20
from tests.nets import trained_like

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return trained_like(resnet20(width=4), seed)


class Stubborn(nn.Module):
    """A model that cannot be captured."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Branch on a value."""
        return inputs.mean((2, 3)) if float(inputs.sum()) > 0 else inputs.amax((2, 3))


@pytest.fixture(scope="module")
def data() -> Data:
    found = open_data("sklearn/digits", input_size=16, progress=False)
    return Data(train=found.train.subset(96), validation=found.validation.subset(20), test=found.test.subset(20))


def job(data: Data, out: Path, distill: DistillSection = DistillSection()) -> Job:
    model = net()
    onnx = target("onnxruntime")
    recipe = Recipe(distill=distill)
    return Job(model=model, name="resnet20", data=data, source="digits", target=onnx, out=out, recipe=recipe)


def timed(file: float) -> Callable[..., Any]:
    """Stand for a clock that saw the file take so many times the model's time, and once more on a busy machine."""
    samples = {"model": (1.0, 3.0), "file": (4.0, file)}
    return lambda runs, **given: {name: SimpleNamespace(samples_ms=samples[name]) for name in runs}


def never(*given: object, **more: object) -> NoReturn:
    raise AssertionError("timed again")


def test_the_original_teaches_from_onnx_runtime_and_says_the_same(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said = net(), []
    monkeypatch.setattr(module, "interleave", timed(0.6))
    answer = swift(model, EXAMPLE, 8, tmp_path, said.append)
    assert not isinstance(answer, nn.Module)
    batch = next(data.train.batches(7))[0]
    with torch.no_grad():
        assert torch.allclose(torch.as_tensor(answer(batch)), model(batch), atol=1e-4)
    monkeypatch.setattr(module, "interleave", never)
    assert not isinstance(swift(model, EXAMPLE, 8, tmp_path, said.append), nn.Module)
    assert not said


def test_a_teacher_that_is_slower_there_stays_in_pytorch_and_the_choice_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said = net(), []
    monkeypatch.setattr(module, "interleave", timed(1.3))
    assert swift(model, EXAMPLE, 8, tmp_path, said.append) is model
    monkeypatch.setattr(module, "interleave", never)
    assert swift(model, EXAMPLE, 8, tmp_path, said.append) is model
    assert said == 2 * ["the teacher runs in PyTorch, not in ONNX Runtime: 1.30× the time"]


def test_a_teacher_that_cannot_be_captured_stays_in_pytorch_with_a_line(tmp_path: Path) -> None:
    model, said = Stubborn(), []
    assert swift(model, EXAMPLE, 8, tmp_path, said.append) is model
    assert len(said) == 1
    assert "not in ONNX Runtime" in said[0]


def test_losses_on_features_look_inside_the_original(data: Data, tmp_path: Path) -> None:
    terms = (TermSection(), TermSection(loss="attention"))
    given = job(data, tmp_path, DistillSection(terms=terms))
    [teacher] = teachers(given, FinetuneSection(epochs=1), EXAMPLE)
    assert teacher.model is given.model


def test_several_teachers_one_of_them_quantized_are_mixed(data: Data, tmp_path: Path) -> None:
    given = job(data, tmp_path)
    shipped, _ = quantized(given.model, EXAMPLE, given.target, data.train)
    path = export_onnx(shipped, tmp_path / "small.onnx")
    section = FinetuneSection(epochs=1, teacher=("original", str(path)))
    student = net(1)
    who, goal = taught(given, student, section, EXAMPLE)
    assert len(who) == 2
    report = train(
        student, batches(section, given, 0), settings(section, tmp_path, student, 0), objective=goal, teachers=who
    )
    assert report.history[-1].losses["soft_targets"] > 0


def test_mirrored_images_come_in_two_forms() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    seen = {flip(images, torch.Generator().manual_seed(seed)).numpy().tobytes() for seed in range(32)}
    assert len(seen) == 4  # two images, each in two forms
    assert set(FORMS) < set(AUGMENTATIONS)


def test_answers_are_kept_for_every_form_and_shared_by_the_runs_that_name_a_folder(data: Data, tmp_path: Path) -> None:
    section = FinetuneSection(epochs=4, augment="flip", batch_size=16)
    distill = DistillSection(cache=str(tmp_path / "answers"))
    asked = []
    for name in ("first", "second"):
        given = job(data, tmp_path / name, distill)
        student = net(1)
        who, goal = taught(given, student, section, EXAMPLE)
        train(
            student, batches(section, given, 0), settings(section, given.out, student, 0), objective=goal, teachers=who
        )
        [cache] = [teacher.model for teacher in who]
        assert isinstance(cache, TeacherCache)
        asked.append(cache.asked)
    assert 96 < asked[0] <= 192
    assert asked[1] == 0


def test_a_training_of_a_recipe_goes_on_from_its_checkpoint_to_the_same_weights(data: Data, tmp_path: Path) -> None:
    section = FinetuneSection(epochs=3, augment="crop_and_flip", batch_size=32, checkpoint=True)
    given = job(data, tmp_path)

    def go(name: str, stop: int) -> tuple[Tensor, int]:
        def interrupt(_model: nn.Module, step: int) -> None:
            if step == stop:
                raise KeyboardInterrupt

        student = net(1)
        who, goal = taught(given, student, section, EXAMPLE)
        how, hooks = settings(section, tmp_path / name, student, 0), Hooks(after_step=(interrupt,))
        report = None
        with suppress(KeyboardInterrupt):
            report = train(student, batches(section, given, 0), how, objective=goal, teachers=who, hooks=hooks)
        return student.linear.weight, report.resumed_at if report else -1

    whole, _ = go("whole", -1)
    assert go("stopped", 5)[1] == -1
    again, resumed = go("stopped", -1)
    assert resumed == 3  # the checkpoint of the first epoch
    assert torch.equal(whole, again)


def test_a_cache_is_refused_where_every_image_is_new(data: Data, tmp_path: Path) -> None:
    given = job(data, tmp_path, DistillSection(cache=True))
    with pytest.raises(InputError, match="augment crop_and_flip makes every image new"):
        teachers(given, FinetuneSection(epochs=1, augment="crop_and_flip"), EXAMPLE)


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("kompakt.build.teacher_cache.fcntl.lockf", refused)
    with pytest.raises(InputError, match="cannot be locked"):
        TeacherCache(net(0), tmp_path, capacity=4)
    assert [path.name for path in tmp_path.iterdir()] == ["part-0"]
