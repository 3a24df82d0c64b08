"""A file with a versioned header and a checksum, written atomically."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import stat
import struct
from pathlib import Path
from typing import Any

import torch

_MAGIC = b"structkd-gallery"
_VERSION = 3
_READABLE = (2, 3)  # 2 is that of structkd 0.1.0
# Magic, version, payload length in bytes, SHA-256 of the payload; little-endian.
_HEADER = struct.Struct("<16sIQ32s")


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes a state of tensors and plain values; readers see the old file or the whole new one.

    It is written to a temporary file in the same folder, which then takes the file's place, with
    the permissions of the old file, or else those that ``open`` gives. If ``path`` is a symlink,
    its target is replaced.

    Raises:
        ValueError: If ``path`` is no regular file, a folder or a device for example.
        OSError: If the file or its folder cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    mode = None
    if target.exists():
        if not target.is_file():
            raise ValueError(f"path must name a regular file or a new one, got {str(path)!r}")
        # Replacing a file needs no permission to write to it, but a read-only file is meant to
        # stay.
        if not os.access(target, os.W_OK):
            raise PermissionError(f"{path} is read-only: save under another name, or allow writing")
        mode = stat.S_IMODE(target.stat().st_mode)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    header = _HEADER.pack(_MAGIC, _VERSION, len(payload), hashlib.sha256(payload).digest())
    temporary = target.with_name(f".structkd-{secrets.token_hex(8)}")
    try:
        file = temporary.open("xb")
    except OSError as error:
        said = f"saving needs to make a file in {target.parent}: {error.strerror}"
        raise type(error)(error.errno, said, str(path)) from error
    try:
        with file:
            file.write(header)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        # Closed by now: Windows renames no open file.
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what :func:`write` wrote.

    Raises:
        ValueError: If the file is of another kind or version, cut short, or damaged.
    """
    content = memoryview(Path(path).read_bytes())
    if len(content) < _HEADER.size or bytes(content[: len(_MAGIC)]) != _MAGIC:
        raise ValueError(f"{path} is no structkd gallery: it lacks the header that save() writes")
    _, version, length, checksum = _HEADER.unpack(content[: _HEADER.size])
    if version not in _READABLE:
        raise ValueError(
            f"{path} has gallery format {version}, this structkd reads {_READABLE}: "
            "build the gallery anew, or load it with the structkd that wrote it"
        )
    payload = content[_HEADER.size :]
    if len(payload) != length:
        raise ValueError(
            f"{path} is cut short or damaged: {len(payload)} bytes of payload, expected {length}"
        )
    if hashlib.sha256(payload).digest() != checksum:
        raise ValueError(f"{path} is damaged: its checksum does not match; build the gallery anew")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state
