"""Models whose copy, keys or tensors hang together in uncommon ways: measured rightly, and left exactly as they were."""

from __future__ import annotations

import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orograph import Objective, hessian

CE = nn.CrossEntropyLoss()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.prepare()

    def prepare(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class CopyIsItself(Net):
    def __deepcopy__(self, memo: dict[int, Any]) -> CopyIsItself:
        return self


class SharedLayer(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> SharedLayer:
        return self


class LayerIsShared(Net):
    def prepare(self) -> None:
        self.a = SharedLayer(4, 5)


class KeyedByWeights(Net):
    def prepare(self) -> None:
        self.scales = {self.a.weight: 2.0, self.b.weight: 3.0}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales.get(self.b.weight, 1.0)


class KeyedByIds(Net):
    def prepare(self) -> None:
        self.scales = {id(self.a.weight): 2.0, id(self.b.weight): 3.0}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales.get(id(self.b.weight), 1.0)


class MarkedWeight(Net):
    def prepare(self) -> None:
        self.a.weight.scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self.a.weight, "scale", 1.0)


class WritesTensors(Net):
    def prepare(self) -> None:
        self.seen, self.array = [torch.ones(3)], np.ones(3)
        self.part = self.seen[0][1:]

    def forward(self, x: Tensor) -> Tensor:
        self.part.mul_(0.5)
        self.array *= 0.5
        return super().forward(x)


class BoundForward(Net):
    def prepare(self) -> None:
        self.a.forward = types.MethodType(lambda layer, x: F.linear(x, 2 * layer.weight, layer.bias), self.a)


CASES = [CopyIsItself, LayerIsShared, KeyedByWeights, KeyedByIds, MarkedWeight, WritesTensors, BoundForward]


def built(kind: type[Net]) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().double()


@pytest.mark.parametrize("kind", CASES)
def test_uncommon_models_are_measured_rightly_and_left_as_they_were(kind):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (8,), generator=generator)
    # `double` replaces no Parameter object, so that keys and marks stay valid
    model, plain = built(kind), built(kind)
    ids = [id(tensor) for tensor in model.parameters()]
    weights = [tensor.detach().clone() for tensor in model.parameters()]
    keys = list(getattr(model, "scales", ()))
    objective = Objective(model, CE, (x, y))
    parameters = list(plain.parameters())
    vector = torch.randn(objective.size, generator=generator, dtype=torch.float64)
    product = hessian(objective) @ vector
    assert [id(tensor) for tensor in model.parameters()] == ids
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(now is before for now, before in zip(getattr(model, "scales", ()), keys, strict=True))
    assert all(bool((tensor == 1).all()) for tensor in getattr(model, "seen", ()))
    assert getattr(model, "array", np.ones(3)).tolist() == [1, 1, 1]
    loss = CE(plain(x), y)
    assert objective.value() == pytest.approx(loss.item(), rel=1e-12)
    gradient = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters, create_graph=True)])
    expected = torch.cat([part.reshape(-1) for part in torch.autograd.grad(gradient @ vector, parameters)])
    assert torch.allclose(product, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["torch", "numpy", "numpy, old", "python"])
def test_random_generators_that_a_model_holds_are_where_they_were(kind):
    generator = {
        "torch": lambda: torch.Generator().manual_seed(1),
        "numpy": lambda: np.random.default_rng(1),
        "numpy, old": lambda: np.random.RandomState(1),
        "python": lambda: random.Random(1),
    }[kind]()
    state = {
        "torch": lambda: generator.get_state().tolist(),
        "numpy": lambda: str(generator.bit_generator.state),
        "numpy, old": lambda: str(generator.get_state()),
        "python": lambda: generator.getstate(),
    }[kind]

    class Drawing(Net):
        def prepare(self):
            self.generator = generator

        def forward(self, x):
            if kind == "torch":
                torch.rand((), generator=self.generator)
            elif kind == "numpy, old":
                self.generator.random_sample()
            else:
                self.generator.random()
            return super().forward(x)

    net = Drawing()
    before = state()
    Objective(net, CE, (torch.randn(6, 4), torch.randint(0, 3, (6,)))).value()
    assert state() == before
