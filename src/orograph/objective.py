"""The function on the landscape: L(theta) of one model, one loss and one data set, as a snapshot that training cannot move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .arguments import AtLeastOne, AtLeastTwo, Seed
from .batches import is_pair
from .checks import checked, refusal
from .copies import isolated
from .criteria import as_criterion
from .errors import NotDeterministic
from .evaluation import Metric, PerExample, all_metrics, check_metrics, per_example, total_loss, value_and_gradient
from .kernels import unwrapped
from .layout import Layout
from .linalg.operator import Space
from .points import copied, differs_outside, read_point, snapshot_point
from .reading import prove_terms, read_data
from .restoring import locked, restoring, under
from .results import Point
from .snapshots import Snapshot, check_model, take_snapshot
from .state import Mode
from .terms import BatchLoss, Count, Forward, Recipe, Terms, writes_inputs

Source = Any  # Point, Objective, module, state dict, weights file, flat tensor


@checked
class Objective:
    r"""L(theta): what `criterion` would return if the whole data set were one batch, at one fixed point.

    $L(\theta) = \sum_b u_b L_b(\theta) / \sum_b u_b$ over batches of $u_b$ units (for reduction="sum": $\sum_b L_b$).

    `model`: any nn.Module; it is left as it was after every call · `criterion`: a torch loss (module, function or partial), whose
    units are known, or criterion(output, target) -> scalar, whose unit is an example, `len(target)` · `data`: (inputs, targets), a
    Dataset, or anything re-iterable that yields batches · `forward(model, batch) -> (output, target)` for batches that are no
    pair · `params`: names or globs; default all that require grad · `mode`: "eval", or "batch": BatchNorm uses each batch's own
    statistics, and the batches are part of the definition · `count(batch)`: units of a batch, where they are not `len(target)` ·
    `metrics`: name -> function of (output, target) giving a mean over the batch, or (total, count) · `batch_size` for tensors and Datasets · `device`, `dtype`: where and in which precision (default: as the model is).

    Construction reads the data twice and evaluates one batch about six times, to prove that the loss stands still, that batches add up and may be cut,
    and that it uses no weights but these; a criterion that is not torch's own is proven on the output of every batch (one forward pass more). A batch
    that cannot be cut is measured whole; `indivisible` says why. Raises NotDeterministic, ValueError and TypeError, each saying what to do.
    """

    _snapshot: Snapshot
    _terms: Terms
    _metrics: Mapping[str, Metric]
    _batch_size: int | None

    @under(locked)  # another thread may be running the model with tensors of its own
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
        batch_size: AtLeastOne | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_model(model, dtype)
        model = unwrapped(model)
        place = torch.device(device) if device is not None else None
        recipe = Recipe(model, as_criterion(criterion, model, place, dtype), None, forward, count)
        self._fill(take_snapshot(model, params, mode, place, dtype), recipe, data, metrics or {}, batch_size)

    @classmethod
    @under(locked)
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
        check_model(model, None)
        model = unwrapped(model)
        recipe = Recipe(model, None, batch_loss, None, None)
        return cls.__new__(cls)._fill(take_snapshot(model, params, mode, None, None), recipe, data, metrics or {}, None)

    def _fill(self, snapshot: Snapshot, recipe: Recipe, data: Any, metrics: Mapping[str, Metric], batch_size: int | None) -> Objective:
        check_metrics(metrics, recipe.criterion)
        batches = read_data(snapshot, recipe, data, batch_size)
        snapshot, recipe, self._metrics = isolated(snapshot, recipe, metrics, *next(iter(batches)))
        self._terms, volatile = prove_terms(snapshot, recipe, batches)
        self._snapshot, self._batch_size = replace(snapshot, volatile=volatile), batch_size
        return self

    @property
    def theta(self) -> Tensor:
        """A copy of the parameters as one flat vector (n,)."""
        return self._snapshot.point.theta.clone()

    @property
    def size(self) -> int:
        """n, the number of parameters under study."""
        return self.layout.size

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters under study, in the order of theta."""
        return self.layout.names

    @property
    def layout(self) -> Layout:
        """`layout[name]` is the slice of theta that holds a parameter."""
        return self._snapshot.layout

    @property
    def units(self) -> float:
        """What the mean is taken over: examples, valid tokens, the sum of class weights."""
        return self._terms.total

    @property
    def examples(self) -> int:
        """Number of examples in the data set."""
        return self._terms.batches.examples

    @property
    def dtype(self) -> torch.dtype:
        """Precision of theta and of every vector: that of the parameters, float32 at least."""
        return self._snapshot.point.theta.dtype

    @property
    def device(self) -> torch.device:
        """Where theta and every vector live."""
        return self._snapshot.point.theta.device

    @property
    def label(self) -> str:
        """Name of the network that is measured."""
        return self._snapshot.point.label

    @property
    def mode(self) -> Mode:
        """Whose statistics BatchNorm uses: "eval" or "batch"."""
        return self._snapshot.mode

    @property
    def divisible(self) -> bool:
        """Batches may be cut into micro-batches: proven at construction, by parts that go through the model on their own."""
        return not self.indivisible

    @property
    def indivisible(self) -> str:
        """Why batches must stay whole: their examples are coupled, or hang together in the data; "" where they may be cut."""
        if self.mode == "batch":
            return 'mode="batch" normalises by the statistics of each batch'
        return "a batch_loss shows no single examples" if self.recipe.batch_loss is not None else self.recipe.indivisible

    @property
    def isolation(self) -> str:
        """How the user's model is kept out of it: "a private copy of the model", or why the model itself is run and put back."""
        return self._snapshot.isolation

    @property
    def snapshot(self) -> Snapshot:
        """The setting and the model that it is put into."""
        return self._snapshot

    @property
    def recipe(self) -> Recipe:
        """How one batch becomes a loss."""
        return self._terms.recipe

    @property
    def space(self) -> Space:
        """The space that theta lives in, one block per parameter."""
        return Space(self.layout.blocks, self.dtype, self.device)

    def fingerprints(self) -> dict[str, str]:
        """Short hashes of the weights, the parameter set and the data, for provenance."""
        return self._snapshot.fingerprints() | {"data": self._terms.batches.reading.fingerprint}

    def __repr__(self) -> str:
        return f"<Objective {self.label}: {self.size} parameters, {self.examples} examples, {self.units:g} units, {self.dtype}, {self.device}, mode={self.mode!r}>"

    def applied(self) -> restoring:
        """The model holds this snapshot's tensors, in the right mode; for forward *and* backward. Everything goes back at the end."""
        return self._snapshot.applied()

    @property
    def leaves(self) -> list[Tensor]:
        """The snapshot's own parameters, in the order of theta: what autograd differentiates with respect to."""
        return list(self._snapshot.leaves.values())

    def terms(self) -> Terms:
        """The micro-batches; iterate inside `applied()`."""
        return self._terms

    def value(self) -> float:
        """L(theta), summed in float64. One forward pass."""
        with self.applied():
            return total_loss(self._terms)

    def gradient(self) -> Tensor:
        """dL/dtheta (n,), accumulated in float64. One gradient."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """L(theta) and its gradient (n,) from one forward and one backward pass."""
        with self.applied():
            return value_and_gradient(self._terms, self.leaves, self.layout, self.dtype)

    def metrics(self) -> dict[str, float]:
        """The loss, the accuracy of a classifier, and the user's own metrics, over the whole data set. One forward pass."""
        with self.applied():
            return all_metrics(self._terms, self._metrics)

    def per_example(self) -> dict[str, PerExample]:
        """The "loss" and the "error" of every example, as far as the criterion gives them. One forward pass."""
        with self.applied():
            return per_example(self._terms)

    # -- other points, other data --------------------------------------------------------------------------------------------

    def point(self, source: Source = None, *, label: str | None = None) -> Point:
        """The setting that `source` holds, as a Point of this network; None: where this objective stands.

        `source`: a Point, Objective, module, state dict, weights file or flat tensor (n,). A flat tensor keeps this objective's
        buffers, which is right for steps around it.
        """
        own = self._snapshot.point
        if source is None or source is self:
            return replace(copied(own, own), label=label or self.label)
        if isinstance(source, Objective):
            source = source.point()
        return read_point(source, own, self._snapshot.users.slots, self.layout, label)

    def network(self, source: Source, *, label: str | None = None) -> Point:
        """As `point`, for comparing whole networks: refuses what is not one, or differs outside `params`."""
        own = self._snapshot.point
        if isinstance(source, Tensor) and own.buffers:
            raise ValueError("a flat tensor says nothing of the running statistics that this network has. Pass a module, a state dict or a Point.")
        point = self.point(source, label=label)
        if (name := differs_outside(point, own)) is not None:
            raise ValueError(f"the two networks differ in {name!r}, which is outside params={list(self.names)}. Widen params, or compare networks that share it.")
        return point

    def like(self, snapshot: Snapshot, terms: Terms) -> Objective:
        """The same measurement with another snapshot or other terms, which are taken as proven."""
        other = Objective.__new__(Objective)
        other._snapshot, other._terms, other._metrics, other._batch_size = snapshot, terms, self._metrics, self._batch_size
        return other

    def at(self, source: Source) -> Objective:
        """The same loss on the same data at another point (whatever `point` takes)."""
        return self.like(replace(self._snapshot, point=self.point(source)), self._terms)

    @under(locked)
    def now(self) -> Objective:
        """The same loss at the model's present weights."""
        s = self._snapshot
        s.users.check_modules()
        return self.at(snapshot_point(s.users.slots, s.layout, device=self.device, dtype=s.dtype, label=self.label))

    def on(self, data: Any) -> Objective:
        """The same loss at the same point on other data, read and proven anew."""
        batch_size = self._batch_size if is_pair(data) or isinstance(data, Dataset) else None
        batches = read_data(self._snapshot, self.recipe, data, batch_size)
        with self.applied():
            writes = self.recipe.writes or writes_inputs(self.recipe, *next(iter(batches)))
        terms, volatile = prove_terms(self._snapshot, replace(self.recipe, writes=writes), batches)
        return self.like(replace(self._snapshot, volatile=volatile), terms)

    def sample(self, n: AtLeastOne, seed: Seed) -> Objective:
        """The same loss on `n` examples drawn without replacement. What that costs in certainty: `data_error`."""
        if n > self.examples:
            raise ValueError(f"sample(n={n}) needs 1 <= n <= {self.examples}, the number of examples.")
        return self.picked(torch.randperm(self.examples, generator=torch.Generator().manual_seed(seed))[:n])

    def split(self, parts: AtLeastTwo, seed: Seed) -> list[Objective]:
        """The same loss on `parts` disjoint random subsets of (nearly) equal size."""
        if parts > self.examples:
            raise ValueError(f"split(parts={parts}) needs 2 <= parts <= {self.examples}, the number of examples.")
        return [self.picked(rows) for rows in torch.randperm(self.examples, generator=torch.Generator().manual_seed(seed)).tensor_split(parts)]

    def picked(self, rows: Tensor) -> Objective:
        """The same loss on the examples with these indices, in the batches that they came in."""
        if rows.ndim != 1 or not len(rows) or rows.dtype not in (torch.int64, torch.int32) or not 0 <= int(rows.min()) <= int(rows.max()) < self.examples:
            raise refusal("picked", "rows", rows, f"whole numbers from 0 to {self.examples - 1}, one for each example that is chosen.")
        if not self.divisible:
            raise ValueError(f"choosing examples would cut batches that must stay whole: {self.indivisible}. Choose batches yourself: objective.on(batches).")
        if not self._terms.batches.ordered:
            raise NotDeterministic("choosing examples needs them in one fixed order. Use shuffle=False.")
        return self.on(self._terms.batches.picked(rows))

    def state_dict(self, point: Source = None) -> dict[str, Any]:
        """A point as a checkpoint of the model: what `model.state_dict()` would hold there, in the model's own precision."""
        return self.at(point)._snapshot.state_dict()
