"""Bad input gets one clear error that says what was passed, what was expected and what to do; and leaves everything as it was."""

import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import orograph as og

from .networks import small_mlp
from .test_snapshot import state_of

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
CE = nn.CrossEntropyLoss()
BAG = nn.EmbeddingBag(5, 3).double()


def nan_weights(model):
    with torch.no_grad():
        model[2].bias[1] = float("nan")


class WithInteger(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_mlp()
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, x):
        return self.net(x)


class Opaque:
    """Not a tensor: unpickling it would run code."""


def objective(model=None, **settings):
    return og.Objective(model or small_mlp(), CE, (X, Y), **settings)


def operator(n=10):
    return og.LinearOperator.from_dense(torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64)))


def saved(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    return tmp_path / "w.pt"


# name -> (what to do with a model and a folder, error, text)
BAD = {
    "model is no module": (lambda m, f: og.Objective(lambda x: x, CE, (X, Y)), TypeError, "needs an nn.Module"),
    "criterion is a class": (lambda m, f: og.Objective(m, nn.CrossEntropyLoss, (X, Y)), TypeError, r"Pass an instance: CrossEntropyLoss\(\)"),
    "model and criterion swapped": (lambda m, f: og.Objective(nn.MSELoss(), m, (X, Y)), TypeError, "which is a loss. The network comes first"),
    "NumPy arrays": (lambda m, f: og.Objective(m, nn.MSELoss(), (X.numpy(), Y.numpy())), TypeError, r"NumPy arrays. Pass tensors: \(torch.from_numpy"),
    "criterion is a string": (lambda m, f: og.Objective(m, "mse", (X, Y)), TypeError, r"criterion='mse'\) needs a function"),
    "criterion returns a vector": (lambda m, f: og.Objective(m, lambda o, t: F.cross_entropy(o, t, reduction="none"), (X, Y)), ValueError, r"returned shape \(40,\), not a scalar"),
    "criterion with reduction none": (lambda m, f: og.Objective(m, nn.CrossEntropyLoss(reduction="none"), (X, Y)), ValueError, "one loss per example"),
    "criterion returns a float": (lambda m, f: og.Objective(m, lambda o, t: 0.5, (X, Y)), TypeError, "returned float, not a tensor"),
    "criterion sums in a lambda": (lambda m, f: og.Objective(m, lambda o, t: F.cross_entropy(o, t, reduction="sum"), (X, Y), batch_size=15), ValueError, "adds up like a sum.*pass count="),
    "criterion ignores tokens in a lambda": (
        lambda m, f: og.Objective(m, lambda o, t: F.cross_entropy(o, t, ignore_index=0), (X, Y), batch_size=15), ValueError, "Pass count=",
    ),
    "criterion ignores tokens, none in the first batch": (
        lambda m, f: og.Objective(m, lambda o, t: F.cross_entropy(o, t), [(X[:9], Y[:9]), (X[9:], torch.where(Y[9:] == 0, -100, Y[9:]))]), ValueError, "Pass count=",
    ),
    "loss couples examples": (lambda m, f: og.Objective(m, lambda o, t: F.cross_entropy(o - o.mean(0), t), (X, Y), batch_size=15), ValueError, "as one batch"),
    "count is wrong": (lambda m, f: og.Objective(m, CE, (X, Y), batch_size=15, count=lambda b: 1), ValueError, r"count\(batch\) \* loss"),
    "count is negative": (lambda m, f: og.Objective(m, CE, (X, Y), count=lambda b: -1), ValueError, "cannot be negative"),
    "empty tensors": (lambda m, f: og.Objective(m, CE, (X[:0], Y[:0])), ValueError, "data is empty"),
    "empty list": (lambda m, f: og.Objective(m, CE, []), ValueError, "data is empty"),
    "empty dataset": (lambda m, f: og.Objective(m, CE, TensorDataset(X[:0], Y[:0])), ValueError, "data is empty"),
    "every target ignored": (lambda m, f: og.Objective(m, CE, (X, torch.full_like(Y, -100))), ValueError, "holds no unit"),
    "lengths differ": (lambda m, f: og.Objective(m, CE, (X, Y[:-1])), ValueError, r"as many targets as inputs, got shapes \(40, 4\) and \(39,\)"),
    "one tensor": (lambda m, f: og.Objective(m, CE, X), TypeError, "data is one tensor"),
    "data is a number": (lambda m, f: og.Objective(m, CE, 3), TypeError, "data is a int"),
    "generator": (lambda m, f: og.Objective(m, CE, iter([(X, Y)])), og.NotDeterministic, "read only once"),
    "batches are dicts": (lambda m, f: og.Objective(m, CE, [{"x": X, "y": Y}]), TypeError, "Pass forward=lambda model, batch"),
    "forward returns one value": (lambda m, f: og.Objective(m, CE, [(X, Y)], forward=lambda m, b: m(b[0])), TypeError, r"must return \(output, target\)"),
    "batch_size with a loader": (lambda m, f: og.Objective(m, CE, [(X, Y)], batch_size=10), ValueError, "already comes in batches"),
    "batch_size of zero": (lambda m, f: objective(m, batch_size=0), ValueError, r"batch_size=0\) needs a whole number of at least 1 or None"),
    "unknown mode": (lambda m, f: objective(m, mode="train"), ValueError, r"mode='train'\) needs \"eval\" or \"batch\""),
    "dtype is an integer": (lambda m, f: objective(m, dtype=torch.int32), TypeError, "floating-point torch dtype"),
    "batch of one in batch mode": (lambda m, f: og.Objective(m, CE, [(X[:39], Y[:39]), (X[39:], Y[39:])], mode="batch"), ValueError, "at least 2 examples"),
    "unknown parameter name": (lambda m, f: objective(m, params="layer9.*"), ValueError, r"'layer9\.\*' matches no parameter. There are: 0\.weight"),
    "no parameter names": (lambda m, f: objective(m, params=[]), ValueError, "It is empty"),
    "integer parameter": (lambda m, f: og.Objective(WithInteger(), CE, (X, Y), params="table"), TypeError, "'table' is torch.int64"),
    "nothing requires grad": (lambda m, f: objective(small_mlp().requires_grad_(False)), ValueError, "no parameter requires grad"),
    "lazy parameter": (lambda m, f: objective(nn.Sequential(nn.LazyLinear(3))), ValueError, "not initialised yet"),
    "NaN weights": (lambda m, f: (nan_weights(n := small_mlp()), objective(n)), ValueError, r"NaN or inf, first in '2\.bias'"),
    "NaN inputs": (lambda m, f: og.Objective(m, CE, (X * float("nan"), Y)), ValueError, "the loss is nan at these weights"),
    "flat tensor of the wrong size": (lambda m, f: objective(m).at(torch.zeros(3)), ValueError, r"shape \(51,\), got \(3,\)"),
    "point from a number": (lambda m, f: objective(m).at(3), TypeError, "cannot be read from a int"),
    "weights of another network": (lambda m, f: objective(m).at(small_mlp(hidden=9)), ValueError, r"shape \(9, 4\) in the given weights, and \(6, 4\)"),
    "state dict with a missing entry": (lambda m, f: objective(m).at({"0.weight": m[0].weight}), ValueError, "lack 0.bias"),
    "state dict with a surplus entry": (lambda m, f: objective(m).at({**m.state_dict(), "head": X}), ValueError, "hold head"),
    "file that is not there": (lambda m, f: objective(m).at(f / "none.pt"), FileNotFoundError, "no weights file"),
    "file that needs pickle": (lambda m, f: objective(m).at(saved(f, Opaque())), ValueError, "unpickling it could run any code"),
    "file that holds a tensor": (lambda m, f: objective(m).at(saved(f, X)), ValueError, "not a state dict"),
    "sample larger than the data": (lambda m, f: objective(m).sample(41, 0), ValueError, "1 <= n <= 40"),
    "sample in batch mode": (lambda m, f: objective(m, mode="batch").sample(5, 0), ValueError, "would cut batches"),
    "bare scalar from several batches": (lambda m, f: og.Objective.from_batch_loss(m, lambda m, b: CE(m(b[0]), b[1]), [(X, Y), (X, Y)]), ValueError, r"Return \(total, count\)"),
    "batch_loss is no function": (lambda m, f: og.Objective.from_batch_loss(m, None, [(X, Y)]), TypeError, r"batch_loss=None\) needs a function"),
    "k larger than n": (lambda m, f: og.eigenpairs(operator(), k=12), ValueError, r"needs k <= op\.size = 10"),
    "k of zero": (lambda m, f: og.eigenpairs(operator(), k=0), ValueError, r"k=0\) needs a whole number of at least 1"),
    "unknown end": (lambda m, f: og.eigenpairs(operator(), which="biggest"), ValueError, "needs \"largest\", \"smallest\""),
    "unknown method": (lambda m, f: og.eigenpairs(operator(), method="qr"), ValueError, "needs \"lanczos\""),
    "tol of zero": (lambda m, f: og.eigenpairs(operator(), tol=0), ValueError, "between 0 and 1"),
    "budget too small": (lambda m, f: og.eigenpairs(operator(), k=3, max_products=4), ValueError, "takes at least 7"),
    "start of the wrong shape": (lambda m, f: og.eigenpairs(operator(), start=torch.ones(3)), ValueError, r"shape \(10,\)"),
    "start of zeros": (lambda m, f: og.eigenpairs(operator(), start=torch.zeros(10, dtype=torch.float64)), ValueError, "non-zero"),
    "density without samples": (lambda m, f: og.spectral_density(operator(), num_samples=0), ValueError, r"num_samples=0\) needs a whole number of at least 1"),
    "vector of the wrong shape": (lambda m, f: operator() @ torch.ones(9), ValueError, r"shape \(10,\) or \(10, k\), got \(9,\)"),
    "vector of the wrong dtype": (lambda m, f: operator() @ torch.ones(10), TypeError, r"torch\.float64 on cpu, got torch\.float32"),
    "vector with NaN": (lambda m, f: operator() @ torch.full((10,), float("nan"), dtype=torch.float64), og.OrographError, "the vector holds inf or NaN"),
    "matrix that is not symmetric": (lambda m, f: og.LinearOperator.from_dense(torch.triu(torch.ones(3, 3))), ValueError, "symmetric"),
    "matrix that is not square": (lambda m, f: og.LinearOperator.from_dense(torch.ones(3, 2)), ValueError, "square"),
    "memory that is no size": (lambda m, f: og.hessian(objective(m), memory="lots"), ValueError, "is no size"),
    "basis beyond the budget": (lambda m, f: og.eigenpairs(og.LinearOperator(lambda V: V, 99, memory=1000), k=3), og.OutOfBudget, "Ask for fewer pairs"),
    "dense beyond the budget": (lambda m, f: og.LinearOperator(lambda V: V, 99, memory=1000).dense(), og.OutOfBudget, "Use eigenpairs"),
    "product beyond the budget": (lambda m, f: og.hessian(objective(m), memory=1000), og.OutOfBudget, "are left for it"),
    "engine beyond the budget": (lambda m, f: og.hessian(objective(m), memory=1000, engine="retained"), og.OutOfBudget, "which chooses what fits"),
    "blockwise without blocks": (lambda m, f: og.hessian(og.Objective(m[0], CE, (X, Y)), engine="blockwise"), ValueError, "needs a model with a Sequential"),
    "blockwise GGN": (lambda m, f: og.ggn(objective(m), engine="blockwise"), ValueError, "needs one of auto, retained, fresh, difference"),
    "unknown engine": (lambda m, f: og.hessian(objective(m), engine="magic"), ValueError, r"engine='magic'\) needs \"auto\", \"retained\", \"fresh\", \"blockwise\" or \"difference\""),
    "operator of a model": (lambda m, f: og.hessian(m), TypeError, "needs an Objective. Make one"),
    "unknown kind of Fisher": (lambda m, f: og.fisher(objective(m), kind="true"), ValueError, "needs \"mc\" or \"empirical\""),
    "Fisher of a lambda": (lambda m, f: og.fisher(og.Objective(m, lambda o, t: CE(o, t), (X, Y))).dense(), TypeError, "one of torch's own losses"),
    "Fisher of a loss without likelihood": (lambda m, f: og.fisher(og.Objective(m, nn.L1Loss(), (X, X[:, :3]))).dense(), TypeError, "needs the likelihood"),
    "preconditioner with a zero": (lambda m, f: og.preconditioned(operator(), torch.zeros(10)), ValueError, "positive and finite"),
    "preconditioner of the wrong size": (lambda m, f: og.preconditioned(operator(), torch.ones(9)), ValueError, r"shape \(9,\).*of shape \(10,\)"),
    "block of an unknown name": (lambda m, f: og.block(og.hessian(o := objective(m)), o, "head"), ValueError, "'head' matches no parameter"),
    "block of another operator": (lambda m, f: og.block(operator(), objective(m), "0.*"), ValueError, "must belong together"),
    "unknown probe": (lambda m, f: og.measure(objective(m), "sharpnes"), ValueError, "there is no probe 'sharpnes'. Did you mean 'sharpness'. There are: barrier"),
    "missing network": (lambda m, f: og.measure(objective(m), "barrier", m), TypeError, r"compares 2 networks \(a, b\); missing: b"),
    "surplus network": (lambda m, f: og.measure(objective(m), "gradient", m), TypeError, "takes no further network"),
    "unknown setting": (lambda m, f: og.measure(objective(m), "spectrum", kk=3), TypeError, "no setting kk. It has: k, rel_error"),
    "line of a point and a number": (lambda m, f: og.Line(objective(m).point(), 3)(0.5), TypeError, "needs a Point or a tensor"),
    "interval of level 95": (lambda m, f: og.Estimate(value=1.0).interval(95), ValueError, "between 0 and 1"),
    "embedding bag": (lambda m, f: og.hessian(og.Objective(BAG, CE, (Y[:, None].clone(), Y)), engine="fresh"), og.NotDifferentiable, "cannot differentiate this model twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name, tmp_path):
    act, error, text = BAD[name]
    model = small_mlp()
    kept = state_of(model)
    with pytest.raises(error, match=re.compile(text, re.DOTALL)) as caught:
        act(model, tmp_path)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 900
    assert state_of(model) == kept


def test_a_pickle_with_more_than_tensors_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "w.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises((ValueError, RuntimeError)):
        objective().at(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_frozen_parameters_that_differ_are_refused_where_networks_are_compared():
    model = small_mlp()
    part = objective(model, params="2.*")
    other = small_mlp(seed=5)
    with pytest.raises(ValueError, match=r"differ in '0\.weight', which is outside params"):
        og.measure(part, "barrier", model, other)
    assert og.Objective(other, CE, (X, Y)).value() == part.at(other).value()


def test_flat_tensors_are_no_networks_where_there_are_running_statistics():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    normed = objective(net)
    with pytest.raises(ValueError, match="a flat tensor says nothing of the running statistics"):
        og.measure(normed, "barrier", normed.theta, net)


def test_partial_with_a_settled_sum_is_accepted():
    assert og.Objective(small_mlp(), partial(F.cross_entropy, reduction="sum"), (X, Y), batch_size=7).value() == pytest.approx(F.cross_entropy(small_mlp()(X), Y, reduction="sum").item())
