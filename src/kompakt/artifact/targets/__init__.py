"""The runtimes that kompakt ships for: an explicit dict of ``Target``, one file each."""

from kompakt.artifact.targets import executorch, hls4ml, onnxruntime, openvino, qonnx, tensorrt, triton
from kompakt.artifact.targets.target import Export, Runtime, Target
from kompakt.errors import InputError

__all__ = ["TARGETS", "Export", "Runtime", "Target", "target"]

TARGETS: dict[str, Target] = {
    module.TARGET.name: module.TARGET for module in (onnxruntime, openvino, tensorrt, triton, executorch, qonnx, hls4ml)
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
