"""From a new state and its base to a message; what is not sent goes into the feedback."""

from collections.abc import Iterator
from math import isfinite, prod

import numpy as np
import torch
from torch import Tensor

from kompakt.coding.planes import pieces
from kompakt.errors import InputError
from kompakt.federated.feedback import Feedback, remembered
from kompakt.federated.grid import grid_of
from kompakt.federated.layout import Layout, Piece, State, hash_state, layout_of, message_pieces, to_array
from kompakt.federated.message import Header, draft_message, seal, write_message, write_pieces
from kompakt.federated.rounding import Rounded, common_step, round_all, selected, tensor_steps
from kompakt.federated.search import Search, Sparse
from kompakt.federated.sparse import write_sparse
from kompakt.federated.spec import UpdateSpec
from kompakt.federated.values import STEP_BIAS, deviation, working
from kompakt.numerics.updates import LEAST_STEP, step_size

DEFAULT = UpdateSpec()
TRIALS = 6
CLOSE, AIM, LEAST_SHARE = 0.9, 0.96, 0.05
LEAST_BITS, HEAD_BYTES = 2048.0, 72
SPARSE_SHARE, SPARSE_TRIALS = 0.3, 4
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
    data, rounded, rate = sender.send(changes, feedback or Feedback())
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
        for state in (tensor.detach(), base[name].detach()):
            # A sum is quick, and finite only where all values are.
            if state.is_floating_point() and not (isfinite(float(state.sum())) or bool(state.isfinite().all())):
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

    def send(self, changes: dict[str, Tensor], feedback: Feedback) -> tuple[bytes, Rounded, float]:
        """The message, the codes that it holds, and its bits over their estimate."""
        kept, mask = selected(changes, self._spec, self._seed)
        if self._spec.ratio is not None:
            found = self._fitted_sparse(kept, feedback.rate) if mask is None and kept else None
            return found or self._fitted(kept, mask, feedback.rate)
        rounded = self._rounded(kept, tensor_steps(kept, self._spec.bits), mask)
        if mask is None and _filled_share(rounded) <= SPARSE_SHARE:
            flat = torch.cat([code.reshape(-1) for code in rounded.codes.values()]).numpy()
            places = np.flatnonzero(flat)
            return self._sparse(places, flat[places], rounded.steps, self._rest_blocks()), rounded, feedback.rate
        return write_message(*self._parts(rounded)), rounded, feedback.rate

    def _fitted_sparse(self, kept: dict[str, Tensor], rate: float) -> tuple[bytes, Rounded, float] | None:
        """The sparse message of the finest step that fits; None where too much is sent for that form."""
        assert self._spec.ratio is not None
        state = sum(tensor.numel() * tensor.element_size() for tensor in self._base.values())
        rest, names = self._rest_blocks(), self._layout.weights
        shape = _Shape(kept)
        empty = HEAD_BYTES + sum(map(len, rest))
        room = max(8 * (state / self._spec.ratio - empty), min(LEAST_BITS, 8 * empty))
        search = Search(shape.grid, shape.flat, self._spec)
        for _ in range(SPARSE_TRIALS):
            tried = search.fitted(room / rate)
            if tried.places.size > SPARSE_SHARE * shape.flat.size:
                return None
            data = self._sparse(tried.places, tried.codes, dict.fromkeys(names, tried.step), rest)
            taken = 8 * (len(data) - empty)
            rate = min(max(taken / max(tried.bits, 1.0), 0.5), 2.0)
            if taken <= room:
                break
        else:
            nothing = np.zeros(0, np.int64)
            tried = Sparse(LEAST_STEP, nothing, nothing, 0.0)
            data = self._sparse(nothing, nothing, dict.fromkeys(names, LEAST_STEP), rest)
        codes = np.zeros(shape.flat.size, np.int16)
        codes[tried.places] = tried.codes
        return data, Rounded(codes=shape.split(codes), steps=dict.fromkeys(names, tried.step)), rate

    def _rest_blocks(self) -> list[bytes]:
        """The blocks of statistics and integers."""
        held = message_pieces(self._base, self._layout, None, sparse=True)
        return list(write_pieces(held, cut(self._rest)))

    def _sparse(self, places: np.ndarray, codes: np.ndarray, steps: dict[str, int], rest: list[bytes]) -> bytes:
        grid = grid_of(tuple(tuple(self._base[name].shape) for name in self._layout.weights))
        header = Header(base=self._hash, shift=self._spec.statistic_bits, sparse=True)
        biased = [max(steps[name], LEAST_STEP) + STEP_BIAS for name in self._layout.weights]
        shared = len(set(biased)) == 1
        head = bytes([shared]) + np.array(biased[:1] if shared else biased, "<u2").tobytes()
        return seal(header, [head + write_sparse(grid, places, codes), *rest])

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
        yield from cut(arrays)


def cut(arrays: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Arrays in pieces."""
    for array in arrays:
        flat, start = array.reshape(-1), 0
        for shape in pieces(array.shape) if array.size else []:
            yield flat[start : start + prod(shape)].reshape(shape)
            start += prod(shape)


class _Shape:
    """All weights as one flat row, and back."""

    def __init__(self, kept: dict[str, Tensor]) -> None:
        self._shapes = {name: tuple(change.shape) for name, change in kept.items()}
        self.grid = grid_of(tuple(self._shapes.values()))
        self.flat = torch.cat([change.reshape(-1).float() for change in kept.values()]).numpy()

    def split(self, codes: np.ndarray) -> dict[str, Tensor]:
        parts = torch.from_numpy(codes).split(self.grid.sizes.tolist())
        return {name: part.reshape(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}


def _filled_share(rounded: Rounded) -> float:
    sizes = [code.numel() for code in rounded.codes.values()]
    return sum(int(code.count_nonzero()) for code in rounded.codes.values()) / max(sum(sizes), 1)


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
