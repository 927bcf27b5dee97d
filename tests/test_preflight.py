"""Preflight alone: every wrong operator is refused with its cause, and no right one is."""

import numpy as np
import pytest
import torch
from torch import nn

from orograph import Objective, PreflightFailed, eigenpairs, fisher, ggn, hessian, trace
from orograph.studies.networks import mlp
from orograph.studies.problems import digits
from orograph.studies.training import train_to_loss

from .networks import small_mlp

X = torch.randn(80, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (80,), generator=torch.Generator().manual_seed(2))
CE = nn.CrossEntropyLoss()


class Kernel(torch.autograd.Function):
    """sin(x) with a backward outside autograd: right gradients, no second derivative, no error beside a residual path."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(grad.detach().numpy() * np.cos(x.detach().numpy()))


class Residual(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 6).double(), nn.Linear(6, 3).double(), function

    def forward(self, x):
        z = self.first(x)
        return self.last(z + 3 * self.function.apply(z))


class DetachedInSingle(torch.autograd.Function):
    """Right in float64, with a detached slope in float32, as fused kernels that only know the training precision."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * (x if x.dtype == torch.float64 else x.detach())


@pytest.mark.parametrize("kind", [hessian, ggn, fisher])
def test_kernel_with_a_backward_outside_autograd_is_refused(kind):
    with pytest.raises(PreflightFailed, match=r"Kernel"):
        kind(Objective(Residual(Kernel), CE, (X, Y)), engine="fresh")


def test_what_is_wrong_in_the_real_precision_only_is_refused():
    with pytest.raises(PreflightFailed, match=r"the product in float32 is .* off the proven one in float64"):
        hessian(Objective(Residual(DetachedInSingle).float(), CE, (X.float(), Y)), engine="fresh")
    assert hessian(Objective(Residual(DetachedInSingle), CE, (X, Y))).about["preflight"] == "proven"


@pytest.mark.parametrize("seed", range(5))
def test_exact_kinks_are_no_reason_to_refuse(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for module in model[::2]:
        nn.init.zeros_(module.bias)
    inputs = X.float().clone()
    inputs[3] = 0  # every pre-activation of this row is exactly zero
    for kind in (hessian, ggn):
        assert kind(Objective(model, CE, (inputs, Y))).about["preflight"].startswith("proven")


def test_torchs_own_wrong_second_derivative_of_weight_norm_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(PreflightFailed, match="weight_norm"):
        hessian(Objective(model, CE, (X, Y)), engine="retained")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_half_precision_is_noise_limited_and_its_interval_holds(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).to(torch.bfloat16)
    objective = Objective(model, CE, (X.to(torch.bfloat16), Y))
    exact = Objective(model, CE, (X.to(torch.bfloat16).double(), Y), dtype=torch.float64)
    truth = eigenpairs(hessian(exact), tol=1e-8)
    op = hessian(objective)
    assert 1e-4 < op.about["noise"] < 0.05
    pairs = eigenpairs(op)
    assert pairs.status == "noise-limited" or float(pairs.residuals[0]) <= 1e-3 * float(pairs.values[0])
    assert float(pairs.intervals[0, 0]) <= float(truth.values[0]) <= float(pairs.intervals[0, 1])


def test_noise_of_single_precision_is_measured():
    about = hessian(Objective(small_mlp().float(), CE, (X.float(), Y))).about
    assert 0 < about["noise"] < 1e-5 and about["preflight"] == "proven"


def test_derived_operators_keep_the_noise():
    from orograph import block, preconditioned

    objective = Objective(small_mlp().to(torch.bfloat16), CE, (X.to(torch.bfloat16), Y))
    op = hessian(objective)
    assert preconditioned(op, torch.ones(op.size)).noise == block(op, objective, "0.*").noise == op.noise > 1e-4
    assert float(trace(op, rel_error=None, max_products=60).sem) > 0


@pytest.mark.parametrize("scale", [3.0, 10.0, 30.0, 100.0])
def test_saturated_networks_are_not_refused_and_their_noise_is_said(scale):
    problem = digits()
    model = mlp(64, 16, 10, seed=0)
    train_to_loss(model, problem.train, batch_size=100, learning_rate=0.2, target=0.1)
    with torch.no_grad():
        model[2].weight.mul_(scale)
        model[2].bias.mul_(scale)
    single = Objective(model, CE, problem.train)
    op, exact = hessian(single), hessian(Objective(model, CE, problem.train, dtype=torch.float64))
    assert exact.about["preflight"].startswith(("proven", "unverified"))
    pairs, truth = eigenpairs(op, max_products=80), eigenpairs(exact, max_products=80)
    assert float(pairs.intervals[0, 0]) <= float(truth.values[0]) <= float(pairs.intervals[0, 1])
