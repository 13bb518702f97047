"""Profiles: search, reading, inheritance, overrides and checks."""

from __future__ import annotations

import copy
import ipaddress
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import msgspec

from stackctl import engines
from stackctl.errors import ExitCode, StackctlError, did_you_mean
from stackctl.machine import path_security
from stackctl.quantity import parse_bytes
from stackctl.resources import data_folder
from stackctl.sources import strict_yaml
from stackctl.sources.profile_keys import (
    SWITCHES,
    check_argument_name,
    known_keys,
    parse_overrides,
)
from stackctl.values.profile import (
    NAME_PATTERN,
    EngineArgument,
    Objective,
    Overrides,
    PlacementRequest,
    Profile,
    ProfileFile,
    Slo,
)

_UNKNOWN = re.compile(r"unknown field `(?P<key>[^`]*)`")
_AT = re.compile(r" - at `(?P<path>\$[^`]*)`$")


class Profiles:
    """The profiles in a list of folders; earlier folders win.

    Root refuses profiles that other users can change. Exceptions are the folder ``chosen`` on the
    command line, and the folder of a profile whose path was given.
    """

    def __init__(self, folders: Sequence[Path], *, chosen: Path | None = None) -> None:
        self._folders = tuple(folders)
        # Profiles that ship with the program are as safe as the program.
        self._trusted = {chosen, data_folder("profiles")}

    def names(self) -> tuple[str, ...]:
        """Return the names of all profiles, sorted."""
        found = {
            path.stem
            for folder in self._folders
            for path in folder.glob("*.yaml")
            if re.fullmatch(NAME_PATTERN, path.stem)
        }
        return tuple(sorted(found))

    def resolve(self, name: str, overrides: Overrides) -> Profile:
        """Read a profile and the profiles that it extends; apply its objective and the overrides.

        ``name`` is a profile's name, or the path of a YAML file.

        Raises:
            StackctlError: exit 4 if there is no such profile, exit 2 if it is not valid or is
                refused because another user can change it.
        """
        own, chain = self._read_chain(name)
        return _apply(own, chain, overrides)

    def keys_by_objective(self, name: str, overrides: Overrides) -> frozenset[str]:
        """Return the keys whose values a profile has from its objective, nested ones with a dot.

        Raises as ``resolve``.
        """
        _, chain = self._read_chain(name)
        data = _merge_chain(chain)
        objective, _ = _for_objective(dict(data), overrides.objective)
        own = _without_nulls((data.get("objectives") or {}).get(objective) or {})
        _, given = parse_overrides(overrides)
        return frozenset(_paths(own)) - set(given)

    def _read_chain(self, name: str) -> tuple[str, list[tuple[Path, dict[str, Any]]]]:
        """Return the name of a profile, and path and data of it and all that it extends."""
        if "/" in name or name.endswith((".yaml", ".yml")):
            path = Path(name)
            if not path.is_file():
                raise StackctlError(f"no such file: {name}", exit_code=ExitCode.NOT_FOUND)
            here = path.parent.resolve()
            others = (folder for folder in self._folders if folder.resolve() != here)
            chain = self._chain(path, (path.parent, *others), 1, {path.parent})
            own = path.stem
        else:
            path, rest = self._find(name, self._folders)
            chain = self._chain(path, self._folders, rest)
            own = name
        return _require_name(own, "profile"), chain

    def _find(self, name: str, folders: Sequence[Path], start: int = 0) -> tuple[Path, int]:
        for number in range(start, len(folders)):
            path = folders[number] / f"{name}.yaml"
            if path.is_file():
                return path, number + 1
        raise StackctlError(
            f"no profile named {name}",
            hint=did_you_mean(name, self.names(), "profiles: " + ", ".join(self.names())),
            exit_code=ExitCode.NOT_FOUND,
        )

    def _chain(
        self, path: Path, folders: Sequence[Path], after: int, named: Collection[Path] = ()
    ) -> list[tuple[Path, dict[str, Any]]]:
        """Return path and data of a profile and of all that it extends, most specific first.

        ``after`` is the number of the folder behind the profile's own; ``named`` are folders that
        the user has given.
        """
        chain: list[tuple[Path, dict[str, Any]]] = []
        while True:
            if path.parent not in self._trusted and path.parent not in named:
                path_security.require_root_only(
                    path,
                    "profile",
                    f"move it to /etc/stackctl/profiles (chown root), or --profiles {path.parent}",
                )
            if chain or not named:
                path_security.reject_foreign_symlink(path)
            document = _read(path)
            chain.append((path, document.data))
            parent = document.data.get("extends")
            if parent is None:
                return chain
            # A profile that extends its own name extends the one that it hides, in a later folder.
            start = after if parent == path.stem else 0
            try:
                path, after = self._find(parent, folders, start)
            except StackctlError as error:
                raise document.error(("extends",), error.message, error.hint) from None
            if any(path == seen for seen, _ in chain):
                names = " -> ".join(seen.stem for seen, _ in chain)
                raise document.error(
                    ("extends",), f"profiles extend each other: {names} -> {parent}"
                )


def profile_schema() -> dict[str, Any]:
    """Return the JSON Schema of a profile file, made from the types that check it."""
    schema = msgspec.json.schema(ProfileFile)
    # The registry has the names of the engines, the types have not.
    names = {"type": "string", "enum": sorted(engines.ENGINES)}
    schema["$defs"]["ProfileFile"]["properties"]["engine"]["anyOf"][0] = names
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _read(path: Path) -> strict_yaml.YamlDocument:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StackctlError(
            f"cannot read {path}: {error.strerror}", exit_code=ExitCode.USAGE
        ) from None
    except UnicodeDecodeError:
        raise StackctlError(f"{path} is not UTF-8 text", exit_code=ExitCode.USAGE) from None
    document = strict_yaml.parse_document(text, where=str(path), switches=SWITCHES)
    if not isinstance(document.data, dict):
        raise document.error((), "a profile is a mapping of keys to values")
    _check(document)
    return document


def _check(document: strict_yaml.YamlDocument) -> None:
    try:
        msgspec.convert(document.data, ProfileFile, strict=True)
    except msgspec.ValidationError as error:
        raise _explain(document, str(error)) from None
    engine = document.data.get("engine")
    if engine is not None and engine not in engines.ENGINES:
        raise document.error(
            ("engine",), f"engine: unknown engine {engine!r}", engines.suggestion(engine)
        )
    for path in (("engine_args",), ("objectives", "latency", "engine_args"),
                 ("objectives", "throughput", "engine_args")):  # fmt: skip
        data: Any = document.data
        for key in path:
            data = data.get(key) or {} if isinstance(data, dict) else {}
        for key in data:
            check_argument_name(key, document.error((*path, key), f"engine option {key!r}"))


def _explain(document: strict_yaml.YamlDocument, text: str) -> StackctlError:
    """Return an error with file, line, key and suggestion for a message of msgspec."""
    path: strict_yaml.Path = ()
    if at := _AT.search(text):
        steps = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", at["path"])
        path = tuple(int(number) if number else key for key, number in steps)
        text = text[: at.start()]
    if unknown := _UNKNOWN.search(text):
        known = known_keys(path)
        key = unknown["key"]
        hint = did_you_mean(key, known, "keys: " + ", ".join(known))
        return document.error((*path, key), f"unknown key {key!r}", hint)
    label = ".".join(str(step) for step in path if step != "...")
    readable = text.replace("`", "").replace("Expected", "expected").replace("Invalid", "invalid")
    return document.error(path, f"{label}: {readable}" if label else readable)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key and replace other values. Nulls stay, see ``_without_nulls``."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = result.get(key)
            result[key] = _merge(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _without_nulls(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return merged data without nulls. A null revokes the value of a less specific file."""
    return {
        key: _without_nulls(value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if value is not None
    }


def _merge_chain(chain: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for _, part in reversed(chain):
        data = _merge(data, part)
    return data


def _paths(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of data, those of a mapping below with a dot."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{below}" for below in _paths(value))
        else:
            yield key


def _apply(name: str, chain: list[tuple[Path, dict[str, Any]]], overrides: Overrides) -> Profile:
    """Return the profile that a chain of files (most specific first) and overrides make."""
    data = _merge_chain(chain)
    data.pop("extends", None)
    objective, data = _for_objective(data, overrides.objective)
    changed, keys = parse_overrides(overrides)
    settings = _settings(_without_nulls(_merge(data, changed)))
    served = settings.served_name
    names = served if isinstance(served, list) else [served] if served is not None else []
    return Profile(
        name=name,
        description=settings.description,
        engine=_engine(settings.engine, chain[0][0]),
        stack=_require_name(
            settings.stack or name if overrides.name is None else overrides.name, "stack"
        ),
        objective=objective,
        model=settings.model,
        image=settings.image,
        context=settings.context,
        concurrency=settings.concurrency,
        kv_type=settings.kv_type,
        gpu_reserve_bytes=parse_bytes(settings.gpu_reserve or "4 GiB"),
        slo=settings.slo or Slo(),
        port=settings.port,
        address=_address(settings.address),
        api_key=settings.api_key or False,
        front_door=settings.front_door or "auto",
        served_name=names[0] if names else None,
        other_names=tuple(names[1:]),
        placement=settings.placement or PlacementRequest(),
        trust_remote_code=settings.trust_remote_code or False,
        engine_args=tuple(
            EngineArgument(name=key, values=_values(value))
            for key, value in settings.engine_args.items()
        ),
        overrides=keys,
        files=tuple(str(path) for path, _ in chain),
    )


def _for_objective(data: dict[str, Any], asked: str | None) -> tuple[Objective, dict[str, Any]]:
    """Return the objective and the data with its settings merged in.

    Raises:
        StackctlError: exit 2 for an objective that does not exist.
    """
    objectives = data.pop("objectives", None) or {}
    own = data.pop("objective", None)
    objective = asked or own or "latency"
    if objective not in get_args(Objective):
        raise StackctlError(
            f"{objective!r} is not an objective",
            hint="latency or throughput",
            exit_code=ExitCode.USAGE,
        )
    return cast(Objective, objective), _merge(data, objectives.get(objective) or {})


def _settings(data: dict[str, Any]) -> ProfileFile:
    """Return merged data as settings. Raises StackctlError (exit 2) for a wrong override."""
    try:
        return msgspec.convert(data, ProfileFile, strict=True)
    except msgspec.ValidationError as error:
        # Every file was checked on its own, so this error comes from the command line.
        raise _explain(strict_yaml.YamlDocument(data, {}, "--set"), str(error)) from None


def _engine(name: str | None, file: Path) -> str:
    """Return the name of an engine. Raises StackctlError (exit 2) if it is missing or unknown."""
    if name is None:
        raise StackctlError(
            f"{file}: key 'engine' is missing",
            hint="engines: " + ", ".join(engines.ENGINES),
            exit_code=ExitCode.USAGE,
        )
    if name not in engines.ENGINES:
        # Every file was checked on its own, so this name is from the command line.
        raise StackctlError(
            f"--set engine: unknown engine {name!r}",
            hint=engines.suggestion(name),
            exit_code=ExitCode.USAGE,
        )
    return name


def _require_name(name: str, what: str) -> str:
    """Return a name of a profile or stack. Raises StackctlError (exit 2) if it is not valid."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise StackctlError(
            f"{name!r} is not a {what} name",
            hint="lower-case letters, digits and dashes, 40 at most",
            exit_code=ExitCode.USAGE,
        )
    return name


def _address(text: str | None) -> str:
    """Return an IP address in its usual form; the default is 127.0.0.1.

    Host names are refused, because their address may change.
    """
    if text is None:
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise StackctlError(
            f"address: {text!r} is not an IP address",
            hint="127.0.0.1 for this machine only, 0.0.0.0 for all its addresses",
            exit_code=ExitCode.USAGE,
        ) from None


def _values(value: Any) -> tuple[bool | int | float | str, ...] | None:
    if value is False:
        return None
    if value is True:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
