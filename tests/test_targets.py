"""Laws of the targets: each computes what was simulated by its own rules, and its checks find what is wrong."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from kompakt.artifact.lint import check_onnxruntime, check_tensorrt, opset, read
from kompakt.artifact.onnx import export_onnx
from kompakt.artifact.targets import TARGETS, target
from kompakt.artifact.targets.triton import CONFIG, read_config
from kompakt.errors import FormatError, InputError, MissingExtraError
from kompakt.plan.rules import ONNXRUNTIME
from kompakt.ship import Shipped, ship
from tests.integer_nets import Residual, inputs, seeded


def shipped(name: str, folder: Path) -> Shipped:
    chosen = TARGETS[name]
    for module in chosen.modules:
        if find_spec(module) is None:
            pytest.skip(f'{module} is not installed; pip install "kompakt[{chosen.extra}]"')
    return ship(seeded(Residual, rules=chosen.rules), chosen, folder, proof=inputs(64, seed=1))


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_computes_what_was_simulated(name: str, tmp_path: Path) -> None:
    found = shipped(name, tmp_path)
    assert found.parity is not None
    assert found.parity.top1_agreement >= 0.95
    assert found.parity.max_abs_error <= 3 * found.parity.output_step
    assert found.findings == ()
    assert found.size_bytes > 0


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_missing_is_named_with_the_command_that_installs_it(name: str) -> None:
    missing = replace(TARGETS[name], extra="thing", modules=("no_such_module",))
    with pytest.raises(MissingExtraError, match=r'no_such_module is not installed; pip install "kompakt\[thing\]"'):
        missing.ready()


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(InputError, match="unknown; use onnxruntime"):
        target("abacus")


def test_triton_batches_and_its_configuration_fits_the_model(tmp_path: Path) -> None:
    found = shipped("triton", tmp_path)
    config = read_config(found.path)
    assert config["max_batch_size"] == 64
    assert config["input"][2] == (3, 12, 12)  # type: ignore[index]
    runtime, x = TARGETS["triton"].open(found.path, 1), inputs(64).numpy()
    whole = runtime(x)
    for batch in (1, 2, 4, 8, 16, 32):
        assert np.array_equal(runtime(x[:batch]), whole[:batch])
    (found.path / CONFIG).write_text('name: "x"')
    with pytest.raises(FormatError, match="not a Triton model folder"):
        TARGETS["triton"].open(found.path, 1)


def test_saturation_is_found_and_kompakts_own_weights_are_free_of_it(tmp_path: Path) -> None:
    plain = replace(ONNXRUNTIME, weight=replace(ONNXRUNTIME.weight, saturation_free=False))
    bad = check_onnxruntime(export_onnx(seeded(Residual, rules=plain), tmp_path / "bad.onnx"))
    assert {item.rule for item in bad} == {"saturation"}
    assert not check_onnxruntime(export_onnx(seeded(Residual), tmp_path / "good.onnx"))


def test_tensorrt_refuses_what_another_target_wrote(tmp_path: Path) -> None:
    found = check_tensorrt(export_onnx(seeded(Residual), tmp_path / "ort.onnx"))
    assert any("uint8" in item.what for item in found)
    assert any("int32 bias" in item.what for item in found)


def test_a_broken_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = export_onnx(seeded(Residual), tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FormatError, match=r"model\.onnx"):
        check_onnxruntime(path)


def test_an_opset_out_of_range_is_found(tmp_path: Path) -> None:
    file = read(export_onnx(seeded(Residual), tmp_path / "model.onnx"))
    assert [item.rule for item in opset(file, 7, 13)] == ["opset"]
    assert opset(file, 7, 24) == ()
