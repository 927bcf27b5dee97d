"""A symmetric matrix that is only known by its products, and the space that its vectors live in.

This is the waist of the package: networks and data exist only on the other side of `matmat`, and everything in `linalg` sees
of an operator no more than `op @ V` and `op.space`.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from ..arguments import AtLeastOne, NotNegative
from ..checks import checked, refusal
from ..errors import OrographError, OutOfBudget
from ..memory import memory_budget, size_text
from ..restoring import restoring, under
from ..surroundings import full_precision, gradients, ordinary
from .symmetry import CHANGES, prove_symmetry, refuse_image

SampleKind = Literal["normal", "rademacher", "sphere"]
Matmat = Callable[[Tensor], Tensor]  # (n, k) -> (n, k)
Apart = Callable[[Callable[[int], Tensor], Callable[[Tensor], None]], None]  # (part b -> V_b (n, k), what takes A_b V_b of every part)

NOISE = {torch.float64: 1e-14, torch.float32: 1e-6}  # round-off of a product, relative to the operator's norm
CHUNK = 1 << 16  # rows whose dot products are summed in the working precision before float64 takes over


Function = TypeVar("Function", bound=Callable[..., Any])


def in_full_precision(function: Function) -> Function:
    """Check the arguments and the operator; then run without autograd and outside the caller's autocast, which would round bases to half precision."""

    @functools.wraps(function)
    def wrapped(op: LinearOperator, *args: Any, **settings: Any) -> Any:
        with restoring(gradients(False), full_precision(op.device.type)):
            op.prove()
            return function(op, *args, **settings)

    return checked(cast(Function, wrapped))


@dataclass(frozen=True)
class Space:
    """Flat vectors of R^n, cut into named blocks. The only place that reduces over all entries of a vector."""

    blocks: tuple[tuple[str, int], ...]  # (name, entries), in the order of the flat vector
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        return sum(entries for _, entries in self.blocks)

    def inner(self, U: Tensor, V: Tensor) -> Tensor:
        r"""$U^\top V$ accumulated in float64: (n,), (n,) -> (); (n, k), (n, m) -> (k, m); mixed shapes drop the missing axis."""
        left, right = U.reshape(len(U), -1), V.reshape(len(V), -1)
        total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
        for start in range(0, len(left), CHUNK):
            total += left[start : start + CHUNK].T @ right[start : start + CHUNK]
        return total.reshape(U.shape[1:] + V.shape[1:])

    def norm(self, V: Tensor) -> Tensor:
        """Euclidean norm of each column, accumulated in float64: (n,) -> (); (n, k) -> (k,)."""
        norms: Tensor = torch.linalg.vector_norm(V, dim=0, dtype=torch.float64)  # fp32 norms lose 1e-3 at n = 2e7
        return norms

    @under(ordinary)
    def sample(self, seed: int, index: int, kind: SampleKind) -> Tensor:
        r"""Random vector number `index` of the stream `seed`: $\mathbb{E}[v v^\top] = I$, the same on any device and process count.

        "normal": N(0, I) · "rademacher": signs · "sphere": uniform on the sphere of radius sqrt(n).
        """
        parts = []
        for name, entries in self.blocks:
            digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            if kind == "rademacher":
                part = torch.randint(0, 2, (entries,), generator=generator, dtype=torch.int8).to(self.dtype).mul_(2).sub_(1)
            else:
                part = torch.randn(entries, generator=generator, dtype=torch.promote_types(self.dtype, torch.float32))
            parts.append(part.to(self.dtype))
        vector = torch.cat(parts).to(self.device)
        if kind == "sphere":
            vector *= math.sqrt(self.size) / float(self.norm(vector))
        return vector

    def samples(self, seed: int, indices: range, kind: SampleKind) -> Tensor:
        """The samples `indices` as columns (n, len(indices))."""
        rows = torch.stack([self.sample(seed, index, kind) for index in indices])
        return rows.T if len(rows) > 1 else rows.reshape(-1, 1)  # each sample in one piece of memory, with the strides of a column


@checked
class LinearOperator:
    r"""A symmetric, deterministic linear map on flat vectors: `op @ v` (n,) and `op @ V` (n, k).

    `matmat`: (n, k) -> (n, k), must be linear and symmetric, and the same map at every call · `size`: n · `space`: where the
    vectors live (default: one block) · `memory`: bytes that a basis of vectors may take; default half of what is free.
    `apart`: for an operator that is a sum $A = \sum_b A_b$ over parts (micro-batches): see the method · `noise`: error of a product relative to the operator's norm, where it is more than the round-off of `dtype` (a half-precision
    model behind single-precision vectors) · `products` counts operator-vector products spent so far; `about` says where the operator comes from ·
    `check`: before its first use in linear algebra, three products prove that `matmat` is symmetric, linear and repeatable; they are not counted
    in `products`.
    """

    def __init__(
        self,
        matmat: Matmat,
        size: AtLeastOne,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        space: Space | None = None,
        *,
        memory: int | str | None = None,
        noise: NotNegative = 0.0,
        about: dict[str, Any] | None = None,
        apart: Apart | None = None,
        check: bool = True,
    ) -> None:
        if not dtype.is_floating_point:
            raise TypeError(f"LinearOperator(dtype={dtype}) needs a floating-point dtype, such as torch.float64.")
        self.matmat = matmat
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)
        self.space = space or Space(blocks=(("", size),), dtype=dtype, device=self.device)
        self.memory = memory_budget(memory, self.device)
        self.noise = max(noise, NOISE.get(dtype, 1e-2))
        self.about: dict[str, Any] = about or {}
        self.products = 0
        self._apart = apart
        self.is_proven = not check
        if self.space.size != size or self.space.dtype != dtype or self.space.device.type != self.device.type:
            raise ValueError(
                f"LinearOperator(size={size}, dtype={dtype}, device={self.device}) does not fit its space, which has {self.space.size} entries of "
                f"{self.space.dtype} on {self.space.device}. Take all three from the space, or leave space out."
            )

    @classmethod
    def from_dense(cls, A: Tensor) -> LinearOperator:
        """The operator of a dense symmetric matrix (n, n)."""
        if A.ndim != 2 or A.shape[0] != A.shape[1]:
            raise refusal("from_dense", "A", A, "a square matrix (n, n).")
        if not A.is_floating_point():
            raise refusal("from_dense", "A", A, "floating-point numbers. Use A.double().", TypeError)
        gap = float((A - A.T).abs().max()) if A.numel() else 0.0
        if not gap <= 1e3 * torch.finfo(A.dtype).eps * float(A.abs().max()):
            raise ValueError(f"from_dense needs a symmetric, finite matrix: max |A - A'| is {gap:.3g}. Pass (A + A.T) / 2 if you mean its symmetric part.")
        return cls(lambda V: A @ V, len(A), A.dtype, A.device, about={"curvature": "dense"}, check=False)

    @under(ordinary)
    def __matmul__(self, V: Tensor) -> Tensor:
        if not isinstance(V, Tensor) or V.layout != torch.strided or V.ndim not in (1, 2) or V.shape[0] != self.size:
            shape = tuple(V.shape) if isinstance(V, Tensor) else type(V).__name__
            raise ValueError(f"op @ V needs a dense tensor of shape ({self.size},) or ({self.size}, k), got {shape}.")
        if V.dtype != self.dtype or V.device.type != self.device.type:
            raise TypeError(f"op @ V needs {self.dtype} on {self.device}, got {V.dtype} on {V.device}. Use V.to(op.device, op.dtype).")
        columns = V.detach().reshape(self.size, -1)
        product = self._product(columns)
        self.products += columns.shape[1]
        return product.reshape(V.shape)

    def _product(self, columns: Tensor) -> Tensor:
        """What `matmat` makes of the columns, which it must not change."""
        version = 0 if columns.is_inference() else columns._version
        product = self.matmat(columns)
        if (0 if columns.is_inference() else columns._version) != version:
            raise ValueError(CHANGES)
        refuse_image(product, columns)
        product = product.detach()
        _must_be_finite(product, columns)
        return product.clone() if product.untyped_storage().data_ptr() == columns.untyped_storage().data_ptr() else product

    def prove(self) -> None:
        """Refuse a `matmat` that is not symmetric, linear and repeatable, once, by three products that are not counted."""
        if not self.is_proven:
            prove_symmetry(self._product, self.space, self.noise)
            self.is_proven = True

    def apart(self, vectors: Callable[[int], Tensor], take: Callable[[Tensor], None]) -> None:
        r"""Call `take` with A_b V_b (n, k) for every part b of $A = \sum_b A_b$, each with columns V_b = `vectors(b)` of its own.

        All parts together cost k products: a vector for each part instead of one for all is free, and says more about the trace.
        An operator that has no parts is a single one. No generator: were one left halfway, the snapshot would stay in the user's model.
        """
        if self._apart is None:
            take(self @ vectors(0))
            return
        spent = [0]

        def checked(image: Tensor) -> None:
            _must_be_finite(image, None)
            spent[0] = image.shape[1]
            take(image.detach())

        self._apart(vectors, checked)
        self.products += spent[0]

    @property
    def has_parts(self) -> bool:
        """Whether `apart` gives every part a vector of its own."""
        return self._apart is not None

    def dense(self) -> Tensor:
        """The matrix itself (n, n), column by column: n products."""
        need = 3 * self.size**2 * torch.finfo(self.dtype).bits // 8
        if need > self.memory:
            raise OutOfBudget(
                f"op.dense() of size {self.size} needs about {size_text(need)}, the budget is {size_text(self.memory)}. "
                f"Use eigenpairs, trace or spectral_density, or give the operator a larger memory=."
            )
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.cat([self @ columns for columns in identity.split(256, dim=1)], dim=1)

    def __repr__(self) -> str:
        origin = self.about.get("curvature", "operator")
        return f"<{origin} {self.size} x {self.size}, {self.dtype}, {self.device}, products={self.products}>"


def _must_be_finite(product: Tensor, columns: Tensor | None) -> None:
    if product.numel() and not bool(torch.isfinite(torch.linalg.vector_norm(product, float("inf")))):  # the largest entry: isfinite(product) would copy them all
        where = "the vector holds inf or NaN" if columns is not None and not bool(torch.isfinite(columns).all()) else "the operator overflowed or is undefined at this point"
        raise OrographError(f"op @ V is not finite: {where}.")
