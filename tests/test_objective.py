"""L(theta) is what the criterion would return if the whole data set were one batch, whatever the batching."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from orograph import NotDifferentiable, Objective, fisher, ggn, hessian

from .networks import N, Pinn, loss_cases, pinn_loss, small_mlp
from .oracles import dense_hessian, relative

CASES = loss_cases()


@pytest.mark.parametrize("size", [1, 7, 300, N])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_whole_set(name, size):
    case = CASES[name]
    objective = case.objective(size)
    case.model.eval()
    expected = case.whole(case.model)
    assert objective.value() == pytest.approx(expected.item(), rel=1e-12)
    grads = torch.autograd.grad(expected, [p for p in case.model.parameters() if p.requires_grad], allow_unused=True, materialize_grads=True)
    assert relative(objective.gradient(), torch.cat([g.flatten() for g in grads])) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_hessian_is_that_of_the_whole_set_in_ragged_batches(name):
    case = CASES[name]
    objective = case.objective(47)
    expected = dense_hessian(objective, case.model, case.whole)
    assert relative(hessian(objective).dense(), expected) < 1e-10


@pytest.mark.parametrize("size", [1, 7, 300, N])
def test_pinn_hessian_is_that_of_all_collocation_points(size):
    model, t = Pinn(), torch.linspace(0, 1, N, dtype=torch.float64)[:, None]
    objective = Objective.from_batch_loss(model, pinn_loss, list(t.split(size)))
    theta = objective.theta.requires_grad_()

    def whole(theta):  # torch.func cannot go through autograd.grad inside a loss: the same residual by hand
        w1, b1, w2, b2 = (theta[objective.layout[n]].view(s) for n, s in zip(objective.names, objective.layout.shapes, strict=True))
        u = lambda t: torch.tanh(t @ w1.T + b1) @ w2.T + b2
        slope = (1 - torch.tanh(t @ w1.T + b1) ** 2) * w1.T @ w2.T
        return ((slope + u(t)) ** 2).mean() + ((u(torch.zeros(1, 1, dtype=t.dtype)) - 1) ** 2).sum()

    expected = torch.autograd.functional.hessian(whole, theta)
    assert objective.value() == pytest.approx(whole(theta).item(), rel=1e-12)
    assert relative(hessian(objective).dense(), expected) < 1e-10


@pytest.mark.parametrize("form", [nn.CrossEntropyLoss(), F.cross_entropy, partial(F.cross_entropy, label_smoothing=0.0), lambda out, t: F.cross_entropy(out, t)])
def test_criterion_as_module_function_partial_and_lambda_is_the_same_operator(form):
    case = CASES["cross-entropy"]
    expected = dense_hessian(case.objective(50), case.model, case.whole)
    assert relative(hessian(Objective(case.model, form, case.batches(50))).dense(), expected) < 1e-12


def test_shuffling_loader_gives_the_same_operator_in_eval_mode():
    case = CASES["cross-entropy"]
    loader = DataLoader(TensorDataset(*case.data), batch_size=33, shuffle=True)
    expected = hessian(case.objective(N)).dense()
    assert relative(hessian(Objective(case.model, nn.CrossEntropyLoss(), loader)).dense(), expected) < 1e-12


def test_shuffling_loader_beyond_the_cache_is_read_anew_and_still_the_same(monkeypatch):
    monkeypatch.setattr("orograph.batches.CACHE_BYTES", 100)
    case = CASES["class weights"]
    objective = Objective(case.model, case.criterion, DataLoader(TensorDataset(*case.data), batch_size=33, shuffle=True))
    before = torch.get_rng_state()
    assert relative(hessian(objective).dense(), hessian(case.objective(N)).dense()) < 1e-12
    assert torch.equal(before, torch.get_rng_state())


def test_padding_that_depends_on_the_batch_is_accepted_when_the_loss_does_not_care():
    tokens = [torch.randint(0, 7, (length,), generator=torch.Generator().manual_seed(length)) for length in range(2, 30)]

    def pad(items):
        return {"x": nn.utils.rnn.pad_sequence(items, batch_first=True), "y": nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-100)}

    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()
    forward = lambda model, batch: (model(batch["x"]).movedim(-1, 1), batch["y"])
    values = []
    for shuffle in (True, False):
        loader = DataLoader(tokens, batch_size=5, shuffle=shuffle, collate_fn=pad)
        values.append(Objective(model, nn.CrossEntropyLoss(), loader, forward=forward).value())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_batch_mode_is_the_mean_over_the_users_batches_with_their_own_statistics():
    case = CASES["BatchNorm, eval"]
    x, y = case.data
    objective = Objective(case.model, nn.CrossEntropyLoss(), case.batches(50)[:6], mode="batch")
    running = case.model[1].running_mean.clone()
    case.model.train()
    buffers = {k: v.clone() for k, v in case.model.named_buffers()}
    expected = sum(F.cross_entropy(case.model(x[i : i + 50]), y[i : i + 50]) for i in range(0, 300, 50)) / 6
    for k, v in case.model.named_buffers():
        v.copy_(buffers[k])
    assert objective.value() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(case.model[1].running_mean, running)


def test_params_by_name_glob_and_alias():
    case = CASES["tied embeddings"]
    whole = case.objective(50)
    by_alias = Objective(case.model, case.criterion, case.batches(50), params="head.weight", **case.settings)
    assert by_alias.names == ("embedding.weight",)
    block = hessian(whole).dense()[whole.layout["embedding.weight"], whole.layout["embedding.weight"]]
    assert relative(hessian(by_alias).dense(), block) < 1e-12
    mixed = Objective(case.model, case.criterion, case.batches(50), params=["mix.*"], **case.settings)
    assert mixed.names == ("mix.weight", "mix.bias")


def test_frozen_parameters_are_left_out_and_unused_ones_have_zero_rows():
    case = CASES["unused parameters"]
    H = hessian(case.objective(50)).dense()
    where = case.objective(50).layout["unused.weight"]
    assert not H[where].any() and H.any()
    case.model.used[0].weight.requires_grad_(False)
    assert "used.0.weight" not in case.objective(50).names
    case.model.used[0].weight.requires_grad_(True)


def test_sample_on_at_now_and_point():
    case = CASES["cross-entropy"]
    objective = case.objective(40)
    few = objective.sample(50, seed=1)
    assert few.examples == 50 and few.value() != objective.value()
    assert objective.sample(50, seed=1).value() == few.value()
    assert objective.sample(N, seed=0).value() == pytest.approx(objective.value(), rel=1e-12)
    assert objective.on((case.data[0][:20], case.data[1][:20])).examples == 20
    there = objective.at(objective.theta * 0)
    assert there.value() == pytest.approx(math.log(3), rel=1e-12)
    state = objective.state_dict(there.point())
    assert set(state) == set(case.model.state_dict()) and all(not v.any() for v in state.values())
    other = small_mlp(seed=9)
    assert torch.equal(objective.at(other).theta, objective.point(other.state_dict()).theta)
    with torch.no_grad():
        case.model[0].bias.add_(1.0)
    assert objective.now().value() != objective.value() == case.objective(40).at(objective).value()
    with torch.no_grad():
        case.model[0].bias.sub_(1.0)


def test_points_from_files(tmp_path):
    from safetensors.torch import save_model

    case = CASES["tied embeddings"]
    objective = case.objective(50)
    torch.save(case.model.state_dict(), tmp_path / "a.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in case.model.state_dict().items()}, "epoch": 3}, tmp_path / "b.pt")
    save_model(case.model, str(tmp_path / "c.safetensors"))  # leaves out the tied alias
    for name in ("a.pt", "b.pt", "c.safetensors"):
        assert torch.equal(objective.point(tmp_path / name).theta, objective.theta)


def test_double_precision_of_a_single_precision_model_leaves_the_model_alone():
    model = small_mlp().float()
    x, y = CASES["cross-entropy"].data
    weight = torch.tensor([0.2, 1.0, 3.0])
    objective = Objective(model, nn.CrossEntropyLoss(weight=weight), (x.float(), y), dtype=torch.float64)
    assert objective.dtype == torch.float64 and next(model.parameters()).dtype == torch.float32
    twin = small_mlp().float().double()
    assert objective.value() == pytest.approx(F.cross_entropy(twin(x.float().double()), y, weight=weight.double()).item(), rel=1e-12)
    assert objective.state_dict()["0.weight"].dtype == torch.float32


def test_half_precision_models_keep_theta_in_single_precision():
    model = small_mlp().to(torch.bfloat16)
    x, y = CASES["cross-entropy"].data
    objective = Objective(model, nn.CrossEntropyLoss(), (x.to(torch.bfloat16), y))
    assert objective.dtype == torch.float32 and hessian(objective).dtype == torch.float32


def test_metrics_and_per_example_losses_add_up():
    for name in ("cross-entropy", "class weights", "ignored tokens, dicts", "regression", "sum"):
        case = CASES[name]
        objective = case.objective(50)
        loss = objective.per_example()["loss"]
        assert loss.mean == pytest.approx(objective.value(), rel=1e-12)
    case = CASES["cross-entropy"]
    objective = Objective(case.model, case.criterion, case.batches(50), metrics={"top two": lambda out, t: (out.topk(2).indices == t[:, None]).any(1).double().mean()})
    x, y = case.data
    found = objective.metrics()
    assert found["accuracy"] == pytest.approx(float((case.model(x).argmax(1) == y).double().mean()))
    assert found["top two"] == pytest.approx(float((case.model(x).topk(2).indices == y[:, None]).any(1).double().mean()))
    assert "accuracy" not in CASES["regression"].objective(50).metrics()


def test_penalty_inside_the_criterion_is_differentiated():
    case = CASES["cross-entropy"]

    class Penalised(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, out, t):
            return F.cross_entropy(out, t) + 0.05 * sum((p**2).sum() for p in self.model.parameters())

    plain = hessian(case.objective(50)).dense()
    penalised = hessian(Objective(case.model, Penalised(case.model), case.batches(50))).dense()
    assert relative(penalised - plain, 0.1 * torch.eye(len(plain), dtype=torch.float64)) < 1e-10


def test_loss_without_the_parameters_is_refused():
    objective = Objective(small_mlp(), lambda out, t: F.cross_entropy(out.detach(), t), [CASES["cross-entropy"].data])
    with pytest.raises(NotDifferentiable, match=r"does not depend on any of the 4 selected parameters.*detach"):
        objective.gradient()
    with pytest.raises(NotDifferentiable, match="does not depend"):
        hessian(objective, check=False).dense()


def test_operators_that_need_the_output_say_so():
    objective = Objective.from_batch_loss(Pinn(), pinn_loss, [torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]])
    for build in (ggn, fisher):
        with pytest.raises(TypeError, match="forward="):
            build(objective)


class Focal(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__(reduction="none")

    def forward(self, out, t):
        each = super().forward(out, t)
        return ((1 - torch.exp(-each)) ** 2 * each).mean()


def test_subclass_of_a_torch_loss_that_averages_by_itself_is_proven_not_refused():
    case = CASES["cross-entropy"]
    assert Objective(case.model, Focal(), case.batches(50)).value() == pytest.approx(Focal()(case.model(case.data[0]), case.data[1]).item(), rel=1e-12)
    with pytest.raises(ValueError, match="not a scalar"):
        Objective(case.model, type("Each", (nn.CrossEntropyLoss,), {})(reduction="none"), case.batches(50))


@pytest.mark.parametrize("criterion", [nn.MSELoss(), lambda out, t: ((out - t) ** 2).mean(), nn.MSELoss(reduction="sum")])
def test_a_perfect_fit_in_single_precision_is_within_rounding(criterion):
    for seed in range(5):
        model = small_mlp(100, 50, 1, seed=seed).float()
        x = torch.randn(64, 100, generator=torch.Generator().manual_seed(seed))
        assert Objective(model, criterion, [(part, model(part).detach()) for part in x.split(40)]).value() < 1e-9


def test_dropout_in_the_criterion_is_off():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, out, t):
            return F.cross_entropy(self.drop(out), t)

    case, criterion = CASES["cross-entropy"], Dropping()
    assert Objective(case.model, criterion, case.batches(50)).value() == pytest.approx(case.objective(50).value(), rel=1e-12)
    assert criterion.training and criterion.drop.training


def test_value_of_a_padded_encoder_is_that_of_the_function_that_is_differentiated():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).double().eval()
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(9, 6, 8, generator=g, dtype=torch.float64), torch.arange(6)[None] >= torch.randint(2, 7, (9, 1), generator=g)
    mask[0] = False
    forward = lambda m, b: (m(b["x"], src_key_padding_mask=b["mask"]), b["x"] * 0)
    objective = Objective(model, nn.MSELoss(), [{"x": x, "mask": mask}], forward=forward)
    with_gradients = F.mse_loss(model(x, src_key_padding_mask=mask), x * 0).item()
    assert objective.value() == pytest.approx(with_gradients, rel=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()
