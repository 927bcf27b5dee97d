"""Files that a kill, a full disk, damage or a second process cannot spoil without being noticed.

A file is written beside its place and renamed into it, and holds the SHA-256 of its own bytes. A line is one write to a file opened for
appending, and holds its own SHA-256 too. A file that one process must have for itself is locked.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

EMPTY = b"0" * 64  # stands where the digest goes, while the digest is computed
FILE_SEAL, LINE_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"'), re.compile(rb', "sha256": "([0-9a-f]{64})"\}$')
UNFINISHED = b"#unfinished"  # closes a line that a killed process left open, so that the next line starts on its own
CHUNK = 1 << 20
MAX_HEADER = 1 << 27  # bytes of a safetensors header: its library's own limit is less
MAX_AGE = 86400.0  # seconds after which a temporary file belongs to nobody
HOST = re.sub(r"[^0-9A-Za-z]", "", platform.node())[:30]
PARTIAL = re.compile(r"^\..*\.(\w*)-(\d+)-[0-9a-f]{8}\.partial$")
_writing: set[str] = set()  # temporary files of this process
_owned: set[Path] = set()  # files that this process has for itself


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A short hash of the bytes, types and shapes of some tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.detach().to_dense().cpu().contiguous()
        digest.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b"")
    return digest.hexdigest()[:16]


# -- whole files -----------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file beside `path`, which then takes its place. OSError where that fails: nothing is left of it, and what was there before stays."""
    partial = path.with_name(f".{path.name[:100]}.{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    _writing.add(partial.name)
    try:
        write(partial)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)  # the rename itself
    except SafetensorError as error:  # what that library makes of a full disk
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else OSError(str(error))) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        _writing.discard(partial.name)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files whose process is dead."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = PARTIAL.match(entry.name)
            if found and entry.name not in _writing and _is_abandoned(found[1], int(found[2]), entry.stat().st_mtime):
                os.unlink(entry.path)


def _is_abandoned(host: str, pid: int, modified: float) -> bool:
    """Whether no process is writing a temporary file any more: of another machine, only its age can tell."""
    if time.time() - modified > MAX_AGE:
        return True
    if host != HOST:
        return False
    if pid == os.getpid():
        return True  # of an earlier process with the same number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _flush(path: Path) -> None:
    """Force a file or folder to disk; Windows cannot open folders and needs no such step."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with its own SHA-256, atomically. OSError where that fails: what was there before stays."""

    def write(partial: Path) -> None:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial, {**metadata, "sha256": EMPTY.decode()})  # clone: no shared storage
        _seal(partial)

    write_atomically(path, write)


def read_tensors(path: Path, *, sealed: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and metadata. OSError where the file cannot be read, ValueError where it is damaged; a file with no SHA-256 is, where it should be `sealed`."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    _check_seal(path, required=sealed)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118  (aligned memory: BLAS rounds by it)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _seal(path: Path) -> None:
    """Put the SHA-256 of a safetensors file into its metadata, where `EMPTY` stands under "sha256"."""
    with path.open("r+b") as file:
        place, _ = _sealed_place(file)
        digest = _digest(file, place)
        file.seek(place)
        file.write(digest)


def _check_seal(path: Path, *, required: bool) -> None:
    """ValueError where a file's bytes are not those that its SHA-256 was made of, or where it has none and one is `required`."""
    if not path.stat().st_size:
        raise ValueError("it is empty")
    with path.open("rb") as file:
        place, found = _sealed_place(file)
        if not place:
            if required:
                raise ValueError("it holds no checksum")
            return
        if _digest(file, place) != found:
            raise ValueError("it is damaged: its bytes are not those of its checksum")


def _sealed_place(file: BinaryIO) -> tuple[int, bytes]:
    """Offset of the digest in a safetensors file, and the digest; 0 where there is none."""
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    found = FILE_SEAL.search(file.read(size)) if size <= MAX_HEADER else None
    return (8 + found.start(1), found[1]) if found else (0, b"")


def _digest(file: BinaryIO, place: int) -> bytes:
    """SHA-256 of a file in which `EMPTY` stands at `place`."""
    file.seek(0)
    digest = hashlib.sha256(file.read(place))
    digest.update(EMPTY)
    file.seek(place + len(EMPTY))
    while part := file.read(CHUNK):
        digest.update(part)
    return digest.hexdigest().encode()


# -- lines -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of a file: its `number`, its `content` (None where it cannot be read, and `problem` says why), and whether its writer was stopped."""

    number: int
    content: dict[str, Any] | None
    sealed: bool = False
    unfinished: bool = False
    problem: str = ""


def sealed_line(content: Mapping[str, Any]) -> bytes:
    """JSON with its own SHA-256 at the end."""
    text = json.dumps({**content, "sha256": EMPTY.decode()}, ensure_ascii=False).encode()
    return text[: -len(EMPTY) - 2] + hashlib.sha256(text).hexdigest().encode() + b'"}'


def append_line(path: Path, line: bytes) -> None:
    """One write, so that lines of several processes never mix; closes a line that a killed process left open."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        os.lseek(descriptor, max(size - 1, 0), os.SEEK_SET)
        opening = UNFINISHED + b"\n" if size and os.read(descriptor, 1) != b"\n" else b""
        content = opening + line + b"\n"
        written = os.write(descriptor, content)
        if written != len(content):
            raise OSError(errno.ENOSPC, f"only {written} of {len(content)} bytes could be appended: is the disk full?", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that `append_line` has written; empty ones are left out."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        text, unfinished = line.removesuffix(UNFINISHED), line.endswith(UNFINISHED) or number == len(lines)
        if text.strip():
            yield _read_line(number, text, unfinished)


def _read_line(number: int, text: bytes, unfinished: bool) -> Line:
    seal = LINE_SEAL.search(text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(number, None, unfinished=unfinished, problem=str(error))
    if seal is not None and hashlib.sha256(text[: seal.start(1)] + EMPTY + text[seal.end(1) :]).hexdigest().encode() != seal[1]:
        return Line(number, None, problem="its bytes are not those of its checksum")
    if seal is not None:
        del content["sha256"]
    return Line(number, content if isinstance(content, dict) else {}, sealed=seal is not None)


# -- one process at a time -------------------------------------------------------------------------------------------------------


@contextmanager
def sole_owner(path: Path, name: str) -> Iterator[None]:
    """`path` belongs to this process alone while inside. ValueError, which calls it `name`, where another one has it.

    The lock is a file beside it, which goes at the end. The system frees it when its process dies, however that happens; a file that a killed process
    left is taken over. Where no lock can be had (Windows, some network file systems, a folder that cannot be written to) there is none.
    """
    place = path.resolve()
    lock = place.with_name(f".{place.name[:200]}.lock")
    if place in _owned:
        raise ValueError(f"{name}={str(path)!r} is in use by another job of this process. Give every job a path of its own.")
    handle = _locked(lock)
    if handle is not None and handle < 0:
        raise ValueError(f"{name}={str(path)!r} is in use by another process{_owner(lock)}. Wait until it ends, or give another path.")
    _owned.add(place)
    try:
        yield
    finally:
        _owned.discard(place)
        if handle is not None:
            with suppress(OSError):
                lock.unlink(missing_ok=True)  # before it is freed: whoever opens it afterwards makes a new one
            os.close(handle)


def _locked(lock: Path) -> int | None:
    """A handle that holds the lock, -1 where another process has it, None where there are no locks."""
    while fcntl is not None:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: workers that it forks do not inherit it
            if os.stat(lock).st_ino == os.fstat(handle).st_ino:
                with suppress(OSError):  # no room for a number: it only helps the message
                    os.truncate(handle, 0)
                    os.write(handle, f"{os.getpid()} on {platform.node()}".encode())
                return handle
        except FileNotFoundError:
            pass  # its owner has just removed it
        except (BlockingIOError, PermissionError):
            os.close(handle)
            return -1
        except OSError:  # no locks on this file system
            os.close(handle)
            return None
        os.close(handle)
    return None


def _owner(lock: Path) -> str:
    with suppress(OSError):
        text = lock.read_text()
        return f" ({text})" if text else ""
    return ""
