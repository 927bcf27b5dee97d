"""Power iteration, the textbook's way to an extreme eigenvalue: a baseline to compare Lanczos with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..progress import Report
from .lanczos import orthogonalise
from .operator import LinearOperator


def power_vectors(op: LinearOperator, k: int, which: str, tol: float, budget: int, seed: int, report: Report) -> Tensor:
    r"""Rows (c, n) found by $v \leftarrow (A - s) v / \|(A - s) v\|$ with deflation of those found before, until residual <= tol |value|.

    The iteration goes to the eigenvalue farthest from the shift s. For the largest (smallest) one, a run without shift finds the
    largest magnitude; where that has the wrong sign, it becomes the shift of a second run. Its error falls like
    $|\lambda_2/\lambda_1|^{2m}$; where $\lambda_{min} \approx -\lambda_{max}$ it stalls, which the true residual shows.
    """
    found = torch.zeros(0, op.size, dtype=op.dtype, device=op.device)
    spent = 0
    for end in ("largest", "smallest") if which == "both" else (which,):
        for _ in range(k):
            vector, value, used = _iterate(op, found, 0.0, tol, budget - spent, seed, len(found), report)
            spent += used
            sign = {"largest": 1.0, "smallest": -1.0, "magnitude": value}[end]
            if value * sign < 0 and spent < budget:
                vector, value, used = _iterate(op, found, value, tol, budget - spent, seed, len(found), report)
                spent += used
            found = torch.cat([found, vector[None]])
    return found


def _iterate(op: LinearOperator, found: Tensor, shift: float, tol: float, budget: int, seed: int, index: int, report: Report) -> tuple[Tensor, float, int]:
    """(vector, Rayleigh quotient, products) of one run in the complement of `found`."""
    vector, _ = orthogonalise(op, found, op.space.sample(seed, index, "normal"))
    vector = vector / op.space.norm(vector).to(op.dtype)
    value = 0.0
    for products in range(1, max(budget, 1) + 1):
        image, _ = orthogonalise(op, found, op @ vector)
        value = float(op.space.inner(vector, image))
        residual = float(op.space.norm(image - value * vector))
        report(products, budget, f"value {value:.4g}, residual {residual:.2g}")
        if residual <= 0.5 * tol * abs(value) or residual == 0:
            return vector, value, products
        image = image - shift * vector
        length = op.space.norm(image).to(op.dtype)
        if not float(length) > 0:
            return vector, value, products
        vector = image / length
    return vector, value, max(budget, 1)
