"""Memory modules from the firmware's tables (SMBIOS type 17), and known processors' channels.

How many channels are in use is not in the tables: modules name their place in words that every
maker chooses. The rule here: where the processor is known, as many channels as it has, or as there
are modules if those are fewer; else the channels that the names tell apart, if each name tells.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Firmware tables of the largest machines have some hundred KiB.
MOST_BYTES = 2**20
_MOST_MODULES = 1024
_MEMORY_DEVICE, _END = 17, 127
#: LPDDR to LPDDR5: soldered, in channels of 16 or 32 bits, which the tables do not tell apart.
_SOLDERED = frozenset({0x1B, 0x1C, 0x1D, 0x1E, 0x23})
#: Memory technology: NVDIMM-F, NVDIMM-P and Optane, which are no main memory.
_NO_DRAM = frozenset({5, 6, 7})
_UNKNOWN_SPEED = 0xFFFF

_SOCKET = r"(?:(?:CPU|PROCESSOR|PROC|SOCKET|NODE|P)[ _-]?([0-9]{1,2}))?"
_CHANNELS = (
    re.compile(
        rf"(?<![A-Z0-9]){_SOCKET}[^,]{{0,20}}?CH(?:ANNEL)?[ _-]?([A-Z]|[0-9]{{1,2}})(?![A-Z0-9])"
    ),
    re.compile(rf"(?<![A-Z0-9]){_SOCKET}[ _-]?DIMM[ _-]?([A-Z])[0-9]{{1,2}}\b"),
)


@dataclass(frozen=True)
class Module:
    """One memory module that is plugged in."""

    #: Where it is, in the maker's words: bank and slot.
    place: str
    #: Transfers a second in millions, as configured; None when the firmware does not say.
    speed: int | None
    soldered: bool


@dataclass(frozen=True)
class Family:
    """Memory channels of a processor family: of one socket."""

    name: str
    channels: int
    speed: int


#: First and last character of an EPYC's number. The fastest memory that each supports, as AMD
#: specifies it: with slower or fewer modules the real figure is lower.
_EPYC = {
    "71": Family("EPYC Naples", 8, 2666),
    "72": Family("EPYC Rome", 8, 3200),
    "73": Family("EPYC Milan", 8, 3200),
    "84": Family("EPYC Siena", 6, 4800),
    "94": Family("EPYC Genoa", 12, 4800),
    "95": Family("EPYC Turin", 12, 6000),
}
#: Numbers that differ from their family: None where less bandwidth than the channels' is wired.
_EPYC_EXCEPTIONS: dict[str, Family | None] = {
    "7251": Family("EPYC Naples", 8, 2400),
    "7252": None, "7272": None, "7282": None,
    # The reference machine: 12 channels of DDR5-6400.
    "9175": Family("EPYC Turin", 12, 6400),
}  # fmt: skip
_MODEL = re.compile(r"\bEPYC ([789][0-9A-Z]{2}[0-9])[A-Z]{0,2}\b")


def family(model: str | None) -> Family | None:
    """The family of a processor by its name; None for what is not in the table."""
    match = _MODEL.search(model or "")
    if match is None:
        return None
    number = match[1]
    if number in _EPYC_EXCEPTIONS:
        return _EPYC_EXCEPTIONS[number]
    return _EPYC.get(number[0] + number[-1])


def modules(table: bytes) -> tuple[Module, ...]:
    """The memory modules of a table. Damaged structures end the reading; nothing raises."""
    table = table[:MOST_BYTES]
    found: list[Module] = []
    at = 0
    while at + 4 <= len(table) and len(found) < _MOST_MODULES:
        kind, length = table[at], table[at + 1]
        if length < 4 or kind == _END:
            break
        body = table[at : at + length]
        texts = table.find(b"\0\0", at + length)
        if texts < 0:
            texts = len(table)
        if kind == _MEMORY_DEVICE:
            module = _module(body, table[at + length : texts])
            if module is not None:
                found.append(module)
        at = texts + 2
    return tuple(found)


def channels_in_use(found: tuple[Module, ...], known: Family | None, sockets: int) -> int | None:
    """How many memory channels hold modules, by the rule above; None when it cannot be said."""
    if not found or any(module.soldered for module in found):
        return None
    if known is not None:
        return min(len(found), known.channels * sockets)
    names = {_channel(module.place) for module in found}
    # More than three modules never share a channel: then the names mean something else.
    if None in names or 3 * len(names) < len(found):
        return None
    return len(names)


def slowest(found: tuple[Module, ...]) -> int | None:
    """The speed that all modules run at; None when one does not say."""
    speeds = [module.speed for module in found if module.speed]
    return min(speeds) if speeds and len(speeds) == len(found) else None


def _module(body: bytes, texts: bytes) -> Module | None:
    if _word(body, 0x0C) in (None, 0):
        return None
    if len(body) > 0x28 and body[0x28] in _NO_DRAM:
        return None
    strings = texts.split(b"\0", 255)
    place = ", ".join(_string(body, at, strings) for at in (0x11, 0x10))
    speed = _speed(body, 0x20, 0x58) or _speed(body, 0x15, 0x54)
    soldered = len(body) > 0x12 and body[0x12] in _SOLDERED
    return Module(place.strip(", "), speed, soldered)


def _speed(body: bytes, at: int, extended: int) -> int | None:
    speed = _word(body, at)
    if speed == _UNKNOWN_SPEED:
        speed = int.from_bytes(body[extended : extended + 4], "little") & 0x7FFFFFFF
    # Nothing is faster than some ten thousand; what is says nothing.
    return speed if speed and speed < 100_000 else None


def _word(body: bytes, at: int) -> int | None:
    return int.from_bytes(body[at : at + 2], "little") if at + 2 <= len(body) else None


def _string(body: bytes, at: int, strings: list[bytes]) -> str:
    number = body[at] if at < len(body) else 0
    if not 0 < number <= len(strings):
        return ""
    text = strings[number - 1][:64].decode("ascii", "replace")
    return "".join(char for char in text if char.isprintable()).strip()


def _channel(place: str) -> tuple[str, str] | None:
    for pattern in _CHANNELS:
        match = pattern.search(place.upper())
        if match:
            return match[1] or "", match[2]
    return None
