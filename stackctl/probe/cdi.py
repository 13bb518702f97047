"""CDI files: the devices that they describe, and the reasons why podman cannot use them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec

from stackctl.probe.fact_reader import FactReader, sanitize
from stackctl.quantity import version_numbers
from stackctl.requirements.cdi import PODMAN_WITH_GIDS
from stackctl.values.host import CdiProblemCode, CdiSpec

_Problem = tuple[CdiProblemCode, str]

#: Later folders take precedence: files made at boot override files written by hand.
_FOLDERS = ("/etc/cdi", "/run/cdi", "/var/run/cdi")
#: The file of a machine with eight GPUs has some 50 KiB.
_MOST_BYTES = 256 * 1024
_MOST_ITEMS = 2048
_MOST_FILES = 64
#: Nesting costs the parser memory and stack; these files are four levels deep.
_MOST_BRACKETS, _WIDEST_LINE, _DEEPEST_INDENT = 4096, 4096, 200
#: The first version with each field.
_NEW_FIELDS = {"additionalGids": "0.7.0", "intelRdt": "0.7.0"}
#: The newest version that podman parses before each of its versions (its go.mod at each tag).
_NEWEST_CDI = ((PODMAN_WITH_GIDS, (0, 6)), ((5, 2), (0, 7)), ((5, 6), (0, 8)))


def probe_cdi(reader: FactReader, podman: str | None) -> tuple[CdiSpec, ...]:
    """Return every CDI file, with its devices and the first problem that podman has with it.

    ``podman`` is its version; if it is None, the versions are not compared.
    """
    found: list[CdiSpec] = []
    texts: set[tuple[str, str]] = set()
    for folder in _FOLDERS:
        owners: dict[str, str] = {}
        for path in _files(reader, folder):
            text = reader.text(path)
            name = path.rpartition("/")[2]
            if text is None:
                found.append(CdiSpec(path=path, code="unreadable", problem="it cannot be read"))
            elif (name, text) not in texts:
                # /var/run is a link to /run nearly everywhere.
                texts.add((name, text))
                spec = check_cdi_file(reader, path, text, podman)
                found.append(_unique(spec, owners))
    return tuple(found)


def check_cdi_file(reader: FactReader, path: str, text: str, podman: str | None) -> CdiSpec:
    """Return the devices of one file, and the first problem that keeps podman from using them."""
    try:
        document = parse_cdi(text, yaml=not path.endswith(".json"))
    except ValueError as error:
        return CdiSpec(
            path=path,
            code="unparsable",
            problem=f"it cannot be parsed: {sanitize(str(error), most=120)}",
        )
    version, kind = document.get("cdiVersion"), document.get("kind")
    if not isinstance(kind, str) or not re.fullmatch(r"[\w.-]{1,60}/[\w.-]{1,60}", kind):
        return CdiSpec(
            path=path, version=_word(version), code="no-kind", problem="it has no valid kind"
        )
    devices = [item for item in _items(document.get("devices")) if isinstance(item, dict)]
    names = [name for device in devices if (name := _word(device.get("name")))]
    edits = [_dict(document.get("containerEdits"))]
    edits += [_dict(device.get("containerEdits")) for device in devices]
    problems = (
        _too_new(version, edits, podman),
        _other_driver(reader, edits),
        _missing(reader, edits),
    )
    unnamed: _Problem | None = None if names else ("no-devices", "it names no devices")
    code, problem = next(filter(None, (*problems, unnamed)), (None, None))
    return CdiSpec(
        path=path,
        version=_word(version),
        devices=tuple(f"{kind}={name}" for name in names),
        code=code,
        problem=problem,
    )


def parse_cdi(text: str, *, yaml: bool) -> dict[str, Any]:
    """Parse a mapping in JSON or YAML, in bounded time and memory.

    Raises:
        ValueError: the text is too long, nested too deeply, damaged or not a mapping.
    """
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it is longer than {_MOST_BYTES} bytes")
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise ValueError("it is nested too deeply")
    try:
        document = _yaml(text) if yaml else json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("it is not a mapping")
    return document


def _yaml(text: str) -> Any:
    if "<<" in text:
        # Merge keys can multiply the size of a document. No tool writes them.
        raise ValueError("it merges keys (<<)")
    for line in text.splitlines():
        if len(line) > _WIDEST_LINE or len(line) - len(line.lstrip(" ")) > _DEEPEST_INDENT:
            raise ValueError("it is nested too deeply")
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # The safe loader raises more than its own errors on odd tags, keys, dates and numbers.
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None


def _files(reader: FactReader, folder: str) -> tuple[str, ...]:
    """Return the files that podman reads in a folder; it ignores other endings, such as .yml."""
    found = reader.machine.glob(f"{folder}/*")
    return tuple(path for path in found if path.endswith((".json", ".yaml")))[:_MOST_FILES]


def _unique(spec: CdiSpec, owners: dict[str, str]) -> CdiSpec:
    """Mark a file that repeats a device of another file in its folder; podman uses neither."""
    twice = next((name for name in spec.devices if name in owners), None)
    for name in spec.devices:
        owners.setdefault(name, spec.path)
    if twice is None or spec.problem is not None:
        return spec
    return msgspec.structs.replace(
        spec,
        code="duplicate-device",
        problem=f"{twice} is also in {owners[twice]}: podman takes neither; remove one file",
    )


def _too_new(version: Any, edits: list[dict[str, Any]], podman: str | None) -> _Problem | None:
    if podman is None:
        return None
    limits = (limit for below, limit in _NEWEST_CDI if version_numbers(podman) < below)
    newest = next(limits, None)
    if newest is None:
        return None
    used = (name for name in _NEW_FIELDS if any(name in edit for edit in edits))
    later = next((name for name in used if version_numbers(_NEW_FIELDS[name]) > newest), None)
    if later is not None:
        return (
            "additional-gids" if later == "additionalGids" else "newer-cdi",
            f"it has {later} (CDI {_NEW_FIELDS[later]}), which podman {podman} cannot parse",
        )
    if isinstance(version, str) and version_numbers(version) > newest:
        return (
            "newer-cdi",
            f"it is CDI {sanitize(version, most=20)}, podman {podman} parses "
            f"{'.'.join(map(str, newest))} at most",
        )
    return None


def _other_driver(reader: FactReader, edits: list[dict[str, Any]]) -> _Problem | None:
    """Return a problem if the file mounts the library of a driver that is not the loaded one."""
    loaded = reader.line("/sys/module/nvidia/version")
    mounts = (mount for edit in edits for mount in _items(edit.get("mounts")))
    for mount in islice(mounts, _MOST_ITEMS):
        match = re.search(
            r"/libcuda\.so\.([0-9]+(?:\.[0-9]+)+)$", str(_dict(mount).get("hostPath"))
        )
        if match and loaded and match[1] != loaded:
            return (
                "other-driver",
                f"it is for driver {match[1][:20]}, loaded is {loaded}: generate it again",
            )
    return None


def _missing(reader: FactReader, edits: list[dict[str, Any]]) -> _Problem | None:
    """Return a problem for the first file that the CDI file gives to containers and is absent."""
    for key in ("deviceNodes", "mounts"):
        if not reader.machine.live:
            # A recording holds only some files of the machine, so an absent file may have existed.
            break
        nodes = (node for edit in edits for node in _items(edit.get(key)))
        seen: set[str] = set()
        for node in islice(nodes, _MOST_ITEMS):
            place = _dict(node).get("hostPath") or _dict(node).get("path")
            if not isinstance(place, str) or not place.startswith("/") or place in seen:
                continue
            seen.add(place)
            if not reader.exists(place):
                return (
                    "missing-file",
                    f"{sanitize(place, most=100)} does not exist: generate it again",
                )
    return None


def _items(value: Any) -> Iterable[Any]:
    return value[:_MOST_ITEMS] if isinstance(value, list) else ()


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _word(value: Any) -> str | None:
    return sanitize(value, most=100) if isinstance(value, str) else None
