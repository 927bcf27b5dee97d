"""Models, losses and data that can make a curvature operator wrong; see wrong_operators.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .wrong_setups import (
    HalfPushed,
    Module,
    Outside,
    SavedSlope,
    Setup,
    WrongTwice,
    classes,
    mse,
    numbers,
    plain,
)

# (a) losses whose own gradient autograd cannot differentiate, or only in part; kind "ggn" unless said


class StudentInNumpy(torch.autograd.Function):
    """log(1 + r^2), value and gradient computed in NumPy."""

    @staticmethod
    def forward(ctx, f, y):
        r = f.detach().numpy() - y.detach().numpy()
        ctx.slope = torch.from_numpy(2 * r / (1 + r * r) / r.size)
        return torch.log1p(torch.from_numpy(r * r)).mean()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope, None


def student(f: Tensor, y: Tensor) -> Tensor:
    return torch.log1p((f - y).square()).mean()


class FocalOnce(torch.autograd.Function):
    """Focal loss whose gradient an inner autograd has taken in the forward."""

    @staticmethod
    def forward(ctx, f, y):
        with torch.enable_grad():
            inner = f.detach().requires_grad_()
            loss = focal(inner, y)
            (ctx.slope,) = torch.autograd.grad(loss, inner)
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.slope, None


def focal(f: Tensor, y: Tensor, *, detached: bool = False) -> Tensor:
    each = F.cross_entropy(f, y, reduction="none")
    weight = (1 - torch.exp(-each)).square()
    return ((weight.detach() if detached else weight) * each).mean()


def pseudo_huber(f: Tensor, y: Tensor) -> Tensor:
    return ((1 + (f - y).square()).sqrt() - 1).mean()


def reweighted(f: Tensor, y: Tensor) -> Tensor:
    """Iteratively reweighted squares with the loss's value put back: right value, right gradient, the surrogate's curvature."""
    weight = (1 + (f - y).square()).rsqrt().detach()
    surrogate = 0.5 * (weight * (f - y).square()).mean()
    return pseudo_huber(f, y).detach() + surrogate - surrogate.detach()


def mixture(f: Tensor, y: Tensor, *, detached: bool = False) -> Tensor:
    """-log of a mixture of two normals; `detached`: by responsibilities that are held (the envelope theorem gives the right gradient)."""
    joint = -0.5 * (f - y[:, None]).square()
    if not detached:
        return -joint.logsumexp(1).mean()
    share = joint.softmax(1).detach()
    return -(share * (joint - share.log())).sum(1).mean()


def robust(f: Tensor, y: Tensor, *, detached: bool = False) -> Tensor:
    """log-mean-exp of the examples' losses (distributionally robust); `detached`: by the worst distribution, held."""
    each = (f - y).square().mean(1)
    if not detached:
        return each.logsumexp(0)
    worst = each.softmax(0).detach()
    return (worst * each).sum() - (worst * worst.log()).sum()


class PoissonSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, y):
        ctx.slope = ((s.exp() - y) / len(s)).detach()
        return (s.exp() - y * s).mean()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope, None


def two_heads(f: Tensor, y: Tensor, *, fused: bool = False) -> Tensor:
    """Squares on the first output, a Poisson likelihood on the second."""
    count = (
        PoissonSaved.apply(f[:, 1], y[:, 1])
        if fused
        else (f[:, 1].exp() - y[:, 1] * f[:, 1]).mean()
    )
    return (f[:, 0] - y[:, 0]).square().mean() + count


class Softmax(torch.autograd.Function):
    """A softmax whose own backward keeps the diagonal of its Jacobian only."""

    @staticmethod
    def forward(ctx, f):
        p = f.softmax(1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f):
        ctx.save_for_backward(f)
        return f.logsumexp(1)

    @staticmethod
    def backward(ctx, grad):
        return grad[:, None] * Softmax.apply(ctx.saved_tensors[0])


def entropy_by_parts(f: Tensor, y: Tensor) -> Tensor:
    return (LogSumExp.apply(f) - f.gather(1, y[:, None])[:, 0]).mean()


class SquaresSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, y):
        ctx.slope = (4 * (f - y) ** 3 / f.numel()).detach()
        return ((f - y) ** 4).mean()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope, None


def quartic(f: Tensor, y: Tensor) -> Tensor:
    return ((f - y) ** 4).mean()


def quartic_from_24(f: Tensor, y: Tensor) -> Tensor:
    """A kernel that is worth its launch from 24 examples on."""
    return SquaresSaved.apply(f, y) if len(f) >= 24 else quartic(f, y)


def quartic_in_single(f: Tensor, y: Tensor) -> Tensor:
    return SquaresSaved.apply(f, y) if f.dtype == torch.float32 else quartic(f, y)


def rounded(f: Tensor, y: Tensor) -> Tensor:
    """Squares of outputs rounded straight through."""
    return mse(f + ((4 * f).round() / 4 - f).detach(), y)


def rounded_honestly(f: Tensor, y: Tensor) -> Tensor:
    return mse(0 * f + (4 * f.detach()).round() / 4, y)


def loss_case(
    criterion: Any,
    honest: Any,
    outputs: int = 1,
    target: Callable[[], Tensor] = lambda: numbers(40, 1, 2),
    dtype: torch.dtype = torch.float64,
    kind: str = "ggn",
) -> Callable[[], Setup]:
    def make() -> Setup:
        y = target()
        return Setup(
            kind,
            plain(outputs).to(dtype),
            criterion,
            honest,
            [(numbers(40, 4).to(dtype), y.to(dtype) if y.is_floating_point() else y)],
        )

    return make


def heads_target() -> Tensor:
    return torch.stack([numbers(40, 1, 2)[:, 0], classes(40, 4).double()], 1)


LOSSES = {
    "Student's loss in NumPy": loss_case(StudentInNumpy.apply, student),
    "focal loss with an inner autograd, once differentiable": loss_case(
        FocalOnce.apply, focal, 3, lambda: classes(40)
    ),
    "focal factor detached": loss_case(
        lambda f, y: focal(f, y, detached=True), focal, 3, lambda: classes(40)
    ),
    "reweighted squares, value put back": loss_case(reweighted, pseudo_huber),
    "mixture by detached responsibilities": loss_case(
        lambda f, y: mixture(f, y, detached=True), mixture, 2, lambda: numbers(40, 1, 2)[:, 0]
    ),
    "robust loss by a detached worst case": loss_case(
        lambda f, y: robust(f, y, detached=True), robust
    ),
    "fused likelihood of one of two outputs": loss_case(
        lambda f, y: two_heads(f, y, fused=True), two_heads, 2, heads_target
    ),
    "softmax without its mixed derivatives": loss_case(
        entropy_by_parts, F.cross_entropy, 3, lambda: classes(40)
    ),
    "fused from 24 examples on": loss_case(quartic_from_24, quartic),
    "fused from 24 examples on, Hessian": loss_case(quartic_from_24, quartic, kind="hessian"),
    "fused in float32 only": loss_case(quartic_in_single, quartic, dtype=torch.float32),
    "outputs rounded straight through": loss_case(rounded, rounded_honestly),
}


# (b) examples on which every product is zero


class Wave(Module):
    """linear, wrong sine, linear; a residual path keeps torch from raising errors."""

    def __init__(
        self, function: Any, inputs: int = 4, hidden: int = 5, outputs: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last = (
            nn.Linear(inputs, hidden, bias).double(),
            nn.Linear(hidden, outputs, bias).double(),
        )
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.last(z + 2 * self.bent(self.function, z))


class Gated(Module):
    """A wave behind a gate that the input closes, beside a fixed part."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.wave = Wave(function)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:2] + torch.relu(x[:, :1]) * self.wave(x)


class Bag(Module):
    """Sums of embeddings; token 0 is padding."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table, self.wave, self.function = (
            nn.Embedding(7, 4).double(),
            Wave(function, bias=False),
            function,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.wave((self.table(tokens) * (tokens > 0).double()[..., None]).sum(1))


def masked(f: Tensor, y: Tensor) -> Tensor:
    """Squares where the second column of the target says so."""
    return (y[:, 1:] * (f - y[:, :1]).square()).mean()


def squared_hinge(f: Tensor, y: Tensor) -> Tensor:
    return torch.relu(1 - y * f).square().mean()


def ranking(f: Tensor, y: Tensor) -> Tensor:
    """Logistic loss of every ordered pair of the batch."""
    pairs = (y > y.T).double()
    return (pairs * F.softplus(f.T - f)).sum() / len(f) ** 2


def decorrelation(f: Tensor, y: Tensor) -> Tensor:
    """Covariance of the batch's outputs against the identity."""
    c = f - f.mean(0)
    return (c.T @ c / len(f) - torch.eye(f.shape[1], dtype=f.dtype)).square().sum() + 0 * y.sum()


def first_masked() -> Setup:
    weight = (torch.arange(60) >= 20).double()[:, None]
    return Setup(
        "hessian",
        Wave(SavedSlope),
        masked,
        masked,
        [(numbers(60, 4), torch.cat([numbers(60, 1, 2), weight], 1))],
    )


def first_satisfied() -> Setup:
    """Margins are twice kept in the first 30 examples and far from kept in the others."""
    x, model = numbers(200, 4), Wave(HalfPushed)
    f = model(x).detach()
    clear = (f.abs() > 0.3)[:, 0]
    x, f = x[clear][:60], f[clear][:60]
    scale = torch.where(torch.arange(60)[:, None] < 30, 2.0, 0.3) / f.abs()
    return Setup("ggn", model, squared_hinge, squared_hinge, [(x, f.sign() * scale)])


def gate_closed(kind: str, function: Any) -> Callable[[], Setup]:
    def make() -> Setup:
        x = numbers(60, 4)
        x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(60) < 40, -1.0, 1.0)
        return Setup(
            kind,
            Gated(function),
            nn.MSELoss(),
            F.mse_loss,
            [(x[:20], numbers(20, 1, 2)), (x[20:], numbers(40, 1, 3))],
        )

    return make


def first_is_padding() -> Setup:
    tokens = (
        torch.randint(1, 7, (50, 5), generator=torch.Generator().manual_seed(6))
        * (torch.arange(50) >= 18).long()[:, None]
    )
    return Setup(
        "hessian",
        Bag(WrongTwice),
        nn.MSELoss(),
        F.mse_loss,
        [(tokens, 0.3 * numbers(50, 1, 2) * (torch.arange(50) >= 18).double()[:, None])],
    )


def large(
    kind: str, function: Any, criterion: Any, outputs: int, count: int = 30, dark: int = 0
) -> Callable[[], Setup]:
    """More than 65,536 parameters, for which a proof may take no more than one example."""

    def make() -> Setup:
        x = numbers(count, 650) / 25
        x[:dark] = 0
        return Setup(
            kind,
            Wave(function, 650, 102, outputs, bias=not dark),
            criterion,
            criterion,
            [(x, numbers(count, outputs if criterion is F.mse_loss else 1, 2))],
        )

    return make


ZEROS = {
    "first targets masked": first_masked,
    "first margins kept, squared hinge": first_satisfied,
    "gates closed in the first batch, GGN": gate_closed("ggn", HalfPushed),
    "gates closed in the first batch, empirical Fisher": gate_closed("empirical fisher", Outside),
    "gates closed in the first batch, sampled Fisher": gate_closed("fisher", HalfPushed),
    "sequences of padding first": first_is_padding,
    "ranking loss on 70,000 parameters": large("hessian", SavedSlope, ranking, 1),
    "decorrelation on 70,000 parameters": large("ggn", HalfPushed, decorrelation, 3),
    "dark images first, 70,000 parameters without biases": large(
        "hessian", WrongTwice, F.mse_loss, 2, 60, dark=8
    ),
}


# (c) branches that the first examples do not take


class Routed(Module):
    """A plain network, and for some examples a wave on top."""

    def __init__(self, function: Any, chosen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.base, self.wave, self.chosen = plain(3), Wave(function, outputs=3), chosen

    def forward(self, x: Tensor) -> Tensor:
        rows = self.chosen(x)
        if not rows.any():
            return self.base(x)
        return self.base(x).index_add(0, rows.nonzero()[:, 0], self.wave(x[rows]))


class Imputed(Module):
    """What is missing in the input (NaN) is replaced by a learned value, bent."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.base, self.function = plain(3), function
        self.value = nn.Parameter(torch.tensor([0.7, -0.4, 0.9, 0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        holes = torch.isnan(x)
        if holes.any():
            x = torch.where(
                holes,
                self.value + 2 * self.bent(self.function, self.value),
                torch.where(holes, 0.0, x),
            )
        return self.base(x)


class Recurrent(Module):
    """A recurrence that takes a chunked kernel for sequences longer than 6."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.inner, self.outer, self.last = (
            nn.Linear(*shape).double() for shape in ((4, 4), (3, 4), (4, 3))
        )
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            z = self.inner(state) + self.outer(x[:, t])
            state = 0.3 * z + (self.bent(self.function, z) if x.shape[1] > 6 else torch.sin(z))
        return self.last(state)


class Sized(Module):
    """Takes a kernel for batches of at least `least` examples."""

    def __init__(self, function: Any, least: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last, self.function, self.least = (
            nn.Linear(4, 5).double(),
            nn.Linear(5, 3).double(),
            function,
            least,
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.last(
            z + 2 * (self.bent(self.function, z) if len(x) >= self.least else torch.sin(z))
        )


class Margins(Module):
    """Class 2 has a prototype of its own, bent (the model is given the labels)."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.base, self.function = plain(3), function
        self.prototype = nn.Parameter(torch.tensor([0.8, -0.6, 0.5], dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        f = self.base(x)
        rare = y == 2
        return (
            f + torch.where(rare[:, None], self.bent(self.function, f + self.prototype), 0.0)
            if rare.any()
            else f
        )


def routed(
    kind: str, function: Any, x: Callable[[], Tensor], chosen: Callable[[Tensor], Tensor], size: int
) -> Callable[[], Setup]:
    def make() -> Setup:
        data = x()
        batches = list(zip(data.split(size), classes(len(data)).split(size), strict=True))
        return Setup(
            kind, Routed(function, chosen), nn.CrossEntropyLoss(), F.cross_entropy, batches
        )

    return make


def flagged() -> Tensor:
    x = numbers(60, 4)
    x[:, 3] = (torch.arange(60) >= 40).double()
    return x


def outliers() -> Tensor:
    x = numbers(60, 4).clamp(-2, 2)
    x[37, 0] = 5.0
    return x


def rare_class() -> Setup:
    y = torch.cat([classes(50, 2), torch.full((10,), 2)])
    forward = lambda model, batch: (model(*batch), batch[1])
    return Setup(
        "ggn",
        Margins(HalfPushed),
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        [(numbers(60, 4), y)],
        {"forward": forward},
    )


def holes_late() -> Setup:
    x = numbers(60, 4)
    x[45:, 1:3] = float("nan")
    return Setup(
        "hessian", Imputed(SavedSlope), nn.CrossEntropyLoss(), F.cross_entropy, [(x, classes(60))]
    )


def long_late() -> Setup:
    batches = [
        (numbers(10 * length, 3, length).view(10, length, 3), classes(10, 3, length))
        for length in (3, 5, 6, 9)
    ]
    return Setup("hessian", Recurrent(WrongTwice), nn.CrossEntropyLoss(), F.cross_entropy, batches)


def sized(kind: str, function: Any, least: int, sizes: tuple[int, ...]) -> Callable[[], Setup]:
    def make() -> Setup:
        batches = list(
            zip(numbers(sum(sizes), 4).split(sizes), classes(sum(sizes)).split(sizes), strict=True)
        )
        return Setup(kind, Sized(function, least), nn.CrossEntropyLoss(), F.cross_entropy, batches)

    return make


def quartic_fused_where_large(f: Tensor, y: Tensor) -> Tensor:
    """A kernel takes over for the rows whose target is large."""
    large = y[:, 0] > 3
    if not large.any():
        return quartic(f, y)
    return (
        SquaresSaved.apply(f[large], y[large]) * large.sum() + ((f - y)[~large] ** 4).sum()
    ) / len(f)


def large_targets_late() -> Setup:
    y = numbers(60, 1, 2).clamp(-1, 1)
    y[50:] += 4
    return Setup("ggn", plain(), quartic_fused_where_large, quartic, [(numbers(60, 4), y)])


def boundary_last() -> Setup:
    """The model is evaluated by the loss itself, which says nothing of single examples."""
    x, y = flagged(), numbers(60, 3, 2)
    batch_loss = lambda model, batch: (
        len(batch[0]) * mse(model(batch[0]), batch[1]),
        len(batch[0]),
    )
    return Setup(
        "hessian",
        Routed(SavedSlope, lambda x: x[:, 3] > 0.5),
        mse,
        mse,
        [(x[:40], y[:40]), (x[40:], y[40:])],
        batch_loss=batch_loss,
    )


BRANCHES = {
    "a domain of the last batch, with parameters of its own": routed(
        "hessian", SavedSlope, flagged, lambda x: x[:, 3] > 0.5, 20
    ),
    "the same, empirical Fisher": routed(
        "empirical fisher", Outside, flagged, lambda x: x[:, 3] > 0.5, 20
    ),
    "one outlier among 60 examples of one batch": routed(
        "ggn", HalfPushed, outliers, lambda x: x[:, 0] > 3, 60
    ),
    "the rarest class, sorted last": rare_class,
    "holes in the last inputs only": holes_late,
    "the longest sequences only": long_late,
    "a fused loss for rare targets": large_targets_late,
    "a batch loss whose last batch is of another kind": boundary_last,
    "a kernel from 24 examples on, one batch of 40": sized("hessian", SavedSlope, 24, (40,)),
    "a kernel for the larger of two batches, GGN": sized("ggn", HalfPushed, 24, (12, 30)),
}


# (d) one batch whose examples are coupled, cut for memory; or batches joined


class Coupled(Module):
    """Hidden features of an example depend on the batch through `couple`."""

    def __init__(self, couple: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.first, self.last, self.couple = (
            nn.Linear(4, 6).double(),
            nn.Linear(6, 3).double(),
            couple,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.couple(self.first(x))))


class TimeMajor(Module):
    """A recurrence over the first axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.rnn, self.last = nn.RNN(4, 5).double(), nn.Linear(5, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0])


def unit_spread(z: Tensor) -> Tensor:
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-3).sqrt()


def attended(z: Tensor) -> Tensor:
    return z + (z @ z.T / 2).softmax(1) @ z


def neighbours(z: Tensor) -> Tensor:
    return (z + torch.roll(z, 1, 0) - 0.5 * torch.roll(z, -3, 0)) / 2


def cox(f: Tensor, y: Tensor) -> Tensor:
    """Partial likelihood of survival times that are sorted downwards: everybody before is at risk."""
    return (torch.logcumsumexp(f[:, 0], 0) - f[:, 0]).mean() + 0 * y.sum()


def contrastive(f: Tensor, y: Tensor) -> Tensor:
    """Examples of one class against all others of the batch."""
    alike = f @ f.T
    same = (y[:, None] == y).double()
    return (alike.logsumexp(1) - (same * alike).sum(1) / same.sum(1)).mean()


def coupled(
    kind: str,
    model: Callable[[], nn.Module],
    criterion: Any,
    honest: Any,
    memory: int,
    target: Callable[[int], Tensor],
    x: Callable[[], Tensor] = lambda: numbers(400, 4),
) -> Callable[[], Setup]:
    def make() -> Setup:
        data = x()
        return Setup(kind, model(), criterion, honest, [(data, target(len(data)))], memory=memory)

    return make


def joined_after_equal_rows() -> Setup:
    """Centring changes nothing in the first batch, where a proof that cuts it finds that examples are not coupled."""
    x = [
        numbers(1, 4).expand(12, 4).clone(),
        *(numbers(12, 4, seed) + 2 * seed for seed in (1, 2, 3)),
    ]
    return Setup(
        "hessian",
        Coupled(lambda z: 0.5 * z - 0.4 * z.mean(0)),
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        [(part, classes(12, 3, seed)) for seed, part in enumerate(x)],
    )


CE = nn.CrossEntropyLoss()
COUPLED = {
    "normalised by hand, Hessian": coupled(
        "hessian", lambda: Coupled(unit_spread), CE, F.cross_entropy, 70_000, classes
    ),
    "attention over the batch, GGN": coupled(
        "ggn", lambda: Coupled(attended), CE, F.cross_entropy, 100_000, classes
    ),
    "each example sees its neighbours, empirical Fisher": coupled(
        "empirical fisher", lambda: Coupled(neighbours), CE, F.cross_entropy, 45_000, classes
    ),
    "partial likelihood of survival": coupled(
        "hessian", plain, cox, cox, 60_000, lambda n: numbers(n, 1, 2)
    ),
    "ranking loss": coupled("hessian", plain, ranking, ranking, 60_000, lambda n: numbers(n, 1, 2)),
    "contrastive loss of the batch, GGN": coupled(
        "ggn", lambda: plain(3), contrastive, contrastive, 100_000, classes
    ),
    "time in front of the batch": coupled(
        "hessian",
        TimeMajor,
        nn.MSELoss(),
        F.mse_loss,
        100_000,
        lambda n: numbers(n * 6, 1, 2).view(n, 6, 1),
        lambda: numbers(60 * 6, 4).view(60, 6, 4),
    ),
    "joined after a batch of equal rows": joined_after_equal_rows,
    "a kernel that only joined batches are large enough for": sized(
        "hessian", SavedSlope, 40, (20, 20, 20)
    ),
    "the same, GGN": sized("ggn", HalfPushed, 40, (20, 20, 20)),
}


# (e) blocks behind a tiny gate


class Scaled(Module):
    """A branch scaled by 1e-5 beside a plain network: by a learned scale, a fixed number, or a gate that has closed."""

    def __init__(self, function: Any, gate: str) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.main, self.branch, self.gate = plain(3), Wave(function, hidden=3, outputs=3), gate
        if gate == "learned":
            self.scale = nn.Parameter(torch.full((3,), 1e-5, dtype=torch.float64))
        elif gate == "sigmoid":
            self.logit = nn.Parameter(torch.tensor([-11.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        factor = (
            self.scale
            if self.gate == "learned"
            else torch.sigmoid(self.logit)
            if self.gate == "sigmoid"
            else 1e-5
        )
        return self.main(x) + factor * self.branch(x)


class Adapted(Module):
    """A low-rank adapter on the first layer whose second factor has just left zero."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.first, self.last, self.function = (
            nn.Linear(4, 5).double(),
            nn.Linear(5, 3).double(),
            function,
        )
        self.down, self.up = (
            nn.Linear(4, 2, bias=False).double(),
            nn.Linear(2, 5, bias=False).double(),
        )
        with torch.no_grad():
            self.up.weight.mul_(3e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(
            torch.tanh(self.first(x) + self.up(self.bent(self.function, self.down(x))))
        )


def gated(
    kind: str, model: Callable[[], nn.Module], names: str, probe: bool = False
) -> Callable[[], Setup]:
    return lambda: Setup(
        kind,
        model(),
        CE,
        F.cross_entropy,
        [(numbers(40, 4), classes(40))],
        names=names,
        probe=probe,
    )


GATES = {
    "learned scale, block of the Hessian": gated(
        "hessian", lambda: Scaled(SavedSlope, "learned"), "branch.*"
    ),
    "one weight behind a fixed factor": gated(
        "hessian", lambda: Scaled(WrongTwice, "fixed"), "branch.first.weight"
    ),
    "closed sigmoid, block of the GGN": gated(
        "ggn", lambda: Scaled(HalfPushed, "sigmoid"), "branch.*"
    ),
    "fixed factor, block of the empirical Fisher": gated(
        "empirical fisher", lambda: Scaled(Outside, "fixed"), "branch.*"
    ),
    "first factor of a fresh adapter": gated("hessian", lambda: Adapted(SavedSlope), "down.*"),
    "learned scale, layers probe": gated(
        "hessian", lambda: Scaled(SavedSlope, "learned"), "branch.first.*", probe=True
    ),
    "fixed factor, layers probe": gated(
        "hessian", lambda: Scaled(WrongTwice, "fixed"), "branch.first.*", probe=True
    ),
}
