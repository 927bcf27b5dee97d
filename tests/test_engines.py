"""The ladder of engines: each gives the same matrix, the choice keeps to the budget, and what stands in for kernels leaves no trace."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orograph import Objective, OrographWarning, OutOfBudget, eigenpairs, fisher, ggn, hessian
from orograph.memory import Meter
from orograph.products.choice import ALL
from orograph.studies.networks import GPT, cnn, mlp
from orograph.studies.problems import digits

from .families import rotating
from .networks import TokenModel, loss_cases, small_mlp
from .oracles import dense_hessian, relative

CE = nn.CrossEntropyLoss()
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 11, (12, 7), generator=torch.Generator().manual_seed(2))


def tiny_gpt(dtype=torch.float64):
    return GPT(width=12, layers=3, heads=2, length=6, vocabulary=11, seed=0).to(dtype).eval()


def text(model):
    return Objective(model, CE, [(TOKENS[:5, :-1], TOKENS[:5, 1:]), (TOKENS[5:, :-1], TOKENS[5:, 1:])])


def differences(objective, v, step=1e-6):
    return (objective.at(objective.theta + step * v).gradient() - objective.at(objective.theta - step * v).gradient()) / (2 * step)


@pytest.mark.parametrize("engine", ["retained", "fresh", "blockwise", "difference"])
@pytest.mark.parametrize("network", ["tanh MLP", "GPT", "tied tokens"])
def test_every_engine_gives_the_same_matrix(engine, network):
    if network == "tied tokens" and engine == "blockwise":
        pytest.skip("no chain of blocks in it")
    if network == "GPT":
        objective = text(tiny_gpt())  # not by torch.func.hessian: jacfwd over jacrev is wrong through LayerNorm in torch 2.13
        V = objective.space.samples(0, range(3), "normal")
        expected = torch.stack([differences(objective, v) for v in V.unbind(1)], dim=1)
    else:
        case = loss_cases()["tied embeddings" if network == "tied tokens" else "class weights"]
        objective = case.objective(50)
        V = objective.space.samples(0, range(3), "normal")
        expected = dense_hessian(objective, case.model, case.whole) @ V
    op = hessian(objective, engine=engine)
    assert op.about["engine"] == engine and relative(op @ V, expected) < (1e-6 if engine == "difference" or network == "GPT" else 1e-10)
    assert relative(op @ V, op @ V) == 0 and op.products == 9


@pytest.mark.parametrize("engine", ["retained", "fresh", "difference"])
@pytest.mark.parametrize("kind", [ggn, fisher])
def test_every_engine_gives_the_same_gauss_newton_matrix(engine, kind):
    objective = loss_cases()["class weights"].objective(50)
    V = objective.space.samples(0, range(3), "normal")
    assert relative(kind(objective, engine=engine) @ V, kind(objective, engine="fresh").dense() @ V) < (1e-7 if engine == "difference" else 1e-12)


def test_parts_add_up_to_the_product():
    op = hessian(loss_cases()["ignored tokens, dicts"].objective(47))
    v = op.space.samples(0, range(2), "normal")
    found = []
    op.apart(lambda part: v, found.append)
    assert relative(sum(found), op @ v) < 1e-12 and op.products == 4


def test_forms_that_break_off_leave_the_model_alone():
    model = small_mlp()
    before, training = [id(p) for p in model.parameters()], model.training
    op = hessian(Objective(model, CE, (X, Y), batch_size=25))

    def stop(image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        op.apart(lambda part: op.space.samples(0, range(2), "normal"), stop)
    assert [id(p) for p in model.parameters()] == before and model.training == training and caught.traceback


# memory


def peak_of(job):
    with Meter() as meter:
        job()
    return meter.peak


def test_meter_agrees_with_torchs_profiler():
    objective = text(tiny_gpt(torch.float32))
    for job in (objective.gradient, lambda: hessian(objective, engine="retained", check=False) @ objective.theta):
        job()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            job()
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        assert peak_of(job) == pytest.approx(peak, rel=0.05)  # workspace inside a kernel is not seen


def networks():
    x, y = digits().train
    yield "MLP", Objective(mlp(64, 64, 64, 10, seed=0), CE, (x[:1000], y[:1000]), batch_size=350)
    yield "CNN", Objective(cnn(seed=0).eval(), CE, (x[:500], y[:500]), batch_size=180)
    yield "GPT", Objective(GPT(width=48, layers=2, heads=4, length=32, vocabulary=64, seed=0).eval(), CE, (torch.randint(0, 64, (20, 32)), torch.randint(0, 64, (20, 32))), batch_size=7)


@pytest.mark.parametrize("share", rotating([1.0, 0.5, 0.2, 0.1], 2))
def test_no_job_passes_its_budget_and_a_tenth_of_the_peak_suffices(share):
    for name, objective in networks():
        free = peak_of(lambda o=objective: eigenpairs(hessian(o), seed=1))
        budget = int(free * share) if share < 1 else None
        op = hessian(objective, memory=budget)
        with Meter() as meter:
            pairs = eigenpairs(hessian(objective, memory=budget), seed=1)
        peak = meter.peak
        assert budget is None or peak <= budget, (name, share, peak, budget, op.about)
        assert pairs.status == "converged" and float(pairs.values[0]) == pytest.approx(float(eigenpairs(hessian(objective)).values[0]), rel=1e-4)


def test_ladder_goes_down_with_the_budget():
    seen = []
    _, objective = list(networks())[2]
    need = peak_of(lambda: hessian(objective, check=False) @ objective.theta)
    for share in (4.0, 1.2, 0.9, 0.5, 0.3):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                about = hessian(objective, memory=int(need * share)).about
            seen.append((about["engine"], "micro_batch" in about))
        except OutOfBudget:
            seen.append(("none", False))
    assert seen[0] == ("retained", False) and ("fresh", True) in seen
    ladder = ["retained", "fresh", "blockwise", "difference", "none"]
    places = [ladder.index(engine) for engine, _ in seen]
    assert places == sorted(places)


def test_fresh_by_name_takes_at_most_three_gradients_of_memory():
    for name, objective in networks():
        gradient = peak_of(objective.gradient)
        op = hessian(objective, engine="fresh", check=False)
        assert peak_of(lambda op=op, o=objective: op @ o.theta) <= 3 * gradient, name


def test_graphs_that_fit_are_kept_and_the_others_built_anew():
    _, objective = list(networks())[2]
    whole = hessian(objective, engine="fresh", check=False)
    for keep in (1, 2, ALL):
        from orograph.products.reverse import hessian_of
        from orograph.products.sweeps import Sweep

        sweep = Sweep(objective, hessian_of, keep)
        V = objective.theta[:, None]
        for _ in range(2):
            assert torch.equal(sweep(V), whole @ V)
        assert len(sweep.kept) == min(keep, 3)


# stand-ins


class Attention(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last, self.reentrant = nn.MultiheadAttention(4, 2, batch_first=True).double(), nn.Linear(4, 3).double(), reentrant

    def forward(self, x):
        x = x[:, None, :] * torch.tensor([1.0, -0.5, 0.3], dtype=x.dtype)[:, None]
        attend = lambda z: self.inner(z, z, z, need_weights=False)[0]
        x = attend(x) if self.reentrant is None else checkpoint(attend, x.requires_grad_(), use_reentrant=self.reentrant)
        return self.last(x[:, -1])


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 12).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        q, k, v = self.first(x[:, None, :] * torch.ones(3, 1, dtype=x.dtype)).chunk(3, dim=-1)
        return self.last(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0].tanh().sum(1))


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.1).double()
    return nn.Sequential(nn.Unflatten(1, (1, 4)), layer, nn.Flatten(), nn.Linear(4, 3).double())


def recurrent(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.last = kind(4, 4, batch_first=True).double(), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.last(self.rnn(x[:, None, :].expand(-1, 3, -1))[0][:, -1])

    return Recurrent


RIGHT = {
    "fused attention": Fused, "MultiheadAttention": Attention, "checkpointed attention": lambda: Attention(False), "reentrant checkpoint": lambda: Attention(True),
    "encoder layer": encoder, "LSTM": recurrent(nn.LSTM), "GRU": recurrent(nn.GRU), "RNN": recurrent(nn.RNN),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).double(),
    "InstanceNorm": lambda: nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (2, 6)), nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Linear(12, 3)).double(),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["retained", "fresh"])
@pytest.mark.parametrize("name", RIGHT)
def test_ordinary_models_are_right(name, engine):
    torch.manual_seed(0)
    model = RIGHT[name]().train()
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.utils.checkpoint.CheckpointFunction
    op = hessian(Objective(model, CE, (X, Y), batch_size=25), engine=engine)
    assert op.about["preflight"] == "proven"
    objective = Objective(model, CE, (X, Y), batch_size=25)
    V = objective.space.samples(0, range(2), "normal")
    for v, product in zip(V.unbind(1), (op @ V).unbind(1), strict=True):
        assert relative(product, differences(objective, v)) < 1e-6
    assert flags == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.utils.checkpoint.CheckpointFunction)
    assert all("forward" not in module.__dict__ for module in model.modules()) and model.training


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_batchnorm_stand_in_is_the_same_function(mode):
    torch.manual_seed(0)
    for affine, dims in ((True, nn.BatchNorm2d), (False, nn.BatchNorm2d), (True, nn.BatchNorm1d)):
        shape = (1, 2, 2) if dims is nn.BatchNorm2d else (1, 4)
        layer = nn.Conv2d(1, 3, 2) if dims is nn.BatchNorm2d else nn.Conv1d(1, 3, 2)
        model = nn.Sequential(nn.Unflatten(1, shape), layer, dims(3, affine=affine), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
        model(X)  # statistics of its own
        model.eval()
        objective = Objective(model, CE, (X, Y), mode=mode)
        with torch.no_grad():
            if mode == "eval":
                assert objective.value() == pytest.approx(float(CE(model(X), Y)), rel=1e-12)
        assert hessian(objective).about["preflight"] == "proven"


def test_batchnorm_in_half_precision_stays_torchs_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(16, 3))
    model = model.to(torch.bfloat16).eval()
    x = X.to(torch.bfloat16)
    for mixed in (False, True):
        if mixed:
            model[2].float()  # statistics in single precision, as mixed-precision training keeps them
        assert Objective(model, CE, (x, Y)).value() == float(CE(model(x), Y).detach())


def test_compiled_modules_run_eagerly_and_stay_compiled():
    model = small_mlp()
    plain = hessian(Objective(model, CE, (X, Y)))
    v = plain.space.sample(0, 0, "normal")
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X).sum().backward()
    assert torch.equal(hessian(Objective(compiled, CE, (X, Y))) @ v, plain @ v)
    inner = nn.Sequential(torch.compile(model[0], backend="aot_eager"), *model[1:])
    inner(X)
    assert torch.equal(hessian(Objective(inner, CE, (X, Y))) @ v, plain @ v)
    model.compile(backend="aot_eager")
    model(X)
    assert torch.equal(hessian(Objective(model, CE, (X, Y))) @ v, plain @ v)
    torch._dynamo.reset()


def test_distributed_data_parallel_is_unwrapped(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small_mlp()
        wrapped = nn.parallel.DistributedDataParallel(model)
        v = Objective(model, CE, (X, Y)).space.sample(0, 0, "normal")
        objective = Objective(wrapped, CE, (X, Y))
        assert torch.equal(hessian(objective) @ v, hessian(Objective(model, CE, (X, Y))) @ v)
        assert torch.equal(objective.point(wrapped.state_dict()).theta, objective.theta)
    finally:
        torch.distributed.destroy_process_group()


# differences


class Kernel(torch.autograd.Function):
    """tanh with a backward in NumPy: right gradients, nothing else."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(grad.detach().numpy() * (1 - torch.tanh(x).detach().numpy() ** 2))


class Custom(nn.Module):
    def __init__(self, residual, function=Kernel):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.residual, self.function = nn.Linear(4, 6).double(), nn.Linear(6, 3).double(), residual, function

    def forward(self, x):
        z = self.first(x)
        return self.last(self.function.apply(z) + (z if self.residual else 0))


class Once(Kernel):
    backward = staticmethod(torch.autograd.function.once_differentiable(Kernel.backward))


@pytest.mark.parametrize("kind", [hessian, ggn])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("function", [Kernel, Once])
def test_custom_functions_without_a_second_derivative_are_right_by_differences(kind, residual, function):
    with pytest.warns(OrographWarning, match="by finite differences"):
        op = kind(Objective(Custom(residual, function), CE, (X, Y), batch_size=25))
    assert op.about["engine"] == "difference" and "note" in op.about and op.about["preflight"] == "proven"
    plain = kind(Objective(Custom(residual, type("Plain", (), {"apply": torch.tanh})), CE, (X, Y)))
    v = op.space.sample(0, 0, "normal")
    assert relative(op @ v, plain @ v) < 1e-6


def test_what_torch_cannot_differentiate_twice_is_right_by_differences():
    torch.manual_seed(0)
    bag = nn.Sequential(nn.EmbeddingBag(5, 4, mode="sum"), nn.Tanh(), nn.Linear(4, 3)).double()
    data = (torch.randint(0, 5, (30, 2)), torch.randint(0, 3, (30,)))
    with pytest.warns(OrographWarning, match="embedding_bag"):
        op = hessian(Objective(bag, CE, data))
    embedding = nn.Embedding(5, 4, _weight=bag[0].weight.detach().clone())

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.last = embedding, bag[2]

        def forward(self, tokens):
            return self.last(torch.tanh(self.embedding(tokens).sum(1)))

    v = op.space.sample(0, 0, "normal")
    assert relative(op @ v, hessian(Objective(Summed(), CE, data)) @ v) < 1e-6


def test_torchs_own_wrong_weight_norm_is_right_by_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    objective = Objective(model, CE, (X, Y))
    with pytest.warns(OrographWarning, match="weight_norm"):
        op = hessian(objective)
    v = op.space.sample(0, 0, "normal")
    assert relative(op @ v, differences(objective, v)) < 1e-6


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_differences_of_a_piecewise_linear_network_settle_where_there_is_no_kink_and_say_their_noise(seed):
    model = cnn(seed=seed, channels=(4, 6)).eval()
    x, y = digits().train
    objective = Objective(model, CE, (x[:60], y[:60]))
    exact, op = hessian(objective), hessian(objective, engine="difference")
    v = op.space.sample(0, 5, "normal")
    assert float(((op @ v) - exact @ v).norm()) <= max(op.noise, 1e-5) * float((exact @ v).norm())
    assert op.about["noise"] < 0.1


def test_blocks_are_found_in_a_module_list_and_refused_where_they_are_no_chain():
    assert hessian(text(tiny_gpt()), engine="blockwise").about["engine"] == "blockwise"
    with pytest.raises(ValueError, match="needs a model with a Sequential"):
        hessian(loss_cases()["tied embeddings"].objective(50), engine="blockwise")
    assert isinstance(TokenModel(), nn.Module)
