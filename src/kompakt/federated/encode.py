"""From a new state and its base to a message; what is not sent goes into the feedback."""

from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import Tensor

from kompakt.coding.planes import pieces
from kompakt.errors import InputError
from kompakt.federated.feedback import Feedback, remembered
from kompakt.federated.layout import Layout, Piece, State, hash_state, layout_of, message_pieces, to_array
from kompakt.federated.message import Header, draft_message, write_message
from kompakt.federated.rounding import Rounded, common_step, round_all, selected, tensor_steps
from kompakt.federated.spec import UpdateSpec
from kompakt.federated.values import STEP_BIAS, deviation, working
from kompakt.numerics.updates import LEAST_STEP, step_size

DEFAULT = UpdateSpec()
TRIALS = 6
CLOSE, AIM, LEAST_SHARE = 0.9, 0.96, 0.05
LEAST_BITS = 2048.0
MOST_STATISTIC = 2**19


def encode_update(
    new: State, base: State, spec: UpdateSpec = DEFAULT, *, feedback: Feedback | None = None, seed: int = 0
) -> bytes:
    """Code how ``new`` differs from ``base``, the state that the receiver holds.

    With a ratio, the message is at most ``bytes of the state / ratio``, or as small as the statistics and tables of
    a small state let it be. Give a feedback, and what was not sent is sent later; without, it is lost (right
    for a server, whose next difference is to what its clients hold and so has it in it).

    Args:
        new: the state after training.
        base: the state before, of the same names, shapes and dtypes.
        spec: what to send and how.
        feedback: what this sender remembers; brought up to date when the message is whole.
        seed: of stochastic rounding and random places; give each round and client another.

    Raises:
        InputError: the states do not fit each other, or a value is not finite.

    Example:
        >>> base = {"w": torch.zeros(100, 100)}
        >>> new = {"w": torch.randn(100, 100)}
        >>> len(encode_update(new, base)) <= 400
        True
    """
    layout = layout_of(base)
    _check(new, base)
    changes = {name: _change(name, new, base, feedback) for name in layout.weights}
    sender = _Sender(new, base, layout, spec, seed)
    data, rounded, rate = sender.send(changes, 1.0 if feedback is None else feedback.rate)
    if feedback is not None:
        sent = {n: rounded.codes[n].to(changes[n].dtype) * step_size(rounded.steps[n]) for n in changes}
        feedback.residual = {name: changes[name] - sent[name] for name in changes}
        feedback.sent = sent
        feedback.rate = rate
    return data


def _check(new: State, base: State) -> None:
    if list(new) != list(base):
        odd = sorted(set(new) ^ set(base))
        raise InputError(f"update: the states' tensors differ ({', '.join(odd[:3]) or 'in order'}); send one model's")
    for name, tensor in new.items():
        if tensor.shape != base[name].shape or tensor.dtype != base[name].dtype:
            found, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, base[name]))
            raise InputError(f"{name}: {found} found, {expected} expected as in the base")
        for state in (tensor, base[name]):
            if state.is_floating_point() and not bool(state.isfinite().all()):
                raise InputError(f"{name}: not finite; the training diverged, do not send its result")


def _change(name: str, new: State, base: State, feedback: Feedback | None) -> Tensor:
    kind = working(base[name])
    change = new[name].detach().cpu().to(kind) - base[name].detach().cpu().to(kind)
    return change + remembered(feedback, name, change)


class _Sender:
    """Everything of a message that does not depend on the step."""

    def __init__(self, new: State, base: State, layout: Layout, spec: UpdateSpec, seed: int) -> None:
        self._base, self._layout, self._spec, self._seed = base, layout, spec, seed % 2**64
        self._hash = hash_state(base)
        self._rest = [_statistic(name, new, base, spec.statistic_bits) for name in layout.statistics]
        self._rest += [_difference(new[name], base[name]) for name in layout.integers]

    def send(self, changes: dict[str, Tensor], rate: float) -> tuple[bytes, Rounded, float]:
        """The message, the codes that it holds, and its bits over their entropy."""
        kept, mask = selected(changes, self._spec, self._seed)
        if self._spec.ratio is not None:
            return self._fitted(kept, mask, rate)
        rounded = self._rounded(kept, tensor_steps(kept, self._spec.bits), mask)
        return write_message(*self._parts(rounded)), rounded, rate

    def _fitted(self, kept: dict[str, Tensor], mask: Tensor | None, rate: float) -> tuple[bytes, Rounded, float]:
        """The message of the finest step that fits; the coder's own sizes correct the estimate."""
        assert self._spec.ratio is not None
        state = sum(tensor.numel() * tensor.element_size() for tensor in self._base.values())
        nothing = self._rounded({n: c * 0 for n, c in kept.items()}, dict.fromkeys(kept, 0), mask)
        best = draft_message(*self._parts(nothing)), nothing, rate
        empty = best[0].size
        room = max(8 * (state / self._spec.ratio - empty), min(LEAST_BITS, 8 * empty))
        tried: dict[int, float] = {}
        step = common_step(kept, self._spec, AIM * room / rate)
        while kept and step not in tried and len(tried) < TRIALS:
            rounded = self._rounded(kept, dict.fromkeys(kept, step), mask)
            draft = draft_message(*self._parts(rounded))
            tried[step] = share = 8 * (draft.size - empty) / room
            rate = min(max(rate * max(share, LEAST_SHARE) / AIM, 1e-3), 1e3)
            if best[0].size < draft.size and share < 1:
                best = draft, rounded, rate
            if CLOSE <= share < 1:
                break
            step = common_step(kept, self._spec, AIM * room / rate)
            while step in tried and tried[step] >= 1:
                step += 1
        return best[0].write(), best[1], best[2]

    def _rounded(self, kept: dict[str, Tensor], steps: dict[str, int], mask: Tensor | None) -> Rounded:
        return Rounded(codes=round_all(kept, steps, self._spec, self._seed), steps=steps, places=mask)

    def _parts(self, rounded: Rounded) -> tuple[Header, list[Piece], Iterator[np.ndarray]]:
        places = None if rounded.places is None else int(rounded.places.sum())
        header = Header(base=self._hash, shift=self._spec.statistic_bits, seed=self._seed, places=places)
        return header, message_pieces(self._base, self._layout, places), self._arrays(rounded)

    def _arrays(self, rounded: Rounded) -> Iterator[np.ndarray]:
        """The pieces of a message, in order."""
        steps = [max(rounded.steps[name], LEAST_STEP) + STEP_BIAS for name in self._layout.weights]
        arrays = [np.array(steps, np.uint16)]
        codes = [rounded.codes[name] for name in self._layout.weights]
        if rounded.places is not None:
            codes = [torch.cat([code.reshape(-1) for code in codes])[rounded.places]]
        arrays += [to_array(code) for code in codes] + self._rest
        for array in arrays:
            flat, start = array.reshape(-1), 0
            for shape in pieces(array.shape) if array.size else []:
                yield flat[start : start + prod(shape)].reshape(shape)
                start += prod(shape)


def _statistic(name: str, new: State, base: State, shift: int) -> np.ndarray:
    """Codes of a running statistic: parts of a deviation for a mean, of itself for a variance.

    Raises:
        InputError: the base's variance is negative.
    """
    kind, old = working(base[name]), base[name]
    change = new[name].to(kind) - old.to(kind)
    if name.endswith("running_var"):
        if bool((old < 0).any()):
            raise InputError(f"{name}: a variance below zero in the base; is it a running variance?")
        unit = old.to(kind).clamp(min=torch.finfo(kind).tiny)
    else:
        unit = deviation(name, base)
    codes = (change / unit * 2.0**shift).round().clamp(-MOST_STATISTIC, MOST_STATISTIC)
    return to_array(codes.nan_to_num(0.0).to(torch.int32))


def _difference(new: Tensor, base: Tensor) -> np.ndarray:
    return to_array(new ^ base if base.dtype == torch.bool else new - base)
