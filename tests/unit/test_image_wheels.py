"""Packages of Python for an image: a real pip, and wheels made here."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from stackctl.cli.output import Output
from stackctl.deploy import image_wheels
from stackctl.engines.image_recipe import Wheels
from stackctl.errors import StackctlError

REPORT = Output(json=False, quiet=True, verbose=False, color="never", progress=False)
WHEELS = Wheels(
    "engine==1.0",
    python="3.11",
    program="serve",
    module="engine",
    function="main",
    alias=("known", "1.0+cpu"),
    left_out=("heavy*", "engine/tests"),
    hint="where it comes from",
)
PACKAGES = "usr/local/lib/python3.11/dist-packages"


def wheel(
    folder: Path, name: str, tag: str, files: dict[str, str], needs: str = "", version: str = "1.0"
) -> None:
    facts = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{facts}/METADATA", metadata)
        archive.writestr(f"{facts}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{facts}/RECORD", "")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, and a user who told pip to look there and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    # For the image's Python, whichever runs this.
    engine = {"engine/__init__.py": "def main():\n    print('hi')\n", "engine/tests/x.py": ""}
    wheel(folder, "engine", "cp311-none-any", engine, "Requires-Dist: heavy\n")
    wheel(folder, "heavy", "py3-none-any", {"heavy/__init__.py": ""})
    look_only_in(folder, monkeypatch)
    return folder


def look_only_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pip find packages in a folder and nowhere else."""
    # A proxy would be asked for 127.0.0.1, too.
    for name in [name for name in os.environ if re.match(r"PIP_|(?i:https?_proxy)", name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_the_tree_holds_what_the_image_needs(packages: Path, tmp_path: Path) -> None:
    assert packages.is_dir()
    root = tmp_path / "root"
    assert image_wheels.install_wheels(REPORT, WHEELS, root) == root / "usr"
    found = root / PACKAGES
    assert {path.name for path in found.iterdir()} == {
        "engine", "engine-1.0.dist-info", "known-1.0+cpu.dist-info",
    }  # fmt: skip
    assert not (found / "engine/tests").exists()
    assert "Version: 1.0+cpu\n" in (found / "known-1.0+cpu.dist-info/METADATA").read_text()
    program = root / "usr/local/bin/serve"
    assert os.access(program, os.X_OK)
    environment = {**os.environ, "PYTHONPATH": str(found)}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "hi\n"


def test_what_pip_does_not_find_is_said_with_where_it_comes_from(
    packages: Path, tmp_path: Path
) -> None:
    assert packages.is_dir()
    absent = dataclasses.replace(WHEELS, requirement="engine==2.0")
    with pytest.raises(StackctlError) as error:
        image_wheels.install_wheels(REPORT, absent, tmp_path / "root")
    assert error.value.hint == "where it comes from"
    assert any("engine==2.0" in line for line in error.value.details)


def test_pip_gets_no_other_setting_of_the_caller(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packages.is_dir()
    log = tmp_path / "log"
    monkeypatch.setenv("PIP_LOG", str(log))
    image_wheels.install_wheels(REPORT, WHEELS, tmp_path / "root")
    assert not log.exists()
