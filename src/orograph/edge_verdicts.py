r"""How near an optimiser is to its edge of stability, and where its own state cannot tell.

The theory of the edge holds P fixed. P is no property of the loss where it comes from the first few steps, or where an
entry of it is round-off or eps: a bias in front of BatchNorm never has a gradient in training, and a loss with running
statistics is curved along it. Such an entry makes $P^{-1} H$ as large as one likes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import OrographWarning
from .linalg.eigen import eigenpairs
from .linalg.operator import LinearOperator
from .linalg.search import CONFIDENT
from .optimizers import Limits, limits
from .renormalise import running_norms
from .subject import Subject

HOVERING = (0.8, 1.5)  # ratios to the largest stable learning rate at which training often stays
EARLY = 10.0  # steps within which second moments change by a factor
ROUND_OFF = (
    1000.0  # times the unit of the dtype and the mean divisor: gradients below it are round-off
)
NEAR_EPS = 10.0  # times eps: divisors below it are those of no gradient,
FAR_BELOW = 1e-4  # if eps is so much smaller than the mean divisor
MATTERS = 0.9  # times the ratio of all parameters: a ratio below it is another one
OWN_EDGE = 0.5  # times its own edge, from which on a coordinate counts as one that makes the ratio
WITHHELD = "withheld"
ALL = "all parameters"


@dataclass(frozen=True)
class Ratio:
    """A learning rate over the largest stable one, of some of the parameters; `doubt`: why it is no verdict, or nothing."""

    value: float
    error: float
    parameters: str = ALL
    doubt: str = ""

    @property
    def verdict(self) -> str:
        """Where the learning rate is, in words."""
        if self.doubt:
            return WITHHELD
        low, high = HOVERING
        if self.value <= low:
            return "below the edge"
        return (
            "beyond the edge"
            if self.value > high
            else "at the edge of stability, where training often stays"
        )

    def row(self, rate: float) -> dict[str, Any]:
        """As a row of a table; `rate`: the learning rate."""
        stable = rate / self.value if self.value > 0 else float("inf")
        shown = {"ratio": max(self.value, 0.0), "error": self.error, "largest_stable_rate": stable}
        return {
            "parameters": self.parameters,
            **shown,
            "verdict": self.verdict,
            "reason": self.doubt,
        }


def optimizer_ratios(subject: Subject, optimizer: Any, seed: int) -> list[Ratio]:
    """The ratio for all parameters and, where some without a memory make it, the one without these."""
    bears, other = limits(optimizer, subject.objective), other_loss(subject)
    doubt = other
    if not doubt and bears.steps < EARLY:
        steps = f"{bears.steps:.0f} step{'s' if bears.steps != 1 else ''}"
        doubt = f"the second moments are those of {steps} and still change by a factor; ask from step {EARLY:.0f} on"
    everything = torch.ones_like(bears.divisor)
    ratio = _ratio(subject, bears, everything, ALL, doubt, seed)
    empty = _without_gradient(bears)
    if ratio.value <= HOVERING[0] or not bool(empty.any()) or bool(empty.all()):
        return [ratio]
    names = _names_of(subject, bears, empty, seed)
    rest = _ratio(subject, bears, (~empty).to(everything), f"without {names}", doubt, seed)
    if not names or rest.value > MATTERS * ratio.value:
        return [ratio]
    cause = (
        f"the optimiser has seen next to no gradient of {names}, along which this loss is curved"
    )
    return [Ratio(ratio.value, ratio.error, ALL, "; ".join(filter(None, [cause, other]))), rest]


def _without_gradient(bears: Limits) -> Tensor:
    """Entries of P that are round-off or eps: the optimiser has seen no gradient there."""
    p, mean = bears.divisor, bears.divisor.double().mean()
    round_off = p <= ROUND_OFF * torch.finfo(p.dtype).eps * mean
    return round_off | ((p <= NEAR_EPS * bears.least) & (p <= FAR_BELOW * mean))


def other_loss(subject: Subject) -> str:
    """Why the objective is no loss that an optimiser trains: BatchNorm with running statistics. A warning comes with it."""
    objective = subject.objective
    if objective.mode != "eval" or not running_norms(objective.snapshot.model):
        return ""
    advice = 'training normalises with each batch, this objective with running statistics: another loss. Use Objective(..., mode="batch") for the stability of training'
    if "BatchNorm as in training" not in subject.missing:
        subject.missing["BatchNorm as in training"] = advice
        warnings.warn(
            f"stability of a network with BatchNorm: {advice}.", OrographWarning, stacklevel=4
        )
    return "training normalises with each batch, and this objective with running statistics"


def _ratio(
    subject: Subject, bears: Limits, kept: Tensor, parameters: str, doubt: str, seed: int
) -> Ratio:
    r"""$\lambda_{max}$ of $B^{-1/2} (H + D) B^{-1/2}$ on the entries kept."""
    B, D = bears.curvature, bears.decay
    if bool((B[0] == B).all() and (D[0] == D).all() and kept.all()):
        top = subject.spectrum().top
        value, upper = float(top.values[0]), float(top.intervals[0, 1])
        return Ratio(
            (value + float(D[0])) / float(B[0]), (upper - value) / float(B[0]), parameters, doubt
        )
    pairs = eigenpairs(
        _on_own_scale(subject.hessian(), bears, kept), 1, seed=seed, progress=subject.progress
    )
    if pairs.missed > CONFIDENT:
        subject.missing["certainty of edge_ratio"] = (
            f"a larger eigenvalue was missed with a chance of at most {pairs.missed:.2g}"
        )
    return Ratio(
        float(pairs.values[0]), float(pairs.intervals[0, 1] - pairs.values[0]), parameters, doubt
    )


def _on_own_scale(op: LinearOperator, bears: Limits, kept: Tensor) -> LinearOperator:
    """H + D in units of what every coordinate bears; zero on entries that are not kept."""
    root = (kept * bears.curvature.rsqrt()).to(device=op.device, dtype=op.dtype)[:, None]
    shift = root**2 * bears.decay.to(root)[:, None]
    about = op.about | {
        "curvature": f"{op.about.get('curvature', 'operator')} over the edge of every parameter"
    }
    return LinearOperator(
        lambda V: root * (op @ (root * V)) + shift * V,
        op.size,
        op.dtype,
        op.device,
        op.space,
        memory=op.memory,
        noise=op.noise,
        about=about,
        check=not op.is_proven,
    )


def _names_of(subject: Subject, bears: Limits, empty: Tensor, seed: int) -> str:
    """The parameters with entries without a memory that are curved beyond their edge, told by one random product."""
    alone = _on_own_scale(subject.hessian(), bears, empty.to(bears.divisor))
    signs = alone.space.sample(seed, 0, "rademacher").to(alone.dtype) * empty
    image, layout = (alone @ signs).abs(), subject.objective.layout
    return ", ".join(name for name in layout.names if float(image[layout[name]].max()) > OWN_EDGE)
