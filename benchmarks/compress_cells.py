"""The cells of ``python -m benchmarks.compress``: let one tool make its artifact; score and time all of them."""

import json
import lzma
import os
import resource
import shutil
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prune_cells import packed
from benchmarks.prune_subjects import ROOT, SUBJECTS, ZOO, build, example
from benchmarks.ptq import in_own_process
from kompakt.artifact.onnx import export_onnx
from kompakt.data import Data, open_data
from kompakt.engine.effort import SPENT
from kompakt.errors import InputError
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.measure.accuracy import top_1
from kompakt.measure.result import Result
from kompakt.measure.size import size_bytes

CALIBRATION, VALIDATION = 512, 2000
RACE_SECONDS, RACE_ROUNDS = 60.0, 400
REFERENCES = {"resnet20": "kompakt.zoo:resnet20", "resnet18": "torchvision/resnet18"}

TOOLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp32, OpenVINO": ("openvino_float", ()),
    "ORT static int8": ("ort_static", ("u8s8-per-channel",)),
    "ORT static int8, 7-bit weights": ("ort_static", ("u8s8-per-channel-7bit",)),
    "NNCF int8, OpenVINO": ("nncf_ptq", ("openvino",)),
    "NNCF int8, overflow fix, OpenVINO": ("nncf_ptq", ("openvino-overflow-fix",)),
    "Olive, ORT int8": ("olive_static", ("default",)),
    "Olive, ORT int8, 7-bit weights": ("olive_static", ("u8s8-per-channel-7bit",)),
    "ModelOpt int8, entropy, ORT": ("modelopt_onnx", ("entropy",)),
    "ModelOpt int8, max, ORT": ("modelopt_onnx", ("max",)),
    "torch-pruning 2×, trained, ORT int8": ("torch_pruning_chain", ("2.0",)),
    "torch-pruning 4×, trained, ORT int8": ("torch_pruning_chain", ("4.0",)),
    "kompakt": ("", ()),
}
"""Row of the table → module of ``benchmarks.peers``, and what is particular to the row."""
FLOAT = "fp32, ORT"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One network, its images, and the Pythons of the peers."""

    name: str
    cifar: str
    peers: str
    pruner: str
    threads: int
    olive: str = ""
    modelopt: str = ""

    @property
    def folder(self) -> Path:
        """Where everything that is made lies."""
        return ROOT / "out" / "compress" / self.name

    def artifact(self, tool: str) -> Path:
        """The file that a tool left."""
        folder = self.folder / "".join(letter if letter.isalnum() else "-" for letter in tool)
        return folder / ("model.xml" if "OpenVINO" in tool else "model.onnx")

    @cached_property
    def images(self) -> Path:
        """CIFAR-10 with a ``val/``: in each class, every fifth image of ``test/``."""
        root, source = ROOT / "out" / "compress" / "cifar10", Path(self.cifar).resolve()
        if not (root / "train").exists():
            for folder in sorted(path for path in (source / "test").iterdir() if path.is_dir()):
                for number, image in enumerate(sorted(folder.iterdir())):
                    link = root / ("val" if number % 5 == 0 else "test") / folder.name / image.name
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.unlink(missing_ok=True)
                    link.symlink_to(image)
            (root / "train").symlink_to(source / "train")
        return root

    @cached_property
    def data(self) -> Data:
        """The images, decoded."""
        return open_data(str(self.images), input_size=SUBJECTS[self.name].size, progress=False)

    @cached_property
    def prepared(self) -> Path:
        """The folder with what the peers read: the fp32 network as ONNX, calibration and test inputs, labels."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "labels.npy").exists():
            export_onnx(fold(trace(build(self.name), example(self.name))), self.folder / "float.onnx")
            calibration = self.data.train.subset(CALIBRATION, seed=0).batches(CALIBRATION)
            np.save(self.folder / "calibration.npy", next(calibration)[0].numpy())
            parts = [(inputs.numpy(), labels.numpy()) for inputs, labels in self.data.test.batches(500)]
            np.save(self.folder / "evaluation.npy", np.concatenate([inputs for inputs, _ in parts]))
            np.save(self.folder / "labels.npy", np.concatenate([labels for _, labels in parts]))
        return self.folder


def make(bench: Bench, tool: str, effort: float, epochs: int) -> dict[str, Any]:
    """Let a tool make its artifact; what it took, and what a user wrote for it."""
    module, more = TOOLS[tool]
    if not module:
        return kompakt(bench, effort)
    folder, out = bench.prepared, bench.artifact(tool).parent
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    onnx, calibration = str(folder / "float.onnx"), str(folder / "calibration.npy")
    if module == "torch_pruning_chain":
        given = (bench.name, str(bench.images), calibration, str(out), *more, str(epochs), str(bench.threads))
        found, files = in_own_process(bench.pruner, module, *given), (module, "ort_static")
    elif module == "openvino_float":
        found, files = in_own_process(bench.peers, module, onnx, str(out)), (module,)
    else:
        python = {"olive_static": bench.olive, "modelopt_onnx": bench.modelopt}.get(module, bench.peers)
        found, files = in_own_process(python, module, onnx, calibration, str(out), *more), (module,)
    if "error" in found:
        raise InputError(f"{tool}: {found['error']}")
    lines = sum(code_lines(ROOT / "benchmarks" / "peers" / f"{name}.py") for name in files)
    return {**found, "lines": lines, **sizes(bench.artifact(tool))}


def kompakt(bench: Bench, effort: float) -> dict[str, Any]:
    """Run the one command; the frontier that it kept goes into the cell."""
    weights, out = ZOO / f"{bench.name}-cifar10.safetensors", bench.artifact("kompakt").parent
    command = ["compress", REFERENCES[bench.name], "--weights", str(weights), "--data", str(bench.images)]
    command += ["--max-drop", "1.0", "--model-arg", "num_classes=10", "--out", str(out)]
    command += ["--input-size", str(SUBJECTS[bench.name].size), "--effort", f"{effort:g}", "--quiet"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", "from kompakt.cli import main; main()", *command], check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3):
        raise InputError(f"kompakt ended with status {done.returncode}")
    found = Result.read(out / "result.json")
    return {
        "wall_s": float((out / SPENT).read_text()) + found.wall_s,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "versions": {"kompakt": found.versions.get("kompakt", "")},
        "lines": 1,
        **sizes(bench.artifact("kompakt")),
        "packed_bytes": found.packed_bytes,
        "status": done.returncode,
        "decisions": found.decisions,
        "candidates": [item.model_dump(mode="json") for item in found.candidates],
    }


def sizes(artifact: Path) -> dict[str, int]:
    """Bytes of an artifact as it runs, and under xz, for transfer."""
    files = [artifact, *((artifact.with_suffix(".bin"),) if artifact.suffix == ".xml" else ())]
    return {
        "size_bytes": sum(size_bytes(file) for file in files),
        "xz_bytes": sum(len(lzma.compress(file.read_bytes(), preset=9)) for file in files),
    }


def code_lines(path: Path) -> int:
    """Count the lines of a Python file that hold code: no blank ones, no comments, no docstrings."""
    found: set[int] = set()
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in QUIET]
    for before, token in zip([None, *tokens], tokens, strict=False):
        starts = before is None or before.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if token.type not in STRUCTURE and not (starts and token.type == tokenize.STRING):
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found)


QUIET = (tokenize.COMMENT, tokenize.NL)
STRUCTURE = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def race(bench: Bench, tools: list[str]) -> dict[str, Any]:
    """Score all artifacts on the test images and time them in one interleaved loop, the fp32 network first."""
    folder = bench.prepared
    artifacts = {FLOAT: folder / "float.onnx", **{tool: bench.artifact(tool) for tool in tools}}
    numbered = {f"{number:02d}": str(path) for number, path in enumerate(artifacts.values())}
    job = {"artifacts": numbered, "inputs": str(folder / "evaluation.npy"), "out": str(folder)}
    (folder / "job.json").write_text(json.dumps({**job, "seconds": RACE_SECONDS, "rounds": RACE_ROUNDS}))
    times = in_own_process(bench.peers, "race", str(folder / "job.json"))
    if "error" in times:
        raise InputError(f"{bench.name}: the artifacts could not be run: {times['error']}")
    labels, rows = np.load(folder / "labels.npy"), {}
    for name, number in zip(artifacts, numbered, strict=True):
        correct = top_1(np.load(folder / f"{number}.npy"), labels)
        rows[name] = {"accuracy": float(correct.mean()), "correct": packed(correct), "latency": times[number]}
    return {"rows": rows, "images": len(labels), "bytes": sizes(artifacts[FLOAT]), "cores": os.cpu_count()}
