r"""Krylov subspaces one after another, each in the orthogonal complement of all before.

Run i gives $A Q_i = Q_i T_i + \beta_i q_i e^\top$ in that complement, so that A is the direct sum of all $T_i$ and of what is left,
$P A P$ with $P = I - Q Q^\top$, up to one coupling $\beta_i$ per run: together these move the sorted eigenvalues by at most
$2 \sum_i \beta_i$ in sum (Lidskii), the trace not at all. What a product has told is used for everything: the ends of the spectrum
from the union of all subspaces, the trace of the part that is known exactly, the density from each run's own start.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import OutOfBudget
from ..memory import size_text
from .checkpoints import State
from .lanczos import Krylov
from .operator import LinearOperator

START_STREAM, PILOT_STREAM = -(1 << 40), -(1 << 41)  # indices of samples that nothing else uses
PILOTS = 4
COLUMNS = 8  # forms per call of the operator
PER_COLUMN = 10  # vectors that one of them holds at the worst: sample, projection, image, its sum in float64, copies
FEW, LEFT_IN = 20, 0.05  # rows up to which all are taken out; beyond, the share of the variance that may be left in to save rows


@dataclass
class Runs:
    """All runs so far; the last one can still grow. Rows 0..size of `buffer` are the joint basis Q."""

    op: LinearOperator
    capacity: int
    buffer: Tensor = field(init=False)  # (capacity + 1, n)
    each: list[Krylov] = field(default_factory=list)
    following: list[Tensor] = field(default_factory=list)  # (n,): the next vector of each run that is closed
    spare: bool = True  # memory holds a second basis beside this one
    pilots: tuple[Tensor, Tensor] | None = None  # (n, p) vectors and their images under A, both without their parts in Q

    def __post_init__(self) -> None:
        self.buffer = torch.empty(self.capacity + 1, self.op.size, dtype=self.op.dtype, device=self.op.device)

    @property
    def size(self) -> int:
        """Vectors in the joint basis."""
        return sum(run.size for run in self.each)

    @property
    def rows(self) -> Tensor:
        """The joint basis (size, n)."""
        return self.buffer[: self.size]

    @property
    def last(self) -> Krylov:
        """The run that can grow."""
        return self.each[-1]

    @property
    def full(self) -> bool:
        """No further vector has a place."""
        return self.size >= self.capacity

    @property
    def exhausted(self) -> bool:
        """The last run has reached an invariant subspace: only a new start can see more."""
        return bool(self.each) and self.last.size > 0 and self.last.exhausted

    def begin(self, seed: int) -> bool:
        """Close the last run and start a new one from a random vector; False if nothing is left to start in."""
        if self.each and not self.last.size:
            return True  # it has not been used yet
        if self.each:
            self.following.append(self.last.basis[self.last.size].clone() if not self.last.exhausted else torch.zeros_like(self.buffer[0]))
        start = self.size
        run = Krylov(self.op, self.capacity - start, self.buffer[:start], room=self.buffer[start:])
        run.scale = max((other.scale for other in self.each), default=0.0)
        alive = start < min(self.capacity, self.op.size) and run.begin(self.op.space.sample(seed, START_STREAM + len(self.each), "sphere"))
        if alive:
            self.each.append(run)
        elif self.each:
            self.following.pop()
        return alive

    @property
    def captured(self) -> float:
        """Tr Q'AQ."""
        return sum(float(torch.trace(run.T[: run.size, : run.size])) for run in self.each)

    def union(self, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values of the joint basis (m,) ascending, their coefficients (m, m), and bounds on their residuals (m,); of the first `count` runs."""
        each, inner = self.each[:count], self.op.space.inner
        m = sum(run.size for run in each)
        joint = torch.zeros(m, m, dtype=torch.float64)
        outside = torch.zeros(len(each), m, dtype=torch.float64)  # [i]: what of the joint basis run i's beta multiplies
        start = 0
        for index, run in enumerate(each):
            end = start + run.size
            joint[start:end, start:end] = run.T[: run.size, : run.size]
            if run.size and not run.exhausted:
                outside[index, end - 1] = run.beta
                if end < m:
                    joint[end:, end - 1] = run.beta * inner(self.buffer[end:m].T, self.following[index]).cpu()
                    joint[end - 1, end:] = joint[end:, end - 1]
            start = end
        values, coefficients = torch.linalg.eigh(joint)
        return values, coefficients, (outside @ coefficients).abs().sum(dim=0)

    def step(self) -> None:
        """One product, one more vector in the joint basis."""
        run = self.last
        run.step()
        if self.pilots is not None:
            V, D = self.pilots
            row = run.basis[run.size - 1]
            along = self.op.space.inner(row, V).to(V.dtype)
            D = torch.addr(D, row, self.op.space.inner(row, D).to(V.dtype), alpha=-1)
            if not run.exhausted:
                D.addr_(run.basis[run.size], along, alpha=-run.beta)
            self.pilots = torch.addr(V, row, along, alpha=-1), D

    def watch(self, seed: int) -> None:
        """Draw a few vectors, at one product each, by which `remainder` sees what is left."""
        V = self.op.space.samples(seed, range(PILOT_STREAM, PILOT_STREAM + PILOTS), "sphere")
        self.pilots = V, self.op @ V

    def remainder(self) -> tuple[float, float, float]:
        r"""Rough (trace of A, mean eigenvalue $\mu$ of what is left, $\|P A P - \mu P\|_F^2$), from the pilots; good to a few tens of per cent."""
        assert self.pilots is not None  # watch() comes first
        V, D = self.pilots
        dimension = max(self.op.size - self.size, 1)
        stretch = dimension / self.op.space.norm(V).square().clamp(min=1e-300)
        forms = stretch * self.op.space.inner(V, D).diagonal()
        left = stretch * self.op.space.norm(D).square() - forms**2 / dimension
        rest = float(forms.mean())
        return self.captured + rest, rest / dimension, max(float(left.mean()), 0.0)

    def deflation(self) -> tuple[Tensor, float, float]:
        r"""Orthonormal rows Y (r, n) to take out, tr Y A Y', and the sum of |Ritz values| that rounding is relative to.

        All Ritz vectors but those that add next to nothing to $\|P A P\|_F^2$ when they are left in: every row costs algebra.
        """
        values, coefficients, residuals = self.union()
        kept = torch.ones(len(values), dtype=torch.bool)
        if self.pilots is not None and self.spare and len(values) > FEW:
            _, mean, square = self.remainder()
            share = (values - mean) ** 2 + 2 * residuals**2
            order = share.argsort()
            kept[order[share[order].cumsum(0) <= LEFT_IN * square]] = False
        rows = self.rows if bool(kept.all()) else coefficients[:, kept].T.to(self.op.device, self.op.dtype) @ self.rows
        return rows, float(values[kept].sum()), float(values[kept].abs().sum())

    def gain(self, mean: float) -> float:
        r"""How much one more vector takes off $\|P A P - \mu P\|_F^2$: $(\alpha - \mu)^2 + 2 \beta^2$, averaged over the last five."""
        run = self.last
        last = range(max(run.size - 5, 0), run.size)
        betas = [float(run.T[j + 1, j]) if j + 1 < run.size else run.beta for j in last]
        return sum((float(run.T[j, j]) - mean) ** 2 + 2 * beta**2 for j, beta in zip(last, betas, strict=True)) / max(len(last), 1)

    def state(self) -> State:
        """For a checkpoint."""
        extra = 1 if self.each and not self.last.exhausted else 0
        found: State = {"rows": self.buffer[: self.size + extra], "room": torch.tensor([self.capacity, self.spare])}
        if self.pilots is not None:
            found["pilot_vectors"], found["pilot_images"] = self.pilots
        for index, run in enumerate(self.each):
            found[f"T{index}"] = run.T[: run.size, : run.size].clone()
            found[f"run{index}"] = torch.tensor([run.size, run.beta, run.log_betas, run.scale], dtype=torch.float64)
            found[f"discarded{index}"] = run.discarded
        if self.following:
            found["following"] = torch.stack(self.following)
        return found

    @classmethod
    def resumed(cls, op: LinearOperator, room: Room, state: State | None) -> Runs:
        """From a checkpoint's state, or at the beginning."""
        runs, capacity = cls(op, room.capacity, spare=room.spare), room.capacity
        if state is None or "room" not in state:
            return runs
        if "pilot_vectors" in state:
            V, D = (state[name].to(op.device) for name in ("pilot_vectors", "pilot_images"))
            runs.pilots = V.T.contiguous().T, D.T.contiguous().T  # the layout decides the last bit
        runs.buffer[: len(state["rows"])] = state["rows"].to(op.device)
        runs.following = list(state["following"].to(op.device)) if "following" in state else []
        start = 0
        while (numbers := state.get(f"run{len(runs.each)}")) is not None:
            size, beta, log_betas, scale = numbers.tolist()
            index = len(runs.each)
            run = Krylov(
                op, capacity - start, runs.buffer[:start], size=int(size), beta=beta, log_betas=log_betas, scale=scale,
                discarded=state[f"discarded{index}"].cpu(), room=runs.buffer[start:],
            )  # fmt: skip
            run.T[: run.size, : run.size] = state[f"T{index}"].cpu()
            runs.each.append(run)
            start += run.size
        return runs


@dataclass(frozen=True)
class Room:
    """How `op.memory` is shared: vectors in the basis, whether a second basis fits, and columns of a product at a time."""

    capacity: int
    spare: bool
    columns: int
    forms_lost: bool = False  # those of a checkpoint: they were drawn outside of a second basis, for which there is no room now


def share_memory(op: LinearOperator, most: int, beside: int, state: State | None = None) -> Room:
    """A basis of at most `most` vectors, when `beside` others are needed at some time, and at others a block of columns.

    A job that goes on from `state` shares memory as it did before, so that its numbers are the same, unless there is less now.
    """
    item = op.size * torch.finfo(op.dtype).bits // 8
    fits = op.memory // item
    left = max(fits - max(beside, PER_COLUMN * COLUMNS), 0)
    capacity, spare, lost = min(most, left), True, False
    if state is not None and "room" in state:
        held, (earlier, spare) = len(state["rows"]), state["room"].tolist()
        capacity = max(min(int(earlier), capacity), held)
        if fits < held + PER_COLUMN:
            need = size_text((held + PER_COLUMN) * item)
            raise OutOfBudget(f"the checkpoint holds {held} vectors of {op.size} entries, which take {need} with those of a product; the operator's memory is {size_text(op.memory)}. Give it a larger memory=.")
        lost = bool(spare) and left < 2 * capacity and len(state["forms"]) > 0
    return Room(capacity, bool(spare) and left >= 2 * capacity, max(1, min(COLUMNS, (fits - capacity) // PER_COLUMN)), lost)
