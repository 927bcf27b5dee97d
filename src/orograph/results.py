"""The closed set of result kinds: every probe returns these, and one draw function per kind serves them all.

`Estimate` a number (or tensor) with its error · `Eigenpairs` · `Density` of eigenvalues · `Spectrum` all of one operator's
spectrum · `Curve` y(x) · `Surface` z(x, y) · `Table` rows · `Point` one setting of a network. All are frozen, carry a
`label` and a `unit`, and hold plain floats and detached tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from scipy import stats
from torch import Tensor

from .arguments import AnyNumber, AtLeastOne, NotNegative, Positive, Shape, Share, Vector, Whole, shown
from .checks import checked, refusal

Status = Literal["converged", "noise-limited", "budget-limited"]
WIDE = 30.0  # the factor between the extremes of positive values from which a picture needs a logarithmic scale
UNEQUAL = 0.05  # share of the larger loss by which two networks may differ before it is said
STATUS_ORDER: tuple[Status, ...] = ("converged", "noise-limited", "budget-limited")  # best to worst


def worst_status(statuses: Sequence[Status]) -> Status:
    """The status of a whole from the statuses of its parts."""
    return max(statuses, key=STATUS_ORDER.index, default="converged")


def unequal_losses(losses: Mapping[str, float]) -> str:
    """A sentence for networks, by name, whose losses differ by more than a twentieth, or nothing."""
    known = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    size = max(map(abs, known.values()), default=0.0)
    if len(known) < 2 or max(known.values()) - min(known.values()) <= UNEQUAL * size:
        return ""
    shown = sorted(known.items(), key=lambda item: item[1])
    shown = shown if len(shown) <= 4 else [shown[0], shown[-1]]
    return f"The networks have unequal losses: {', '.join(f'{loss:.3g} ({name})' for name, loss in shown)}."


@checked
@dataclass(frozen=True, kw_only=True)
class Estimate:
    r"""A number, or a tensor of them, with the error that it is known to.

    `value` · `sem`: standard error of the mean (0 for what is computed exactly) · `dof`: degrees of freedom behind `sem` · `skew`:
    skewness of the error of `value` · `products` spent · `status` · `least`, `most`: what the value cannot pass, nor an interval.
    """

    value: float | Tensor
    sem: NotNegative | Tensor = 0.0
    dof: Positive = math.inf
    skew: float = 0.0
    products: Whole = 0
    status: Status = "converged"
    label: str = ""
    unit: str = ""
    least: float = -math.inf
    most: float = math.inf

    def __post_init__(self) -> None:
        if isinstance(self.sem, Tensor) and (not isinstance(self.value, Tensor) or self.sem.shape != self.value.shape):
            raise refusal("Estimate", "sem", self.sem, f"the shape of value, {shown(self.value)}.")

    def interval(self, level: Share = 0.95) -> tuple[float | Tensor, float | Tensor]:
        r"""Lower and upper end of the two-sided interval that contains the true value with probability `level`.

        Student's $t$ on either side; the side of the long tail reaches `skew` $(z^2 + 2) / 12$ standard errors farther. That is the
        Cornish-Fisher shift for a studentised mean of quadratic forms (cumulants $-\gamma/4$, $-\gamma/2$: `sem` rises with the
        value). The short side keeps its $t$: the skewness is itself an estimate, and shifting both ends costs coverage.
        """
        normal = float(stats.norm.ppf(0.5 + level / 2))
        reach = float(stats.t.ppf(0.5 + level / 2, self.dof)) if math.isfinite(self.dof) else normal
        farther = self.skew * (normal**2 + 2) / 12
        ends = self.value - (reach + max(-farther, 0.0)) * self.sem, self.value + (reach + max(farther, 0.0)) * self.sem
        lower, upper = (end.clamp(self.least, self.most) if isinstance(end, Tensor) else end if end != end else min(max(end, self.least), self.most) for end in ends)
        return lower, upper


@checked
@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    r"""Eigenvalues and eigenvectors of a symmetric operator, each with its true residual.

    `values` (k,) · `vectors` (n, k), orthonormal columns · `residuals` (k,): $\|A v - \lambda v\|$, computed with one product
    per pair after the iteration · `converged` (k,) · `intervals` (k, 2): each contains an eigenvalue of the operator · `missed`:
    bound on the chance that an eigenvalue farther out than those reported went unseen · `products` · `status` of the worst pair.
    """

    values: Annotated[Tensor, Shape("k")]
    vectors: Annotated[Tensor, Shape("n", "k")] | None
    residuals: Annotated[Tensor, Shape("k")]
    converged: Annotated[Tensor, Shape("k", flags=True)]
    intervals: Annotated[Tensor, Shape("k", "2")]
    missed: NotNegative
    products: Whole
    status: Status
    label: str = "eigenvalue"
    unit: str = ""


@checked
@dataclass(frozen=True, kw_only=True)
class Density:
    r"""Distribution of an operator's eigenvalues: exact atoms plus a quadrature rule for the rest.

    $\phi(x) = \frac1n \sum_a \delta(x - \lambda_a) + \frac1s \sum_{i,j} w_{ij}\, \delta(x - x_{ij})$.
    `nodes`, `weights` (s, m): one row per sample; each row sums to 1 - len(atoms)/n · `atoms` (a,): eigenvalues with a verified
    residual, each of weight 1/n · `size`: n · `width`: standard deviation of the Gaussian by which `pdf` draws the rest.
    """

    nodes: Annotated[Tensor, Shape("s", "m")]
    weights: Annotated[Tensor, Shape("s", "m")]
    atoms: Annotated[Tensor, Shape("a")]
    size: AtLeastOne
    width: NotNegative
    products: Whole = 0
    status: Status = "converged"
    label: str = "spectral density"
    unit: str = ""
    xlabel: str = "eigenvalue"
    ylabel: str = "density"

    def pdf(self, x: Tensor | float) -> Tensor:
        """Density at `x`, smoothed by a Gaussian of standard deviation `width`; integrates to 1 with its atoms."""
        x = torch.as_tensor(x, dtype=torch.float64)
        centres = torch.cat([self.nodes.double().flatten(), self.atoms.double()])
        masses = torch.cat([self.weights.double().flatten() / len(self.weights), self._atom_masses()])
        scaled = (x.reshape(-1, 1) - centres) / self.width
        heights = torch.exp(-0.5 * scaled**2) / (self.width * math.sqrt(2 * math.pi))
        return (heights @ masses).reshape(x.shape)

    def cdf(self, x: Tensor | float) -> Tensor:
        """Share of eigenvalues <= x, from the nodes as they are (no kernel)."""
        x = torch.as_tensor(x, dtype=torch.float64)
        centres = torch.cat([self.nodes.double().flatten(), self.atoms.double()])
        masses = torch.cat([self.weights.double().flatten() / len(self.weights), self._atom_masses()])
        return ((centres <= x.reshape(-1, 1)).double() @ masses).reshape(x.shape)

    def mass(self, low: AnyNumber, high: AnyNumber) -> Estimate:
        """Share of eigenvalues in [low, high), with its standard error over the samples."""
        inside = (self.nodes >= low) & (self.nodes < high)
        atoms = float(((self.atoms >= low) & (self.atoms < high)).sum()) / self.size
        shares = (self.weights.double() * inside).sum(dim=1) + atoms
        count = len(shares)
        sem = float(shares.std() / math.sqrt(count)) if count > 1 else math.nan
        share = min(max(float(shares.mean()), 0.0), 1.0)
        return Estimate(value=share, sem=sem, dof=max(count - 1, 1), least=0.0, most=1.0, label=f"share of eigenvalues in [{low:g}, {high:g})")

    def _atom_masses(self) -> Tensor:
        return torch.full((len(self.atoms),), 1.0 / self.size, dtype=torch.float64)


@checked
@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What is known of one operator's spectrum: both ends, trace, density, and what follows from them.

    `top`, `bottom`: Eigenpairs · `trace`, `negative_mass`: Estimates · `density` · `condition`: condition numbers by the name
    of their definition (the plain ratio is undefined for a singular or indefinite operator) · `products` over all.
    """

    top: Eigenpairs
    bottom: Eigenpairs
    trace: Estimate
    density: Density
    negative_mass: Estimate
    condition: Mapping[str, float]
    products: Whole
    status: Status
    label: str = "spectrum"
    unit: str = ""

    def effective_dimension(self, z: Positive) -> float:
        r"""$\sum_i \lambda_i / (\lambda_i + z)$ over the positive eigenvalues: how many directions are steeper than about `z` > 0."""
        d = self.density
        nodes, atoms = d.nodes.double().clamp(min=0), d.atoms.double().clamp(min=0)
        bulk = (d.weights.double() * nodes / (nodes + z)).sum() / len(d.weights) * d.size
        return float(bulk + (atoms / (atoms + z)).sum())


@checked
@dataclass(frozen=True, kw_only=True)
class Curve:
    """A quantity along one axis: `x`, `y` (m,), and `error` (m,), the standard error of each `y`, or None."""

    x: Vector
    y: Vector
    error: Vector | None = None
    label: str = ""
    unit: str = ""
    xlabel: str = ""
    ylabel: str = ""


def lowest_shown(values: Tensor, *, always: bool = False) -> float | None:
    """The lowest value of a logarithmic scale: the least above zero, up to rounding of the largest one. None where values below zero or a range of less than a factor of `WIDE` ask for a linear scale, unless it is `always` logarithmic."""
    finite = values[values.isfinite()].double()
    high = float(finite.max()) if len(finite) else 0.0
    rounding = torch.finfo(torch.float64).eps * high
    if not high > 0:
        return None
    low = float(finite[finite > rounding].min())
    return low if always or (float(finite.min()) >= -rounding and high > WIDE * low) else None


@checked
@dataclass(frozen=True, kw_only=True)
class Surface:
    """A quantity over a plane: `z[i, j]` at (x[i], y[j]); `error`: the standard error of each `z`'s difference to the one at a place of reference (a probe says which), or None; `evaluations` of the loss spent; `note`: what to know of the picture; `logarithmic`: its scale, None: where positive values span a factor of 30 · `status`: whether its own error is what was asked for."""

    x: Annotated[Tensor, Shape("m")]
    y: Annotated[Tensor, Shape("k")]
    z: Annotated[Tensor, Shape("m", "k")]
    error: Annotated[Tensor, Shape("m", "k")] | None = None
    evaluations: Whole = 0
    label: str = ""
    unit: str = ""
    xlabel: str = ""
    ylabel: str = ""
    note: str = ""
    logarithmic: bool | None = None
    status: Status = "converged"

    @property
    def wide(self) -> bool:
        """Whether a picture has a logarithmic scale."""
        return self.floor is not None

    @property
    def floor(self) -> float | None:
        """The lowest value that a logarithmic scale shows: zeros, and what is lower, are drawn like it; None for a linear scale."""
        return None if self.logarithmic is False else lowest_shown(self.z, always=self.logarithmic is True)


@checked
@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of named values. `draw` says how a report shows them; `x`, `y` name the columns that a drawing uses."""

    rows: list[dict[str, Any]]
    x: str = ""
    y: str = ""
    draw: Literal["table", "bars", "heat"] = "table"
    label: str = ""
    unit: str = ""

    @property
    def columns(self) -> list[str]:
        """Column names in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __str__(self) -> str:
        """The rows below each other."""
        cells = [self.columns, *([f"{v:.4g}" if isinstance(v := row.get(c, ""), float) else str(v) for c in self.columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One setting of a network: everything that its function depends on.

    `theta` (n,): the parameters under study as one flat tensor · `buffers`: running statistics and the like, by name ·
    `frozen`: the parameters outside the study, by name. A flat tensor alone is not a network: with one BatchNorm network's
    parameters and another's running statistics, accuracy is lost.
    """

    theta: Annotated[Tensor, Shape("n")]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    label: str = ""
    unit: str = ""


Result = Estimate | Eigenpairs | Density | Spectrum | Curve | Surface | Table | Point
RESULT_KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (Estimate, Eigenpairs, Density, Spectrum, Curve, Surface, Table, Point)
}
