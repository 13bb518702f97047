"""Reader of the header of a safetensors file: its tensors and their sizes.

Format: eight bytes with the length of a JSON text, that text, then the data without gaps
(README of huggingface/safetensors). The file is not trusted. The text is matched entry by entry
instead of parsed as a whole, so that a hostile text cannot create any objects except tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from stackctl.errors import StackctlError
from stackctl.sources.source_files import open_regular_file

# The format allows 100 MB. 50,000 tensors need 8 MB, and the shards of the largest models have
# fewer. The limits bound the time for a hostile file to a second.
MAX_HEADER_BYTES: Final = 32 << 20
MAX_TENSORS: Final = 50_000
MAX_NAME_BYTES: Final = 512
MAX_DIMS: Final = 8
MAX_SIZE: Final = 1 << 62
BITS: Final[Mapping[str, int]] = MappingProxyType(
    {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
    | {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16}
    | {"BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
)
_AGAIN: Final = "the download is incomplete or damaged: fetch the file again"
_LFS: Final = b"version https://git-lfs"
# Possessive repeats (*+) keep every match linear in the length of the text.
_WS: Final = rb"[ \t\r\n]*+"
_TEXT: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_METADATA: Final = re.compile(
    rb'WS"__metadata__"WS:WS\{WS(?:TEXTWS:WS(?:TEXT|null)WS(?:,WS)?+)*+\}WS([,}])'.replace(
        b"TEXT", _TEXT
    ).replace(b"WS", _WS),
    re.DOTALL,
)
_NUMBERS: Final = rb"(?:\d{1,19}+WS(?:,WS)?+){0,32}+"
_TENSOR: Final = re.compile(
    (
        rb'WS"([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)"WS:WS\{(?:WS(?:'
        rb'"dtype"WS:WS"(?P<dtype>[A-Z0-9_]{1,16}+)"|'
        rb'"shape"WS:WS\[WS(?P<shape>' + _NUMBERS + rb")\]|"
        rb'"data_offsets"WS:WS\[WS(?P<start>\d{1,19}+)WS,WS(?P<end>\d{1,19}+)WS\]'
        rb")WS(?:,|(?=\}))){3}\}WS([,}])"
    ).replace(b"WS", _WS)
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its type as the format names it, its shape and its size."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        """Return the number of elements; an element of packed weights holds several parameters."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The header of one file; ``size`` is that of the file in bytes."""

    path: str
    size: int
    tensors: Mapping[str, Tensor]


def read_safetensors(path: str | Path) -> SafetensorsHeader:
    """Read the header of a safetensors file and check it against the file's size.

    Raises:
        StackctlError: the file cannot be read, is not a safetensors file, is damaged or truncated.
    """
    name = str(path)
    with open_regular_file(path) as (fd, size):
        raw, start = _header_text(name, fd, size)
    tensors, end = _tensors(name, raw)
    if start + end != size:
        what = "truncated" if start + end > size else "longer than it says"
        raise StackctlError(
            f"{name} is {what}: it has {size} bytes, its header describes {start + end}",
            hint=_AGAIN,
        )
    return SafetensorsHeader(path=name, size=size, tensors=MappingProxyType(tensors))


def _bad(name: str, what: str) -> StackctlError:
    return StackctlError(f"{name} is not a valid safetensors file: {what}", hint=_AGAIN)


def _header_text(name: str, fd: int, size: int) -> tuple[bytes, int]:
    """Return the JSON text, and the offset of the data in the file."""
    first = os.pread(fd, 32, 0)
    if first.startswith(_LFS):
        raise StackctlError(
            f"{name} is a git-lfs pointer, not the file", hint="fetch the file (git lfs pull)"
        )
    if len(first) < 8:
        raise StackctlError(f"{name} is truncated: it has {size} bytes", hint=_AGAIN)
    length: int = struct.unpack_from("<Q", first)[0]
    if first[8:9] not in (b"{", b"") or length > MAX_HEADER_BYTES:
        raise _bad(name, f"its header would be {length} bytes of JSON")
    if 8 + length > size:
        raise StackctlError(
            f"{name} is truncated: it has {size} bytes and ends inside its header", hint=_AGAIN
        )
    with open(fd, "rb", closefd=False) as file:
        file.seek(8)
        raw = file.read(length)
    if len(raw) < length:  # the file has become shorter since fstat
        raise StackctlError(f"{name} is truncated: it ends inside its header", hint=_AGAIN)
    return raw, 8 + length


def _tensors(name: str, raw: bytes) -> tuple[dict[str, Tensor], int]:
    """Return the tensors by name, and the size of the data in bytes."""
    found: dict[str, Tensor] = {}
    places: list[tuple[int, int]] = []
    at, more = 1, raw[1:].lstrip()[:1] != b"}"
    if raw[:1] != b"{":
        raise _bad(name, "its header is not a JSON object")
    metadata = 0
    while more:
        match = _METADATA.match(raw, at)
        if match:
            metadata += 1
            if metadata > 1:
                raise _bad(name, "it has two blocks of metadata")
        else:
            match = _TENSOR.match(raw, at)
            if match is None:
                raise _bad(name, f"its header is not understood at byte {8 + at}")
            label, tensor, start = _tensor(name, match)
            if label in found:
                raise _bad(name, f"tensor {label!r} is there twice")
            found[label] = tensor
            places.append((start, tensor.bytes))
            if len(found) > MAX_TENSORS:
                raise _bad(name, f"it has more than {MAX_TENSORS} tensors")
        more = match[match.lastindex or 0] == b","
        at = match.end()
    rest = raw[at:] if found or metadata else raw[1:].lstrip()[1:]
    if rest.strip(b" \t\r\n\0"):
        raise _bad(name, "there is text after the end of its header")
    end = 0
    for start, size in sorted(places):
        if start != end:
            raise _bad(name, f"the data of its tensors has a gap or overlaps at offset {start}")
        end = start + size
    return found, end


def _label(name: str, raw: bytes) -> str:
    """Return the name of a tensor. Some writers escape characters that are not ASCII."""
    text = raw.decode("utf-8", "replace")
    if "\\" not in text:
        return text
    try:
        return str(json.loads(f'"{text}"')).encode("utf-8", "replace").decode()
    except ValueError:
        raise _bad(name, f"the name {text[:80]!r} of a tensor is not understood") from None


def _tensor(name: str, match: re.Match[bytes]) -> tuple[str, Tensor, int]:
    """Return the name of the tensor in an entry, the tensor, and the offset of its data."""
    if len(match[1]) > MAX_NAME_BYTES:
        raise _bad(name, f"the name of a tensor is {len(match[1])} bytes long")
    label = _label(name, match[1])
    dtype, shape_text, start_text = match["dtype"], match["shape"], match["start"]
    if dtype is None or shape_text is None or start_text is None:
        raise _bad(name, f"tensor {label!r} does not have a type, a shape and a place")
    kind = dtype.decode()
    if kind not in BITS:
        raise StackctlError(
            f"{name} has tensor {label!r} of the unknown type {kind}",
            hint="the file is damaged, or made with a newer version of the format",
        )
    numbers = shape_text.split(b",") if shape_text.strip() else []
    if len(numbers) > MAX_DIMS:
        raise _bad(name, f"tensor {label!r} has {len(numbers)} dimensions")
    try:
        shape = tuple(int(number) for number in numbers)
    except ValueError:
        raise _bad(name, f"tensor {label!r} has a shape that is not understood") from None
    start, end = int(start_text), int(match["end"])
    bits = math.prod(shape) * BITS[kind]
    if bits > MAX_SIZE or end > MAX_SIZE or bits % 8 or end - start != bits // 8:
        raise _bad(
            name,
            f"tensor {label!r} of type {kind} and shape {list(shape)} lies at {start} to {end}",
        )
    return label, Tensor(kind, shape, bits // 8), start
