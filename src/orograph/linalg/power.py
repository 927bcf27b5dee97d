"""Power iteration, the textbook's way to an extreme eigenvalue: a baseline to compare Lanczos with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..progress import Report
from .checkpoints import State, checkpointing, job_description
from .lanczos import orthogonalise
from .operator import LinearOperator


def power_vectors(op: LinearOperator, k: int, which: str, tol: float, budget: int, seed: int, checkpoint: str | Path | None, report: Report) -> Tensor:
    r"""Rows (c, n) found by $v \leftarrow (A - s) v / \|(A - s) v\|$ with deflation of those found before, until residual <= tol |value|.

    The iteration goes to the eigenvalue farthest from the shift s. For the largest (smallest) one, a run without shift finds the
    largest magnitude; where that has the wrong sign, it becomes the shift of a second run. Its error falls like
    $|\lambda_2/\lambda_1|^{2m}$; where $\lambda_{min} \approx -\lambda_{max}$ it stalls, which the true residual shows.
    """
    ends = ("largest", "smallest") if which == "both" else (which,)
    job = job_description(op, checkpoint, what="eigenpairs", method="power", k=k, which=which, tol=tol, seed=seed, start=None)
    with checkpointing(checkpoint, job) as (earlier, keep):
        run = _Power.resumed(op, earlier) if earlier is not None else _Power(torch.zeros(0, op.size, dtype=op.dtype, device=op.device), _start(op, seed, None))
        while len(run.found) < k * len(ends):
            value, ended = run.step(op, tol, max(budget - run.spent, 1), report)
            if ended:
                sign = {"largest": 1.0, "smallest": -1.0, "magnitude": value}[ends[len(run.found) // k]]
                run = run.following(op, seed, value if value * sign < 0 and not run.shift and run.spent + run.used < budget else 0.0)
            keep(run.state())
    return run.found


@dataclass
class _Power:
    """The vectors found so far, and the one at work."""

    found: Tensor  # (c, n)
    vector: Tensor  # (n,)
    shift: float = 0.0
    used: int = 0  # products for this vector
    spent: int = 0  # and for those before

    def step(self, op: LinearOperator, tol: float, budget: int, report: Report) -> tuple[float, bool]:
        """One product: the Rayleigh quotient, and whether the vector stays as it is."""
        self.used += 1
        image, _ = orthogonalise(op, self.found, op @ self.vector)
        value = float(op.space.inner(self.vector, image))
        residual = float(op.space.norm(image - value * self.vector))
        report(self.used, budget, f"value {value:.4g}, residual {residual:.2g}")
        image = image - self.shift * self.vector
        length = op.space.norm(image).to(op.dtype)
        if residual <= 0.5 * tol * abs(value) or residual == 0 or not float(length) > 0:
            return value, True
        self.vector = image / length
        return value, self.used >= budget

    def following(self, op: LinearOperator, seed: int, shift: float) -> _Power:
        """The next run: for the same vector with a `shift`, or for the next one."""
        found = self.found if shift else torch.cat([self.found, self.vector[None]])
        alive = len(found) < op.size
        return _Power(found, _start(op, seed, found) if alive else self.vector, shift, spent=self.spent + self.used)

    def state(self) -> State:
        """For a checkpoint."""
        return {"found": self.found, "vector": self.vector, "numbers": torch.tensor([self.shift, self.used, self.spent], dtype=torch.float64)}

    @classmethod
    def resumed(cls, op: LinearOperator, state: State) -> _Power:
        """From a checkpoint's state."""
        shift, used, spent = state["numbers"].tolist()
        op.products += int(used + spent)
        return cls(state["found"].to(op.device), state["vector"].to(op.device), shift, int(used), int(spent))


def _start(op: LinearOperator, seed: int, found: Tensor | None) -> Tensor:
    """A random unit vector in the complement of those found."""
    vector = op.space.sample(seed, 0 if found is None else len(found), "normal")
    if found is not None:
        vector, _ = orthogonalise(op, found, vector)
    return vector / op.space.norm(vector).to(op.dtype)
