"""Batches of every make are counted, hashed and cut; reading them leaves every random state alone."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from orograph import NotDeterministic, Objective
from orograph.batches import hash_examples
from orograph.nesting import count_examples, take_rows

from .networks import small_mlp

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "pair"


ARRAYS = {
    "arrays": (lambda x, y: {"x": x.numpy(), "y": y.numpy()}, lambda m, b: (m(torch.as_tensor(b["x"])), torch.as_tensor(b["y"]))),
    "dataclass": (Pair, lambda m, b: (m(b.x), b.y)),
    "dataclass of arrays": (lambda x, y: Pair(x.numpy(), y.numpy()), lambda m, b: (m(torch.from_numpy(b.x)), torch.from_numpy(b.y))),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_batches_of_arrays_and_dataclasses_are_seen(kind):
    make, forward = ARRAYS[kind]
    data = [make(x, y) for x, y in zip(X.split(15), Y.split(15), strict=True)]
    objective = Objective(small_mlp(), nn.CrossEntropyLoss(), data, forward=forward)
    plain = Objective(small_mlp(), nn.CrossEntropyLoss(), (X, Y))
    assert objective.examples == 40 and objective.fingerprints()["data"] == plain.fingerprints()["data"]
    assert objective.value() == pytest.approx(plain.value(), rel=1e-12)
    assert objective.sample(10, seed=0).examples == 10
    assert type(take_rows(data[0], torch.tensor([1]))) is type(data[0])


def test_augmented_arrays_are_refused():
    loader = DataLoader(TensorDataset(X, Y), 10, collate_fn=lambda items: {"x": np.stack([x.numpy() for x, _ in items]) + 0.1 * np.random.randn(10, 4), "y": torch.stack([y for _, y in items])})  # noqa: NPY002
    with pytest.raises(NotDeterministic, match="random augmentation is at work"):
        Objective(small_mlp(), nn.CrossEntropyLoss(), loader, forward=lambda m, b: (m(torch.as_tensor(b["x"])), b["y"]))


def test_a_batch_without_a_tensor_is_refused():
    class Holder:
        x, y = X, Y

    with pytest.raises(TypeError, match=r"a Holder in which no tensor or array is found. Make it a dict"):
        Objective(small_mlp(), nn.CrossEntropyLoss(), [Holder()], forward=lambda m, b: (m(b.x), b.y))


def test_examples_are_counted_by_the_length_that_most_tensors_share():
    batch = {"temperature": torch.ones(1), "x": X, "y": Y}
    assert count_examples(batch) == 40 and count_examples({"scale": torch.ones(1), "x": X}) == count_examples({"x": X, "scale": torch.ones(1)}) == 40
    assert count_examples({"edges": torch.ones(2, 9), "nodes": X[:9], "y": Y[:3]}) == 3
    few = take_rows(batch, torch.arange(5))
    assert len(few["x"]) == 5 and len(few["temperature"]) == 1
    objective = Objective(small_mlp(), nn.CrossEntropyLoss(), [batch], forward=lambda m, b: (m(b["x"]) / b["temperature"], b["y"]))
    assert objective.examples == 40


def test_sparse_inputs_are_hashed_and_cut():
    dense = X.relu()
    batch = (dense.to_sparse(), Y)
    assert (hash_examples(batch) == hash_examples((dense, Y))).all()
    objective = Objective(small_mlp(), nn.CrossEntropyLoss(), [batch, batch])
    assert objective.value() == pytest.approx(F.cross_entropy(small_mlp()(dense), Y).item(), rel=1e-12)


def test_a_batch_sampler_that_drops_examples_is_refused():
    sampler = BatchSampler(RandomSampler(X), 15, drop_last=True)
    with pytest.raises(NotDeterministic, match=r"leaves out 10 of 40"):
        Objective(small_mlp(), nn.CrossEntropyLoss(), DataLoader(TensorDataset(X, Y), batch_sampler=sampler))


class Drawing(IterableDataset):
    """Shuffles itself with a generator of its own, and draws from the global states on the way."""

    def __init__(self):
        self.order = torch.Generator().manual_seed(1)

    def __iter__(self):
        for i in torch.randperm(40, generator=self.order):
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            yield X[i], Y[i]


class Bucketing:
    """A batch sampler with a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __iter__(self):
        return iter(torch.randperm(40, generator=self.generator).view(4, 10).tolist())

    def __len__(self):
        return 4


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", ["stream", "batch sampler"])
def test_generators_of_streams_and_batch_samplers_are_left_alone(kind, kept, monkeypatch):
    monkeypatch.setattr("orograph.batches.CACHE_BYTES", 2**20 if kept else 0)
    holder = Drawing() if kind == "stream" else Bucketing()
    data = holder if kind == "stream" else DataLoader(TensorDataset(X, Y), batch_sampler=holder)
    generator = holder.order if kind == "stream" else holder.generator
    before = generator.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert Objective(small_mlp(), nn.CrossEntropyLoss(), data).value() == pytest.approx(F.cross_entropy(small_mlp()(X), Y).item(), rel=1e-12)
    after = generator.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after, strict=True))


def test_an_error_in_the_middle_of_a_pass_does_not_rewind_the_users_random_states_later(monkeypatch):
    monkeypatch.setattr("orograph.batches.CACHE_BYTES", 0)
    objective = Objective(small_mlp(), nn.CrossEntropyLoss(), DataLoader(TensorDataset(X, Y), 10, shuffle=True))
    passing = iter(objective.terms().batches)
    first = next(passing)[1]
    drawn = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    passing.close()  # as the garbage collector does once the traceback is let go
    again = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert not torch.equal(drawn[0], again[0]) and drawn[1:] != again[1:] and len(first[0]) == 10


def test_the_consumers_draws_do_not_reach_the_loader(monkeypatch):
    monkeypatch.setattr("orograph.batches.CACHE_BYTES", 0)
    batches = Objective(small_mlp(), nn.CrossEntropyLoss(), Drawing()).terms().batches
    torch.manual_seed(5)
    plain = [hash_examples(batch).tolist() for _, batch in batches]
    torch.manual_seed(5)
    disturbed = [(torch.rand(7), hash_examples(batch).tolist())[1] for _, batch in batches]
    assert plain == disturbed
