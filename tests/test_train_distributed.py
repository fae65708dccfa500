"""Two processes train like one: the same weights from the same global batches."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.train_toy import toy_net, train_distributed


def test_two_processes_give_the_weights_of_one(tmp_path):
    """``torchrun`` on gloo, DDP and FSDP, interrupted and resumed, against one process; odd batches."""
    script = Path(__file__).with_name("train_toy.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(script), "distributed", str(tmp_path / "two")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    single = train_distributed(tmp_path / "one").state_dict()
    start = toy_net(dropout=0).state_dict()
    assert max((single[name] - start[name]).abs().max() for name in start) > 0.02
    assert torch.equal(single["spare"], torch.ones(2, 2))
    for mode in ("whole", "sharded"):
        paths = [tmp_path / "two" / mode / f"weights-{rank}.pt" for rank in (0, 1)]
        first, second = (torch.load(path, weights_only=True) for path in paths)
        for name, value in single.items():
            assert torch.equal(first[name], second[name]), (mode, name)
            assert torch.allclose(first[name], value, atol=1e-5, rtol=0), (mode, name)
