"""Plain training loops for studies and the demo."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..progress import Progress, progress_bar


@dataclass(frozen=True)
class Training:
    """How a training went: optimiser steps taken, and the loss over all training examples at the end."""

    steps: int
    loss: float
    reached: bool


def train_to_loss(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    batch_size: int,
    learning_rate: float,
    target: float,
    max_steps: int = 20_000,
    seed: int = 0,
    progress: Progress = None,
    title: str = "training",
) -> Training:
    """Plain SGD on cross-entropy until the loss over all of `data` is at most `target`; checked every tenth of an epoch."""
    inputs, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=learning_rate)
    every = max(1, len(inputs) // batch_size // 10)
    loss, first, order = math.inf, math.inf, torch.empty(0, dtype=torch.int64)
    model.train()
    with progress_bar(progress, title, unit="step") as report:
        for step in range(1, max_steps + 1):
            if len(order) < batch_size:
                order = torch.randperm(len(inputs), generator=generator)
            batch, order = order[:batch_size], order[batch_size:]
            optimiser.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimiser.step()
            if step % every == 0:
                with torch.no_grad():
                    loss = float(F.cross_entropy(model(inputs), labels))
                first = min(first, 10 * loss)
                report(step, _expected(step, loss, first, target, max_steps), f"loss {loss:.4f}")
                if loss <= target:
                    return Training(step, loss, True)
    return Training(max_steps, loss, False)


def _expected(step: int, loss: float, first: float, target: float, most: int) -> int:
    """Steps in all, if the loss goes on falling like 1/step, as cross-entropy does once most examples are right."""
    return min(most, max(step, int(step * loss / target)))
