"""Axes of tensors that a permutation of units would move together: a small algebra of sizes.

An axis is a *leaf*, a *product* of axes (heads x entries of a head, in row-major order), or a *join* of axes end to end (query, key, value).
What is found to move together is made one by `unify`; a leaf that turns out to have parts is split, for all tensors that hold it.

The parts of a product or a join are always smaller than the whole: parts that contribute nothing (factors of size 1, segments of
size 0) are left out, and one remaining part stands for the whole. So no axis can contain itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["leaf", "product", "join"]
UNEQUAL = "one operation groups these entries in one way and another operation in another way"


@dataclass(eq=False)
class Axis:
    """One axis; `frozen`: its entries must stay where they are, for the `reason` given."""

    size: int
    kind: Kind = "leaf"
    children: list[Axis] = field(default_factory=list)
    frozen: bool = False
    reason: str = ""
    _same: Axis | None = field(default=None, repr=False)

    @property
    def root(self) -> Axis:
        """The axis that stands for all that were unified with this one."""
        axis = self
        while axis._same is not None:
            if axis._same._same is not None:  # shorten the way for the next caller
                axis._same = axis._same._same
            axis = axis._same
        return axis


def product(parts: Sequence[Axis]) -> Axis:
    """Row-major product; factors of size 1 are left out, and a single factor is itself."""
    factors = [factor for part in parts for factor in factors_of(part) if factor.size != 1]
    if len(factors) <= 1:
        return factors[0] if factors else Axis(1)
    return Axis(math.prod(f.size for f in factors), "product", factors)


def join(parts: Sequence[Axis]) -> Axis:
    """Parts end to end; empty parts are left out, and a single part is itself."""
    segments = [segment for part in parts for segment in segments_of(part) if segment.size]
    if len(segments) <= 1:
        return segments[0] if segments else Axis(0)
    return Axis(sum(s.size for s in segments), "join", segments)


def factors_of(axis: Axis) -> list[Axis]:
    """The factors of a product, each a leaf or a join; factors of size 1 are left out, unless nothing else is there."""
    axis = axis.root
    if axis.kind != "product":
        return [axis]
    found = [factor for child in axis.children for factor in factors_of(child) if factor.size > 1]
    return found or [Axis(1)]


def segments_of(axis: Axis) -> list[Axis]:
    """The segments of a join, each a leaf or a product."""
    axis = axis.root
    if axis.kind != "join":
        return [axis]
    found = [segment for child in axis.children for segment in segments_of(child)]
    axis.children = list(found)  # cut again and again, a join stays flat
    return found


def leaves_of(axis: Axis) -> list[Axis]:
    """All leaves, in order."""
    axis = axis.root
    return [axis] if axis.kind == "leaf" else [leaf for child in axis.children for leaf in leaves_of(child)]


def freeze(axis: Axis, reason: str = "") -> None:
    """No entry of this axis may move; the first reason given is kept."""
    for leaf in leaves_of(axis):
        leaf.frozen, leaf.reason = True, leaf.reason or reason


def unify(a: Axis, b: Axis) -> None:
    """From now on both move together. Where their structures cannot agree, neither moves."""
    a, b = a.root, b.root
    if a is b:
        return
    if a.size != b.size:
        raise ValueError(f"axes of {a.size} and {b.size} entries cannot move together.")
    if a.kind == "leaf" or b.kind == "leaf":
        leaf, other = (a, b) if a.kind == "leaf" else (b, a)
        leaf._same = other
        if leaf.frozen:
            freeze(other, leaf.reason)
        return
    aligned = _align(a, b) if a.kind == b.kind else False
    if not aligned:
        freeze(a, UNEQUAL)
        freeze(b, UNEQUAL)
        return
    a.root._same = b.root if a.root is not b.root else None


def _align(a: Axis, b: Axis) -> bool:
    """Unify the parts of two products, or of two joins, splitting leaves where sizes differ."""
    multiply = a.kind == "product"
    left, right = (factors_of(a), factors_of(b)) if multiply else (segments_of(a), segments_of(b))
    while left and right:
        x, y = left[0].root, right[0].root
        small, large = (x, y) if x.size <= y.size else (y, x)
        if small.size != large.size:
            rest = large.size // small.size if multiply else large.size - small.size
            if large.kind != "leaf" or (multiply and large.size % small.size):
                return False
            split(large, [small.size, rest], "product" if multiply else "join")
            parts = list(large.children)
            if x is large:
                left[:1] = parts
            else:
                right[:1] = parts
            continue
        unify(x, y)
        left, right = left[1:], right[1:]
    return not left and not right


def split(leaf: Axis, sizes: Sequence[int], kind: Kind) -> None:
    """A leaf turns out to be a product, or a join, of parts."""
    leaf.children = [Axis(size, frozen=leaf.frozen, reason=leaf.reason) for size in sizes]
    leaf.kind = kind


def regrouped(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis] | None:
    """The axes of a reshaped tensor, or None where a shape cuts through what cannot be cut."""
    queue = [factor for axis in axes for factor in factors_of(axis) if factor.size > 1]
    found = []
    for size in sizes:
        taken, need = [], size
        while need > 1:
            if not queue:
                return None
            factor = queue.pop(0).root
            if factor.kind == "product":
                queue[:0] = factors_of(factor)
                continue
            if factor.size > need:
                if factor.kind != "leaf" or factor.size % need:
                    return None
                split(factor, [need, factor.size // need], "product")
                queue[:0] = factor.children
                continue
            if need % factor.size:
                return None
            taken.append(factor)
            need //= factor.size
        found.append(product(taken) if taken else Axis(1))
    return None if queue else found


def cut(axis: Axis, start: int, stop: int) -> Axis | None:
    """The part [start, stop) of a join; a leaf becomes one; None for a product."""
    if start == 0 and stop == axis.root.size:
        return axis.root
    if axis.root.kind == "product":
        return None
    if axis.root.kind == "leaf":
        pieces = [size for size in (start, stop - start, axis.root.size - stop) if size]
        split(axis.root, pieces, "join")
    found, place = [], 0
    for segment in segments_of(axis):
        begin, end = max(start, place), min(stop, place + segment.size)
        if begin < end:
            part = cut(segment, begin - place, end - place)
            if part is None:
                return None
            found.append(part)
        place += segment.size
    return join(found) if found else Axis(0)


def moved(axis: Axis, orders: dict[Axis, Tensor]) -> Tensor:
    """Where each entry of the permuted axis comes from (size,), for the `orders` of its leaves; a leaf without one stays."""
    axis = axis.root
    if axis.kind == "leaf":
        return orders.get(axis, torch.arange(axis.size))
    if axis.kind == "product":
        index = torch.zeros(1, dtype=torch.int64)
        for child in factors_of(axis):
            index = (index[:, None] * child.size + moved(child, orders)).flatten()
        return index
    starts, parts = 0, []
    for child in segments_of(axis):
        parts.append(moved(child, orders) + starts)
        starts += child.size
    return torch.cat(parts)
