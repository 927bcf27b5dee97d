"""Products of real transformers against another mode of autodiff and against differences."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp

from orograph import Objective, hessian

from .oracles import relative

TOKENS = torch.randint(0, 31, (6, 8), generator=torch.Generator().manual_seed(0))
X = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(2))
CE = nn.CrossEntropyLoss()


def language_model(name, attention):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "GPT-2":
        config = transformers.GPT2Config(vocab_size=31, n_positions=8, n_embd=16, n_layer=2, n_head=2, attn_implementation=attention)
        return transformers.GPT2LMHeadModel(config).double().eval()
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, attn_implementation=attention
    )
    return transformers.LlamaForCausalLM(config).double().eval()


class Attended(nn.Module):
    def __init__(self, weights):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last, self.weights = nn.MultiheadAttention(8, 2, batch_first=True).double(), nn.Linear(8, 3).double(), weights

    def forward(self, x):
        return self.last(self.inner(x, x, x, need_weights=self.weights)[0].mean(1))


class Encoded(nn.Module):
    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=first).double()
        self.last = nn.Linear(8, 3).double()

    def forward(self, x):
        return self.last(self.inner(x).mean(1))


def next_token(model, batch):
    return model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()


CASES = {
    **{f"{name}, {attention}": (lambda n=name, a=attention: language_model(n, a), True) for name in ("GPT-2", "Llama") for attention in ("sdpa", "eager")},
    "MultiheadAttention": (lambda: Attended(False), False), "MultiheadAttention with its weights": (lambda: Attended(True), False),
    "TransformerEncoderLayer": (lambda: Encoded(False), False), "TransformerEncoderLayer, norm first": (lambda: Encoded(True), False),
}  # fmt: skip


def errors(name):
    """(against forward-over-reverse, against differences) of two products in float64."""
    make, text = CASES[name]
    model = make()
    objective = Objective(model, CE, [TOKENS[:4], TOKENS[4:]], forward=next_token) if text else Objective(model, CE, (X, Y), batch_size=4)
    op = hessian(objective)
    assert op.about["preflight"] == "proven" and op.about["engine"] == "retained"

    def loss(flat):
        parts = {key: flat[objective.layout[key]].view(shape) for key, shape in zip(objective.names, objective.layout.shapes, strict=True)}
        call = lambda *args, **kwargs: functional_call(objective.recipe.model, parts, args, kwargs)
        if text:
            output, target = next_token(call, TOKENS)
            return CE(output, target)
        return CE(call(X), Y)

    forward = differences = 0.0
    for index in range(2):
        v = objective.space.sample(0, index, "normal")
        product = op @ v
        with objective.applied():
            other = jvp(grad(loss), (objective.theta,), (v,))[1]
        step = 1e-4 / float(v.norm()) * float(objective.theta.norm())
        slope = (objective.at(objective.theta + step * v).gradient() - objective.at(objective.theta - step * v).gradient()) / (2 * step)
        forward, differences = max(forward, relative(product, other)), max(differences, relative(product, slope))
    return forward, differences


@pytest.mark.parametrize("name", CASES)
def test_transformers_are_right(name):
    forward, differences = errors(name)
    assert forward < 1e-6 and differences < 1e-4
