"""One self-contained HTML page from a ``Result``: opens offline, asks nothing of the network.

The page forbids itself every connection and runs only its own two scripts, each named by its
hash (Content-Security-Policy); names from the model are text and never markup.
"""

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kompakt.files import atomic_write
from kompakt.measure.result import Result
from kompakt.report import cards, columns, frontier, numbers, plots
from kompakt.report.frame import Figure
from kompakt.report.layer_plots import layers_figure
from kompakt.report.steps import steps_of

PAGE = "report.html"


def build_report(result: Result, out: Path) -> Path:
    """Write ``report.html`` into the folder ``out``.

    Args:
        result: what was measured.
        out: the folder, made if it is missing.

    Returns:
        The path of the page. The same result gives the same bytes.
    """
    path = Path(out) / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, render(result).encode())
    return path


def rebuild(folder: Path) -> Path:
    """Build ``report.html`` anew from the ``result.json`` in ``folder``.

    Raises:
        InputError: there is no readable ``result.json``.
    """
    return build_report(Result.read(Path(folder) / "result.json"), Path(folder))


def render(result: Result) -> str:
    """Write the page as text."""
    scripts = (get_plotlyjs(), _resource("report.js"))
    figures = {
        "accuracy": plots.accuracy_figure(result),
        "size": plots.size_figure(result),
        "latency": plots.latency_figure(result),
        "layers": layers_figure(result),
        "bytes": frontier.bytes_figure(result),
        "speed": frontier.speed_figure(result),
    }
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            result=result,
            claims=cards.claims(result),
            verdict=cards.verdict(result),
            cards=cards.cards(result),
            steps=steps_of(result),
            step_columns=columns.step_columns(result),
            layer_columns=columns.layer_columns(result),
            candidate_columns=columns.candidate_columns(result),
            left_alone=columns.reasons(result),
            figures={name: _json(figure) for name, figure in figures.items() if figure is not None},
            style=Markup(_resource("report.css")),
            scripts=[Markup(script) for script in scripts],
            hashes=" ".join(f"'sha256-{_hash(script)}'" for script in scripts),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kompakt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["n"] = numbers
    return environment


def _resource(name: str) -> str:
    return (resources.files("kompakt.report") / "templates" / name).read_text(encoding="utf-8")


def _json(figure: Figure) -> Markup:
    """A figure as JSON that is safe inside a script element: no ``<``, so no element can end or begin."""
    text = json.dumps(figure, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
