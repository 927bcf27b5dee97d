"""What every operation says of the axes of its tensors: which move together, which must stay, and which the result has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Axis, cut, freeze, join, product, regrouped, unify

Axes = list[Axis]
AxesOf = Callable[[Tensor], Axes]
Rule = Callable[[AxesOf, Any, Any, list[Tensor]], "list[Axes] | None"]  # (axes of its tensors, args, kwargs, results) -> axes of the results
INPUT = "an axis of the data"
OUTPUT = "an axis of the outputs"
POSITIONS = "positions in space or in a kernel"
ROWS = "rows of an embedding, which the data choose by number"
INHERENT = {INPUT, OUTPUT, POSITIONS, ROWS}  # what no network can permute
ORDERED = "an operation for which the order of entries counts runs along this axis"
PICKED = "an operation picks entries by their position"
POINTWISE = {"masked_fill", "where", "gelu", "softplus", "_prelu_kernel", "hardswish", "hardswish_", "log_sigmoid_forward", "rsub", "floor_divide", "copy", "copy_", "lerp", "addcmul"}
SAME_AXES = {
    "clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "_softmax", "_log_softmax", "_safe_softmax", "dropout", "native_dropout", "zeros_like", "ones_like", "full_like", "fill", "zero_",
    "bernoulli", "rand_like", "empty_like",
}  # fmt: skip


def _view(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes] | None:
    found = regrouped(axes_of(args[0]), list(made[0].shape))
    return None if found is None else [found]


def _transpose(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    axes, (i, j) = list(axes_of(args[0])), (args[1:3] if len(args) > 1 else (0, -1))
    if axes:
        axes[i], axes[j] = axes[j], axes[i]
    return [axes]


def _permute(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    return [[axes_of(args[0])[dim] for dim in args[1]]]


def _expand(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    own = axes_of(args[0])
    own = [Axis(1) for _ in range(made[0].ndim - len(own))] + own
    return [[axis if axis.root.size == size else Axis(size) for axis, size in zip(own, made[0].shape, strict=True)]]


def _unsqueeze(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    axes = list(axes_of(args[0]))
    axes.insert(args[1] % (len(axes) + 1), Axis(1))
    return [axes]


def _squeeze(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    own = axes_of(args[0])
    dims = range(len(own)) if len(args) < 2 else [d % len(own) for d in (args[1] if isinstance(args[1], Sequence) else [args[1]])]
    return [[axis for dim, axis in enumerate(own) if not (dim in dims and axis.root.size == 1)]]


def _mm(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    a, b = axes_of(args[-2]), axes_of(args[-1])
    unify(a[-1], b[-2])
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y)
    found = [*a[:-1], b[-1]]
    if len(args) == 3:  # addmm, baddbmm
        bias = axes_of(args[0])
        for back in range(1, len(bias) + 1):
            if bias[-back].root.size == found[-back].root.size:
                unify(bias[-back], found[-back])
    return [found]


def _mv(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    a, b = axes_of(args[0]), axes_of(args[1])
    unify(a[-1], b[0])
    return [a[:-1]]


def _reduce_over(place: int) -> Rule:
    """Reductions that do not depend on the order of entries; `place` is the argument that names the dimensions."""

    def rule(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
        own = axes_of(args[0])
        given = args[place] if len(args) > place and args[place] is not None else kwargs.get("dim")
        whole = given is None or (isinstance(given, Sequence) and not given)
        dims = range(len(own)) if whole else [d % len(own) for d in ([given] if isinstance(given, int) else given)]
        kept = made[0].ndim == len(own)
        found = [Axis(1) if dim in dims else axis for dim, axis in enumerate(own) if kept or dim not in dims]
        return [found for _ in made]

    return rule


def _parts(axes_of: AxesOf, tensor: Tensor, dim: int, bounds: list[tuple[int, int]]) -> list[Axes]:
    """Axes of slices along one axis."""
    own = axes_of(tensor)
    dim %= len(own)
    found = [cut(own[dim], start, stop) for start, stop in bounds]
    if any(part is None for part in found):
        freeze(own[dim], PICKED)
        found = [Axis(stop - start, frozen=True, reason=PICKED) for start, stop in bounds]
    return [[*own[:dim], part, *own[dim + 1 :]] for part in found if part is not None]


def _split(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    bounds, place = [], 0
    for tensor in made:
        bounds.append((place, place + tensor.shape[dim]))
        place += tensor.shape[dim]
    return _parts(axes_of, args[0], dim, bounds)


def _slice(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes] | None:
    given = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    dim: int = given[0]
    start, stop, step = slice(given[1], given[2], given[3]).indices(args[0].shape[dim])
    return None if step != 1 else _parts(axes_of, args[0], dim, [(start, max(stop, start))])


def _select(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    own = list(axes_of(args[0]))
    freeze(own.pop(args[1] if len(args) > 1 else 0), PICKED)
    return [own for _ in made]


def _cat(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    tensors = [t for t in args[0] if t.numel() or t.ndim > 1]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % made[0].ndim
    each = [axes_of(t) for t in tensors]
    for other in each[1:]:
        for place, (a, b) in enumerate(zip(each[0], other, strict=True)):
            if place != dim:
                unify(a, b)
    return [[join([axes[dim] for axes in each]) if place == dim else axis for place, axis in enumerate(each[0])]]


def _along(place: int, default: int | None = None) -> Rule:
    """Operations for which the order of entries along some dimensions counts; `place` is the argument that names those."""

    def rule(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
        own = list(axes_of(args[0]))
        given = args[place] if len(args) > place else kwargs.get("dims", kwargs.get("dim", default))
        whole = given is None or (isinstance(given, Sequence) and not given)
        dims = range(len(own)) if whole else [d % len(own) for d in ([given] if isinstance(given, int) else given)]
        for dim in dims:
            freeze(own[dim], ORDERED)
        found: list[Axes] = []
        for tensor in made:
            if tensor.ndim == len(own):
                found.append([_frozen(n, ORDERED) if dim in dims else own[dim] for dim, n in enumerate(tensor.shape)])
            else:
                found.append([axis for dim, axis in enumerate(own) if dim not in dims])
        return found

    return rule


def _frozen(size: int, reason: str) -> Axis:
    return Axis(size, frozen=True, reason=reason)


def _extreme(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    """Largest or smallest entries: without their numbers the order does not count."""
    if len(made) == 1 and (len(args) < 2 or isinstance(args[1], Tensor)):
        return [[]] if len(args) < 2 else [pairwise(axes_of, args[:2], made[0])]
    return _along(1)(axes_of, args, kwargs, made) or []


def pairwise(axes_of: AxesOf, tensors: Sequence[Tensor], out: Tensor) -> Axes:
    """Axes of a result of entries: every input that has an axis in full moves with it."""
    found: Axes = []
    for back in range(out.ndim, 0, -1):
        size = out.shape[-back]
        inputs = [axes_of(t)[t.ndim - back] for t in tensors if t.ndim >= back and t.shape[-back] == size]
        for other in inputs[1:]:
            if size > 1:
                unify(inputs[0], other)
        found.append(inputs[0].root if inputs else Axis(size))
    return found


def _triangle(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    own = axes_of(args[0])
    for axis in own[-2:]:
        freeze(axis, ORDERED)
    return [own]


def _stack(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % made[0].ndim
    each = [axes_of(t) for t in args[0]]
    for other in each[1:]:
        for a, b in zip(each[0], other, strict=True):
            unify(a, b)
    return [[*each[0][:dim], _frozen(len(each), PICKED), *each[0][dim:]]]


def _repeat(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    own, times = list(axes_of(args[0])), list(args[1])
    own = [Axis(1) for _ in range(len(times) - len(own))] + own
    return [[axis if n == 1 else product([Axis(n), axis]) for axis, n in zip(own, times, strict=True)]]


def _dot(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    unify(axes_of(args[0])[0], axes_of(args[1])[0])
    return [[]]


def _fresh(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    return [[Axis(size) for size in tensor.shape] for tensor in made]


def _glu(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes] | None:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    half = made[0].shape[dim]
    first, second = _parts(axes_of, args[0], dim, [(0, half), (half, 2 * half)])
    unify(first[dim], second[dim])
    return [first]


def _index(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    """Indexing with tensors: indexed dimensions stay, the others move."""
    return [_indexed(axes_of, args[0], args[1])]


def _indexed(axes_of: AxesOf, tensor: Tensor, indices: Sequence[Tensor | None]) -> Axes:
    own, dim, kept, places = axes_of(tensor), 0, list[Axis](), list[int]()
    shapes = []
    for index in indices:
        if index is None:
            kept.append(own[dim])
            dim += 1
            continue
        for axis in axes_of(index):
            freeze(axis, PICKED)
        covered = index.ndim if index.dtype in (torch.bool, torch.uint8) else 1
        for axis in own[dim : dim + covered]:
            freeze(axis, PICKED)
        places.append(len(kept))
        shapes.append((int(index.count_nonzero()),) if covered != 1 or index.dtype == torch.bool else tuple(index.shape))
        dim += covered
    new = [_frozen(size, PICKED) for size in torch.broadcast_shapes(*shapes)]
    start = places[0] if len(set(places)) == 1 else 0  # indices with a gap between them come first
    return [*kept[:start], *new, *kept[start:], *own[dim:]]


def _index_put(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    place, values = _indexed(axes_of, args[0], args[1]), axes_of(args[2])
    for back in range(1, len(values) + 1):
        if values[-back].root.size == place[-back].root.size:
            unify(values[-back], place[-back])
    return [axes_of(args[0])]


def _index_dim(axes_of: AxesOf, args: Any, kwargs: Any, made: list[Tensor]) -> list[Axes]:
    """index_select, index_add, index_copy, index_fill along one dimension."""
    own, dim = list(axes_of(args[0])), args[1] % max(args[0].ndim, 1)
    freeze(own[dim], PICKED)
    if len(args) > 3 and isinstance(args[3], Tensor) and args[3].ndim == len(own):
        for place, (a, b) in enumerate(zip(own, axes_of(args[3]), strict=True)):
            if place == dim:
                freeze(b, PICKED)
            else:
                unify(a, b)
    return [[_frozen(n, PICKED) if place == dim else own[place] for place, n in enumerate(made[0].shape)]]


SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"), _view),
    **dict.fromkeys(("t", "transpose", "t_", "transpose_"), _transpose),
    "permute": _permute,
    "expand": _expand,
    **dict.fromkeys(("unsqueeze", "unsqueeze_"), _unsqueeze),
    **dict.fromkeys(("squeeze", "squeeze_"), _squeeze),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _mm),
    "mv": _mv,
    **dict.fromkeys(("dot", "vdot"), _dot),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "var_mean", "logsumexp", "prod", "any", "all"), _reduce_over(1)),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _reduce_over(2)),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("argmax", "argmin", "flip", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"), _along(1)),
    "sort": _along(1, -1),
    **dict.fromkeys(("topk", "roll"), _along(2, None)),
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"), _split),
    "slice": _slice,
    **dict.fromkeys(("select", "unbind"), _select),
    "cat": _cat,
    "stack": _stack,
    "repeat": _repeat,
    "glu": _glu,
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _fresh),
    **dict.fromkeys(("index", "_unsafe_index"), _index),
    **dict.fromkeys(("index_put", "index_put_"), _index_put),
    **dict.fromkeys(("index_select", "index_add", "index_add_", "index_copy", "index_fill"), _index_dim),
}


def fitting(axes: Axes, tensor: Tensor) -> Axes:
    """The same axes where shapes agree; a fresh, frozen one elsewhere (mean and variance of a norm)."""
    if len(axes) != tensor.ndim:
        return [Axis(size, frozen=True, reason=POSITIONS) for size in tensor.shape]
    return [axis if axis.root.size == size else Axis(size, frozen=size > 1, reason=POSITIONS) for axis, size in zip(axes, tensor.shape, strict=True)]
