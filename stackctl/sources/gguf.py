"""Reader of the header of a GGUF file. It does not load tokens or tensors.

Format: docs/gguf.md of the ggml project. The file is not trusted: every count and length is
checked against the file's size before it is used, and time and memory are bounded. The reader
uses pread rather than mmap, because a file that shrinks while it is mapped kills the process.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from stackctl.errors import StackctlError
from stackctl.sources.ggml_types import REMOVED_TYPES, TENSOR_TYPES
from stackctl.sources.source_files import open_regular_file

GgufScalar = int | float | bool | str

# Real models stay far below these limits: they have about 100 keys, 800,000 strings, 2,000 tensors
# and 30 MB of header. The limits bound a hostile file to a second and some tens of MB.
MAX_HEADER_BYTES: Final = 256 << 20
MAX_KEYS: Final = 16_384
MAX_TENSORS: Final = 65_536
MAX_STRINGS: Final = 2_000_000
MAX_KEPT_BYTES: Final = 32 << 20
MAX_TEXT_BYTES: Final = 64 << 10
MAX_ARRAY_KEPT: Final = 1_024
MAX_NAME_BYTES: Final = 256
MAX_DIMS: Final = 4
MAX_SIZE: Final = 1 << 62
_CHUNK: Final = 1 << 20

# The embedding, the per-layer embedding of some models, and the output matrix, which is absent if
# the model uses the embedding as output.
TABLES: Final = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_STRING: Final = 8
_ARRAY: Final = 9
# Metadata type: name, struct code. Strings and arrays are missing, since their length varies.
_SCALARS: Final = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", _U32),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("uint64", _U64),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_FLOATS: Final = frozenset({6, 12})
_TENSOR_TAIL: Final = tuple(struct.Struct(f"<{dims}QIQ") for dims in range(MAX_DIMS + 1))

_OLD: Final = "it is in a format older than GGUF: get a current conversion of the model"
_NOT_GGUF: Final = {
    b"version https://git-lfs": "it is a git-lfs pointer: fetch the file itself (git lfs pull)",
    b"<": "it is a web page: the download did not get the file itself",
    b"PK": "it is a zip archive: unpack it first",
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg"), _OLD),
}
_AGAIN: Final = "the download is incomplete or damaged: fetch the file again"


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata.

    ``values`` is None for arrays of strings or floats and for those of more than 1,024 elements.
    """

    element: str
    length: int
    values: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """Sums over all tensors; ``bytes`` excludes padding, types are GGML names.

    ``tables`` maps the names of the vocabulary's tables to their elements and bytes. ``counts`` is
    the number of tensors of each type.
    """

    count: int
    elements: int
    bytes: int
    expert_elements: int
    expert_bytes: int
    tables: Mapping[str, tuple[int, int]]
    counts: Mapping[str, int]
    elements_by_type: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of one GGUF file; sizes and offsets in bytes.

    ``long_texts`` has the lengths of strings that are too long to keep. ``expected_size`` is the
    smallest size of a complete file.
    """

    path: str
    size: int
    version: int
    metadata: Mapping[str, GgufScalar]
    arrays: Mapping[str, GgufArray]
    long_texts: Mapping[str, int]
    tensors: TensorSummary
    data_offset: int
    expected_size: int


class _Reader:
    """A window over the file that moves forward only."""

    def __init__(self, path: str, fd: int, size: int) -> None:
        self.path = path
        self.size = size
        self._fd = fd
        self._buffer = b""
        self._start = 0
        self._at = 0
        self._strings = 0
        self._kept = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    def bad(self, what: str) -> StackctlError:
        return StackctlError(f"{self.path} is not a valid GGUF file: {what}", hint=_AGAIN)

    def cut(self) -> StackctlError:
        return StackctlError(
            f"{self.path} is truncated: it has {self.size} bytes and ends inside its header",
            hint=_AGAIN,
        )

    def keep(self, count: int) -> None:
        """Count bytes that stay in memory. Raises StackctlError if they are too many in all."""
        self._kept += count
        if self._kept > MAX_KEPT_BYTES:
            raise self.bad(f"its metadata is larger than {MAX_KEPT_BYTES} bytes")

    def _need(self, count: int) -> None:
        if self._at + count <= len(self._buffer):
            return
        start = self.position
        if start + count > self.size:
            raise self.cut()
        if start + count > MAX_HEADER_BYTES:
            raise self.bad(f"its header is larger than {MAX_HEADER_BYTES} bytes")
        self._buffer = os.pread(self._fd, max(count, _CHUNK), start)
        self._start, self._at = start, 0
        if len(self._buffer) < count:  # the file has become shorter since fstat
            raise self.cut()

    def scalar(self, kind: struct.Struct) -> int:
        return self.values(kind)[0]

    def values(self, kind: struct.Struct) -> tuple[int, ...]:
        self._need(kind.size)
        self._at += kind.size
        return kind.unpack_from(self._buffer, self._at - kind.size)

    def skip(self, count: int) -> None:
        if count > self.size - self.position:
            raise self.cut()
        self._at += count

    def text(self, limit: int, what: str) -> str:
        """Read a string. Raises StackctlError if it has more than ``limit`` bytes."""
        length = self.scalar(_U64)
        if length > self.size - self.position:
            raise self.cut()
        if length > limit:
            raise self.bad(f"{what} is {length} bytes long")
        return self.take(length)

    def take(self, length: int) -> str:
        self.keep(length)
        self._need(length)
        raw = self._buffer[self._at : self._at + length]
        self._at += length
        return raw.decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        """Skip an array of strings; only their lengths are read."""
        if count * _U64.size > self.size - self.position:
            raise self.cut()
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self.bad(f"its arrays hold more than {MAX_STRINGS} strings")
        # This loop takes most of the time: a vocabulary has hundreds of thousands of strings.
        unpack, buffer, at = _U64.unpack_from, self._buffer, self._at
        limit = len(buffer) - _U64.size
        for _ in range(count):
            if at > limit:
                self._at = at
                self._need(_U64.size)
                buffer, at = self._buffer, self._at
                limit = len(buffer) - _U64.size
            at += 8 + unpack(buffer, at)[0]
        self._at = at
        if self.position > self.size:
            raise self.cut()


def read_header(path: str | Path) -> GgufHeader:
    """Read the header of a GGUF file, version 2 or 3, little endian.

    Raises:
        StackctlError: the file cannot be read, is not a GGUF file, is damaged or truncated.
    """
    with open_regular_file(path) as (fd, size):
        if size == 0:
            raise StackctlError(f"{path} is empty", hint=_AGAIN)
        return _read(_Reader(str(path), fd, size), os.pread(fd, 32, 0))


def _read(reader: _Reader, first: bytes) -> GgufHeader:
    version = _version(reader, first)
    tensors, keys = reader.scalar(_U64), reader.scalar(_U64)
    if keys > MAX_KEYS or tensors > MAX_TENSORS:
        raise reader.bad(f"its header announces {keys} keys and {tensors} tensors")
    metadata, arrays, long_texts = _metadata(reader, keys)
    alignment = metadata.get("general.alignment", 32)
    # The reference engine requires a power of two as well.
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise reader.bad(f"its alignment is {alignment!r}")
    summary, data_bytes = _tensors(reader, tensors, alignment)
    data_offset = _padded(reader.position, alignment) if tensors else reader.position
    expected = data_offset + data_bytes
    if reader.size < expected:
        raise StackctlError(
            f"{reader.path} is truncated: it has {reader.size} bytes, "
            f"its header describes {expected}",
            hint=_AGAIN,
        )
    return GgufHeader(
        path=reader.path,
        size=reader.size,
        version=version,
        metadata=MappingProxyType(metadata),
        arrays=MappingProxyType(arrays),
        long_texts=MappingProxyType(long_texts),
        tensors=summary,
        data_offset=data_offset,
        expected_size=expected,
    )


def _version(reader: _Reader, first: bytes) -> int:
    """Return the version of the format; ``first`` holds the first bytes of the file.

    Raises:
        StackctlError: the file is not GGUF, or its version or byte order is not supported.
    """
    if first[:4] != b"GGUF":
        hint = next((text for start, text in _NOT_GGUF.items() if first.startswith(start)), None)
        shown = ascii(first[:8].decode("latin-1"))
        raise StackctlError(f"{reader.path} is not a GGUF file (starts with {shown})", hint=hint)
    reader.skip(4)
    version = reader.scalar(_U32)
    if version & 0xFFFF == 0 and version:
        raise StackctlError(
            f"{reader.path} is a big-endian GGUF file",
            hint="convert it for this machine's byte order, or get the little-endian file",
        )
    if version not in (2, 3):
        raise StackctlError(
            f"{reader.path} has GGUF version {version}, versions 2 and 3 are supported",
            hint="get a current conversion of the model" if version == 1 else None,
        )
    return version


def _metadata(
    reader: _Reader, keys: int
) -> tuple[dict[str, GgufScalar], dict[str, GgufArray], dict[str, int]]:
    """Return the scalars, the arrays, and the length of each string that is too long to keep."""
    metadata: dict[str, GgufScalar] = {}
    arrays: dict[str, GgufArray] = {}
    long_texts: dict[str, int] = {}
    for _ in range(keys):
        key = reader.text(MAX_TEXT_BYTES, "a key")
        if not key:
            raise reader.bad("it has an empty key")
        if key in metadata or key in arrays or key in long_texts:
            raise reader.bad(f"key {key!r} is there twice")
        kind = reader.scalar(_U32)
        if kind == _ARRAY:
            arrays[key] = _array(reader, key)
        elif kind == _STRING:
            length = reader.scalar(_U64)
            if length > MAX_TEXT_BYTES:
                reader.skip(length)
                long_texts[key] = length
            else:
                metadata[key] = reader.take(length)
        elif kind in _SCALARS:
            metadata[key] = reader.scalar(_SCALARS[kind][1])
        else:
            raise reader.bad(f"key {key!r} has the unknown type {kind}")
    return metadata, arrays, long_texts


def _array(reader: _Reader, key: str) -> GgufArray:
    kind, length = reader.scalar(_U32), reader.scalar(_U64)
    if kind == _STRING:
        reader.skip_strings(length)
        return GgufArray("string", length)
    if kind not in _SCALARS:
        what = "holds arrays" if kind == _ARRAY else f"has elements of the unknown type {kind}"
        raise reader.bad(f"array {key!r} {what}")
    element, form = _SCALARS[kind]
    if length * form.size > reader.size - reader.position:
        raise reader.cut()
    if kind in _FLOATS or length > MAX_ARRAY_KEPT:
        reader.skip(length * form.size)
        return GgufArray(element, length)
    reader.keep(length * 40)  # bytes of a Python integer and of its place in the tuple
    return GgufArray(element, length, reader.values(struct.Struct(f"<{length}{form.format[1:]}")))


def _tensors(reader: _Reader, count: int, alignment: int) -> tuple[TensorSummary, int]:
    """Return the summary and the bytes of the data section, without padding at its end."""
    names: set[str] = set()
    counts: Counter[str] = Counter()
    elements_by_type: Counter[str] = Counter()
    tables: dict[str, tuple[int, int]] = {}
    total = experts = expert_elements = end = 0
    for _ in range(count):
        name = reader.text(MAX_NAME_BYTES, "the name of a tensor")
        if name in names:
            raise reader.bad(f"tensor {name!r} is there twice")
        names.add(name)
        dims = reader.scalar(_U32)
        if dims > MAX_DIMS:
            raise reader.bad(f"tensor {name!r} has {dims} dimensions")
        *shape, kind, offset = reader.values(_TENSOR_TAIL[dims])
        if kind not in TENSOR_TYPES:
            raise _unknown_type(reader.path, name, kind)
        label, block, block_bytes = TENSOR_TYPES[kind]
        elements = math.prod(shape)
        if elements > MAX_SIZE or (shape[0] if shape else 1) % block:
            raise reader.bad(f"tensor {name!r} of type {label} has the shape {shape}")
        size = elements // block * block_bytes
        # Tensors follow each other without gaps. The reference engine refuses other files too.
        start = _padded(end, alignment)
        if offset != start:
            raise reader.bad(f"tensor {name!r} is at offset {offset}, not at {start}")
        end = start + size
        total += size
        if end > MAX_SIZE:
            raise reader.bad(f"its tensors add up to {end} bytes")
        if "_exps." in name:
            experts += size
            expert_elements += elements
        elif name in TABLES:
            tables[name] = (elements, size)
        counts[label] += 1
        elements_by_type[label] += elements
    summary = TensorSummary(
        count=count,
        elements=elements_by_type.total(),
        bytes=total,
        expert_elements=expert_elements,
        expert_bytes=experts,
        tables=MappingProxyType(tables),
        counts=MappingProxyType(dict(counts)),
        elements_by_type=MappingProxyType(dict(elements_by_type)),
    )
    return summary, end


def _unknown_type(path: str, name: str, kind: int) -> StackctlError:
    if kind in REMOVED_TYPES:
        return StackctlError(
            f"{path} has tensor {name!r} of GGML type {kind}, which GGML has removed",
            hint="get a current conversion of the model",
        )
    return StackctlError(
        f"{path} has tensor {name!r} of the unknown GGML type {kind}",
        hint="the file is damaged, or made for a fork or a newer version of GGML",
    )


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
