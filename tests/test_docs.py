"""The documents tell the truth: code runs, commands parse, options, fields and keys are there, links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import torch
import typer
from pydantic import BaseModel

from kompakt.cli.main import app
from kompakt.measure.result import Result
from kompakt.plan.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [README, CHINESE, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if "benchmarks." not in page.read_text().split("\n## ")[0]]
"""Pages that no benchmark writes: an option named in them is one of kompakt's."""
COMMANDS = typer.main.get_command(app).commands
SHELL = ("sh", "bash", "shell", "console")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in some languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def sections(page: Path) -> dict[str, str]:
    """Heading of the second level → the text below it."""
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def first_column(text: str) -> set[str]:
    """What the tables of a text have in backticks in their first column, one or several with commas between."""
    cells = re.findall(r"^\| (`[^`]+`(?:, `[^`]+`)*) \|", text, flags=re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def command_lines(page: Path) -> list[str]:
    """The command lines of the shell blocks of a page, continuation lines joined, comments gone."""
    joined = "\n".join(blocks(page, *SHELL)).replace("\\\n", " ")
    lines = [shlex.join(shlex.split(line.removeprefix("$ "), comments=True)) for line in joined.splitlines()]
    return [line for line in lines if line]


def options(command: str) -> set[str]:
    names = (name for parameter in COMMANDS[command].params for name in (*parameter.opts, *parameter.secondary_opts))
    return {name for name in names if name.startswith("--")}


PYTHON = {text: page.name for page in PAGES for text in blocks(page, "python")}


@pytest.mark.parametrize("code", PYTHON, ids=[f"{name}-{number}" for number, name in enumerate(PYTHON.values())])
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "a block of the documents", "exec"), {"__name__": "__main__"})


def test_the_numbers_that_a_block_is_said_to_print(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "quantization.md"
    [(code, said)] = re.findall(r"```python\n(.*?)```\n\nIt prints `([^`]+)`", page.read_text(), flags=re.S)
    exec(code, {})
    assert capsys.readouterr().out.strip() == said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_parse(page: Path) -> None:
    for line in command_lines(page):
        words = shlex.split(line)
        if words[0] == "kompakt":
            assert words[1] in COMMANDS, line
            COMMANDS[words[1]].make_context(words[1], words[2:])
        elif words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
            assert set(words[1:]) <= set(targets), line
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), line
        elif words[0] == "sh":
            assert (ROOT / words[1]).is_file(), line
        else:
            pytest.fail(f"{page.name}: do not know how to check: {line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_named_in_prose_exist(page: Path) -> None:
    known = set().union(*(options(name) for name in COMMANDS)) | {"--help"}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if code.startswith("--") and page in WRITTEN:
            assert code.split()[0] in known, f"{page.name}: {code}"
        if code.startswith("kompakt "):
            words = code.split()
            assert words[1] in COMMANDS or words[1] == "COMMAND", f"{page.name}: {code}"
            assert {word for word in words if word.startswith("--")} <= known, f"{page.name}: {code}"


def test_recipes_in_the_documents_are_recipes() -> None:
    found = [text for page in PAGES for text in blocks(page, "toml")]
    assert found
    for text in found:
        Recipe.from_toml(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), flags=re.M)
            assert anchor in map(slug, headings), f"{page.name}: {link}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_documented_and_no_other(command: str) -> None:
    cli = sections(ROOT / "docs" / "cli.md")
    assert command in cli, f"docs/cli.md has no section {command}"
    linked = [text for heading, text in cli.items() if f"(#{slug(heading)})" in cli[command].split("\n| ")[0]]
    told = first_column(cli[command]).union(*map(first_column, linked))
    assert told == options(command)


def test_every_field_of_the_result_is_documented_and_no_other() -> None:
    told = {heading: first_column(text) for heading, text in sections(ROOT / "docs" / "result.md").items()}
    assert told == {kind.__name__: set(kind.model_fields) for kind in models_in(Result)}


def test_every_key_of_a_recipe_is_documented_and_no_other() -> None:
    told = {heading: first_column(text) for heading, text in sections(ROOT / "docs" / "recipe.md").items()}
    expected = {}
    for name, field in Recipe.model_fields.items():
        [section] = [kind for kind in (field.annotation, *get_args(field.annotation)) if is_model(kind)]
        expected[name] = set(section.model_fields)
    assert told == expected


def is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def models_in(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """A model and all that its fields are made of."""
    found, waiting = {kind}, [field.annotation for field in kind.model_fields.values()]
    while waiting:
        annotation = waiting.pop()
        waiting += get_args(annotation)
        if is_model(annotation) and annotation not in found:
            found |= models_in(annotation)
    return found


def test_both_readmes_have_the_same_sections_commands_and_links() -> None:
    def shape(page: Path) -> list[str]:
        return re.findall(r"^(#+) ", prose(page), flags=re.M)

    def links(page: Path) -> list[str]:
        text = prose(page).replace("README.zh-CN.md", "OTHER").replace("(README.md", "(OTHER")
        return [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]

    def rows(page: Path) -> int:
        return len(re.findall(r"^(?:\||- )", prose(page), flags=re.M))

    assert shape(README) == shape(CHINESE)
    assert command_lines(README) == command_lines(CHINESE)
    assert blocks(README, "python") == blocks(CHINESE, "python")
    assert sorted(links(README)) == sorted(links(CHINESE))
    assert rows(README) == rows(CHINESE)
    assert first_column(README.read_text()) == first_column(CHINESE.read_text())


def test_both_readmes_name_every_command() -> None:
    for page in (README, CHINESE):
        for command in COMMANDS:
            assert re.search(rf"^\| `kompakt {command}\b", page.read_text(), flags=re.M), f"{page.name}: {command}"


def test_the_readme_states_the_figures_of_both_languages_alike() -> None:
    def figures(page: Path) -> list[str]:
        return re.findall(r"\d+\.\d+ (?:MB|ms|%)", page.read_text())

    assert figures(README) == figures(CHINESE)
    assert figures(README)


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size <= 300_000


def test_decisions_are_short() -> None:
    for page in (ROOT / "docs" / "decisions").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 20, page.name
