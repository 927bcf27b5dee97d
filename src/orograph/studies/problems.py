"""Real data that ship inside packages: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """Training and held-out examples of one task."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def digits(*, held_out: int = 597, dtype: torch.dtype = torch.float32) -> Problem:
    """1,797 handwritten digits of 8 x 8 pixels in [0, 1] (UCI; inside scikit-learn), split at random with a fixed seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits are inside scikit-learn: pip install 'orograph[demo]'.") from error
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images / 16, dtype=dtype), torch.as_tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, test = order[held_out:], order[:held_out]
    return Problem((x[fit], y[fit]), (x[test], y[test]))


def mlp(*widths: int, seed: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """A fully connected network, the same for the same seed; the global random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])
