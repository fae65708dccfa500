"""References to a user's own code: ``package.module:callable`` and ``path/to/file.py:callable``."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from kompakt.errors import InputError, KompaktError


def load_callable(reference: str) -> Callable[..., object]:
    """Import what ``package.module:callable`` or ``path/to/file.py:callable`` names.

    The current directory (for a file: its own folder) is put on ``sys.path``, as ``python`` does.
    The part after the colon may be dotted: ``module:Class.build``.

    Raises:
        InputError: the module or the name does not exist (the nearest names are offered), or
            importing it fails (with the error and the line that raised it).
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise InputError(f"{reference}: expected package.module:callable or path/to/file.py:callable")
    found: object = _import_file(reference, Path(where)) if where.endswith(".py") else _import(reference, where)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise InputError(f"{reference}: {where} has no {part}{nearest(part, names)}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{reference}: is a {type(found).__name__}, expected something that can be called")
    return found


def call(function: Callable[..., object], reference: str, arguments: Mapping[str, object]) -> object:
    """Call a user's function and put any error of his into one line with its place.

    Raises:
        InputError: the function raised, or does not take these arguments.
    """
    try:
        return function(**arguments)
    except KompaktError:
        raise
    except (Exception, SystemExit) as error:
        given = f" with {', '.join(f'{key}={value!r}' for key, value in arguments.items())}" if arguments else ""
        raise InputError(f"{reference}: calling it{given} failed: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Put an exception into one line: type, message and the user's line that raised it."""
    message = " ".join(str(error).split()) or "no message"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not _is_library(frame.filename)]
    frame = own[-1] if own else None
    place = f" ({frame.filename}:{frame.lineno} in {frame.name})" if frame else ""
    return f"{type(error).__name__}: {message}{place}"


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a line that offers the names most like ``name``; empty where there are none."""
    found = get_close_matches(name, sorted(names), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _import(reference: str, name: str) -> ModuleType:
    """Import a module by its dotted name."""
    _put_on_path(Path.cwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise InputError(
                f"{reference}: there is no module {missing} in {Path.cwd()} or the environment"
                f"{nearest(missing, _neighbours())}"
            ) from error
        raise InputError(f"{reference}: importing it failed: {describe(error)}") from error
    except KompaktError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{reference}: importing it failed: {describe(error)}") from error


def _import_file(reference: str, path: Path) -> ModuleType:
    """Import a Python file by its path; the same file is imported once."""
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path.cwd()
        raise InputError(
            f"{reference}: there is no file {path}{nearest(path.name, (p.name for p in folder.glob('*.py')))}"
        )
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    _put_on_path(path.parent)
    name = path.stem if known is None else "_".join(path.with_suffix("").parts[1:])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look the module up by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{reference}: importing it failed: {describe(error)}") from error
    return module


def _put_on_path(folder: Path) -> None:
    """Make modules in ``folder`` importable, before the installed ones."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _neighbours() -> list[str]:
    """Names of the modules and packages in the current directory."""
    return [path.stem for path in Path.cwd().glob("*") if path.suffix == ".py" or (path / "__init__.py").is_file()]


def _is_library(filename: str) -> bool:
    """Whether a source file belongs to Python or an installed package rather than to the user."""
    return "site-packages" in filename or filename.startswith("<") or filename.startswith(sys.base_prefix + "/lib")
