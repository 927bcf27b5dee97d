"""Networks of every common kind, for permutations of their units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from orograph import Objective
from orograph.studies.networks import GPT, cnn, mlp


class ResNet(nn.Module):
    """Two residual stages on 8 x 8 images, the second with a projected shortcut."""

    def __init__(self, norm, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), norm(width)
        self.blocks = nn.ModuleList()
        for stride, before, after in ((1, width, width), (2, width, 2 * width)):
            shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride), norm(after)) if before != after else nn.Identity()
            layers = {"conv_1": nn.Conv2d(before, after, 3, padding=1, stride=stride), "norm_1": norm(after), "conv_2": nn.Conv2d(after, after, 3, padding=1), "norm_2": norm(after)}
            self.blocks.append(nn.ModuleDict(layers | {"shortcut": shortcut}))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x.view(-1, 1, 8, 8))))
        for block in self.blocks:
            inner = torch.relu(block["norm_1"](block["conv_1"](x)))
            x = torch.relu(block["shortcut"](x) + block["norm_2"](block["conv_2"](inner)))
        return self.head(x.mean((2, 3)))


def vgg() -> nn.Sequential:
    """Plain convolutions with pooling, two linear layers on top."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 10),
    )  # fmt: skip


def depthwise() -> nn.Sequential:
    """Depthwise and grouped convolutions."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


class Separable(nn.Module):
    """Inverted bottlenecks with BatchNorm, as in MobileNetV2: expand, depthwise, project, add."""

    def __init__(self, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU6())
        wide = 2 * width
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, wide, 1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(),
                nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(),
                nn.Conv2d(wide, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(-1, 1, 8, 8))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent network over the rows of an 8 x 8 image, read at its last step."""

    def __init__(self, layers: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.view(-1, 8, 8))[0][:, -1])


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(60, 64, generator=g), torch.randint(0, 10, (60,), generator=g)


def _classifier(model: nn.Module) -> Objective:
    x, y = images()
    model.train()
    for part in x.split(20):
        model(part)
    return Objective(model.eval(), nn.CrossEntropyLoss(), (x, y))


def _language(model: nn.Module, **given: Any) -> Objective:
    """Next tokens of random text."""
    tokens = torch.randint(1, 31, (20, 12), generator=torch.Generator().manual_seed(1))

    def forward(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        more = dict.fromkeys(given, batch["ids"])
        return net(batch["ids"], **more).logits.movedim(-1, 1), batch["ids"]

    return Objective(model.eval(), nn.CrossEntropyLoss(), [{"ids": tokens}], forward=forward)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (8, 8)), layer, nn.Flatten(), nn.Linear(64, 10))


def _gpt() -> Objective:
    tokens = torch.randint(1, 31, (20, 12), generator=torch.Generator().manual_seed(1))
    model = GPT(width=48, layers=2, heads=3, length=12, vocabulary=31, seed=int(torch.randint(0, 10**6, ())))
    return Objective(model, nn.CrossEntropyLoss(), (tokens, tokens))


def _vit() -> Objective:
    config = hf.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=8,
        patch_size=4, num_channels=1, num_labels=10,
    )  # fmt: skip
    x, y = images()
    model = hf.ViTForImageClassification(config).eval()
    return Objective(
        model,
        nn.CrossEntropyLoss(),
        (x.view(-1, 1, 8, 8), y),
        forward=lambda net, batch: (net(batch[0]).logits, batch[1]),
    )


SIZES = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MAKERS: dict[str, Callable[[], Objective]] = {
    "MLP": lambda: _classifier(mlp(64, 20, 16, 10, seed=int(torch.randint(0, 10**6, ())), activation=nn.ReLU)),
    "VGG": lambda: _classifier(vgg()),
    "CNN, BatchNorm": lambda: _classifier(cnn(seed=int(torch.randint(0, 10**6, ())), channels=(8, 12))),
    "ResNet, BatchNorm": lambda: _classifier(ResNet(nn.BatchNorm2d)),
    "ResNet, GroupNorm": lambda: _classifier(ResNet(lambda c: nn.GroupNorm(4, c))),
    "depthwise CNN": lambda: _classifier(depthwise()),
    "depthwise CNN, BatchNorm": lambda: _classifier(Separable()),
    "encoder layer": lambda: _classifier(_encoder()),
    "GPT": _gpt,
    "Llama": lambda: _language(
        hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, max_position_embeddings=16, **WIDTHS, **SIZES))
    ),
    "GPT-2": lambda: _language(hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, **SIZES))),
    "BERT": lambda: _language(hf.BertForMaskedLM(hf.BertConfig(max_position_embeddings=16, **WIDTHS, **SIZES))),
    "ViT": _vit,
    "T5": lambda: _language(
        hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **SIZES)
        ),
        decoder_input_ids=True,
    ),
    "LSTM": lambda: _classifier(Recurrent(nn.LSTM(8, 12, num_layers=2, batch_first=True), 12)),
    "GRU": lambda: _classifier(Recurrent(nn.GRU(8, 12, batch_first=True, bidirectional=True), 24)),
    "RNN": lambda: _classifier(Recurrent(nn.RNN(8, 12, num_layers=2, batch_first=True), 12)),
    "mixture of experts": lambda: _language(
        hf.MixtralForCausalLM(
            hf.MixtralConfig(
                num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=16,
                experts_implementation="eager",
                **WIDTHS, **SIZES,
            )
        )
    ),
}  # fmt: skip


def symmetric_objective(name: str, seed: int = 0) -> Objective:
    """A network of that kind with random weights; its running statistics have seen data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MAKERS[name]()


def symmetric_objectives() -> dict[str, Objective]:
    """One objective for each kind."""
    return {name: symmetric_objective(name) for name in MAKERS}
