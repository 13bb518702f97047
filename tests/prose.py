"""Check the prose of Python code: docstrings, comments and names of classes.

Run it on a folder to list every offender: ``python tests/prose.py stackctl/plan``. The rules and
their reasons are in docs/style.md.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: The highest rates of words in docstrings and comments, for each 1,000 words.
MOST_WHAT = 3.0
MOST_TELL = 1.0

TELL = frozenset({"tell", "tells", "told", "say", "says", "said"})

#: The verbs that a docstring may begin with. Add a verb when it is the plain word for the action;
#: "have", "tell", "say", "know" and "look" are missing on purpose.
_VERBS = """
abort accept account acknowledge acquire activate adapt add adjust advance advise allocate allow
alter answer append apply ask assemble assert assign assume attach attempt back begin benchmark bind
block borrow bring browse build bundle bypass cache calculate calibrate call cancel cap capture
carry certify chain change charge chart check choose claim clamp classify clean clear close collect
colour combine commit compare compile complete compose compress compute configure confirm connect
consider construct consume continue convert copy correct count cover create crop cut deactivate deal
decide declare decode deduce defer define delay delegate delete demand deny deploy derive describe
detach detect determine diagnose disable disallow discard disconnect display distribute divide do
download drain draw drop edit embed emit empty enable encode encrypt end enforce enter enumerate
erase escape establish estimate evaluate evict exchange exclude execute exit expand expect explain
export expose express extend extract fail fall feed fetch fill filter find finish fit fix flag
flatten flip flush fold follow force forget fork format forward free gate gather generate get give
go grant group guarantee guard guess halt hand handle hash hide highlight hint hold identify ignore
implement import include increase indent infer inform inherit initialise insert inspect install
interleave interpret interrupt intersect invalidate invoke isolate iterate join judge keep kick kill
label launch lay lead leave lend let lift limit link list listen load locate lock log lower make map
mark match measure merge migrate mirror mount move name narrow negotiate normalise note notify
number observe obtain offer omit open order output override pack pad paint pair parse pass pause
perform permit pick pin place plan plot point poke poll predict prefer prefix preload prepare
preserve pretend prevent print probe proceed process produce prompt prove provide provision prune
publish pull push put query queue quit quote raise rank reach read reap rebase rebuild recall
receive recognise recommend recompute reconcile reconnect record recover redact redirect redraw
reduce refresh refuse register reinstall reject relabel relax relay release reload remove rename
render renew reopen reorder repair repeat replace replay reply report request require resample
reserve reset resolve respond restart restate restore restrict resume retain retrieve retry return
reuse reveal revert revoke rewind rewrite roll rotate round route run sample sanitise satisfy save
scale scan scatter schedule score scrape search see select send separate serialise serve set settle
shift shorten show shrink shut sign signal simplify simulate size skip sleep slice sort spell split
spread stage stamp stand start stat state step stop store stream strip submit subscribe subset
subtract suggest sum summarise supply support suppress survive suspend swap switch sync synchronise
tag take terminate test throw tidy time tokenise touch trace track transfer transform translate
traverse treat trigger trim truncate trust try tune turn undo unify uninstall unlink unlock unmount
unpack unset unwrap update upgrade upload use validate verify view visit wait wake walk warm warn
watch weigh widen win wipe wire withdraw wrap write yield
"""
VERBS = frozenset(_VERBS.split())

#: After one of these the first word is a noun: "Start of the log", "List of names".
NOUN_BEFORE = frozenset({"of"})


@dataclass(frozen=True)
class Text:
    """One docstring or one comment."""

    path: Path
    line: int
    text: str


@dataclass(frozen=True)
class Rates:
    """Counts of words in docstrings and comments."""

    words: int
    what: int
    tell: int
    whether: int

    @property
    def what_rate(self) -> float:
        """Return how often "what" comes in 1,000 words."""
        return 1000 * self.what / max(self.words, 1)

    @property
    def tell_rate(self) -> float:
        """Return how often tell, told, say and said come in 1,000 words."""
        return 1000 * self.tell / max(self.words, 1)


def modules(folder: Path) -> list[Path]:
    """Return the Python files in a folder, or the file itself."""
    return [folder] if folder.is_file() else sorted(folder.rglob("*.py"))


def texts(path: Path) -> list[Text]:
    """Return the docstrings and comments of a file, in the order of their lines."""
    source = path.read_text("utf-8")
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append(Text(path, node.body[0].lineno, docstring))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.append(Text(path, token.start[0], token.string.lstrip("#: ")))
    return sorted(found, key=lambda text: text.line)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[a-z0-9_]+(?:'[a-z]+)?", text.lower())


def _is_what(word: str) -> bool:
    return word.partition("'")[0] == "what"


def rates(found: list[Text]) -> Rates:
    """Count the words that are measured."""
    counts = Counter(word for text in found for word in words(text.text))
    return Rates(
        words=sum(counts.values()),
        what=sum(number for word, number in counts.items() if _is_what(word)),
        tell=sum(counts[word] for word in TELL),
        whether=counts["whether"],
    )


def measured_lines(found: list[Text]) -> Iterator[str]:
    """Yield ``file:line: text`` for each line with a word that is measured."""
    for text in found:
        for offset, line in enumerate(text.text.splitlines()):
            if any(word in TELL or _is_what(word) for word in words(line)):
                yield f"{text.path}:{text.line + offset}: {line.strip()}"


def begins_with_verb(docstring: str) -> bool:
    """Check that the first word is a verb in the imperative, in British or American spelling."""
    found = re.match(r"([A-Z][a-z]+)\b\s*(\w*)", docstring)
    if found is None or found[2] in NOUN_BEFORE:
        return False
    first = found[1].lower()
    british = re.sub(r"ize$", "ise", first)
    return first in VERBS or british in VERBS or first.replace("or", "our") in VERBS


def public_functions(path: Path) -> Iterator[tuple[str, int, str | None]]:
    """Yield name, line and docstring of public functions, and of public methods and properties.

    Nested functions, names that begin with an underscore and members of private classes are not
    public.
    """

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, int, str | None]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if not node.name.startswith("_"):
                    yield prefix + node.name, node.lineno, ast.get_docstring(node)
            elif isinstance(node, ast.If | ast.Try):
                yield from walk([*node.body, *node.orelse], prefix)

    yield from walk(ast.parse(path.read_text("utf-8")).body, "")


def docstring_offenders(path: Path) -> Iterator[str]:
    """Yield ``file:line: name: docstring`` of public functions whose docstring lacks its verb."""
    for name, line, docstring in public_functions(path):
        if not docstring:
            yield f"{path}:{line}: {name}: no docstring"
        elif not begins_with_verb(docstring):
            yield f"{path}:{line}: {name}: {docstring.splitlines()[0]}"


def hints(paths: list[Path]) -> Iterator[str]:
    """Yield places that no rule refuses but that often read badly.

    These are lines with "whether", and docstrings of private and nested functions without a verb.
    """
    for path in paths:
        for text in texts(path):
            for offset, line in enumerate(text.text.splitlines()):
                if "whether" in words(line):
                    yield f"{path}:{text.line + offset}: {line.strip()}"
        public = {line for _, line, _ in public_functions(path)}
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.lineno not in public:
                docstring = ast.get_docstring(node)
                if docstring and not begins_with_verb(docstring):
                    yield f"{path}:{node.lineno}: {node.name}: {docstring.splitlines()[0]}"


def repeated_classes(paths: list[Path]) -> dict[str, list[str]]:
    """Return the public classes whose name is defined more than once, with their places."""
    places: dict[str, list[str]] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    return {name: found for name, found in sorted(places.items()) if len(found) > 1}


def main() -> int:
    """Print the offenders of a folder and its rates; return 1 when a rule is broken."""
    parser = argparse.ArgumentParser(description="Check docstrings, comments and class names.")
    parser.add_argument("folder", type=Path, nargs="+", help="a folder or a file")
    parser.add_argument("--hints", action="store_true", help="list more that may read badly")
    arguments = parser.parse_args()
    folders: list[Path] = arguments.folder
    paths = [path for folder in folders for path in modules(folder)]
    found = [text for path in paths for text in texts(path)]
    offenders = [line for path in paths for line in docstring_offenders(path)]
    for line in measured_lines(found):
        print(f"word       {line}")
    for line in offenders:
        print(f"docstring  {line}")
    for line in hints(paths) if arguments.hints else ():
        print(f"hint       {line}")
    repeated = repeated_classes(paths)
    for name, places in repeated.items():
        print(f"class      {name}: {', '.join(places)}")
    counted = rates(found)
    print(
        f"{counted.words} words: what {counted.what_rate:.1f} (at most {MOST_WHAT:g}), "
        f"tell/say {counted.tell_rate:.1f} (at most {MOST_TELL:g}) in 1,000; "
        f"{counted.whether} whether; {len(offenders)} docstrings without a verb; "
        f"{len(repeated)} class names defined twice"
    )
    high = counted.what_rate > MOST_WHAT or counted.tell_rate > MOST_TELL
    return int(high or bool(offenders) or bool(repeated))


if __name__ == "__main__":
    sys.exit(main())
