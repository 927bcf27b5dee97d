"""What a probe is given: the objective, operators and findings that several probes share, and a place for what it could not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from .arguments import AtLeastOne
from .checks import checked
from .curvature import ggn, hessian
from .linalg.lanczos import Krylov, krylov_from
from .linalg.low_rank import LowRank
from .linalg.operator import LinearOperator
from .linalg.spectra import spectrum_and_low_rank
from .objective import Objective
from .progress import Progress
from .results import Spectrum

T = TypeVar("T")
SPECTRUM: dict[str, Any] = {"k": 10, "rel_error": 0.05, "max_products": 1000, "seed": 0}  # what probes ask of the Hessian's spectrum
GRADIENT_STEPS = 8


@dataclass
class Shared:
    """What several probes of one measurement use, so that nothing is built, proven or spent twice."""

    operators: dict[str, LinearOperator] = field(default_factory=dict)
    findings: dict[str, tuple[Any, int]] = field(default_factory=dict)  # name -> (what was found, products that it took)
    elsewhere: int = 0  # products of operators at other points, which nobody shares

    @property
    def products(self) -> int:
        return self.elsewhere + sum(op.products for op in self.operators.values())


@checked
@dataclass
class Subject:
    """What a probe measures: the `objective` at its point, `held_out` data where given; and where it says what it could not.

    `missing`: name of a result -> why it is not there.
    """

    objective: Objective
    held_out: Objective | None = None
    progress: Progress = None
    shared: Shared = field(default_factory=Shared)
    missing: dict[str, str] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)  # findings of others -> products that they took

    @property
    def reused(self) -> int:
        """Products of earlier probes that this one did not have to spend."""
        return sum(self.used.values())

    def once(self, name: str, find: Callable[[], T]) -> T:
        """What `find` returns, found once per measurement whoever asks for `name`."""
        if name in self.shared.findings:
            found, cost = self.shared.findings[name]
            self.used.setdefault(name, cost)
            return found  # type: ignore[no-any-return]  # by its name it is what `find` returned
        before = self.shared.products
        found = find()
        self.used[name] = 0
        self.shared.findings[name] = found, self.shared.products - before
        return found

    def operator(self, name: str, make: Callable[[Objective], LinearOperator]) -> LinearOperator:
        """An operator at the objective's point, built and proven once per measurement."""
        if name not in self.shared.operators:
            self.shared.operators[name] = make(self.objective)
        return self.shared.operators[name]

    def hessian(self) -> LinearOperator:
        """The Hessian at the objective's point."""
        return self.operator("hessian", hessian)

    def ggn(self) -> LinearOperator:
        """The Gauss-Newton matrix at the objective's point."""
        return self.operator("ggn", ggn)

    def gradient(self) -> Tensor:
        """dL/dtheta (n,)."""
        return self.once("gradient", self.objective.gradient)

    def spectrum(self, **settings: Any) -> Spectrum:
        """The Hessian's spectrum: with no settings the one there is, or else as the probe of that name takes it."""
        return self._spectrum(settings)[0]

    def low_rank(self) -> LowRank:
        """What the products of `spectrum` have told of the Hessian's outliers."""
        return self._spectrum({})[1]

    def _spectrum(self, settings: dict[str, Any]) -> tuple[Spectrum, LowRank]:
        there = [name for name in self.shared.findings if name.startswith("spectrum ")]
        name = there[-1] if there and not settings else f"spectrum {SPECTRUM | settings}"
        return self.once(name, lambda: spectrum_and_low_rank(self.hessian(), progress=self.progress, **(SPECTRUM | settings)))

    def gradient_krylov(self, steps: AtLeastOne = GRADIENT_STEPS) -> Krylov | None:
        r"""Lanczos on the Hessian from the gradient: $\operatorname{span}(g, Hg, ..., H^{m-1} g)$; None where the gradient is exactly zero."""
        g = self.gradient()
        return self.once(f"gradient krylov {steps}", lambda: krylov_from(self.hessian(), g, steps) if bool(g.any()) else None)
