"""The public names: a short list that is pinned, and loaded only when it is used."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import kompakt

PUBLIC = [
    "Data",
    "Job",
    "KompaktError",
    "Plan",
    "Recipe",
    "Result",
    "build_report",
    "compress",
    "fold",
    "load_model",
    "open_data",
    "target",
    "trace",
]


def test_the_public_names_are_these() -> None:
    assert kompakt.__all__ == PUBLIC
    assert sorted(kompakt._HOMES) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_what_its_home_defines(name: str) -> None:
    found = getattr(kompakt, name)
    assert found is getattr(sys.modules[kompakt._HOMES[name]], name)
    assert found.__doc__
    assert name in dir(kompakt)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = kompakt.nothing_of_the_kind


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, kompakt; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'onnx', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_is_the_packages() -> None:
    assert kompakt.__version__ == version("kompakt")
