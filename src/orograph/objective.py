"""The function on the landscape: L(theta) of one model, one loss and one data set, as a snapshot that training cannot move."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .batches import is_pair, map_tensors, read_batches, take_rows
from .criteria import as_criterion
from .errors import NotDeterministic
from .evaluation import Metric, PerExample, all_metrics, per_example, total_gradient, total_loss
from .layout import Layout, select_layout
from .linalg.operator import Space
from .points import differs_outside, read_point, snapshot
from .proof import prove_passes_agree, prove_still, prove_weighting
from .results import Point
from .state import Mode, Slots, differentiable, find_slots, mode_set, rng_kept, swapped
from .terms import BatchLoss, Count, Forward, Recipe, Terms, weigh

Source = Any  # Point, Objective, module, state dict, weights file, flat tensor


@dataclass(frozen=True)
class Setup:
    """All of an objective but the point that it stands at."""

    model: nn.Module
    slots: Slots
    layout: Layout
    recipe: Recipe
    terms: Terms
    mode: Mode
    metrics: Mapping[str, Metric]
    batch_size: int | None
    device: torch.device
    dtype: torch.dtype | None
    volatile: tuple[str, ...]  # buffers that a forward writes to without an effect on the loss


class Objective:
    r"""L(theta): what `criterion` would return if the whole data set were one batch, at one fixed point.

    $L(\theta) = \sum_b u_b L_b(\theta) / \sum_b u_b$ over batches of $u_b$ units (for reduction="sum": $\sum_b L_b$).

    `model`: any nn.Module; it is left as it was after every call · `criterion`: a torch loss (module, function or partial), whose
    units are known, or criterion(output, target) -> scalar, whose unit is an example, `len(target)` · `data`: (inputs, targets), a
    Dataset, or anything re-iterable that yields batches · `forward(model, batch) -> (output, target)` for batches that are no
    pair · `params`: names or globs; default all that require grad · `mode`: "eval", or "batch": BatchNorm uses each batch's own
    statistics, and the batches are part of the definition · `count(batch)`: units of a batch, where they are not `len(target)` ·
    `metrics`: name -> function of (output, target) giving a mean over the batch, or (total, count) · `batch_size` for tensors and
    Datasets · `device`, `dtype`: where and in which precision to evaluate (default: as the model is).

    Construction reads the data twice, evaluates one batch twice and a cut batch once to prove that the loss stands still and that
    batches add up; a criterion that is not torch's own is proven on the output of every batch (one forward pass).
    Raises NotDeterministic, ValueError and TypeError, each saying what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        forward: Forward | None = None,
        params: str | Sequence[str] | None = None,
        mode: Mode = "eval",
        count: Count | None = None,
        metrics: Mapping[str, Metric] | None = None,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_model(model, mode, dtype)
        place = torch.device(device) if device is not None else None
        recipe = Recipe(model, as_criterion(criterion, model, place, dtype), None, forward, count)
        self._build(recipe, data, params=params, mode=mode, metrics=metrics, batch_size=batch_size, device=place, dtype=dtype)

    @classmethod
    def from_batch_loss(
        cls,
        model: nn.Module,
        batch_loss: BatchLoss,
        data: Any,
        *,
        params: str | Sequence[str] | None = None,
        mode: Mode = "eval",
        metrics: Mapping[str, Metric] | None = None,
    ) -> Objective:
        r"""The objective of a loss that evaluates the model itself, such as a physics-informed one.

        `batch_loss(model, batch) -> (total, count)`, and $L = \sum_b total_b / \sum_b count_b$; a bare scalar only where there is one
        batch. Each element of `data` is passed as it is, with gradients enabled. `metrics`: functions of (model, batch).
        """
        _check_model(model, mode, None)
        if not callable(batch_loss):
            raise TypeError(f"batch_loss is a {type(batch_loss).__name__}. Pass batch_loss(model, batch) -> (total, count).")
        own = cls.__new__(cls)
        recipe = Recipe(model, None, batch_loss, None, None)
        own._build(recipe, data, params=params, mode=mode, metrics=metrics, batch_size=None, device=None, dtype=None)
        return own

    def _build(
        self,
        recipe: Recipe,
        data: Any,
        *,
        params: str | Sequence[str] | None,
        mode: Mode,
        metrics: Mapping[str, Metric] | None,
        batch_size: int | None,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        slots = find_slots(recipe.model)
        layout = select_layout({name: getattr(*places[0]) for name, places in slots.parameters.items()}, slots.aliases, params)
        point = snapshot(slots, layout, device=device, dtype=dtype, label=type(recipe.model).__name__)
        setup = Setup(recipe.model, slots, layout, recipe, _NO_TERMS, mode, metrics or {}, batch_size, point.theta.device, dtype, ())
        self._stand(setup, point)
        self._setup = self._with_data(data, batch_size)

    def _stand(self, setup: Setup, point: Point) -> None:
        """Take a point: its tensors become this objective's own leaves."""
        self._setup = setup
        self._point = point
        self._leaves: dict[str, Tensor] = {}
        for name, part in zip(setup.layout.names, setup.layout.split(point.theta), strict=True):
            kept = getattr(*setup.slots.parameters[name][0])
            leaf = part.to(setup.dtype or kept.dtype)
            self._leaves[name] = nn.Parameter(leaf)
        self._frozen = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in point.frozen.items()}

    def _with_data(self, data: Any, batch_size: int | None) -> Setup:
        """The setup over other data, read and proven."""
        setup, recipe = self._setup, self._setup.recipe
        opaque, whole = recipe.batch_loss is not None, setup.mode == "batch"

        def prepare(tensor: Tensor) -> Tensor:
            return tensor if opaque else tensor.to(device=setup.device, dtype=setup.dtype if tensor.is_floating_point() else None)

        ready = opaque or (recipe.forward is not None and isinstance(data, list))  # a list of batches, even if it is two tensors
        batches = read_batches(data, batch_size=batch_size, prepare=prepare, whole=whole, opaque=ready)
        if whole and min(batches.reading.sizes) < 2:
            raise ValueError('mode="batch" needs batches of at least 2 examples: BatchNorm has no statistics of a single one. Drop or merge the smallest batch.')
        untouched = {name: tensor.clone() for name, tensor in self._point.buffers.items()}
        with self.applied():
            terms = weigh(recipe, batches)
            volatile = prove_still(next(iter(terms)), self._point.buffers)
            prove_weighting(terms, couples=whole)
            if not batches.exact:
                prove_passes_agree(terms)
        for name, tensor in untouched.items():
            self._point.buffers[name].copy_(tensor)  # a forward that writes to buffers has done so to the snapshot's
        return replace(setup, terms=terms, volatile=tuple(volatile))

    # -- what it is ----------------------------------------------------------------------------------------------------------

    @property
    def theta(self) -> Tensor:
        """A copy of the parameters as one flat vector (n,)."""
        return self._point.theta.clone()

    @property
    def size(self) -> int:
        """n, the number of parameters under study."""
        return self._setup.layout.size

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters under study, in the order of theta."""
        return self._setup.layout.names

    @property
    def layout(self) -> Layout:
        """`layout[name]` is the slice of theta that holds a parameter."""
        return self._setup.layout

    @property
    def units(self) -> float:
        """What the mean is taken over: examples, valid tokens, the sum of class weights."""
        return self._setup.terms.total

    @property
    def examples(self) -> int:
        """Number of examples in the data set."""
        return self._setup.terms.batches.examples

    @property
    def dtype(self) -> torch.dtype:
        """Precision of theta and of every vector: that of the parameters, float32 at least."""
        return self._point.theta.dtype

    @property
    def device(self) -> torch.device:
        return self._point.theta.device

    @property
    def label(self) -> str:
        return self._point.label

    @property
    def mode(self) -> Mode:
        return self._setup.mode

    @property
    def recipe(self) -> Recipe:
        """How one batch becomes a loss."""
        return self._setup.recipe

    @property
    def space(self) -> Space:
        """The space that theta lives in, one block per parameter."""
        return Space(self.layout.blocks, self.dtype, self.device)

    # -- evaluation ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds this snapshot's tensors, in the right mode; for forward *and* backward. Everything goes back at the end."""
        setup = self._setup
        buffers = {name: tensor.clone() if name in setup.volatile else tensor for name, tensor in self._point.buffers.items()}
        with (
            swapped(setup.slots, {**self._leaves, **self._frozen, **buffers}),
            mode_set(setup.model, setup.mode),
            rng_kept(),
            differentiable(self.device),
        ):
            yield

    @property
    def leaves(self) -> list[Tensor]:
        """The snapshot's own parameters, in the order of theta: what autograd differentiates with respect to."""
        return list(self._leaves.values())

    def terms(self) -> Terms:
        """The micro-batches; iterate inside `applied()`."""
        return self._setup.terms

    def value(self) -> float:
        """L(theta), summed in float64. One forward pass."""
        with self.applied():
            return total_loss(self.terms())

    def gradient(self) -> Tensor:
        """dL/dtheta (n,), accumulated in float64. One gradient."""
        with self.applied():
            return total_gradient(self.terms(), self.leaves, self.layout).to(self.dtype)

    def metrics(self) -> dict[str, float]:
        """The loss, the accuracy of a classifier, and the user's own metrics, over the whole data set. One forward pass."""
        with self.applied():
            return all_metrics(self.terms(), self._setup.metrics)

    def per_example(self) -> dict[str, PerExample]:
        """The "loss" and the "error" of every example, as far as the criterion gives them. One forward pass."""
        with self.applied():
            return per_example(self.terms())

    # -- other points, other data --------------------------------------------------------------------------------------------

    def point(self, source: Source = None, *, label: str | None = None) -> Point:
        """The setting that `source` holds, as a Point of this network; None: where this objective stands.

        A flat tensor keeps this objective's buffers, which is right for steps around it.
        """
        if source is None or source is self:
            return replace(self._point, theta=self.theta, label=label or self.label)
        if isinstance(source, Objective):
            source = source.point()
        return read_point(source, self._point, self._setup.slots, self.layout, label)

    def network(self, source: Source, *, label: str | None = None) -> Point:
        """As `point`, for comparing whole networks: refuses what is not one, or differs outside `params`."""
        if isinstance(source, Tensor) and self._point.buffers:
            raise ValueError("a flat tensor says nothing of the running statistics that this network has. Pass a module, a state dict or a Point.")
        point = self.point(source, label=label)
        if (name := differs_outside(point, self._point)) is not None:
            raise ValueError(f"the two networks differ in {name!r}, which is outside params={list(self.names)}. Widen params, or compare networks that share it.")
        return point

    def at(self, source: Source) -> Objective:
        """The same loss on the same data at another point."""
        other = Objective.__new__(Objective)
        other._stand(self._setup, self.point(source))
        return other

    def now(self) -> Objective:
        """The same loss at the model's present weights."""
        return self.at(snapshot(self._setup.slots, self.layout, device=self._setup.device, dtype=self._setup.dtype, label=self.label))

    def on(self, data: Any) -> Objective:
        """The same loss at the same point on other data, read and proven anew."""
        other = Objective.__new__(Objective)
        other._stand(self._setup, self._point)
        other._setup = other._with_data(data, self._setup.batch_size if is_pair(data) or isinstance(data, Dataset) else None)
        return other

    def sample(self, n: int, seed: int) -> Objective:
        """The same loss on `n` examples drawn without replacement."""
        batches = self._setup.terms.batches
        if not 1 <= n <= self.examples:
            raise ValueError(f"sample(n={n}) needs 1 <= n <= {self.examples}, the number of examples.")
        if self.mode == "batch" or self.recipe.batch_loss is not None:
            raise ValueError('sample() would cut batches that are part of the loss (mode="batch", from_batch_loss). Choose batches yourself: objective.on(batches).')
        if not batches.ordered:
            raise NotDeterministic("sample() needs the examples in one fixed order. Use shuffle=False.")
        chosen = torch.randperm(self.examples, generator=torch.Generator().manual_seed(seed))[:n].sort().values
        parts = []
        for (first, batch), size in zip(batches, batches.reading.sizes, strict=True):
            rows = chosen[(chosen >= first) & (chosen < first + size)] - first
            if len(rows):
                parts.append(take_rows(batch, rows))
        return self.on(parts)

    def in_double(self, examples: int) -> Objective:
        """A float64 copy over the first batch's first examples (all of it, where batches must not be cut), for proofs."""
        setup = self._setup
        double = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
        with self.applied():
            term = next(iter(setup.terms))
            whole = setup.mode == "batch" or self.recipe.batch_loss is not None
            rows = torch.arange(term.examples if whole else min(examples, term.examples))
            few = term if whole else replace(term, batch=take_rows(term.batch, rows))
            batch = few.batch if few.count_units() > 0 else term.batch
        recipe = replace(self.recipe, criterion=self.recipe.criterion and self.recipe.criterion.in_double())
        point = replace(self._point, theta=self.theta.double(), buffers=map_tensors(double, dict(self._point.buffers)), frozen=map_tensors(double, dict(self._point.frozen)))
        other = Objective.__new__(Objective)
        other._stand(replace(setup, recipe=recipe, dtype=torch.float64, volatile=()), point)
        other._setup = other._with_data([map_tensors(double, batch)], None)
        return other

    def state_dict(self, point: Source = None) -> dict[str, Any]:
        """A point as a checkpoint of the model: what `model.state_dict()` would hold there, in the model's own precision."""
        own = self._setup.model.state_dict()
        with self.at(point).applied():
            there = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in self._setup.model.state_dict().items()}
        return {name: value.to(own[name]) if isinstance(value, Tensor) else value for name, value in there.items()}

    def fingerprints(self) -> dict[str, str]:
        """Short hashes of the weights, the parameter set and the data, for provenance."""
        weights = hashlib.sha256()
        for tensor in (self._point.theta, *self._point.buffers.values(), *self._point.frozen.values()):
            weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        names = hashlib.sha256(repr([(name, tuple(shape)) for name, shape in zip(self.names, self.layout.shapes, strict=True)]).encode())
        return {"weights": weights.hexdigest()[:16], "parameters": names.hexdigest()[:16], "data": self._setup.terms.batches.reading.fingerprint}

    def __repr__(self) -> str:
        return f"<Objective {self.label}: {self.size} parameters, {self.examples} examples, {self.units:g} units, {self.dtype}, {self.device}, mode={self.mode!r}>"


def _check_model(model: Any, mode: Any, dtype: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not an nn.Module.")
    if mode not in ("eval", "batch"):
        raise ValueError(f'mode={mode!r}: choose "eval" (running statistics) or "batch" (BatchNorm on each batch\'s own statistics).')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r} needs a floating-point torch dtype, such as torch.float64.")


_NO_TERMS: Any = None
