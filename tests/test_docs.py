"""The documents: generated parts, links and paths."""

from __future__ import annotations

import re
from pathlib import Path

import profile_keys
import pytest
import reference

from stackctl.requirements import ITEMS
from stackctl.units.quadlet import OLDEST, OLDEST_TEXT

ROOT = Path(__file__).resolve().parent.parent


def documents() -> list[Path]:
    """Return the README, the changelog and all pages."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", reference.documents(), ids=lambda path: path.name)
def test_generated_documents_are_current(path: Path) -> None:
    assert path.is_file() and path.read_text("utf-8") == reference.documents()[path], (
        "run: make reference"
    )


def test_the_reference_of_profile_keys_is_complete() -> None:
    current = profile_keys.TARGET.read_text("utf-8")
    for path in ("slo.ttft_s", "placement.cpu_experts", "objectives.throughput", "engine_args"):
        assert f"| `{path}` |" in current
    assert not re.search(r"\| *\|$", current, re.MULTILINE), "a key without a description"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200


def test_links_between_documents_lead_somewhere() -> None:
    wrong = []
    for path in documents():
        text = path.read_text("utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            if "://" in file:
                continue
            found = path.parent / file if file else path
            if not found.exists():
                wrong.append(f"{path.relative_to(ROOT)}: {target}")
            elif anchor and anchor not in _anchors(found):
                wrong.append(f"{path.relative_to(ROOT)}: no heading {target}")
    assert not wrong, "\n".join(wrong)


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_oldest_podman_is_the_same_everywhere() -> None:
    for path, words in (
        ("README.md", r"Podman ([0-9.]+) or\snewer"),
        ("docs/fresh-epyc-box.md", r"podman before ([0-9.]+) \|.*install podman \1 or newer"),
    ):
        assert re.findall(words, (ROOT / path).read_text("utf-8")) == [OLDEST_TEXT], path
    # The demo's script cannot import stackctl before its environment exists.
    demo = (ROOT / "tests/lab/demo.py").read_text("utf-8")
    assert f"\nOLDEST_PODMAN = {OLDEST}\n" in demo


#: ``stackctl/plan/planner.py`` or ``stackctl/plan/planner.py::make_plan``, as in documents.
PLACE = re.compile(
    r"`((?:stackctl|tests|docs|templates|profiles|systemd|man)/[^`\s:]*)(?:::(\w+))?`"
)
#: ``state/paths.py``: a module by its path in stackctl/.
MODULE = re.compile(r"`(\w+/[\w/]+\.py)`")
#: ``ProvisionItem``, ``_READ_BYTES_S``, ``cause_and_fix``. Other words can be anything.
NAME = re.compile(r"`(?![A-Z]+_[a-z])(_\w+|\w+_\w+|[A-Z]\w*[a-z]\w*)(?:\([^`]*\))?`")
#: ``plan.planner``, ``transaction.reconcile``: a module in its folder, or a name in a module.
DOTTED = re.compile(r"`([a-z_]+)\.([a-z_]+)`")
GUIDES = ["architecture.md", "contributing.md"]


def sources(folder: str = "stackctl") -> dict[Path, str]:
    """Return the modules of a folder with their source."""
    return {path: path.read_text("utf-8") for path in sorted((ROOT / folder).rglob("*.py"))}


def is_defined(name: str, source: str) -> bool:
    """Return True if a class, function, constant, field or argument of that name is defined."""
    return (
        re.search(rf"^\s*(?:(?:def|class|async def) )?{name}\b\s*[\[(:=]", source, re.M) is not None
    )


@pytest.mark.parametrize("document", GUIDES)
def test_places_that_guides_name_exist(document: str) -> None:
    text = (ROOT / "docs" / document).read_text("utf-8")
    # A word in capitals stands for a name that the reader chooses.
    found = [place for place in PLACE.findall(text) if not re.search(r"/[A-Z]+(\.py|/)", place[0])]
    found += [
        (f"stackctl/{path}", "") for path in MODULE.findall(text) if not PLACE.match(f"`{path}`")
    ]
    assert len(found) > 20
    wrong = [path for path, _ in found if not (ROOT / path).exists()]
    for path, name in found:
        if name and path not in wrong and not is_defined(name, (ROOT / path).read_text("utf-8")):
            wrong.append(f"{path}::{name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", GUIDES)
def test_names_that_guides_use_are_defined(document: str) -> None:
    text = (ROOT / "docs" / document).read_text("utf-8")
    # The keys of JSON documents look like names.
    text = re.sub(r"^## JSON documents\n.*?^## ", "", text, flags=re.M | re.S)
    known = sources()
    wrong = {
        name
        for name in NAME.findall(text)
        if not any(is_defined(name, source) for source in known.values())
        and not any(re.search(rf"^from \w+ import .*\b{name}\b", s, re.M) for s in known.values())
    }
    for folder, name in DOTTED.findall(text):
        module = ROOT / "stackctl" / folder / f"{name}.py"
        holders = [source for path, source in known.items() if path.stem == folder]
        if not module.is_file() and not any(is_defined(name, source) for source in holders):
            wrong.add(f"{folder}.{name}")
    assert not wrong, sorted(wrong)


def test_the_list_of_json_documents_is_complete() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    (section,) = re.findall(r"^## JSON documents\n(.*?)^## ", text, re.M | re.S)
    (table,) = re.findall(r"^\| documents .*?\n\n", section, re.M | re.S)
    in_code = {
        kind
        for source in sources().values()
        for kind in re.findall(r'"stackctl\.([a-z-]+/\d+)"', source)
    }
    assert len(in_code) > 40
    assert set(re.findall(r"[a-z-]+/\d+", table)) == in_code


def test_the_table_of_items_is_complete() -> None:
    text = (ROOT / "docs" / "fresh-epyc-box.md").read_text("utf-8")
    (table,) = re.findall(r"^\| item .*?\n\n", text, re.M | re.S)
    rows = re.findall(r"^\| ([\w-]+) \|", table, re.M)
    assert set(rows) - {"item"} == set(ITEMS)
