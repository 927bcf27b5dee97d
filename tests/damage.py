"""Damage to files, by seed: bytes zeroed, a bit flipped, an end cut off, the file emptied, or another thing in its place."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path


def _zeroed(content: bytes, rng: random.Random) -> bytes:
    start, count = rng.randrange(len(content)), rng.choice([1, 8, 64, 64, 64])
    return content[:start] + b"\0" * len(content[start : start + count]) + content[start + count :]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(1, len(content))]


def _overwritten(content: bytes, rng: random.Random) -> bytes:
    """A block of the file stands where another one should, as a disk that mixes up its sectors leaves it."""
    count = min(128, len(content) // 3)
    source, target = rng.randrange(len(content) - count), rng.randrange(len(content) - count)
    return content[:target] + content[source : source + count] + content[target + count :]


RANDOM: dict[str, Callable[[bytes, random.Random], bytes]] = {"zeroed": _zeroed, "flipped": _flipped, "cut": _cut, "overwritten": _overwritten}


def damage(path: Path, kind: str, seed: int) -> None:
    """Damage a file, so that its bytes are others than before."""
    rng, content = random.Random(seed), path.read_bytes()
    damaged = content
    while damaged == content:
        damaged = RANDOM[kind](content, rng)
    path.write_bytes(damaged)


def _folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


PLANNED: dict[str, Callable[[Path, Path], object]] = {  # (the file, one of the same kind and of another job)
    "emptied": lambda path, other: path.write_bytes(b""),
    "a folder in its place": _folder,
    "another's file in its place": lambda path, other: shutil.copy(other, path),
    "a text in its place": lambda path, other: path.write_text("nothing of the kind\n"),
    "no permission": lambda path, other: os.chmod(path, 0),
}
