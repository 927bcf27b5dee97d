"""The density of eigenvalues by stochastic Lanczos quadrature, with verified outliers taken out and put back exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import AtLeastOne, AtLeastTwo, File, Seed
from ..errors import OutOfBudget
from ..memory import size_text
from ..progress import Progress, progress_bar
from ..results import Density
from .checkpoints import State, checkpointing, job_description
from .lanczos import Krylov, orthogonalise
from .operator import LinearOperator, in_full_precision

ATOM_RESIDUAL = 1e-3  # relative true residual up to which an isolated Ritz value counts as an eigenvalue
MOST_ATOMS = 20
_MOMENT_STREAM = 1 << 20  # index of the first vector for the moments: apart from the samples' own


@in_full_precision
def spectral_density(
    op: LinearOperator,
    *,
    num_samples: AtLeastOne = 4,
    steps: AtLeastTwo = 60,
    seed: Seed = 0,
    checkpoint: File | None = None,
    progress: Progress = None,
) -> Density:
    r"""Distribution of the eigenvalues: $\phi(x) = \frac1n \sum_i \delta(x - \lambda_i)$.

    For a random unit vector v, the Gauss quadrature of $v^\top f(A) v$ has the Ritz values of `steps` Lanczos steps from v as nodes
    and the squared first components of T's eigenvectors as weights; nodes and weights of `num_samples` vectors are kept, not only a
    smoothed curve. The first vector's isolated, converged Ritz values at both ends are verified by one product each and become
    atoms of weight 1/n; the other vectors run in their complement, where the range is that of the bulk. The kernel of `pdf` has
    standard deviation `width` = range of the bulk / steps. The weights of every sample are tilted to the bulk's first two moments,
    which `steps` further vectors measure with one product each: with few samples the mean would otherwise be the largest error.

    Costs (num_samples + 1) * steps products and one per atom. The Wasserstein-1 error is at most t times the range with high
    probability for about 12/t steps (Chen, Trogdon and Ubaru 2021, arXiv:2105.06595), mostly far less. Ubaru, Chen and Saad 2017;
    Ghorbani, Krishnan and Xiao 2019, arXiv:1901.10159. Raises ValueError for bad arguments, OutOfBudget if `steps` vectors do
    not fit `op.memory`.
    """
    steps = min(steps, op.size)
    need = (steps + 1 + MOST_ATOMS) * op.size * torch.finfo(op.dtype).bits // 8
    if need > op.memory:
        raise OutOfBudget(f"spectral_density(steps={steps}) needs {size_text(need)} for its basis, the budget is {size_text(op.memory)}. Use fewer steps or give the operator a larger memory=.")
    before = op.products
    job = job_description(op, checkpoint, what="density", samples=num_samples, steps=steps, seed=seed)
    with checkpointing(checkpoint, job) as (found, keep), progress_bar(progress, "spectral density") as report:
        state = found or {}
        op.products += int(state.get("products", torch.zeros(1))[0])
        spent = op.products - before
        for index in range(int(state.get("done", torch.zeros(1))[0]), num_samples):
            note = lambda step, index=index: report(index * steps + step, num_samples * steps, f"sample {index + 1}/{num_samples}")  # noqa: E731
            state = _add_sample(op, state, steps, seed, index, note)
            spent = op.products - before
            state |= {"done": torch.tensor([index + 1]), "products": torch.tensor([spent])}
            keep(state)
    nodes, weights, atoms = state["nodes"], state["weights"], state["atoms"]
    spread = float(nodes.max() - nodes.min()) if nodes.numel() else 0.0
    scale = max(float(nodes.abs().max()) if nodes.numel() else 0.0, float(atoms.abs().max()) if len(atoms) else 0.0, torch.finfo(torch.float64).tiny)
    return Density(nodes=nodes, weights=weights, atoms=atoms, size=op.size, width=max(spread / steps, 1e-6 * scale), products=spent)


def _add_sample(op: LinearOperator, state: State, steps: int, seed: int, index: int, note: object) -> State:
    """The state with one more sample's nodes and weights; the first sample also finds the atoms and the bulk's moments."""
    deflated = state.get("vectors", torch.zeros(0, op.size, dtype=op.dtype)).to(op.device)
    krylov = Krylov(op, steps, deflated)
    if not krylov.begin(op.space.sample(seed, index, "sphere")):
        raise ValueError("spectral_density: the verified outliers span the whole space. The operator is small: use op.dense().")
    while krylov.size < steps and not (krylov.size and krylov.exhausted):
        krylov.step()
        note(krylov.size)  # type: ignore[operator]
    values, coefficients, estimates = krylov.ritz()
    weights = coefficients[0] ** 2
    if index == 0:
        chosen, vectors, atoms = _verified(op, krylov, values, coefficients, estimates)
        bulk = torch.ones(len(values), dtype=torch.bool)
        bulk[chosen] = False
        values, weights = values[bulk], weights[bulk]
        state = {"vectors": vectors, "atoms": atoms, "moments": _moments(op, vectors, steps, seed)}
    share = 1.0 - len(state["atoms"]) / op.size
    nodes = torch.zeros(1, steps, dtype=torch.float64)
    masses = torch.zeros(1, steps, dtype=torch.float64)  # a sample that ended early is padded with nodes of weight zero
    nodes[0, : len(values)] = values
    nodes[0, len(values) :] = values[-1] if len(values) else 0.0
    if len(values):
        masses[0, : len(values)] = match_moments(values, weights / weights.sum(), state["moments"]) * share
    empty = torch.zeros(0, steps, dtype=torch.float64)
    return state | {"nodes": torch.cat([state.get("nodes", empty), nodes]), "weights": torch.cat([state.get("weights", empty), masses])}


def _verified(op: LinearOperator, krylov: Krylov, values: Tensor, coefficients: Tensor, estimates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, vectors as rows, eigenvalues) of the isolated Ritz pairs at both ends whose true residual is small."""
    spread = float(values[-1] - values[0])
    gap = spread / (2 * len(values))
    good = estimates <= 0.5 * ATOM_RESIDUAL * values.abs()
    chosen: list[int] = []
    if not krylov.exhausted:
        for order in (range(len(values) - 1, 0, -1), range(len(values) - 1)):
            for i in order:
                inward = i - 1 if order.step < 0 else i + 1
                if i in chosen or not good[i] or abs(float(values[i] - values[inward])) < gap or len(chosen) >= min(MOST_ATOMS, len(values) - 1):
                    break
                chosen.append(i)
    rows = krylov.vectors(coefficients[:, chosen])
    if not chosen:
        return torch.tensor([], dtype=torch.long), rows, torch.zeros(0, dtype=torch.float64)
    image = op @ rows.T.contiguous()
    residuals = op.space.norm(image - rows.T * values[chosen].to(op.device, op.dtype)).cpu()
    kept = residuals <= ATOM_RESIDUAL * values[chosen].abs()
    return torch.tensor(chosen)[kept], rows[kept.to(op.device)], values[chosen][kept]


def _moments(op: LinearOperator, deflated: Tensor, count: int, seed: int) -> Tensor:
    """First two moments of the bulk (2,), from one product with each of `count` fresh vectors: v'Av and |Av|^2."""
    total = torch.zeros(2, dtype=torch.float64)
    for index in range(count):
        v, _ = orthogonalise(op, deflated, op.space.sample(seed, _MOMENT_STREAM + index, "sphere"))
        v = v / op.space.norm(v).to(v.dtype)
        image, _ = orthogonalise(op, deflated, op @ v)
        total += torch.stack([op.space.inner(v, image), op.space.inner(image, image)]).cpu()
    return total / count


def match_moments(nodes: Tensor, weights: Tensor, moments: Tensor) -> Tensor:
    r"""The weights nearest to `weights` (sum 1) in relative entropy whose first two moments are `moments`.

    $w_i \propto w_i\, e^{a x_i + b x_i^2}$ with (a, b) from Newton's method on the convex dual (exponential tilting). Where no such
    weights exist, or they would be far from the given ones, the given ones are returned.
    """
    centre, reach = float(nodes.max() + nodes.min()) / 2, float(nodes.max() - nodes.min()) / 2
    if not reach > 1e-9 * float(nodes.abs().max()):
        return weights
    x = (nodes - centre) / reach
    features = torch.stack([x, x**2], dim=1)
    first, second = ((moments[0] - centre) / reach), (moments[1] - 2 * centre * moments[0] + centre**2) / reach**2
    target = torch.stack([first, second])
    tilt = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        tilted = torch.softmax(weights.clamp(min=1e-300).log() + features @ tilt, dim=0)
        gradient = tilted @ features - target
        if float(gradient.abs().max()) < 1e-12:
            return tilted
        spread = features - tilted @ features
        curvature = (spread.T * tilted) @ spread + 1e-12 * torch.eye(2, dtype=torch.float64)
        tilt = tilt - torch.linalg.solve(curvature, gradient)
        if float(tilt.abs().max()) > 5.0:
            break
    return weights
