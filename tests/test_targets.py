"""Laws of the targets: each computes what was simulated by its own rules, and its checks find what is wrong."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt.artifact.decomposed import to_decomposed
from kompakt.artifact.lint import check_onnxruntime, check_tensorrt, opset, read
from kompakt.artifact.onnx import export_onnx
from kompakt.artifact.targets import TARGETS, Target, target
from kompakt.artifact.targets.triton import CONFIG, read_config
from kompakt.errors import FormatError, InputError, MissingExtraError
from kompakt.graph.calibrate import calibrate, pool
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.plan.rules import ONNXRUNTIME, placed, pooled, range_owner
from kompakt.ship import Shipped, ship
from tests.integer_nets import Concat, Depthwise, Residual, inputs, seeded


def installed(name: str) -> Target:
    """The target, or a skipped test where its runtime is not installed."""
    for module in TARGETS[name].modules:
        if find_spec(module) is None:
            pytest.skip(f'{module} is not installed; pip install "kompakt[{TARGETS[name].extra}]"')
    return TARGETS[name]


def shipped(name: str, folder: Path, net: type[nn.Module] = Residual) -> Shipped:
    chosen = installed(name)
    return ship(seeded(net, rules=chosen.rules), chosen, folder, proof=inputs(64, seed=1))


@pytest.mark.parametrize("net", [Residual, Depthwise, Concat])
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_computes_what_was_simulated(name: str, net: type[nn.Module], tmp_path: Path) -> None:
    found = shipped(name, tmp_path, net)
    assert found.parity is not None
    assert found.parity.top1_agreement >= 0.95
    assert found.parity.max_abs_error <= 3 * found.parity.output_step
    assert found.findings == ()
    assert found.size_bytes > 0


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_writes_floats_too(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = ship(fold(trace(Depthwise(), inputs(2))), installed(name), tmp_path, proof=inputs(8))
    assert found.parity is not None
    assert found.parity.sqnr_db > 100


@pytest.mark.parametrize("name", [name for name, item in TARGETS.items() if item.suffix])
@pytest.mark.parametrize("content", [b"", b"not a model at all, but long enough", b"\x20\x00\x00\x00TFL3 cut"])
def test_a_target_refuses_what_is_not_its_artifact(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"model{TARGETS[name].suffix}"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f"model{TARGETS[name].suffix}"):
        installed(name).open(path, 1)


class Dense(nn.Module):
    """Concatenations that read each other, and an average of what they share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×12×12 to N×4×6×6."""
        a = self.a(x)
        one = torch.cat([a, self.b(a)], dim=1)
        two = torch.cat([one, a], dim=1)
        return self.last(F.avg_pool2d(two, 2))


def test_what_a_kernel_joins_lies_on_one_grid_that_holds_all_of_it() -> None:
    torch.manual_seed(0)
    capture = fold(trace(Dense(), inputs(2)))
    rules = replace(ONNXRUNTIME, one_grid=frozenset({"cat", "avg_pool2d"}))
    sites = placed(capture.graph, rules)
    assert {range_owner(sites, name) for name in ("cat", "cat_1", "conv2d", "conv2d_1", "avg_pool2d")} == {"avg_pool2d"}
    stats = calibrate(capture, [inputs(8)], sites)
    joined = pool(stats, pooled(capture.graph, rules, sites)).histograms["avg_pool2d"]
    for name in ("cat", "cat_1", "conv2d", "avg_pool2d"):
        assert joined.minimum <= stats.histograms[name].minimum
        assert joined.maximum >= stats.histograms[name].maximum
    assert not pooled(capture.graph, ONNXRUNTIME, placed(capture.graph, ONNXRUNTIME))


@pytest.mark.parametrize("stored", [True, False])
def test_every_reader_of_integers_dequantizes_by_itself(stored: bool) -> None:
    capture, x = seeded(Depthwise), inputs(8)
    module = to_decomposed(capture, stored=stored)
    made = [node for node in module.graph.nodes if "dequantize" in str(node.target)]
    assert made
    assert all(len(node.users) == 1 for node in made)
    with torch.no_grad():
        assert torch.allclose(module(x), capture.module(x), atol=1e-5)


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
