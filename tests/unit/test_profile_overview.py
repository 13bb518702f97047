"""``stackctl profiles``: how each profile runs on a machine; ``up`` without one names the best."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import ggufs
import pytest
from samples import EPYC, EPYC_GPU, HOSTS, machine

from stackctl.cli import profiles as profiles_cli
from stackctl.cli.main import run
from stackctl.cli.session import Session
from stackctl.deploy import model_download
from stackctl.deploy.planning import PlanBasis
from stackctl.deploy.profile_overview import profile_overview, reasons
from stackctl.machine.machine import Machine
from stackctl.resources import data_folder
from stackctl.sources.profiles import Profiles
from stackctl.state.paths import scope_paths
from stackctl.values.base import to_json
from stackctl.values.host import Host
from stackctl.values.profile_list import ProfileSummary

Overview = Callable[..., dict[str, ProfileSummary]]
CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with nothing of their own, and a hub that nobody can reach."""
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def overview(place: Path) -> Overview:
    def of(host: Host, folder: Path | None = None) -> dict[str, ProfileSummary]:
        folders = [data_folder("profiles")] if folder is None else [folder]
        basis = PlanBasis(scope_paths("user", {}), Machine(), host, live=False)
        return {one.name: one for one in profile_overview(basis, Profiles(folders)).profiles}

    return of


def recommended(found: dict[str, ProfileSummary]) -> list[str]:
    return [name for name, one in found.items() if one.recommended]


@pytest.mark.parametrize(
    ("host", "best"),
    [(EPYC, "cpu"), (EPYC_GPU, "gpu-gguf"), (HOSTS["desktop"], "cpu"), (HOSTS["lab"], "demo")],
)
def test_one_profile_is_the_best_for_a_machine(overview: Overview, host: Host, best: str) -> None:
    found = overview(host)
    assert recommended(found) == [best]
    one = found[best]
    assert (one.fits, one.viable) == (True, True)
    assert one.fetched_from is not None
    assert 0 < (one.memory_bytes or 0) < (one.limit_bytes or 0)
    lines = reasons(one)
    assert lines[0].startswith("fits: ")
    assert lines[-1].startswith("why: ")
    assert all(len(line) <= 78 for line in lines)
    within = "first token within its"
    assert (within in lines[-1]) == (one.ttft_slo_s is not None)


def test_no_profile_suits_a_machine_without_memory(overview: Overview) -> None:
    tiny = machine(cores=["0", "1"], nodes=["0-1"], memory=300 << 20)
    found = overview(tiny)
    assert recommended(found) == []
    assert all(one.fits is False for one in found.values())
    assert "does not fit" in (found["cpu"].reason or "")


def test_every_profile_has_fit_speed_and_download(overview: Overview) -> None:
    found = overview(EPYC_GPU)
    for one in found.values():
        assert one.fits is True
        assert one.decode_tok_s is not None
        assert one.parameters is not None
    assert found["cpu-small"].download_bytes == 5438863360
    assert found["demo"].download_bytes == 253115424
    # Their checkpoints have to be made.
    for name in ("gpu-nvfp4", "gpu-reasoning"):
        assert (found[name].fetched_from, found[name].download_bytes) == (None, None)
    found = overview(EPYC)
    assert found["gpu-gguf"].fits is False
    assert "needs a GPU" in (found["gpu-gguf"].reason or "")


def test_profiles_of_the_user_are_judged_too(overview: Overview, place: Path) -> None:
    folder = place / "mine"
    folder.mkdir()
    model = ggufs.write(place / "m.gguf")
    base = "engine: llama.cpp\n"
    (folder / "file.yaml").write_text(f"{base}model: file:{model}\n")
    (folder / "gone.yaml").write_text(f"{base}model: file:{place}/none.gguf\n")
    (folder / "none.yaml").write_text(base)
    (folder / "hub.yaml").write_text(f"{base}model: hf:Org/Repo:Q4_K_M\n")
    (folder / "bad.yaml").write_text("prot: 1\n")
    found = overview(EPYC, folder)
    assert recommended(found) == ["file"]
    assert (found["file"].download_bytes, found["file"].fits) == (0, True)
    assert found["gone"].fits is None
    assert "model file not found" in (found["gone"].reason or "")
    assert "names no model" in (found["none"].reason or "")
    assert (found["hub"].fits, found["hub"].fetched_from) == (None, "hf:Org/Repo:Q4_K_M")
    assert (found["bad"].stack, found["bad"].objective) == ("-", "-")
    assert found["bad"].description.startswith("not valid: ")
    texts = {name: profiles_cli.fits_text(one) for name, one in found.items()}
    assert texts == {
        "bad": "no model", "file": "yes", "gone": "?", "hub": "?", "none": "no model"
    }  # fmt: skip


def test_the_list_as_text_and_as_a_document(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "epyc.json").write_text(to_json(EPYC))
    assert run(["profiles", "--facts", "epyc.json"]) == 0
    printed = capsys.readouterr()
    rows = {line.split()[0]: line for line in printed.out.splitlines() if line[0] != " "}
    assert rows["PROFILE"].split() == ["PROFILE", "FITS", "HERE", "EXPECTED", "DOWNLOAD", "WHAT"]
    assert rows["cpu-small"].split()[1:6] == ["yes", "61-82", "tok/s", "5.1", "GiB"]
    assert "no GPU" in rows["gpu-gguf"]
    assert " none " in rows["gpu-nvfp4"]
    assert all(len(line) <= 80 for line in printed.out.splitlines())
    assert printed.err == "the best for this machine: stackctl up cpu\n"
    assert run(["profiles", "list", "--facts", "epyc.json", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "stackctl.profiles/1"
    one = next(one for one in document["profiles"] if one["name"] == "cpu-small")
    assert list(one)[:4] == ["name", "stack", "objective", "description"]
    assert (one["fits"], one["download_bytes"]) == (True, 5438863360)


def test_the_list_explains_models_without_files(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "gpu.json").write_text(to_json(EPYC_GPU))
    (place / "gone.yaml").write_text(f"engine: llama.cpp\nmodel: file:{place}/none.gguf\n")
    assert run(["profiles", "--facts", "gpu.json", "--profiles", str(place)]) == 0
    printed = capsys.readouterr()
    assert "model file not found" in " ".join(printed.out.split())
    assert printed.err.splitlines() == [
        "no download is known for gpu-nvfp4, gpu-reasoning: stackctl profiles show NAME",
        "the best for this machine: stackctl up gpu-gguf",
    ]


@pytest.fixture
def on_epyc(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    basis = PlanBasis(scope_paths("user", {}), Machine(), EPYC, live=False)
    monkeypatch.setattr(Session, "plan_basis", lambda *_: basis)
    monkeypatch.setattr(model_download, "read_basis", lambda *_: basis)


@pytest.mark.parametrize("words", [(), ("--yes",)])
def test_up_without_a_profile_names_the_best(
    on_epyc: None, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert run(["up", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    first, *details, hint = printed.err.splitlines()
    assert first == "error: missing PROFILE: the best for this machine is cpu"
    assert details[0].startswith("  fits: 12.6 GiB of 746 GiB, memory")
    assert details[1].startswith("  expected: 59-82 tok/s, first token ")
    assert details[2] == "  model: catalogue:qwen2.5-coder-7b-q5_k_m, 5.1 GiB to download"
    assert details[3] == "  why: first token within its 30 s; largest such model that can start"
    assert hint == "hint: stackctl up cpu; stackctl profiles lists the others"


def test_up_without_a_profile_on_a_machine_that_suits_none(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = machine(cores=["0", "1"], nodes=["0-1"], memory=300 << 20)
    basis = PlanBasis(scope_paths("user", {}), Machine(), tiny, live=False)
    monkeypatch.setattr(Session, "plan_basis", lambda *_: basis)
    assert run(["up"]) == 2
    first, *hint = capsys.readouterr().err.splitlines()
    assert first == "error: missing PROFILE: none is known to suit this machine"
    # The list has no reasons.
    assert hint == [
        "hint: stackctl plan PROFILE shows why",
        "  another model: stackctl up PROFILE --model SOURCE",
    ]


def test_up_without_a_profile_as_a_document(
    on_epyc: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["up", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "stackctl.error/1"
    assert document["message"].endswith("is cpu")


def test_up_with_a_model_needs_a_profile(on_epyc: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["up", "--model", "file:/m.gguf"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: missing PROFILE"


@pytest.mark.parametrize("agrees", [True, False])
def test_up_asks_on_a_terminal(
    on_epyc: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    agrees: bool,
) -> None:
    asked: list[str] = []

    def answer(_: Session, question: str) -> bool:
        asked.append(question)
        return agrees

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(Session, "confirm", answer)
    # The hub cannot be reached, so a start that was agreed to ends at the download.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["--user", "up", "--force"]) == 1
    error = capsys.readouterr().err
    assert asked == ["stackctl up cpu"]
    assert "the best profile for this machine is cpu\n  fits: " in error
    wanted = "nothing is fetched: HF_HUB_OFFLINE is set" if agrees else "nothing was started"
    assert f"error: {wanted}" in error
