"""A user's own loaders behind the interface of a split, and a user's own score."""

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kompakt.errors import InputError
from kompakt.references import describe, load_callable
from kompakt.splits import Augment, check_batches

Metric = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LoaderSplit:
    """An iterable of (inputs, labels) that can be read again and again, in batches of any size.

    Args:
        loader: a ``DataLoader`` or another iterable; each item is a pair of tensors of equal length.
        name: what to call it in messages.
        count: stop after so many examples, if set.
        seed: the state of torch's generator while the loader is read, unless it is shuffled.
    """

    loader: Iterable[object] = field(repr=False)
    name: str
    count: int | None = None
    seed: int = 0

    def __len__(self) -> int:
        """The number of examples; a loader that does not know it is read once."""
        return self._total if self.count is None else min(self._total, self.count)

    @cached_property
    def _total(self) -> int:
        """Examples in the whole loader."""
        loader = self.loader
        if isinstance(loader, DataLoader) and loader.batch_size is not None and isinstance(loader.sampler, Sized):
            whole = len(loader.sampler)
            return whole - whole % loader.batch_size if loader.drop_last else whole
        return sum(len(labels) for _, labels in replace(self, count=None).batches(1024))

    @property
    def labels(self) -> Tensor:
        """All labels in order; reads the loader once."""
        return torch.cat([labels for _, labels in self.batches(1024)])

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augment: Augment | None = None,
        limit: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels, cut into batches of ``batch_size``; the last may be smaller.

        The order is the loader's own. While it is read, torch's random state is set aside and
        starts from ``seed``, or with ``shuffle`` from a number drawn from ``generator``: a loader
        that shuffles gives the same order for the same seed, and a new one for every epoch.

        Args:
            batch_size: examples in a batch.
            shuffle: let the loader's own shuffling differ between passes.
            generator: needed by ``shuffle`` and ``augment``.
            augment: applied to the inputs as they come out of the loader.
            limit: the number of examples after which to stop.

        Raises:
            InputError: the loader fails, yields nothing, or something other than a pair of tensors.
        """
        check_batches(batch_size, shuffle or augment is not None, generator)
        seed = int(torch.randint(2**62, (), generator=generator)) if shuffle else self.seed
        limits = [limit for limit in (limit, self.count) if limit is not None]
        pairs = (_pair(item, self.name) for item in _isolated(self.loader, seed, self.name))
        first = next(pairs, None)
        if first is None:
            raise InputError(f"{self.name}: yields nothing; expected at least one batch of (inputs, labels)")
        for inputs, labels in _cut(chain([first], pairs), batch_size, min(limits) if limits else None):
            if augment is not None:
                assert generator is not None
                inputs = augment(inputs, generator)
            yield inputs, labels

    def subset(self, n: int, seed: int = 0) -> "LoaderSplit":
        """The first ``n`` examples in the order that the loader has under ``seed``."""
        return replace(self, count=n if self.count is None else min(n, self.count), seed=seed)


def loader_split(loader: object, name: str) -> LoaderSplit:
    """Wrap a user's iterable, after a look at its first batch.

    Raises:
        InputError: it cannot be iterated, or only once; it is empty; its items are not pairs of tensors.
    """
    if not isinstance(loader, Iterable):
        raise InputError(f"{name}: is a {type(loader).__name__}, expected a DataLoader or a list of batches")
    if isinstance(loader, Iterator):
        raise InputError(f"{name}: can be read only once; return a DataLoader or a list of batches")
    split = LoaderSplit(loader=loader, name=name)
    next(split.batches(1))
    return split


def load_metric(reference: str) -> Metric:
    """Load a score: ``callable(outputs, labels)``, larger is better.

    It gets the model's outputs N×… and the labels N×… of a batch and returns either N scores (a
    tensor, one an example: then intervals can be paired) or one number, the mean of the batch.

    Returns:
        The callable, whose answer is checked: float64, of shape N or (for one number) of no dimension.

    Raises:
        InputError: the reference cannot be loaded; later, the callable fails or returns something else.
    """
    function = load_callable(reference)

    def metric(outputs: Tensor, labels: Tensor) -> Tensor:
        try:
            score = torch.as_tensor(function(outputs, labels)).detach().to(torch.float64)
        except Exception as error:
            raise InputError(f"{reference}: the metric failed: {describe(error)}") from error
        if score.ndim > 1 or (score.ndim == 1 and len(score) != len(labels)):
            raise InputError(f"{reference}: returned {tuple(score.shape)}, expected {len(labels)} scores or one number")
        if not torch.isfinite(score).all():
            raise InputError(f"{reference}: returned a score that is NaN or infinite")
        return score

    return metric


def _isolated(loader: Iterable[object], seed: int, name: str) -> Iterator[object]:
    """Iterate with torch's random state set aside, so that the order depends on ``seed`` alone."""
    own = getattr(loader, "generator", None)
    if isinstance(own, torch.Generator):
        own.manual_seed(seed)
    iterator: Iterator[object] | None = None
    state: Tensor | None = None
    while True:
        with torch.random.fork_rng(devices=[]):
            if state is None:
                torch.default_generator.manual_seed(seed)
            else:
                torch.set_rng_state(state)
            try:
                iterator = iter(loader) if iterator is None else iterator
                item = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                raise InputError(f"{name}: reading a batch failed: {describe(error)}") from error
            state = torch.get_rng_state()
        yield item


def _pair(item: object, name: str) -> tuple[Tensor, Tensor]:
    """Check one batch of a loader; real inputs become float32 and whole-number labels int64."""
    if not (isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(part, Tensor) for part in item)):
        raise InputError(f"{name}: yields {_kind(item)}, expected (inputs, labels), two tensors")
    inputs, labels = item
    if inputs.ndim == 0 or labels.ndim == 0 or len(inputs) != len(labels):
        shapes = f"{tuple(inputs.shape)} and {tuple(labels.shape)}"
        raise InputError(f"{name}: yields inputs and labels of shapes {shapes}, expected as many of each")
    inputs = inputs.to(torch.float32) if inputs.is_floating_point() else inputs
    return inputs, labels if labels.is_floating_point() else labels.long()


def _cut(pairs: Iterable[tuple[Tensor, Tensor]], size: int, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a stream of batches anew into batches of ``size`` examples, ``limit`` in all."""
    held: list[tuple[Tensor, Tensor]] = []
    left = limit
    for inputs, labels in pairs:
        if left is not None:
            inputs, labels = inputs[:left], labels[:left]
            left -= len(labels)
        held.append((inputs, labels))
        while sum(len(labels) for _, labels in held) >= size:
            inputs, labels = _joined(held)
            yield inputs[:size], labels[:size]
            held = [(inputs[size:], labels[size:])]
        if left == 0:
            break
    inputs, labels = _joined(held)
    if len(labels):
        yield inputs, labels


def _joined(held: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Batches end to end."""
    if len(held) == 1:
        return held[0]
    return torch.cat([inputs for inputs, _ in held]), torch.cat([labels for _, labels in held])


def _kind(item: object) -> str:
    """What a batch is, for a message."""
    if isinstance(item, list | tuple):
        return f"a {type(item).__name__} of {', '.join(type(part).__name__ for part in item) or 'nothing'}"
    return f"a {type(item).__name__}"
