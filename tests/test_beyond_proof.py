"""What a proof has not reached is proven when it is used: by differences, by sums over batches, by blocks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orograph import Objective, PreflightFailed, block, hessian, trace

from .oracles import relative
from .sane_models import Gate
from .wrong_cases import Routed, Scaled, flagged
from .wrong_setups import Module, SavedSlope, classes, numbers

CE = nn.CrossEntropyLoss()


class WrongSlope(torch.autograd.Function):
    """sin whose first derivative is half of what it should be."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad * torch.cos(ctx.saved_tensors[0])


class SmallBatches(Module):
    """Takes a kernel for batches of at most 12 examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        z = self.first(x)
        return self.last(z + 2 * (self.bent(SavedSlope, z) if len(x) <= 12 else torch.sin(z)))


def rare(function):
    x = flagged()
    x[:, 3] = (torch.arange(60) == 59).double()
    return Routed(function, lambda x: x[:, 3] > 0.5), list(zip(x.split(20), classes(60).split(20), strict=True))


@pytest.mark.parametrize("engine", ["difference", "retained", "fresh", "auto"])
def test_a_wrong_gradient_of_one_example_is_refused(engine):
    model, data = rare(WrongSlope)
    op = hessian(Objective(model, CE, data), engine=engine)
    with pytest.raises(PreflightFailed, match=r"gradient disagrees.*WrongSlope"):
        op @ torch.ones(op.size, dtype=op.dtype)


@pytest.mark.parametrize("engine", ["retained", "fresh"])
def test_an_engine_that_was_asked_for_is_refused_at_the_first_product(engine):
    model, data = rare(SavedSlope)
    op = hessian(Objective(model, CE, data), engine=engine)
    with pytest.raises(PreflightFailed, match=r"SavedSlope"):
        op @ torch.ones(op.size, dtype=op.dtype)


def test_sums_over_batches_that_were_not_joined_are_proven_too():
    x = numbers(48, 4)
    data = list(zip(x.split(12), classes(48).split(12), strict=True))
    objective = Objective(SmallBatches(), CE, data)
    op = hessian(objective)
    with pytest.warns(match="finite differences"):
        found = trace(op, rel_error=0.1)
    honest = SmallBatches()
    honest.honest = True
    truth = hessian(Objective(honest, CE, data)).dense().trace()
    assert abs(float(found.value) - float(truth)) <= 4 * float(found.sem) + 1e-5 * abs(float(truth))
    assert op.about["engine"] == "difference"


def test_an_example_of_a_branch_costs_no_engine_where_it_is_right():
    objective = Objective(Gate().double(), CE, (numbers(600, 4), classes(600)), batch_size=300)
    op = hessian(objective)
    op @ torch.ones(op.size, dtype=op.dtype)
    assert op.about["engine"] == "retained" and op.about["preflight"] == "proven"


def test_a_block_says_what_is_proven_of_itself():
    objective = Objective(Scaled(SavedSlope, "fixed"), CE, (numbers(40, 4), classes(40)))
    with pytest.warns(match="finite differences"):
        op = block(hessian(objective), objective, "branch.*")
    assert op.about["preflight"] == "proven"
    skipped = hessian(objective, check=False)
    assert block(skipped, objective, "branch.*").about["preflight"] == "skipped"


def test_zero_products_prove_nothing_of_the_other_examples():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 1).double()

        def forward(self, x):
            return torch.relu(x[:, :1]) * self.line(x)

    x = numbers(4000, 4)
    x[:, 0] = -x[:, 0].abs()
    x[1234, 0] = 1.0
    op = hessian(Objective(Masked(), F.mse_loss, (x, numbers(4000, 1, 2)), batch_size=4000))
    assert op.about["preflight"].startswith("unverified: all products are zero on the 256 examples")
    assert op.dense().any() and op.about["preflight"] == "proven"  # on the one example where it is not
    some = x.clone()
    some[::50, 0] = 1.0
    op = hessian(Objective(Masked(), F.mse_loss, (some, numbers(4000, 1, 2)), batch_size=4000))
    assert op.about["preflight"] == "proven"
    assert relative(op.dense(), op.dense().T) < 1e-12
