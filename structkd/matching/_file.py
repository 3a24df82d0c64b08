"""A file with a versioned header and a checksum, written atomically."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch

_MAGIC = b"structkd-gallery"
_VERSION = 2
# Magic, version, payload length in bytes, SHA-256 of the payload; little-endian.
_HEADER = struct.Struct("<16sIQ32s")


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes a state of tensors and plain values; readers see the old file or the whole new one."""
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    header = _HEADER.pack(_MAGIC, _VERSION, len(payload), hashlib.sha256(payload).digest())
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(header)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
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
    if version != _VERSION:
        raise ValueError(
            f"{path} has gallery format {version}, this structkd reads {_VERSION}: "
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
