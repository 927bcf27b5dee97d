"""Networks whose way depends on the data, with data that take one way often and another rarely or never."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Branching(nn.Module):
    """Layers of 12 units and what a subclass chooses from."""

    parts: tuple[str, ...] = ("middle",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 5)
        if "middle" in self.parts:
            self.middle = nn.Linear(12, 12)
        if "other" in self.parts:
            self.other = nn.Linear(12, 5)
        if "experts" in self.parts:
            self.router = nn.Linear(12, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 12)) for _ in range(3))


class EarlyExit(Branching):
    """Stops early when all are confident."""

    parts = ("middle", "other")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if x.abs().amax() > 6:
            return self.other(h)
        return self.last(torch.relu(self.middle(h)))


class ExitOfEachExample(Branching):
    """Rows that are sure leave early."""

    parts = ("middle", "other")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        early = self.other(h)
        sure = early.softmax(1).amax(1) > 0.5
        out = early.clone()
        out[~sure] = self.last(torch.relu(self.middle(h[~sure])))
        return out


class TopOneExperts(Branching):
    """Every row goes to one expert."""

    parts = ("experts",)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        choice, out = self.router(h).argmax(1), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, expert(h[rows]))
        return self.last(out)


class ExpertOfTheBatch(Branching):
    """An expert is chosen by a whole number read from a tensor."""

    parts = ("experts",)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(self.experts[int((x.sum().abs() / 20).clamp(max=2))](h))


class RareReversal(Branching):
    """A branch without parameters, which the order of units matters to."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if x.abs().max() > 6:
            h = h.flip(1)
        return self.last(torch.relu(self.middle(h)))


class NumberCompared(Branching):
    """The same by a number that is read and compared."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if x.abs().max().item() > 6:
            h = h * torch.arange(12, dtype=h.dtype)
        return self.last(torch.relu(self.middle(h)))


class NumberComputedWith(Branching):
    """The same by a number with which Python computes."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if float(x.abs().max()) ** 2 > 36:
            h = h.roll(1, 1)
        return self.last(torch.relu(self.middle(h)))


class ByLength(Branching):
    """Long inputs take another layer."""

    parts = ("middle", "other")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x[:, :8]))
        return self.other(h) if x.shape[1] > 8 else self.last(torch.relu(self.middle(h)))


class UntilSmall(Branching):
    """A loop that ends when a norm is small."""

    parts = ("middle", "other")

    def forward(self, x: Tensor) -> Tensor:
        h, steps = torch.tanh(self.first(x)), 0
        while h.norm() > 3 and steps < 5:
            h, steps = 0.7 * torch.tanh(self.middle(h)), steps + 1
        return self.last(h) if steps < 5 else self.other(h)


class ByRow(Branching):
    """A Python loop over rows that goes by a list of choices."""

    parts = ("experts",)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        choices = self.router(h).argmax(1).tolist()
        return self.last(torch.stack([self.experts[c](row) for c, row in zip(choices, h, strict=True)]))


class NestedDecisions(Branching):
    """A decision inside of a branch that the data never take."""

    parts = ("middle", "other")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if bool((x.abs() > 6).any()):
            if bool((x.abs() > 20).any()):
                h = h.cumsum(1)
            return self.other(h)
        return self.last(torch.relu(self.middle(h)))


BRANCHING: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        EarlyExit, ExitOfEachExample, TopOneExperts, ExpertOfTheBatch, RareReversal, NumberCompared, NumberComputedWith,
        ByLength, UntilSmall, ByRow, NestedDecisions,
    )
}  # fmt: skip


def usual_data() -> tuple[Tensor, Tensor]:
    """90 examples that take the usual way."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(90, 8, generator=g).clamp(-4, 4), torch.randint(0, 5, (90,), generator=g)


def unseen_data(kind: str) -> list[Tensor]:
    """Batches of other examples, some of which take the rare way."""
    g = torch.Generator().manual_seed(1)
    width = 11 if kind == "ByLength" else 8
    scales = (0.01, 0.3, 1.0, 3.0, 10.0, 40.0)
    found = [scale * torch.randn(30, 8, generator=g) for scale in scales]
    return [*found, torch.randn(30, width, generator=g), *(row[None] for row in 3 * torch.randn(20, 8, generator=g))]
