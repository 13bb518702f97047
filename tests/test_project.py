"""The project as a whole: linters, layout, packaging."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from lab import trees

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent
TOP = {
    "pyproject.toml", "man", "stackctl", "templates", "profiles", "systemd", "tests", "README.md",
    "CHANGELOG.md", "LICENSE", "Makefile", "docs", "mkdocs.yml", ".ci", ".gitignore",
    "requirements",
}  # fmt: skip
MOST_LINES = 400
# Written in two parts, so that this file does not contain them.
REGISTRIES = [
    host + "." + end
    for host, end in (
        ("pypi", "org"), ("pythonhosted", "org"), ("deb.debian", "org"), ("snapshot.debian", "org"),
        ("archive.ubuntu", "com"), ("registry.npmjs", "org"), ("proxy.golang", "org"),
        ("static.crates", "io"), ("index.crates", "io"), ("dl-cdn.alpinelinux", "org"),
    )
]  # fmt: skip
BUILD_PATHS = ["/work" + "/"] + ([f"{ROOT}/"] if len(ROOT.parts) > 3 else [])


def run(*command: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Run a command and return its output. Fail with the output if the command fails."""
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, text=True, check=False, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}", pytrace=False)
    return done.stdout


def files() -> list[Path]:
    """Return every file of the project: those in git, and new ones that it does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    paths = (ROOT / name for name in listed.split("\0") if name)
    return sorted({path for path in paths if path.is_file()})


def modules() -> list[Path]:
    """Return the modules of stackctl."""
    return sorted((ROOT / "stackctl").rglob("*.py"))


# Documents


def test_every_test_that_the_threat_model_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text("utf-8")))
    assert len(named) > 25
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named <= set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))


# Linters


def test_ruff() -> None:
    run(sys.executable, "-m", "ruff", "check", "--quiet", ".")


def test_format() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types() -> None:
    run(sys.executable, "-m", "mypy", "--strict", "--no-error-summary")


def test_imports_point_one_way() -> None:
    run(str(SCRIPTS / "lint-imports"))


# Layout


def test_the_top_level_is_fixed() -> None:
    entries = {path.relative_to(ROOT).parts[0] for path in files()}
    assert entries <= TOP, f"not allowed at the top level: {sorted(entries - TOP)}"


#: Files outside stackctl/engines/ that may name an engine, each with its reason; five at most.
NAMING_ENGINES: dict[str, str] = {}


def test_only_engines_name_engines() -> None:
    """A rule that depends on the engine belongs into the engine's package, behind the protocol."""
    assert len(NAMING_ENGINES) <= 5
    naming = {
        str(path.relative_to(ROOT))
        for path in modules()
        if not path.is_relative_to(ROOT / "stackctl/engines")
        and re.search("vllm|llama", path.read_text("utf-8"), re.IGNORECASE)
    }
    assert naming == set(NAMING_ENGINES)


def test_modules_are_short_and_have_a_purpose() -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in modules()}
    long = {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines: {long}"
    names = {path.stem for path in modules()}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


#: The folders that may import modules which reach out of the process.
ONLY_IN = {
    "subprocess": "stackctl/machine/",
    "socket": "stackctl/machine/",
    "fcntl": "stackctl/machine/",
    "requests": "stackctl/machine/http.py",
    "podman": "stackctl/machine/podman_api.py",
    "yaml": "stackctl/sources/strict_yaml.py",
    "jinja2": "stackctl/units/render.py",
    "click": "stackctl/cli/",
    "rich": "stackctl/cli/",
}
#: Exceptions with their reasons.
ALSO_IN = {
    ("stackctl/probe/bandwidth.py", "subprocess"),  # starts workers of its own, one on each core
    ("stackctl/probe/cdi.py", "yaml"),  # other programs' files: read safely, not strictly
    ("stackctl/observe/client_settings.py", "yaml"),  # other programs' files too
    ("stackctl/observe/report/page.py", "jinja2"),  # a page, not a unit
}


def test_only_the_machine_touches_the_machine() -> None:
    wrong = []
    for path in modules():
        here = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for name in [module] if module else [alias.name for alias in node.names]:
                place = ONLY_IN.get(name.partition(".")[0])
                if (here, name) in ALSO_IN:
                    continue
                if place is not None and not here.startswith(place):
                    wrong.append(f"{here}:{node.lineno} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_lab_reads_the_code_that_makes_its_images() -> None:
    # The lab reads modules by their paths, to build an image anew if its recipe has changed.
    assert trees.vllm_key() != trees.engine_key() != trees.door_key()


def test_no_modules_import_each_other() -> None:
    """No modules import each other at any depth, so each can be read before the next."""
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in modules()}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    imports: dict[str, set[str]] = {}
    for name, path in paths.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # A name in a package is a module of it, or defined in its __init__.
                longer = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (longer & set(paths)) or {node.module or ""}
        imports[name] = (found & set(paths)) - {name}
    # A module without imports among the remaining ones cannot be part of a circle.
    while free := {name for name, found in imports.items() if not found & set(imports)}:
        for name in free:
            del imports[name]
    assert not imports, f"in or above import circles: {sorted(imports)}"


def test_all_names_that_a_module_exports_exist() -> None:
    """A rename in a module must reach its ``__all__``, or ``import *`` fails."""
    exporting = [path for path in modules() if "__all__" in path.read_text("utf-8")]
    assert exporting
    wrong = []
    for path in exporting:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        wrong += [f"{name}.{one}" for one in module.__all__ if not hasattr(module, one)]
    assert not wrong, "\n".join(wrong)


def test_no_text_names_a_package_registry_or_the_place_it_was_built_at() -> None:
    wrong = []
    for path in files():
        raw = path.read_bytes()
        if b"\0" in raw[:8192]:
            continue
        for number, line in enumerate(raw.decode("utf-8").splitlines(), 1):
            for word in (*REGISTRIES, *BUILD_PATHS):
                # As part of a longer path it is another place.
                if re.search(r"(?<![\w.-])" + re.escape(word), line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {word}")
    assert not wrong, "\n".join(wrong)


def test_every_runtime_requirement_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    modules_of = {"pyyaml": "yaml", "py-cpuinfo": "cpuinfo"}
    text = "\n".join(path.read_text("utf-8") for path in modules())
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=!~\[]", requirement)[0]
        module = modules_of.get(name, name)
        assert re.search(rf"^\s*(import|from) {module}\b", text, re.MULTILINE), requirement


def test_typed_means_py_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    if "Typing :: Typed" in project["classifiers"]:
        assert (ROOT / "stackctl" / "py.typed").is_file()


def test_the_readme_mentions_every_verb_and_exit_code() -> None:
    from stackctl.cli.main import VERBS, cli
    from stackctl.errors import ExitCode

    text = (ROOT / "README.md").read_text("utf-8")
    missing = [verb for verb in VERBS if not re.search(rf"\bstackctl {verb}\b", text)]
    assert not missing, f"README.md does not mention: {missing}"
    codes = [int(code) for code in ExitCode if not re.search(rf"\b{int(code)}\b", text)]
    assert not codes, f"README.md does not mention exit codes {codes}"
    codes_text = " ".join(
        re.findall(r"^(Exit codes: .*?\.)$", text, re.MULTILINE | re.DOTALL)[0].split()
    )
    assert codes_text.replace(" · ", ", ") == cli.epilog


# Packaging


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of the project."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder))
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    data = "-".join(wheel.name.split("-")[:2]) + ".data"
    expected = {}
    for path in files():
        parts = path.relative_to(ROOT).parts
        if parts[0] == "stackctl":
            expected["/".join(parts)] = path
        elif parts[0] in ("templates", "profiles", "systemd"):
            expected["/".join(("stackctl", "_data", *parts))] = path
        elif parts[0] == "man":
            expected["/".join((data, "data/share/man/man1", *parts[1:]))] = path
    for name, path in expected.items():
        assert packed.get(name) == path.read_bytes(), name
    others = {name for name in packed if ".dist-info/" not in name} - set(expected)
    assert not others, f"in the wheel, but not of the project: {sorted(others)}"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in packed)
    (entry,) = (raw for name, raw in packed.items() if name.endswith("entry_points.txt"))
    assert b"stackctl = stackctl.__main__:main" in entry


def test_an_installed_wheel_renders_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--root-user-action=ignore", "--no-compile",
        "--target", str(target), str(wheel),
    )  # fmt: skip
    host = '{"schema": "stackctl.host/1", "cpu": {"cores": 4, "threads": 4, "online": "0-3"}}'
    model = (
        '{"source": "file:/m/x.gguf", "architecture": "llama", "parameters": 1, "layers": 1,'
        ' "weights_bytes": 1000, "files": [{"path": "/m/x.gguf", "bytes": 1000}]}'
    )
    (tmp_path / "host.json").write_text(host)
    (tmp_path / "model.json").write_text(model)
    env = {
        **os.environ, "PYTHONPATH": str(target), "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    # The package that is used must be the installed one, not the checkout.
    code = "import stackctl.resources as r; print(r.data_folder('templates'))"
    found = run(sys.executable, "-c", code, env=env, cwd=tmp_path)
    assert found.strip() == str(target / "stackctl" / "_data" / "templates")
    out = run(
        sys.executable, "-m", "stackctl", "render", "cpu-latency", "--facts", "host.json",
        "--model", "facts:model.json", env=env, cwd=tmp_path,
    )  # fmt: skip
    assert "[Container]" in out
    assert "--threads 4" in out
    assert str(ROOT) not in out
    assert (target / "share/man/man1/stackctl-up.1").is_file()
    script = target / "bin" / "stackctl"
    assert "profiles" in run(sys.executable, str(script), "--help", env=env, cwd=tmp_path)
