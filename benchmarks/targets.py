"""One network in every runtime: ``python -m benchmarks.targets``.

Every network is exported by ``kompakt export`` for every runtime, in float and in integers, whole and with half of
its channels cut, and ``kompakt bench`` compares the files of a network: times interleaved, bytes, memory, and accuracy
or, where there are no labels, the agreement with the float model's own decisions. Runtimes that live in environments
of their own are named by ``--python RUNTIME=INTERPRETER``. A step runs in a process of its own under a time limit, and
is a line of ``benchmarks/results/targets/*.jsonl``; one that is there is not done again. Writes the tables of
``docs/targets.md``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ptq_subjects import ROOT, Places, cifar_folder
from benchmarks.targets_subjects import KNOWN, SHELF, SUBJECT, prepare
from benchmarks.targets_table import write_page
from kompakt.artifact.targets import TARGETS
from kompakt.measure.machine import machine, versions

RESULTS = ROOT / "benchmarks" / "results" / "targets"
RUNTIMES = ("onnxruntime", "openvino", "torch", "executorch", "litert")
CLI = "from kompakt.cli import main; main()"
SIZES = {"resnet20": 32, "trained18": 48}
IMAGES = {"resnet20": (512, 1000), "trained18": (256, 1000), "resnet18": (64, 64), "mobilenet": (64, 64)}
DEFAULT_IMAGES = (128, 128)
PROOFS = {"resnet20": 1000, "trained18": 1000}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where things are and how long a step may take.

    Args:
        work: gets everything that is made.
        places: of images and packages.
        pythons: runtime → interpreter that has it.
        limit_s: of one step.
        seconds: of timing for each network.
    """

    work: Path
    places: Places
    pythons: dict[str, str]
    limit_s: float
    seconds: float

    def kompakt(self, name: str, python: str, *words: str) -> dict[str, Any]:
        """Run one command for a network; return its JSON, or why there is none."""
        command = [python, "-c", CLI, *words, "--json"]
        environment = {SUBJECT: str(self.work / name), SHELF: str(self.places.shelf)}
        environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
        started = time.monotonic()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=self.limit_s, env={**os.environ, **environment}
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no end within {self.limit_s:.0f} s"}
        lines = done.stderr.strip().splitlines()
        if done.returncode:
            return {"error": lines[-1][:300] if lines else f"status {done.returncode}"}
        told = done.stdout.splitlines()  # runtimes print before the JSON, which begins with a line of its own
        start = next(place for place, line in enumerate(told) if line in ("{", "["))
        return {"seconds": round(time.monotonic() - started, 1), "result": json.loads("\n".join(told[start:]))}


def recorded(name: str) -> list[dict[str, Any]]:
    """Read the lines of a network."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def step(name: str, key: dict[str, Any], make: Any) -> dict[str, Any]:
    """Return the line with this key; do what it tells of if there is none."""
    known = next((line for line in recorded(name) if line["key"] == key), None)
    if known is not None:
        return known
    print(time.strftime("%H:%M:%S"), name, key, flush=True)
    line = {"key": key, **make()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def cut(run: Run, name: str) -> None:
    """Cut half of the channels, once."""
    folder = run.work / name / "cut"
    if not (folder / "plan.json").exists():
        words = ("--weights", str(run.work / name / "float.safetensors"), "--channels", "0.5", "--out", str(folder))
        size = str(SIZES.get(name, 224))
        found = run.kompakt(
            name, sys.executable, "prune", "benchmarks.targets_subjects:model", *words, "--input-size", size
        )
        print(found.get("error", "cut"), flush=True)


def exported(run: Run, name: str, runtime: str, bits: str, pruned: bool) -> dict[str, Any]:
    """Export one file."""
    whole = run.work / name
    out = whole / f"{runtime}-{bits}{'-pruned' if pruned else ''}"
    weights = whole / "cut" / "pruned.safetensors" if pruned else whole / "float.safetensors"
    words = ["export", "benchmarks.targets_subjects:model", "--weights", str(weights), "--to", runtime]
    words += ["--out", str(out), "--input-size", str(SIZES.get(name, 224))]
    if pruned:
        words += ["--plan", str(whole / "cut" / "plan.json")]
    if bits == "int8":
        words += ["--data", "benchmarks.targets_subjects:data", "--proofs", str(PROOFS.get(name, 64))]
    found = run.kompakt(name, run.pythons.get(runtime, sys.executable), *words)
    for part in ("layers", "snippet"):
        found.get("result", {}).pop(part, None)
    return {**found, "folder": out.name}


def compared(run: Run, name: str, pruned: bool) -> dict[str, Any]:
    """Time and score the files of a network side by side; the float file in ONNX Runtime is the baseline."""
    done = [line for line in recorded(name) if line["key"]["step"] == "export" and line["key"]["pruned"] == pruned]
    good = [line for line in done if "result" in line]
    base = {"key": {"runtime": "onnxruntime", "bits": "fp32"}}
    good.sort(key=lambda line: any(line["key"][part] != value for part, value in base["key"].items()))
    files = [f"{line['key']['runtime']}:{run.work / name / line['folder'] / line['result']['file']}" for line in good]
    words = [f"--python={key}={value}" for key, value in run.pythons.items()]
    words += ["--seconds", str(run.seconds), "--data", "benchmarks.targets_subjects:data"]
    found = run.kompakt(name, sys.executable, "bench", *files, *words)
    return {**found, "machine": machine(), "versions": versions(), "loaded": os.getloadavg()[0]}


def main() -> None:
    """Measure what is asked for and is not there, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=KNOWN, default=[*KNOWN])
    parser.add_argument("--runtimes", nargs="+", choices=TARGETS, default=[*RUNTIMES])
    parser.add_argument("--python", action="append", default=[], metavar="RUNTIME=INTERPRETER")
    parser.add_argument("--whole-only", action="store_true", help="do not cut channels")
    parser.add_argument("--work", type=Path, default=Path("/tmp/targets"))
    parser.add_argument("--shelf", type=Path, default=Path(".venv-peers/shelf"))
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one step")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing for the files of a network")
    parser.add_argument("--page-only", action="store_true")
    asked = parser.parse_args()
    cifar = cifar_folder(asked.cifar, asked.work) if not asked.page_only else asked.work
    places = Places(work=asked.work, shelf=asked.shelf.resolve(), cifar=cifar, imagenet=None)
    pythons = dict(text.split("=", 1) for text in asked.python)
    run = Run(work=asked.work, places=places, pythons=pythons, limit_s=asked.limit, seconds=asked.seconds)
    for name in [] if asked.page_only else asked.networks:
        if not (run.work / name / "labels.npy").exists():
            prepare(name, run.work / name, places, *IMAGES.get(name, DEFAULT_IMAGES))
        for pruned in (False,) if asked.whole_only else (False, True):
            if pruned:
                cut(run, name)
            for runtime in asked.runtimes:
                for bits in ("fp32", "int8"):
                    key = {"step": "export", "runtime": runtime, "bits": bits, "pruned": pruned}
                    step(name, key, lambda r=runtime, b=bits, p=pruned, n=name: exported(run, n, r, b, p))
            key = {"step": "bench", "runtimes": asked.runtimes, "pruned": pruned}
            step(name, key, lambda n=name, p=pruned: compared(run, n, p))
    write_page(ROOT / "docs" / "targets.md", {name: recorded(name) for name in KNOWN})


if __name__ == "__main__":
    main()
