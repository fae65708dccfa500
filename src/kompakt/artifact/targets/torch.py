"""PyTorch: CPU servers that run PyTorch. The artifact is a ``.pt2`` package compiled ahead of time by AOTInductor.

A package holds machine code for the kind of processor that made it: open only those that you made or trust.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from kompakt.artifact.decomposed import to_decomposed
from kompakt.artifact.targets.target import Target
from kompakt.build.quantize import quantizers
from kompakt.errors import FormatError, ModelError
from kompakt.files import atomic_path
from kompakt.graph.trace import Capture, quiet_torch
from kompakt.plan.rules import ONNXRUNTIME

RULES = replace(
    ONNXRUNTIME,
    target="torch",
    weight_depthwise=ONNXRUNTIME.weight,
    needs_output=frozenset({"conv2d", "linear"}),
    joins=frozenset({"add", "cat"}),
    one_grid=frozenset({"cat"}),
)
"""u8 activations, s8 weights by channel that cannot saturate: oneDNN sums u8·s8 pairs in int16 without VNNI."""

SHAPE = "kompakt_shape"
SNIPPET = """\
import torch

model = torch._inductor.aoti_load_package("{file}")
batch = torch.zeros({shape})  # put your input here, prepared as for training
with torch.inference_mode():
    outputs = model(batch)
print(outputs.argmax(dim=1))
"""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A loaded package, or an exported program that runs as it is."""

    run: Any
    shape: tuple[int, ...]
    threads: int

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run one batch."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            outputs = self.run(torch.from_numpy(np.ascontiguousarray(batch)))
        return (outputs[0] if isinstance(outputs, list | tuple) else outputs).numpy()


def export(capture: Capture, path: str | Path, *, metadata: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Compile a capture, float or quantized; that takes a C++ compiler and about a minute.

    Raises:
        ModelError: the compiler is missing, or an operator has no form.
    """
    with quiet_torch():
        import torch._inductor.config
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer  # noqa: F401  registers integer kernels

    whole = to_decomposed(capture) if quantizers(capture.module) else capture.module
    dynamic = tuple({0: torch.export.Dim.AUTO} if x.ndim and x.shape[0] > 1 else None for x in capture.example)
    said = {**metadata, SHAPE: ",".join(map(str, (1, *capture.example[0].shape[1:])))}
    settings = {"freezing": True, "aot_inductor.metadata": said}
    try:
        with quiet_torch(), torch.no_grad(), torch._inductor.config.patch(settings), atomic_path(Path(path)) as made:
            program = torch.export.export(whole, capture.example, dynamic_shapes=dynamic, strict=False)
            held = made.with_suffix(".pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=str(held))
            held.replace(made)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        raise ModelError(f"AOTInductor: {type(error).__name__}: {lines[0].strip()[:300]}") from error
    return Path(path)


def open_torch(path: str | Path, threads: int = 1) -> Compiled:
    """Load a package of AOTInductor's, or a program that ``torch.export.save`` wrote.

    Raises:
        FormatError: it is missing, truncated, or something else.
    """
    try:
        names = zipfile.ZipFile(path).namelist()
        if any("/aotinductor/" in name for name in names):
            with quiet_torch():
                loaded = torch._inductor.aoti_load_package(str(path))
            shape = tuple(int(size) for size in loaded.get_metadata().get(SHAPE, "").split(",") if size)
            return Compiled(run=loaded, shape=shape, threads=threads)
        with quiet_torch():
            program = torch.export.load(path)
        first = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
        sizes = tuple(size if isinstance(size, int) else 1 for size in first.meta["val"].shape)
        return Compiled(run=program.module(), shape=sizes, threads=threads)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, StopIteration) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path}: PyTorch cannot open it: {first_line[:200]}") from None


TARGET = Target(
    rules=RULES,
    suffix=".pt2",
    export=export,
    open=open_torch,
    snippet=SNIPPET,
    extra="torchao",
    modules=("torchao",),
    note="a .pt2 holds machine code for this kind of processor: open only packages that you made",
)
