"""Every real torch optimiser contracts just below the predicted edge on a quadratic, and diverges just above it."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import NAdam

import orograph as og
from orograph.optimizers import edge, preconditioner

SECOND = 1 - 1e-12  # beta2 (or alpha) that keeps the second moment where it is
LATE = 1e14  # a float32 step that does not count on: all bias corrections are 1
SIZES = (2, 3)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(SIZES[0], dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(SIZES[1], dtype=torch.float64))

    def theta(self):
        return torch.cat([self.a, self.b])


def quadratic(model, A):
    return 0.5 * model.theta() @ A @ model.theta()


def matrix(seed=0):
    """Symmetric, couples the two groups, eigenvalues between 0.3 and 1."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    return q @ torch.diag(torch.tensor([0.3, 0.4, 0.5, 0.7, 1.0], dtype=torch.float64)) @ q.T


def frozen_state(optimizer, step):
    """Second moments that differ between coordinates; first moments zero, as before the step that is number `step`."""
    g = torch.Generator().manual_seed(1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            kind = type(optimizer).__name__
            v = 0.5 + torch.rand(p.shape, generator=g, dtype=p.dtype)
            if kind == "RMSprop":
                state = {"square_avg": v + 0.1, "momentum_buffer": torch.zeros_like(p)} | ({"grad_avg": v.sqrt() / 2} if group["centered"] else {})
            elif kind == "Adagrad":
                state = {"sum": 1e16 * v}  # so large that a gradient adds nothing
            else:
                correction = 1 - group["betas"][1] ** step
                state = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": v * correction}
                state |= {"max_exp_avg_sq": 2 * v * correction} if group.get("amsgrad") else {}
                state |= {"mu_product": torch.tensor(product_of_mu(group, step), dtype=torch.float64)} if kind == "NAdam" else {}
            optimizer.state[p] = state | {"step": torch.tensor(step, dtype=torch.float32 if step == LATE else torch.float64)}


def product_of_mu(group, step):
    return 0.0 if step == LATE else math.prod(group["betas"][0] * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in range(1, int(step) + 1))


def growth(make, A, step, steps=1500):
    """Factor by which the last third of a run is larger (or smaller) than its middle third, at the same step number throughout."""
    model = Weights()
    optimizer = make(model)
    stateful = not isinstance(optimizer, torch.optim.SGD)
    if stateful:
        frozen_state(optimizer, step)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(1e-9 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    sizes = []
    for _ in range(steps):
        if stateful and step != LATE:  # each step is number `step` again
            for state in optimizer.state.values():
                state["step"].fill_(step - 1)
                if "mu_product" in state:
                    state["mu_product"].fill_(product_of_mu(optimizer.param_groups[0], step - 1))
        optimizer.zero_grad()
        quadratic(model, A).backward()
        optimizer.step()
        sizes.append(model.theta().detach().norm().item())
        if not 1e-200 < sizes[-1] < 1e-3:
            break
    third = len(sizes) // 3
    return max(sizes[2 * third :]) / max(sizes[third : 2 * third])


def predicted(make, A, step):
    """lambda_max(P^-1 H) by this package, and the threshold."""
    model = Weights()
    objective = og.Objective.from_batch_loss(model, quadratic, [A])
    optimizer = make(model)
    if not isinstance(optimizer, torch.optim.SGD):
        frozen_state(optimizer, step)
    P = preconditioner(optimizer, objective)
    top = torch.linalg.eigvalsh(og.preconditioned(og.hessian(objective), P).dense())[-1]
    return float(top), edge(optimizer).threshold


def one(kind, **settings):
    return lambda model: kind(model.parameters(), **settings)


def two(kind, first, second, **settings):
    return lambda model: kind([{"params": [model.a], **first}, {"params": [model.b], **second}], **settings)


SGD, Adam, AdamW, RMSprop, Adagrad = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad
FROZEN = {"betas": (0.9, SECOND)}
CASES = {
    "gradient descent": one(SGD, lr=0.1),
    "learning rate as a tensor": one(SGD, lr=torch.tensor(0.1)),
    "heavy ball": one(SGD, lr=0.1, momentum=0.9),
    "dampening": one(SGD, lr=0.1, momentum=0.9, dampening=0.6),
    "dampening without momentum": one(SGD, lr=0.1, dampening=0.6),
    "Nesterov": one(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "coupled decay": one(SGD, lr=0.1, momentum=0.5, weight_decay=3.0),
    "two rates": two(SGD, {"lr": 0.1}, {"lr": 0.02}),
    "two rates, Nesterov, two decays": two(SGD, {"lr": 0.1, "weight_decay": 2.0}, {"lr": 0.02, "weight_decay": 9.0}, momentum=0.8, nesterov=True),
    "two momenta": two(SGD, {"lr": 0.1, "momentum": 0.0}, {"lr": 0.02, "momentum": 0.95}),
    "two of everything": two(
        SGD, {"lr": 0.1, "momentum": 0.3, "dampening": 0.5, "weight_decay": 5.0}, {"lr": 0.04, "momentum": 0.9, "weight_decay": 1.0}
    ),
    "RMSprop": one(RMSprop, lr=0.1, alpha=SECOND),
    "RMSprop, large eps": one(RMSprop, lr=0.1, alpha=SECOND, eps=0.5),
    "RMSprop, momentum, centered": one(RMSprop, lr=0.1, alpha=SECOND, momentum=0.9, centered=True),
    "RMSprop, decay, two groups": two(RMSprop, {"lr": 0.1, "weight_decay": 4.0}, {"lr": 0.03, "momentum": 0.8}, alpha=SECOND),
    "Adagrad": one(Adagrad, lr=1e7),
    "Adam": one(Adam, lr=0.1, **FROZEN),
    "Adam, amsgrad": one(Adam, lr=0.1, amsgrad=True, **FROZEN),
    "Adam, coupled decay": one(Adam, lr=0.1, weight_decay=30.0, **FROZEN),
    "Adam, two groups": two(Adam, {"lr": 0.1, "betas": (0.9, SECOND)}, {"lr": 0.05, "betas": (0.5, SECOND), "eps": 0.3}),
    "AdamW": one(AdamW, lr=0.1, weight_decay=5.0, **FROZEN),
    "AdamW, two groups": two(AdamW, {"lr": 0.1, "weight_decay": 5.0}, {"lr": 0.02, "weight_decay": 0.0, "betas": (0.6, SECOND)}, **FROZEN),
    "NAdam": one(NAdam, lr=0.1, **FROZEN),
    "NAdam, decoupled decay, two rates": two(NAdam, {"lr": 0.1}, {"lr": 0.02}, weight_decay=5.0, decoupled_weight_decay=True, **FROZEN),
    "NAdam, coupled decay": one(NAdam, lr=0.1, weight_decay=20.0, **FROZEN),
}
EARLY = {"Adam": 3.0, "Adam, coupled decay": 5.0, "Adam, two groups": 4.0, "NAdam": 5.0, "NAdam, decoupled decay, two rates": 7.0}
CASES |= {"Adagrad with falling rate": one(Adagrad, lr=1e7, lr_decay=0.5)}
EARLY |= {"Adagrad with falling rate": 4.0}


@pytest.mark.parametrize(("name", "step"), [*((name, LATE) for name in CASES if "falling" not in name), *EARLY.items()])
def test_contracts_one_percent_below_the_edge_and_diverges_one_percent_above(name, step):
    make, A = CASES[name], matrix()
    top, threshold = predicted(make, A, step)
    to_edge = A * threshold / top
    assert predicted(make, to_edge, step)[0] == pytest.approx(threshold, rel=1e-9)
    assert growth(make, 0.99 * to_edge, step) < 0.7
    assert growth(make, 1.01 * to_edge, step) > 1.4


@pytest.mark.parametrize(
    ("make", "threshold", "formula"),
    [
        (CASES["gradient descent"], 2 / 0.1, "2 / lr"),
        (CASES["heavy ball"], 3.8 / 0.1, "2 (1 + momentum) / lr"),
        (CASES["Nesterov"], 3.8 / 2.8 / 0.1, "2 (1 + momentum) / (1 + 2 momentum) / lr"),
        (CASES["dampening"], 3.8 / 0.4 / 0.1, "2 (1 + momentum) / (1 - dampening) / lr"),
        (CASES["coupled decay"], 3 / 0.1 - 3, "2 (1 + momentum) / lr - weight_decay"),
        (CASES["RMSprop"], 2 / 0.1, "2 / lr"),
        (CASES["Adam"], 38 / 0.1, "2 (1 + beta1) / (1 - beta1) / lr"),
        (CASES["AdamW"], (2 - 0.5) * 19 / 0.1, "(1 - lr weight_decay / 2) 2 (1 + beta1) / (1 - beta1) / lr"),
        (CASES["NAdam"], 3.8 / 2.8 / 0.1 / 0.1, "2 (1 + beta1) / ((1 + 2 beta1) (1 - beta1)) / lr"),
    ],
)
def test_threshold_of_one_group_is_the_published_one(make, threshold, formula):
    found = edge(make(Weights()))
    assert found.threshold == pytest.approx(threshold, rel=1e-7) and found.rate == pytest.approx(0.1) and found.formula == formula
    assert "full batch" in found.regime


def trained(kind, steps=3, **settings):
    model = Weights()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    optimizer = kind(model.parameters(), **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        quadratic(model, matrix()).backward()
        optimizer.step()
    return model, optimizer, og.Objective.from_batch_loss(model, quadratic, [matrix()])


def test_sgd_has_unit_preconditioner_whatever_its_momentum_and_decay():
    _, optimizer, objective = trained(SGD, lr=0.1, momentum=0.9, weight_decay=0.3)
    assert torch.equal(preconditioner(optimizer, objective), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 3])
def test_preconditioner_of_adam_is_that_of_its_last_step(steps):
    model, optimizer, objective = trained(Adam, steps, lr=0.1)
    v = torch.cat([optimizer.state[p]["exp_avg_sq"] for p in model.parameters()])
    expected = (1 - 0.9**steps) * ((v / (1 - 0.999**steps)).sqrt() + 1e-8)
    assert torch.allclose(preconditioner(optimizer, objective), expected, rtol=1e-12)


def test_step_is_the_momentum_over_the_preconditioner():
    model, optimizer, objective = trained(Adam, lr=0.1)
    before = objective.theta
    optimizer.zero_grad()
    quadratic(model, matrix()).backward()
    optimizer.step()
    m = torch.cat([optimizer.state[p]["exp_avg"] for p in model.parameters()])
    assert torch.allclose(before - objective.now().theta, 0.1 * m / preconditioner(optimizer, objective), rtol=1e-10)


def test_it_is_read_live_and_changes_nothing():
    _, optimizer, objective = trained(RMSprop, lr=0.1)
    kept = copy.deepcopy(optimizer.state_dict())
    first = preconditioner(optimizer, objective)
    assert str(optimizer.state_dict()) == str(kept)
    optimizer.param_groups[0]["lr"] = 0.01
    assert torch.allclose(preconditioner(optimizer, objective), first, rtol=1e-14) and edge(optimizer).threshold == pytest.approx(200)


def test_asking_for_the_preconditioner_leaves_no_empty_state():
    model = Weights()
    optimizer = Adam(model.parameters())
    with pytest.raises(ValueError, match=r"no second moments before its first step. Call optimizer.step"):
        preconditioner(optimizer, og.Objective.from_batch_loss(model, quadratic, [matrix()]))
    assert len(optimizer.state) == 0


def test_adagrad_too_needs_a_step():
    _, optimizer, objective = trained(Adagrad, 0)
    with pytest.raises(ValueError, match="Adagrad has no second moments"):
        preconditioner(optimizer, objective)


def test_tied_weights_and_a_part_of_the_model_are_matched_by_identity():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    optimizer = Adam([{"params": [model[2].bias], "lr": 0.3}, {"params": [model[0].weight], "lr": 0.1}])
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nn.functional.mse_loss(model(x), x).backward()
    optimizer.step()
    whole = og.Objective(model, nn.MSELoss(), (x, x))
    P = preconditioner(optimizer, whole)
    v = optimizer.state[model[0].weight]["exp_avg_sq"].flatten()
    assert P.shape == (12,) and torch.allclose(P[whole.layout["0.weight"]], 3 * 0.1 * ((v / 0.001).sqrt() + 1e-8), rtol=1e-9)
    part = og.Objective(model, nn.MSELoss(), (x, x), params="2.bias")
    assert torch.equal(preconditioner(optimizer, part), P[whole.layout["2.bias"]])


def test_float32_parameters_on_their_own_dtype():
    model = nn.Linear(3, 2)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    optimizer = AdamW(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    P = preconditioner(optimizer, og.Objective(model, nn.MSELoss(), (x, x[:, :2])))
    assert P.dtype == torch.float32 and bool((P > 0).all())


# -- what it refuses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Rprop, torch.optim.Adadelta])
def test_optimisers_without_a_diagonal_name_the_alternative(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__} has no diagonal preconditioner .*critical learning rate along its own update.*stability"):
        edge(kind(Weights().parameters()))


def test_a_subclass_may_step_otherwise_and_is_refused():
    class Mine(SGD):
        pass

    with pytest.raises(TypeError, match="Mine has no diagonal"):
        edge(Mine(Weights().parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (one(SGD, lr=0.1, maximize=True), "maximises.*Minimise the negative"),
        (one(SGD, lr=0.0), "learning rate > 0.*warm-up"),
        (one(SGD, lr=0.1, momentum=1.0), "momentum 1 .*0 <= momentum < 1"),
        (one(SGD, lr=0.1, momentum=0.5, dampening=1.0), "gain 0 .*dampening < 1"),
        (one(SGD, lr=0.1, weight_decay=21.0), "weight decay 21 at lr=0.1 is unstable"),
        (one(AdamW, lr=0.1, weight_decay=20.0), "weight decay 20 at lr=0.1 is unstable"),
        (two(SGD, {"momentum": 0.9}, {"momentum": 0.5}, lr=0.1, momentum=0.9, nesterov=True), "different momenta have no common edge"),
        (two(SGD, {"nesterov": True}, {"nesterov": False}, lr=0.1, momentum=0.9), "different momenta have no common edge"),
        (two(NAdam, {"betas": (0.9, 0.99)}, {"betas": (0.8, 0.99)}, lr=0.1), "different momenta have no common edge"),
    ],
)
def test_settings_without_an_edge_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        edge(make(Weights()))


def test_groups_that_do_not_move_say_so():
    model = Weights()
    objective = og.Objective.from_batch_loss(model, quadratic, [matrix()])
    optimizer = two(SGD, {"lr": 0.1}, {"lr": 0.0})(model)
    assert edge(optimizer).threshold == pytest.approx(20)
    with pytest.raises(ValueError, match=r"b has learning rate 0.*params="):
        preconditioner(optimizer, objective)
    with pytest.raises(ValueError, match=r"does not hold b, .*params="):
        preconditioner(SGD([model.a], lr=0.1), objective)
    with pytest.raises(ValueError, match=r"holds no parameter of the objective's model.*copy"):
        preconditioner(one(SGD, lr=0.1)(Weights()), objective)


def test_a_parameter_without_gradient_does_not_move():
    model = Weights()
    optimizer = Adam(model.parameters())
    model.a.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"b has had no gradient yet.*params="):
        preconditioner(optimizer, og.Objective.from_batch_loss(model, quadratic, [matrix()]))


def test_weight_decay_beyond_the_edge_of_a_coordinate_is_refused():
    _, optimizer, objective = trained(RMSprop, lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = 1e6
    with pytest.raises(ValueError, match=r"P has entries <= 0 in a: .*weight_decay or raise eps"):
        preconditioner(optimizer, objective)


def test_nadam_at_different_steps_is_refused():
    model, optimizer, objective = trained(NAdam)
    optimizer.state[model.b]["step"].fill_(9)
    with pytest.raises(ValueError, match="NAdam's momentum depends on step"):
        preconditioner(optimizer, objective)


def test_edited_nesterov_with_dampening_has_its_own_edge():
    def make(model):
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.8, nesterov=True)
        optimizer.param_groups[0]["dampening"] = 0.5  # torch refuses it in the constructor, and obeys it here
        return optimizer

    top, threshold = predicted(make, matrix(), LATE)
    check = partial(growth, make, step=LATE)
    assert check(A=0.99 * matrix() * threshold / top) < 0.7 and check(A=1.01 * matrix() * threshold / top) > 1.4
