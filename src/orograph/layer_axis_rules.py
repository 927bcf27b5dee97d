"""What the operations of whole layers say of the axes of their tensors: convolutions, norms, pooling, embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .axes import Axis, freeze, product, unify
from .axis_rules import POSITIONS, ROWS, SHAPE_RULES, Axes, AxesOf, Rule, fitting


def _embedding(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    table, index = axes_of(args[0]), args[1]
    freeze(table[0], ROWS)
    return [[*(Axis(size, frozen=True, reason=POSITIONS) for size in index.shape), table[1]]]


def _convolution(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes] | None:
    x, w = axes_of(args[0]), axes_of(args[1])
    transposed, groups = bool(args[6]), int(args[8])
    for axis in (*x[2:], *w[2:]):
        freeze(axis, POSITIONS)
    if groups == 1:
        unify(x[1], w[0] if transposed else w[1])
        out = w[1] if transposed else w[0]
    elif transposed:
        return None
    else:
        group = Axis(groups)
        unify(x[1], product([group, w[1]]))
        unify(w[0], product([group, Axis(w[0].root.size // groups)]))
        out = w[0]
    if args[2] is not None:
        unify(axes_of(args[2])[0], out)
    return [[x[0], out, *(Axis(size, frozen=True, reason=POSITIONS) for size in made[0].shape[2:])]]


def _layer_norm(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    x = axes_of(args[0])
    for affine in args[2:4]:
        if affine is not None:
            for own, axis in zip(axes_of(affine), x[len(x) - affine.ndim :], strict=True):
                unify(own, axis)
    return [fitting(x, tensor) for tensor in made]


def _group_norm(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    x, groups, channels = axes_of(args[0]), int(args[6]), int(args[4])
    group = Axis(groups)
    unify(x[1], product([group, Axis(channels // groups)]))
    for affine in args[1:3]:
        if affine is not None:
            unify(axes_of(affine)[0], x[1])
    return [x, *([x[0], group] for _ in made[1:])]


def _batch_norm(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    x = axes_of(args[0])
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor):
            unify(axes_of(tensor)[0], x[1])
    return [fitting(x, tensor) if tensor.ndim == len(x) else [x[1] if size == x[1].root.size else Axis(size) for size in tensor.shape] for tensor in made]


def _pool(spatial: int) -> Rule:
    """Pooling, padding and resizing of the last `spatial` dimensions."""

    def rule(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes] | None:
        own = axes_of(args[0])
        first = len(own) - spatial
        if first < 0 or any(list(tensor.shape[:first]) != list(args[0].shape[:first]) for tensor in made):
            return None
        for axis in own[first:]:
            freeze(axis, POSITIONS)
        return [[*own[:first], *(Axis(n, frozen=True, reason=POSITIONS) for n in t.shape[first:])] for t in made]

    return rule


def _pad(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes] | None:
    return _pool(len(args[1]) // 2)(axes_of, args, kwargs, made)


def _rms_norm(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    x = axes_of(args[0])
    if len(args) > 2 and args[2] is not None:
        for own, axis in zip(axes_of(args[2]), x[len(x) - args[2].ndim :], strict=True):
            unify(own, axis)
    return [fitting(x, tensor) for tensor in made]


def _weight_norm(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    v, g = axes_of(args[0]), axes_of(args[1])
    for x, y in zip(v, g, strict=True):
        if x.root.size == y.root.size:
            unify(x, y)
    return [v, g]


def _trilinear(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    """Product of three tensors, each with new axes (`args[3:6]`), summed over `args[6]`."""
    expanded = []
    for tensor, new in zip(args[:3], args[3:6], strict=True):
        axes = list(axes_of(tensor))
        for dim in sorted(new):
            axes.insert(dim, Axis(1))
        expanded.append(axes)
    found = []
    for dim, met in enumerate(zip(*expanded, strict=True)):
        large = [axis for axis in met if axis.root.size > 1]
        for other in large[1:]:
            unify(large[0], other)
        if dim not in args[6]:
            found.append(large[0] if large else Axis(1))
    return [found]


def _embedding_bag(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    table = axes_of(args[0])
    freeze(table[0], ROWS)
    for tensor in args[1:]:
        if isinstance(tensor, Tensor):
            for axis in axes_of(tensor):
                freeze(axis, POSITIONS)
    rest: list[Axes] = [[Axis(n, frozen=True, reason=POSITIONS) for n in tensor.shape] for tensor in made[1:]]
    return [[Axis(made[0].shape[0], frozen=True, reason=POSITIONS), table[1]], *rest]


RULES: dict[str, Rule] = {
    **SHAPE_RULES,
    "embedding": _embedding,
    "_embedding_bag_forward_only": _embedding_bag,
    "_embedding_bag": _embedding_bag,
    "convolution": _convolution,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    "_weight_norm_interface": _weight_norm,
    "_trilinear": _trilinear,
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
            "_batch_norm_no_update",
        ),
        _batch_norm,
    ),
    "constant_pad_nd": _pad,
    **dict.fromkeys(
        (
            "max_pool1d",
            "avg_pool1d",
            "adaptive_avg_pool1d",
            "upsample_nearest1d",
            "_upsample_nearest_exact1d",
            "upsample_linear1d",
            "reflection_pad1d",
            "replication_pad1d",
        ),
        _pool(1),
    ),
    **dict.fromkeys(
        (
            "max_pool2d_with_indices",
            "avg_pool2d",
            "_adaptive_avg_pool2d",
            "adaptive_max_pool2d",
            "fractional_max_pool2d",
            "upsample_nearest2d",
            "_upsample_nearest_exact2d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
            "reflection_pad2d",
            "replication_pad2d",
        ),
        _pool(2),
    ),
    **dict.fromkeys(
        (
            "max_pool3d_with_indices",
            "avg_pool3d",
            "_adaptive_avg_pool3d",
            "adaptive_max_pool3d",
            "upsample_nearest3d",
            "upsample_trilinear3d",
            "reflection_pad3d",
            "replication_pad3d",
        ),
        _pool(3),
    ),
}
COMPUTES = {  # rules whose results are new numbers
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "native_layer_norm",
    "_fused_rms_norm",
    "native_group_norm",
    "embedding",
    "glu",
    "_trilinear",
}
