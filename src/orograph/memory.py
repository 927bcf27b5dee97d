"""Memory budgets: what is free, and what a user's "4GiB" means."""

from __future__ import annotations

import re
from pathlib import Path

import torch

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
