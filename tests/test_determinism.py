"""What moves between two readings of the data or two evaluations of the loss is refused, and named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from orograph import NotDeterministic, Objective, fisher
from orograph.batches import hash_examples

from .networks import small_mlp

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(1))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_mlp()

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

    def forward(self, x):
        return self.second(F.dropout(self.first(x)))


class Counting(nn.Module):
    """Writes to a buffer in every forward; `felt` says whether the output depends on it."""

    def __init__(self, felt):
        super().__init__()
        self.net, self.felt = small_mlp(), felt
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.net(x) * (1 + self.calls * 0.01 if self.felt else 1)


class Augmented(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(4), Y[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def collate_with_noise(items):
    x, y = zip(*items, strict=True)
    return torch.stack(x) + 0.1 * torch.randn(len(x), 4), torch.stack(y)


def collate_with_little_noise(items):
    x, y = zip(*items, strict=True)
    return torch.stack(x) + 3e-4 * torch.randn(len(x), 4), torch.stack(y)


def collate_in_single_precision(items):
    x, y = zip(*items, strict=True)
    return (torch.stack(x) + 1e-3 * torch.randn(len(x), 4)).float(), torch.stack(y)


class ReadOnce:
    def __init__(self):
        self.items = iter([(X, Y)])

    def __iter__(self):
        yield from self.items


MOVING = {
    "dropout that ignores eval": (FunctionalDropout, lambda: (X, Y), r"module 'FunctionalDropout' draws random numbers"),
    "noise in a submodule": (lambda: nn.Sequential(small_mlp(4, 6, 4), Noisy()), lambda: (X, Y), r"module '1' draws random numbers"),
    "stateful buffer": (lambda: Counting(felt=True), lambda: (X, Y), r"writes to the buffer 'calls'"),
    "augmentation in the Dataset": (small_mlp, Augmented, r"random augmentation is at work"),
    "augmentation in collate_fn": (small_mlp, lambda: DataLoader(TensorDataset(X, Y), 10, collate_fn=collate_with_noise), r"random augmentation is at work"),
    "augmentation in a shuffled collate_fn": (small_mlp, lambda: DataLoader(TensorDataset(X, Y), 10, shuffle=True, collate_fn=collate_with_noise), r"Random augmentation or masking"),
    "little augmentation": (small_mlp, lambda: DataLoader(TensorDataset(X, Y), 10, shuffle=True, collate_fn=collate_with_little_noise), r"Random augmentation or masking"),
    "little augmentation, single precision": (lambda: small_mlp().float(), lambda: DataLoader(TensorDataset(X, Y), 10, shuffle=True, collate_fn=collate_in_single_precision), r"Random augmentation or masking"),
    "drop_last": (small_mlp, lambda: DataLoader(TensorDataset(X, Y), 15, drop_last=True), r"drop_last=True\) leaves out 5 of 50"),
    "drop_last, shuffled": (small_mlp, lambda: DataLoader(TensorDataset(X, Y), 15, shuffle=True, drop_last=True), r"leaves out 5 of 50"),
    "sampling with replacement": (small_mlp, lambda: DataLoader(TensorDataset(X, Y), 10, sampler=RandomSampler(X, replacement=True)), r"sampler that draws at random"),
    "generator": (small_mlp, lambda: ((x, y) for x, y in [(X, Y)]), r"read only once"),
    "loader that can be read once": (small_mlp, ReadOnce, r"read only once: the first pass gave 50"),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVING)
def test_what_moves_is_refused_and_named(name):
    model, data, message = MOVING[name]
    torch.manual_seed(0)
    with pytest.raises(NotDeterministic, match=message):
        Objective(model(), nn.CrossEntropyLoss(), data())


def test_shuffled_batches_are_refused_where_they_are_part_of_the_loss():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    with pytest.raises(NotDeterministic, match="groups its examples differently in each pass"):
        Objective(net, nn.CrossEntropyLoss(), DataLoader(TensorDataset(X, Y), 10, shuffle=True), mode="batch")


def test_data_that_change_later_are_noticed_in_the_pass_that_meets_them(monkeypatch):
    monkeypatch.setattr("orograph.batches.CACHE_BYTES", 0)
    source = X.clone()
    objective = Objective(small_mlp(), nn.CrossEntropyLoss(), DataLoader(TensorDataset(source, Y), 10))
    objective.value()
    source[3] += 1
    with pytest.raises(NotDeterministic, match=r"only 98% of the examples come again"):
        objective.value()


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TensorDataset(X, Y), 10, shuffle=True),
        DataLoader(TensorDataset(X, Y), 10, shuffle=True, generator=torch.Generator().manual_seed(1)),
        DataLoader(Stream(), 10),
        Stream(),
        TensorDataset(X, Y),
        [(X[:20], Y[:20]), (X[20:], Y[20:])],
        DataLoader(TensorDataset(X, Y), 10, drop_last=True),
    ],
    ids=["shuffled", "own generator", "iterable loader", "iterable dataset", "dataset", "list", "drop_last that drops nothing"],
)
def test_what_stands_still_is_accepted(data):
    generator = getattr(data, "generator", None)
    state = None if generator is None else generator.get_state()
    assert Objective(small_mlp(), nn.CrossEntropyLoss(), data).value() == pytest.approx(F.cross_entropy(small_mlp()(X), Y).item(), rel=1e-12)
    assert state is None or torch.equal(state, generator.get_state())


def test_a_buffer_that_the_loss_does_not_feel_is_no_reason_to_refuse():
    model = Counting(felt=False)
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=20)
    objective.value()
    assert model.calls == 0 and objective.point().buffers["calls"] == 0


def test_fingerprint_is_that_of_the_set_in_whatever_batches():
    prints = {
        Objective(small_mlp(), nn.CrossEntropyLoss(), data).fingerprints()["data"]
        for data in ((X, Y), DataLoader(TensorDataset(X, Y), 7, shuffle=True), [(X[25:], Y[25:]), (X[:25], Y[:25])])
    }
    assert len(prints) == 1
    assert Objective(small_mlp(), nn.CrossEntropyLoss(), (X.flip(1), Y)).fingerprints()["data"] not in prints


def test_sampled_labels_and_samples_need_one_order_of_the_examples():
    shuffled = Objective(small_mlp(), nn.CrossEntropyLoss(), DataLoader(TensorDataset(X, Y), 10, shuffle=True))
    with pytest.raises(ValueError, match="another order in each pass"):
        fisher(shuffled)
    with pytest.raises(NotDeterministic, match="one fixed order"):
        shuffled.sample(5, seed=0)


def test_different_examples_have_different_hashes():
    assert len(set(hash_examples((torch.eye(1000).double(),)).tolist())) == 1000
    bits = (torch.arange(4096)[:, None] >> torch.arange(12)) & 1
    assert len(set(hash_examples((bits.double(),)).tolist())) == 4096


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), "subtract"])
@pytest.mark.parametrize("make", [lambda x, y: (x, y), lambda x, y: [(x[:20], y[:20]), (x[20:], y[20:])], lambda x, y: DataLoader(TensorDataset(x, y), 20)])
def test_a_model_that_writes_to_its_inputs_is_given_copies(first, make):
    class Subtracting(nn.Module):
        def forward(self, x):
            return x.sub_(x.mean(1, keepdim=True))

    model = nn.Sequential(first if isinstance(first, nn.Module) else Subtracting(), *small_mlp())
    x = X.clone()
    expected = F.cross_entropy(model(X.clone()), Y).item()
    objective = Objective(model, nn.CrossEntropyLoss(), make(x, Y))
    for _ in range(2):
        assert objective.value() == pytest.approx(expected, rel=1e-12)
        objective.gradient()
    assert torch.equal(x, X) and torch.equal(objective.on((x, Y)).gradient(), objective.on((x, Y)).gradient()) and torch.equal(x, X)


def test_a_forward_or_batch_loss_that_writes_to_its_inputs_is_given_copies():
    model = small_mlp()
    x = X.clone()
    expected = F.cross_entropy(model(X - 1), Y).item()
    by_forward = Objective(model, nn.CrossEntropyLoss(), [{"x": x, "y": Y}], forward=lambda m, b: (m(b["x"].sub_(1)), b["y"]))
    by_loss = Objective.from_batch_loss(model, lambda m, b: (F.cross_entropy(m(b[0].sub_(1)), b[1], reduction="sum"), len(b[0])), [(x, Y)])
    for objective in (by_forward, by_loss):
        assert [objective.value() for _ in range(2)] == pytest.approx([expected] * 2, rel=1e-12)
    assert torch.equal(x, X)


def hard_examples(m, b):
    each = F.cross_entropy(m(b[0]), b[1], reduction="none")
    hard = each > 1.0
    return each[hard].sum(), int(hard.sum())


def only_confident(m, b):
    out = m(b[0])
    sure = out.softmax(1).max(1).values > 0.45
    return out[sure], b[1][sure]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", ["batch_loss", "forward"])
def test_units_that_depend_on_the_weights_are_refused_where_they_change(kind, kept, monkeypatch):
    monkeypatch.setattr("orograph.batches.CACHE_BYTES", 2**20 if kept else 0)
    model, loader = small_mlp(), DataLoader(TensorDataset(X, Y), 25, shuffle=True)
    objective = Objective.from_batch_loss(model, hard_examples, loader) if kind == "batch_loss" else Objective(model, nn.CrossEntropyLoss(), loader, forward=only_confident)
    objective.value()
    with pytest.raises(ValueError, match="number of units depends on the weights"):
        objective.at(objective.theta * 0).value()
