"""Choosing how each member of a block is coded, by the bits that each way takes."""

from dataclasses import dataclass

import numpy as np

from kompakt.coding.bitpack import packed_size
from kompakt.coding.fit import Fit, finish, start
from kompakt.coding.header import MOST_SHIFT, Coded, Constant, Entry, Huffman, Packed
from kompakt.coding.huffman import MOST_SYMBOLS, code_lengths
from kompakt.coding.kernels import Layout, Scales, layout_of, to_taps
from kompakt.coding.models import SHAPES, SYMBOLS
from kompakt.coding.tablesets import Sample, TableSet, build, cost

LEAST_VALUES = 32
MOST_CODED = 2**20
MOST_COUNTED = 2**16
COMMON = 0.2
OFF_CENTER = 0.25
SHIFTED_MEAN = 3.0
CODED_HEADER_BITS = 48
HUFFMAN_SPAN = 512
MOST_HUFFMAN = 2**12  # beyond, a coded section is smaller and decodes faster
CHOICE_BITS = 10
WORTH = 0.98  # planes of noise are packed without a trial


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
    """What is known of a member before the choice: its plain entry, and its models where it may be modelled."""

    member: Integers
    center: int
    shift: int
    layout: Layout
    values: np.ndarray
    fits: tuple[Fit, ...]
    plain_bits: float

    @property
    def parametric_bits(self) -> float:
        """Bits under the better parametric model; infinite where there is none."""
        best = min((found.total_bits for found in self.fits), default=np.inf)
        return best + self.shift * self.values.size + CODED_HEADER_BITS

    @property
    def sample(self) -> Sample:
        """What the member offers to stored tables."""
        values = self.values.reshape(-1).astype(np.int32)
        if self.member.flat:
            return Sample(values)
        last = self.fits[-1]
        return Sample(values, last.classes.reshape(-1), last.predicted.reshape(-1))


@dataclass(frozen=True)
class Choice:
    """How a block is coded.

    Args:
        entries: one for each member.
        shape: the parametric shape.
        sets: the table sets, as the bytes that store them.
        rate: about the bits that a coded value takes.
    """

    entries: tuple[Entry, ...]
    shape: int = 0
    sets: tuple[bytes, ...] = ()
    rate: float = 0.0


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


def choose(members: list[Integers]) -> Choice:
    """Choose an entry for each member of a block."""
    plain = [plain_entry(member.values) for member in members]
    entries = [entry for entry, _ in plain]
    wanted = [i for i, entry in enumerate(entries) if _may_be_coded(members[i], entry)]
    options, shape = _options({i: members[i] for i in wanted}, {i: plain[i][1] for i in wanted})
    prices: dict[int, float] = {}
    for index, option in options.items():
        if option.parametric_bits < option.plain_bits:
            entries[index], prices[index] = _parametric_entry(option), option.parametric_bits
    sets: list[bytes] = []
    for family in dict.fromkeys(option.member.family for option in options.values()):
        group = {i: option for i, option in options.items() if option.member.family == family and not option.shift}
        raw, chosen = _stored(group, len(sets))
        for index, (entry, price) in chosen.items():
            entries[index], prices[index] = entry, price
        sets += [raw] if chosen else []
    size = sum(members[index].values.size for index in prices)
    return Choice(tuple(entries), shape, tuple(sets), sum(prices.values()) / max(size, 1))


def best_bits(member: Integers) -> float:
    """About the bits that a member takes in the best way, alone in its block."""
    entry, bits = plain_entry(member.values)
    if not _may_be_coded(member, entry):
        return bits
    options, _ = _options({0: member}, {0: bits})
    for option in options.values():
        bits = min(bits, option.parametric_bits)
        if not option.shift:
            table_set, raw = build([option.sample], CHOICE_BITS)
            bits = min(bits, _stored_bits(option, table_set) + 8 * len(raw))
    return bits


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


def _may_be_coded(member: Integers, plain: Entry) -> bool:
    if isinstance(plain, Constant) or member.values.size < LEAST_VALUES:
        return False
    if not member.flat:
        return True
    values = member.values.reshape(-1).astype(np.int64)
    counts = np.bincount(values - values.min())
    taken = values.size * np.log2(values.size) - (counts * np.log2(np.maximum(counts, 1))).sum()
    return counts.size <= SYMBOLS and float(taken) < WORTH * values.size * (counts.size - 1).bit_length()


def _options(members: dict[int, Integers], plain_bits: dict[int, float]) -> tuple[dict[int, Option], int]:
    """Models of the members under the shape that suits all of them best, and that shape."""
    arrays, starts = {}, {}
    for index, member in members.items():
        center = center_of(member.values)
        shift = 0 if member.flat else shift_of(member.values, center)
        coarse = (member.values.astype(np.int64) - center + (1 << shift >> 1)) >> shift
        if int(np.abs(coarse).max()) < MOST_CODED:
            layout = layout_of(member.values.shape, member.flat)
            arrays[index] = center, shift, layout, np.ascontiguousarray(to_taps(coarse, layout)).astype(np.float32)
            starts[index] = () if member.flat else start(arrays[index][3], layout)
    prices = np.zeros(SHAPES)
    for found in starts.values():
        prices += np.min([first.prices for first in found], axis=0) if found else 0
    shape = int(np.argmin(prices))
    options = {}
    for index, (center, shift, layout, values) in arrays.items():
        fits = tuple(finish(first, shape) for first in starts[index]) or (_no_model(values, layout),)
        options[index] = Option(
            member=members[index],
            center=center,
            shift=shift,
            layout=layout,
            values=values,
            fits=fits,
            plain_bits=plain_bits[index],
        )
    return options, shape


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


def _parametric_entry(option: Option) -> Coded:
    best = min(option.fits, key=lambda found: found.total_bits)
    return Coded(
        stored=False,
        center=option.center,
        shift=option.shift,
        flat=False,
        scales=best.scales,
        weights=best.weights,
        index=0,
    )


def _stored(options: dict[int, Option], number: int) -> tuple[bytes, dict[int, tuple[Entry, float]]]:
    """A table set for the members that gain from it: the bytes that store it, their entries and prices."""
    rivals = {index: min(option.plain_bits, option.parametric_bits) for index, option in options.items()}
    inside = list(options)
    for _ in range(2):
        if not inside:
            return b"", {}
        table_set, raw = build([options[index].sample for index in inside], CHOICE_BITS)
        looks = bool(table_set.classes or table_set.bins)
        prices = {
            index: cost(table_set, options[index].sample)
            + looks * options[index].fits[-1].side_bits
            + CODED_HEADER_BITS
            for index in inside
        }
        inside = [index for index in inside if prices[index] < rivals[index]]
    if sum(rivals[index] - prices[index] for index in inside) <= 8 * len(raw):
        return b"", {}
    return raw, {index: (_stored_entry(options[index], table_set, number), prices[index]) for index in inside}


def _stored_bits(option: Option, table_set: TableSet) -> float:
    side = option.fits[-1].side_bits if table_set.classes or table_set.bins else 0.0
    return cost(table_set, option.sample) + side + CODED_HEADER_BITS


def _stored_entry(option: Option, table_set: TableSet, number: int) -> Coded:
    """The entry of a member under a set; factors and weights are kept only if the set looks at them."""
    last = option.fits[-1]
    return Coded(
        stored=True,
        center=option.center,
        shift=0,
        flat=not (table_set.classes or table_set.bins),
        scales=last.scales if table_set.classes else Scales(base=last.scales.base),
        weights=last.weights if table_set.bins else None,
        index=number,
    )
