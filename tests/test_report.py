"""The report says what the result says: in the terminal, in the plots and on the page."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources
from io import StringIO

import plotly.graph_objects as go
import pytest
from rich.cells import cell_len
from rich.console import Console

from kompakt.errors import InputError
from kompakt.measure.result import Budget, Drop, LeftAlone, Result, Stage
from kompakt.report import build_report, layer_table, rebuild, stage_table, summary_table
from kompakt.report import numbers as n
from kompakt.report.cards import cards, gauge, headline, verdict
from kompakt.report.columns import layer_columns, reasons, step_columns
from kompakt.report.layer_plots import layers_figure
from kompakt.report.page import render
from kompakt.report.plots import accuracy_figure, latency_figure, size_figure
from kompakt.report.steps import steps_of
from tests import result_factory as factory

HOSTILE = (
    """</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">'"&{{7*7}}%{x}[bold]<b>ü层</b>"""
)
VOID = {"meta", "link", "img", "br", "input", "hr"}


def hostile() -> Result:
    """Every text of the result is an attack."""
    base = factory.result()
    stage = Stage(name=HOSTILE, did=HOSTILE, measurement=base.stages[0].measurement, drop=base.stages[0].drop)
    layers = tuple(
        layer.model_copy(update={"name": HOSTILE, "note": HOSTILE, "kind": HOSTILE}) for layer in base.layers
    )
    texts = dict.fromkeys(("command", "model", "data", "target", "snippet"), HOSTILE)
    pairs = {name: {HOSTILE: HOSTILE} for name in ("files", "versions", "machine")}
    left = (LeftAlone(name=HOSTILE, reason=HOSTILE),)
    return factory.result(
        **texts, **pairs, stages=(stage, *base.stages[1:]), layers=layers, left_alone=left, decisions=(HOSTILE,)
    )


def stages(count: int) -> tuple[Stage, ...]:
    found = []
    for number in range(1, count + 1):
        measured = factory.measurement(f"s{number}", 0.91, 1_000_000 // number**3, 0.8 / number, 10**7, 10**5)
        found.append(
            Stage(name=f"stage {number}", did="…", measurement=measured, drop=Drop(points=0.1, ci95=(-0.1, 0.3)))
        )
    return tuple(found)


def unmeasured() -> Result:
    """A full run in which neither accuracy nor latency could be measured."""
    base = factory.result()
    nothing = {"accuracy": None, "accuracy_ci95": None, "latency_ms": None, "peak_memory_bytes": None, "examples": 0}
    return factory.result(
        baseline=base.baseline.model_copy(update=nothing),
        compressed=base.compressed.model_copy(update=nothing),
        stages=(),
        drop_points=None,
        drop_ci95=None,
    )


CASES = {
    "usual": factory.result,
    "bare": factory.bare,
    "hostile": hostile,
    "unmeasured": unmeasured,
    "one stage": lambda: factory.result(stages=stages(1)),
    "ten stages": lambda: factory.result(stages=stages(10)),
    "three layers": lambda: factory.result(layers=factory.many_layers(3)),
    "400 layers": lambda: factory.result(layers=factory.many_layers(400, prefix="модель.编码器." + "very.long." * 20)),
    "over budget": lambda: factory.result(budget=Budget(max_drop=0.2, met=False)),
    "gain": lambda: factory.result(drop_points=-0.25, drop_ci95=(-0.6, 0.1)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def result(request: pytest.FixtureRequest) -> Result:
    return request.param()


class Page(HTMLParser):
    """Elements, ids, addresses and scripts of a page; raises where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (n.bytes_text(0), "0 B"),
        (n.bytes_text(999), "999 B"),
        (n.bytes_text(97_913), "97.9 kB"),
        (n.bytes_text(999_600), "1.00 MB"),
        (n.bytes_text(None), "–"),
        (n.count_text(10), "10"),
        (n.count_text(40_813_184), "40.8 M"),
        (n.ms_text(0.0123), "0.0123 ms"),
        (n.ms_text(1234.5), "1,230 ms"),
        (n.points_text(-0.101), "−0.10"),
        (n.points_text(-0.001), "0.00"),
        (n.score_text(0.9162), "91.62 %"),
        (n.score_text(27.315), "27.32"),
        (n.bits_text(4.0), "4"),
        (n.db_text(float("inf")), "exact"),
        (n.duration_text(59.96), "1 min 0 s"),
        (n.duration_text(7500), "2 h 5 min"),
        (n.elide("abcdefgh", 5), "ab…gh"),
        (n.ratio_text(100, 10, "smaller", "larger"), "10.0× smaller"),
        (n.ratio_text(10, 13, "smaller", "larger"), "1.30× larger"),
        (n.ratio_text(10, 10, "smaller", "larger"), "unchanged"),
        (n.ratio_text(10, 0, "smaller", "larger"), ""),
        (n.ratio_text(None, 1, "smaller", "larger"), ""),
    ],
)
def test_numbers_are_written_as_people_read_them(written: str, expected: str) -> None:
    assert written == expected


@pytest.mark.parametrize("value", [1.0, 12.345, 999.4, 999.6, 1e5, 3.1e9, 0.04, 0.000123, 5e-7])
def test_three_digits_are_within_half_a_per_cent(value: float) -> None:
    text = n.digits(value).replace(",", "").replace("−", "-")
    assert float(text) == pytest.approx(value, rel=0.005)


def test_every_artifact_is_listed_once() -> None:
    steps = steps_of(factory.result())
    assert [step.label for step in steps] == ["baseline", "prune", "mixed precision", "quantization-aware training"]
    assert [step.role for step in steps] == ["baseline", "stage", "stage", "final"]
    assert steps[-1].drop == Drop(points=0.42, ci95=(0.08, 0.76))
    assert [step.label for step in steps_of(factory.bare())] == ["baseline", "compressed"]


def test_the_headline_agrees_with_the_figures() -> None:
    assert headline(factory.result()) == "11.4× smaller, 2.05× faster, 0.42 points less accurate"
    assert headline(CASES["gain"]()) == "11.4× smaller, 2.05× faster, 0.25 points more accurate"
    assert headline(unmeasured()) == "11.4× smaller"


@pytest.mark.parametrize(
    ("ratio", "interval", "said"),
    [(0.5, (0.48, 0.52), "2.00× faster"), (1.25, (1.2, 1.3), "1.25× slower"), (0.9, (0.7, 1.1), "same speed")],
)
def test_the_headline_takes_speed_from_the_rounds_and_not_from_the_medians(ratio, interval, said) -> None:
    busy = factory.latency(0.11).model_copy(update={"ratio": ratio, "ratio_ci95": interval, "p90": 0.4})
    found = factory.result()
    found = found.model_copy(update={"compressed": found.compressed.model_copy(update={"latency_ms": busy})})
    assert said in headline(found)
    card = next(card for card in cards(found) if card.title == "Latency")
    assert any("busy" in line for line in card.details)
    assert any(f"{1 / interval[1]:.2f}× to {1 / interval[0]:.2f}×" in line for line in card.details)


def test_the_verdict_is_the_budgets() -> None:
    assert verdict(factory.result()).text == "Within the budget of 1 point"
    assert verdict(CASES["over budget"]()).text == "Over the budget of 0.2 points"
    assert verdict(factory.bare()).text == "No accuracy budget set"
    assert verdict(unmeasured()).text == "Accuracy not measured, the budget of 1 point not checked"


def test_an_interval_that_reaches_past_the_budget_is_said() -> None:
    wide = factory.result(drop_ci95=(-0.4, 1.24))
    assert "The interval reaches past the budget." in cards(wide)[0].details
    assert "The interval reaches past the budget." not in cards(factory.result())[0].details


def test_what_was_not_measured_has_no_card() -> None:
    assert [card.title for card in cards(unmeasured())] == ["File size", "Compute (MACs)"]
    sent = factory.result().model_copy(update={"packed_bytes": factory.result().baseline.size_bytes // 118})
    (size,) = (card for card in cards(sent) if card.title == "File size")
    assert size.details[0].endswith(", 118× smaller")
    assert size.details[0].startswith("As .kpk: ")


@pytest.mark.parametrize(
    ("drop", "interval", "budget"), [(0.4, (0.1, 0.8), 1.0), (-0.2, (-0.5, 0.1), 0.5), (0, (0, 0), 0)]
)
def test_the_gauge_keeps_the_order_of_its_values(drop: float, interval: tuple[float, float], budget: float) -> None:
    shown = gauge(drop, interval, budget)
    assert 0 <= shown.low <= shown.point <= shown.high <= 100
    assert shown.budget is not None
    assert (shown.high <= shown.budget) == (interval[1] <= budget)


def test_figures_are_valid_and_hold_the_measured_values(result: Result) -> None:
    for build in (accuracy_figure, size_figure, latency_figure, layers_figure):
        figure = build(result)
        if figure is not None:
            json.dumps(figure, allow_nan=False)
            assert go.Figure(figure).data
    steps = steps_of(result)
    sizes = [step.measurement.size_bytes for step in steps]
    drawn = size_figure(result)["data"][0]["x"]
    assert [x * max(sizes) for x in drawn] == pytest.approx([size * max(drawn) for size in sizes])


def test_figures_without_data_are_not_drawn() -> None:
    assert accuracy_figure(unmeasured()) is None
    assert latency_figure(unmeasured()) is None
    assert layers_figure(factory.bare()) is None


def test_a_track_without_data_is_left_out() -> None:
    blank = {"weight_sqnr_db": None, "output_sqnr_db": float("inf"), "latency_ms": None}
    layers = tuple(layer.model_copy(update=blank) for layer in factory.resnet_layers())
    full, less = layers_figure(factory.result()), layers_figure(factory.result(layers=layers))
    assert full is not None
    assert less is not None
    titles = [[note["text"].split("  ")[0] for note in figure["layout"]["annotations"]] for figure in (full, less)]
    assert titles == [["Bits", "Signal to noise, dB", "MACs", "Time, ms"], ["Bits", "MACs"]]


def test_the_axis_is_logarithmic_only_where_sizes_differ_much() -> None:
    assert "type" not in size_figure(factory.result())["layout"]["xaxis"]
    far = size_figure(factory.result(stages=stages(10)))["layout"]["xaxis"]
    assert far["type"] == "log"
    assert "log scale" in far["title"]["text"]


def test_tables_have_a_cell_for_every_row_and_no_empty_column(result: Result) -> None:
    for columns, rows in ((layer_columns(result), len(result.layers)), (step_columns(result), len(steps_of(result)))):
        for column in columns:
            assert len(column.cells) == rows
            assert any(cell.text not in ("", "–") for cell in column.cells)


def test_left_alone_is_grouped_by_reason() -> None:
    groups = reasons(factory.result())
    assert [len(names) for _, names in groups] == [1, 2]
    assert sum(len(names) for _, names in groups) == len(factory.result().left_alone)


def test_terminal_tables_fit_80_columns(result: Result) -> None:
    for table in (summary_table(result), stage_table(result), layer_table(result), layer_table(result, limit=None)):
        out = StringIO()
        Console(file=out, width=80, force_terminal=False).print(table)
        assert max(cell_len(line) for line in out.getvalue().splitlines()) <= 80


def test_terminal_tables_lose_no_figure_at_80_columns() -> None:
    out = StringIO()
    Console(file=out, width=80, force_terminal=False).print(
        summary_table(factory.result()), layer_table(factory.result())
    )
    text = out.getvalue()
    assert "…" not in text
    for expected in (
        "11.4× smaller",
        "97.9 kB",
        "0.396 ms",
        "−0.42 points",
        "0.08 to 0.76",
        "layer2.0.shortcut.0",
        "1.12 M",
    ):
        assert expected in text


def test_the_layer_table_keeps_the_largest_in_order() -> None:
    layers = factory.many_layers(60)
    table = layer_table(factory.result(layers=layers), limit=5)
    shown = [str(cell) for cell in table.columns[1].cells]
    largest = sorted(layers, key=lambda layer: -layer.params)[:5]
    assert shown == [layer.name for layer in layers if layer in largest]


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(result: Result) -> None:
    page = Page(render(result))
    assert page.elements[0] == ("html", {"lang": "en"})
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:"))
        assert not [name for name in attributes if name.startswith("on")]


def test_only_the_pages_own_scripts_may_run() -> None:
    page = Page(render(hostile()))
    [policy] = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    kinds = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
    code = [text for text, kind in zip(page.scripts, kinds, strict=True) if kind is None]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    assert policy is not None
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "default-src 'none'" in policy


def test_names_are_text_and_never_markup() -> None:
    attacked, usual = Page(render(hostile())), Page(render(factory.result()))
    assert attacked.count("script") == usual.count("script")
    assert attacked.count("img") == 0
    assert attacked.count("b") == 0
    assert HOSTILE in "".join(attacked.words)
    labels = json.dumps([accuracy_figure(hostile()), layers_figure(hostile())])
    assert "<img" not in labels
    assert "<script" not in labels


def test_sections_without_data_are_left_out() -> None:
    full, bare = render(factory.result()), render(factory.bare())
    for heading in ("Run it", "Layers", "Decisions", "Simulated against shipped", "Machine", "Versions", "Latency"):
        assert re.search(rf"<h[23]>{heading}\b", full), heading
        assert not re.search(rf"<h[23]>{heading}\b", bare), heading


def test_the_same_result_gives_the_same_bytes(tmp_path) -> None:
    for folder in ("a", "b"):
        build_report(factory.result(), tmp_path / folder)
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()


def test_the_page_is_rebuilt_from_result_json(tmp_path) -> None:
    (tmp_path / "result.json").write_text(factory.result().model_dump_json())
    path = rebuild(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render(factory.result())


def test_a_folder_without_a_result_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(InputError, match=r"result\.json: No such file"):
        rebuild(tmp_path)


def test_the_templates_are_in_the_package() -> None:
    folder = resources.files("kompakt.report") / "templates"
    assert {"report.html.j2", "report.css", "report.js"} <= {item.name for item in folder.iterdir()}
