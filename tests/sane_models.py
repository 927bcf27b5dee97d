"""Ordinary models and losses that no proof may refuse, and the price of proving them, counted without a clock."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from orograph import LinearOperator, Objective, fisher, ggn, hessian
from orograph.studies.networks import GPT, cnn, mlp
from orograph.studies.problems import digits

from .test_silent import SANE

CE = nn.CrossEntropyLoss()


def gaussian(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, number: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(0, number, shape, generator=torch.Generator().manual_seed(seed))


class RightSine(torch.autograd.Function):
    """sin with a backward of differentiable operations."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.cos(ctx.saved_tensors[0])


class Composed(nn.Module):
    """A sequence of modules around one function."""

    def __init__(self, function: Callable[[Any], Any], inputs: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.last, self.function = (
            nn.Linear(inputs, 8),
            nn.Linear(8, outputs),
            function,
        )

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Padded(nn.Module):
    """Mean of embeddings without the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, tokens):
        kept = (tokens != 0).to(self.table.weight.dtype)[..., None]
        return self.last(torch.tanh((self.table(tokens) * kept).sum(1) / kept.sum(1).clamp(min=1)))


class Sequence(nn.Module):
    """Embedding, one encoder layer, class of every token."""

    def __init__(self, core: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.table, self.core, self.last = nn.Embedding(9, width), core, nn.Linear(width, 9)

    def forward(self, tokens):
        out = self.core(self.table(tokens))
        return self.last(out[0] if isinstance(out, tuple) else out).movedim(-1, 1)


class Gate(nn.Module):
    """Two experts, each for some of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(4, 6, 3, seed=1), mlp(4, 6, 3, seed=2)

    def forward(self, x):
        return torch.where(x[:, :1] > 0, self.left(x), self.right(x))


class ZeroScale(nn.Module):
    """A residual branch whose scale starts at 1e-5."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.full((6,), 1e-5))

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.scale * torch.tanh(self.inner(x)))


def contrastive(f: Tensor, y: Tensor) -> Tensor:
    alike = F.normalize(f, dim=1) @ F.normalize(f, dim=1).T
    same = (y[:, None] == y).to(f.dtype)
    return (alike.logsumexp(1) - (same * alike).sum(1) / same.sum(1)).mean()


def heat(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Residual of u'' = -u, with a boundary value."""
    (x,) = batch
    x = x.clone().requires_grad_()
    u = model(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return ((second + u) ** 2).sum() + len(x) * model(x[:1] * 0).square().sum(), len(x)


@dataclass(frozen=True)
class Sane:
    """A model, a loss and data that are right."""

    make: Callable[[], nn.Module]
    data: Callable[[], Any]
    criterion: Any = CE
    kinds: tuple[str, ...] = ("hessian", "ggn")
    settings: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32

    def objective(self) -> Objective:
        torch.manual_seed(0)
        model, data = self.make(), self.data()
        if any(isinstance(module, nn.LazyLinear) for module in model.modules()):
            model(data[0])
        model = model.to(self.dtype)
        if self.criterion is heat:
            return Objective.from_batch_loss(model, heat, [(x.to(self.dtype),) for x in data])
        x, y = data
        x, y = (t.to(self.dtype) if t.is_floating_point() else t for t in (x, y))
        return Objective(model, self.criterion, (x, y), **dict(self.settings))


def table() -> dict[str, Sane]:
    points = lambda: (gaussian(60, 4), labels(60))
    real = lambda: (gaussian(60, 4), gaussian(60, 3, seed=2))
    tokens = lambda: (labels(40, 7, number=9), labels(40, 7, number=9, seed=2))
    halves = (("batch_size", 20),)
    found = {
        f"{name}, {'float32' if dtype == torch.float32 else 'bfloat16'}": Sane(
            make,
            points,
            settings=(*halves, ("mode", "batch" if "batch mode" in name else "eval")),
            dtype=dtype,
        )
        for name, make in SANE.items()
        if name not in ("first batch ignored", "attention", "LSTM")
        for dtype in (torch.float32, torch.bfloat16)
        if dtype == torch.float32 or name in ("ReLU", "tanh", "LayerNorm", "BatchNorm")
    }
    sine, saved = (
        RightSine.apply,
        lambda z: checkpoint(lambda u: torch.tanh(u) * u, z, use_reentrant=False),
    )

    def sharp() -> nn.Module:
        model = mlp(4, 16, 3, seed=0)
        with torch.no_grad():
            model[2].weight.mul_(60)
        return model

    def dead() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            model[0].bias[:5] = -100
        return model

    return found | {
        "digits MLP": Sane(lambda: mlp(64, 32, 10, seed=0), lambda: digits().train),
        "digits CNN": Sane(
            lambda: cnn(seed=0, channels=(4, 8)), lambda: tuple(t[:300] for t in digits().train)
        ),
        "wide MLP, 70,000 parameters": Sane(
            lambda: mlp(64, 900, 10, seed=0), lambda: tuple(t[:400] for t in digits().train)
        ),
        "tiny GPT": Sane(
            lambda: GPT(width=16, layers=2, heads=2, length=7, vocabulary=9, seed=0),
            tokens,
        ),
        "encoder layer": Sane(
            lambda: Sequence(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), tokens
        ),
        "LSTM": Sane(lambda: Sequence(nn.LSTM(8, 8, batch_first=True)), tokens),
        "GRU": Sane(lambda: Sequence(nn.GRU(8, 8, batch_first=True)), tokens),
        "embedding with padding": Sane(Padded, lambda: (labels(60, 5, number=9), labels(60))),
        "custom function that is right": Sane(lambda: Composed(sine), points, settings=halves),
        "checkpoint": Sane(lambda: Composed(saved), points, settings=halves),
        "experts": Sane(Gate, points),
        "scale of 1e-5": Sane(ZeroScale, points),
        "deep linear": Sane(
            lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 3)), points
        ),
        "saturated": Sane(sharp, points),
        "dead units": Sane(dead, points),
        "class weights": Sane(
            lambda: mlp(4, 8, 3, seed=0), points, nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.2]))
        ),
        "ignored first": Sane(
            lambda: mlp(4, 8, 3, seed=0),
            lambda: (gaussian(60, 4), torch.where(torch.arange(60) < 20, -100, labels(60))),
            settings=halves,
        ),
        "regression": Sane(lambda: mlp(4, 8, 3, seed=0), real, nn.MSELoss()),
        "Huber": Sane(lambda: mlp(4, 8, 3, seed=0), real, nn.HuberLoss()),
        "tiny loss": Sane(
            lambda: mlp(4, 8, 3, seed=0), real, lambda f, y: 1e-9 * (f - y).square().mean()
        ),
        "huge loss": Sane(
            lambda: mlp(4, 8, 3, seed=0), real, lambda f, y: 1e9 * (f - y).square().mean()
        ),
        "focal": Sane(
            lambda: mlp(4, 8, 3, seed=0),
            points,
            lambda f, y: (
                (1 - (-F.cross_entropy(f, y, reduction="none")).exp()) ** 2
                * F.cross_entropy(f, y, reduction="none")
            ).mean(),
        ),
        "contrastive": Sane(lambda: mlp(4, 8, 6, seed=0), points, contrastive),
        "physics-informed": Sane(
            lambda: mlp(1, 8, 1, seed=0),
            lambda: list(gaussian(40, 1).split(20)),
            heat,
            ("hessian",),
            dtype=torch.float64,
        ),
        "MLP in float64": Sane(
            lambda: mlp(4, 8, 3, seed=0),
            points,
            kinds=("hessian", "ggn", "fisher", "empirical fisher"),
            dtype=torch.float64,
        ),
        "Fisher": Sane(
            lambda: mlp(4, 8, 3, seed=0), points, kinds=("fisher", "empirical fisher")
        ),
    }


MAKE: dict[str, Callable[..., LinearOperator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "fisher": fisher,
    "empirical fisher": lambda objective, **settings: fisher(
        objective, kind="empirical", **settings
    ),
}


class Count(TorchDispatchMode):
    """Operations that torch runs, and floating-point operations of matrix products and convolutions; double precision counts twice."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.work = 0, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        if function._overloadpacket in flop_registry:
            one = next(t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            self.work += (
                flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
                * max(one.element_size(), 4)
                / 4
            )
        return out


@dataclass(frozen=True)
class Price:
    """Of a proof, in gradients of the same loss over the same data."""

    words: str
    calls: float
    work: float


def price(objective: Objective, kind: str) -> Price:
    """What `check=True` adds to an operator and its first product."""
    spent, words = [], ""
    v = torch.ones(objective.size, dtype=objective.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for check in (True, False):
            with Count() as count:
                op = MAKE[kind](objective, check=check)
                op @ v
            spent.append((count.calls, count.work))
            words = words or str(op.about["preflight"])
    with Count() as gradient:
        objective.gradient()
    (calls, work), (less_calls, less_work) = spent
    return Price(words, (calls - less_calls) / gradient.calls, (work - less_work) / gradient.work)
