"""The layers of the package: imports run one way, and the torch-free part stays torch-free."""

import ast
import subprocess
import sys
from pathlib import Path

import kompakt

ROOT = Path(kompakt.__file__).parent
ORDER = (
    {"errors", "__init__"},
    {"files", "spec", "progress"},
    {"numerics", "coding"},
    {"graph"},
    {"plan"},
    {
        "build",
        "augment",
        "cache",
        "data",
        "folders",
        "images",
        "loaders",
        "models",
        "references",
        "splits",
        "weights",
        "zoo",
    },
    {"methods", "artifact"},
    {"measure"},
    {
        "alignment",
        "allotment",
        "awareness",
        "bits",
        "engine",
        "evidence",
        "federated",
        "finish",
        "frugality",
        "islands",
        "job",
        "networks",
        "pace",
        "refinement",
        "report",
        "search",
        "ship",
        "shrink",
        "slim",
        "sparsity",
        "teachers",
        "teaching",
        "training",
    },
    {"cli", "__main__"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imports(path: Path) -> set[str]:
    """Names of the parts of kompakt that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "kompakt" else [node.module]
            )
        found |= {name.split(".")[1] for name in names if name.startswith("kompakt.")}
    return found


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_run_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(ROOT.rglob("*.py"))
        for name in imports(path)
        if name in RANK and name != part(path) and RANK[name] > RANK.get(part(path), 0)
    ]
    assert not wrong, wrong


def test_every_part_has_a_place() -> None:
    assert {part(path) for path in ROOT.rglob("*.py")} <= set(RANK)


def test_coding_does_not_import_torch() -> None:
    code = "import sys, kompakt.coding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
