"""The example of ResNet-18 runs: a stage on a few digits, its table, and a second call that runs nothing again."""

from pathlib import Path

import pytest

from examples.resnet18_pipeline import STAGES, main, recipes
from examples.resnet18_table import Row, page
from kompakt.measure.result import Drop


def test_a_stage_runs_once_and_its_files_are_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--smoke", "--out", str(tmp_path), "--only", "student"]
    assert main(given) == 0
    made = tmp_path / "student" / "result.json"
    before = made.read_bytes()
    shown = capsys.readouterr().out
    assert "student: making the student shallower+thinner:0.48" in shown
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| student")]
    assert [row[0] for row in rows] == ["| student", "| student, int8"]
    assert float(rows[1][2].split()[0]) < 1.2
    assert "Not run yet: int8, 30 % of channels" in shown
    assert main(given) == 0
    assert made.read_bytes() == before
    assert "making the student" not in capsys.readouterr().out


def test_every_table_of_the_recipe_is_a_stage_and_prunes_what_the_article_prunes() -> None:
    found = recipes(Path("out"), smoke=False)
    assert tuple(found) == STAGES
    thirty = found["thirty"].prune
    assert thirty is not None
    assert (thirty.channels, thirty.criterion) == (0.3, "l2")
    assert found["student"].finetune.temperature == 3.0
    assert 0 < found["student"].finetune.distill < 1  # soft targets and cross entropy


@pytest.mark.parametrize(
    ("size", "points", "says"),
    [(1_100_000, 0.9, "reached"), (1_300_000, 0.9, "missed: size"), (1_300_000, 1.1, "missed: size and accuracy")],
)
def test_the_page_says_what_was_reached(size: int, points: float, says: str) -> None:
    drop = Drop(points=points, ci95=(points - 0.5, points + 0.5))
    facts = {"did": "", "kpk_bytes": 1, "params": 11_000_000, "accuracy": 0.8, "time": 0.5}
    names = {"original": 44_000_000, "student, int8": size}
    rows = [Row(name=name, onnx_bytes=n, drop=drop, **facts) for name, n in names.items()]
    assert f"{points:.2f} points against the original — {says};" in page(tuple(rows), "digits")
