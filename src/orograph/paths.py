"""Paths between networks: a function of t in [0, 1] that gives Points (or flat tensors)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from .results import Point

Place = TypeVar("Place", Point, Tensor)


@dataclass(frozen=True)
class Line:
    r"""The straight line $\theta(t) = (1 - t)\,a + t\,b$ between two Points, running statistics included, or two flat tensors."""

    a: Point | Tensor
    b: Point | Tensor

    def __call__(self, t: float) -> Point | Tensor:
        """The place at `t`; 0 is a, 1 is b."""
        if isinstance(self.a, Point) and isinstance(self.b, Point):
            buffers = _between(self.a.buffers, self.b.buffers, t)
            return replace(self.a, theta=self.a.theta.lerp(self.b.theta, t), buffers=buffers, label=f"{self.a.label} to {self.b.label}, t = {t:.3g}")
        if isinstance(self.a, Tensor) and isinstance(self.b, Tensor):
            return self.a.lerp(self.b, t)
        raise TypeError(f"Line needs two Points or two flat tensors, got {type(self.a).__name__} and {type(self.b).__name__}.")


def _between(a: Mapping[str, Tensor], b: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    """Floating-point buffers interpolated; others (counters) as at the nearer end."""
    return {name: a[name].lerp(b[name], t) if a[name].is_floating_point() else (a if t < 0.5 else b)[name] for name in a}
