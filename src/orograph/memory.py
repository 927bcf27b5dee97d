"""Memory: what is free, what a user's "4GiB" means, and what a computation holds at its worst."""

from __future__ import annotations

import functools
import re
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`; for the CPU, within the container's limit where there is one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    candidates = [_meminfo_available()]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        candidates.append(int(text) - int(used.read_text()))
    return max(min(candidates), 0)


def _meminfo_available() -> int:
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(found[1]) * 1024 if found else 4 * 2**30  # no /proc (macOS, Windows): a size that every laptop has


def memory_budget(memory: int | str | None, device: torch.device) -> int:
    """Bytes meant by `memory`: a number, a text such as "4GiB", or None for half of what is free now."""
    if memory is None:
        return free_bytes(device) // 2
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", str(memory).upper())
    if not found or isinstance(memory, bool) or (size := int(float(found[1]) * UNITS[found[2] or ""])) <= 0:
        raise ValueError(f'memory={memory!r} is no size. Give bytes (4_000_000_000) or a text such as "4GiB" or "500MB".')
    return size


def size_text(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.2g} GiB" if count >= 2**28 else f"{count / 2**20:.3g} MiB"


class Meter(TorchDispatchMode):
    """Bytes of the tensors made inside, as long as they live: `live` now, `peak` at the worst. Works on any device, backward passes included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it has made; views and operations in place make nothing."""
        result = func(*args, **(kwargs or {}))
        if _makes_new(func):
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    for part in _strided_parts(tensor):
                        self._note(part.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen.add(storage)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size


def _strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What holds a tensor's numbers: itself, or the parts of a sparse one."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout is torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,) if tensor.layout is torch.strided else ()


@functools.cache
def _makes_new(func: Any) -> bool:
    return all(returned.alias_info is None for returned in func._schema.returns)
