"""Every `torch.nn` module class in a network that can be trained: constructor and inputs for each, or the reason why there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

EXAMPLES, WIDTH = 6, 4
NO_NETWORK = {
    "Module": "the base class", "Container": "deprecated base class", "ModuleDict": "holds modules and runs none", "ModuleList": "holds modules and runs none",
    "ParameterDict": "holds parameters and runs nothing", "ParameterList": "holds parameters and runs nothing", "Sequential": "is around every case", "RNNBase": "abstract",
    "RNNCellBase": "abstract", "DataParallel": "unwrapped before it is measured",
}  # fmt: skip
NOT_ALONE = {"FractionalMaxPool2d": "draws its regions at random in eval mode too", "FractionalMaxPool3d": "draws its regions at random in eval mode too"}


@dataclass(frozen=True)
class Kind:
    """How to make a module, what it takes, and how to call it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one example
    run: Callable[[nn.Module, Tensor], Any] = lambda module, x: module(x)
    whole: bool = False  # the inputs are whole numbers
    refused: str = ""  # part of the error with which an objective is refused


class Net(nn.Module):
    """A scale for every input, the module, and a linear layer on what it gives."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.inner, self.kind = kind.make(), kind
        if not kind.whole:
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, kind.shape[-1]))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner.eval()
            width = self._flat(inputs(kind)).shape[1]
            self.inner.train()
        self.last = nn.Linear(width, 2)

    def _flat(self, x: Tensor) -> Tensor:
        found = self.kind.run(self.inner, x if self.kind.whole else x * self.scale)
        while not isinstance(found, Tensor):
            found = found[0]
        return found.reshape(len(found), -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self._flat(x)))


def inputs(kind: Kind) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind.whole:
        return torch.randint(0, 5, (EXAMPLES, *kind.shape), generator=generator)
    return torch.randn(EXAMPLES, *kind.shape, generator=generator)


def targets() -> Tensor:
    return torch.randint(0, 2, (EXAMPLES,), generator=torch.Generator().manual_seed(2))


def _plain() -> dict[str, Kind]:
    """Modules that take one tensor, and whose constructor needs little."""
    line, image, volume = (2, 6), (2, 6, 6), (2, 4, 4, 4)
    no_arguments = "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink AlphaDropout Dropout FeatureAlphaDropout Flatten"
    found = {name: Kind(getattr(nn, name), (WIDTH,)) for name in no_arguments.split()}
    found |= {name: Kind(partial(getattr(nn, name), dim=1), (WIDTH,)) for name in ("LogSoftmax", "Softmax", "Softmin")}
    found |= {"Threshold": Kind(lambda: nn.Threshold(0.1, 0.0), (WIDTH,)), "Softmax2d": Kind(nn.Softmax2d, image), "CrossMapLRN2d": Kind(lambda: nn.CrossMapLRN2d(2), image)}
    found |= {"Linear": Kind(lambda: nn.Linear(WIDTH, 3), (WIDTH,)), "LazyLinear": Kind(lambda: nn.LazyLinear(3), (WIDTH,)), "LayerNorm": Kind(lambda: nn.LayerNorm(WIDTH), (WIDTH,)), "RMSNorm": Kind(lambda: nn.RMSNorm(WIDTH), (WIDTH,))}
    found |= {"GroupNorm": Kind(lambda: nn.GroupNorm(1, 2), line), "LocalResponseNorm": Kind(lambda: nn.LocalResponseNorm(2), line), "ChannelShuffle": Kind(lambda: nn.ChannelShuffle(2), image)}
    found |= {"PixelShuffle": Kind(lambda: nn.PixelShuffle(2), (4, 2, 2)), "PixelUnshuffle": Kind(lambda: nn.PixelUnshuffle(2), image), "Unflatten": Kind(lambda: nn.Unflatten(1, (2, 2)), (WIDTH,))}
    found |= {"Fold": Kind(lambda: nn.Fold((3, 3), 2), (8, 4)), "Unfold": Kind(lambda: nn.Unfold(2), image)}
    found |= {"Upsample": Kind(lambda: nn.Upsample(scale_factor=2), line), "UpsamplingBilinear2d": Kind(lambda: nn.UpsamplingBilinear2d(scale_factor=2), image), "UpsamplingNearest2d": Kind(lambda: nn.UpsamplingNearest2d(scale_factor=2), image)}
    for d, shape in enumerate((line, image, volume), start=1):
        for name in ("BatchNorm", "InstanceNorm"):
            found[f"{name}{d}d"] = Kind(partial(getattr(nn, f"{name}{d}d"), 2, affine=True, track_running_stats=True), shape)
            found[f"Lazy{name}{d}d"] = Kind(partial(getattr(nn, f"Lazy{name}{d}d"), affine=True, track_running_stats=True), shape)
        for name in ("Conv", "ConvTranspose"):
            found[f"{name}{d}d"] = Kind(partial(getattr(nn, f"{name}{d}d"), 2, 2, 2), shape)
            found[f"Lazy{name}{d}d"] = Kind(partial(getattr(nn, f"Lazy{name}{d}d"), 2, 2), shape)
        found[f"Dropout{d}d"] = Kind(getattr(nn, f"Dropout{d}d"), shape)
        found |= {f"{name}{d}d": Kind(partial(getattr(nn, f"{name}{d}d"), 2), shape) for name in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")}
        found[f"LPPool{d}d"] = Kind(partial(getattr(nn, f"LPPool{d}d"), 3, 2), shape, lambda module, x: module(x.abs() + 0.1))
        found |= {f"{name}{d}d": Kind(partial(getattr(nn, f"{name}{d}d"), 1), shape) for name in ("CircularPad", "ReflectionPad", "ReplicationPad", "ZeroPad")}
        found[f"ConstantPad{d}d"] = Kind(partial(getattr(nn, f"ConstantPad{d}d"), 1, 0.5), shape)
        found[f"MaxUnpool{d}d"] = Kind(partial(getattr(nn, f"MaxUnpool{d}d"), 2), shape, _unpooled(f"max_pool{d}d"))
    return found


def _unpooled(name: str) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda module, x: module(*getattr(nn.functional, name)(x, 2, return_indices=True))


def _recurrent() -> dict[str, Kind]:
    found = {}
    for name in ("LSTM", "GRU", "RNN"):
        options = {"": {}, ", two layers": {"num_layers": 2}, ", both ways": {"bidirectional": True}, ", dropout, no bias": {"num_layers": 2, "dropout": 0.5, "bias": False}}
        for text, settings in (options | ({", projected": {"proj_size": 2}} if name == "LSTM" else {})).items():
            found[name + text] = Kind(partial(getattr(nn, name), WIDTH, 3, batch_first=True, **settings), (3, WIDTH))
        found[f"{name}Cell"] = Kind(partial(getattr(nn, f"{name}Cell"), WIDTH, 3), (WIDTH,))
    return found


def _attentive() -> dict[str, Kind]:
    small = {"d_model": WIDTH, "nhead": 2, "dim_feedforward": 5, "batch_first": True}
    layer = lambda: nn.TransformerEncoderLayer(**small)
    decoder = lambda: nn.TransformerDecoderLayer(**small)
    twice = lambda module, x: module(x, x * 0.5)
    return {
        "MultiheadAttention": Kind(lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), (3, WIDTH), lambda module, x: module(x, x, x)),
        "TransformerEncoderLayer": Kind(layer, (3, WIDTH)), "TransformerDecoderLayer": Kind(decoder, (3, WIDTH), twice),
        "TransformerEncoder": Kind(lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False), (3, WIDTH)),
        "TransformerDecoder": Kind(lambda: nn.TransformerDecoder(decoder(), 1), (3, WIDTH), twice),
        "Transformer": Kind(lambda: nn.Transformer(WIDTH, 2, 1, 1, 5, batch_first=True), (3, WIDTH), twice),
    }  # fmt: skip


def _embedded() -> dict[str, Kind]:
    return {
        "Embedding": Kind(lambda: nn.Embedding(5, 3), (3,), whole=True), "EmbeddingBag": Kind(lambda: nn.EmbeddingBag(5, 3), (3,), whole=True),
        "Embedding, padded": Kind(lambda: nn.Embedding(5, 3, padding_idx=0), (3,), whole=True),
        "Embedding, max_norm": Kind(lambda: nn.Embedding(5, 3, max_norm=0.1), (3,), whole=True, refused="writes to the parameter"),
        "EmbeddingBag, max_norm": Kind(lambda: nn.EmbeddingBag(5, 3, max_norm=0.1), (3,), whole=True, refused="writes to the parameter"),
    }  # fmt: skip


def _reparametrised() -> dict[str, Kind]:
    """Weights that are computed from others, in every way that torch has."""
    linear = lambda: nn.Linear(WIDTH, WIDTH)
    ways = {
        "weight norm": parametrizations.weight_norm, "spectral norm": parametrizations.spectral_norm, "orthogonal": parametrizations.orthogonal,
        "old weight norm": nn.utils.weight_norm, "old spectral norm": nn.utils.spectral_norm, "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    }  # fmt: skip
    return {name: Kind(lambda way=way: _quietly(lambda: way(linear())), (WIDTH,)) for name, way in ways.items()}


def _quietly(make: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def _of_several_inputs() -> dict[str, Kind]:
    class_of_each = lambda module, x: module(x, torch.arange(len(x)) % 5).output[:, None]
    return {
        "Bilinear": Kind(lambda: nn.Bilinear(WIDTH, WIDTH, 3), (WIDTH,), lambda module, x: module(x, x * x)),
        "AdaptiveLogSoftmaxWithLoss": Kind(lambda: nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 5, [2]), (WIDTH,), class_of_each),
        "CosineSimilarity": Kind(nn.CosineSimilarity, (WIDTH,), lambda module, x: module(x, x * x)[:, None]),
        "PairwiseDistance": Kind(nn.PairwiseDistance, (WIDTH,), lambda module, x: module(x, x * x)[:, None]),
        "SyncBatchNorm": Kind(lambda: nn.SyncBatchNorm(2).eval(), (2, 3)),
    }


KINDS = _plain() | _recurrent() | _attentive() | _embedded() | _reparametrised() | _of_several_inputs()


LOSSES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {  # module, outputs (examples, 2), classes
    **dict.fromkeys(("CrossEntropyLoss", "MultiMarginLoss"), lambda loss, o, t: loss(o, t)),
    **dict.fromkeys(("NLLLoss",), lambda loss, o, t: loss(o.log_softmax(1), t)),
    "NLLLoss2d": lambda loss, o, t: loss(o.log_softmax(1)[:, :, None, None], t[:, None, None]),
    **dict.fromkeys(("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "PoissonNLLLoss", "BCEWithLogitsLoss", "MultiLabelSoftMarginLoss"), lambda loss, o, t: loss(o, _hot(t, o))),
    **dict.fromkeys(("SoftMarginLoss", "HingeEmbeddingLoss"), lambda loss, o, t: loss(o, 2 * _hot(t, o) - 1)),
    "BCELoss": lambda loss, o, t: loss(o.sigmoid(), _hot(t, o)),
    "KLDivLoss": lambda loss, o, t: loss(o.log_softmax(1), _hot(t, o)),
    "GaussianNLLLoss": lambda loss, o, t: loss(o[:, 0], t.to(o), o[:, 1].exp()),
    "MultiLabelMarginLoss": lambda loss, o, t: loss(o, torch.stack([t, -torch.ones_like(t)], dim=1)),
    **dict.fromkeys(("CosineEmbeddingLoss",), lambda loss, o, t: loss(o, o * o, 2 * t.to(o) - 1)),
    "MarginRankingLoss": lambda loss, o, t: loss(o[:, 0], o[:, 1], 2 * t.to(o) - 1),
    **dict.fromkeys(("TripletMarginLoss", "TripletMarginWithDistanceLoss"), lambda loss, o, t: loss(o, o * o, o + 1 + t[:, None])),
    "CTCLoss": lambda loss, o, t: loss(o.log_softmax(1)[None].expand(3, -1, -1), torch.ones(len(o), 1, dtype=torch.long), torch.full((len(o),), 3), torch.ones(len(o), dtype=torch.long)),
    "LinearCrossEntropyLoss": lambda loss, o, t: loss(o, t),
}  # fmt: skip
MAKE_LOSS = {"LinearCrossEntropyLoss": lambda: nn.LinearCrossEntropyLoss(2, 2)}


def _hot(classes: Tensor, outputs: Tensor) -> Tensor:
    return nn.functional.one_hot(classes, 2).to(outputs)


class StatefulLoss(nn.Module):
    """One of torch's losses, in a module that counts its calls and keeps what it saw."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.inner = name, MAKE_LOSS.get(name, getattr(nn, name))()
        self.calls, self.history = 0, []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(output)
        self.seen += len(output)
        return LOSSES[self.name](self.inner, output, target)


def network(name: str) -> Net:
    """A network with one of the modules, the same for every call, trained for one step so that lazy modules are there and running statistics are not trivial."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return Net(KINDS[name])
