"""``kompakt export DIR``: the folder of any command that makes a model gives what the long form gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kompakt.artifact.onnx import open_onnx
from kompakt.teaching import learner
from kompakt.weights import save_weights
from kompakt.zoo import resnet20
from tests.conftest import Run
from tests.nets import images
from tests.result_factory import result

MODEL = ("tests.nets:residual", "--input-size", "12")


@pytest.fixture
def pruned(tmp_path: Path, run: Run) -> Path:
    """The folder of ``kompakt prune`` without data."""
    out = tmp_path / "pruned"
    assert run("prune", *MODEL, "--channels", "0.5", "--out", out) == (0, "")
    return out


def long(folder: Path, model: tuple[str, ...] = MODEL) -> tuple[object, ...]:
    return ("export", *model, "--plan", folder / "plan.json", "--weights", folder / "pruned.safetensors")


@pytest.mark.parametrize(("target", "file"), [("onnxruntime", "model.onnx"), ("triton", "model/1/model.onnx")])
def test_a_pruned_folder_gives_the_bytes_of_the_long_form(
    target: str, file: str, pruned: Path, tmp_path: Path, run: Run
) -> None:
    assert run("export", pruned, "--to", target, "--out", tmp_path / "a") == (0, "")
    assert run(*long(pruned), "--to", target, "--out", tmp_path / "b") == (0, "")
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    notes = [json.loads((tmp_path / name / "export.json").read_text()) for name in ("a", "b")]
    for key in ("target", "file", "size_bytes", "findings", "snippet"):
        assert notes[0][key] == notes[1][key]


def test_the_long_form_takes_plans_that_drop_blocks(tmp_path: Path, run: Run) -> None:
    inputs = images(2, 12)
    made = learner(resnet20(), "shallower", inputs)
    (tmp_path / "plan.json").write_text(made.plan.to_json())
    save_weights(made.model, tmp_path / "pruned.safetensors")
    options = ("--to", "onnxruntime", "--out", tmp_path / "out")
    assert run(*long(tmp_path, ("kompakt.zoo:resnet20", "--input-size", "12")), *options) == (0, "")
    with torch.inference_mode():
        expected = made.model(inputs).numpy()
    np.testing.assert_allclose(open_onnx(tmp_path / "out" / "model.onnx")(inputs.numpy()), expected, atol=1e-4)


def test_what_needs_the_class_says_the_long_form_in_one_line(pruned: Path, tmp_path: Path, run: Run) -> None:
    again = f"kompakt export MODEL --plan {pruned}/plan.json --weights {pruned}/pruned.safetensors --to "
    for options in (("--to", "tensorrt"), ("--to", "triton", "--data", "images")):
        status, err = run("export", pruned, *options, "--out", tmp_path / "out")
        assert status == 2
        assert len(err.splitlines()) == 1
        assert again + options[1] in err
        assert "pruned.onnx" in err
        assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "images"
    (folder / "train").mkdir(parents=True)
    for command in (("export", folder, "--to", "onnxruntime"), ("pack", folder)):
        status, err = run(*command, "--out", tmp_path / "out")
        assert status == 2
        assert len(err.splitlines()) == 1
        assert "holds no model" in err
        assert "found train/" in err
    (folder / "train").rmdir()
    assert "found nothing" in run("export", folder, "--to", "onnxruntime", "--out", tmp_path / "out")[1]


def test_a_record_does_not_lead_out_of_its_folder(pruned: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "other.onnx").write_bytes((pruned / "pruned.onnx").read_bytes())
    record = result(files={"artifact": "../other.onnx"})
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "result.json").write_text(record.model_dump_json())
    status, err = run("export", tmp_path / "bare", "--to", "onnxruntime", "--out", tmp_path / "out")
    assert status == 2
    assert "holds no model" in err
