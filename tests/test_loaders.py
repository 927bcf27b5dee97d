"""Loaders that repeat, drop or promise examples that do not come are refused with the cause; those that give every example once are not."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset, get_worker_info

from orograph import NotDeterministic, Objective

from .families import rotating
from .networks import small_mlp

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than this machine has cores
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
TWICE = (torch.cat([X, X]), torch.cat([Y, Y]))  # data that hold every example two times


class Stream(IterableDataset):
    """`share`: whether workers split it, or how badly; `shuffled`: in an order of its own in every pass."""

    def __init__(self, data=(X, Y), *, share="strides", shuffled=False, length=None):
        self.data, self.share, self.shuffled, self.length = data, share, shuffled, length

    def __iter__(self):
        info = get_worker_info()
        x, y = self.data
        order = torch.randperm(len(x)) if self.shuffled and info is None else torch.arange(len(x))
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if self.share == "strides":
            order = order[worker::workers]
        if self.share == "equal parts":  # the rest is lost
            size = len(x) // workers
            order = order[worker * size : (worker + 1) * size]
        if self.share == "workers only":
            assert info is not None
            order = order[worker::workers]
        if self.shuffled:
            order = order[torch.randperm(len(order))]
        for i in order:
            yield x[i], y[i]

    def __len__(self):
        if self.length is None:
            raise TypeError("a stream")
        return self.length


class Batched(IterableDataset):
    """A stream of whole batches."""

    def __init__(self, split):
        self.split = split

    def __iter__(self):
        info = get_worker_info()
        parts = list(zip(X.split(10), Y.split(10), strict=True))
        yield from parts[info.id :: info.num_workers] if self.split and info is not None else parts


class Sized:
    """Re-iterable batches with a length."""

    def __init__(self, length, batches):
        self.length, self.batches = length, batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return self.length


class OwnSampler:
    """A batch sampler that is none of torch's."""

    def __init__(self, size, drop_last, length=None, repeat=1):
        self.size, self.drop_last, self.length, self.repeat = size, drop_last, length, repeat

    def __iter__(self):
        for _ in range(self.repeat):
            for part in torch.arange(40).split(self.size):
                if len(part) == self.size or not self.drop_last:
                    yield part.tolist()

    def __len__(self):
        return self.length if self.length is not None else sum(1 for _ in self)


def pad(items):
    x, y = zip(*items, strict=True)
    return torch.stack(x), torch.stack(y)


PARTS = list(zip(X.split(15), Y.split(15), strict=True))
SET = TensorDataset(X, Y)
REFUSED = {
    "two workers, no shares": (lambda: DataLoader(Stream(share=None), 10, num_workers=2), r"2 workers of this DataLoader yield 80 examples together, and a single one yields 40.*get_worker_info"),
    "three workers, no shares": (lambda: DataLoader(Stream(share=None), 7, num_workers=3), r"3 workers .* yield 120 examples"),
    "two workers, no shares, one batch each": (lambda: DataLoader(Stream(share=None), 64, num_workers=2), r"2 workers .* yield 80 examples"),
    "two workers, no shares, shuffled": (lambda: DataLoader(Stream(share=None, shuffled=True), 10, num_workers=2), r"2 workers .* yield 80 examples"),
    "two workers, no shares, own collate": (lambda: DataLoader(Stream(share=None, shuffled=True), 10, num_workers=2, collate_fn=pad), r"2 workers .* yield 80 examples"),
    "two workers, no shares, a length": (lambda: DataLoader(Stream(share=None, length=40), 10, num_workers=2), r"2 workers .* yield 80 examples"),
    "two workers, no shares, persistent": (lambda: DataLoader(Stream(share=None), 10, num_workers=2, persistent_workers=True), r"2 workers .* yield 80 examples"),
    "two workers, no shares, ready batches": (lambda: DataLoader(Batched(split=False), None, num_workers=2), r"2 workers .* yield 8 "),
    "two workers, data that hold all twice, no shares": (lambda: DataLoader(Stream(TWICE, share=None), 10, num_workers=2), r"yield 160 examples together, and a single one yields 80"),
    "shares that lose some": (lambda: DataLoader(Stream(share="equal parts"), 10, num_workers=3), r"yield 39 examples together, and a single one yields 40: their shares leave some out"),
    "stream, drop_last": (lambda: DataLoader(Stream(), 15, drop_last=True), r"drop_last=True\) leaves out 10 of 40"),
    "stream with a length, drop_last": (lambda: DataLoader(Stream(length=40), 15, drop_last=True), r"drop_last=True\) leaves out 10 of 40"),
    "stream, workers, drop_last": (lambda: DataLoader(Stream(), 15, num_workers=2, drop_last=True), r"drop_last=True\) leaves out 10 of 40"),
    "stream that ends before its length": (lambda: DataLoader(Stream(length=50), 10), r"len\(dataset\) says 50, and a pass over the data gives 40"),
    "stream that goes on after its length": (lambda: DataLoader(Stream(length=30), 10), r"len\(dataset\) says 30, and a pass over the data gives 40"),
    "own batch sampler, drop_last": (lambda: DataLoader(SET, batch_sampler=OwnSampler(15, True)), r"drop_last=True\) leaves out 10 of 40"),
    "torch's batch sampler, drop_last": (lambda: DataLoader(SET, batch_sampler=BatchSampler(SequentialSampler(SET), 15, True)), r"leaves out 10 of 40"),
    "own batch sampler, other length": (lambda: DataLoader(SET, batch_sampler=OwnSampler(10, False, length=7, repeat=2)), r"len\(loader\) says 7, and a pass over the data gives 8 batches"),
    "batches that end before their length": (lambda: Sized(5, PARTS), r"len\(data\) says 5, and a pass over the data gives 3 batches with 40 examples"),
}  # fmt: skip
ACCEPTED = {
    "two workers with shares": lambda: DataLoader(Stream(), 10, num_workers=2),
    "three workers with shares": lambda: DataLoader(Stream(), 7, num_workers=3),
    "three workers with shares and a length": lambda: DataLoader(Stream(length=40), 7, num_workers=3),
    "three persistent workers with shares": lambda: DataLoader(Stream(), 7, num_workers=3, persistent_workers=True),
    "persistent workers over a data set": lambda: DataLoader(SET, 7, num_workers=2, persistent_workers=True, shuffle=True),
    "two workers, shuffled shares": lambda: DataLoader(Stream(shuffled=True), 10, num_workers=2),
    "two workers, shuffled shares, own collate": lambda: DataLoader(Stream(shuffled=True), 10, num_workers=2, collate_fn=pad),
    "data that hold every example twice, in two workers": lambda: DataLoader(Stream(TWICE), 10, num_workers=2),
    "data that hold every example twice": lambda: DataLoader(Stream(TWICE), 10),
    "a stream that only runs in workers": lambda: DataLoader(Stream(share="workers only"), 10, num_workers=2),
    "one worker": lambda: DataLoader(Stream(share=None), 10, num_workers=1),
    "equal parts that fit": lambda: DataLoader(Stream(share="equal parts"), 10, num_workers=2),
    "ready batches in two workers": lambda: DataLoader(Batched(split=True), None, num_workers=2),
    "stream, drop_last that drops nothing": lambda: DataLoader(Stream(), 10, drop_last=True),
    "own batch sampler, drop_last that drops nothing": lambda: DataLoader(SET, batch_sampler=OwnSampler(10, True)),
    "own batch sampler with an estimated length": lambda: DataLoader(SET, batch_sampler=OwnSampler(15, False, length=4)),
    "own batch sampler, every example twice": lambda: DataLoader(SET, batch_sampler=OwnSampler(15, False, repeat=2)),
    "batches with their length": lambda: Sized(3, PARTS),
    "batches with the number of examples as length": lambda: Sized(40, PARTS),
    "a data set twice": lambda: DataLoader(TensorDataset(*TWICE), 10, num_workers=2),
}  # fmt: skip


def check_refused(name):
    make, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Length of IterableDataset")  # torch's own, where a stream is longer than it says
        with pytest.raises(NotDeterministic, match=message):
            Objective(small_mlp(), nn.CrossEntropyLoss(), make())


def check_accepted(name, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orograph.batches.CACHE_BYTES", cache)
        objective = Objective(small_mlp(), nn.CrossEntropyLoss(), ACCEPTED[name]())
        for _ in range(2):
            next(iter(objective.terms().batches))  # a pass that breaks off
            assert objective.value() == pytest.approx(F.cross_entropy(small_mlp()(X), Y).item(), rel=1e-12)


@pytest.mark.parametrize("name", rotating(list(REFUSED), 5))
def test_loaders_that_repeat_or_drop_examples_are_refused_with_the_cause(name):
    check_refused(name)


@pytest.mark.parametrize("cache", [2**20, 0])
@pytest.mark.parametrize("name", rotating(list(ACCEPTED), 4))
def test_loaders_that_give_every_example_once_are_read(name, cache):
    check_accepted(name, cache)
