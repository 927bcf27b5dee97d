"""Whether a loader gives every example of its data once: no worker repeats another's, none is dropped, and its length is what comes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from .errors import NotDeterministic
from .nesting import count_examples


def refuse_incomplete(source: Iterable[Any], batches: int, examples: int, *, whole: bool) -> None:
    """NotDeterministic, with the cause, where a pass of `batches` batches and `examples` examples is not all of the data once.

    Counts decide, so examples that the data really hold several times are no reason to refuse. `whole`: the user's batches are part of
    the loss, so that what is left out of them in a fixed order is left out on purpose.
    """
    if isinstance(source, DataLoader) and isinstance(source.dataset, IterableDataset):
        _refuse_incomplete_stream(source, batches, examples, whole)
    elif isinstance(source, DataLoader):
        _refuse_incomplete_sampling(source, batches, examples, whole)
    elif not isinstance(source, (list, tuple)) and (length := length_of(source)) is not None and length not in (batches, examples):
        raise NotDeterministic(_says_otherwise("len(data)", length, f"{batches} batches with {examples} examples"))


def length_of(source: Any) -> int | None:
    """What `len` says, where the object has one that works."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):  # torch's own samplers and data sets without a length raise these
        return None


def _refuse_incomplete_sampling(loader: DataLoader[Any], batches: int, examples: int, whole: bool) -> None:
    """A data set with indices: a sampler may choose some of them, but not drop the rest of a batch."""
    batching = loader.batch_sampler  # torch's own or the user's
    sampler = getattr(batching, "sampler", None)
    total = length_of(sampler) if sampler is not None else length_of(loader.dataset)
    fixed = whole and isinstance(sampler, SequentialSampler)
    if batching is not None and getattr(batching, "drop_last", False) is True and total is not None and not fixed:
        drawn = sum(map(len, batching))  # indices, not examples: of a batch that holds together the number of examples is a guess
        if drawn < total:
            raise NotDeterministic(_drops(total - drawn, total))
    length, known = length_of(loader), length_of(loader.dataset)
    if length not in (None, batches) and examples != known:  # samplers that only estimate their length, but give everything, do no harm
        raise NotDeterministic(_says_otherwise("len(loader)", length, f"{batches} batches"))


def _refuse_incomplete_stream(loader: DataLoader[Any], batches: int, examples: int, whole: bool) -> None:
    """An IterableDataset: every worker has a copy, and has to take its own share of it."""
    given, length = (examples if loader.batch_size is not None else batches), _own_length(loader)
    dropping = loader.drop_last and not whole
    if type(loader).__iter__ is not DataLoader.__iter__ or (given == length):
        return
    if loader.num_workers > 1 or dropping:
        alone_batches, alone_examples = _read_by_one_worker(loader, drop_last=loader.drop_last and not dropping)
        alone = alone_examples if loader.batch_size is not None else alone_batches
        if given > alone:
            raise NotDeterministic(
                f"the {loader.num_workers} workers of this DataLoader yield {given} examples together, and a single one yields {alone}: each of them yields the whole stream. "
                "Let __iter__ of the IterableDataset take the share of torch.utils.data.get_worker_info(), or use num_workers=0."
            )
        if given < alone and dropping:
            raise NotDeterministic(_drops(alone - given, alone))
        if given < alone:
            raise NotDeterministic(
                f"the {loader.num_workers} workers of this DataLoader yield {given} examples together, and a single one yields {alone}: their shares leave some out. "
                "Let the shares in __iter__ of the IterableDataset cover all of it, or use num_workers=0."
            )
    if length is not None and not _plausible(loader, length, batches):
        raise NotDeterministic(_says_otherwise("len(dataset)", length, f"{given} items"))


def _plausible(loader: DataLoader[Any], length: int, batches: int) -> bool:
    """Whether `length` items make as many batches; each worker's last one may be short."""
    least = math.ceil(length / (loader.batch_size or 1))
    return least <= batches <= least + max(loader.num_workers - 1, 0)


def _own_length(loader: DataLoader[Any]) -> int | None:
    """The length that a stream states; in a distributed run that is the length of all processes' shares together."""
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    return None if shared else length_of(loader.dataset)


def _read_by_one_worker(loader: DataLoader[Any], *, drop_last: bool) -> tuple[int, int]:
    """(batches, examples) of a pass in which one worker's share is everything; in a process of its own where the loader has such."""
    alone: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=min(loader.num_workers, 1),
        drop_last=drop_last,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
        generator=loader.generator,
    )
    counts = [count_examples(batch) for batch in alone]
    return len(counts), sum(counts)


def padding_may_differ(source: Any) -> bool:
    """Whether a collate function pads to the longest example of a batch that may be another one in every pass."""
    fixed = isinstance(source, DataLoader) and source.batch_size is not None and isinstance(source.sampler, SequentialSampler)
    return isinstance(source, DataLoader) and source.collate_fn is not torch.utils.data.default_collate and not fixed


def generators_of(source: Any) -> list[torch.Generator]:
    """What a loader, its samplers and its data set draw from, where they hold a generator."""
    batching = getattr(source, "batch_sampler", None)
    holders = (source, getattr(source, "sampler", None), batching, getattr(batching, "sampler", None), getattr(source, "dataset", None))
    held = [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]
    return list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())


def _drops(left_out: int, total: int) -> str:
    return f"DataLoader(drop_last=True) leaves out {left_out} of {total} examples. Use drop_last=False: a shorter last batch is weighted as it should be."


def _says_otherwise(what: str, length: int | None, found: str) -> str:
    return f"{what} says {length}, and a pass over the data gives {found}. Make its length right (or leave __len__ out), or let it yield everything."
