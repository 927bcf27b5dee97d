"""Whether a map that a caller gives is what linear algebra takes it for: symmetric, linear, the same at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

CHANGES = "matmat changes the vectors that it is given. Let it return new ones: use V * x, not V.mul_(x)."


class Vectors(Protocol):
    """The space that the vectors live in, as `Space` has it."""

    def inner(self, U: Tensor, V: Tensor) -> Tensor: ...
    def norm(self, V: Tensor) -> Tensor: ...
    def sample(self, seed: int, index: int, kind: Literal["normal"]) -> Tensor: ...


def refuse_image(product: Any, columns: Tensor) -> None:
    """TypeError or ValueError where the image of `columns` (n, k) is no tensor like them."""
    if not isinstance(product, Tensor):
        raise TypeError(f"matmat returned a {type(product).__name__}. It must return a tensor of the shape, dtype and device of the one that it is given.")
    if product.shape != columns.shape:
        size, k = columns.shape
        raise ValueError(f"matmat must map ({size}, k) to ({size}, k), and gave {tuple(product.shape)} for k = {k}.")
    if product.dtype != columns.dtype or product.device.type != columns.device.type:
        raise TypeError(
            f"matmat was given {columns.dtype} on {columns.device} and returned {product.dtype} on {product.device}. "
            "Let it return product.to(V), or give LinearOperator that dtype and device."
        )


def prove_symmetry(product: Callable[[Tensor], Tensor], space: Vectors, noise: float) -> None:
    r"""ValueError for a map that is not symmetric, not linear, not repeatable, or changes its input.

    With u random, v the sum of a random vector and of Au, each of length 1, and w = u - v / 2: $u^\top A v = v^\top A u$, and $A w = A u - A v / 2$, which neither an
    affine nor a random map fulfils. Au is in v so that the largest eigenvalues show in |Av|, which is the scale of what rounding may do. The bound is $\nu^{2/3}$ of it,
    for the `noise` $\nu$ of a product: between $\nu$ and its root, since products may cancel inside.
    """
    u = _unit(space.sample(0, -1, "normal"), space)
    image_u = _untouched(product, u[:, None])[:, 0]
    v = _unit(space.sample(0, -2, "normal"), space)
    if bool(image_u.any()):
        v = _unit(v + _unit(image_u, space), space)
    pair = torch.stack([v, u - v / 2], dim=1)
    image_v, image_w = _untouched(product, pair).unbind(dim=1)
    scale = max(float(space.norm(image)) for image in (image_u, image_v, image_w))
    bound = noise ** (2 / 3) * scale
    left, right = float(space.inner(u, image_v)), float(space.inner(v, image_u))
    off = float(space.norm(image_w.double() - image_u.double() + image_v.double() / 2))
    if off > bound:
        again = float(space.norm(_untouched(product, u[:, None])[:, 0].double() - image_u.double()))
        if again > bound:
            raise ValueError(
                f"matmat is not repeatable: two products with the same vector differ by {again / scale:.2g} of their size. Fix its random numbers, and take dropout "
                f"and shuffling out. {_cure(again / scale)}"
            )
        raise ValueError(
            f"matmat is not linear: A(u - v/2) and Au - Av/2 differ by {off / scale:.2g} of their size. A constant term, a function of v, or columns that "
            f"depend on each other are no matrix. {_cure(off / scale)}"
        )
    if abs(left - right) > bound:
        raise ValueError(
            f"matmat is not symmetric: u'Av = {left:.6g} and v'Au = {right:.6g} for the same u and v. Use the symmetric part, (A + A') / 2, or A'A. "
            f"{_cure(abs(left - right) / scale)}"
        )


def _cure(share: float) -> str:
    """What to do where the fault is as small as rounding in low precision."""
    return f"If that is honest rounding, state it: LinearOperator(..., noise={share:.1g})." if share < 0.05 else ""


def _unit(vector: Tensor, space: Vectors) -> Tensor:
    return vector / space.norm(vector).clamp(min=torch.finfo(vector.dtype).tiny).to(vector.dtype)


def _untouched(product: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
    """The image of the columns, which must be the same bits afterwards."""
    kept = columns.clone()
    image = product(columns)
    if not torch.equal(kept, columns):
        raise ValueError(CHANGES)
    return image
