"""Small networks of each common kind, the same for the same seed; the global random state is left alone."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(*widths: int, seed: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """A fully connected network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(*, seed: int, channels: tuple[int, int] = (32, 64), classes: int = 10) -> nn.Sequential:
    """Two convolutions with BatchNorm, ReLU and pooling for flat 8 x 8 images (examples, 64)."""
    first, second = channels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(4 * second, classes),
        )  # fmt: skip


class Block(nn.Module):
    """One layer of a transformer: causal attention, then a two-layer network, each behind a LayerNorm and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(examples, length, width) -> the same shape."""
        parts = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (examples, heads, length, width / heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.mlp(self.norm_2(x))
        return mixed


class GPT(nn.Module):
    """A small decoder over bytes: tokens (examples, length) -> logits (examples, classes, length), as cross-entropy takes them.

    The head shares its weights with the embedding.
    """

    def __init__(self, *, width: int = 192, layers: int = 4, heads: int = 6, length: int = 64, vocabulary: int = 256, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:  # 0.02, and less where a layer adds to the residual path, as in GPT-2
                    nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if name.endswith(("out.weight", "mlp.2.weight")) else 0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(examples, length) -> (examples, vocabulary, length)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)).transpose(1, 2)
        return logits
