"""Both Fisher matrices of every loss and reduction against their definition, and against the GGN where labels follow the model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orograph as og

from .families import rotating

CLASSES, COUNT = 3, 40


def bits(logits, seed):
    return (torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=logits.dtype) < logits.sigmoid()).to(logits.dtype)


def classes(logits, seed):
    return torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def gaussian(output, seed):
    return output + 0.5**0.5 * torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)


def poisson(output, seed):
    return torch.poisson(output.exp(), generator=torch.Generator().manual_seed(seed))


class Probabilities(nn.Module):
    """A layer whose outputs are probabilities, or logarithms of them."""

    def __init__(self, after):
        super().__init__()
        self.linear, self.after = nn.Linear(2, CLASSES, dtype=torch.float64), after

    def forward(self, x):
        return self.after(self.linear(x))


def plain(output):
    return output


LOSSES = {  # name -> (loss by reduction, what the network ends with, labels drawn from its outputs; None: no likelihood)
    "mse": (lambda r: nn.MSELoss(reduction=r), plain, gaussian),
    "l1": (lambda r: nn.L1Loss(reduction=r), plain, None),
    "smooth l1": (lambda r: nn.SmoothL1Loss(reduction=r), plain, None),
    "huber": (lambda r: nn.HuberLoss(reduction=r), plain, None),
    "bce": (lambda r: nn.BCELoss(reduction=r), torch.sigmoid, lambda p, seed: bits(p.logit(), seed)),
    "bce with logits": (lambda r: nn.BCEWithLogitsLoss(reduction=r), plain, bits),
    "poisson": (lambda r: nn.PoissonNLLLoss(reduction=r), plain, poisson),
    "soft margin": (lambda r: nn.SoftMarginLoss(reduction=r), plain, lambda z, seed: 2 * bits(z, seed) - 1),
    "cross-entropy": (lambda r: nn.CrossEntropyLoss(reduction=r), plain, classes),
    "nll": (lambda r: nn.NLLLoss(reduction=r), lambda z: z.log_softmax(1), classes),
    "kl": (lambda r: nn.KLDivLoss(reduction=r), lambda z: z.log_softmax(1), None),
}
CASES = [(name, r) for name in LOSSES for r in (("mean", "sum", "batchmean") if name == "kl" else ("mean", "sum"))]


def network(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Probabilities(LOSSES[name][1])


def inputs(count):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def targets(name, output):
    draw = LOSSES[name][2]
    if draw is not None:
        return draw(output, 7)
    return (0.5 * output).softmax(1) if name == "kl" else output + 0.7


def scale_of(name, reduction, count):
    """1 / U."""
    if reduction == "sum":
        return 1.0
    return 1 / count if reduction == "batchmean" or name in ("cross-entropy", "nll") else 1 / (count * CLASSES)


def is_its_definition(name, reduction):
    """Empirical Fisher: the sum over examples of the outer product of the gradient of its summed loss, over U."""
    net, x = network(name), inputs(COUNT)
    y = targets(name, net(x).detach())
    criterion = LOSSES[name][0](reduction)
    total = LOSSES[name][0]("sum")
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for i in range(COUNT):
        g = torch.cat([part.flatten() for part in torch.autograd.grad(total(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters()))])
        expected += torch.outer(g, g) * scale_of(name, reduction, COUNT)
    objective = og.Objective(net, criterion, (x, y), batch_size=16)
    found = og.fisher(objective, kind="empirical").dense()
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's own word on KLDivLoss
@pytest.mark.parametrize("case", rotating(CASES, 8), ids=str)
def test_the_empirical_fisher_is_its_definition(case):
    is_its_definition(*case)


LIKELIHOODS = [case for case in CASES if LOSSES[case[0]][2] is not None]


def has_the_scale_of_the_ggn(name, reduction, count=20_000):
    net, x = network(name), inputs(8).repeat(count // 8, 1)
    objective = og.Objective(net, LOSSES[name][0](reduction), (x, targets(name, net(x).detach())))
    reference = F.cross_entropy if name == "nll" else None  # the Gauss-Newton matrix of nll is zero
    logits = (lambda model, batch: (model.linear(batch[0]), batch[1])) if reference else None
    ggn = og.ggn(og.Objective(net, nn.CrossEntropyLoss(reduction=reduction), (x, targets(name, net(x).detach())), forward=logits) if reference else objective, check=False).dense()
    kinds = ["empirical"] if name in ("poisson", "soft margin") else ["empirical", "mc"]
    for kind in kinds:
        found = og.fisher(objective, kind=kind, check=False).dense()
        assert float((found - ggn).norm()) < 0.06 * float(ggn.norm()), (kind, found.trace() / ggn.trace())


@pytest.mark.parametrize("case", rotating(LIKELIHOODS, 5), ids=str)
def test_where_labels_follow_the_model_both_fishers_are_the_ggn(case):
    has_the_scale_of_the_ggn(*case)
