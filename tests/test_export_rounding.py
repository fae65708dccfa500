"""``kompakt export --rounding``: weights rounded on data for every target, by the target's rules."""

from pathlib import Path

import pytest
import torch

from kompakt.artifact.targets import target
from kompakt.build.refine import Refinement
from kompakt.loaders import loader_split
from kompakt.methods.uniform import Knobs
from kompakt.ship import quantized, ship
from tests.conftest import Run
from tests.nets import residual

INPUTS = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def split():
    return loader_split([(INPUTS[:64].clone(), torch.zeros(64, dtype=torch.int64))], "train")


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_weights_rounded_on_data_depart_less_and_the_file_computes_them(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, errors = residual().eval(), {}
    expected = model(INPUTS[64:]).detach()
    for rounding in ("nearest", "retarget"):
        how = Refinement(rounding=rounding, bias_correction=rounding != "nearest")
        made, _ = quantized(model, INPUTS[:2], target(name), split(), Knobs(weight_bits=3), how)
        errors[rounding] = float((made.module(INPUTS[64:]).detach() - expected).square().mean())
        folder = tmp_path / rounding
        folder.mkdir()
        parity = ship(made, target(name), folder, proof=INPUTS[64:]).parity
        assert parity is not None
        assert parity.sqnr_db > 60
    assert errors["retarget"] < 0.8 * errors["nearest"]


def test_rounding_without_data_is_one_line(tmp_path: Path, run: Run) -> None:
    status, err = run("export", "tests.nets:residual", "--input-size", "12", "--to", "onnxruntime",
                      "--rounding", "gptq", "--out", tmp_path / "out")  # fmt: skip
    assert status == 2
    assert "--data" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
