"""Which slice of the flat vector theta belongs to which parameter."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter


@dataclass(frozen=True)
class Layout:
    """Parameter names, in the model's order, with their shapes and their places in theta."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    def __getitem__(self, name: str) -> slice:
        if name not in self.names:
            raise KeyError(f"layout[{name!r}]: no such parameter. There are: {', '.join(self.names)}.")
        index = self.names.index(name)
        start = sum(shape.numel() for shape in self.shapes[:index])
        return slice(start, start + self.shapes[index].numel())

    @property
    def sizes(self) -> list[int]:
        """Entries of each parameter."""
        return [shape.numel() for shape in self.shapes]

    @property
    def size(self) -> int:
        """Entries of theta."""
        return sum(self.sizes)

    @property
    def blocks(self) -> tuple[tuple[str, int], ...]:
        """(name, entries) of each parameter, in order."""
        return tuple(zip(self.names, self.sizes, strict=True))

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat vector (n,), or of rows (k, n), one per parameter, in the parameters' shapes, behind k."""
        return [part.view((*vector.shape[:-1], *shape)) for part, shape in zip(vector.split(self.sizes, dim=-1), self.shapes, strict=True)]

    def flatten(self, tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """One flat vector (n,) from a tensor per parameter; None is a block of zeros. dtype and device as `like`."""
        parts = [
            like.new_zeros(size) if tensor is None else in_full(tensor.detach()).reshape(-1).to(like.dtype)
            for tensor, size in zip(tensors, self.sizes, strict=True)
        ]
        return torch.cat(parts)


def in_full(tensor: Tensor) -> Tensor:
    """A gradient as a dense tensor: that of an embedding may be sparse, and its own derivative passes through here."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def select_layout(parameters: Mapping[str, Tensor], aliases: Mapping[str, str], params: str | Sequence[str] | None) -> Layout:
    """The parameters under study: all that require grad, or those that `params` (names or globs) asks for."""
    names = [name for name, tensor in parameters.items() if tensor.requires_grad] if params is None else select_names(params, aliases)
    for name in names:
        if isinstance(parameters[name], UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialised yet (a lazy module). Run one batch through the model first.")
        if not parameters[name].is_floating_point():
            raise TypeError(f"parameter {name!r} is {parameters[name].dtype}: only floating-point parameters have curvature. Leave it out of params=.")
    if not names:
        raise ValueError("no parameter requires grad. Name the ones to study: params=['layer.weight', 'head.*'].")
    return Layout(tuple(names), tuple(parameters[name].shape for name in names))


def select_names(wanted: str | Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """Canonical names that match `wanted` (names or globs), in the model's order. `aliases`: every name -> canonical name."""
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    if not patterns:
        raise ValueError("params=[] selects nothing. Leave params out for every parameter that requires grad.")
    chosen = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"params needs names or globs (text), got {type(pattern).__name__}.")
        hits = {canonical for name, canonical in aliases.items() if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise ValueError(f"params: {pattern!r} matches no parameter. There are: {', '.join(aliases)}.")
        chosen |= hits
    return [name for name in dict.fromkeys(aliases.values()) if name in chosen]
