"""The coders that ``benchmarks.federated`` compares: each is one client's way to send an update.

A coder takes the new state, the base and a seed (100·r + c in round r of client c, both from 0) and returns the bytes
that travel, the processor seconds of encoding, and the state that arrives.
"""

import contextlib
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kompakt.federated import Feedback, UpdateSpec, decode_update, encode_update
from kompakt.federated.broadcast import state_bytes
from kompakt.federated.layout import layout_of

State = dict[str, Tensor]
Coder = Callable[[State, State, int], tuple[int, float, State]]
UP, DOWN = UpdateSpec(ratio=172.0, warm_up=7), UpdateSpec(ratio=25.0)
NNCODEC_STEPS = (-40, -34, -28, -22)


def uncompressed(new: State, base: State, seed: int) -> tuple[int, float, State]:
    """Every float as it is."""
    return state_bytes(new), 0.0, new


def eight_bits(new: State, base: State, seed: int) -> tuple[int, float, State]:
    """A byte for each weight, its tensor's largest difference at 127; all else as it is."""
    begun, weights = time.process_time(), layout_of(base).weights
    found, size = dict(new), 0
    for name in weights:
        change = new[name] - base[name]
        step = max(float(change.abs().max()), 1e-12) / 127
        found[name] = base[name] + (change / step).round() * step
        size += change.numel() + 4
    return (
        size + state_bytes({name: tensor for name, tensor in new.items() if name not in weights}),
        time.process_time() - begun,
        found,
    )


class Ours:
    """kompakt's coder with a client's feedback."""

    def __init__(self, spec: UpdateSpec, feedback: Feedback | None = None) -> None:
        self._spec, self._feedback = spec, feedback or Feedback()

    def forgotten(self) -> "Ours":
        """The same coder without its residual."""
        return Ours(self._spec, Feedback(rate=self._feedback.rate))

    def __call__(self, new: State, base: State, seed: int) -> tuple[int, float, State]:
        """Code, and decode as the server does."""
        begun = time.process_time()
        data = encode_update(new, base, self._spec.at(seed // 100 + 1), feedback=self._feedback, seed=seed)
        self._feedback.settle(accepted=True)
        took = time.process_time() - begun
        return len(data), took, decode_update(data, base)


class NNCodec:
    """NNCodec's federated update coding: differences, its own sparsification, error accumulation.

    Args:
        step: its ``qp``; its federated default is -26.
        sparse: sparsify as its federated coder does; without, only the quantizer and coder of it.
    """

    def __init__(self, step: int, *, sparse: bool = True) -> None:
        self._step, self._sparse, self._residual = step, sparse, dict[str, np.ndarray]()

    def __call__(self, new: State, base: State, seed: int) -> tuple[int, float, State]:
        """Code and decode; tensors without dimensions travel beside, as in its own client."""
        from nncodec import nnc
        from nncodec.framework.applications.utils.sparsification import apply_struct_spars_v2, apply_unstruct_spars_v2

        begun = time.process_time()
        names = [name for name, tensor in new.items() if tensor.ndim]
        change = {name: (new[name] - base[name]).numpy().astype(np.float32) for name in names}
        change = {name: value + self._residual.get(name, np.float32(0)) for name, value in change.items()}
        copied = {name: value.copy() for name, value in change.items()}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            if self._sparse:
                copied = apply_unstruct_spars_v2(self._step, copied, target_sparsity=0.6, qp_density=np.int32(2))
                copied = apply_struct_spars_v2(copied, gain=0.9)
            data = nnc.compress(copied, bitstream_path=str(Path(folder) / "update.nnc"), qp=self._step, use_dq=True,
                                row_skipping=True, return_bitstream=True)  # fmt: skip
            took = time.process_time() - begun
            found = nnc.decompress(bytearray(data))
        self._residual = {name: change[name] - np.asarray(found[name]) for name in names}
        arrived = {name: base[name] + torch.from_numpy(np.array(found[name])) for name in names}
        for name in names:
            if name.endswith("running_var"):
                arrived[name] = arrived[name].clamp(min=1e-6)
        return len(data), took, {name: arrived.get(name, new[name]) for name in new}


MAKERS: dict[str, Callable[[], Coder]] = {
    "uncompressed": lambda: uncompressed,
    "kompakt": lambda: Ours(UP),
    "uncompressed, momentum": lambda: uncompressed,
    "kompakt, no momentum": lambda: Ours(UP),
    "kompakt 50×, no momentum": lambda: Ours(UpdateSpec(ratio=86.0, warm_up=7)),
    "8-bit": lambda: eight_bits,
    "top-1 %": lambda: Ours(UpdateSpec(ratio=None, selection="top", keep=0.01, rounding="nearest")),
    "kompakt, both ways": lambda: Ours(UP),
}
PLAIN = ["uncompressed", "kompakt, no momentum", "kompakt 50×, no momentum", "8-bit", "top-1 %"]
"""Coders under which the server takes the mean as it is."""
if importlib.util.find_spec("nncodec"):
    MAKERS |= {f"NNCodec {step}": lambda step=step: NNCodec(step) for step in NNCODEC_STEPS}
    PLAIN += [f"NNCodec {step}" for step in NNCODEC_STEPS]
