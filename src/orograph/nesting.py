"""A batch: any nesting of dicts, lists, tuples and dataclasses of tensors or arrays whose first axis counts examples."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Batch = Any


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """The same nesting with `function` applied to every tensor; arrays go through it and stay arrays, other leaves stay as they are."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc":
        return function(torch.from_numpy(batch.copy())).cpu().numpy()
    if isinstance(batch, PackedSequence):
        sizes = function(batch.batch_sizes)  # torch wants them on the CPU
        orders = [None if order is None else function(order) for order in (batch.sorted_indices, batch.unsorted_indices)]
        return PackedSequence(function(batch.data), sizes.cpu() if isinstance(sizes, Tensor) else sizes, *orders)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
        if type(batch) is dict:
            return mapped
        other: Any = copy.copy(batch)  # keeps attribute access, as in transformers' BatchEncoding
        for key, value in mapped.items():
            other[key] = value
        return other
    if isinstance(batch, (list, tuple)):
        items = [map_tensors(function, item) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)  # a namedtuple takes them one by one
    if is_dataclass(batch) and not isinstance(batch, type):
        changed = copy.copy(batch)  # not replace(): __post_init__ has already been through these values
        for part in fields(batch):
            object.__setattr__(changed, part.name, map_tensors(function, getattr(batch, part.name)))
        return changed
    return batch


def as_double(batch: Batch) -> Batch:
    """The same nesting with floating-point tensors in float64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)


def tensors_in(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch (of every array a copy), depth first."""
    found: list[Tensor] = []
    map_tensors(lambda t: found.append(t) or t, batch)  # type: ignore[func-returns-value]
    return found


def count_examples(batch: Batch, axis: int = 0) -> int:
    """The length along `axis` that most tensors share; among equals one that is not 1, and then the last one's (the targets')."""
    lengths = [tensor.size(axis) for tensor in tensors_in(batch) if tensor.ndim > axis and (axis == 0 or not tensor.is_nested)]  # nested tensors have no len()
    often = Counter(lengths)
    return max(reversed(lengths), key=lambda n: (often[n], n != 1), default=1)


def take_rows(batch: Batch, rows: Tensor, axis: int = 0) -> Batch:
    """The examples `rows` of a batch that lie along `axis`, in tensors without such an axis along the first; those that do not count examples stay whole."""
    count = count_examples(batch, axis)

    def taken(tensor: Tensor) -> Tensor:
        along = next((a for a in sorted({axis, 0}, reverse=True) if tensor.ndim > a and tensor.size(a) == count), None)
        return tensor if along is None else tensor.index_select(along, rows.to(tensor.device))

    return map_tensors(taken, batch)


def count_numbers(batch: Batch) -> int:
    """Numbers in all tensors of a batch together."""
    return sum(sum(part.numel() for part in t.unbind()) if t.is_nested else t.numel() for t in tensors_in(batch))


def join_batches(first: Batch, second: Batch) -> Batch | None:
    """Two batches in one, the examples of the second behind those of the first; None where their shapes do not fit."""
    ours, theirs = tensors_in(first), tensors_in(second)
    if len(ours) != len(theirs) or any(t.is_nested or t.layout is not torch.strided or t.ndim == 0 for t in (*ours, *theirs)) or any(x.shape[1:] != y.shape[1:] for x, y in zip(ours, theirs, strict=True)):
        return None
    queue = [torch.cat([x, y]) for x, y in zip(ours, theirs, strict=True)]
    return map_tensors(lambda _: queue.pop(0), first)
