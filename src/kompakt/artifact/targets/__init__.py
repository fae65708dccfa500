"""The runtimes that kompakt ships for: an explicit dict of ``Target``, one file each."""

from pathlib import Path

from kompakt.artifact.targets import executorch, hls4ml, litert, onnxruntime, openvino, qonnx, tensorrt, torch, triton
from kompakt.artifact.targets.target import MADE_BY, Export, Runtime, Target
from kompakt.errors import InputError

__all__ = ["MADE_BY", "TARGETS", "Export", "Runtime", "Target", "runtime_of", "target"]

TARGETS: dict[str, Target] = {
    module.TARGET.name: module.TARGET
    for module in (onnxruntime, openvino, tensorrt, triton, executorch, litert, torch, qonnx, hls4ml)
}


def target(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        InputError: there is none; those that exist are named.
        MissingExtraError: what it needs is not installed.
    """
    if name not in TARGETS:
        raise InputError(f"target {name}: unknown; use {', '.join(TARGETS)}")
    return TARGETS[name].ready()


def runtime_of(path: Path) -> str:
    """Return the name of the target whose artifact ``path`` is, by its suffix: the first that writes such files.

    Raises:
        InputError: there is nothing at ``path``, or no target writes such files.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    suffix = path.suffix if path.is_file() else ""
    for name, known in TARGETS.items():
        if known.suffix == suffix and (suffix or path.is_dir()):
            return name
    known_ones = ", ".join(sorted({item.suffix for item in TARGETS.values() if item.suffix}))
    raise InputError(f"{path}: no target writes {suffix or 'such'} files; known are {known_ones} and Triton's folders")
