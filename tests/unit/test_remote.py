"""`--host` before any connection: what is a machine, and what is left of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stackctl.cli.main import run
from stackctl.cli.remote import split_destination
from stackctl.errors import ExitCode, StackctlError


@pytest.mark.parametrize(
    "words", ["--host root@box up x -y", "up --host root@box x -y", "up x -y --host=root@box"]
)
def test_it_may_stand_anywhere(words: str) -> None:
    assert split_destination(words.split()) == ("root@box", ["up", "x", "-y"])


def test_what_comes_after_two_dashes_is_no_option() -> None:
    words = ["--host", "box", "logs", "--", "--host=x"]
    assert split_destination(words) == ("box", ["logs", "--", "--host=x"])


@pytest.mark.parametrize(
    "name", ["box", "me@box.example", "ssh://me@box:2222", "me@[::1]", "fe80::1%eth0", "kühl"]
)
def test_machines_as_ssh_takes_them(name: str) -> None:
    assert split_destination(["--host", name]) == (name, [])


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=touch x", "-V", "", "a b", "$(x)", "a;b", "`x`", "a\nb", "a'b"]
)
def test_a_destination_is_never_an_option(name: str) -> None:
    for words in (["--host", name], [f"--host={name}"]):
        with pytest.raises(StackctlError, match="invalid host") as caught:
            split_destination([*words, "status"])
        assert caught.value.exit_code == ExitCode.USAGE


def test_one_machine_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--host", "a", "status", "--host", "b"]) == 2
    assert "--host takes one machine" in capsys.readouterr().err
    assert run(["status", "--host"]) == 2


def test_a_machine_without_ssh_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("PATH", str(tmp_path)), ("XDG_RUNTIME_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    assert run(["--host", "box", "status", "--json"]) == 6
    report = json.loads(capsys.readouterr().out)
    assert (report["message"], report["exit_code"]) == ("ssh is not installed", 6)
