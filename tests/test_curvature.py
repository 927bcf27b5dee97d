"""Operators against closed forms and dense matrices."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from orograph import NotDifferentiable, Objective, OrographWarning, PreflightFailed, block, fisher, ggn, hessian, preconditioned

from .networks import N, TokenModel, loss_cases, small_mlp
from .oracles import dense_hessian, relative

CASES = loss_cases()
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))


def bordered(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def flat(weight_major):
    """(outputs, inputs + 1) blocks -> the order of nn.Linear: all weights, then the biases."""
    outputs, inputs = weight_major
    index = torch.arange(outputs * (inputs + 1)).view(outputs, inputs + 1)
    return torch.cat([index[:, :-1].flatten(), index[:, -1]])


def linear(outputs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, outputs).double()


@pytest.mark.parametrize("kind", [hessian, ggn])
def test_linear_regression_is_2_xx_over_n(kind):
    target = torch.randn(N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    op = kind(Objective(linear(2), nn.MSELoss(), (X, target), batch_size=50))
    gram = bordered(X).T @ bordered(X) / N
    expected = torch.kron(torch.eye(2, dtype=torch.float64), gram)[flat((2, 4))][:, flat((2, 4))]  # mean over 2 N entries, times 2
    assert relative(op.dense(), expected) < 1e-12


@pytest.mark.parametrize("kind", [hessian, ggn])
def test_logistic_regression_is_x_p_1_minus_p_x_over_n(kind):
    model = linear(1)
    target = (X[:, :1] > 0).double()
    p = torch.sigmoid(model(X)).detach()
    expected = (bordered(X) * p * (1 - p)).T @ bordered(X) / N
    assert relative(kind(Objective(model, nn.BCEWithLogitsLoss(), (X, target), batch_size=50)).dense(), expected) < 1e-12


@pytest.mark.parametrize("kind", [hessian, ggn])
def test_softmax_regression_is_the_kronecker_sum(kind):
    model = linear(3)
    p = torch.softmax(model(X), dim=1).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nab,ni,nj->aibj", curvature, bordered(X), bordered(X)).reshape(15, 15) / N
    index = flat((3, 4))
    assert relative(kind(Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=50)).dense(), expected[index][:, index]) < 1e-12


@pytest.mark.parametrize("engine", ["fresh", "retained"])
def test_engines_give_the_same_matrix_and_count_products(engine):
    objective = CASES["cross-entropy"].objective(50)
    op = hessian(objective, engine=engine)
    assert op.products == 0
    expected = dense_hessian(objective, CASES["cross-entropy"].model, CASES["cross-entropy"].whole)
    assert relative(op.dense(), expected) < 1e-12
    assert op.products == objective.size
    V = torch.randn(objective.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(op @ V, expected @ V) < 1e-12 and op.products == objective.size + 3
    assert op.about["engine"] == engine and op.about["preflight"] == "proven"


@pytest.mark.parametrize("name", ["cross-entropy", "class weights", "label smoothing", "regression", "binary", "ignored tokens, dicts", "soft targets", "sum"])
def test_ggn_is_the_jacobian_sandwich(name):
    case = CASES[name]
    objective = case.objective(50)
    theta = objective.theta
    outputs = []

    def output(t):
        parts = {n: t[objective.layout[n]].view(s) for n, s in zip(objective.names, objective.layout.shapes, strict=True)}
        call = lambda *a: torch.func.functional_call(case.model, parts, a)
        outputs.clear()
        case.whole(lambda *a: outputs.append(call(*a)) or outputs[-1])
        return outputs[-1]

    J = torch.autograd.functional.jacobian(output, theta)
    shape = J.shape[:-1]
    loss_of = lambda z: case.whole(lambda *a: z.view(shape))
    C = torch.autograd.functional.hessian(loss_of, output(theta).detach().flatten()) if J[..., 0].numel() < 1500 else None
    if C is None:  # too large for a dense output Hessian: compare products
        v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        flatJ = J.reshape(-1, len(theta))
        Cu = torch.autograd.functional.hvp(loss_of, output(theta).detach().flatten(), flatJ @ v)[1]
        assert relative(ggn(objective) @ v, flatJ.T @ Cu) < 1e-10
        return
    flatJ = J.reshape(-1, len(theta))
    assert relative(ggn(objective).dense(), flatJ.T @ C @ flatJ) < 1e-10


@pytest.mark.parametrize("name", ["cross-entropy", "class weights", "regression", "ignored tokens, dicts", "sum"])
def test_mc_fisher_is_unbiased_for_the_ggn(name):
    objective = CASES[name].objective(150)
    v = objective.space.sample(0, 0, "normal")
    exact = float(v @ (ggn(objective) @ v))
    draws = torch.stack([v @ (fisher(objective, seed=seed, check=False) @ v) for seed in range(60)])
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 60**0.5


def test_mc_labels_do_not_depend_on_the_batching():
    for name in ("cross-entropy", "ignored tokens, dicts", "regression"):
        ops = [fisher(CASES[name].objective(size), seed=3) for size in (7, 300)]
        assert relative(ops[0].dense(), ops[1].dense()) < 1e-12
        assert not torch.allclose(fisher(CASES[name].objective(300), seed=4).dense(), ops[1].dense())


@pytest.mark.parametrize("name", ["cross-entropy", "label smoothing", "regression", "soft targets", "binary", "batchmean"])
def test_empirical_fisher_is_the_mean_outer_product_of_example_gradients(name):
    case = CASES[name]
    x, y = case.data
    rows = [Objective(case.model, case.criterion, [(x[i : i + 1], y[i : i + 1])]).gradient() for i in range(60)]
    J = torch.stack(rows)
    found = fisher(Objective(case.model, case.criterion, case.batches(60)[:1]), kind="empirical").dense()
    entries = y[:1].numel() if name in ("regression", "binary") else 1  # of an example, over which its own loss is a mean
    assert relative(found, entries * J.T @ J / 60) < 1e-12


def test_fisher_weights_classes_as_the_loss_does():
    case = CASES["class weights"]
    x, y = case.data
    weight = case.criterion.weight
    rows = torch.stack([Objective(case.model, nn.CrossEntropyLoss(), [(x[i : i + 1], y[i : i + 1])]).gradient() for i in range(N)])
    expected = (rows * weight[y][:, None]).T @ rows / weight[y].sum()
    assert relative(fisher(case.objective(50), kind="empirical").dense(), expected) < 1e-12


def test_preconditioned_and_block():
    objective = CASES["cross-entropy"].objective(50)
    op = hessian(objective)
    H = op.dense()
    scale = torch.rand(objective.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    assert relative(preconditioned(op, scale).dense(), H / scale.sqrt()[:, None] / scale.sqrt()) < 1e-12
    index = torch.cat([torch.arange(objective.size)[objective.layout[n]] for n in ("0.weight", "2.bias")])
    part = block(op, objective, ["2.bias", "0.weight"])
    assert part.size == len(index) and relative(part.dense(), H[index][:, index]) < 1e-12


def test_sums_in_single_precision_keep_double_accumulation():
    model = small_mlp().float()
    objective = Objective(model, nn.CrossEntropyLoss(), (X.float(), Y), batch_size=1)
    exact = Objective(model, nn.CrossEntropyLoss(), (X.float(), Y), dtype=torch.float64)
    v = objective.space.sample(0, 0, "normal")
    assert relative((hessian(objective) @ v).double(), hessian(exact) @ v.double()) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tiny_transformers_through_forward_with_padded_dict_batches(name):
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config).double()
    else:
        config = transformers.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8)
        model = transformers.LlamaForCausalLM(config).double()
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (9, 6), generator=g)
    mask = (torch.arange(6)[None] < torch.randint(2, 7, (9, 1), generator=g)).long()
    labels = torch.where(mask.bool(), tokens, torch.full_like(tokens, -100))

    def forward(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()

    whole = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    cut = [transformers.BatchEncoding({k: v[i : i + 4] for k, v in whole.items()}) for i in range(0, 9, 4)]
    objective = Objective(model, nn.CrossEntropyLoss(), cut, forward=forward, params=["*mlp*"])
    model.eval()
    assert objective.value() == pytest.approx(F.cross_entropy(*forward(model, whole)).item(), rel=1e-10)
    v = objective.space.sample(0, 0, "normal")

    def loss(theta):  # transformers' norms round to single precision inside, so differences are no reference; forward mode is
        parts = {n: theta[objective.layout[n]].view(s) for n, s in zip(objective.names, objective.layout.shapes, strict=True)}
        return F.cross_entropy(*forward(lambda **inputs: torch.func.functional_call(model, parts, (), inputs), whole))

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(torch.func.grad(loss), (objective.theta,), (v,))[1].detach()
    assert relative(hessian(objective) @ v, expected) < 1e-6
    assert "accuracy" in objective.metrics()


class Detached(torch.autograd.Function):
    """A square whose backward returns a saved, detached slope: right gradients, wrong second derivatives, no error."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 2 * x.detach()
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


class WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.5 * ctx.saved_tensors[0]


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 6).double(), nn.Linear(6, 3).double(), function

    def forward(self, x):
        return self.last(self.function.apply(self.first(x)))


@pytest.mark.parametrize(("function", "text"), [(Detached, "the product disagrees"), (WrongSlope, "the gradient disagrees")])
def test_preflight_refuses_a_wrong_derivative_and_names_the_function(function, text):
    objective = Objective(Custom(function), nn.CrossEntropyLoss(), (X, Y))
    with pytest.raises(PreflightFailed, match=f"{text}.*{function.__name__}"):
        hessian(objective, engine="fresh")
    assert hessian(objective, check=False).about["preflight"] == "skipped"


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.Softplus, nn.LeakyReLU])
def test_preflight_raises_no_false_alarm(activation, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    for mode in ("eval", "batch"):
        op = hessian(Objective(model, nn.CrossEntropyLoss(), (X.float(), Y), batch_size=101, mode=mode))
        assert op.about["preflight"] == "proven"


def test_preflight_says_what_it_could_not_prove():
    model = TokenModel().float()
    fixed = torch.ones(4)  # not registered: stays in single precision
    forward = lambda model, batch: ((model.embedding(batch[0]) @ torch.diag(fixed))[:, 0], batch[1][:, 0].clamp(0, 3))
    op = hessian(Objective(model, nn.CrossEntropyLoss(), [CASES["tied embeddings"].data], forward=forward, params="embedding.*"))
    assert op.about["preflight"].startswith("unverified: RuntimeError")


def test_once_differentiable_function_is_refused_although_autograd_is_silent():
    once = staticmethod(torch.autograd.function.once_differentiable(Detached.backward))
    objective = Objective(Custom(type("Once", (Detached,), {"backward": once})), nn.CrossEntropyLoss(), (X, Y))
    with pytest.raises(PreflightFailed, match=r"the product disagrees.*Once"):
        hessian(objective, engine="fresh")


def test_double_backward_that_torch_lacks_is_said_with_a_way_out():
    bag = nn.Sequential(nn.EmbeddingBag(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(NotDifferentiable, match=r"cannot differentiate this model twice.*EmbeddingBag by Embedding"):
        hessian(Objective(bag, nn.CrossEntropyLoss(), (Y[:, None].clone(), Y)), engine="retained")


def test_gauss_newton_of_a_loss_that_is_linear_in_the_outputs_warns():
    case = CASES["NLL"]
    with pytest.warns(OrographWarning, match="linear in the outputs"):
        op = ggn(case.objective(50))
    assert not op.dense().any()
    composed = Objective(nn.Sequential(*case.model[:-1]), nn.CrossEntropyLoss(weight=case.criterion.weight), case.data)
    v = op.space.sample(0, 0, "normal")
    exact = float(v @ (ggn(composed) @ v))
    draws = torch.stack([v @ (fisher(case.objective(150), seed=seed, check=False) @ v) for seed in range(60)])
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 60**0.5


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["classes", "soft"])
def test_mc_fisher_weighs_soft_and_smoothed_targets_as_the_ggn_does(kind, smoothing):
    case = CASES["cross-entropy" if kind == "classes" else "soft targets"]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=smoothing)
    objective = Objective(case.model, loss, case.batches(150))
    v = objective.space.sample(0, 0, "normal")
    exact = float(v @ (ggn(objective) @ v))
    draws = torch.stack([v @ (fisher(objective, seed=seed, check=False) @ v) for seed in range(60)])
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 60**0.5


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.HuberLoss(), nn.PoissonNLLLoss()])
def test_broadcast_targets_are_refused(loss):
    with pytest.raises(ValueError, match=r"outputs of shape \(50, 3\) and targets of shape \(50, 1\).*unsqueeze"):
        Objective(small_mlp(), loss, (X, Y[:, None].double()), batch_size=50)


def test_mc_fisher_leaves_ignored_positions_out_of_the_smoothing():
    case = CASES["cross-entropy"]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.3, ignore_index=1)
    objective = Objective(case.model, loss, case.batches(150))
    v = objective.space.sample(0, 0, "normal")
    exact = float(v @ (ggn(objective) @ v))
    draws = torch.stack([v @ (fisher(objective, seed=seed, check=False) @ v) for seed in range(60)])
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 60**0.5
