"""A walk over PyTorch's own samples of all its operations: what the rules say of axes against what permuted inputs give."""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from orograph.axes import Axis, leaves_of, moved
from orograph.tracing import Tracer

SAMPLES = 8  # of each operation
RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "normal", "uniform", "empty", "exponential", "cauchy", "geometric", "jiterator", "sparse", "hash_tensor")


def operations() -> list[Any]:
    """PyTorch's table of operations, each with sample inputs."""
    sys.modules.setdefault("expecttest", types.ModuleType("expecttest"))
    if not hasattr(sys.modules["expecttest"], "TestCase"):  # only a base class of torch's own tests
        sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return [op for op in op_db if torch.float64 in op.dtypes and not any(word in op.name for word in RANDOM)]


def samples(op: Any) -> Iterator[tuple[list[Any], Any]]:
    """Flat inputs of the first samples, and their nesting."""
    found = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in op.sample_inputs("cpu", torch.float64):
            flat, nesting = tree_flatten(((sample.input, *sample.args), sample.kwargs))
            if any(isinstance(x, Tensor) and x.numel() > 1 and x.is_floating_point() for x in flat):
                yield flat, nesting
                found += 1
            if found == SAMPLES:
                return


def check(op: Any, flat: list[Any], nesting: Any, seed: int = 0) -> str:
    """ "moves" where units were found, "stays" where not; AssertionError where the rule is wrong."""
    named = {str(i): x for i, x in enumerate(flat) if isinstance(x, Tensor) and x.is_floating_point()}
    tracer = Tracer(named)
    args, kwargs = tree_unflatten(flat, nesting)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with tracer:
            output = op(*args, **kwargs)
        made = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
        own = {name: tracer.axes(tensor) for name, tensor in named.items()}
        results = [tracer.axes(tensor) for tensor in made]
        orders: dict[Axis, Tensor] = {}
        g = torch.Generator().manual_seed(seed)
        for axes in [*own.values(), *results]:
            for leaf in (leaf for axis in axes for leaf in leaves_of(axis)):
                if not leaf.frozen and leaf.size > 1 and leaf not in orders:
                    orders[leaf] = torch.randperm(leaf.size, generator=g)
        if not orders or any(0 in tensor.shape for tensor in [*made, *named.values()]):
            return "stays"
        changed = [_moved(x, own[str(i)], orders) if str(i) in named else x for i, x in enumerate(flat)]
        args, kwargs = tree_unflatten(changed, nesting)
        after = [t for t in tree_flatten(op(*args, **kwargs))[0] if isinstance(t, Tensor)]
    for tensor, axes, new in zip(made, results, after, strict=True):
        expected = _moved(tensor, axes, orders)
        assert torch.allclose(expected, new, rtol=1e-9, atol=1e-11, equal_nan=True), f"{op.name}: a rule moves its axes wrongly"
    return "moves"


def _moved(tensor: Tensor, axes: list[Axis], orders: dict[Axis, Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        tensor = tensor.index_select(dim, moved(axis, orders))
    return tensor
