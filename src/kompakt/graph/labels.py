"""Labels of channels: integers that are united where channels stand or fall together.

Every index along every dimension of a tensor carries a label; label 0 is an index that stays for
ever. Constraints are collected as arrays and solved at once (``Labels.roots``), so that a network of
a million labels takes a fraction of a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Array = np.ndarray[Any, np.dtype[np.int64]]
Dims = tuple[Array, ...]


@dataclass(frozen=True, eq=False)
class Factor:
    """A dimension that is a product of axes: entry (i, j, …) goes when i, or j, or … goes.

    Args:
        labels: labels of the entries, one array axis for each factor.
        axes: the labels of each factor.
    """

    labels: Array
    axes: tuple[Array, ...]


class Labels:
    """A builder: hands out labels and collects what ties them; ``roots`` solves it."""

    def __init__(self) -> None:
        self._count = 1
        self._left: list[Array] = []
        self._right: list[Array] = []
        self._marks: list[tuple[Array, str]] = []
        self._factors: list[Factor] = []
        self._heads: list[Array] = []

    def fresh(self, size: int) -> Array:
        """Hand out ``size`` labels that nothing ties yet."""
        start = self._count
        self._count += size
        return np.arange(start, start + size, dtype=np.int64)

    def unite(self, left: Array, right: Array, reason: str = "tied to a dimension of fixed size") -> None:
        """Tie labels pairwise; an index tied to one that stays for ever stays too."""
        left, right = np.broadcast_arrays(left, right)
        fixed = (left == 0) | (right == 0)
        if fixed.any():
            self.freeze(np.maximum(left, right)[fixed], reason)
        self._left.append(left[~fixed].ravel())
        self._right.append(right[~fixed].ravel())

    def freeze(self, labels: Array, reason: str) -> None:
        """Keep indices for ever, for a reason."""
        alive = np.unique(labels[labels > 0])
        if alive.size:
            self._marks.append((alive, reason))

    def heads(self, labels: Array) -> None:
        """Say that a dimension counts independent repetitions of one product (attention heads)."""
        if labels.any():
            self._heads.append(labels)

    def merge(self, dims: Sequence[Array]) -> Array:
        """Label a dimension made of several, row-major."""
        sizes = [len(dim) for dim in dims]
        alive = [axis for axis, dim in enumerate(dims) if dim.any()]
        if not alive:
            return np.zeros(int(np.prod(sizes)), dtype=np.int64)
        if len(alive) == 1:
            shape = [1] * len(dims)
            shape[alive[0]] = -1
            return np.broadcast_to(dims[alive[0]].reshape(shape), sizes).ravel()
        distinct = [np.unique(dims[axis], return_inverse=True) for axis in alive]
        counts = [len(values) for values, _ in distinct]
        entries = self.fresh(int(np.prod(counts))).reshape(counts)
        self._factors.append(Factor(entries, tuple(values for values, _ in distinct)))
        picked: list[Array] = [np.zeros(size, dtype=np.int64) for size in sizes]
        for axis, (_, inverse) in zip(alive, distinct, strict=True):
            picked[axis] = inverse
        grid = np.ix_(*picked)
        return np.broadcast_to(entries[tuple(grid[axis] for axis in alive)], sizes).reshape(-1)

    def split(self, labels: Array, sizes: Sequence[int]) -> Dims:
        """Label the dimensions that one dimension is read as, row-major."""
        grid = labels.reshape(tuple(sizes))
        if not labels.any():
            return tuple(np.zeros(size, dtype=np.int64) for size in sizes)
        found = [_distinct_slices(grid, axis) for axis in range(grid.ndim)]
        moving = [axis for axis, (first, _) in enumerate(found) if len(first) > 1]
        dims: list[Array] = [np.zeros(size, dtype=np.int64) for size in sizes]
        if not moving:
            self.freeze(labels, "one unit fills the whole dimension")
        elif len(moving) == 1:
            dims[moving[0]] = grid[tuple(slice(None) if axis == moving[0] else 0 for axis in range(grid.ndim))]
        else:
            picked = np.ix_(*(first if axis in moving else np.zeros(1, int) for axis, (first, _) in enumerate(found)))
            fresh = [self.fresh(len(found[axis][0])) for axis in moving]
            entries = grid[picked].reshape([len(values) for values in fresh])
            self._factors.append(Factor(entries, tuple(fresh)))
            for axis, values in zip(moving, fresh, strict=True):
                dims[axis] = values[found[axis][1]]
        return tuple(dims)

    def roots(self) -> Array:
        """Solve: for every label the number of its class, 0 for those that stay."""
        component = self._components()
        stays = np.zeros(component.max() + 1, dtype=bool)
        stays[component[0]] = True
        for labels, _ in self._marks:
            stays[component[labels]] = True
        return np.where(stays[component], 0, component + 1)

    def reasons(self) -> tuple[Array, dict[int, str]]:
        """Say why labels were frozen: the class of every label (before freezing), and class → first reason."""
        component = self._components()
        why: dict[int, str] = {}
        for labels, reason in self._marks:
            for number in np.unique(component[labels]).tolist():
                why.setdefault(number, reason)
        return component, why

    def _components(self) -> Array:
        empty = np.zeros(0, dtype=np.int64)
        left, right = (np.concatenate([empty, *edges]) for edges in (self._left, self._right))
        graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(self._count, self._count))
        return connected_components(graph, directed=False)[1].astype(np.int64)

    def settle(self) -> None:
        """Decide every product of axes: one of its axes can be cut, the others stay whole.

        An axis that cannot be cut for other reasons leaves the choice to the rest; between axes that
        both can, heads come first, then the longest.
        """
        pending = list(self._factors)
        while pending:
            root = self.roots()
            heads = {int(value) for labels in self._heads for value in root[labels]} - {0}
            undecided = []
            for factor in pending:
                alive = [axis for axis, labels in enumerate(factor.axes) if len(np.unique(root[labels])) > 1]
                if len(alive) > 1:
                    undecided.append((factor, alive))
                else:
                    self._decide(factor, alive[0] if alive else None)
            if len(undecided) == len(pending):
                for factor, alive in undecided:
                    self._choose(factor, alive, root, heads)
            pending = [factor for factor, _ in undecided]

    def _decide(self, factor: Factor, alive: int | None) -> None:
        """Tie the entries of a product to the one axis that can be cut."""
        for axis, labels in enumerate(factor.axes):
            if axis != alive:
                self.freeze(labels, "the other axis of a reshape is the one that is cut")
        if alive is None:
            self.freeze(factor.labels, "a reshape of dimensions of fixed size")
            return
        shape = [1] * factor.labels.ndim
        shape[alive] = -1
        self.unite(factor.labels, factor.axes[alive].reshape(shape), "a reshape of dimensions of fixed size")

    def _choose(self, factor: Factor, alive: list[int], root: Array, heads: set[int]) -> None:
        """Freeze all axes but one."""
        marked = [axis for axis in alive if heads & {int(value) for value in root[factor.axes[axis]]}]
        chosen = max(marked or alive, key=lambda axis: len(np.unique(root[factor.axes[axis]])))
        for axis in alive:
            if axis != chosen:
                self.freeze(factor.axes[axis], "the other axis of a reshape is the one that is cut")


def _distinct_slices(grid: Array, axis: int) -> tuple[Array, Array]:
    """Find which slices along ``axis`` are equal: first index of each kind, and each slice's kind.

    Slices are compared by a random 64-bit hash (the sum of label × weight), which is exact for the
    few thousand slices of a network but for a chance of about 2⁻⁴⁰.
    """
    rows = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)
    weights = np.random.default_rng(rows.shape[1]).integers(1, 2**62, rows.shape[1], dtype=np.int64)
    with np.errstate(over="ignore"):
        hashes = (rows * weights).sum(1)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first, inverse
