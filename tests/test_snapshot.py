"""An Objective is a snapshot, and leaves no trace in the user's model, optimiser, graphs, generators or flags."""

import copy
import gc
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orograph import NotDeterministic, Objective, OrographError, eigenpairs, ggn, hessian, measure, spectral_density

from .networks import small_mlp
from .oracles import relative

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = small_mlp(4, 6, 5), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.last(torch.tanh(checkpoint(self.first, x, use_reentrant=False)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.last = nn.LSTM(4, 4, batch_first=True).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.last(self.rnn(x[:, None, :].expand(-1, 3, -1))[0][:, -1])


def normed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    net(X)
    return net


MODELS = {"plain": small_mlp, "checkpointed": Checkpointed, "LSTM": Recurrent, "BatchNorm": normed}
STEPS = {
    "plain": lambda ps: torch.optim.SGD(ps, 0.5, foreach=False),
    "foreach": lambda ps: torch.optim.SGD(ps, 0.5, foreach=True),
    "fused": lambda ps: torch.optim.SGD(ps, 0.5, fused=True),
    "fused Adam": lambda ps: torch.optim.Adam(ps, 0.1, fused=True),
}


def state_of(model):
    """Everything of a model and of the process that a measurement must not touch."""
    tensors = {name: (id(t), t._version, t.detach().clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return {
        "tensors": {name: entry[:2] for name, entry in tensors.items()},
        "values": {name: entry[2].tolist() for name, entry in tensors.items()},
        "grads": {name: None if p.grad is None else (id(p.grad), p.grad.tolist()) for name, p in model.named_parameters()},
        "requires": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "tracks": [getattr(m, "track_running_stats", None) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "rng": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "flags": (
            torch.is_grad_enabled(), torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
            torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.get_num_threads(),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["fresh", "retained"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MODELS)
def test_operator_is_still_the_snapshots_after_the_users_optimiser_has_stepped(name, step, engine):
    model = MODELS[name]()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=25)
    op, gauss = hessian(objective, engine=engine), ggn(objective)
    before, gauss_before, value = op.dense(), gauss.dense(), objective.value()
    model.train()
    optimiser = STEPS[step](model.parameters())
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimiser.step()
    assert torch.equal(op.dense(), before)
    assert torch.equal(gauss.dense(), gauss_before)
    assert objective.value() == value != objective.now().value()
    objective.at(objective.theta + 1.0).value()
    assert torch.equal(op.dense(), before)


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_recurrent_and_normed_models_match_differences_of_gradients(name):
    objective = Objective(MODELS[name](), nn.CrossEntropyLoss(), (X, Y), batch_size=25)
    v = objective.space.sample(0, 0, "normal")
    v /= v.norm()
    step = 1e-5
    slope = (objective.at(objective.theta + step * v).gradient() - objective.at(objective.theta - step * v).gradient()) / (2 * step)
    assert relative(hessian(objective) @ v, slope) < 1e-6


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_batchnorm_in_both_modes_is_its_own_fixed_function(mode):
    model = normed()
    objective = Objective(model, nn.CrossEntropyLoss(), [(X[:30], Y[:30]), (X[30:], Y[30:])], mode=mode)
    op = hessian(objective)
    before, kept = op.dense(), state_of(model)
    assert torch.equal(op.dense(), before)
    assert state_of(model) == kept
    with torch.no_grad():
        model.train()
        model(X * 3)  # moves the running statistics
    assert torch.equal(op.dense(), before)
    eval_too = hessian(Objective(model, nn.CrossEntropyLoss(), [(X, Y)], mode="eval")).dense()
    assert not torch.allclose(before, eval_too)


@pytest.mark.parametrize("use", ["hessian", "gradient", "spectrum", "barrier", "failing"])
def test_no_trace(use):
    model = nn.Sequential(normed(), nn.Dropout(0.5), nn.Linear(3, 3).double())
    model[0][0].weight.requires_grad_(False)
    model.train()
    model[0][1].eval()
    F.cross_entropy(model(X), Y).backward()
    kept = state_of(model)
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=25)
    if use == "hessian":
        with torch.no_grad(), torch.autocast("cpu"):
            hessian(objective).dense()
    elif use == "failing":

        def broken(out, t):
            raise ZeroDivisionError("from the user's loss")

        with pytest.raises(ZeroDivisionError, match="from the user's loss") as caught:
            Objective(model, broken, (X, Y))
        assert "batch that starts at example 0" in caught.value.__notes__[0]
    else:
        measure(objective, use, *([objective, objective.at(objective.theta + 0.1).point()] if use == "barrier" else []))
    assert state_of(model) == kept


def test_users_own_pending_backward_still_works():
    model, twin = small_mlp(), small_mlp()
    pending = F.cross_entropy(model(X), Y)
    op = hessian(Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=25), engine="retained")
    op.dense()
    pending.backward()
    F.cross_entropy(twin(X), Y).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_pending_backward_through_checkpointing_still_works():
    torch.manual_seed(0)
    model = Checkpointed()
    twin = copy.deepcopy(model)
    pending = F.cross_entropy(model(X), Y)
    hessian(Objective(model, nn.CrossEntropyLoss(), (X, Y))).dense()
    pending.backward()
    F.cross_entropy(twin(X), Y).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_training_is_bit_identical_with_and_without_measurements():
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(small_mlp(), nn.Dropout(0.2)).train()
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(5):
            optimiser.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimiser.step()
            if watched:
                measure(Objective(model, nn.CrossEntropyLoss(), (X, Y)), "gradient")
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_theta_handed_out_is_a_copy():
    objective = Objective(small_mlp(), nn.CrossEntropyLoss(), (X, Y))
    value = objective.value()
    objective.theta.zero_()
    objective.point().theta.zero_()
    assert objective.value() == value


def test_loss_or_model_that_holds_live_weights_is_refused():
    model = small_mlp()
    weights = list(model.parameters())
    with pytest.raises(ValueError, match=r"uses the model's own '0\.weight' through a list"):
        Objective(model, lambda o, t: F.cross_entropy(o, t) + sum((p**2).sum() for p in weights), (X, Y))
    fine = Objective(model, lambda o, t: F.cross_entropy(o, t) + sum((p**2).sum() for p in model.parameters()), (X, Y))
    assert fine.at(fine.theta * 2).value() > fine.value()


def test_the_present_weights_of_a_model_whose_modules_changed_are_refused():
    model = small_mlp()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y))
    value = objective.value()
    model[2] = nn.Linear(6, 3).double()
    assert objective.value() == value
    with pytest.raises(OrographError, match="modules have changed"):
        objective.now()


def test_a_forward_that_writes_weights_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Flatten(), nn.Linear(4, 3)).double()
    with pytest.raises(NotDeterministic, match=r"writes to the parameter '0\.weight'"):
        Objective(model, nn.CrossEntropyLoss(), (Y[:, None].clone(), Y))


def test_points_are_copies_in_and_out():
    objective = Objective(normed(), nn.CrossEntropyLoss(), (X, Y))
    value, point = objective.value(), objective.point()
    there = objective.at(point)
    point.theta.zero_()
    point.buffers["1.running_mean"].add_(3)
    assert objective.value() == value == there.value()
    single = Objective(normed().float(), nn.CrossEntropyLoss(), (X.float(), Y))
    assert single.at(objective.point()).dtype == torch.float32


def test_running_statistics_belong_to_a_network():
    objective, other = Objective(normed(), nn.CrossEntropyLoss(), (X, Y)), normed()
    with pytest.raises(ValueError, match=r"lack the buffer 1\.running_mean"):
        objective.at(dict(other.named_parameters()))


class Lazy(nn.Module):
    """Creates a buffer and an attribute in its first forward."""

    def __init__(self):
        super().__init__()
        self.net = small_mlp().float()
        self.register_buffer("scale", None)

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.ones(4, dtype=x.dtype)
            self.last_seen = x
        return self.net(x * self.scale)


def test_what_a_forward_creates_does_not_stay():
    model = Lazy()
    Objective(model, nn.CrossEntropyLoss(), (X.float(), Y), dtype=torch.float64).value()
    assert model.scale is None and not hasattr(model, "last_seen")
    assert model(X.float()).dtype == torch.float32


def test_cached_parametrizations_do_not_leak_either_way():
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 3)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y))
    moved = objective.at(objective.theta * 2)
    expected = moved.value()
    with nn.utils.parametrize.cached():
        before = model(X)
        assert moved.value() == expected
        assert torch.equal(model(X), before)


def test_callers_under_inference_mode_and_autocast():
    with torch.inference_mode():
        model = small_mlp()
        objective = Objective(model, nn.CrossEntropyLoss(), (X.clone(), Y.clone()), batch_size=25)
        inside = eigenpairs(hessian(objective), tol=1e-6)
        objective.now().value()
    outside = eigenpairs(hessian(Objective(small_mlp(), nn.CrossEntropyLoss(), (X, Y))), tol=1e-6)
    assert float(inside.values[0]) == pytest.approx(float(outside.values[0]), rel=1e-10)
    single = Objective(small_mlp().float(), nn.CrossEntropyLoss(), (X.float(), Y))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = eigenpairs(hessian(single))
        spectral_density(hessian(single))
    assert rounded.status == "converged" and float(rounded.values[0]) == pytest.approx(float(outside.values[0]), rel=1e-4)


def test_scripted_modules_are_refused():
    with pytest.raises(TypeError, match="Pass the module that it was made from"):
        Objective(torch.jit.script(small_mlp()), nn.CrossEntropyLoss(), (X, Y))


class TestWhereThereIsNoCopy:
    """Models that copy themselves wrongly or not at all are measured in place, with the same numbers, and left as they were."""

    class Refusing(nn.Sequential):
        def __deepcopy__(self, memo):
            raise RuntimeError("not this one")

    class Wrong(nn.Sequential):
        def __deepcopy__(self, memo):
            other = nn.Sequential(*copy.deepcopy(list(self), memo))
            other.__class__ = type(self)
            other.double_it = True
            return other

        def forward(self, x):
            return super().forward(x) * (2 if hasattr(self, "double_it") else 1)

    @pytest.mark.parametrize(("kind", "reason"), [(Refusing, "it cannot be copied"), (Wrong, "its copy gives another loss|has other layers")])
    def test_measured_in_place(self, kind, reason):
        model, plain = kind(*small_mlp()), small_mlp()
        before = state_of(model)
        objective = Objective(model, nn.CrossEntropyLoss(), (X, Y))
        assert objective.isolation.startswith("the model itself") and re.search(reason, objective.isolation)
        reference = Objective(plain, nn.CrossEntropyLoss(), (X, Y))
        assert reference.isolation == "a private copy of the model"
        assert objective.at(objective.theta * 2).value() == reference.at(reference.theta * 2).value()
        assert torch.equal(hessian(objective).dense(), hessian(reference).dense())
        assert state_of(model) == before


def test_weights_are_held_once_beside_the_users_and_theta():
    model = nn.Linear(300, 300)
    objective = Objective(model, nn.MSELoss(), (torch.randn(4, 300), torch.randn(4, 300)))
    held = {t.untyped_storage().data_ptr() for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and not t.is_nested and t.device.type == "cpu" and t.shape in ((300, 300), (90_300,))}
    own = {t.untyped_storage().data_ptr() for t in (model.weight, objective.snapshot.point.theta, objective.leaves[0])}
    assert held == own
