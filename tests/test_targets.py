"""Laws of the targets: each computes what was simulated by its own rules, and its checks find what is wrong."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from kompakt.artifact.decomposed import to_decomposed
from kompakt.artifact.lint import check_onnxruntime, check_tensorrt, opset, read
from kompakt.artifact.lint_xml import check_xml
from kompakt.artifact.onnx import export_onnx
from kompakt.artifact.targets import TARGETS, Target, target
from kompakt.artifact.targets.triton import CONFIG, read_config
from kompakt.errors import FormatError, InputError, MissingExtraError, ModelError
from kompakt.graph.calibrate import calibrate, pool
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.islands import beside_islands, measured
from kompakt.loaders import LoaderSplit
from kompakt.measure.departure import departure
from kompakt.plan.rules import ONNXRUNTIME, placed, pooled, range_owner
from kompakt.ship import Shipped, ship
from tests import nets
from tests.integer_nets import Concat, Depthwise, Pools, Residual, inputs, seeded


def installed(name: str) -> Target:
    """The target, or a skipped test where its runtime is not installed, or its compiler takes minutes."""
    if name == "torch" and not os.environ.get("KOMPAKT_SLOW_TESTS"):
        pytest.skip("AOTInductor compiles for a minute; set KOMPAKT_SLOW_TESTS=1")
    for module in TARGETS[name].modules:
        if find_spec(module) is None:
            pytest.skip(f'{module} is not installed; pip install "kompakt[{TARGETS[name].extra}]"')
    return TARGETS[name]


def shipped(name: str, folder: Path, net: type[nn.Module] = Residual) -> Shipped:
    chosen = installed(name)
    capture = seeded(net, rules=chosen.rules, prepare=chosen.prepare)
    return ship(capture, chosen, folder, proof=inputs(64, seed=1))


@pytest.mark.parametrize("net", [Residual, Depthwise, Concat])
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_computes_what_was_simulated(name: str, net: type[nn.Module], tmp_path: Path) -> None:
    if (name, net) == ("hls4ml", Depthwise):
        with pytest.raises(ModelError, match="hls4ml"):  # it has no clamps
            shipped(name, tmp_path, net)
        return
    found = shipped(name, tmp_path, net)
    assert found.parity is not None
    assert found.parity.top1_agreement >= 0.95
    assert found.parity.max_abs_error <= 3 * found.parity.output_step
    assert found.findings == ()
    assert found.size_bytes > 0


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_writes_floats_too(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    chosen = installed(name)
    capture = chosen.prepare(fold(trace(Depthwise(), inputs(2))))
    if name == "hls4ml":
        with pytest.raises(ModelError, match="hls4ml"):
            ship(capture, chosen, tmp_path)
        return
    found = ship(capture, chosen, tmp_path, proof=inputs(8))
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


def test_a_failure_names_the_first_layer_that_departs(tmp_path: Path) -> None:
    capture, chosen = seeded(Residual), TARGETS["onnxruntime"]
    path = export_onnx(capture, tmp_path / "model.onnx")
    good = departure(capture, chosen, path, inputs(4, seed=1))
    assert good.first is None
    assert {"conv2d", "add", "add_1"} <= {layer.name.split()[0] for layer in good.layers}
    assert max(layer.max_steps for layer in good.layers) <= 1
    model = onnx.load(str(path))
    weight = next(item for item in model.graph.initializer if item.name == "conv2_weight_integers")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    onnx.save(model, str(path))
    bad = departure(capture, chosen, path, inputs(4, seed=1))
    assert bad.first == "conv2d_1 (conv2)"
    assert next(layer for layer in bad.layers if layer.name.startswith("conv2d ")).max_steps <= 1


def test_litert_shows_the_values_inside_and_what_is_left_in_float(tmp_path: Path) -> None:
    found = shipped("litert", tmp_path)
    assert len(found.departure.layers) >= 4
    assert found.departure.first is None
    pools = ship(seeded(Pools, rules=TARGETS["litert"].rules), TARGETS["litert"], tmp_path)
    assert {item.rule for item in pools.findings} == {"float"}


IR = """<?xml version="1.0"?>
<net name="m" version="11"><layers>
<layer id="0" name="x" type="Parameter"><output><port id="0"/></output></layer>
<layer id="1" name="q" type="{kind}"><input><port id="0"/></input><output><port id="1"/></output></layer>
<layer id="2" name="w" type="Const"><data element_type="i8" shape="2,2,1,1" offset="0" size="4"/>
<output><port id="0"/></output></layer>
<layer id="3" name="c" type="Convert"><input><port id="0"/></input><output><port id="1"/></output></layer>
<layer id="4" name="conv" type="Convolution"><input><port id="0"/><port id="1"/></input></layer>
</layers><edges>
<edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>
<edge from-layer="1" from-port="1" to-layer="4" to-port="0"/>
<edge from-layer="2" from-port="0" to-layer="3" to-port="0"/>
<edge from-layer="3" from-port="1" to-layer="4" to-port="1"/>
</edges></net>"""


@pytest.mark.parametrize(
    ("kind", "weights", "rules"),
    [
        ("FakeQuantize", [60, 60, -60, -60], []),
        ("FakeQuantize", [127, 127, 1, 1], ["saturation"]),
        ("ReLU", [1, 1, 1, 1], ["island"]),
    ],
)
def test_a_model_of_openvinos_is_read_without_openvino(
    kind: str, weights: list[int], rules: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "m.xml"
    path.write_text(IR.format(kind=kind))
    path.with_suffix(".bin").write_bytes(np.array(weights, dtype=np.int8).tobytes())
    assert [item.rule for item in check_xml(path)] == rules
    path.with_suffix(".bin").write_bytes(b"12")
    with pytest.raises(FormatError, match="was cut off"):
        check_xml(path)
    path.with_suffix(".bin").unlink()
    with pytest.raises(FormatError, match=r"keep the \.xml and its \.bin together"):
        check_xml(path)


@pytest.mark.parametrize("text", ["", "<net/>", "<net><layers>", '<!DOCTYPE a [<!ENTITY b "c">]><net/>', "\x00"])
def test_what_is_not_a_model_of_openvinos_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "m.xml"
    path.write_text(text)
    path.with_suffix(".bin").touch()
    with pytest.raises(FormatError, match=r"m\.xml"):
        check_xml(path)


def test_a_package_of_torchaos_is_opened_like_kompakts_own(tmp_path: Path) -> None:
    installed("torch")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, x = nn.Sequential(nn.Flatten(), nn.Linear(432, 5)).eval(), inputs(1)
    quantize_(model, Int8WeightOnlyConfig())
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "theirs.pt2")
    runtime = TARGETS["torch"].open(tmp_path / "theirs.pt2", 1)
    assert runtime.shape == (1, 3, 12, 12)
    with torch.no_grad():
        assert np.allclose(runtime(x.numpy()), model(x).numpy(), atol=1e-4)


def test_layers_beside_float_operators_are_found_and_both_files_are_measured() -> None:
    model, chosen, x = nets.branches(), TARGETS["onnxruntime"], nets.images(8)
    graph = fold(trace(model, x[:2])).graph
    assert {graph.by_name[name].module for name in beside_islands(graph, chosen.rules)} == {"head"}
    part = LoaderSplit(loader=[(x, torch.zeros(8, dtype=torch.int64))], name="calibration")
    found = measured(model, x[:2], chosen, part, seconds=0.2)
    assert "1 layers stand beside float operators" in found.why
    assert {item.name for item in found.left} in ({"head"}, set())
    plain = measured(nets.residual(), x[:2], chosen, part, seconds=0.2)
    assert plain.why == "no layer stands beside a float operator"
