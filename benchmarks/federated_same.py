"""The same updates under kompakt's coder and NNCodec's: bytes and what is lost, without a federation around them."""

import time
from typing import Any

import torch

from benchmarks.federated_coders import NNCodec, Ours, State
from benchmarks.federated_data import Setting, Subject, start_of
from kompakt.federated import UpdateSpec
from kompakt.federated.broadcast import state_bytes
from kompakt.federated.layout import layout_of

STEPS = (-40, -34, -28)
EXAMPLES = 600


def lost(found: State, new: State, base: State) -> float:
    """Length of what the weights' update lost, over that of the update."""
    names = layout_of(base).weights
    gone = sum(float((found[name] - new[name]).square().sum()) for name in names)
    return float((gone / sum(float((base[name] - new[name]).square().sum()) for name in names)) ** 0.5)


def same_updates(subject: Subject, setting: Setting, train: Any) -> list[dict[str, Any]]:
    """One client's first update under both coders, kompakt's at the bytes that NNCodec takes."""
    model = start_of(subject.network, 0)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examples = torch.randperm(len(subject.train[1]), generator=torch.Generator().manual_seed(0))[:EXAMPLES]
    few = examples[: 2 * setting.batch]
    train(
        start_of(subject.network, 0), (subject.train[0][few], subject.train[1][few]), setting, 0
    )  # first calls are slow
    begun = time.process_time()
    train(model, (subject.train[0][examples], subject.train[1][examples]), setting, 0)
    training = time.process_time() - begun
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cells = []
    for step in STEPS:
        size, took, found = NNCodec(step, sparse=False)(new, base, 0)
        cell: dict[str, Any] = {"step": step, "examples": EXAMPLES, "train_s": training, "state": state_bytes(base)}
        cell["NNCodec"] = {"bytes": size, "lost": lost(found, new, base), "encode_s": took}
        coder = Ours(UpdateSpec(ratio=state_bytes(base) / size))
        coder(new, base, 0)  # the second message of a client finds its step sooner: the common case is timed
        coder = coder.forgotten()
        size, took, found = coder(new, base, 0)
        cells.append(cell | {"kompakt": {"bytes": size, "lost": lost(found, new, base), "encode_s": took}})
    return cells
