"""The global random generators as values: a state can be made, read, set, and lent to a block.

Data that are loaded during training and layers such as dropout draw from torch's and Python's global
generators. A run gives each a stream of its own, so that neither shifts the other's numbers.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

RandomState = dict[str, Any]


def seeded(seed: int) -> RandomState:
    """Return the state of generators that were just seeded; the global ones are not touched."""
    cuda = [torch.Generator(f"cuda:{i}").manual_seed(seed).get_state() for i in range(_gpus())]
    cpu = torch.Generator().manual_seed(seed).get_state()
    return {"torch": cpu, "cuda": cuda, "python": random.Random(seed).getstate()}


def current() -> RandomState:
    """Return the states of torch's generators (CPU and every GPU) and of Python's."""
    cuda = torch.cuda.get_rng_state_all() if _gpus() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def resume(state: RandomState) -> None:
    """Set the global generators to a state."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])


@contextmanager
def drawing_from(state: RandomState) -> Iterator[None]:
    """Run a block on ``state``, which moves on with what is drawn; then set the callers' state again."""
    before = current()
    resume(state)
    try:
        yield
    finally:
        state.update(current())
        resume(before)


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
