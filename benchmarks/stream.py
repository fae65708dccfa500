"""Memory and time of packing a large file: python -m benchmarks.stream [--gigabytes 4] [--folder DIR].

Writes a synthetic safetensors file of float32 tensors of 64 MB, packs it and unpacks it, each in a process of its
own, and prints the peak of that process's memory (mapped files not counted) beside the time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TENSOR_VALUES = 2**24
CHILD = """
import sys, threading, time
from kompakt.artifact.kpk_safetensors import pack_safetensors
from kompakt.artifact.splice import unpack_file
def own():
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("RssAnon")))
peak = [own()]
def watch():
    while True:
        peak.append(own())
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
if sys.argv[1] == "pack":
    pack_safetensors(sys.argv[2], sys.argv[3])
else:
    unpack_file(sys.argv[2], sys.argv[3], max_bytes=2**40)
print(max(peak) / 1024, time.perf_counter() - start)
"""


def write_source(path: Path, gigabytes: float) -> None:
    """A safetensors file of noise, written tensor by tensor."""
    count = max(1, round(gigabytes * 1e9 / (4 * TENSOR_VALUES)))
    size = 4 * TENSOR_VALUES
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [4096, 4096], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    noise = np.random.default_rng(0).normal(0, 0.02, TENSOR_VALUES).astype(np.float32)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for index in range(count):
            file.write(np.roll(noise, index).tobytes())


def same(first: Path, second: Path) -> bool:
    """Whether two files are equal, read piece by piece."""
    with open(first, "rb") as a, open(second, "rb") as b:
        while True:
            left, right = a.read(2**24), b.read(2**24)
            if left != right:
                return False
            if not left:
                return True


def main() -> None:
    """Make the file, pack it, unpack it, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, packed, back = (Path(name) / leaf for leaf in ("m.safetensors", "m.kpk", "back.safetensors"))
        start = time.perf_counter()
        write_source(source, arguments.gigabytes)
        print(f"{source.stat().st_size / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        for step, a, b in (("pack", source, packed), ("unpack", packed, back)):
            child = [sys.executable, "-c", CHILD, step, str(a), str(b)]
            peak, seconds = subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()
            print(
                f"{step}: {float(peak):.0f} MiB at most, {float(seconds):.0f} s, {b.stat().st_size / 1e9:.3f} GB",
                flush=True,
            )
        print("the same bytes returned" if same(source, back) else "the file DIFFERS")


if __name__ == "__main__":
    main()
