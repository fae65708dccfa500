"""Post-training int8 beside ONNX Runtime's quantizer and NNCF: ``python -m benchmarks.ptq``.

Every tool turns the same fp32 network with the same calibration images into an int8 file, in a fresh process,
with as many threads as the machine has cores (each tool's own default). The peers start from the fp32 ONNX file
(batch norms folded) that kompakt exports; kompakt starts from the PyTorch model. Then one process runs all files
on the same images and times them, one thread, batch 1, in one interleaved loop.

The peers' environment is made by ``sh benchmarks/peers/setup.sh``. Writes ``docs/ptq.md`` and
``benchmarks/results/ptq.json``; with ``--quick`` or ``--only`` it prints the table alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.ptq_subjects import ROOT, SUBJECTS, Images, Places, cifar_folder, prepare
from benchmarks.ptq_table import page, table
from kompakt.errors import InputError, KompaktError
from kompakt.measure.accuracy import Score, paired_drop, top_1
from kompakt.measure.machine import machine, versions
from kompakt.measure.parity import sqnr_db
from kompakt.measure.size import size_bytes

PAGE, RESULTS = ROOT / "docs" / "ptq.md", ROOT / "benchmarks" / "results" / "ptq.json"
EVALUATION = {"a": 10_000, "b": 488, "c": 256}
TOOLS: dict[str, tuple[str, str]] = {
    "kompakt": ("ours", "default"),
    "kompakt-mse": ("ours", "mse"),
    "kompakt-8bit": ("ours", "8bit"),
    "ort-default": ("ort_static", "default"),
    "ort-u8s8": ("ort_static", "u8s8-per-channel"),
    "ort-u8s8-7bit": ("ort_static", "u8s8-per-channel-7bit"),
    "ort-s8s8": ("ort_static", "s8s8-per-channel"),
    "nncf-openvino": ("nncf_ptq", "openvino"),
    "nncf-openvino-fix": ("nncf_ptq", "openvino-overflow-fix"),
    "nncf-onnx": ("nncf_ptq", "onnx"),
    "nncf-onnx-fix": ("nncf_ptq", "onnx-overflow-fix"),
}
"""Row of the table → module in ``benchmarks.peers`` and its variant."""


def python_of(environment: Path) -> str:
    """Return the interpreter of the peers' environment."""
    path = environment / "bin" / "python"
    if not path.exists():
        raise InputError(f"{environment}: no environment for the peers here; run sh benchmarks/peers/setup.sh")
    return str(path)


def in_own_process(interpreter: str, module: str, *arguments: str) -> dict[str, Any]:
    """Run one module; its last line is JSON. A failure is returned as ``error``."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("OMP_NUM_THREADS", None)  # every tool takes all cores, as it does by default
    command = [interpreter, "-m", f"benchmarks.peers.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}


def make(key: str, name: str, places: Places, peers: str, repeats: int) -> dict[str, Any]:
    """Let one tool quantize a subject a few times; keep the median of the times."""
    module, variant = TOOLS[name]
    folder, out = places.work / key, places.work / key / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if module == "ours":
        command = (sys.executable, module, key, str(folder), str(places.shelf), str(out), variant)
    else:
        command = (
            peers,
            module,
            *(str(folder / file) for file in ("float.onnx", "calibration.npy")),
            str(out),
            variant,
        )
    found = [in_own_process(*command) for _ in range(repeats)]
    failed = next((run for run in found if "error" in run), None)
    if failed:
        return failed
    seconds = {part: median(run[part] for run in found) for part in found[0] if part.endswith("_s")}
    artifact = next(out.glob("model.xml"), out / "model.onnx")
    return {**seconds, "versions": found[0]["versions"], "file": str(artifact), "size_bytes": size_bytes(out)}


def race(key: str, rows: dict[str, dict], places: Places, peers: str, seconds: float, rounds: int) -> None:
    """Run and time all files of a subject; add what was seen to its rows."""
    folder = places.work / key
    artifacts = {name: row["file"] for name, row in rows.items() if "file" in row}
    job = {
        "artifacts": artifacts,
        "inputs": str(folder / "evaluation.npy"),
        "out": str(folder),
        "seconds": seconds,
        "rounds": rounds,
    }
    (folder / "job.json").write_text(json.dumps(job))
    times = in_own_process(peers, "race", str(folder / "job.json"))
    if "error" in times:
        raise InputError(f"{key}: the artifacts could not be run: {times['error']}")
    for name in artifacts:
        rows[name]["latency"] = times[name]


def compare(rows: dict[str, dict], images: Images, folder: Path) -> None:
    """Add accuracy, drop, agreement and output SQNR against the float file to the rows that ran."""
    outputs = {name: np.load(folder / f"{name}.npy") for name, row in rows.items() if "latency" in row}
    reference = outputs["float"]
    for name, found in outputs.items():
        rows[name] |= {
            "sqnr_db": sqnr_db(reference, found),
            "agreement": float((found.argmax(1) == reference.argmax(1)).mean()),
            "examples": len(found),
        }
        if images.labels is not None and trained(reference, images.labels):
            before, after = (Score(correct=top_1(part, images.labels)) for part in (reference, found))
            drop = paired_drop(before, after)
            rows[name] |= {"accuracy": after.accuracy, "drop_points": drop.points, "drop_ci95": drop.ci95}
    if "accuracy" in rows["float"]:
        against_kompakt(rows, outputs, images.labels)


def trained(outputs: np.ndarray, labels: np.ndarray) -> bool:
    """Tell whether the network was trained: better than four times chance on the labels."""
    return float(top_1(outputs, labels).mean()) > 4 / outputs.shape[1]


def against_kompakt(rows: dict[str, dict], outputs: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Add to each row by how many points each file of kompakt's is better: (points, low, high), paired."""
    scores = {name: Score(correct=top_1(found, labels)) for name, found in outputs.items()}
    for name, score in scores.items():
        gains = {ours: paired_drop(scores[ours], score) for ours in scores if ours.startswith("kompakt")}
        rows[name]["kompakt_better"] = {ours: (gain.points, *gain.ci95) for ours, gain in gains.items()}


def subject(key: str, places: Places, peers: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure all tools on one subject."""
    evaluation = min(EVALUATION[key], given.evaluation or EVALUATION[key])
    images = prepare(key, places, given.calibration, evaluation)
    folder = places.work / key
    rows: dict[str, dict] = {
        "float": {"file": str(folder / "float.onnx"), "size_bytes": size_bytes(folder / "float.onnx")}
    }
    for name in TOOLS:
        if given.tools in name:
            rows[name] = make(key, name, places, peers, given.repeats)
            print(key, name, rows[name].get("error") or f"{rows[name]['wall_s']:.1f} s", flush=True)
    race(key, rows, places, peers, given.seconds, given.rounds)
    compare(rows, images, folder)
    return {"title": SUBJECTS[key].title, "calibration": given.calibration, "evaluation": evaluation, "rows": rows}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ptq")
    parser.add_argument("--only", choices=SUBJECTS, help="measure this subject and write no page")
    parser.add_argument("--tools", default="", help="only tools whose name contains this; write no page")
    parser.add_argument("--quick", action="store_true", help="few images and rounds; write no page")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="the peers' environment")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "ptq", help="gets images, models and artifacts")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as an image folder; by default ../shared's archive")
    parser.add_argument("--imagenet", type=Path, help="a folder with one ImageNet image a class, named in their order")
    parser.add_argument("--calibration", type=int, default=512, help="calibration images")
    parser.add_argument("--evaluation", type=int, help="images to score at the most")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes whose median time is taken")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the timing loop of each subject")
    parser.add_argument("--rounds", type=int, default=1000, help="of the timing loop at the most")
    return parser


def main() -> int:
    given = options().parse_args()
    if given.quick:
        given.calibration, given.evaluation, given.repeats, given.seconds = 32, 64, 1, 10.0
    try:
        peers = python_of(given.peers)
        cifar = cifar_folder(given.cifar, given.work)
        places = Places(work=given.work, shelf=given.peers / "shelf", cifar=cifar, imagenet=given.imagenet)
        found: dict[str, dict[str, Any]] = {}
        for key in SUBJECTS:
            if given.only in (None, key):
                found[key] = subject(key, places, peers, given)
                print(f"{found[key]['title']}\n\n{table(found[key]['rows'])}\n", flush=True)
                if not (given.quick or given.only or given.tools):
                    write(found, given)
    except KompaktError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(found: dict[str, dict[str, Any]], given: argparse.Namespace) -> None:
    """Write the page of the subjects measured so far, so that an interrupted run leaves one."""
    options_given = (" --imagenet DIR" if given.imagenet else "") + f" --repeats {given.repeats}"
    result = {
        "subjects": found,
        "date": date.today().isoformat(),
        "images": "ImageNet sample images" if given.imagenet else "crops of photographs and enlarged CIFAR-10 images",
        "command": "python -m benchmarks.ptq" + options_given,
        "machine": machine(),
        "versions": versions(),
        "load": os.getloadavg()[0],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1))
    PAGE.write_text(page(result))
    print(f"wrote {PAGE} and {RESULTS}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
