"""From data and a recipe to the weighted terms of a loss, with the proofs that it stands still and that batches add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batches import Batches, read_batches
from .cutting import prove_weighting
from .errors import NotDeterministic
from .proof import prove_passes_agree, prove_still
from .restoring import under
from .snapshots import Snapshot
from .surroundings import normal_tensors
from .terms import Recipe, Term, Terms, weigh


@under(normal_tensors)
def read_data(snapshot: Snapshot, recipe: Recipe, data: Any, batch_size: int | None) -> Batches:
    """The batches of `data`, where the snapshot's tensors are and in their precision."""
    opaque, whole = recipe.batch_loss is not None, snapshot.mode == "batch"
    device, dtype = snapshot.point.theta.device, snapshot.dtype

    def prepare(tensor: Tensor) -> Tensor:
        if opaque:
            return tensor
        moved = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        return moved.clone() if moved.is_inference() else moved

    ready = opaque or (recipe.forward is not None and isinstance(data, list))  # a list of batches, even if it is two tensors
    batches = read_batches(data, batch_size=batch_size, prepare=prepare, whole=whole, opaque=ready)
    if whole and min(batches.reading.sizes) < 2:
        raise ValueError('mode="batch" needs batches of at least 2 examples: BatchNorm has no statistics of a single one. Drop or merge the smallest batch.')
    return batches


@under(normal_tensors)
def prove_terms(snapshot: Snapshot, recipe: Recipe, batches: Batches) -> tuple[Terms, tuple[str, ...]]:
    """The terms of the loss over `batches`, weighed and proven; and the buffers that its forward writes to."""
    buffers = snapshot.point.buffers
    untouched = {name: tensor.clone() for name, tensor in buffers.items()}
    users = snapshot.users.slots.present()
    with snapshot.applied():
        recipe = replace(recipe, alone=len(batches.reading.sizes) == 1, indivisible="")
        terms = weigh(recipe, batches)
        first = next(iter(terms))
        volatile = prove_still(first, buffers)
        _prove_own_weights(first, users, snapshot)
        terms = replace(terms, recipe=replace(recipe, indivisible=prove_weighting(snapshot, terms)))
        if not batches.exact:
            prove_passes_agree(terms)
    for name, tensor in untouched.items():
        buffers[name].copy_(tensor)  # a forward that writes to buffers has done so to the snapshot's
    return terms, tuple(volatile)


def _prove_own_weights(term: Term, users: Mapping[str, Tensor], snapshot: Snapshot) -> None:
    """The loss reaches the snapshot's tensors and none of the user's own, and its forward leaves the weights alone."""
    watched = {name: tensor for name, tensor in users.items() if tensor.requires_grad}
    loss = term.loss_of(term.output())
    if watched and loss.requires_grad:
        reached = torch.autograd.grad(loss, list(watched.values()), allow_unused=True)
        for name, gradient in zip(watched, reached, strict=True):
            if gradient is not None:
                raise ValueError(
                    f"the loss uses the model's own {name!r} through a list or variable made before, so it cannot be moved to another point. "
                    "Go through the module inside the model or loss: model.parameters(), self.layer.weight."
                )
    parts = snapshot.layout.split(snapshot.point.theta)
    for (name, leaf), part in zip(snapshot.leaves.items(), parts, strict=True):
        if not torch.equal(leaf.detach(), part.to(leaf.dtype)):
            raise NotDeterministic(f"the forward pass writes to the parameter {name!r} (max_norm, clamping), so the loss is no function of fixed weights. Take that out of the forward.")
