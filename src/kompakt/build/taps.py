"""Taps: intermediate tensors of a model by module name, and the pairing of two models' stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from kompakt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The modules of one spatial resolution: the first and the last whose output has it.

    Args:
        size: (height, width).
        first, last: module names.
        first_width, last_width: their channels.
    """

    size: tuple[int, int]
    first: str
    last: str
    first_width: int
    last_width: int


def resolve_tap(model: nn.Module, pattern: str) -> str:
    """Return the name of the one module that ``pattern`` (a name, or one with ``*``, ``?``, ``[…]``) means.

    The empty pattern is the model itself: its output.

    Raises:
        InputError: no module matches (the nearest names are offered), or several do.
    """
    names = [name for name, _ in model.named_modules()]
    if pattern in names:
        return pattern
    found = [name for name in names if name and fnmatchcase(name, pattern)]
    if len(found) == 1:
        return found[0]
    if not found:
        near = ", ".join(get_close_matches(pattern, names, n=3, cutoff=0.0))
        raise InputError(f"tap {pattern}: matches no module; the nearest are {near}")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise InputError(f"tap {pattern}: matches {len(found)} modules ({', '.join(found[:3])}{more}); name one")


@contextmanager
def capture(model: nn.Module, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the named modules while the block runs.

    Of several calls of one the last counts whose output has the shape of the first's: a quantizer is called again on
    the slice that a shortcut takes.

    Raises:
        InputError: a module returns something else than one tensor.
    """
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise InputError(
                    f"tap {name}: the module returns {type(output).__name__}, not one tensor; tap inside it"
                )
            if name not in seen or seen[name].shape == output.shape:
                seen[name] = output

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in sorted(names) if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a block in inference mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    set_mode(model, False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def set_mode(model: nn.Module, training: bool) -> None:
    """Set training or inference mode; captured graphs (``torch.export``), which have none, are left alone."""
    try:
        model.train(training)
    except NotImplementedError:
        for child in model.children():
            set_mode(child, training)


def stages(model: nn.Module, example: Tensor) -> tuple[Stage, ...]:
    """Find the resolution stages of a convolutional model, in the order in which they end.

    Of every (height, width) above 1×1 that some module's output has, the first such module to finish
    and the last: of nested modules that finish together, the outermost. Calls count as in ``capture``.

    Args:
        model: left as it is.
        example: a batch, shape (N, C, H, W).

    Raises:
        InputError: no module returns a feature map.
    """
    seen: dict[tuple[int, int], list[tuple[str, int]]] = {}
    shapes: dict[str, torch.Size] = {}

    def hook(name: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or shapes.setdefault(name, output.shape) != output.shape:
                return
            if output.ndim == 4 and max(output.shape[2:]) > 1:
                size = (output.shape[2], output.shape[3])
                seen.setdefault(size, []).append((name, output.shape[1]))

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        with inference(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise InputError("no module returns a feature map (N, C, H, W): name the taps")
    return tuple(
        Stage(size=size, first=runs[0][0], last=runs[-1][0], first_width=runs[0][1], last_width=runs[-1][1])
        for size, runs in seen.items()
    )


def stage_taps(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return the name of the last module of every resolution stage; see ``stages``."""
    return tuple(stage.last for stage in stages(model, example))


def pair_stages(teacher: nn.Module, student: nn.Module, example: Tensor) -> tuple[tuple[Stage, Stage], ...]:
    """Pair the stages of two models that have the same resolution, largest first.

    Raises:
        InputError: no resolution is common to both; the message lists each one's.
    """
    theirs = {stage.size: stage for stage in stages(teacher, example)}
    ours = {stage.size: stage for stage in stages(student, example)}
    common = sorted(theirs.keys() & ours.keys(), reverse=True)
    if not common:
        listed = [", ".join(f"{h}×{w}" for h, w in found) for found in (theirs, ours)]
        raise InputError(
            f"teacher and student share no resolution (teacher {listed[0]}; student {listed[1]}): name the taps"
        )
    return tuple((theirs[size], ours[size]) for size in common)


def shape_text(tensor: Tensor) -> str:
    """Return a shape for an error line, as ``8×64×4×4``."""
    return "×".join(str(size) for size in tensor.shape)
