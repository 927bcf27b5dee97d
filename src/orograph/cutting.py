"""Whether a batch may be cut, proven by parts of it that go through the model on their own.

The parts run in float64, with weights moved at random: a coupling of examples that is tiny, or that a weight of zero switches off, shows
there, and rounding does not. Where that fails the model's own weights and precision are taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .nesting import Batch, as_double, count_examples, join_batches, take_rows, tensors_in
from .snapshots import Snapshot
from .terms import Recipe, Term, Terms
from .weighting import HINT, LOW_PRECISION, Seen, Sum, check_outputs, first_line, mismatch

MOVED, LEAST = 0.05, 0.01  # step of a weight relative to the root mean square of its parameter, which counts as LEAST at least
ROUNDINGS = 64  # units in the last place that outputs may differ by before rounding is measured
BEYOND = 300  # times the measured rounding of a typical entry: no rounding explains more
STEPS = (1e-6, 2e-3, 0.15)  # of weights, for measuring rounding: as large as float64, float32 and half precision inside a model need
CLEAR = 0.5  # a difference that no rounding explains
PARTS = 3


@dataclass(frozen=True)
class Cut:
    """What came out of cutting a batch."""

    reason: str = ""  # why it must stay whole; empty where it may be cut
    coupled: bool = False  # the parts ran, and what they gave is not what the whole gave
    proven: bool = False  # the parts ran, and gave what the whole gave


@dataclass(frozen=True, eq=False)
class _Setting:
    """Weights, recipe and batch of a proof, with what the whole batch gave."""

    snapshot: Snapshot
    recipe: Recipe
    batch: Batch
    output: Any
    target: Any
    total: Sum

    @cached_property
    def roundings(self) -> list[float]:
        """Relative rounding of a typical entry of every output tensor, and of the loss last: what third differences along equal steps leave.

        A smooth function leaves the cube of the step, so the rest is rounding: also that of a model that works in another precision inside.
        """
        noise = [0.0]
        for step in (h for h in STEPS if h > torch.finfo(self.snapshot.point.theta.dtype).eps ** 0.4):
            rows = []
            for k in range(4):
                output, _, total = _evaluated(_moved(self.snapshot, k * step, 1), self.recipe, self.batch)
                rows.append([*_numbers(output), torch.tensor(total[1], dtype=torch.float64, device="cpu")])
            thirds = [(d - 3 * c + 3 * b - a, a) for a, b, c, d in zip(*rows, strict=True)]
            noise = [float((third.abs() / _scale(start)).nan_to_num().median()) / 20**0.5 if start.numel() else 0.0 for third, start in thirds]
            if any(noise):
                break
        return noise


def prove_weighting(snapshot: Snapshot, terms: Terms) -> str:
    """Why batches must stay whole, or "" where they may be cut; ValueError where several do not add up to the loss of the whole set.

    One batch is cut, in four random parts. With a criterion that is not torch's own, or a `count`, every batch's output is cut as well,
    and joined with its neighbour's. With mode="batch" the model couples examples by definition, so only outputs are cut; one batch is then
    the whole set, and there is nothing to prove.
    """
    recipe, reason = terms.recipe, ""
    tried = snapshot.mode == "batch"
    if recipe.batch_loss is not None or (tried and recipe.alone):
        return ""  # never cut: the user weighs
    assert recipe.criterion is not None
    previous: Seen | None = None
    before: Batch | None = None
    with torch.no_grad():
        for term in terms:
            if not tried and (term.examples >= 2 or recipe.alone):
                cut = cut_batch(snapshot, recipe, term.batch)
                if cut.reason and not cut.coupled and before is not None:
                    cut = _joined(snapshot, recipe, before, term.batch) or cut
                if recipe.alone:
                    return cut.reason
                if cut.coupled and not (recipe.criterion.known and cut_batch(snapshot, recipe, term.batch, axis=1).proven):
                    raise ValueError(cut.reason + HINT)
                tried, reason = not cut.reason or before is not None or cut.coupled, reason or cut.reason
            before = term.batch
            if not recipe.criterion.known or recipe.count is not None:
                previous = check_outputs(term, previous)
            elif tried:
                break
    return reason


def cut_batch(snapshot: Snapshot, recipe: Recipe, batch: Batch, axis: int = 0) -> Cut:
    """Send parts of a batch through the model: their outputs must be the rows of the whole's, and units * loss must add up.

    `axis`: along which its examples lie; the second in time-major batches, which are whole but do not depend on one another.
    """
    count = count_examples(batch, axis)
    if count < 2:
        return Cut()
    if any(_may_be_index(t, count) for t in tensors_in(batch)):
        return Cut("it holds a tensor of whole numbers of another length, which may be indices into the others, and an index out of range would stop the GPU")
    setting, rows = _setting(snapshot, recipe, batch), _parts(count)
    targets = tensors_in(setting.target)
    if targets and all(target.ndim == 0 for target in targets):
        return Cut("all of it has one target")
    try:
        parts = [take_rows(setting.batch, part, axis) for part in rows]
    except RuntimeError as error:
        return Cut(f"torch cannot take rows of it ({type(error).__name__}: {first_line(error)})")
    return _compared(setting, parts, rows)


def _joined(snapshot: Snapshot, recipe: Recipe, first: Batch, second: Batch) -> Cut | None:
    """Two batches in one, where they fit: what couples the examples of a batch but runs on none of its parts shows here."""
    sizes = [count_examples(first), count_examples(second)]
    if any(t.ndim == 0 or t.size(0) != size for batch, size in zip((first, second), sizes, strict=True) for t in tensors_in(batch)):
        return None  # what does not count examples, such as indices, cannot be put together
    both = join_batches(first, second)
    if both is None:
        return None
    try:
        setting = _setting(snapshot, recipe, both)
    except Exception:  # the user's code does not take this batch: nothing can be told from it
        return None
    rows = list(torch.arange(sum(sizes), device="cpu").split(sizes))
    found = _compared(setting, [take_rows(setting.batch, part) for part in rows], rows)
    return found if found.coupled else None


def _may_be_index(tensor: Tensor, count: int) -> bool:
    """On a GPU an index out of range cannot be caught."""
    whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    return tensor.is_cuda and whole and tensor.ndim > 0 and tensor.size(0) not in (1, count)


def _parts(count: int) -> list[Tensor]:
    """Random unequal parts in which no two neighbours meet, and one example by itself."""
    generator = torch.Generator().manual_seed(count)
    steps = torch.randint(1, PARTS, (count,), generator=generator, device="cpu")
    label = steps.cumsum(0) % PARTS
    if count > PARTS:
        label[torch.randint(count, (1,), generator=generator, device="cpu")] = PARTS
    return [rows for part in range(PARTS + 1) if len(rows := (label == part).nonzero().flatten())]


def _setting(snapshot: Snapshot, recipe: Recipe, batch: Batch) -> _Setting:
    """The first of: float64 with moved weights, float64, as it is; in which the whole batch gives finite numbers."""
    for there, how, data in _candidates(snapshot, recipe, batch):
        last = there is snapshot
        try:
            output, target, total = _evaluated(there, how, data)
        except Exception:  # the user's code does not run in float64, or at these weights; the last candidate has run before
            if last:
                raise
            continue
        if last or (torch.isfinite(torch.tensor(total[1], device="cpu")) and all(bool(t.isfinite().any()) for t in _numbers(output) if t.numel())):
            return _Setting(there, how, data, output, target, total)
    raise AssertionError("the last candidate is taken as it is")


def _candidates(snapshot: Snapshot, recipe: Recipe, batch: Batch) -> Iterator[tuple[Snapshot, Recipe, Batch]]:
    assert recipe.criterion is not None
    how = replace(recipe, criterion=recipe.criterion.in_double(recipe.model))
    precise = snapshot.in_double(how.calls)
    yield _moved(precise, MOVED, 0), how, as_double(batch)
    yield precise, how, as_double(batch)
    yield snapshot, recipe, batch


def _moved(snapshot: Snapshot, share: float, seed: int) -> Snapshot:
    """With every weight a random step away."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for part in snapshot.layout.split(snapshot.point.theta):
        reach = share * max(float(part.double().square().mean().sqrt()), LEAST)
        steps.append((reach * torch.randn(part.shape, generator=generator, dtype=torch.float64, device="cpu")).reshape(-1))
    theta = snapshot.point.theta
    return replace(snapshot, point=replace(snapshot.point, theta=theta + torch.cat(steps).to(theta)))


@contextmanager
def _quietly(snapshot: Snapshot) -> Iterator[None]:
    """The snapshot in place, without graphs, and without warnings of the user's code about other weights and parts of batches."""
    with snapshot.applied(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _evaluated(snapshot: Snapshot, recipe: Recipe, batch: Batch) -> tuple[Any, Any, Sum]:
    """(output, target, sum) of a batch without a graph."""
    with _quietly(snapshot):
        term = Term(recipe, batch, 0)
        output = term.output()
        return output, term.target, _sum_of(term, output)


def _sum_of(term: Term, output: Any) -> Sum:
    units = term.count_units()
    if not units:
        return 0.0, 0.0, torch.float64, 0.0
    loss = term.loss_of(output).detach()
    return units, float(loss), loss.dtype, 0.0


def _compared(setting: _Setting, parts: list[Batch], rows: Sequence[Tensor]) -> Cut:
    """Outputs first: where they differ, the loss may count on examples that a part does not have."""
    sums: list[Sum] = []
    raised = ""
    for part, index in zip(parts, rows, strict=True):
        try:
            with _quietly(setting.snapshot):
                term = Term(setting.recipe, part, 0)
                output = term.output()
                gap = _gap_beyond_rounding(setting, output, index, sum(map(len, rows)))
                if gap:
                    return Cut(f"the model couples the examples of a batch: outputs of a part of it are {gap:.1e} (relative) off those that the whole batch gives, so that the loss does not add up", coupled=True)
                sums.append(_sum_of(term, output))
        except Exception as error:  # whatever the user's code raises says that it does not take a part of this batch
            raised = raised or f"a part of it does not go through the model and the loss ({type(error).__name__}: {first_line(error)})"
    if raised:
        return Cut(raised)
    what, exact = "a batch and its parts", ROUNDINGS * torch.finfo(setting.total[2]).eps
    problem = mismatch(setting.recipe, setting.total, sums, what, min(exact, LOW_PRECISION))
    if problem is not None:
        problem = mismatch(setting.recipe, setting.total, sums, what, BEYOND * setting.roundings[-1])
    return Cut(proven=True) if problem is None else Cut(problem, coupled=True)


def _gap_beyond_rounding(setting: _Setting, output: Any, rows: Tensor, count: int) -> float:
    """Largest relative difference of a part's output to the same rows of the whole's; zero where rounding explains it."""
    wholes, found = _numbers(setting.output), _numbers(output)
    if len(wholes) != len(found):
        return 0.0  # a list with an entry per example: the loss decides
    for index, (whole, part) in enumerate(zip(wholes, found, strict=True)):
        gaps = [_relative_gap(one, part) for one in _alignments(whole, part, rows, count)]
        gap = min(gaps, default=0.0)
        if gap > min(ROUNDINGS * torch.finfo(part.dtype).eps, LOW_PRECISION) and (gap > CLEAR or gap > BEYOND * setting.roundings[index]):
            return gap
    return 0.0


def _alignments(whole: Tensor, part: Tensor, rows: Tensor, count: int) -> Iterator[Tensor]:
    """What a part's output is to be compared with: rows of the whole's along every axis that counts examples, or positions of each.

    Other axes may be shorter in a part (trimmed padding): then as far as they go. Nothing where no axis counts examples.
    """
    if whole.ndim != part.ndim or any(mine > all_ for mine, all_ in zip(part.shape, whole.shape, strict=True)):
        return
    rows = rows.to(whole.device)
    for axis, (length, kept) in enumerate(zip(whole.shape, part.shape, strict=True)):
        blocks = length // count
        if not blocks or length != blocks * count or kept != blocks * len(rows):
            continue
        inner = torch.arange(blocks, device=rows.device)
        orders = [(rows[:, None] * blocks + inner).flatten(), (inner[:, None] * count + rows).flatten()]
        for order in orders[: 1 if blocks == 1 else 2]:
            yield whole.index_select(axis, order)[tuple(slice(n) for n in part.shape)]


def _relative_gap(whole: Tensor, part: Tensor) -> float:
    """Largest difference relative to the entry, or to a typical one where that is larger."""
    if not whole.numel():
        return 0.0
    finite = whole.isfinite()
    if not torch.equal(finite, part.isfinite()):
        return float("inf")
    return float(((whole - part).abs() / _scale(whole))[finite].max()) if bool(finite.any()) else 0.0


def _scale(values: Tensor) -> Tensor:
    size = values.abs()
    known = size[size.isfinite() & (size > 0)]
    return size.clamp(min=float(known.median()) if len(known) else 1e-300)


def _numbers(output: Any) -> list[Tensor]:
    """The dense real or complex tensors of an output, the latter as pairs."""
    found = [t.detach() for t in tensors_in(output) if not t.is_nested]
    dense = [t.to_dense() for t in found if t.is_floating_point() or t.is_complex()]
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense]
