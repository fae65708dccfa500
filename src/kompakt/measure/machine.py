"""Where a measurement was made: the processor, the system, and the versions of what ran."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import psutil

ISA_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
)  # the instructions that decide int8's speed and whether u8·s8 sums saturate
PACKAGES = (
    "kompakt",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "executorch",
    "litert-torch",
    "ai-edge-litert",
    "tensorrt",
    "qonnx",
    "hls4ml",
    "accelerate",
    "constriction",
    "scipy",
    "optuna",
    "flwr",
)


def machine() -> dict[str, str]:
    """Describe this machine: processor, cores that may be used, memory, instruction sets, OS, Python."""
    cpuinfo = _cpuinfo()
    flags = _flags(cpuinfo)
    return {
        "cpu": _cpu_model(cpuinfo),
        "cores": str(_usable_cores()),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "isa": " ".join(flag for flag in ISA_FLAGS if flag in flags) or "unknown",
        "arch": platform.machine(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Tell the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """Read the first processor of Linux's /proc/cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _flags(cpuinfo: dict[str, str]) -> frozenset[str]:
    return frozenset((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())


def _cpu_model(cpuinfo: dict[str, str]) -> str:
    if cpuinfo.get("model name"):
        return cpuinfo["model name"]
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return platform.processor() or platform.machine() or "unknown"
