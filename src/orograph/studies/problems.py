"""Real data that ship inside packages: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def topics(*, length: int, examples: int, held_out: int = 0) -> Problem:
    """English text as bytes: windows of `length` out of CPython's own help topics, with the next byte as the label of each position.

    Windows are spread evenly over the text without overlap, where there is room; the held-out ones lie between those for training.
    """
    from pydoc_data.topics import topics as pages

    text = torch.frombuffer(bytearray("\n\n".join(pages[name] for name in sorted(pages)), "utf-8"), dtype=torch.uint8).long()
    count = examples + held_out
    starts = torch.linspace(0, len(text) - length - 1, count).long()
    windows = torch.stack([text[start : start + length + 1] for start in starts])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    fit, test = windows[order[held_out:]], windows[order[:held_out]]
    return Problem((fit[:, :-1], fit[:, 1:]), (test[:, :-1], test[:, 1:]))
