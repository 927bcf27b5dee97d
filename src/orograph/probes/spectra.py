"""The Hessian's spectrum at a point."""

from __future__ import annotations

from ..arguments import AtLeastOne, Positive, Seed
from ..registry import Results, probe
from ..results import Result, Spectrum
from ..subject import Subject


def _says(results: Results) -> str:
    s = results["spectrum"]
    assert isinstance(s, Spectrum)
    largest, smallest = float(s.top.values[0]), float(s.bottom.values[0])
    stable = f"plain gradient descent is stable near here up to a learning rate of 2/lambda_max = {2 / largest:.3g}" if largest > 0 else "there is no direction of positive curvature"
    low, high = s.trace.interval()
    sign = "indefinite" if smallest < 0 < largest else "positive semi-definite" if largest > 0 else "negative semi-definite"
    return (
        f"The largest Hessian eigenvalue is {largest:.4g}: {stable}. The trace is {float(s.trace.value):.4g} (95 %: {float(low):.4g} to {float(high):.4g}), "
        f"and the Hessian is {sign}: its smallest eigenvalue is {smallest:.3g}, and {float(s.negative_mass.value):.1%} of all are negative by more than the density resolves."
    )


@probe(says=_says)
def spectrum(subject: Subject, *, k: AtLeastOne = 10, rel_error: Positive = 0.05, max_products: AtLeastOne = 1000, seed: Seed = 0) -> dict[str, Result]:
    """Both ends, trace and density of the Hessian's eigenvalues; see `orograph.spectrum`."""
    return {"spectrum": subject.spectrum(k=k, rel_error=rel_error, max_products=max_products, seed=seed)}
