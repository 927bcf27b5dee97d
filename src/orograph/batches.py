"""The data as a fixed sequence of batches: adapters for tensors, Datasets and loaders, and the proof that they stand still.

Every example is hashed, so that the same set has one fingerprint in whatever batches and order it comes, and a second reading can be
compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .errors import NotDeterministic
from .loaders import generators_of, padding_may_differ, refuse_incomplete
from .nesting import Batch, count_examples, count_numbers, map_tensors, take_rows, tensors_in
from .surroundings import rng_kept

Hashes = np.ndarray[Any, np.dtype[np.uint64]]  # one 64-bit number per example
CACHE_BYTES = 256 * 2**20  # a loader's batches are kept in memory up to here; beyond, they are read anew in every pass
DEFAULT_BATCH = 512


@dataclass(frozen=True)
class Reading:
    """What one pass over the data gave: a hash per example, in order, and how they were grouped."""

    hashes: Hashes
    sizes: tuple[int, ...]
    elements: tuple[int, ...] = ()  # numbers in every batch, all its tensors together

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
    ordered: bool  # the order of examples is the data's own: the same in every pass over the source
    exact: bool = True  # examples hash alike in every pass (padding that depends on the batch makes them differ)
    generators: Sequence[torch.Generator] = ()
    view: Callable[[Batch], Iterable[tuple[int, Batch]]] | None = None  # batch -> (offset, batch) of what it is cut or turned into

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """(index of the batch's first example, batch)."""
        if self.view is None:
            yield from self._whole()
            return
        for start, batch in self._whole():
            for offset, part in self.view(batch):
                yield start + offset, part

    def _whole(self) -> Iterator[tuple[int, Batch]]:
        if self.kept is not None:
            yield from zip(np.cumsum((0, *self.reading.sizes[:-1])).tolist(), self.kept, strict=True)
            return
        hashes: list[Any] = []
        for start, batch, found in _drawn(self._read(), self.generators, []):
            hashes.append(found)
            yield start, batch
        now = Reading(np.concatenate(hashes), tuple(len(h) for h in hashes))
        if now.fingerprint != self.reading.fingerprint and (self.exact or len(now.hashes) != len(self.reading.hashes)):
            raise NotDeterministic(explain_difference(self.reading, now, self.source))

    def twice(self) -> Iterator[Iterator[tuple[int, Batch]]]:
        """Two passes straight from the source, the second with whatever random state the first has left."""
        stream: list[Any] = []
        for _ in range(2):
            yield ((start, batch) for start, batch, _ in _drawn(self._read(), self.generators, stream))

    def picked(self, rows: Tensor) -> list[Batch]:
        """The examples with the indices `rows`, in order, in the batches that they came in."""
        chosen, parts = rows.sort().values, []
        for first, batch in self:
            inside = chosen[(chosen >= first) & (chosen < first + count_examples(batch))] - first
            if len(inside):
                parts.append(take_rows(batch, inside))
        return parts

    def _read(self) -> Iterator[tuple[int, Batch, Hashes]]:
        start = 0
        for batch in self.source:
            yield start, map_tensors(self.prepare, batch), hash_examples(batch)
            start += count_examples(batch)

    @property
    def examples(self) -> int:
        return len(self.reading.hashes)

    @property
    def repeats(self) -> bool:
        """Every iteration gives the batches of the first reading, in its order."""
        return self.ordered or self.kept is not None


def read_batches(data: Any, *, batch_size: int | None, prepare: Callable[[Tensor], Tensor], whole: bool, opaque: bool = False) -> Batches:
    """Adapt `data`, read it twice, and refuse what does not stand still.

    `whole`: the user's batches are part of the definition of the loss, so their grouping must be fixed too, and tensors without
    a `batch_size` are one batch. `opaque`: every element of `data` is a batch as it is.
    """
    source = adapt(data, batch_size=batch_size, whole=whole, opaque=opaque)
    generators = generators_of(source)
    still = isinstance(source, (list, tuple))
    kept: list[Batch] | None = []
    used = 0
    hashes: list[Any] = []
    elements: list[int] = []
    with _apart(generators, []):
        for batch in source:
            if not tensors_in(batch):
                raise TypeError(f"a batch is a {type(batch).__name__} in which no tensor or array is found. Make it a dict, tuple, list or dataclass of tensors or arrays.")
            hashes.append(hash_examples(batch))
            elements.append(count_numbers(batch))
            used += 0 if still else sum(count_numbers(t) * t.element_size() for t in tensors_in(batch))
            kept = kept if used <= CACHE_BYTES else None
            if kept is not None:
                kept.append(map_tensors(prepare, batch))
        if not hashes or not sum(map(len, hashes)):
            raise ValueError("data is empty: it yields no example. Pass (inputs, targets), a Dataset, or an iterable of batches.")
        first = Reading(np.concatenate(hashes), tuple(len(h) for h in hashes), tuple(elements))
        again = hashes if still else [hash_examples(batch) for batch in source]
        second = Reading(np.concatenate([np.empty(0, np.uint64), *again]), tuple(len(h) for h in again))
        if len(first.hashes) == len(second.hashes):
            refuse_incomplete(source, len(first.sizes), len(first.hashes), whole=whole)
    exact = first.fingerprint == second.fingerprint
    if not exact and (len(first.hashes) != len(second.hashes) or not padding_may_differ(source)):
        raise NotDeterministic(explain_difference(first, second, source))
    if whole and first.grouping != second.grouping:
        why = 'mode="batch" makes the batches part of the loss, and this data groups its examples differently in each pass'
        raise NotDeterministic(f"{why}. Use shuffle=False, or a list of batches.")
    ordered = exact and bool((first.hashes == second.hashes).all())
    return Batches(source, prepare, kept, first, ordered, exact, generators)


def listed(batches: list[Batch]) -> Batches:
    """Prepared batches by themselves."""
    hashes = np.concatenate([hash_examples(batch) for batch in batches])
    reading = Reading(hashes, tuple(map(count_examples, batches)), tuple(map(count_numbers, batches)))
    return Batches(batches, lambda tensor: tensor, batches, reading, ordered=True)


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
        if any(tensor.is_nested or tensor.layout is not torch.strided for tensor in data):
            return [(inputs, targets)]  # torch cannot cut them
        if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
            raise ValueError(f"data=(inputs, targets) needs as many targets as inputs, got shapes {tuple(inputs.shape)} and {tuple(targets.shape)}. If they belong together as they are, pass them as one batch: data=[(inputs, targets)].")
        size = batch_size or (max(len(inputs), 1) if whole else DEFAULT_BATCH)
        return list(zip(inputs.split(size), targets.split(size), strict=True))
    if isinstance(data, Dataset) and not opaque:
        items = len(data) if not isinstance(data, IterableDataset) else None  # type: ignore[arg-type]
        return DataLoader(data, batch_size=batch_size or (items if whole and items else DEFAULT_BATCH))
    if not opaque and (isinstance(data, np.ndarray) or (isinstance(data, tuple | list) and any(isinstance(part, np.ndarray) for part in data))):
        raise TypeError("data holds NumPy arrays. Pass tensors: (torch.from_numpy(inputs), torch.from_numpy(targets)).")
    if not isinstance(data, Iterable):
        raise TypeError(f"data is a {type(data).__name__}. Pass (inputs, targets), a Dataset, or an iterable of batches.")
    if isinstance(data, Iterator):
        raise NotDeterministic("data can be read only once (it is an iterator or generator). Pass a list of batches or a DataLoader, which start anew in every pass.")
    if batch_size is not None:
        raise ValueError("batch_size is for (inputs, targets) and Datasets; this data already comes in batches. Leave batch_size out.")
    return data


def hash_examples(batch: Batch) -> Hashes:
    """A 64-bit hash of every example of a batch (n,), from its bytes."""
    count = count_examples(batch)
    total = np.zeros(count, np.uint64)
    if not count:
        return total
    for salt, tensor in enumerate(tensors_in(batch), start=1):
        octets = _octets(tensor.detach(), count)
        padded = np.pad(octets, ((0, 0), (0, -octets.shape[1] % 8))) if octets.shape[1] % 8 else octets
        total += _mix(_sum_mixed(np.ascontiguousarray(padded).view(np.uint64)) + np.uint64(salt))
    return _mix(total)


def _octets(tensor: Tensor, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of every example, or in one row those of a tensor that does not count examples."""
    if tensor.is_nested:
        parts = [_octets(part, 1)[0] for part in tensor.unbind()]  # with their lengths, since padding looks like zeros
        longest = max(map(len, parts), default=0)
        rows = [np.concatenate([np.frombuffer(np.int64(len(part)).tobytes(), np.uint8), np.pad(part, (0, longest - len(part)))]) for part in parts]
        return np.stack(rows) if len(rows) == count else np.concatenate(rows)[None]
    raw = tensor.to_dense().cpu().contiguous()
    flat = raw.reshape(count if raw.ndim > 0 and len(raw) == count else 1, -1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros((len(flat), 1), np.uint8)


def _sum_mixed(words: Hashes) -> Hashes:
    """Sum of every row's words (n,), each mixed with a key of its place: a product alone would drop the upper bits of round numbers."""
    keys = np.random.default_rng(0).integers(0, 2**64, words.shape[1], np.uint64)
    step = max(2**15 // len(keys), 1)  # rows at a time, so that they stay in the processor's cache
    return np.concatenate([_mix(words[i : i + step] ^ keys).sum(axis=1, dtype=np.uint64) for i in range(0, len(words), step)])


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
        which = f"only {shared:.0%} of the examples come again. A sampler that draws at random, or random augmentation of some examples, is at work"
        return f"data changes between passes: {which}. Use a sampler without replacement over the whole set, and no augmentation."
    why = "the examples themselves come out different each time, so random augmentation is at work (in the Dataset's transform or in collate_fn)"
    return f"data changes between passes: {why}. Turn it off, or pass a list of already augmented batches."


@contextmanager
def _apart(generators: Sequence[torch.Generator], stream: list[Any]) -> Iterator[None]:
    """Random numbers drawn inside go on where `stream` ended (an empty one starts from outside), and outside none has been drawn."""
    everything = (torch.default_generator, *torch.cuda.default_generators, *generators)
    before = [generator.get_state() for generator in everything]
    with rng_kept():
        if stream:
            random.setstate(stream[0])
            np.random.set_state(stream[1])  # noqa: NPY002 - the global state that a Dataset may draw from
        for generator, state in zip(everything, stream[2:], strict=False):
            generator.set_state(state)
        try:
            yield
        finally:
            stream[:] = random.getstate(), np.random.get_state(), *(generator.get_state() for generator in everything)  # noqa: NPY002
            for generator, state in zip(everything, before, strict=True):
                generator.set_state(state)


def _drawn(items: Iterator[Any], generators: Sequence[torch.Generator], stream: list[Any]) -> Iterator[Any]:
    """Every item drawn `_apart`: no state is held back while the consumer works, which may fail and never come back."""
    while True:
        with _apart(generators, stream):
            item = next(items, None)
        if item is None:
            return
        yield item
