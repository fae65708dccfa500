"""``kompakt prune``: sparse training, mended and moving masks, plans and times; one clear line for bad input."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kompakt.allotment import Timing
from kompakt.build.structure import restructured
from kompakt.measure.result import Result
from kompakt.plan.plan import Cut, Plan, Prune, Sparsify
from kompakt.plan.recipe import PruneSection, QuantizeSection
from kompakt.slim import within_bytes
from tests.conftest import Run
from tests.nets import residual

MODEL = ("tests.nets:residual", "--input-size", "12")


@pytest.fixture
def run(run: Run, tmp_path: Path) -> Run:
    """Run ``kompakt prune`` in this process: status and standard error; OUT is ``tmp_path / "o"``."""
    return partial(run, "prune", *MODEL, "--out", tmp_path / "o")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of four colours with noise, 12×12."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 6)):
        for index, name in enumerate(("blue", "green", "grey", "red")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (12, 12, 3))
                pixels[..., index % 3] += 120 * (index < 3)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "o" / "pruned.safetensors")


def zeros(out: Path) -> float:
    found = [w for name, w in weights(out).items() if w.ndim > 1]
    return sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)


@pytest.mark.parametrize("penalty", ["group_lasso", "greg"])
def test_sparse_training_removes_what_it_zeroed(penalty: str, folder: Path, tmp_path: Path, run: Run) -> None:
    strength = {"group_lasso": "0.5", "greg": "5"}[penalty]
    status, err = run(
        *("--data", folder, "--sparse-training", penalty, "--strength", strength, "--sparse-epochs", "6"),
        *("--batch-size", "8", "--teacher", "none", "--learning-rate", "0.02"),
    )
    assert status == 0, err
    result = Result.read(tmp_path / "o" / "result.json")
    assert result.compressed.params < result.baseline.params
    assert "were zero and are removed" in result.stages[-1].did
    plan = Plan.read(tmp_path / "o" / "plan.json")
    assert plan.of(Prune)
    assert restructured(residual(), plan, weights(tmp_path))


@pytest.mark.parametrize(
    ("options", "share"),
    [
        (("--unstructured", "0.5", "--update", "sparsegpt"), 0.5),
        (("--unstructured", "0.5", "--update", "refit", "--kernels"), 0.3),
        (("--unstructured", "0.6", "--schedule", "gradual", "--finetune-epochs", "2"), 0.6),
        (("--unstructured", "0.5", "--soft", "--finetune-epochs", "2"), 0.5),
        (("--unstructured", "0.75", "--rounds", "2", "--finetune-epochs", "2"), 0.75),
    ],
)
def test_weights_become_zero_and_stay_so(
    options: tuple[str, ...], share: float, folder: Path, tmp_path: Path, run: Run
) -> None:
    status, err = run("--data", folder, *options, "--batch-size", "16", "--teacher", "none")
    assert status == 0, err
    assert zeros(tmp_path) >= share - 0.02
    assert Plan.read(tmp_path / "o" / "plan.json").of(Sparsify)


def test_a_ticket_goes_back_to_early_weights(folder: Path, tmp_path: Path, run: Run) -> None:
    early = {name: torch.full_like(value, 0.25) for name, value in residual().state_dict().items()}
    save_file(early, str(tmp_path / "early.safetensors"))
    status, err = run(
        *("--data", folder, "--unstructured", "0.5", "--rewind", tmp_path / "early.safetensors"),
        *("--finetune-epochs", "1", "--learning-rate", "1e-8", "--teacher", "none"),
    )
    assert status == 0, err
    found = weights(tmp_path)["conv2.weight"]
    assert 0.4 < float((found == 0).float().mean()) < 0.6
    torch.testing.assert_close(found[found != 0], torch.full_like(found[found != 0], 0.25), rtol=1e-3, atol=0)


def test_a_plan_is_carried_out_again_to_the_same_shapes(tmp_path: Path, run: Run) -> None:
    assert run("--channels", "0.5", "--layer", "conv1=0.25")[0] == 0
    first = {name: value.shape for name, value in weights(tmp_path).items()}
    plan = (tmp_path / "o" / "plan.json").rename(tmp_path / "plan.json")
    status, err = run("--plan", plan)
    assert status == 0, err
    assert {name: value.shape for name, value in weights(tmp_path).items()} == first


def test_channels_go_until_the_parameters_take_so_many_bytes(tmp_path: Path, run: Run) -> None:
    whole = sum(4 * parameter.numel() for parameter in residual().parameters())
    status, err = run("--max-bytes", str(whole // 2))
    assert status == 0, err
    names = dict(residual().named_parameters())
    left = sum(4 * weight.numel() for name, weight in weights(tmp_path).items() if name in names)
    assert 0.7 * whole / 2 < left <= whole / 2
    section = PruneSection(max_bytes=whole // 16)
    assert within_bytes(section, residual(), QuantizeSection(weight_bits=4)).fewer_params == pytest.approx(2, rel=0.01)
    status, err = run("--max-bytes", str(whole))
    assert status == 2
    assert "the parameters take" in err


def test_a_plan_that_is_not_faster_is_refused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--channels", "0.5")[0] == 0
    plan = (tmp_path / "o" / "plan.json").rename(tmp_path / "plan.json")
    monkeypatch.setattr(Timing, "speed", lambda *_: 0.9)
    monkeypatch.setattr(Timing, "latency_ms", lambda *_: 3.0)
    for asked in (("--times-faster", "1.5"), ("--max-latency-ms", "2")):
        status, err = run("--plan", plan, *asked)
        assert status == 2
        assert "not fast enough: its file is 0.90×" in err
        assert "asked 1.50×" in err
    assert "nothing to remove" in run("--max-latency-ms", "4")[1]


CONV2 = Cut(tensor="conv2.weight", dim=0, size=8, removed=(1,))
WHOLE = {"conv2.weight": (0, 8), "bn2.weight": (0, 8)}


@pytest.mark.parametrize(
    ("cuts", "says"),
    [
        ((Cut(tensor="conv9.weight", dim=0, size=8, removed=(1,)),), "conv9.weight: the plan names a tensor"),
        ((Cut(tensor="conv2.weight", dim=0, size=64, removed=(1,)),), "expects size 64 in dimension 0, the model has"),
        ((CONV2,), "names a coupled part alone"),
        (
            (Cut(tensor="fc.weight", dim=0, size=4, removed=(1,)),),
            "fc.weight: index 1 of dimension 0 cannot be removed",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_one_line(cuts: tuple[Cut, ...], says: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "plan.json").write_text(Plan(entries=(Prune(group="conv2", cuts=cuts),)).to_json())
    status, err = run("--plan", tmp_path / "plan.json")
    assert (status, len(err.strip().splitlines())) == (2, 1), err
    assert says in err
    assert not (tmp_path / "o" / "pruned.onnx").exists()


def test_a_plan_that_empties_a_group_is_one_line(tmp_path: Path, run: Run) -> None:
    assert run("--channels", "0.5")[0] == 0
    plan = Plan.read(tmp_path / "o" / "plan.json")
    entries = [
        Prune(
            group=e.group,
            cuts=tuple(Cut(tensor=c.tensor, dim=c.dim, size=c.size, removed=tuple(range(c.size))) for c in e.cuts),
        )
        for e in plan.of(Prune)
    ]
    (tmp_path / "plan.json").write_text(Plan(entries=tuple(entries)).to_json())
    status, err = run("--plan", tmp_path / "plan.json")
    assert (status, len(err.strip().splitlines())) == (2, 1), err
    assert "would be left" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--channels", "0"), "between 0 and 1"),
        (("--channels", "0.95"), "no layer loses more than 0.9"),
        (("--channels", "0.5", "--ignore", "conv3"), "the nearest are conv"),
        (("--channels", "0.5", "--layer", "cnv1=0.5"), "the nearest are conv1"),
        (("--channels", "0.5", "--layer", "fc=0.5"), "fc: its channels cannot be removed"),
        (("--channels", "0.5", "--layer", "conv1=2"), "expected NAME=SHARE"),
        (("--channels", "0.5", "--align", "some"), "--align some"),
        (("--times-faster", "2", "--allocation", "global"), "--allocation latency"),
        (("--allocation", "latency", "--channels", "0.5"), "needs --times-faster"),
        (("--unstructured", "0.5", "--update", "obc"), "--data"),
        (("--unstructured", "0.5", "--soft"), "--data"),
        (("--unstructured", "0.5", "--block", "4"), "--block 4"),
        (("--update", "obc"), "--unstructured"),
        (("--strength", "1"), "--sparse-training"),
        (("--sparse-training", "l1"), "--data"),
        (("--plan", "nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_input_is_one_line(options: tuple[str, ...], says: str, tmp_path: Path, run: Run) -> None:
    status, err = run(*options)
    assert (status, len(err.strip().splitlines())) == (2, 1), err
    assert says in err
