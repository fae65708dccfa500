"""The fp32 network as an OpenVINO file: ``python -m benchmarks.peers.openvino_float FLOAT OUT``."""

import sys
from pathlib import Path

import openvino as ov

from benchmarks.peers.clock import tell, timed


def main() -> None:
    source, out = map(Path, sys.argv[1:3])
    _, seconds = timed(lambda: ov.save_model(ov.convert_model(source), out / "model.xml", compress_to_fp16=False))
    tell(seconds, ("openvino",))


if __name__ == "__main__":
    main()
