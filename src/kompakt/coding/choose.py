"""Choosing how each member of a block is coded, by the bits that each way takes."""

from dataclasses import dataclass

from kompakt.coding.header import Coded, Entry
from kompakt.coding.kernels import Scales
from kompakt.coding.options import (
    CODED_HEADER_BITS,
    Integers,
    Option,
    make_options,
    may_be_coded,
    plain_entry,
)
from kompakt.coding.tablesets import TableSet, build, cost

CHOICE_BITS = 10


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


@dataclass(frozen=True)
class _Stored:
    """Members that share stored tables: the bytes of the sets, the members' entries and prices."""

    sets: list[bytes]
    entries: dict[int, Coded]
    prices: dict[int, float]


def choose(members: list[Integers]) -> Choice:
    """Choose an entry for each member of a block."""
    plain = [plain_entry(member.values) for member in members]
    entries = [entry for entry, _ in plain]
    wanted = [i for i, entry in enumerate(entries) if may_be_coded(members[i], entry)]
    options, shape = make_options({i: members[i] for i in wanted}, {i: plain[i][1] for i in wanted})
    prices: dict[int, float] = {}
    for index, option in options.items():
        if option.parametric_bits < option.plain_bits:
            entries[index], prices[index] = _parametric_entry(option), option.parametric_bits
    sets: list[bytes] = []
    for family in dict.fromkeys(option.family for option in options.values()):
        group = {i: option for i, option in options.items() if option.family == family}
        found = _stored(group, len(sets))
        for index, entry in found.entries.items():
            entries[index] = entry
        prices |= found.prices
        sets += found.sets
    size = sum(members[index].values.size for index in prices)
    return Choice(tuple(entries), shape, tuple(sets), sum(prices.values()) / max(size, 1))


def best_bits(member: Integers) -> float:
    """About the bits that a member takes in the best way, alone in its block."""
    entry, bits = plain_entry(member.values)
    if not may_be_coded(member, entry):
        return bits
    options, _ = make_options({0: member}, {0: bits})
    for option in options.values():
        found = _price({0: option})
        bits = min(bits, option.parametric_bits, found.prices[0] + 8 * sum(map(len, found.sets)))
    return bits


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
        grouped=option.grouped,
    )


def _stored(options: dict[int, Option], number: int) -> _Stored:
    """Stored tables for the members that gain from them; the first set gets the number."""
    rivals = {index: min(option.plain_bits, option.parametric_bits) for index, option in options.items()}
    for _ in range(2):
        if not options:
            break
        found = _price(options, number)
        inside = {index: option for index, option in options.items() if found.prices[index] < rivals[index]}
        if inside == options:
            break
        options = inside
    if not options or sum(rivals[i] - found.prices[i] for i in options) <= 8 * sum(map(len, found.sets)):
        return _Stored([], {}, {})
    return _Stored(
        found.sets,
        {index: found.entries[index] for index in options},
        {index: found.prices[index] for index in options},
    )


def _price(options: dict[int, Option], number: int = 0) -> _Stored:
    """The sets that suit members of one family, and what each member takes under them."""
    samples = {index: option.sample() for index, option in options.items()}
    table_set, raw = build(list(samples.values()), CHOICE_BITS)
    sets, entries, prices = [raw], {}, {}
    for index, option in options.items():
        entries[index] = _stored_entry(option, table_set, number)
        side = option.fits[-1].side_bits if table_set.classes or table_set.bins else 0.0
        low = option.shift * option.values.size
        prices[index] = cost(table_set, samples[index]) + low + side + CODED_HEADER_BITS
    for taps in sorted({option.layout.taps for option in options.values() if option.sparse}):
        heads = {i: option.head_sample() for i, option in options.items() if option.layout.taps == taps}
        head_set, raw = build(list(heads.values()), CHOICE_BITS)
        for index, sample in heads.items():
            prices[index] += cost(head_set, sample)
            entries[index] = _headed(entries[index], options[index], head_set, number + len(sets))
        sets.append(raw)
    return _Stored(sets, entries, prices)


def _stored_entry(option: Option, table_set: TableSet, number: int) -> Coded:
    """The entry of a member under a set; factors and weights are kept only if the set looks at them."""
    last = option.fits[-1]
    looks = bool(table_set.classes or table_set.bins)
    return Coded(
        stored=True,
        center=option.center,
        shift=option.shift,
        flat=not looks and not option.sparse,
        scales=last.scales if table_set.classes else Scales(base=last.scales.base),
        weights=last.weights if table_set.bins else None,
        index=number,
        grouped=option.grouped and (looks or option.sparse),
    )


def _headed(entry: Coded, option: Option, head_set: TableSet, number: int) -> Coded:
    """A sparse member's entry with the set of its heads, which may look at the factors."""
    scales = option.fits[-1].scales if head_set.classes else entry.scales
    return Coded(
        stored=True,
        center=entry.center,
        shift=entry.shift,
        flat=False,
        scales=scales,
        weights=entry.weights,
        index=entry.index,
        grouped=entry.grouped,
        heads=number,
    )
