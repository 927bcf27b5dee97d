"""Losses, data and models of many kinds, each with the plain loss of the whole set as its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orograph import Objective

N = 301


@dataclass
class Case:
    """A model, how Orograph is told of its loss, and the plain loss of the whole set."""

    model: nn.Module
    criterion: Any
    data: Any  # (inputs, targets), to be cut into batches
    whole: Callable[[Callable[..., Any]], Tensor]  # loss of the whole set through `call`
    settings: dict[str, Any] = field(default_factory=dict)
    batch: Callable[[Any], Any] = lambda pair: pair  # an (inputs, targets) pair -> a batch as the user's loader yields it

    def batches(self, size: int) -> list[Any]:
        x, y = self.data
        return [self.batch(pair) for pair in zip(x.split(size), y.split(size), strict=True)]

    def objective(self, size: int) -> Objective:
        return Objective(self.model, self.criterion, self.batches(size), **self.settings)


def small_mlp(inputs: int = 4, hidden: int = 6, outputs: int = 3, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


def _xy(seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (N,), generator=g)


class TokenModel(nn.Module):
    """A tiny language model: embedding, mixing along the sequence, head tied to the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        return self.head(h + torch.tanh(self.mix(h)).cumsum(1) / 5)


class Unused(nn.Module):
    """One parameter that the loss never sees, and one that enters linearly only."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = small_mlp(), nn.Linear(5, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def _tokens(seed: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (N, 6), generator=g)
    labels = torch.randint(0, 7, (N, 6), generator=g)
    lengths = torch.randint(0, 7, (N,), generator=g)  # some rows have no valid token at all
    labels[torch.arange(6)[None] >= lengths[:, None]] = -100
    return tokens, labels


def loss_cases() -> dict[str, Case]:
    """Every kind of loss and data that the contract names."""
    x, y = _xy()
    g = torch.Generator().manual_seed(5)
    real = torch.randn(N, 3, generator=g, dtype=torch.float64)
    soft = torch.softmax(real, dim=1)
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    tokens, labels = _tokens()
    per_token = lambda out, t: F.cross_entropy(out.flatten(0, 1), t.flatten())

    def plain(criterion: Any, inputs: Tensor, targets: Tensor) -> Callable[[Callable[..., Any]], Tensor]:
        return lambda call: criterion(call(inputs), targets)

    cases = {
        "cross-entropy": (nn.CrossEntropyLoss(), y),
        "sum": (nn.CrossEntropyLoss(reduction="sum"), y),
        "class weights": (nn.CrossEntropyLoss(weight=weight), y),
        "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), y),
        "weights and smoothing": (nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), y),
        "ignored class": (nn.CrossEntropyLoss(ignore_index=1), y),
        "soft targets": (nn.CrossEntropyLoss(), soft),
        "soft targets, weights": (nn.CrossEntropyLoss(weight=weight), soft),
        "regression": (nn.MSELoss(), real),
        "regression, sum": (partial(F.mse_loss, reduction="sum"), real),
        "Huber": (nn.HuberLoss(delta=0.7), real),
        "binary": (nn.BCEWithLogitsLoss(pos_weight=weight), (real > 0).double()),
        "batchmean": (partial(F.kl_div, reduction="batchmean"), soft),
    }
    found = {name: Case(small_mlp(), criterion, (x, t), plain(criterion, x, t)) for name, (criterion, t) in cases.items()}
    logs = nn.Sequential(*small_mlp(), nn.LogSoftmax(dim=1))
    found["NLL"] = Case(logs, nn.NLLLoss(weight=weight), (x, y), plain(nn.NLLLoss(weight=weight), x, y))
    transposed = lambda model, batch: (model(batch["tokens"]).movedim(-1, 1), batch["labels"])
    as_dict = lambda pair: {"tokens": pair[0], "labels": pair[1], "name": "padded"}
    for name, tied in (("ignored tokens, dicts", False), ("tied embeddings", True)):
        whole = lambda call: per_token(call(tokens), labels)
        found[name] = Case(TokenModel(tied), nn.CrossEntropyLoss(), (tokens, labels), whole, {"forward": transposed}, as_dict)
    found["unused parameters"] = Case(Unused(), nn.CrossEntropyLoss(), (x, y), plain(nn.CrossEntropyLoss(), x, y))
    normed = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    normed(x)  # running statistics of its own
    found["BatchNorm, eval"] = Case(normed, nn.CrossEntropyLoss(), (x, y), plain(nn.CrossEntropyLoss(), x, y))
    found["counted lambda"] = Case(
        TokenModel(), per_token, (tokens, labels), lambda call: per_token(call(tokens), labels), {"count": lambda batch: int((batch[1] != -100).sum())}
    )
    return found


class Pinn(nn.Module):
    """u(t) for u' + u = 0, u(0) = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp(1, 6, 1)

    def forward(self, t: Tensor) -> Tensor:
        return self.net(t)


def pinn_loss(model: nn.Module, t: Tensor) -> tuple[Tensor, int]:
    """Sum over collocation points of the squared residual, by autograd inside the loss; and their number."""
    t = t.detach().requires_grad_()
    u = model(t)
    (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
    start = model(torch.zeros(1, 1, dtype=t.dtype))
    return ((slope + u) ** 2).sum() + len(t) * ((start - 1) ** 2).sum(), len(t)
