"""Operators to be tried on models and losses that can make them wrong, and the truth about them.

Truth never differentiates twice and never goes through Orograph: a copy of the model with every custom Function replaced by plain
torch operations (`honest`), and central differences of fourth order in float64 of its gradients (Hessian), or J v by differences of
its outputs, C by differences of the loss's gradient in the outputs, and J' by one backward (GGN); outer products of the gradients of
single examples (empirical Fisher). Only the labels of the sampled Fisher are Orograph's own draw (see `drawn_squares`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orograph import LinearOperator, Objective, block, fisher, ggn, hessian

KINDS: dict[str, Callable[..., LinearOperator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "fisher": fisher,
    "empirical fisher": lambda objective, **settings: fisher(
        objective, kind="empirical", **settings
    ),
}


@dataclass(frozen=True)
class Setup:
    """One operator to be tried: `build()` makes it as a user would, `truth(V)` gives its right products."""

    kind: str
    model: nn.Module
    criterion: Any  # what the user passes
    honest: Callable[
        [Any, Any], Tensor
    ]  # the same loss of (output, target) in plain torch operations
    batches: list[tuple[Tensor, Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)  # of Objective
    memory: int | None = None
    names: str = ""  # of one block of the matrix
    probe: bool = False  # the block as the layers probe sees it
    batch_loss: Any = None  # instead of the criterion

    def objective(self) -> Objective:
        if self.batch_loss is not None:
            return Objective.from_batch_loss(self.model, self.batch_loss, self.batches)
        return Objective(self.model, self.criterion, self.batches, **self.settings)

    def build(self) -> LinearOperator:
        objective = self.objective()
        op = KINDS[self.kind](objective, memory=self.memory)
        return block(op, objective, self.names) if self.names else op

    def twin(self) -> nn.Module:
        """The model in float64 and in plain torch operations."""
        twin = copy.deepcopy(self.model).double().eval()
        for module in twin.modules():
            module.honest = True
        return twin

    def entries(self) -> Tensor:
        """Whether each parameter entry belongs to the block."""
        inside = [
            name.startswith(self.names.rstrip("*")) for name, _ in self.model.named_parameters()
        ]
        return torch.cat(
            [
                torch.full((p.numel(),), kept)
                for p, kept in zip(self.model.parameters(), inside, strict=True)
            ]
        )

    def truth(self, V: Tensor) -> Tensor:
        """A V for directions V of the block, or of the whole."""
        chosen = self.entries()
        whole = torch.zeros(len(chosen), V.shape[1], dtype=torch.float64)
        whole[chosen] = V.double()
        return torch.stack([self._product(v)[chosen] for v in whole.unbind(1)], dim=1)

    def _product(self, v: Tensor) -> Tensor:
        length = float(v.norm())
        twin, batches = self.twin(), [(as_double(x), as_double(y)) for x, y in self.batches]
        leaves = list(twin.parameters())
        theta = nn.utils.parameters_to_vector(leaves).detach()
        run = self.settings.get("forward", lambda model, batch: (model(batch[0]), batch[1]))

        def gradient(offset: Tensor) -> Tensor:
            nn.utils.vector_to_parameters(theta + offset, leaves)
            loss = sum(len(batch[1]) * self.honest(*run(twin, batch)) for batch in batches) / sum(
                len(y) for _, y in batches
            )
            return _flat(loss, leaves)

        def output(batch: Any, offset: Tensor) -> Tensor:
            nn.utils.vector_to_parameters(theta + offset, leaves)
            return run(twin, batch)[0]

        if self.kind == "hessian":
            return length * slope(gradient, v / length)
        total, first = torch.zeros_like(theta), 0
        for batch in batches:
            share = len(batch[1]) / sum(len(y) for _, y in batches)
            pushed = slope(lambda offset, batch=batch: output(batch, offset).detach(), v / length)
            out = output(batch, torch.zeros_like(theta))
            target = run(twin, batch)[1]
            total += (
                share
                * length
                * _flat((out * self._curved(out.detach(), target, pushed, first)).sum(), leaves)
            )
            first += len(batch[1])
        return total

    def _curved(self, output: Tensor, target: Tensor, u: Tensor, first: int) -> Tensor:
        """C u: of the empirical Fisher by outer products of single examples' gradients, of the GGN by differences."""
        if self.kind == "empirical fisher":
            rows = [
                _gradient_in(self.honest, output[i : i + 1], target[i : i + 1])
                for i in range(len(output))
            ]
            return torch.cat([row * (row * u[i]).sum() for i, row in enumerate(rows)]) / len(output)
        if self.kind == "fisher":
            return drawn_squares(first + len(output))[first:, None] / len(output) * u
        size = float(u.norm()) or 1.0
        return size * slope(
            lambda offset: _gradient_in(self.honest, output + offset, target), u / size
        )


def drawn_squares(count: int) -> Tensor:
    """Squared scores of the labels that Orograph draws for squares of one output (seed 0): they depend on the example's index alone, so
    a table with one parameter per example shows them, whose Fisher is diagonal."""
    table = nn.Embedding(count, 1, _weight=torch.zeros(count, 1, dtype=torch.float64))
    objective = Objective(
        table, nn.MSELoss(), (torch.arange(count), torch.zeros(count, 1, dtype=torch.float64))
    )
    return count * fisher(objective, engine="fresh", check=False).dense().diagonal()


def slope(function: Callable[[Tensor], Tensor], direction: Tensor, step: float = 1e-3) -> Tensor:
    """Derivative along a direction by central differences of fourth order."""
    near, far = (
        function(s * step * direction) - function(-s * step * direction) for s in (1.0, 2.0)
    )
    return (8 * near - far) / (12 * step)


def _flat(loss: Tensor, leaves: list[Tensor]) -> Tensor:
    parts = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def _gradient_in(loss: Callable[[Any, Any], Tensor], output: Tensor, target: Tensor) -> Tensor:
    variable = output.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(
        loss(variable, target), variable, allow_unused=True, materialize_grads=True
    )
    return gradient


def as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


# custom Functions inside models: sin with right values and right first gradients


class SavedSlope(torch.autograd.Function):
    """The slope is saved as a number: gradients and Jacobians are right, second derivatives lack a term."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = torch.cos(x.detach())
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


class Cosine(torch.autograd.Function):
    """cos whose own derivative has the wrong size."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.cos(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return -0.5 * grad * torch.sin(x)


class WrongTwice(torch.autograd.Function):
    """The backward has a derivative of its own, and that is half of what it should be."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * Cosine.apply(ctx.saved_tensors[0])


class Pull(torch.autograd.Function):
    """grad * slope, linear in both; the second backward forgets a factor towards `grad`, which is where J v comes from."""

    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return grad * torch.cos(x)

    @staticmethod
    def backward(ctx, second):
        grad, x = ctx.saved_tensors
        return 0.5 * second * torch.cos(x), -second * grad * torch.sin(x)


class HalfPushed(torch.autograd.Function):
    """Right gradients; J v through the double backward comes out half as large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        return Pull.apply(grad, ctx.saved_tensors[0])


class Outside(torch.autograd.Function):
    """The backward leaves torch: beside a residual path no error is raised, and J v lacks this path."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(grad.detach().numpy() * torch.cos(x).detach().numpy())


class Module(nn.Module):
    """A module that knows a plain way to compute the same function."""

    honest = False

    def bent(self, function: Any, x: Tensor) -> Tensor:
        """sin(x), by a custom Function or by torch's own."""
        return torch.sin(x) if self.honest else function.apply(x)


# data


def numbers(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def classes(count: int, number: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(0, number, (count,), generator=torch.Generator().manual_seed(seed))


def mse(f: Tensor, y: Tensor) -> Tensor:
    """The mean of squares, not known as torch's own loss."""
    return (f - y).square().mean()


def plain(outputs: int = 1, inputs: int = 4, hidden: int = 5) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()
