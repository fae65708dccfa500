"""The examples run: a table with a score of its own, and the text encoder at a small size."""

import sys
from pathlib import Path

import pytest
import torch

from examples import tabular
from examples.text_minilm import Classifier, Sizes
from kompakt.build.prune import apply_prune
from kompakt.cli import main
from kompakt.graph.coupling import couple
from kompakt.graph.trace import trace
from kompakt.measure.result import Result
from kompakt.methods.channels import Knobs, channels
from kompakt.methods.scores import unit_scores

TABULAR = str(Path(tabular.__file__).resolve())
SMALL = Sizes(vocabulary=50, width=32, head=8, inside=64, layers=2, length=16)


def test_the_table_is_trained_and_compressed_under_its_own_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "tabular.safetensors", tmp_path / "out"
    tabular.main(["--weights", str(weights)])
    said = capsys.readouterr().out.split()
    assert said[:2] == ["kompakt", "compress"]
    told = [word.replace("examples/tabular.py", TABULAR) for word in said[:-1]]
    monkeypatch.setattr(sys, "argv", [*told, str(out), "--quiet"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    found = Result.read(out / "result.json")
    assert found.budget.met
    assert found.baseline.accuracy is not None
    assert found.baseline.accuracy > 0.8
    assert found.compressed.size_bytes < 0.5 * found.baseline.size_bytes


def test_a_missed_tumour_costs_five_false_alarms() -> None:
    malignant, benign = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    outputs = torch.stack([malignant, benign, malignant, benign])
    assert tabular.worth(outputs, torch.tensor([0, 0, 1, 1])).tolist() == [1.0, -4.0, 0.0, 1.0]


def test_heads_and_mlps_of_the_encoder_are_removed_and_the_stream_stays() -> None:
    torch.manual_seed(0)
    model = Classifier(SMALL, 3).eval()
    ids = torch.randint(1, SMALL.vocabulary, (2, 12))
    coupling = couple(trace(model, ids).graph)
    plan = channels(coupling, unit_scores(coupling, model.state_dict()), Knobs(ratio=0.5, ignore=("*.out",)))
    made = apply_prune(model, plan, ids)
    assert made.words.weight.shape == (SMALL.vocabulary, SMALL.width)
    assert {block.attention.query.out_features for block in made.blocks} == {16}
    assert {block.up.out_features for block in made.blocks} == {32}
    assert made(ids).shape == (2, 3)


def test_words_that_are_not_there_change_nothing() -> None:
    torch.manual_seed(0)
    model = Classifier(SMALL, 3).eval()
    ids = torch.randint(1, SMALL.vocabulary, (2, 10))
    padded = torch.cat([ids, torch.zeros(2, 6, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded), model(ids))
