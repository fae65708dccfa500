"""Laws of ``kompakt bench``: any artifact in any runtime, here or elsewhere, on one clock, in 80 columns."""

import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from kompakt.artifact.onnx import Options, export_onnx, open_onnx
from kompakt.artifact.targets import TARGETS, runtime_of
from kompakt.artifact.targets.onnxruntime import snippet
from kompakt.cli.contest import Entrant, entrants, interpreters
from kompakt.cli.main import main
from kompakt.cli.ranking import Row, plot, tables
from kompakt.errors import FormatError, InputError, MissingExtraError
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.measure.memory import peak_memory
from kompakt.measure.remote import Remote, Stopwatch
from kompakt.measure.tune import candidates, tune
from tests.integer_nets import Residual, inputs, seeded


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(seeded(Residual), tmp_path_factory.mktemp("bench") / "model.onnx")


def test_a_worker_gives_the_same_outputs_and_its_own_time(file: Path) -> None:
    remote = Remote(sys.executable, "onnxruntime", file, 1)
    try:
        x, watch = inputs(3).numpy(), Stopwatch()
        assert remote.shape[1:] == (3, 12, 12)
        assert np.array_equal(remote(x), open_onnx(file)(x))
        timed = watch.there(remote, x)
        timed()
        assert watch() > 0
    finally:
        remote.close()


def test_what_goes_wrong_in_a_worker_is_told_here(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"broken\.onnx"):
        Remote(sys.executable, "onnxruntime", broken, 1)
    with pytest.raises(InputError, match="no answer; is kompakt installed there"):
        Remote("/bin/true", "onnxruntime", broken, 1)


def test_a_stopwatch_runs_only_while_what_it_times_runs() -> None:
    watch, seen = Stopwatch(), []
    before = watch()
    watch.here(lambda batch: seen.append(batch) or batch, np.zeros(1))()
    assert before == 0
    assert watch() > 0
    assert len(seen) == 1


def test_artifacts_find_their_runtimes(file: Path, tmp_path: Path) -> None:
    pythons = interpreters([f"openvino={sys.executable}"])
    found = entrants([str(file), f"openvino:{file}"], pythons)
    assert [(item.runtime, item.python) for item in found] == [("onnxruntime", None), ("openvino", sys.executable)]
    assert [item.name for item in found] == ["model.onnx", "openvino:model.onnx"]
    for suffix, runtime in {".xml": "openvino", ".pte": "executorch", ".tflite": "litert", ".pt2": "torch"}.items():
        (tmp_path / f"m{suffix}").touch()
        assert runtime_of(tmp_path / f"m{suffix}") == runtime
    assert runtime_of(tmp_path) == "triton"


@pytest.mark.parametrize(
    ("artifacts", "pythons", "said"),
    [
        (["nowhere.onnx"], [], "no such file"),
        (["openvino:nowhere.onnx"], [], "no such file"),
        (["FILE", "FILE"], [], "is given twice"),
        (["TEXT"], [], r"no target writes \.txt files"),
        (["FILE"], ["abacus=/bin/true"], "expected RUNTIME=INTERPRETER"),
        (["FILE"], ["litert=/no/such/python"], "is not an interpreter"),
    ],
)
def test_bad_entrants_are_refused(
    artifacts: list[str], pythons: list[str], said: str, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").touch()
    known = {"FILE": str(file), "TEXT": str(tmp_path / "a.txt")}
    with pytest.raises(InputError, match=said):
        entrants([known.get(text, text) for text in artifacts], interpreters(pythons))


def test_a_runtime_that_is_not_here_is_named_with_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    monkeypatch.setitem(TARGETS, "litert", replace(TARGETS["litert"], modules=("no_such_module",)))
    (tmp_path / "m.tflite").touch()
    with pytest.raises(MissingExtraError, match=r"kompakt\[litert\].*--python litert="):
        entrants([str(tmp_path / "m.tflite")], {})


def row(name: str, runtime: str = "onnxruntime", threads: int = 1, p50: float = 1.0) -> Row:
    return Row(
        file=name,
        runtime=runtime,
        name=name,
        threads=threads,
        batch=1,
        size_bytes=11_700_000,
        peak_memory_bytes=123_000_000,
        latency_ms={"p50": p50, "p90": 1.2 * p50},
        ratio=0.512,
        ratio_ci95=(0.5, 0.52),
        throughput=1000 / p50,
        accuracy=0.9162,
    )


def test_the_table_has_80_columns_and_the_picture_every_row() -> None:
    rows = [row("pruned-and-quantized/model.onnx", p50=1234.5), row("openvino:model.onnx", "openvino", threads=2)]
    console = Console(width=80, record=True, file=StringIO())
    for table in tables(rows):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "91.62 %" in text
    assert "…" not in text
    picture = plot(rows)
    labels = [node.text for node in ElementTree.fromstring(picture).iter() if node.tag.endswith("text")]
    assert {"pruned-and-quantized/model.onnx, 1 thr., batch 1", "openvino:model.onnx, 2 thr., batch 1"} <= set(labels)


def test_options_are_compared_from_the_default_on_and_exactness_is_never_traded(file: Path) -> None:
    known = list(candidates(2, precise=False).values())
    assert known[0].entries == Options(threads=2).entries
    assert {item.threads for item in known} == {1, 2}
    assert all(item.precise for item in candidates(1, precise=True).values())
    found = tune(file, np.zeros((1, 3, 12, 12), dtype=np.float32), seconds=0.2)
    assert found.options in candidates(1, precise=False).values()
    text = snippet(replace_file(found.options)).format(file=file, shape=(1, 3, 12, 12))
    exec(compile(text, "snippet", "exec"), {})


def replace_file(options: Options) -> Options:
    """The options with every line that a snippet can have."""
    return replace(options, precise=True, spinning=False, level="extended")


def test_memory_of_other_runtimes_is_measured_in_their_own_process(file: Path) -> None:
    assert peak_memory(file, runtime="tensorrt") > 0


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["kompakt", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_bench_mixes_runtimes_threads_and_batches(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "times.svg"
    monkeypatch.setattr(Entrant, "memory", lambda self, threads: 1000 * threads)
    words = ("bench", file, f"tensorrt:{file}", "--threads", 2)
    more = ("--batch", 1, "--batch", 4, "--seconds", 0.4, "--layers", "--plot", picture, "--json")
    status, out, _ = run(capsys, monkeypatch, *words, *more)
    rows = json.loads(out)
    assert status == 0
    assert [(item["threads"], item["batch"]) for item in rows] == [(t, b) for t in (1, 2) for b in (1, 4) for _ in "ab"]
    assert [item["runtime"] for item in rows[:2]] == ["onnxruntime", "tensorrt"]
    assert [item["peak_memory_bytes"] for item in rows[::4]] == [1000, 2000]
    assert rows[0]["layers_ms"]
    assert all(item["throughput"] == pytest.approx(1000 * item["batch"] / item["latency_ms"]["p50"]) for item in rows)
    assert picture.read_text().startswith("<svg")


def test_inputs_that_differ_are_not_compared(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = inputs(2)[:, :, :6, :6].contiguous()
    other = export_onnx(fold(trace(Residual(), small)), tmp_path / "small.onnx")
    monkeypatch.setattr(Entrant, "memory", lambda self, threads: 0)
    status, _, err = run(capsys, monkeypatch, "bench", file, other, "--seconds", 0.1)
    assert status == 2
    assert "compare like with like" in err
