"""Let a command take its options as frozen dataclasses, so that commands share them."""

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo


def flatten(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with every dataclass parameter replaced by that class's fields.

    Typer sees one flat list of options; the command gets the dataclasses, filled. Fields carry their
    ``Annotated[type, typer.Option(...)]`` and their default.

    Example:
        >>> import dataclasses, inspect
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Run:
        ...     seed: int = 0
        >>> def show(model: str, run: Run) -> None: ...
        >>> str(inspect.signature(flatten(show)))
        '(model: str, *, seed: int = 0) -> None'
    """
    hints = get_type_hints(command, include_extras=True)
    parts: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    plain = [p for name, p in inspect.signature(command).parameters.items() if name not in parts]
    own = [parameter.replace(annotation=hints[parameter.name]) for parameter in plain]
    shared = [_parameter(field, kind) for kind in parts.values() for field in dataclasses.fields(kind)]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        made = {
            name: kind(**{f.name: given.pop(f.name) for f in dataclasses.fields(kind)}) for name, kind in parts.items()
        }
        command(**given, **made)

    first = [p for p in own if p.default is inspect.Parameter.empty]
    rest = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p not in first]
    parameters = [*first, *rest, *shared]
    wrapper.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _parameter(field: dataclasses.Field, kind: type) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    annotation = get_type_hints(kind, include_extras=True)[field.name]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_in_panel(annotation, kind)
    )


def _in_panel(annotation: Any, kind: type) -> Any:
    """Let the help show an option among those of its dataclass; arguments stay where they are."""
    if get_origin(annotation) is not Annotated:
        return annotation
    bare, *extras = get_args(annotation)
    words = re.findall(r"[A-Z][a-z]*", kind.__name__.removeprefix("Optional"))
    title = " ".join(words).capitalize()
    shown = [_titled(extra, title) if isinstance(extra, OptionInfo) else extra for extra in extras]
    return Annotated[bare, *shown]


def _titled(option: OptionInfo, title: str) -> OptionInfo:
    made = copy.copy(option)
    made.rich_help_panel = title
    return made
