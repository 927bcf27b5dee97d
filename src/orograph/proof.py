"""Proofs at construction that the loss is one fixed function: of the model, and of passes over the data whose bytes differ."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import NotDeterministic
from .evaluation import no_gradient
from .nesting import tensors_in
from .restoring import restoring
from .state import contents_kept
from .terms import Term, Terms
from .weighting import LOW_PRECISION, evaluate

PADDING = {torch.float64: 1e-9, torch.float32: 5e-6}  # relative, on losses that differ only in padding and the order of examples


def prove_still(term: Term, buffers: Mapping[str, Tensor]) -> list[str]:
    """The same batch twice gives the same loss, or NotDeterministic names what moves.

    `buffers`: those put into the model. Returns the names of those that the forward writes to without an effect on the loss.
    """
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    with no_gradient(term.recipe):
        first, second = (float(term.loss_of(term.output()).detach()) for _ in range(2))
    moved = [name for name, tensor in buffers.items() if not torch.equal(tensor, before[name])]
    if not math.isfinite(first):
        raise ValueError(f"the loss is {first} at these weights, so nothing can be proven about it. Start from weights where it is finite.")
    if abs(first - second) <= 1e-7 * abs(first):
        return moved
    if moved:
        raise NotDeterministic(
            f"the loss changes from one evaluation to the next ({first:.7g}, then {second:.7g}): the forward pass writes to the buffer {moved[0]!r}. "
            "Make it depend on self.training, so that evaluation leaves it alone."
        )
    name = _random_module(term)
    where = f"module {name!r} draws random numbers or keeps a state" if name else "the forward pass or the loss draws random numbers or keeps a state"
    raise NotDeterministic(
        f"the loss changes from one evaluation to the next ({first:.7g}, then {second:.7g}) although dropout is off: {where}. "
        "Functional dropout needs training=self.training; other noise needs a fixed generator, or has to go."
    )


def prove_passes_agree(terms: Terms) -> None:
    """Examples whose bytes differ between passes may differ in their padding only; then the loss does not."""
    sums = []
    allowed = 0.0
    with no_gradient(terms.recipe):
        for batches in terms.batches.twice():
            total = 0.0
            for term in (Term(terms.recipe, batch, start) for start, batch in batches):
                units, loss, dtype, rounding = evaluate(term)
                total += units * loss
                allowed += units * (PADDING.get(dtype, LOW_PRECISION) * abs(loss) + rounding) / 2
            sums.append(total)
    first, second = (total / terms.total for total in sums)
    if abs(sums[0] - sums[1]) > allowed:
        raise NotDeterministic(
            f"data changes between passes: the loss is {first:.7g} over the first and {second:.7g} over the second. Random augmentation or "
            "masking is at work (in the Dataset or in collate_fn). Turn it off, or pass a list of already augmented batches."
        )


def _random_module(term: Term) -> str | None:
    """Name of the first innermost module whose output differs between two runs although its inputs are the same."""
    names = {module: name or type(module).__name__ for name, module in term.recipe.model.named_modules()}
    runs: list[list[tuple[nn.Module, list[Tensor], list[Tensor]]]] = []
    for _ in range(2):
        calls: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []
        note = lambda module, args, output, calls=calls: calls.append(  # noqa: E731
            (module, [t.detach().clone() for t in tensors_in(args)], [t.detach().clone() for t in tensors_in(output)])
        )
        with restoring(contents_kept(term.recipe.model)):  # which takes the hooks off again
            for module in names:
                module.register_forward_hook(note)
            term.loss_of(term.output())
        runs.append(calls)
    for (module, ins, outs), (_, ins2, outs2) in zip(*runs, strict=False):
        if _same(ins, ins2) and not _same(outs, outs2):
            return names[module]
    return None


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
