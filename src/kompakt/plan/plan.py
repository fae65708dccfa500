"""``Plan``: every decision about a model, as data: names, specs and indices, never tensors.

A plan survives JSON, can be edited by hand and diffed, and alone rebuilds the model's shape.
Entries are applied by ``kompakt.build.apply`` in the order in which they stand.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from kompakt.errors import PlanError
from kompakt.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Represent a tensor by integers.

    Args:
        tensor: a parameter's qualified name (``role="weight"``) or the name of the op whose output
            is quantized (``role="activation"``).
        spec: the integers.
        range: the estimator of the range, a key of ``kompakt.numerics.ranges.ESTIMATORS``.
        like: the op whose range this one shares (for ops that only move values); it must be quantized too.
        readers: who reads the integers of an op: ``all``, or ``layers`` alone, what else reads it the float.
    """

    tensor: str
    role: Literal["weight", "activation"]
    spec: QuantSpec
    range: str = "minmax"
    like: str | None = None
    readers: Literal["all", "layers"] = "all"
    kind: Literal["quantize"] = "quantize"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Indices that are removed from one dimension of one tensor of ``size`` before the cut."""

    tensor: str
    dim: int
    size: int
    removed: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Mend:
    """A number in a module's code that follows a width: attributes equal to ``before`` become ``after``.

    Args:
        module: qualified name of the module whose attributes are mended.
        before: an integer such as ``num_heads``, or several such as the sizes of a split.
        after: what it becomes, of the same length.
    """

    module: str
    before: int | tuple[int, ...]
    after: int | tuple[int, ...]
    kind: Literal["mend"] = "mend"


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Remove coupled channels: every cut of one group, together.

    Entries that follow each other state their indices in the same model, the one before the first of
    them; a cut whose ``size`` is what an earlier one left starts the next round.
    """

    group: str
    cuts: tuple[Cut, ...]
    kind: Literal["prune"] = "prune"


@dataclass(frozen=True, kw_only=True)
class Sparsify:
    """Set weights to zero without changing shapes: a share of them, or all but ``n`` of every ``m``."""

    tensor: str
    sparsity: float | None = None
    n: int | None = None
    m: int | None = None
    block: tuple[int, ...] = ()
    criterion: str = "magnitude"
    kind: Literal["sparsify"] = "sparsify"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Replace weights by indices into a codebook of 2^bits values.

    Args:
        tensor: a parameter's qualified name.
        bits: of an index.
        granularity: one codebook for the tensor, or one for each output.
        start: where k-means begins, which finds ``free`` values.
        grid: ``free`` values; or the fixed ``apot`` and ``power_of_two`` levels times one scale; or ``ternary``, two
            values and 0 (2 bits).
    """

    tensor: str
    bits: int
    granularity: Literal["tensor", "channel"] = "tensor"
    start: Literal["linear", "density", "random", "exact"] = "exact"
    grid: Literal["free", "apot", "power_of_two", "ternary"] = "free"
    kind: Literal["share"] = "share"


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Replace a residual block by the identity."""

    module: str
    kind: Literal["drop"] = "drop"


@dataclass(frozen=True, kw_only=True)
class Factor:
    """Replace a layer by a product of smaller ones."""

    module: str
    form: Literal["svd", "tucker2", "cp", "separable"]
    ranks: tuple[int, ...] = ()
    kind: Literal["factor"] = "factor"


Entry = Annotated[Quantize | Prune | Mend | Sparsify | Share | Drop | Factor, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A tuple of entries, applied in order.

    Example:
        >>> from kompakt.plan import Plan, Quantize
        >>> from kompakt.spec import QuantSpec
        >>> plan = Plan(entries=(Quantize(tensor="fc.weight", role="weight", spec=QuantSpec(bits=4)),))
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    entries: tuple[Entry, ...] = ()
    version: Literal[1] = 1

    def of(self, kind: type) -> tuple:
        """The entries of one class, in order."""
        return tuple(entry for entry in self.entries if isinstance(entry, kind))

    def then(self, *entries: Entry) -> "Plan":
        """This plan with more entries at its end."""
        return Plan(entries=(*self.entries, *entries))

    def without(self, *entries: Entry) -> "Plan":
        """This plan less the given entries."""
        gone = set(entries)
        return Plan(entries=tuple(entry for entry in self.entries if entry not in gone))

    def to_json(self) -> str:
        """Write the plan as indented JSON."""
        return _ADAPTER.dump_json(self, indent=1).decode()

    @staticmethod
    def from_json(text: str | bytes) -> "Plan":
        """Read a plan from JSON.

        Raises:
            PlanError: the text is not a plan; the message names the first field that is wrong.
        """
        try:
            return _ADAPTER.validate_json(text, strict=False)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise PlanError(f"plan: {where}: {first['msg']}") from None

    @staticmethod
    def read(path: str | Path) -> "Plan":
        """Read a plan from a JSON file."""
        try:
            return Plan.from_json(Path(path).read_bytes())
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}") from None


def diff(before: Plan, after: Plan) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Return the entries that only ``before`` has and those that only ``after`` has."""
    old, new = set(before.entries), set(after.entries)
    return (
        tuple(entry for entry in before.entries if entry not in new),
        tuple(entry for entry in after.entries if entry not in old),
    )


_ADAPTER = TypeAdapter(Plan)
