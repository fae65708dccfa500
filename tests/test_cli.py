"""The command line: the main job on a small network, what it writes, and one clear line for bad input."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kompakt.cli import main
from kompakt.measure.result import Result
from kompakt.plan.plan import Plan
from tests.nets import residual

Run = Callable[..., tuple[int, str, str]]
MODEL = "tests.nets:residual"
SIZE = ("--input-size", "16")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process: status, standard output, standard error."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kompakt", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as done:
            status = int(done.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return go


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of four colours with noise, 16×16."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 20)):
        for index, name in enumerate(("blue", "green", "grey", "red")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (16, 16, 3))
                pixels[..., index % 3] += 120 * (index < 3)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "residual.safetensors"
    save_file({f"module.{name}": value.contiguous() for name, value in residual().state_dict().items()}, str(path))
    return path


@pytest.fixture(scope="module")
def compressed(folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job, run once."""
    out = tmp_path_factory.mktemp("out") / "artifact"
    arguments = ["compress", MODEL, "--weights", str(weights), "--data", str(folder), *SIZE, "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kompakt", *arguments, "--max-drop", "50", "--quiet"])
        with pytest.raises(SystemExit) as done:
            main()
    assert not done.value.code
    return out


def test_compress_writes_an_artifact_that_runs_and_a_result_that_says_so(compressed: Path, folder: Path) -> None:
    result = Result.read(compressed / "result.json")
    assert result.budget.met
    assert result.compressed.size_bytes == (compressed / "model.onnx").stat().st_size
    assert result.compressed.examples == 80
    assert result.parity is not None
    assert result.parity.max_abs_error <= result.parity.output_step
    assert {layer.weight_bits for layer in result.layers} == {8.0}
    assert result.baseline.latency_ms is not None
    assert {"report.html", "result.json", "plan.json", "model.onnx", "model.kpk", "baseline.onnx"} == {
        path.name for path in compressed.iterdir()
    }
    assert Plan.read(compressed / "plan.json").entries


def test_accuracy_in_the_result_is_that_of_the_file(compressed: Path, folder: Path) -> None:
    result = Result.read(compressed / "result.json")
    session = onnxruntime.InferenceSession(str(compressed / "model.onnx"), providers=["CPUExecutionProvider"])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    right = []
    for label, name in enumerate(sorted(path.name for path in (folder / "test").iterdir())):
        for path in (folder / "test" / name).iterdir():
            pixels = (np.asarray(Image.open(path)) / 255 - mean) / std
            batch = pixels.transpose(2, 0, 1)[None].astype(np.float32)
            right.append(session.run(None, {session.get_inputs()[0].name: batch})[0].argmax() == label)
    assert result.compressed.accuracy == pytest.approx(np.mean(right))


def test_the_snippet_of_the_result_runs(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compressed)
    names: dict[str, Any] = {}
    exec(Result.read("result.json").snippet, names)
    assert names["outputs"].shape == (1, 4)


def test_the_same_seed_gives_the_same_bytes(
    compressed: Path, folder: Path, weights: Path, tmp_path: Path, run: Run
) -> None:
    status, _, err = run(
        "compress", MODEL, "--weights", weights, "--data", folder, *SIZE, "--out", tmp_path / "again", "--quiet"
    )
    assert status == 0, err
    for name in ("model.onnx", "baseline.onnx", "plan.json"):
        assert (tmp_path / "again" / name).read_bytes() == (compressed / name).read_bytes(), name


def test_a_budget_that_cannot_hold_exits_3_and_saves_the_best(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kompakt.measure import judge
    from kompakt.measure.result import Drop

    monkeypatch.setattr(judge.Judge, "drop", lambda self, a, b: Drop(points=7.0, ci95=(6.0, 8.0)))
    status, _, err = run(
        "compress", MODEL, "--data", folder, *SIZE, "--out", tmp_path / "out", "--max-drop", "0.5", "--quiet"
    )
    assert status == 3
    assert "not met" in err
    assert (tmp_path / "out" / "model.onnx").exists()
    assert not Result.read(tmp_path / "out" / "result.json").budget.met


def test_layers_go_back_to_float_until_the_budget_holds(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kompakt.measure import judge
    from kompakt.measure.result import Drop

    drops = iter([5.0, 3.0, 0.1, 0.1])
    monkeypatch.setattr(judge.Judge, "drop", lambda self, a, b: Drop(points=next(drops), ci95=(0.0, 9.0)))
    status, _, _ = run(
        "compress", MODEL, "--data", folder, *SIZE, "--out", tmp_path / "out", "--max-drop", "0.5", "--quiet"
    )
    result = Result.read(tmp_path / "out" / "result.json")
    assert status == 0
    assert sum(layer.weight_bits == 32 for layer in result.layers) == 2
    assert sum("back to float" in item.reason for item in result.left_alone) == 2
    assert sum("back to float" in line for line in result.decisions) == 2


def test_json_is_the_result_and_nothing_else(folder: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run("quantize", MODEL, "--data", folder, *SIZE, "--out", tmp_path / "q", "--dynamic", "--json")
    assert status == 0, err
    result = Result.model_validate_json(out)
    assert result.command == "quantize"
    assert any("dynamic" in item.reason for item in result.left_alone)
    assert err == ""
    assert run("export", tmp_path / "q", "--to", "onnxruntime", "--out", tmp_path / "copy", "--quiet") == (0, "", "")
    assert (tmp_path / "copy" / "model.onnx").read_bytes() == (tmp_path / "q" / "model.onnx").read_bytes()


def test_a_recipe_says_what_to_do(folder: Path, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[quantize]\nweight_bits = 5\nactivation_range = "percentile"\n[budget]\nmax_drop = 90\n')
    status, _, err = run(
        "compress", MODEL, "--data", folder, *SIZE, "--out", tmp_path / "r", "--recipe", recipe, "--quiet"
    )
    assert status == 0, err
    assert {layer.weight_bits for layer in Result.read(tmp_path / "r" / "result.json").layers} == {5.0}


def test_inspect_states_known_facts(run: Run) -> None:
    status, out, _ = run("inspect", "torchvision/resnet18", "--input-size", "224", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["params"] == 11_689_512
    assert len(facts["layers"]) == 21
    status, out, _ = run("inspect", MODEL, *SIZE)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80


def test_analyze_ranks_the_layers(folder: Path, run: Run) -> None:
    status, out, _ = run("analyze", MODEL, "--data", folder, *SIZE, "--json")
    assert status == 0
    assert set(json.loads(out)["divergence"]) == {"conv1", "conv2", "fc"}


def test_analyze_plots_accuracy_against_the_share_that_is_gone(folder: Path, tmp_path: Path, run: Run) -> None:
    status, out, _ = run("analyze", MODEL, "--data", folder, *SIZE, "--only", "pruning", "--out", tmp_path / "a")
    assert status == 0
    assert "conv1" in out
    curves = json.loads((tmp_path / "a" / "analysis.json").read_text())["pruning"]
    assert [[share for share, _ in curve] for curve in curves.values()] == [[0.0, 0.25, 0.5, 0.75]]
    assert (tmp_path / "a" / "pruning.svg").read_text().startswith("<svg")


def test_bench_compares_artifacts(compressed: Path, folder: Path, run: Run) -> None:
    files = (compressed / "baseline.onnx", compressed / "model.onnx")
    status, out, _ = run("bench", *files, "--data", folder, *SIZE, "--seconds", "0.2", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [row["size_bytes"] for row in rows] == [path.stat().st_size for path in files]
    assert rows[0]["ratio"] == 1.0
    assert rows[1]["accuracy"] == pytest.approx(Result.read(compressed / "result.json").compressed.accuracy)


def test_report_is_built_again(compressed: Path, run: Run) -> None:
    page = compressed / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert run("report", compressed)[0] == 0
    assert page.read_bytes() == before


BAD = {
    "no such model": (("compress", "torchvision/resnet81"), "resnet18"),
    "no such module": (("compress", "nowhere.at.all:model"), "nowhere"),
    "an untraceable model": (("compress", "tests.nets:Picky"), r"nets.py:"),
    "no such data": (("--data", "/nowhere/at/all"), "/nowhere/at/all"),
    "an unknown target": (("--target", "abacus"), "onnxruntime"),
    "a recipe that is not there": (("--recipe", "/nowhere.toml"), "/nowhere.toml"),
    "weights that are not there": (("--weights", "/nowhere.safetensors"), "/nowhere.safetensors"),
    "a mean that is no number": (("--mean", "a,b,c"), "--mean"),
    "a model argument without a value": (("--model-arg", "classes"), "classes"),
    "a negative budget": (("--max-drop", "-1"), "max-drop"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_2(case: str, folder: Path, tmp_path: Path, run: Run) -> None:
    change, says = BAD[case]
    command, model = (change[0], change[1]) if change[0] == "compress" else ("compress", MODEL)
    extra = () if change[0] == "compress" else change
    given = {"--data": str(folder)} | dict(zip(extra[::2], extra[1::2], strict=True))
    options = [part for pair in given.items() for part in pair]
    status, out, err = run(command, model, *options, *SIZE, "--out", tmp_path / "out")
    assert status == 2
    assert says in err
    assert err.startswith("kompakt: ")
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err + out
    assert not list(tmp_path.glob("out/*")), "nothing is half written"


def test_too_few_classes_is_refused(folder: Path, tmp_path: Path, run: Run) -> None:
    status, _, err = run("compress", "tests.test_cli:seven", "--data", folder, *SIZE, "--out", tmp_path / "out")
    assert status == 2
    assert "7" in err
    assert "4" in err


def seven() -> torch.nn.Module:
    """A network of seven classes, for data of four."""
    from tests.nets import Residual

    return Residual(classes=7)


def test_a_recipe_with_an_unknown_key_names_it(folder: Path, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[quantize]\nbits = 8\n")
    status, _, err = run("compress", MODEL, "--data", folder, *SIZE, "--out", tmp_path / "out", "--recipe", recipe)
    assert status == 2
    assert "quantize.bits" in err


def test_an_output_folder_that_is_a_file_is_refused(folder: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").write_text("in the way")
    status, _, err = run("compress", MODEL, "--data", folder, *SIZE, "--out", tmp_path / "out")
    assert status == 2
    assert "out" in err


def test_weights_with_nan_name_the_tensor(folder: Path, tmp_path: Path, run: Run) -> None:
    state = residual().state_dict()
    state["conv2.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, str(tmp_path / "nan.safetensors"))
    status, _, err = run(
        "compress", MODEL, "--weights", tmp_path / "nan.safetensors", "--data", folder, *SIZE, "--out", tmp_path / "o"
    )
    assert status == 2
    assert "conv2.weight" in err


def test_prune_removes_channels_trains_and_measures(folder: Path, weights: Path, tmp_path: Path, run: Run) -> None:
    status, _, err = run(
        *("prune", MODEL, "--weights", weights, "--data", folder, *SIZE, "--out", tmp_path / "p"),
        *("--channels", "0.5", "--allocation", "uniform", "--finetune-epochs", "1", "--quiet"),
    )
    assert status == 0, err
    result = Result.read(tmp_path / "p" / "result.json")
    assert result.compressed.macs < 0.4 * result.baseline.macs
    assert result.compressed.params < 0.4 * result.baseline.params
    assert result.compressed.file == "pruned.onnx"
    assert [stage.name for stage in result.stages] == ["original", "pruned"]


def test_pruned_weights_and_plan_rebuild_the_model_to_the_bit(tmp_path: Path, run: Run) -> None:
    from safetensors.torch import load_file

    from kompakt.build.structure import restructured

    status, _, err = run("prune", MODEL, *SIZE, "--out", tmp_path / "p", "--channels", "0.5", "--quiet")
    assert status == 0, err
    state, plan = load_file(tmp_path / "p" / "pruned.safetensors"), Plan.read(tmp_path / "p" / "plan.json")
    again = restructured(residual(), plan, state)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    session = onnxruntime.InferenceSession(str(tmp_path / "p" / "pruned.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], again.eval()(x).numpy(), atol=1e-4)


def test_a_recipe_prunes_trains_and_quantizes_in_one_run(folder: Path, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[prune]\nfewer_macs = 2.0\ncriterion = "taylor"\n[finetune]\nepochs = 1\n[quantize]\n')
    out = tmp_path / "o"
    status, _, err = run("compress", MODEL, "--data", folder, *SIZE, "--out", out, "--recipe", recipe, "--quiet")
    assert status == 0, err
    result = Result.read(tmp_path / "o" / "result.json")
    assert [stage.name for stage in result.stages] == ["original", "pruned", "quantized"]
    assert result.compressed.macs <= result.baseline.macs / 2
    assert result.compressed.bits_per_weight < 16
    kinds = {entry.kind for entry in Plan.read(tmp_path / "o" / "plan.json").entries}
    assert {"prune", "quantize"} <= kinds


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--channels", "1.5"), "between 0 and 1"),
        ((), "--fewer-macs"),
        (("--channels", "0.5", "--ignore", "conv9"), "conv"),
        (("--channels", "0.5", "--criterion", "luck"), "luck"),
        (("--channels", "0.5", "--finetune-epochs", "1"), "--data"),
        (("--unstructured", "0.9", "--drop-blocks", "1"), "--drop-blocks"),
        (("--nm", "2:4", "--rounds", "2"), "--rounds"),
    ],
)
def test_bad_pruning_input_is_one_line(options: tuple[str, ...], says: str, tmp_path: Path, run: Run) -> None:
    status, _, err = run("prune", MODEL, *SIZE, "--out", tmp_path / "p", *options)
    assert status == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_pack_and_unpack_return_the_very_same_file(compressed: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run("pack", compressed, "-o", tmp_path / "m.kpk", "--json")
    assert status == 0, err
    assert json.loads(out)["out_bytes"] == (tmp_path / "m.kpk").stat().st_size
    assert (tmp_path / "m.kpk").read_bytes() == (compressed / "model.kpk").read_bytes()
    assert run("unpack", tmp_path / "m.kpk", "-o", tmp_path / "m.onnx")[0] == 0
    assert (tmp_path / "m.onnx").read_bytes() == (compressed / "model.onnx").read_bytes()


def test_packing_what_is_no_model_is_one_line(tmp_path: Path, run: Run) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model at all")
    for arguments in (("pack", tmp_path / "x.onnx"), ("pack", tmp_path / "x.txt"), ("unpack", tmp_path / "x.onnx")):
        status, _, err = run(*arguments, "-o", tmp_path / "out")
        assert status == 2, arguments
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_packing_within_a_budget_needs_data(tmp_path: Path, run: Run) -> None:
    status, _, err = run("pack", tmp_path / "m.onnx", "-o", tmp_path / "m.kpk", "--max-drop", 1)
    assert status == 2
    assert "--data" in err


def test_distill_makes_a_student_trains_it_and_its_weights_come_back(
    folder: Path, weights: Path, tmp_path: Path, run: Run
) -> None:
    from kompakt.build.structure import restructured
    from kompakt.weights import read_weights

    teacher = (MODEL, "--weights", weights, "--data", folder, *SIZE, "--epochs", 1, "--quiet")
    out = tmp_path / "student"
    status, _, err = run(
        "distill", *teacher, "--student", "thinner:0.5", "--loss", "dkd", "--loss", "attention=2", "--out", out
    )
    assert status == 0, err
    result = Result.read(out / "result.json")
    assert [stage.name for stage in result.stages] == ["original", "student"]
    assert result.stages[1].measurement.size_bytes < result.stages[0].measurement.size_bytes
    assert "decoupled, attention" in result.stages[1].did
    plan, state = Plan.read(out / "plan.json"), read_weights(out / "student.safetensors")
    assert restructured(residual(), plan, state).conv1.weight.shape[0] == 4

    status, _, err = run("export", out, "--to", "triton", "--out", tmp_path / "repository", "--quiet")
    assert status == 0, err
    assert (tmp_path / "repository" / "model" / "1" / "model.onnx").read_bytes() == (out / "student.onnx").read_bytes()

    own = tmp_path / "own"
    options = ("--student", "tests.nets:branches", "--teacher", "original", "--teacher", out / "baseline.onnx")
    status, _, err = run("distill", *teacher, *options, "--cache", "--out", own)
    assert status == 0, err
    assert (own / "teachers" / "baseline" / "part-0" / "outputs.npy").is_file()


def test_few_bits_are_taught_by_features_too(folder: Path, weights: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "few"
    bits = ("--weight-bits", 3, "--activation-bits", 3, "--qat", "--qat-epochs", 1, "--loss", "kd", "--loss", "hint=20")
    given = (MODEL, "--weights", weights, "--data", folder, *SIZE, *bits, "--quiet", "--out", out)
    status, _, err = run("quantize", *given)
    assert status == 0, err
    assert "by soft_targets, hint" in Result.read(out / "result.json").stages[-1].did


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--student", "smaller"), "student smaller: unknown; use shallower"),
        (("--student", "tests.nets:tokens"), "Tokens: cannot be captured"),
        (("--student", "thinner:0.5", "--temperature", "0"), "--temperature 0: expected a positive number"),
        (("--student", "thinner:0.5", "--loss", "likeness"), "likeness: no such distillation loss"),
        (("--student", "thinner:0.5", "--loss", "dist=x"), "--loss dist=x: expected LOSS or LOSS=WEIGHT"),
        (("--student", "thinner:0.5", "--teacher", "big.pt"), "teacher big.pt: expected original, none or an ONNX"),
        (("--student", "thinner:0.5", "--teacher", "none.onnx"), "none.onnx: no such file"),
        (
            ("--student", "thinner:0.5", "--cache", "--augment", "crop_and_flip"),
            "cache: augment crop_and_flip makes",
        ),
    ],
)
def test_distill_says_in_one_line_what_does_not_fit(
    options: tuple[str, ...], line: str, folder: Path, tmp_path: Path, run: Run
) -> None:
    status, out, err = run(
        "distill", MODEL, "--data", folder, *SIZE, "--epochs", 1, *options, "--out", tmp_path / "out", "--quiet"
    )
    assert (status, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1


HINT = '[[distill.terms]]\nloss = "hint"\nteacher = "{}"\nstudent = "{}"'


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ('[distill]\nstudent = "tests.test_cli:seven"', "the teacher has 4 classes, the student 7"),
        (HINT.format("layer9", "conv1"), "tap layer9: matches no module; the nearest are"),
        (HINT.format("conv1", "conv*"), "tap conv*: matches 2 modules (conv1, conv2); name one"),
        (HINT.format("conv1", "fc"), "hint: tap fc: 16×4 cannot be projected to the teacher's 16×8×16×16"),
        ("[[distill.terms]]\nknobs = {temperature = -1.0}", "soft_targets: temperature -1.0: expected a positive"),
        ("[finetune]\ntemperature = 0", "finetune.temperature: Input should be greater than 0"),
        ("[finetune]\nlearning_rate = 1e12\nbatch_size = 16", "the loss is"),
    ],
)
def test_a_distillation_that_cannot_be_is_one_line(
    recipe: str, line: str, folder: Path, weights: Path, tmp_path: Path, run: Run
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(recipe if "[finetune]" in recipe else f"{recipe}\n[finetune]\nbatch_size = 16")
    file.write_text(file.read_text().replace("[finetune]", "[finetune]\nepochs = 2"))
    given = ("--weights", weights, "--data", folder, *SIZE, "--recipe", file, "--out", tmp_path / "out", "--quiet")
    status, out, err = run("compress", MODEL, *given)
    assert (status, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1
    if "1e12" in recipe:
        assert re.search(r"step \d+ \(epoch \d\): the loss is (nan|inf) \(task \S+, soft_targets \S+\)", err)


def test_compress_refuses_a_target_that_it_cannot_measure(folder: Path, tmp_path: Path, run: Run) -> None:
    status, _, err = run("compress", MODEL, "--data", folder, *SIZE, "--target", "triton", "--out", tmp_path / "out")
    assert status == 2
    assert "kompakt export" in err


def test_python_dash_m_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kompakt", "bench", str(tmp_path / "none.onnx"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("kompakt: ")
