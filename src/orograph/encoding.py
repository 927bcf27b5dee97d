"""Results as JSON plus named tensors, and back without loss.

JSON has no tensors, no infinities and no classes: each becomes an object with one key that starts with "$". `{"$tensor": name}` ·
`{"$float": "nan"}` · `{"$kind": "Estimate", field: value, ...}` · `{"$map": [[key, value], ...]}` for a mapping whose keys JSON
or this scheme would misread. Tuples come back as lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .errors import RecordError
from .results import RESULT_KINDS, Eigenpairs

Json = Any  # what json.dumps(..., allow_nan=False) takes


def encode(value: Any, tensors: dict[str, Tensor], *, vectors: bool = False, where: str = "") -> Json:
    """JSON for `value`; its tensors are put into `tensors` under the path `where`. `vectors`: eigenvectors too."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # shares no memory with another
        return {"$tensor": where}
    if isinstance(value, (list, tuple)):
        return [encode(item, tensors, vectors=vectors, where=f"{where}.{i}") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [(key, encode(item, tensors, vectors=vectors, where=f"{where}.{key}")) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$map": [[encode(key, tensors, where=f"{where} (a key)"), item] for key, item in items]}
    if type(value) in RESULT_KINDS.values():
        return _encode_result(value, tensors, vectors=vectors, where=where)
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a record cannot hold. Pass a tensor, a result, or what JSON knows: "
        "float(x), int(x), bool(x), str(x), a list or a dict of these."
    )


def _encode_result(result: Any, tensors: dict[str, Tensor], *, vectors: bool, where: str) -> Json:
    encoded: dict[str, Json] = {"$kind": type(result).__name__}
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(result, Eigenpairs) and field.name == "vectors" and not vectors:
            value = None
        encoded[field.name] = encode(value, tensors, vectors=vectors, where=f"{where}.{field.name}")
    return encoded


def decode(value: Json, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$tensor" in value:
        if value["$tensor"] not in tensors:
            raise RecordError(f"the tensor {value['$tensor']!r} is not among the stored arrays")
        return tensors[value["$tensor"]]
    if "$map" in value:
        return {decode(key, tensors): decode(item, tensors) for key, item in value["$map"]}
    if "$kind" in value:
        return _decode_result(value, tensors)
    return {key: decode(item, tensors) for key, item in value.items()}


def _decode_result(value: dict[str, Json], tensors: Mapping[str, Tensor]) -> Any:
    kind = RESULT_KINDS.get(value["$kind"])
    if kind is None:
        raise RecordError(f"there is no result kind {value['$kind']!r}; known are {', '.join(RESULT_KINDS)}")
    arguments = {name: decode(item, tensors) for name, item in value.items() if name != "$kind"}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise RecordError(f"a stored {kind.__name__} does not fit its class: {error}") from error
