"""LoRA files behind fsspec URLs: only the header and the alphas are fetched, into a sparse file of the same size."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from harness.errors import LoraFileError, UserError
from harness.files import read_header
from harness.files.format import CONFIG_NAME, WEIGHTS_NAME
from harness.files.safetensors_file import MAX_HEADER_BYTES
from harness.text import printable

SCHEMES = ("https", "hf", "s3", "gs", "gcs", "az", "abfs")
_MAX_CONFIG_BYTES = 8_000_000
_SMALL_BYTES = 64  # tensors up to this size are alphas and other single numbers
_PRIVATE_VARIABLE = "LORA_HARNESS_ALLOW_PRIVATE"


def is_url(path: str) -> bool:
    """Tell whether `path` is a URL."""
    return "://" in path


def find(url: str, schemes: tuple[str, ...] = SCHEMES) -> list[str]:
    """Return the safetensors files under a URL, a PEFT folder as one.

    Raises:
        UserError: the scheme is not allowed, fsspec is missing, or the place cannot be listed.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in schemes:
        raise UserError(f"{scheme}://: not an allowed scheme; allowed are {', '.join(schemes)}")
    _refuse_private(url)
    system, path = _open(url)
    try:
        found = [path] if path.lower().endswith(".safetensors") else _listed(system, path)
    except Exception as error:  # whatever the storage's own library raises, without its text: it may hold credentials
        raise UserError(f"{_public(url)}: cannot be listed ({type(error).__name__})") from None
    if not found:
        raise UserError(f"{_public(url)}: no safetensors file there")
    return [_shown(name, system, scheme) for name in found]


def _shown(name: str, system: Any, scheme: str) -> str:
    return name if is_url(name) else f"{scheme}://{system._strip_protocol(name).lstrip('/')}"


def _listed(system: Any, path: str) -> list[str]:
    files = sorted(system.glob(path) if any(c in path for c in "*?[") else system.find(path))
    folders = {name.rpartition("/")[0] for name in files if name.endswith("/" + CONFIG_NAME)}
    peft = {folder for folder in folders if f"{folder}/{WEIGHTS_NAME}" in files}
    plain = [name for name in files if name.lower().endswith(".safetensors") and name.rpartition("/")[0] not in peft]
    return sorted([*peft, *plain])


def stamp(url: str) -> tuple[int, int] | None:
    """Return (bytes, a number that changes with the content) of a remote file, None when it cannot be told."""
    try:
        system, path = _open(url)
        info = system.info(path if path.lower().endswith(".safetensors") else f"{path}/{WEIGHTS_NAME}")
    except Exception:
        return None
    mark = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "last_modified") if info.get(key)), 0)
    return int(info.get("size") or 0), int.from_bytes(
        hashlib.blake2b(str(mark).encode(), digest_size=6).digest(), "big"
    )


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """Yield a local file or PEFT folder with the header and the single numbers of `url`; weights are zeros.

    Raises:
        LoraFileError: it cannot be fetched; the message holds no credentials.
    """
    with TemporaryDirectory(prefix="lora-harness-remote-") as folder:
        try:
            yield _fetch(url, Path(folder))
        except (LoraFileError, GeneratorExit):
            raise
        except Exception as error:
            raise LoraFileError(_public(url), f"cannot be fetched ({type(error).__name__})") from None


def _fetch(url: str, folder: Path) -> Path:
    _refuse_private(url)
    system, path = _open(url)
    is_file = path.lower().endswith(".safetensors")
    target = folder / ("lora.safetensors" if is_file else WEIGHTS_NAME)
    if not is_file:
        config = f"{path}/{CONFIG_NAME}"
        if system.size(config) > _MAX_CONFIG_BYTES:
            raise LoraFileError(_public(url), f"{CONFIG_NAME} has more than {_MAX_CONFIG_BYTES:,} bytes")
        (folder / CONFIG_NAME).write_bytes(system.cat_file(config))
    _sparse(system, path if is_file else f"{path}/{WEIGHTS_NAME}", target, url)
    return target if is_file else folder


def _sparse(system: Any, path: str, target: Path, url: str) -> None:
    size = int(system.size(path))
    length = int.from_bytes(system.cat_file(path, start=0, end=8), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise LoraFileError(
            _public(url), f"truncated or not a safetensors file: a header of {length:,} bytes is announced"
        )
    with target.open("wb") as stream:
        stream.write(system.cat_file(path, start=0, end=8 + length))
        stream.truncate(size)
    small = [info for info in read_header(target).tensors.values() if 0 < info.end - info.start <= _SMALL_BYTES]
    with target.open("r+b") as stream:
        for start, end in _joined((info.start, info.end) for info in small):
            stream.seek(start)
            stream.write(system.cat_file(path, start=start, end=end))


def _joined(spans: Iterator[tuple[int, int]], gap: int = 1 << 16) -> list[tuple[int, int]]:
    """Return spans in order, those closer than `gap` bytes as one: fewer requests."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _open(url: str) -> tuple[Any, str]:
    try:
        core = import_module("fsspec.core")
    except ImportError:
        raise UserError("URLs need fsspec: `pip install fsspec` (and s3fs, gcsfs, adlfs for those stores)") from None
    try:
        system, path = core.url_to_fs(url)
    except Exception as error:
        raise UserError(f"{_public(url)}: cannot be opened ({printable(type(error).__name__)})") from None
    return system, str(path).rstrip("/")


def _refuse_private(url: str) -> None:
    """Refuse web addresses inside this machine's own network: a list of URLs may come from a stranger."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or os.environ.get(_PRIVATE_VARIABLE) == "1":
        return
    try:
        answers = socket.getaddrinfo(parts.hostname, parts.port or 443, proto=socket.IPPROTO_TCP)
    except (OSError, ValueError):
        raise UserError(f"{_public(url)}: the host is not known") from None
    if not all(ipaddress.ip_address(answer[4][0]).is_global for answer in answers):
        raise UserError(f"{_public(url)}: a private address; {_PRIVATE_VARIABLE}=1 allows it")


def _public(url: str) -> str:
    """Return a URL without user, password and query."""
    parts = urlsplit(url)
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}", 200)
