"""From data and a recipe to the weighted terms of a loss, with the proofs that it stands still and that batches add up."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .batches import read_batches
from .proof import prove_passes_agree, prove_still, prove_weighting
from .snapshots import Snapshot
from .terms import Recipe, Terms, weigh


def read_terms(snapshot: Snapshot, recipe: Recipe, data: Any, batch_size: int | None) -> tuple[Terms, tuple[str, ...]]:
    """The terms of the loss over `data`, read and proven; and the buffers that its forward writes to."""
    opaque, whole = recipe.batch_loss is not None, snapshot.mode == "batch"
    device, dtype, buffers = snapshot.point.theta.device, snapshot.dtype, snapshot.point.buffers

    def prepare(tensor: Tensor) -> Tensor:
        return tensor if opaque else tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    ready = opaque or (recipe.forward is not None and isinstance(data, list))  # a list of batches, even if it is two tensors
    batches = read_batches(data, batch_size=batch_size, prepare=prepare, whole=whole, opaque=ready)
    if whole and min(batches.reading.sizes) < 2:
        raise ValueError('mode="batch" needs batches of at least 2 examples: BatchNorm has no statistics of a single one. Drop or merge the smallest batch.')
    untouched = {name: tensor.clone() for name, tensor in buffers.items()}
    with snapshot.applied():
        terms = weigh(recipe, batches)
        volatile = prove_still(next(iter(terms)), buffers)
        prove_weighting(terms, couples=whole)
        if not batches.exact:
            prove_passes_agree(terms)
    for name, tensor in untouched.items():
        buffers[name].copy_(tensor)  # a forward that writes to buffers has done so to the snapshot's
    return terms, tuple(volatile)
