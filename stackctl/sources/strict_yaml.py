"""A strict reader of YAML: plain data, and the line of every key for error messages.

Plain PyYAML accepts duplicate keys and reads ``on`` as true, ``010`` as 8 and ``1:30`` as 90. Here
each of these is an error with the right spelling in its hint.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import yaml

from stackctl.errors import ExitCode, StackctlError

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)\.[0-9]+([eE][-+]?[0-9]+)?")
_TAG = "tag:yaml.org,2002:"
#: More levels than a profile can have; bounds the recursion.
_MOST_DEPTH = 20

_KINDS = (
    "map", "seq", "str", "null", "bool", "int", "float", "timestamp", "merge", "value"
)  # fmt: skip
#: A number with this many digits fits into 64 bits.
_MOST_DIGITS = 18

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlDocument:
    """Plain data, and the line (from 1) of each key path; no lines for data of a command line.

    ``on`` and ``off`` are words, not booleans, for the keys in ``switches``.
    """

    data: Any
    lines: dict[Path, int]
    where: str
    switches: Collection[str] = ()

    def line(self, path: Path) -> int:
        """Return the line of a key path, or of its closest parent that has a line."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def error(self, path: Path, message: str, hint: str | None = None) -> StackctlError:
        """Return an error at a key path, with file and line."""
        place = f"{self.where}:{self.line(path)}:" if self.lines else self.where
        return StackctlError(f"{place} {message}", hint=hint, exit_code=ExitCode.USAGE)


class _Loader(yaml.SafeLoader):
    """A loader with a limit of depth, because PyYAML's time grows with the square of the depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node; raise yaml.MarkedYAMLError if it is nested too deeply."""
        self.depth += 1
        if self.depth > _MOST_DEPTH + 1:
            raise yaml.MarkedYAMLError(
                problem="nested too deeply",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_document(text: str, *, where: str, switches: Collection[str] = ()) -> YamlDocument:
    """Read one YAML document. Raises StackctlError (exit 2) with file and line.

    For the keys in ``switches``, ``on`` and ``off`` are words.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise StackctlError(
            f"{where}:{line}: {error.problem or error.context}", exit_code=ExitCode.USAGE
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StackctlError(f"{where}:1: {reason}", exit_code=ExitCode.USAGE) from None
    document = YamlDocument(None, {(): 1}, where, switches)
    data = _construct(node, (), document, set()) if node is not None else {}
    return dataclasses.replace(document, data=data)


def parse_scalar(text: str, *, where: str, switch: bool = False) -> Any:
    """Parse the value of a key from the command line, by the same rules.

    For a ``switch``, ``on`` and ``off`` are words.

    Raises:
        StackctlError: exit 2 if the value is not valid.
    """
    if switch and text in ("on", "off"):
        return text
    return parse_document(text, where=where).data if text.strip() else ""


def _construct(node: yaml.Node, path: Path, document: YamlDocument, seen: set[int]) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if len(path) > _MOST_DEPTH:
        raise document.error(path, "nested too deeply")
    if id(node) in seen:
        raise document.error(path, "anchors and aliases are not allowed", "write the value out")
    seen.add(id(node))
    # The plain keys << and = resolve to "merge" and "value".
    if node.tag.removeprefix(_TAG) not in _KINDS:
        raise document.error(path, f"tags such as {node.tag} are not allowed", "write plain values")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document, seen)
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(item, (*path, number), document, seen)
            for number, item in enumerate(node.value)
        ]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, path, document)


def _mapping(
    node: yaml.MappingNode, path: Path, document: YamlDocument, seen: set[int]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _TAG + "merge":
            document.lines[(*path, "?")] = line
            raise document.error((*path, "?"), "a key must be a plain word")
        key = key_node.value
        _require_text(key, path, document)
        where = (*path, key)
        if key in result:
            first = document.lines[where]
            document.lines[where] = line
            raise document.error(where, f"duplicate key {key!r} (first on line {first})")
        document.lines[where] = line
        result[key] = _construct(value_node, where, document, seen)
    return result


def _require_text(text: str, path: Path, document: YamlDocument) -> None:
    """Raise StackctlError for text with half of a surrogate pair, which an escape can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise document.error(path, f"{text[:24]!a} is not text") from None


def _scalar(node: yaml.ScalarNode, path: Path, document: YamlDocument) -> Any:
    text = node.value
    document.lines[path] = node.start_mark.line + 1
    kind = node.tag.removeprefix(_TAG)
    if node.style is not None or kind == "str":
        if node.tag.startswith("!") or kind not in ("str",):
            raise document.error(path, f"tags such as {node.tag} are not allowed")
        _require_text(text, path, document)
        return text
    if kind == "null":
        return None
    if kind == "bool":
        if text in ("true", "false"):
            return text == "true"
        if path and path[-1] in document.switches and text in ("on", "off"):
            return text
        meant = "true" if text.lower() in ("yes", "on", "y", "true") else "false"
        raise document.error(
            path,
            f"{text} means different things to different YAML readers",
            f'did you mean {meant}? For the word itself write "{text}"',
        )
    if kind == "int" and _DECIMAL.fullmatch(text):
        if len(text) > _MOST_DIGITS:
            raise document.error(path, f"{text[:24]}... is too large a number")
        return int(text)
    if kind == "float" and _FLOAT.fullmatch(text):
        return float(text)
    if kind in ("int", "float"):
        digits = text.replace("_", "").lstrip("0")
        meant = f"did you mean {digits}? " if digits.isdecimal() else ""
        raise document.error(
            path, f"{text} is not a plain decimal number", f'{meant}For text write "{text}"'
        )
    raise document.error(path, f"{text} would be read as a {kind}", f'write "{text}"')
