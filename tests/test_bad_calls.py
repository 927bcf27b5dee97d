"""Every wrong argument of every public callable is refused in one clear message; an operator that is no symmetric matrix is refused too."""

import inspect

import pytest
import torch

import orograph as og
from orograph.linalg.operator import LinearOperator

from .bad_calls import outcomes, parameters_of, public_callables, tally, wrong_values
from .bad_options import prepared, unclear, wrong_options
from .families import rotating
from .good_calls import good_calls

F64 = {"dtype": torch.float64}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def symmetric(kind, dtype, scale, n=60):
    """A dense matrix, made in float64, with a spectrum of some kind."""
    generator = torch.Generator().manual_seed(3)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, **F64))
    values = {
        "random": torch.randn(n, generator=generator, **F64), "decaying": torch.logspace(0, -12, n, **F64), "one large": torch.tensor([1e6] + [1.0] * (n - 1), **F64),
        "rank one": torch.tensor([1.0] + [0.0] * (n - 1), **F64), "zero": torch.zeros(n, **F64), "identity": torch.ones(n, **F64), "indefinite": torch.linspace(-1, 1, n, **F64),
    }[kind]  # fmt: skip
    A = Q @ torch.diag(values * scale) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def check(matmat, n=60, dtype=torch.float64, **settings):
    op = LinearOperator(matmat, n, dtype, **settings)
    op.prove()
    assert op.products == 0 and op.is_proven


G = torch.randn(60, 60, generator=torch.Generator().manual_seed(4), **F64)
S = G + G.T
WRONG = {  # name -> (matmat, words of the error)
    "not symmetric": (lambda V: G @ V, "not symmetric"),
    "antisymmetric": (lambda V: (G - G.T) @ V, "not symmetric"),
    "one entry off": (lambda V: S @ V + torch.nn.functional.pad(1e-3 * V[:1], (0, 0, 5, 54)), "not symmetric"),
    "random": (lambda V: S @ V + torch.randn_like(V), "not repeatable"),
    "a little random": (lambda V: S @ V * (1 + 1e-4 * torch.rand(())), "not repeatable"),
    "a constant term": (lambda V: S @ V + 1, "not linear"),
    "absolute values": (lambda V: (S @ V).abs(), "not linear"),
    "a cube": (lambda V: S @ V**3, "not linear"),
    "columns that depend on each other": (lambda V: S @ (V - V.mean(dim=1, keepdim=True) * (V.shape[1] > 1)), "not linear"),
    "changes its input": (lambda V: V.mul_(2), "changes the vectors"),
    "changes its input unseen": (lambda V: (S @ V, V.data.mul_(2))[0], "changes the vectors"),
    "another dtype": (lambda V: (S @ V).float(), "returned torch.float32"),
    "another shape": (lambda V: (S @ V)[:5], r"must map \(60, k\) to \(60, k\)"),
    "an array": (lambda V: (S @ V).numpy(), "returned a ndarray"),
    "not finite": (lambda V: S @ V * float("nan"), "not finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_operators_that_are_no_symmetric_matrix_are_refused_before_their_first_use(name):
    matmat, words = WRONG[name]
    for use in (og.eigenpairs, og.trace, og.spectrum, og.spectral_density, og.diagonal):
        with pytest.raises((ValueError, TypeError, og.OrographError), match=words):
            use(LinearOperator(matmat, 60))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e30])
@pytest.mark.parametrize("kind", ["random", "decaying", "one large", "rank one", "zero", "identity", "indefinite"])
def test_honest_rounding_is_no_false_alarm(kind, scale, dtype):
    A = symmetric(kind, dtype, scale)
    check(lambda V: A @ V, dtype=dtype)
    low = A.bfloat16()
    check(lambda V: (low @ V.bfloat16()).to(dtype), dtype=dtype, noise=1e-2)  # a half-precision model behind vectors of a higher one


def test_the_check_can_be_left_out_and_the_input_may_be_returned():
    assert og.trace(LinearOperator(lambda V: V, 10)).value == 10
    assert LinearOperator(lambda V: G @ V, 60, check=False).is_proven and LinearOperator.from_dense(S).is_proven


def test_the_walk_knows_every_public_callable_and_every_parameter(tmp_path):
    good = good_calls(tmp_path)
    assert set(public_callables()) == set(good)
    for name, (function, *_) in good.items():
        for parameter, hint in parameters_of(name, function).items():
            assert list(wrong_values(hint, tmp_path)), f"{name}({parameter}) has no wrong value"
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert kinds <= set(inspect._ParameterKind)


@pytest.mark.parametrize("name", rotating(public_callables(), 10))
def test_every_wrong_argument_is_refused_clearly(name, tmp_path):
    found = list(outcomes(name, tmp_path))
    assert [outcome for outcome in found if outcome.kind in ("raw", "accepted")] == [], tally(found)


@pytest.mark.parametrize(("command", "parameter", "arguments"), rotating(list(wrong_options()), 12))
def test_every_wrong_option_is_refused_clearly(command, parameter, arguments, tmp_path, monkeypatch):
    prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert unclear(arguments) == ""
