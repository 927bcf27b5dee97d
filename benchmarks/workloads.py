"""The three workloads that every benchmark runs on: real data, trained for a while, with a last batch shorter than the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orograph import Objective
from orograph.studies.networks import GPT, cnn, mlp
from orograph.studies.problems import digits, topics

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A trained network with its loss and data, in batches."""

    name: str
    model: nn.Module
    batches: list[Batch]

    @property
    def criterion(self) -> nn.Module:
        """Mean cross-entropy in all three."""
        return nn.CrossEntropyLoss()

    def objective(self, dtype: torch.dtype | None = None) -> Objective:
        """The objective as a user makes it."""
        return Objective(self.model, self.criterion, self.batches, dtype=dtype)


def digits_mlp() -> Workload:
    """8,970 parameters, 1,000 digits in batches of 350, 350, 300."""
    x, y = digits().train
    model = _trained(mlp(64, 64, 64, 10, seed=0), (x, y), torch.optim.SGD, 0.1, steps=200, batch=50)
    return Workload("digits MLP", model, _cut((x[:1000], y[:1000]), 350))


def digits_cnn() -> Workload:
    """38,634 parameters with BatchNorm in eval mode, 500 digits in batches of 180, 180, 140."""
    x, y = digits().train
    model = _trained(cnn(seed=0, channels=(48, 80)), (x, y), torch.optim.SGD, 0.02, steps=60, batch=50)
    return Workload("digits CNN, BatchNorm", model, _cut((x[:500], y[:500]), 180))


def byte_gpt() -> Workload:
    """1.84 M parameters, 20 windows of 64 bytes of text in batches of 7, 7, 6."""
    x, y = topics(length=64, examples=500).train
    model = _trained(GPT(seed=0), (x, y), torch.optim.AdamW, 1e-3, steps=60, batch=16)
    return Workload("byte GPT", model, _cut((x[:20], y[:20]), 7))


WORKLOADS: dict[str, Callable[[], Workload]] = {"mlp": digits_mlp, "cnn": digits_cnn, "gpt": byte_gpt}


def _cut(data: Batch, size: int) -> list[Batch]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def _trained(model: nn.Module, data: Batch, optimiser: type[torch.optim.Optimizer], learning_rate: float, *, steps: int, batch: int) -> nn.Module:
    """A few steps, so that curvature is that of a network in training and not of an initialisation."""
    generator = torch.Generator().manual_seed(0)
    steps_of = optimiser(model.parameters(), lr=learning_rate)  # type: ignore[call-arg]
    model.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(data[0]), (batch,), generator=generator)
        steps_of.zero_grad()
        F.cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()
        steps_of.step()
    return model.eval()
