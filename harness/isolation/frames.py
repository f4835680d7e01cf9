"""Messages between processes: JSON and tensors in frames of bounded size; what comes in is data, never code.

A frame is its length (8 bytes), the length of its JSON (4 bytes), the JSON, and the tensors as safetensors. In a
message, a dictionary, they stand under `tensors`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from json import dumps, loads  # bound here: a subject may replace the module's own
from typing import Any

MOST_BYTES = 1 << 30
_LENGTH, _TEXT_LENGTH = struct.Struct(">Q"), struct.Struct(">I")
_TENSORS = "tensors"


class FrameError(Exception):
    """What came through the pipe is no frame."""


def pack(message: Any) -> bytes:
    """Return a message as a frame.

    Raises:
        TypeError: something in it is neither JSON nor a tensor under `tensors`.
    """
    tensors = message.get(_TENSORS) if isinstance(message, dict) else None
    text = dumps({**message, _TENSORS: None} if tensors else message).encode()
    data = _save(tensors) if tensors else b""
    return _LENGTH.pack(_TEXT_LENGTH.size + len(text) + len(data)) + _TEXT_LENGTH.pack(len(text)) + text + data


def _save(tensors: Any) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _unpack(body: bytes) -> Any:
    try:
        (length,) = _TEXT_LENGTH.unpack_from(body)
        start = _TEXT_LENGTH.size
        message, data = loads(body[start : start + length]), body[start + length :]
        return {**message, _TENSORS: _load(data)} if data else message
    except Exception as error:  # whatever a stranger wrote there
        raise FrameError(f"a message that cannot be read ({type(error).__name__})") from error


def _load(data: bytes) -> Any:
    from safetensors.torch import load

    return load(data)


def wrapped(kind: str, content: Any, **fields: Any) -> dict[str, Any]:
    """Return a message that has `content` under `kind`; the tensors in it go where a frame carries them."""
    tensors = content.get(_TENSORS) if isinstance(content, dict) else None
    if not tensors:
        return {**fields, kind: content}
    return {**fields, kind: {**content, _TENSORS: None}, _TENSORS: tensors}


def unwrapped(message: dict[str, Any], kind: str) -> Any:
    """Return the content that `wrapped` put under `kind`, its tensors back in their place.

    Raises:
        FrameError: there are tensors and no dictionary to hold them.
    """
    content, tensors = message[kind], message.get(_TENSORS)
    if not tensors:
        return content
    if not isinstance(content, dict):
        raise FrameError("tensors without a message")
    return {**content, _TENSORS: tensors}


class Frames:
    """The messages in what is read from a pipe, piece by piece."""

    def __init__(self) -> None:
        self._unread = bytearray()

    def feed(self, chunk: bytes) -> Iterator[Any]:
        """Add a piece; yield every message that is complete.

        Raises:
            FrameError: a frame that is too long, or no frame.
        """
        self._unread += chunk
        while len(self._unread) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._unread)
            if length > MOST_BYTES:
                raise FrameError(f"a message of {length:,} bytes, at most {MOST_BYTES:,} are read")
            end = _LENGTH.size + length
            if len(self._unread) < end:
                return
            body = bytes(self._unread[_LENGTH.size : end])
            del self._unread[:end]
            yield _unpack(body)


def write(descriptor: int, message: Any) -> None:
    """Write a message to a pipe, all of it.

    Raises:
        OSError: nobody reads there any more.
    """
    rest = memoryview(pack(message))
    while rest:
        rest = rest[os.write(descriptor, rest) :]
