from itertools import product

import numpy as np
import pytest

from kompakt.errors import BudgetError, InputError
from kompakt.plan.allocate import Cost, NamedCost, allocate_bits, allocate_widths, assign, kept, multiple_choice


def total(cost, choice):
    single = sum(item[c] for item, c in zip(cost.options, choice, strict=True))
    return single + sum(m[choice[i]][choice[j]] for (i, j), m in (cost.pairs or {}).items()) + cost.fixed


def brute(value, costs, maximise):
    """The best total value over every assignment, or None."""
    best = None
    for choice in product(*(range(len(item)) for item in value)):
        if all(total(cost, choice) <= cost.budget * (1 + 1e-9) for cost in costs.values()):
            worth = sum(item[c] for item, c in zip(value, choice, strict=True))
            if best is None or (worth > best if maximise else worth < best):
                best = worth
    return best


def instance(seed, kinds=1, pairs=False):
    r = np.random.default_rng(seed)
    counts = r.integers(1, 5, size=5)
    value = [r.random(n) * r.lognormal(0, 2) for n in counts]
    costs = {}
    for kind in range(kinds):
        options = [r.random(n) * r.lognormal(0, 2) for n in counts]
        joint = {(i, j): r.random((counts[i], counts[j])) for i, j in [(0, 1), (1, 2), (4, 2)]} if pairs else None
        low, high = sum(o.min() for o in options), sum(o.max() for o in options) + (3 if pairs else 0)
        costs[f"kind{kind}"] = Cost(options=options, budget=r.uniform(low, high) + 0.25, pairs=joint, fixed=0.25)
    return value, costs


@pytest.mark.parametrize("maximise", [True, False])
@pytest.mark.parametrize(("kinds", "pairs"), [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize("seed", range(6))
def test_equals_brute_force(seed, kinds, pairs, maximise):
    value, costs = instance(seed, kinds, pairs)
    expected = brute(value, costs, maximise)
    if expected is None:
        with pytest.raises(BudgetError):
            multiple_choice(value, costs, maximise=maximise)
        return
    found = multiple_choice(value, costs, maximise=maximise)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.gap == 0
    assert found.value == pytest.approx(sum(item[c] for item, c in zip(value, found.choice, strict=True)))
    for kind, cost in costs.items():
        assert found.cost[kind] == pytest.approx(total(cost, found.choice))
        assert found.cost[kind] <= cost.budget * (1 + 1e-9)


def test_value_is_monotone_in_the_budget():
    value, costs = instance(3)
    options = costs["kind0"].options
    low, high = sum(o.min() for o in options), sum(o.max() for o in options)
    values = [
        multiple_choice(value, {"bytes": Cost(options=options, budget=budget)}).value
        for budget in np.linspace(low, high, 12)
    ]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(sum(item.max() for item in value))


def test_a_budget_met_to_the_last_byte_is_met_and_one_byte_less_is_not_exceeded():
    r = np.random.default_rng(0)
    sizes = [np.cumsum(r.integers(10_000, 10_000_000, size=6)) for _ in range(12)]
    value = [np.cumsum(r.random(6)) for _ in sizes]
    wanted = [5, 4, 3, 2, 1, 0, 5, 4, 3, 2, 1, 0]
    budget = int(sum(s[c] for s, c in zip(sizes, wanted, strict=True)))
    exact = multiple_choice(value, {"bytes": Cost(options=sizes, budget=budget)})
    assert exact.cost["bytes"] <= budget
    assert exact.value >= sum(v[c] for v, c in zip(value, wanted, strict=True)) - 1e-9
    below = multiple_choice(value, {"bytes": Cost(options=sizes, budget=exact.cost["bytes"] - 1)})
    assert below.cost["bytes"] <= exact.cost["bytes"] - 1
    assert below.value <= exact.value


def test_sixty_items_of_sixteen_options_are_solved_to_proven_optimality():
    r = np.random.default_rng(1)
    sizes = [r.integers(1_000, 100_000) * np.arange(1, 17) for _ in range(60)]
    error = [s[0] * 4.0 ** -np.arange(1, 17) * r.random() for s in sizes]
    budget = 0.4 * sum(s[-1] for s in sizes)
    found = multiple_choice(error, {"bits": Cost(options=sizes, budget=budget)}, maximise=False)
    assert found.gap == 0
    uniform = sum(e[5] for e in error)  # six of sixteen steps: 0.375 of the whole, within the budget
    assert found.value < uniform


def test_joint_costs_see_what_a_linearised_cost_misses():
    widths = np.array([1.0, 2.0, 4.0])
    value = [widths, widths, widths]
    pairs = {(0, 1): np.outer(widths, widths), (1, 2): np.outer(widths, widths)}
    nothing = [np.zeros(3)] * 3
    found = multiple_choice(value, {"macs": Cost(options=nothing, budget=8, pairs=pairs)})
    assert found.choice == (2, 0, 2)
    assert found.cost["macs"] == 8


def test_infeasible_names_the_smallest_reachable():
    sizes = Cost(options=[[3, 5], [4, 9]], budget=6)
    with pytest.raises(BudgetError, match="bytes: a budget of 6 cannot be met; the smallest reachable is 7"):
        multiple_choice([[0, 1], [0, 1]], {"bytes": sizes})
    pairs = {(0, 1): [[5, 1], [2, 9]]}
    with pytest.raises(BudgetError, match=r"macs: a budget of 0.5 cannot be met; the smallest reachable is 1$"):
        multiple_choice([[0, 1], [0, 1]], {"macs": Cost(options=[[0, 0], [0, 0]], budget=0.5, pairs=pairs)})
    opposed = {"a": Cost(options=[[0, 4]], budget=1), "b": Cost(options=[[4, 0]], budget=1)}
    with pytest.raises(BudgetError, match="a: 1 cannot be met with b ≤ 1; the smallest reachable is 4"):
        multiple_choice([[0, 0]], opposed)
    third = {**opposed, "c": Cost(options=[[4, 0]], budget=1), "d": Cost(options=[[0, 4]], budget=1)}
    with pytest.raises(BudgetError, match="each alone: a 0, b 0, c 0, d 0"):
        multiple_choice([[0, 0]], third)


def test_names_come_back():
    value = {"conv": {"small": 1.0, "large": 3.0}, "fc": {"small": 1.0, "large": 2.0}}
    size = NamedCost(options={"conv": {"small": 1, "large": 4}, "fc": {"small": 1, "large": 4}}, budget=5)
    found = assign(value, {"bytes": size})
    assert found.choice == {"conv": "large", "fc": "small"}
    assert found.cost == {"bytes": 5}
    free = NamedCost(options={"fc": {"small": 1, "large": 4}}, budget=1)
    assert assign(value, {"bytes": free}).choice == {"conv": "large", "fc": "small"}


def test_bit_operations_are_products_of_two_choices():
    error = {"w": {4: 3.0, 8: 0.0}, "a": {4: 2.0, 8: 0.0}}
    bops = {("w", "a"): {(p, q): float(p * q) for p in (4, 8) for q in (4, 8)}}
    cost = NamedCost(options={}, budget=32, pairs=bops)
    assert assign(error, {"bops": cost}, maximise=False).choice == {"w": 8, "a": 4}


def test_bits_are_at_least_as_good_as_uniform_at_the_same_average():
    r = np.random.default_rng(5)
    numel = {f"layer{i}": int(r.integers(100, 10_000)) for i in range(12)}
    error = {name: {b: float(r.lognormal(0, 2) * 4.0**-b) for b in range(1, 9)} for name in numel}
    for average in (2, 3, 4, 6):
        found = allocate_bits(error, numel, average_bits=average)
        assert sum(numel[n] * b for n, b in found.choice.items()) <= average * sum(numel.values())
        assert found.value <= sum(each[average] for each in error.values())
    assert set(allocate_bits(error, numel, average_bits=8).choice.values()) <= set(range(1, 9))
    with pytest.raises(BudgetError, match=f"smallest reachable is {float(sum(numel.values())):.10g}"):
        allocate_bits(error, numel, average_bits=0.5)


def test_widths_keep_the_most_saliency():
    scores = {"a": np.array([1.0, 10.0, 2.0, 20.0]), "b": np.array([1.0, 1.0, 1.0, 1.0])}
    widths = {"a": (1, 2, 4), "b": (1, 2, 4)}
    macs = NamedCost(options={name: {w: float(w) for w in widths[name]} for name in widths}, budget=5)
    found = allocate_widths(scores, widths, {"macs": macs})
    assert found.choice == {"a": 4, "b": 1}
    assert found.value == 34
    assert kept([3.0, 1.0, 2.0], (1, 3)) == {1: 3.0, 3: 6.0}
    with pytest.raises(InputError, match="width 5 is not among 1 to 4"):
        allocate_widths(scores, {"a": (5,), "b": (1,)}, {})


def test_bad_input_is_named():
    fine = Cost(options=[[1, 2]], budget=2)
    with pytest.raises(InputError, match="no items"):
        multiple_choice([], {})
    with pytest.raises(InputError, match="value of item 0: NaN or infinity at option 1"):
        multiple_choice([[1, float("nan")]], {"bytes": fine})
    with pytest.raises(InputError, match=r"bytes: options per item \[2\], expected \[3\]"):
        multiple_choice([[1, 2, 3]], {"bytes": fine})
    with pytest.raises(InputError, match="value of item 0: expected one number for each option"):
        multiple_choice([[]], {})
    with pytest.raises(InputError, match="budget nan"):
        multiple_choice([[1, 2]], {"bytes": Cost(options=[[1, 2]], budget=float("nan"))})
    with pytest.raises(InputError, match=r"macs of items 0 and 1: expected a finite matrix \(1, 2\)"):
        multiple_choice([[1], [1, 2]], {"macs": Cost(options=[[0], [0, 0]], budget=1, pairs={(0, 1): [[1]]})})
    with pytest.raises(InputError, match="fc has a cost but no value"):
        assign({"conv": {1: 1.0}}, {"bytes": NamedCost(options={"fc": {1: 1.0}}, budget=1)})
    with pytest.raises(InputError, match="no cost is given for option 2"):
        assign({"conv": {1: 1.0, 2: 1.0}}, {"bytes": NamedCost(options={"conv": {1: 1.0}}, budget=1)})
