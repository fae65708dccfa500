"""What a block's writer knows of each member before it chooses: plain ways, models, samples for stored tables."""

from dataclasses import dataclass

import numpy as np

from kompakt.coding.bitpack import packed_size
from kompakt.coding.fit import Fit, Start, finish, start
from kompakt.coding.header import MOST_SHIFT, Constant, Entry, Huffman, Packed
from kompakt.coding.huffman import MOST_SYMBOLS, code_lengths
from kompakt.coding.kernels import Layout, Scales, bounded, layout_of, to_taps
from kompakt.coding.models import SHAPES, SYMBOLS
from kompakt.coding.stream import find_heads
from kompakt.coding.tablesets import Sample

LEAST_VALUES = 32
MOST_CODED = 2**20
MOST_COUNTED = 2**16
COMMON = 0.2
OFF_CENTER = 0.25
SHIFTED_MEAN = 3.0
CODED_HEADER_BITS = 48
HUFFMAN_SPAN = 512
MOST_HUFFMAN = 2**12  # beyond, a coded section is smaller and decodes faster
WORTH = 0.98  # planes of noise are packed without a trial
SPARSE_SHARE = 0.75
GROUPING_GAIN = 0.99


@dataclass(frozen=True, kw_only=True)
class Integers:
    """A member to be coded.

    Args:
        values: integer array; its shape gives the geometry.
        flat: no geometry: the values are alike wherever they stand (planes of floats).
        family: members of one family share stored tables.
    """

    values: np.ndarray
    flat: bool = False
    family: str = ""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A member that may be modelled.

    Args:
        member: the member.
        center, shift: what is subtracted, and how many low bits are stored raw.
        layout, grouped: the geometry, and whether inputs were taken as taps for it.
        values: float32 [K, N], the modelled part of the values.
        fits: parametric models.
        plain_bits: what the best plain way takes.
    """

    member: Integers
    center: int
    shift: int
    layout: Layout
    grouped: bool
    values: np.ndarray
    fits: tuple[Fit, ...]
    plain_bits: float

    @property
    def parametric_bits(self) -> float:
        """Bits under the better parametric model; infinite where there is none."""
        best = min((found.total_bits for found in self.fits), default=np.inf)
        return best + self.shift * self.values.size + CODED_HEADER_BITS

    @property
    def sparse(self) -> bool:
        """Whether kernels are worth a head: they have taps, and most of them are zero."""
        share = 1 - float(np.count_nonzero(self.values)) / self.values.size
        return bool(self.layout.taps > 1 and share >= SPARSE_SHARE)

    @property
    def family(self) -> tuple[str, bool]:
        """Members of one family may share a stored set."""
        return self.member.family, self.sparse

    def sample(self) -> Sample:
        """What the member offers to stored tables: all values, or those from the head of each kernel on."""
        values = self.values.astype(np.int32)
        if self.member.flat:
            return Sample(values.reshape(-1))
        last = self.fits[-1]
        if not self.sparse:
            return Sample(values.reshape(-1), last.classes.reshape(-1), last.predicted.reshape(-1))
        taps, heads = np.arange(self.layout.taps, dtype=np.uint8)[:, None], find_heads(self.values)[None, :]
        known = taps >= heads
        return Sample(values[known], last.classes[known], last.predicted[known], (taps == heads)[known])

    def head_sample(self) -> Sample:
        """What a sparse member offers to the tables of heads."""
        return Sample(
            find_heads(self.values).astype(np.int32), bounded(self.fits[-1].scales.kernel_classes(self.layout))
        )


def plain_entry(values: np.ndarray) -> tuple[Entry, float]:
    """The better of constant, packed and Huffman, with its bits."""
    flat = values.reshape(-1)
    least, most = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
    if least == most:
        return Constant(least), 24.0
    bits = (most - least).bit_length()
    packed = 8.0 * packed_size(flat.size, bits) + 32
    if most - least < min(HUFFMAN_SPAN, MOST_SYMBOLS) and flat.size <= MOST_HUFFMAN:
        counts = np.bincount((flat.astype(np.int64) - least).astype(np.int64), minlength=most - least + 1)
        lengths = code_lengths(counts)
        total = int((counts * lengths.astype(np.int64)).sum())
        if total + 4 * len(lengths) + 56 < packed:
            return Huffman(least, lengths, (total + 7) // 8), float(total + 4 * len(lengths) + 56)
    return Packed(least, bits), packed


def center_of(values: np.ndarray) -> int:
    """The integer about which values lie: zero, their commonest value or their median."""
    flat = values.reshape(-1)
    least, most = int(flat.min()), int(flat.max())
    counts = np.bincount(flat.astype(np.int64) - least) if most - least < MOST_COUNTED else None
    if counts is None:
        median = int(np.partition(flat, flat.size // 2)[flat.size // 2])
    else:
        median = least + int(np.searchsorted(np.cumsum(counts), flat.size // 2, side="right"))
    spread = float(np.abs(flat.astype(np.int64) - median).mean())
    if values.dtype.kind == "i" and abs(median) <= max(1.0, OFF_CENTER * spread):
        return 0
    if counts is not None and counts.max() > COMMON * flat.size:
        return least + int(np.argmax(counts))
    return median


def shift_of(values: np.ndarray, center: int) -> int:
    """How many low bits are as good as noise: all that keep the mean magnitude above three steps."""
    mean = float(np.abs(values.astype(np.int64) - center).mean())
    return int(np.clip(np.floor(np.log2(max(mean, 1e-9) / SHIFTED_MEAN)), 0, MOST_SHIFT))


def may_be_coded(member: Integers, plain: Entry) -> bool:
    """Whether a model is worth trying."""
    if isinstance(plain, Constant) or member.values.size < LEAST_VALUES:
        return False
    if not member.flat:
        return True
    values = member.values.reshape(-1).astype(np.int64)
    counts = np.bincount(values - values.min())
    taken = values.size * np.log2(values.size) - (counts * np.log2(np.maximum(counts, 1))).sum()
    return counts.size <= SYMBOLS and float(taken) < WORTH * values.size * (counts.size - 1).bit_length()


def make_options(members: dict[int, Integers], plain_bits: dict[int, float]) -> tuple[dict[int, Option], int]:
    """Models of the members under the shape that suits all of them best, and that shape."""
    drafts = {index: _draft(member) for index, member in members.items()}
    prices = np.zeros(SHAPES)
    for draft in drafts.values():
        if draft is not None and draft.starts:
            prices += np.min([first.prices for first in draft.starts], axis=0)
    shape = int(np.argmin(prices))
    options = {}
    for index, draft in drafts.items():
        if draft is not None:
            fits = tuple(finish(first, shape) for first in draft.starts) or (_no_model(draft.values, draft.layout),)
            options[index] = Option(
                member=members[index],
                center=draft.center,
                shift=draft.shift,
                layout=draft.layout,
                grouped=draft.grouped,
                values=draft.values,
                fits=fits,
                plain_bits=plain_bits[index],
            )
    return options, shape


@dataclass(frozen=True)
class _Draft:
    center: int
    shift: int
    layout: Layout
    grouped: bool
    values: np.ndarray
    starts: tuple[Start, ...]


def _draft(member: Integers) -> _Draft | None:
    """The geometry and first models of a member; None if its range is too wide for any."""
    center = center_of(member.values)
    shift = 0 if member.flat else shift_of(member.values, center)
    coarse = (member.values.astype(np.int64) - center + (1 << shift >> 1)) >> shift
    if int(np.abs(coarse).max()) >= MOST_CODED:
        return None
    layout = layout_of(member.values.shape, flat=member.flat)
    values = _tapped(coarse, layout)
    found = _Draft(center, shift, layout, False, values, () if member.flat else start(values, layout))
    neighbours = layout_of(member.values.shape, flat=member.flat, grouped=True)
    if neighbours == layout:
        return found
    values = _tapped(coarse, neighbours)
    grouped = _Draft(center, shift, neighbours, True, values, start(values, neighbours))
    sparse = np.count_nonzero(values) <= (1 - SPARSE_SHARE) * values.size
    gain = min(grouped.starts[-1].prices) < GROUPING_GAIN * min(found.starts[0].prices)
    return grouped if sparse or gain else found


def _tapped(values: np.ndarray, layout: Layout) -> np.ndarray:
    return np.ascontiguousarray(to_taps(values, layout)).astype(np.float32)


def _no_model(values: np.ndarray, layout: Layout) -> Fit:
    """One class, no prediction: only stored tables suit it."""
    return Fit(
        layout=layout,
        weights=None,
        scales=Scales(base=0),
        classes=np.zeros(values.shape, np.int16),
        predicted=np.zeros(values.shape, np.int32),
        bits=np.inf,
        side_bits=0.0,
    )
