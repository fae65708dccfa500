"""``kompakt pack MODEL --data``: from a network and images to a file that runs with the very same integers."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from kompakt.artifact.container import Reader
from kompakt.cli import main


def trained() -> nn.Sequential:
    """A tiny network that knows digits of 8×8 pixels a little: each class is scored by its mean image."""
    from kompakt.data import open_data

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    inputs, labels = next(iter(open_data("sklearn/digits", input_size=8, progress=False).train.batches(600)))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, :, 1, 1] = torch.tensor([1.0, 0.5, -1.0, -0.5])[:, None] / 3
        model[0].bias.zero_()
        features = model[2](model[1](model[0](inputs)))
        means = torch.stack([features[labels == digit].mean(0) for digit in range(10)])
        model[3].weight.copy_(means)
        model[3].bias.copy_(-means.square().sum(1) / 2)
    return model.eval()


def run(patch: pytest.MonkeyPatch, *words: str) -> int:
    patch.setattr(sys, "argv", ["kompakt", *words])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def test_a_network_and_images_become_a_small_file_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, back = tmp_path / "m.kpk", tmp_path / "m.onnx"
    model = ("tests.test_pack_data:trained", "--data", "sklearn/digits", "--input-size", "8")
    assert run(monkeypatch, "pack", *model, "-o", str(packed), "--max-drop", "3", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["budget_met"]
    assert said["drop_points"] <= 3
    assert said["baseline_accuracy"] > 0.6
    assert packed.stat().st_size == said["out_bytes"] < said["source_bytes"] / 6
    assert run(monkeypatch, "unpack", str(packed), "-o", str(back), "--quiet") == 0
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(back).graph.initializer}
    with Reader(packed) as reader:
        codes = {name: reader.tensor(name) for name in reader.records if reader.tensor(name).dtype == np.int8}
    assert len(codes) == 2
    for name, values in codes.items():
        assert np.array_equal(stored[name], values)


def test_a_limit_of_bytes_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("tests.test_pack_data:trained", "--data", "sklearn/digits", "--input-size", "8")
    packed = tmp_path / "m.kpk"
    assert run(monkeypatch, "pack", *model, "-o", str(packed), "--size-bytes", "1800", "--json") == 0
    assert json.loads(capsys.readouterr().out)["out_bytes"] == packed.stat().st_size <= 1800
    assert run(monkeypatch, "pack", *model, "-o", str(packed), "--size-bytes", "1800", "--rate", "1e-6") == 2
    assert "--epochs" in capsys.readouterr().err
