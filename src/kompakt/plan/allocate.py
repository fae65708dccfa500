"""Exact allocation: one option for each item, the best total value within every budget.

The multiple-choice knapsack, solved to optimality by HiGHS (``scipy.optimize.milp``): bits for
layers, widths for channel groups. A cost may be a sum over items, and over pairs of items too: the
MACs of a layer depend on its input's and its output's width, its bit operations on the bits of
weights and activations; such products are linearised exactly, not by fixing one side.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from kompakt.errors import BudgetError, InputError

K = TypeVar("K", bound=Hashable)
O = TypeVar("O", bound=Hashable)  # noqa: E741
C = TypeVar("C")

Array = np.ndarray[Any, np.dtype[np.float64]]
Pairs = Mapping[tuple[int, int], Any]

TOLERANCE = 1e-9  # relative; a budget that equals a sum of floats must not fail by rounding
SCALE = 1e4  # HiGHS's tolerances are absolute (1e-6): rows and objective are brought to this size
MAX_CUTS = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """One kind of cost, by position: Σᵢ options[i][cᵢ] + Σ₍ᵢⱼ₎ pairs[i, j][cᵢ, cⱼ] + fixed ≤ budget.

    Args:
        options: for each item, the cost of each of its options.
        budget: what the total may not exceed.
        pairs: for pairs of items i ≠ j, a matrix (options of i, options of j) of joint costs.
        fixed: cost of everything that is not chosen.
    """

    options: Sequence[Any]
    budget: float
    pairs: Pairs | None = None
    fixed: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedCost(Generic[K, O]):
    """One kind of cost, by name; an item or a pair that is not mentioned costs nothing.

    Args:
        options: item → option → cost.
        budget: what the total may not exceed.
        pairs: (item, other item) → (option, other option) → joint cost.
        fixed: cost of everything that is not chosen.
    """

    options: Mapping[K, Mapping[O, float]]
    budget: float
    pairs: Mapping[tuple[K, K], Mapping[tuple[O, O], float]] | None = None
    fixed: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Allocation(Generic[C]):
    """What was chosen.

    Args:
        choice: an option for each item: indices by position, or options by name.
        value: total value of the choice.
        cost: kind → total cost, ``fixed`` included.
        gap: relative distance to the proven bound; 0 where the optimum is proven, more only where
            the time ran out.
    """

    choice: C
    value: float
    cost: dict[str, float]
    gap: float


def multiple_choice(
    value: Sequence[Any], costs: Mapping[str, Cost], *, maximise: bool = True, seconds: float | None = None
) -> Allocation[tuple[int, ...]]:
    """Choose one option for each item so that the total value is best and every budget holds.

    Kellerer, Pferschy and Pisinger 2004, ch. 11, as a mixed-integer program with binaries x_{io},
    Σₒx_{io} = 1. A joint cost adds y_{ab} ≥ 0 with Σ_b y_{ab} = x_{ia} and Σ_a y_{ab} = x_{jb}.

    Args:
        value: for each item, the value of each of its options.
        costs: kind (``"bytes"``, ``"macs"``, ``"latency_ms"``) → cost and budget.
        maximise: whether more value is better; False for errors.
        seconds: time limit; by default 2 to 60, growing with the number of options.

    Returns:
        The choice: for each item the index of its option.

    Raises:
        InputError: lengths that differ, an item without options, NaN or infinity.
        BudgetError: no choice meets the budgets; the smallest reachable cost is named.

    Example:
        >>> sizes = Cost(options=[[1, 2], [1, 3]], budget=4)
        >>> multiple_choice([[0, 5], [0, 6]], {"bytes": sizes}).choice
        (0, 1)
    """
    program = _Program(value, costs)
    objective = program.objective if not maximise else [-item for item in program.objective]
    limit = seconds if seconds is not None else min(60.0, 2.0 + program.size / 100)
    budgets = {kind: cost.budget for kind, cost in costs.items()}
    found = program.minimise(objective, budgets, limit)
    if found is None:
        raise BudgetError(_unreachable(program, budgets, limit))
    choice, gap = found
    total = float(sum(item[c] for item, c in zip(program.objective, choice, strict=True)))
    return Allocation(choice=choice, value=total, cost={kind: program.cost(kind, choice) for kind in costs}, gap=gap)


def assign(
    value: Mapping[K, Mapping[O, float]],
    costs: Mapping[str, NamedCost[K, O]],
    *,
    maximise: bool = True,
    seconds: float | None = None,
) -> Allocation[dict[K, O]]:
    """Choose one option for each named item (see ``multiple_choice``).

    Args:
        value: item → option → value; it says which options there are.
        costs: kind → cost and budget; items and options not in ``value`` are an error.
        maximise: whether more value is better.
        seconds: time limit.

    Returns:
        The choice: item → option.

    Raises:
        InputError: a cost misses an option of an item that it mentions, or mentions an unknown item.
        BudgetError: no choice meets the budgets.
    """
    names = list(value)
    options = [list(value[name]) for name in names]
    found = multiple_choice(
        [[value[name][option] for option in each] for name, each in zip(names, options, strict=True)],
        {kind: _by_position(kind, cost, names, options) for kind, cost in costs.items()},
        maximise=maximise,
        seconds=seconds,
    )
    choice = {name: each[c] for name, each, c in zip(names, options, found.choice, strict=True)}
    return Allocation(choice=choice, value=found.value, cost=found.cost, gap=found.gap)


def allocate_bits(
    error: Mapping[K, Mapping[int, float]],
    numel: Mapping[K, int],
    *,
    average_bits: float,
    costs: Mapping[str, NamedCost[K, int]] | None = None,
) -> Allocation[dict[K, int]]:
    """Choose a bit width for each tensor: the least total error at ``average_bits`` on average.

    Args:
        error: tensor → bits → measured error (output KL, loss, ...), added up over tensors.
        numel: tensor → number of values (weights), or 0 for what is not stored (activations).
        average_bits: Σ bits·numel may not exceed average_bits·Σ numel.
        costs: further budgets (bit operations, latency) by kind.

    Returns:
        The choice: tensor → bits; ``cost["bits"]`` is the total.

    Raises:
        BudgetError: the average lies below what the options offer; the smallest total is named.
    """
    sizes = {name: {bits: float(bits * numel[name]) for bits in each} for name, each in error.items()}
    total = average_bits * sum(numel[name] for name in error)
    bits = NamedCost(options=sizes, budget=total)
    return assign(error, {"bits": bits, **(costs or {})}, maximise=False)


def allocate_widths(
    scores: Mapping[K, Any], widths: Mapping[K, Sequence[int]], costs: Mapping[str, NamedCost[K, int]]
) -> Allocation[dict[K, int]]:
    """Choose a width for each channel group: the most saliency kept under every budget.

    Args:
        scores: group → (C,) saliency of its channels.
        widths: group → the widths on offer, each from 1 to C.
        costs: kind → cost of each width; layers between two groups go to ``pairs``.

    Returns:
        The choice: group → width.

    Raises:
        InputError: a width outside 1 … C.
        BudgetError: the budgets cannot be met together.
    """
    return assign({name: kept(scores[name], widths[name]) for name in scores}, costs, maximise=True)


def kept(scores: Any, widths: Sequence[int]) -> dict[int, float]:
    """Return for each width w the sum of the w largest scores: (C,) → width → kept saliency.

    Raises:
        InputError: a width outside 1 … C.
    """
    totals = np.cumsum(np.sort(np.asarray(scores, dtype=np.float64))[::-1])
    for width in widths:
        if not 1 <= width <= len(totals):
            raise InputError(f"width {width} is not among 1 to {len(totals)} channels")
    return {width: float(totals[width - 1]) for width in widths}


class _Program:
    """The mixed-integer program: its variables, the equations that tie them, and one row for each kind of cost."""

    def __init__(self, value: Sequence[Any], costs: Mapping[str, Cost]) -> None:
        self.objective = [_finite(item, f"value of item {i}") for i, item in enumerate(value)]
        self.counts = [len(item) for item in self.objective]
        if not self.counts:
            raise InputError("nothing to allocate: there are no items")
        self.costs = {kind: _checked(kind, cost, self.counts) for kind, cost in costs.items()}
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(int)
        self.binaries = int(self.starts[-1])
        self.pairs = sorted({pair for cost in self.costs.values() for pair in cost.pairs or {}})
        cells = [self.counts[i] * self.counts[j] for i, j in self.pairs]
        self.pair_starts = self.binaries + np.concatenate([[0], np.cumsum(cells)]).astype(int)
        self.size = int(self.pair_starts[-1])
        self.equations, self.right = self._equations()
        self.rows = {kind: self._row(cost) for kind, cost in self.costs.items()}

    def _equations(self) -> tuple[csr_array, Array]:
        entries: list[tuple[int, int, float]] = []
        right: list[float] = []
        for i, count in enumerate(self.counts):
            entries += [(len(right), int(self.starts[i]) + o, 1.0) for o in range(count)]
            right.append(1.0)
        for (i, j), start in zip(self.pairs, self.pair_starts, strict=False):
            cells = start + np.arange(self.counts[i] * self.counts[j]).reshape(self.counts[i], self.counts[j])
            for item, lines in ((i, cells), (j, cells.T)):
                for option, line in enumerate(lines):
                    entries += [(len(right), int(cell), 1.0) for cell in line]
                    entries.append((len(right), int(self.starts[item]) + option, -1.0))
                    right.append(0.0)
        rows, columns, values = zip(*entries, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(right), self.size))
        return csr_array(matrix), np.asarray(right)

    def _row(self, cost: Cost) -> Array:
        row = np.zeros(self.size)
        row[: self.binaries] = np.concatenate(list(cost.options))
        for pair, start in zip(self.pairs, self.pair_starts, strict=False):
            if cost.pairs and pair in cost.pairs:
                flat = cost.pairs[pair].ravel()
                row[start : start + len(flat)] = flat
        return row

    def cost(self, kind: str, choice: Sequence[int]) -> float:
        """The exact total cost of a choice, ``fixed`` included."""
        cost = self.costs[kind]
        total = sum(float(item[c]) for item, c in zip(cost.options, choice, strict=True))
        joint = sum(float(matrix[choice[i], choice[j]]) for (i, j), matrix in (cost.pairs or {}).items())
        return total + joint + cost.fixed

    def minimise(
        self, objective: Sequence[Array], budgets: Mapping[str, float], limit: float, joint: Array | None = None
    ) -> tuple[tuple[int, ...], float] | None:
        """The best choice and its gap, or None where no choice meets the budgets.

        The solver's answer is right up to its tolerances; a choice that breaks a budget when it is
        added up exactly is cut off, alone, and the program solved again.
        """
        target = np.zeros(self.size)
        target[: self.binaries] = np.concatenate(list(objective))
        target += 0 if joint is None else joint
        spread = sum(float(np.ptp(item)) for item in objective) + float(np.abs(target[self.binaries :]).sum())
        target *= SCALE / (spread or 1.0)
        limits = {kind: budgets[kind] + TOLERANCE * max(1.0, abs(budgets[kind])) for kind in budgets}
        cuts: list[tuple[int, ...]] = []
        while len(cuts) < MAX_CUTS:
            found = self._solve(target, budgets, cuts, limit)
            if found is None or all(self.cost(kind, found[0]) <= limits[kind] for kind in budgets):
                return found
            cuts.append(found[0])
        return None

    def _solve(
        self, target: Array, budgets: Mapping[str, float], cuts: Sequence[tuple[int, ...]], limit: float
    ) -> tuple[tuple[int, ...], float] | None:
        constraints = [LinearConstraint(self.equations, self.right, self.right)]
        for kind, budget in budgets.items():
            scale = SCALE / (float(np.abs(self.rows[kind]).max()) or 1.0)
            room = (budget - self.costs[kind].fixed) * scale
            constraints.append(LinearConstraint(self.rows[kind][None] * scale, -np.inf, room))
        for choice in cuts:
            row = np.zeros((1, self.size))
            row[0, self.starts[:-1] + np.asarray(choice)] = 1.0
            constraints.append(LinearConstraint(row, -np.inf, len(choice) - 1.0))
        integral = np.concatenate([np.ones(self.binaries), np.zeros(self.size - self.binaries)])
        for seconds in (limit, 4 * limit):  # a second try where the first found nothing at all
            options = {"time_limit": seconds, "mip_rel_gap": 0.0}
            result = milp(target, integrality=integral, bounds=Bounds(0, 1), constraints=constraints, options=options)
            if result.x is not None:
                x = np.split(result.x[: self.binaries], self.starts[1:-1])
                gap = 0.0 if result.status == 0 else float(result.mip_gap)
                return tuple(int(part.argmax()) for part in x), gap
            if result.status == 2:
                return None
        raise BudgetError(f"no allocation was found in {5 * limit:.0f} s; offer fewer options or give more seconds")

    def smallest(self, kind: str, budgets: Mapping[str, float], limit: float) -> float | None:
        """The smallest reachable cost of one kind while the other kinds keep to ``budgets``, if any."""
        joint = self.rows[kind].copy()
        joint[: self.binaries] = 0
        found = self.minimise([np.asarray(item) for item in self.costs[kind].options], budgets, limit, joint)
        return None if found is None else self.cost(kind, found[0])


def _unreachable(program: _Program, budgets: Mapping[str, float], limit: float) -> str:
    alone = {kind: program.smallest(kind, {}, limit) for kind in budgets}
    for kind, least in alone.items():
        if least is not None and least > budgets[kind]:
            return f"{kind}: a budget of {budgets[kind]:.10g} cannot be met; the smallest reachable is {least:.10g}"
    for kind in budgets:
        rest = {other: budget for other, budget in budgets.items() if other != kind}
        least = program.smallest(kind, rest, limit)
        if least is not None:
            others = ", ".join(f"{other} ≤ {budget:.10g}" for other, budget in rest.items())
            return f"{kind}: {budgets[kind]:.10g} cannot be met with {others}; the smallest reachable is {least:.10g}"
    each = ", ".join(f"{kind} {least:.10g}" for kind, least in alone.items() if least is not None)
    return f"the budgets cannot be met together; the smallest reachable, each alone: {each}"


def _finite(item: Any, where: str) -> Array:
    array = np.asarray(item, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{where}: expected one number for each option, found shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{where}: NaN or infinity at option {int(np.argmin(np.isfinite(array)))}")
    return array


def _checked(kind: str, cost: Cost, counts: Sequence[int]) -> Cost:
    options = [_finite(item, f"{kind} of item {i}") for i, item in enumerate(cost.options)]
    if [len(item) for item in options] != list(counts):
        raise InputError(f"{kind}: options per item {[len(item) for item in options]}, expected {list(counts)}")
    if not np.isfinite(cost.fixed) or np.isnan(cost.budget):
        raise InputError(f"{kind}: budget {cost.budget} and fixed cost {cost.fixed} must be numbers")
    joint: dict[tuple[int, int], Array] = {}
    for (i, j), given in (cost.pairs or {}).items():
        matrix = np.asarray(given, dtype=np.float64)
        if i == j or matrix.shape != (counts[i], counts[j]) or not np.isfinite(matrix).all():
            expected = (counts[i], counts[j])
            raise InputError(f"{kind} of items {i} and {j}: expected a finite matrix {expected}, found {matrix.shape}")
        key, matrix = ((i, j), matrix) if i < j else ((j, i), matrix.T)
        joint[key] = joint.get(key, 0.0) + matrix
    return Cost(options=options, budget=float(cost.budget), pairs=joint, fixed=float(cost.fixed))


def _by_position(kind: str, cost: NamedCost[K, O], names: list[K], options: list[list[O]]) -> Cost:
    where = {name: i for i, name in enumerate(names)}
    unknown = [name for name in (*cost.options, *(n for pair in cost.pairs or {} for n in pair)) if name not in where]
    if unknown:
        raise InputError(f"{kind}: {unknown[0]} has a cost but no value")
    try:
        single = [
            [cost.options[name][o] for o in each] if name in cost.options else [0.0] * len(each)
            for name, each in zip(names, options, strict=True)
        ]
        joint = {
            (where[a], where[b]): [[table[p, q] for q in options[where[b]]] for p in options[where[a]]]
            for (a, b), table in (cost.pairs or {}).items()
        }
    except KeyError as error:
        raise InputError(f"{kind}: no cost is given for option {error.args[0]}") from None
    return Cost(options=single, budget=cost.budget, pairs=joint, fixed=cost.fixed)
