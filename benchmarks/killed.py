"""Kill a search 20 times at random moments: ``python -m benchmarks.killed``; it must end as an undisturbed one does."""

import argparse
import tempfile
from pathlib import Path

from kompakt.engine.explore import explore
from kompakt.weights import save_weights
from tests.test_engine import THREE, job, killed, trained

FILES = ("model.onnx", "model.kpk", "plan.json", "recipe.toml")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.killed")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        calm, rough = Path(name) / "calm", Path(name) / "rough"
        calm.mkdir()
        rough.mkdir()
        net = trained()
        save_weights(net, Path(name) / "net.safetensors")
        explore(job(net, calm), THREE)
        killed(rough, Path(name) / "net.safetensors", given.times, given.seed)
        same = all((calm / file).read_bytes() == (rough / file).read_bytes() for file in FILES)
    print(f"killed {given.times} times: the artifact, plan and recipe are {'the same' if same else 'NOT the same'}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
