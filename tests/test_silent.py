"""Models and modes of autodiff that are silently wrong elsewhere: preflight catches each, and raises no alarm on sane models."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp
from torch.nn import functional as F

from orograph import Objective, PreflightFailed, eigenpairs, hessian
from orograph.preflight import preflight
from orograph.products.reverse import hessian_of
from orograph.products.sweeps import Sweep

from .networks import small_mlp
from .oracles import relative
from .test_engines import Custom, Fused, Kernel, recurrent
from .test_snapshot import Checkpointed, normed

CE = nn.CrossEntropyLoss()
G = torch.Generator().manual_seed(7)
X = torch.randn(40, 4, generator=G, dtype=torch.float64)
Y = torch.randint(0, 3, (40,), generator=G)


# operators as they are made elsewhere, each wrong on some ordinary model


def parts_of(objective, flat):
    return {name: flat[objective.layout[name]].view(shape) for name, shape in zip(objective.names, objective.layout.shapes, strict=True)}


def functional_loss(objective):
    """The loss as a function of theta by functional_call, as packages on torch.func have it."""

    def loss(flat):
        term = next(iter(objective.terms()))
        return CE(functional_call(objective.recipe.model, parts_of(objective, flat), (term.batch[0],)), term.batch[1])

    return loss


def columns(product):
    """V -> A V from a function of one vector, run with the objective in place, like an engine."""

    def matmat_of(objective):
        def matmat(V):
            with objective.applied():
                return torch.stack([product(objective, v).detach() for v in V.unbind(1)], dim=1)

        return matmat

    return matmat_of


def functional_reverse(objective, v):
    """Reverse-over-reverse through functional_call: checkpoints run their forward again with the module's own weights."""
    theta = (1.1 * objective.theta).requires_grad_()  # the module holds other weights
    (first,) = torch.autograd.grad(functional_loss(objective)(theta), theta, create_graph=True)
    return torch.autograd.grad(first @ v, theta)[0]


def reverse_over_forward(objective, v):
    loss = functional_loss(objective)
    return grad(lambda theta: jvp(loss, (theta,), (v,))[1])(objective.theta)


def forward_over_jacrev(objective, v):
    return jvp(jacrev(functional_loss(objective)), (objective.theta,), (v,))[1]


def plain_reverse(objective, v):
    return Sweep(objective, hessian_of)(v[:, None])[:, 0]


def moved_weights(objective, v):
    """A retained graph whose weights have been changed through .data, as optimisers with fused kernels do."""
    leaves = objective.leaves
    term = next(iter(objective.terms()))
    first = torch.autograd.grad(term.loss_of(term.output()), leaves, create_graph=True)
    saved = [leaf.detach().clone() for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.data = leaf.data * 1.2
            leaf.data.mul_(1.0)
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(first, leaves, objective.layout.split(v))])
    finally:
        for leaf, value in zip(leaves, saved, strict=True):
            leaf.data = value


def other_batch_weights(objective, v):
    """A mean over batches that weighs a short batch like a long one."""
    term = next(iter(objective.terms()))
    x, y = term.batch
    pieces = [(x[:10], y[:10]), (x[10:], y[10:])]
    total = torch.zeros_like(v)
    for piece in pieces:
        first = torch.autograd.grad(CE(objective.recipe.model(piece[0]), piece[1]), objective.leaves, create_graph=True)
        total += torch.cat([part.reshape(-1) for part in torch.autograd.grad(first, objective.leaves, objective.layout.split(v))]) / 2
    return total


def layer_normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 5, 2, padding=1), nn.Tanh(), nn.Conv2d(5, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)).double()


class Detached(torch.autograd.Function):
    """Right gradients with the slope saved as a number: the second derivative lacks a term."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 1 - torch.tanh(x).detach() ** 2
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


WRONG = {
    "functional_call through a checkpoint": (Checkpointed, functional_reverse),
    "functional_call at another point": (small_mlp, functional_reverse),
    "reverse over forward through LayerNorm": (layer_normed, reverse_over_forward),
    "reverse over forward through BatchNorm": (normed, reverse_over_forward),
    "forward over jacrev through LayerNorm": (layer_normed, forward_over_jacrev),
    "retained graph with moved weights": (convolutional, moved_weights),
    "short batches weighed like long ones": (small_mlp, other_batch_weights),
    "function with a detached slope": (lambda: Custom(False, Detached), plain_reverse),
    "kernel backward beside a residual": (lambda: Custom(True, Kernel), plain_reverse),
    "half of the product": (small_mlp, lambda o, v: 0.5 * plain_reverse(o, v)),
    "symmetric and wrong": (small_mlp, lambda o, v: plain_reverse(o, v) + 0.01 * v * float(plain_reverse(o, v).norm())),
}


@pytest.mark.parametrize("name", WRONG)
def test_preflight_alone_catches_what_is_wrong(name):
    make, product = WRONG[name]
    objective = Objective(make(), CE, (X, Y), mode="batch" if "BatchNorm" in name else "eval")
    with pytest.raises(PreflightFailed, match="disagrees"):
        preflight(objective, columns(product), None)
    right = hessian(objective) if "Custom" not in type(objective.recipe.model).__name__ else None
    assert right is None or right.about["preflight"] == "proven"


def test_row_of_padding_is_left_out_and_no_reason_to_refuse():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.last = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 3)
            nn.init.normal_(self.embedding.weight)
            self.double()

        def forward(self, tokens):
            return self.last(torch.tanh(self.embedding(tokens)).mean(1))

    objective = Objective(Padded(), CE, (torch.randint(0, 6, (30, 5)), torch.randint(0, 3, (30,))))
    op = hessian(objective)
    H = op.dense()
    assert op.about["preflight"] == "proven" and relative(H, H.T) < 1e-12 and not H[:4].any()


# sane models


def conv(*inner):
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *inner, nn.Flatten(), nn.LazyLinear(3))


def mixed(activation):
    return lambda: nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.relu(self.first(x)))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + F.silu(self.inner(x)))


SANE = {
    "ReLU": mixed(nn.ReLU), "GELU": mixed(nn.GELU), "tanh": mixed(nn.Tanh), "SiLU": mixed(nn.SiLU), "Softplus": mixed(nn.Softplus), "LeakyReLU": mixed(nn.LeakyReLU),
    "ELU": mixed(nn.ELU), "Hardtanh": mixed(nn.Hardtanh), "linear": lambda: nn.Linear(4, 3), "MaxPool": lambda: conv(nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    "AvgPool": lambda: conv(nn.Conv2d(1, 4, 2, padding=1), nn.GELU(), nn.AvgPool2d(2)), "BatchNorm": lambda: conv(nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
    "BatchNorm, batch mode": lambda: conv(nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU()), "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)),
    "GroupNorm": lambda: conv(nn.Conv2d(1, 4, 2, padding=1), nn.GroupNorm(2, 4), nn.ReLU()), "RMSNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 3)),
    "Dropout": lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)), "tied": Tied, "residual": Residual,
    "first batch ignored": mixed(nn.ReLU), "attention": lambda: Fused().float(), "LSTM": lambda: recurrent(nn.LSTM)().float(),
}  # fmt: skip


def alarms(name, dtype, seeds=range(5)):
    """How many of the seeds gave a refusal, a warning, or another verdict than a proof."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = SANE[name]()
        if name in ("attention", "LSTM"):
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
        x = torch.randn(40, 4)
        y = torch.randint(0, 3, (40,))
        model(x)  # lazy layers and statistics
        if name == "first batch ignored":
            y[:20] = -100
        objective = Objective(model.to(dtype), CE, (x.to(dtype), y), batch_size=20, mode="batch" if "batch mode" in name else "eval")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                verdict = hessian(objective).about["preflight"]
            if not verdict.startswith("proven"):
                found.append(verdict)
        except Exception as error:  # any is an alarm
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SANE)
def test_no_false_alarm(name, dtype):
    assert alarms(name, dtype) == []


# low precision


def low_precision_case(kind, seed):
    """(interval of lambda_max holds the float64 value, status, products) of a bf16 model, or of a float32 one under autocast."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 3))
    x, y = torch.randn(80, 4), torch.randint(0, 3, (80,))
    if kind == "bf16":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
        objective = Objective(model, CE, (x, y))
    else:

        def forward(model, batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(batch[0]).float() if batch[0].dtype == torch.float32 else model(batch[0]), batch[1]

        objective = Objective(model, CE, [(x, y)], forward=forward)
    truth = eigenpairs(hessian(Objective(model, CE, (x.double(), y), dtype=torch.float64)), tol=1e-8)
    op = hessian(objective)
    assert op.dtype == torch.float32
    pairs = eigenpairs(op)
    low, high = pairs.intervals[0].tolist()
    return low <= float(truth.values[0]) <= high, pairs.status, float(pairs.residuals[0] / pairs.values[0]), op.noise


@pytest.mark.parametrize("kind", ["bf16", "autocast"])
def test_low_precision_keeps_its_promises(kind):
    cases = [low_precision_case(kind, seed) for seed in range(8)]
    assert sum(case[0] for case in cases) >= 7
    assert all(status == "noise-limited" or residual <= 1e-3 for _, status, residual, _ in cases)


def test_forward_over_jacrev_is_why_the_oracles_are_not_torchs_hessian_where_layernorm_is():
    objective = Objective(layer_normed(), CE, (X, Y))
    with objective.applied():
        wrong = jacfwd(jacrev(functional_loss(objective)))(objective.theta)
    assert relative(wrong, hessian(objective).dense()) > 1e-3
