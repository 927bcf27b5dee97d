"""The data as a fixed sequence of batches: adapters for tensors, Datasets and loaders, and the proof that they stand still.

A batch is any nesting of dicts, lists and tuples of tensors whose first axis counts examples. Every example is hashed, so that
the same set of examples has one fingerprint in whatever batches and order it comes, and a second reading can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .errors import NotDeterministic
from .state import rng_kept

Batch = Any
Hashes = np.ndarray[Any, np.dtype[np.uint64]]  # one 64-bit number per example
CACHE_BYTES = 256 * 2**20  # a loader's batches are kept in memory up to here; beyond, they are read anew in every pass
DEFAULT_BATCH = 512


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """The same nesting with `function` applied to every tensor; other leaves stay as they are."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
        if type(batch) is dict:
            return mapped
        other = copy.copy(batch)  # keeps attribute access, as in transformers' BatchEncoding
        for key, value in mapped.items():
            other[key] = value  # type: ignore[index]
        return other
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a namedtuple
        return type(batch)(*(map_tensors(function, item) for item in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(function, item) for item in batch)
    return batch


def as_double(batch: Batch) -> Batch:
    """The same nesting with floating-point tensors in float64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)


def tensors_in(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch, depth first."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def count_examples(batch: Batch) -> int:
    """Length of the first axis of the first tensor."""
    tensors = [tensor for tensor in tensors_in(batch) if tensor.ndim > 0]
    return len(tensors[0]) if tensors else 1


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """The examples `rows` of a batch; tensors that do not count examples stay whole."""
    count = count_examples(batch)
    return map_tensors(lambda t: t[rows.to(t.device)] if t.ndim > 0 and len(t) == count else t, batch)


@dataclass(frozen=True)
class Reading:
    """What one pass over the data gave: a hash per example, in order, and how they were grouped."""

    hashes: Hashes
    sizes: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """Depends on the set of examples, not on their order or batching."""
        return f"{len(self.hashes)}-{int(self.hashes.sum(dtype=np.uint64)):016x}"

    @property
    def grouping(self) -> int:
        """Depends on which examples share a batch, not on the order of batches or within one."""
        starts = np.cumsum((0, *self.sizes[:-1]))
        return int(_mix(np.add.reduceat(self.hashes, starts)).sum(dtype=np.uint64)) if len(self.hashes) else 0


@dataclass(frozen=True)
class Batches:
    """Re-iterable batches, proven to be the same set of examples in every pass."""

    source: Iterable[Batch]
    prepare: Callable[[Tensor], Tensor]  # moves a tensor to the objective's device and dtype
    kept: list[Batch] | None  # the prepared batches, where they fit
    reading: Reading
    ordered: bool  # the order of examples is the same in every pass
    exact: bool = True  # examples hash alike in every pass (padding that depends on the batch makes them differ)
    generators: Sequence[torch.Generator] = field(default_factory=tuple)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """(index of the batch's first example, batch)."""
        if self.kept is not None:
            start = 0
            for batch, size in zip(self.kept, self.reading.sizes, strict=True):
                yield start, batch
                start += size
            return
        hashes: list[Any] = []
        with rng_kept(), _generators_kept(self.generators):
            for start, batch, found in self._read():
                hashes.append(found)
                yield start, batch
        now = Reading(np.concatenate(hashes), tuple(len(h) for h in hashes))
        if now.fingerprint != self.reading.fingerprint and (self.exact or len(now.hashes) != len(self.reading.hashes)):
            raise NotDeterministic(explain_difference(self.reading, now, self.source))

    def twice(self) -> Iterator[Iterator[tuple[int, Batch]]]:
        """Two passes straight from the source, the second with whatever random state the first has left."""
        with rng_kept(), _generators_kept(self.generators):
            for _ in range(2):
                yield ((start, batch) for start, batch, _ in self._read())

    def _read(self) -> Iterator[tuple[int, Batch, Hashes]]:
        start = 0
        for batch in self.source:
            yield start, map_tensors(self.prepare, batch), hash_examples(batch)
            start += count_examples(batch)

    @property
    def repeats(self) -> bool:
        """Whether every pass gives the batches of the first one, in its order."""
        return self.ordered or self.kept is not None

    @property
    def examples(self) -> int:
        return len(self.reading.hashes)


def read_batches(data: Any, *, batch_size: int | None, prepare: Callable[[Tensor], Tensor], whole: bool, opaque: bool = False) -> Batches:
    """Adapt `data`, read it twice, and refuse what does not stand still.

    `whole`: the user's batches are part of the definition of the loss, so their grouping must be fixed too, and tensors without
    a `batch_size` are one batch. `opaque`: every element of `data` is a batch as it is.
    """
    source = adapt(data, batch_size=batch_size, whole=whole, opaque=opaque)
    generators = _generators_of(source)
    still = isinstance(source, (list, tuple))
    kept: list[Batch] | None = []
    used = 0
    hashes: list[Any] = []
    with rng_kept(), _generators_kept(generators):
        for batch in source:
            hashes.append(hash_examples(batch))
            used += 0 if still else sum(t.numel() * t.element_size() for t in tensors_in(batch))
            kept = kept if used <= CACHE_BYTES else None
            if kept is not None:
                kept.append(map_tensors(prepare, batch))
        if not hashes or not sum(map(len, hashes)):
            raise ValueError("data is empty: it yields no example. Pass (inputs, targets), a Dataset, or an iterable of batches.")
        first = Reading(np.concatenate(hashes), tuple(len(h) for h in hashes))
        second = first
        if not still:
            again = [hash_examples(batch) for batch in source]
            second = Reading(np.concatenate([np.empty(0, np.uint64), *again]), tuple(len(h) for h in again))
    _refuse_dropping(source, whole)
    exact = first.fingerprint == second.fingerprint
    if not exact and (len(first.hashes) != len(second.hashes) or not _padding_may_differ(source)):
        raise NotDeterministic(explain_difference(first, second, source))
    if whole and first.grouping != second.grouping:
        raise NotDeterministic(
            'mode="batch" makes the batches part of the loss, and this data groups its examples differently in each pass. '
            "Use shuffle=False, or a list of batches."
        )
    ordered = exact and bool((first.hashes == second.hashes).all())
    return Batches(source, prepare, kept, first, ordered, exact, generators)


def is_pair(data: Any) -> bool:
    """Whether the data are two tensors, (inputs, targets)."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(item, Tensor) for item in data)


def adapt(data: Any, *, batch_size: int | None, whole: bool, opaque: bool) -> Iterable[Batch]:
    """An iterable of batches from (inputs, targets), a Dataset or a re-iterable of batches."""
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r} needs a positive whole number of examples.")
    if isinstance(data, Tensor):
        raise TypeError("data is one tensor. Pass (inputs, targets), a Dataset, or an iterable of batches (with forward= if they are no pairs).")
    if is_pair(data) and not opaque:
        inputs, targets = data
        if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
            raise ValueError(f"data=(inputs, targets) needs as many targets as inputs, got shapes {tuple(inputs.shape)} and {tuple(targets.shape)}.")
        size = batch_size or (max(len(inputs), 1) if whole else DEFAULT_BATCH)
        return list(zip(inputs.split(size), targets.split(size), strict=True))
    if isinstance(data, Dataset) and not opaque:
        items = len(data) if not isinstance(data, IterableDataset) else None  # type: ignore[arg-type]
        if items == 0:
            raise ValueError("data is empty: the Dataset has length 0.")
        return DataLoader(data, batch_size=batch_size or (items if whole and items else DEFAULT_BATCH))
    if not isinstance(data, Iterable):
        raise TypeError(f"data is a {type(data).__name__}. Pass (inputs, targets), a Dataset, or an iterable of batches.")
    if isinstance(data, Iterator):
        raise NotDeterministic("data can be read only once (it is an iterator or generator). Pass a list of batches or a DataLoader, which start anew in every pass.")
    if batch_size is not None:
        raise ValueError("batch_size is for (inputs, targets) and Datasets; this data already comes in batches. Leave batch_size out.")
    return data


_weights: dict[int, Hashes] = {}


def hash_examples(batch: Batch) -> Hashes:
    """A 64-bit hash of every example of a batch (n,), from its bytes."""
    count = count_examples(batch)
    total = np.zeros(count, np.uint64)
    if not count:
        return total
    for salt, tensor in enumerate(tensors_in(batch), start=1):
        raw = tensor.detach().cpu().contiguous()
        per_example = raw.ndim > 0 and len(raw) == count
        flat = raw.reshape(count if per_example else 1, -1)
        octets = flat.view(torch.uint8).numpy() if flat.numel() else np.zeros((len(flat), 1), np.uint8)
        padded = np.pad(octets, ((0, 0), (0, -octets.shape[1] % 8)))
        words = np.ascontiguousarray(padded).view(np.uint64)
        length = words.shape[1]
        if length not in _weights:
            _weights[length] = np.random.default_rng(0).integers(0, 2**64, length, np.uint64) | np.uint64(1)
        total += _mix(_mix(words ^ _weights[length]).sum(axis=1, dtype=np.uint64) + np.uint64(salt))  # mixed first: sums of few-bit words collide
    return _mix(total)


def _mix(x: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def explain_difference(first: Reading, second: Reading, source: Any) -> str:
    """Why two passes over the data differ, and what to do about it."""
    before, after = len(first.hashes), len(second.hashes)
    if after == 0:
        return f"data can be read only once: the first pass gave {before} examples, the second none. Pass a list of batches or a DataLoader."
    if before != after:
        return f"data changes between passes: {before} examples, then {after}. The loss must be over one fixed set."
    if getattr(source, "drop_last", False):
        return "data changes between passes: drop_last=True with shuffling leaves out different examples each time. Use drop_last=False."
    shared = len(np.intersect1d(first.hashes, second.hashes)) / before
    if shared > 0.2:
        return (
            f"data changes between passes: only {shared:.0%} of the examples come again. A sampler that draws at random, or random "
            "augmentation of some examples, is at work. Use a sampler without replacement over the whole set, and no augmentation."
        )
    return (
        "data changes between passes: the examples themselves come out different each time, so random augmentation is at work "
        "(in the Dataset's transform or in collate_fn). Turn it off, or pass a list of already augmented batches."
    )


def _refuse_dropping(source: Any, whole: bool) -> None:
    """A loader that leaves out the last examples does not give the loss of the whole set."""
    if isinstance(source, DataLoader) and source.drop_last and source.batch_size and not isinstance(source.dataset, IterableDataset):
        left_out = len(source.sampler) % source.batch_size  # type: ignore[arg-type]
        shuffled = not isinstance(source.sampler, torch.utils.data.SequentialSampler)
        if left_out and (shuffled or not whole):
            raise NotDeterministic(
                f"DataLoader(drop_last=True) leaves out {left_out} of {len(source.sampler)} examples. "  # type: ignore[arg-type]
                "Use drop_last=False: a shorter last batch is weighted as it should be."
            )


def _padding_may_differ(source: Any) -> bool:
    """Whether a collate function pads to the longest example of the batch, so that shuffling changes an example's bytes."""
    return isinstance(source, DataLoader) and source.collate_fn is not torch.utils.data.default_collate


def _generators_of(source: Any) -> list[torch.Generator]:
    holders = [source, getattr(source, "sampler", None), getattr(getattr(source, "batch_sampler", None), "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


@contextmanager
def _generators_kept(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """A loader's own generators are afterwards what they were before."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
