r"""Hessian products block by block, for models that are a sequence of blocks: memory holds one block's second-order graph at a time.

With $x_{i+1} = f_i(x_i, \theta)$ and $L = \ell(x_m)$, forward: $\dot x_{i+1} = J_i (\dot x_i, v)$. Backward from $g = \nabla \ell$ and
$\dot g = \nabla^2 \ell\, \dot x_m$: each block adds $\partial_\theta$ of, and passes on $\partial_x$ of,

$$\nabla^2 (g^\top f_i)\,(\dot x_i, v) + J_i^\top \dot g,$$

the derivative of its own backward. All by reverse mode, whose coverage is the widest: about 5 gradients per product, and no more
memory than the blocks' inputs, their tangents and one block's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import in_full
from ..nesting import tensors_in
from ..objective import Objective
from ..restoring import forward_set, restoring
from ..terms import Term
from .sweeps import Parts, TermMap, differentiable_twice, first_derivatives

Stage = Callable[[Tensor | None], Tensor]  # x_i -> x_(i+1); the first stage takes None, the last gives the loss


class _Stop(BaseException):
    def __init__(self, value: Tensor) -> None:
        self.value = value


@dataclass(frozen=True)
class Chain:
    """Modules that the model runs one after another, each on the output of the one before."""

    blocks: tuple[nn.Module, ...]


@dataclass
class _Call:
    """What one run of a block was given beside its first argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_chain(objective: Objective) -> Chain | None:
    """The longest run of blocks in a Sequential or ModuleList of the model that are a chain, tried on one example; None if there is none."""
    model = objective.recipe.model
    if objective.recipe.batch_loss is not None:
        return None
    found: list[tuple[nn.Module, ...]] = []
    for container in model.modules():
        blocks = tuple(container.children()) if isinstance(container, (nn.Sequential, nn.ModuleList)) else ()
        if len(blocks) > 1 and len(set(map(id, blocks))) == len(blocks):
            found.append(blocks)
    with objective.applied():
        term = next(iter(objective.terms()))
        good = [blocks for blocks in found if _is_chain(blocks, term)]
    return Chain(max(good, key=lambda blocks: sum(p.numel() for block in blocks for p in block.parameters()))) if good else None


def _is_chain(blocks: tuple[nn.Module, ...], term: Term) -> bool:
    """Every block runs once, in order, on exactly what the one before returned, and nothing else that it is given depends on theta."""
    seen: list[tuple[int, Any, Any, bool]] = []  # (block, input, output, other inputs need gradients)

    def note(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Any = None, *args: Any, **kwargs: Any) -> Any:
            result = original(x, *args, **kwargs)
            others = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
            seen.append((index, x, result, bool(others)))
            return result

        return forward

    with _forwards({block: note(index, block.forward) for index, block in enumerate(blocks)}):
        output = term.output()
        loss = term.loss_of(output)
    tensors = all(isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point() for _, x, y, _ in seen)
    linked = all(after[1] is before[2] for before, after in pairwise(seen))
    return loss.requires_grad and [entry[0] for entry in seen] == list(range(len(blocks))) and tensors and linked and not any(entry[3] for entry in seen)


def _forwards(replacements: dict[nn.Module, Callable[..., Any]]) -> restoring:
    """Modules run other functions for a while."""
    return restoring(*(partial(forward_set, module, function) for module, function in replacements.items()))


def blockwise_of(chain: Chain) -> Callable[[Objective, Term], TermMap | None]:
    """The Hessian of one term's loss, computed anew for every column."""

    def build(objective: Objective, term: Term) -> TermMap | None:
        stages = list(_stages(chain, term))

        def apply(column: Tensor, again: bool) -> Parts:
            return _product(stages, objective.leaves, objective.layout.split(column))

        return apply

    return build


def _stages(chain: Chain, term: Term) -> Iterator[Stage]:
    """What comes before the blocks, each block, and what comes after with the loss. A first run notes what the blocks are given."""
    calls: dict[int, _Call] = {}

    def first(_: Tensor | None) -> Tensor:
        def stop(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise _Stop(x)

        try:
            with _forwards({chain.blocks[0]: stop}):
                term.output()
        except _Stop as stopped:
            return stopped.value
        raise RuntimeError("the model did not run its first block again")

    def run(index: int) -> Stage:
        def stage(x: Tensor | None) -> Tensor:
            output: Tensor = chain.blocks[index].forward(x, *calls[index].args, **calls[index].kwargs)
            if term.watch is not None:
                term.watch(output)
            return output

        return stage

    def last(x: Tensor | None) -> Tensor:
        with _forwards({block: (lambda given, *args, **kwargs: given) for block in chain.blocks[:-1]} | {chain.blocks[-1]: lambda given, *args, **kwargs: x}):
            return term.loss_of(term.output())

    def note(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[index] = _Call(args, kwargs)
            return original(x, *args, **kwargs)

        return forward

    with torch.no_grad(), _forwards({block: note(index, block.forward) for index, block in enumerate(chain.blocks)}):
        term.output()
    yield first
    for index in range(len(chain.blocks)):
        yield run(index)
    yield last


def _product(stages: list[Stage], leaves: list[Tensor], direction: list[Tensor]) -> Parts:
    """H v of one term, as a list of parts per leaf."""
    inputs: list[tuple[Tensor | None, Tensor | None]] = []  # (x_i, its tangent)
    x: Tensor | None = None
    tangent: Tensor | None = None
    for stage in stages[:-1]:
        inputs.append((x, tangent))
        x, tangent = _push(stage, x, tangent, leaves, direction)
    inputs.append((x, tangent))
    totals: list[Tensor | None] = [None] * len(leaves)
    cotangent: Tensor | None = None
    turned: Tensor | None = None  # tangent of the cotangent
    for stage, (x, tangent) in zip(reversed(stages), reversed(inputs), strict=True):
        cotangent, turned, parts = _pull(stage, x, tangent, cotangent, turned, leaves, direction)
        for index, part in enumerate(parts):
            total = totals[index]
            totals[index] = part if total is None else total if part is None else total + part
    return totals


def _variables(x: Tensor | None, tangent: Tensor | None, leaves: list[Tensor], direction: list[Tensor]) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """(the stage's own input as a variable, all that it depends on, their tangents)."""
    if x is None:
        return None, leaves, [part.to(leaf.dtype) for part, leaf in zip(direction, leaves, strict=True)]
    own = x.detach().requires_grad_()
    tangent = torch.zeros_like(own) if tangent is None else tangent
    return own, [own, *leaves], [tangent, *(part.to(leaf.dtype) for part, leaf in zip(direction, leaves, strict=True))]


def _push(stage: Stage, x: Tensor | None, tangent: Tensor | None, leaves: list[Tensor], direction: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(x_(i+1), its tangent), by differentiating u -> J'u."""
    own, variables, tangents = _variables(x, tangent, leaves, direction)
    output = stage(own)
    if not output.requires_grad:
        return output.detach(), torch.zeros_like(output)
    cotangent = torch.zeros_like(output, requires_grad=True)
    with differentiable_twice():
        pulled = first_derivatives(output, variables, cotangent)
        used = [i for i, part in enumerate(pulled) if part is not None and part.requires_grad]
        (pushed,) = torch.autograd.grad([pulled[i] for i in used], cotangent, [tangents[i] for i in used]) if used else (torch.zeros_like(output),)
    return output.detach(), pushed.detach()


def _pull(
    stage: Stage, x: Tensor | None, tangent: Tensor | None, cotangent: Tensor | None, turned: Tensor | None, leaves: list[Tensor], direction: list[Tensor]
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """(cotangent of x_i, its tangent, what the stage adds per leaf)."""
    own, variables, tangents = _variables(x, tangent, leaves, direction)
    output = stage(own)
    count = len(variables) - len(leaves)
    if not output.requires_grad:
        return None, None, [None] * len(leaves)
    given = torch.ones_like(output) if cotangent is None else cotangent
    with differentiable_twice():
        gradient = first_derivatives(output, variables, given)
        curved = [i for i, part in enumerate(gradient) if part is not None and part.requires_grad]
        bent: Parts = [None] * len(variables)
        if curved:
            bent = torch.autograd.grad([gradient[i] for i in curved], variables, [tangents[i] for i in curved], retain_graph=turned is not None, allow_unused=True)
        straight: Parts = [None] * len(variables)
        if turned is not None:
            straight = torch.autograd.grad(output, variables, turned, allow_unused=True)
    both = [a if b is None else b if a is None else in_full(a) + in_full(b) for a, b in zip(bent, straight, strict=True)]
    if not count:
        return None, None, both
    back = gradient[0].detach() if gradient[0] is not None else torch.zeros_like(variables[0])
    return back, both[0] if both[0] is not None else torch.zeros_like(back), both[1:]
