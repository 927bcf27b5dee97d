"""What a loss function counts: the units over which it takes its mean, so that batches add up to the whole data set.

torch's own losses (modules, functions, partials of functions) bring their units with them. For any other callable the unit is
an example, `len(target)`, until the proof in `proof.py` says that this is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .deep_copies import deep_copy
from .nesting import as_double

Loss = Callable[[Any, Any], Tensor]
Family = Literal["cross_entropy", "nll", "elementwise", "other"]

FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.KLDivLoss: F.kl_div,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
}
FAMILIES: dict[Callable[..., Tensor], Family] = {
    function: "cross_entropy" if function is F.cross_entropy else "nll" if function is F.nll_loss else "elementwise"
    for function in FUNCTIONS.values()
}


@dataclass(frozen=True)
class Criterion:
    """A loss function with what is known about how it sums."""

    call: Loss
    family: Family
    function: Callable[..., Tensor] | None  # torch's function, where it is one
    settings: dict[str, Any]  # its keyword arguments
    reduction: str  # "mean" | "sum" | "batchmean"
    name: str

    @property
    def known(self) -> bool:
        return self.family != "other"

    def units(self, target: Any) -> float:
        """How many units the mean over this batch is taken over (for a sum: how many would be)."""
        if self.weighs_positions(target):
            return float(self.unit_weights(target).sum())
        if self.family == "cross_entropy":  # soft targets: positions, each with one row of probabilities
            return float(target.numel() / target.shape[1 if target.ndim > 1 else 0])
        if self.family == "elementwise" and self.reduction != "batchmean":
            return float(target.numel())
        return float(len(target))

    def unit_weights(self, target: Tensor) -> Tensor:
        """For index targets: the weight of every position in the mean, `weight[target]`, zero where ignored."""
        kept: Tensor = target != self.settings.get("ignore_index", -100)
        weight: Tensor | None = self.settings.get("weight")
        if weight is None:
            return kept.double()
        return weight.double()[torch.where(kept, target, torch.zeros_like(target))] * kept

    def curvature_weights(self, target: Tensor, axis: int) -> Tensor:
        """For cross-entropy and NLL: the factor of every position's output Hessian, its sum over the smoothed, weighted targets."""
        smoothing: float = self.settings.get("label_smoothing", 0.0)
        weight: Tensor | None = self.settings.get("weight")
        mean = 1.0 if weight is None else float(weight.double().mean())
        if self.weighs_positions(target):
            kept = target != self.settings.get("ignore_index", -100)
            positions: Tensor = (1 - smoothing) * self.unit_weights(target) + smoothing * mean * kept.double()
            return positions
        soft = target.double().movedim(axis, -1)
        hard = soft.sum(-1) if weight is None else soft @ weight.double()
        factors: Tensor = (1 - smoothing) * hard + smoothing * mean
        return factors

    def check_shapes(self, output: Any, target: Any) -> None:
        """Losses of single entries need one target for each: broadcasting would count other units than it averages over."""
        if self.family == "elementwise" and isinstance(output, Tensor) and isinstance(target, Tensor) and output.shape != target.shape:
            raise ValueError(
                f"{self.name} got outputs of shape {tuple(output.shape)} and targets of shape {tuple(target.shape)}. "
                "Give the targets the outputs' shape (unsqueeze, expand), so that no entry is broadcast."
            )

    def each(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of every unit on its own (reduction="none"); only for known losses."""
        if self.function is None:
            raise TypeError(f"the loss of single examples is not known for {self.name}: pass one of torch's own losses.")
        return self.function(output, target, **(self.settings | {"reduction": "none"}))

    def in_double(self, model: nn.Module) -> Criterion:
        """The same loss with its own tensors in float64, as far as they can be reached."""
        settings = as_double(self.settings)
        if self.function is not None:
            return replace(self, call=functools.partial(self.function, **settings), settings=settings)
        call = _own_copy(self.call, model, None, torch.float64) if isinstance(self.call, nn.Module) else self.call
        return replace(self, call=call)

    def weighs_positions(self, target: Any) -> bool:
        """Whether the targets are class indices, each position with a weight of its own."""
        return self.family in ("cross_entropy", "nll") and not target.is_floating_point()


def as_criterion(criterion: Any, model: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> Criterion:
    """Own copy of `criterion` on `device` and in `dtype`, recognised where it is one of torch's."""
    if not callable(criterion):
        raise TypeError(f"criterion is a {type(criterion).__name__}. Pass a loss such as nn.CrossEntropyLoss() or F.mse_loss, or criterion(output, target) -> scalar.")
    if isinstance(criterion, type):
        raise TypeError(f"criterion is the class {criterion.__name__}. Pass an instance: {criterion.__name__}().")

    def move(value: Any) -> Any:
        return value.detach().clone().to(device=device, dtype=dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value

    name = getattr(criterion, "__name__", type(criterion).__name__)
    function: Callable[..., Tensor] | None = None
    settings: dict[str, Any] = {}
    if type(criterion) in FUNCTIONS:
        function = FUNCTIONS[type(criterion)]
        settings = {key: move(getattr(criterion, key)) for key in _keywords(function) if hasattr(criterion, key)}
    elif isinstance(criterion, Hashable) and criterion in FAMILIES:
        function = criterion
    elif _recognised_partial(criterion):
        function, settings, name = criterion.func, {key: move(value) for key, value in criterion.keywords.items()}, criterion.func.__name__
    if function is not None:
        reduction = settings.get("reduction", "mean")
        call: Loss = functools.partial(function, **settings)
        family = FAMILIES[function]
    else:
        reduction, family = str(getattr(criterion, "reduction", "mean")), "other"
        reduction = "mean" if reduction == "none" else reduction  # a subclass that averages by itself: the proof decides
        call = _own_copy(criterion, model, device, dtype) if isinstance(criterion, nn.Module) else criterion
    if reduction == "none":
        raise ValueError(f'{name}(reduction="none") returns one loss per example. Use reduction="mean" or "sum".')
    return Criterion(call, family, function, settings, reduction, name)


def knows_accuracy(criterion: Criterion) -> bool:
    """Whether the loss is a classification whose predictions can be called right or wrong."""
    binary = criterion.function in (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
    return binary or criterion.family in ("cross_entropy", "nll")


def correct_predictions(criterion: Criterion, output: Any, target: Any) -> tuple[Tensor, Tensor] | None:
    """(correct, counted), 0 or 1 for every position of a classifier's batch; None where the loss is no classification."""
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        return None
    if criterion.family in ("cross_entropy", "nll"):
        axis = 1 if output.ndim > 1 else 0
        predicted = output.argmax(axis)
        if target.is_floating_point():
            return (predicted == target.argmax(axis)).double(), torch.ones_like(predicted, dtype=torch.float64)
        kept = target != criterion.settings.get("ignore_index", -100)
        return ((predicted == target) & kept).double(), kept.double()
    if criterion.function in (F.binary_cross_entropy, F.binary_cross_entropy_with_logits):
        threshold = 0.0 if criterion.function is F.binary_cross_entropy_with_logits else 0.5
        return ((output > threshold) == (target > 0.5)).double(), torch.ones_like(target, dtype=torch.float64)
    return None


def _keywords(function: Callable[..., Tensor]) -> list[str]:
    named = ["weight", "ignore_index", "label_smoothing", "pos_weight", "beta", "delta", "log_target", "log_input", "full", "eps", "reduction"]
    code = function.__code__
    return [name for name in named if name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]


def _own_copy(criterion: nn.Module, model: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the loss module that still points at the user's model where it uses it (a penalty on the weights, say)."""
    shared = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    own: nn.Module = deep_copy(criterion, dict(shared))
    if not any(id(tensor) in shared for tensor in (*own.parameters(), *own.buffers())):
        own = own.to(device=device, dtype=dtype).requires_grad_(False)
    for part in own.modules():
        if id(part) not in shared:
            part.training = False
    return own


def _recognised_partial(criterion: Any) -> bool:
    """A partial of one of torch's functions whose settings leave the units as they are known."""
    if not isinstance(criterion, functools.partial) or criterion.func not in FAMILIES or criterion.args:
        return False
    weighted = "weight" in criterion.keywords and criterion.func in (F.mse_loss, F.l1_loss, F.huber_loss)  # a mean over the weights
    return not weighted and not {"size_average", "reduce"} & set(criterion.keywords)
