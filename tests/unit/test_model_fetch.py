"""stackctl model fetch and its neighbours, as they are typed, against a hub on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ggufs
import pytest
from hub import Hub, hub
from servers import wait_until

from stackctl.cli.main import run
from stackctl.store import partial_file
from stackctl.store.manifest import Manifest
from stackctl.values.base import to_json
from stackctl.values.model_store import FetchJob

STACKCTL = str(Path(sys.executable).with_name("stackctl"))


class Cli:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self._capsys.readouterr()
        code = run(["--user", *arguments])
        self.out, self.err = self._capsys.readouterr()
        return code


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE")):
            monkeypatch.delenv(name)
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Cli(capsys)


@pytest.fixture
def site(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "hub").mkdir()
    with hub(tmp_path / "hub") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def large(tmp_path: Path) -> bytes:
    """A model of 4 MiB."""
    tensors = (*ggufs.TENSORS, ggufs.Tensor("blk.0.ffn_down.weight", (1024, 1024), "F32"))
    return ggufs.write(tmp_path / "made.gguf", tensors=tensors).read_bytes()


def test_fetch_list_verify_lock_and_remove(cli: Cli, site: Hub, tmp_path: Path) -> None:
    repo = site.add("Org/Repo", {"a-Q4_K_M.gguf": large(tmp_path)})
    assert cli("model", "list") == 0
    assert cli.out == ""
    assert cli("model", "fetch", "hf:Org/Repo") == 0
    folder = Path(cli.out.strip())
    assert folder == tmp_path / f"cache/huggingface/hub/models--Org--Repo/snapshots/{repo.commit}"
    assert cli.err == "model     hf:Org/Repo, 4.0 MiB in 1 file, verified\n"
    assert cli("model", "fetch", "hf:Org/Repo", "--json") == 0
    assert json.loads(cli.out)["schema"] == "stackctl.stored/1"
    assert "here already" in cli.err
    assert cli("model", "list") == 0
    assert re.search(r"^hf:Org/Repo +4\.0 MiB +1 +\d{4}-\d\d-\d\d$", cli.out, re.MULTILINE)
    assert cli("model", "verify", "repo") == 0
    assert cli.out.splitlines()[1].startswith("ok    a-Q4_K_M.gguf")
    assert cli("model", "lock", "repo", "-o", "model.lock") == 0
    assert cli("model", "fetch", "--lock", "model.lock") == 0
    assert cli("model", "fetch", "hf:Org/Other", "--lock", "model.lock") == 2
    assert cli("model", "remove", "repo") == 2
    assert "--yes" in cli.err
    path = next((folder.parents[1] / "blobs").iterdir())
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert cli("model", "verify", "--json") == 1
    assert json.loads(cli.out)["models"][0]["results"][0]["status"] == "fail"
    assert cli("model", "verify") == 1
    assert cli.out.splitlines()[1].startswith("FAIL  a-Q4_K_M.gguf")
    assert cli("model", "remove", "repo", "--yes") == 0
    assert cli.out.strip().endswith("4.0 MiB are free again")
    assert cli("model", "verify", "repo") == 4
    assert cli("model", "verify") == 4


def test_a_model_that_lies_somewhere_is_imported(cli: Cli, tmp_path: Path) -> None:
    path = ggufs.write(tmp_path / "mine.gguf")
    assert cli("model", "import", "mine.gguf") == 0
    assert cli.out.strip() == str(path)
    assert cli("model", "verify", "mine") == 0
    assert cli("model", "lock", "mine") == 2
    assert cli("model", "remove", "mine", "--yes") == 0
    assert path.exists()
    assert cli("model", "import", "nothing.gguf") == 1
    assert cli("model", "fetch", "file:mine.gguf") == 2
    assert "stackctl model import" in cli.err


def test_much_is_asked_for(cli: Cli, site: Hub) -> None:
    lfs = {"sha256": "b" * 64, "size": 2_000_000_000}
    answer = {"sha": "a" * 40, "siblings": [{"rfilename": "a.gguf", "size": 1, "lfs": lfs}]}
    site.answers["/api/models/Org/Repo/revision/main"] = json.dumps(answer).encode()
    assert cli("model", "fetch", "hf:Org/Repo") == 2
    assert "1.9 GiB are to be downloaded to" in cli.err
    assert "--yes" in cli.err
    assert not any(request.cdn for request in site.requests)


def test_what_of_a_repository_fits_is_shown_before_a_download(
    cli: Cli, site: Hub, tmp_path: Path
) -> None:
    small = large(tmp_path)
    site.add("Org/Repo", {"a-Q4_0.gguf": small, "a-Q8_0.gguf": small + bytes(3 << 20)})
    assert cli("model", "show", "hf:Org/Repo") == 0
    assert "facts          hub: Org/Repo@" in cli.out
    assert re.search(r"^Q4_0 +4\.0 MiB +yes .* cpu", cli.out, re.MULTILINE)
    assert re.search(r"^Q8_0 +7\.0 MiB +yes .* cpu +best$", cli.out, re.MULTILINE)
    assert cli.err == "stackctl up cpu --model hf:Org/Repo:Q8_0\n"
    assert cli("model", "show", "hf:Org/Repo", "--json") == 0
    found = json.loads(cli.out)
    assert found["schema"] == "stackctl.choices/1"
    assert [(c["quantization"], c["fits"], c["recommended"]) for c in found["choices"]] == [
        ("Q4_0", True, False),
        ("Q8_0", True, True),
    ]
    assert cli("model", "show", "hf:Org/Repo:Q4_0", "--json") == 0
    assert json.loads(cli.out)["schema"] == "stackctl.model/1"
    # And planned for.
    assert cli("plan", "cpu", "--model", "hf:Org/Repo:Q4_0", "--json") == 0
    assert json.loads(cli.out)["verdict"]["fits"] is True
    assert site.sent("/cdn/.*") < 40 << 20


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("hf:Org/Repo:Q2_K", 4, "Org/Repo has no Q2_K"),
        ("hf:Org/Missing", 1, "private, or there is no such repository"),
        ("hf:Org/Repo@v9", 1, "has no such revision"),
        ("hf:nothing", 2, "is not understood"),
        ("https://example.org/x", 2, "is not the address of a GGUF file"),
        ("ftp://example.org/x.gguf", 2, "unsupported source"),
        ("catalogue:x", 2, "unsupported source"),
    ],
)
def test_sources_that_cannot_be_fetched(
    cli: Cli, site: Hub, tmp_path: Path, source: str, code: int, says: str
) -> None:
    site.add("Org/Repo", {"a-Q4_0.gguf": large(tmp_path)})
    assert cli("model", "fetch", source) == code
    assert says in cli.err
    assert "Traceback" not in cli.err
    assert cli.out == ""


def test_the_service_does_what_it_is_told_wherever_it_runs(
    cli: Cli, site: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it is told names its folders: a service of systemd's sees another environment.
    site.add("Org/Repo", {"a.gguf": large(tmp_path)}, private=True)
    told = FetchJob(
        source="hf:Org/Repo", state=str(tmp_path / "s"), cache=str(tmp_path / "c"), connections=1,
        environment=(("HF_TOKEN", site.token), ("HF_ENDPOINT", site.url)),
    )  # fmt: skip
    path = tmp_path / "x.job"
    path.write_text(to_json(told))
    path.chmod(0o644)
    assert cli("model", "fetch", "--job", str(path)) == 1
    assert "may be read by other users" in cli.err
    path.chmod(0o600)
    for name in ("HF_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, "")  # put back afterwards
    assert cli("model", "fetch", "--job", str(path)) == 0
    assert not path.exists()
    (record,) = Manifest(tmp_path / "s").all()
    assert record.folder is not None
    assert record.folder.startswith(f"{tmp_path}/c/models--Org--Repo/")
    state = json.loads((tmp_path / "x.json").read_text())
    assert (state["state"], state["done_bytes"]) == ("done", record.bytes)
    assert site.token not in (tmp_path / "x.json").read_text() + cli.out + cli.err


@pytest.mark.parametrize("limit", ["0", "0.1", "-5MB", "fast"])
def test_a_limit_that_is_none(cli: Cli, limit: str) -> None:
    assert cli("model", "fetch", "hf:Org/Repo", f"--limit={limit}") == 2
    assert "Traceback" not in cli.err


def test_ctrl_c_leaves_what_is_there_and_the_next_run_goes_on(
    cli: Cli, site: Hub, tmp_path: Path
) -> None:
    content = large(tmp_path)
    site.add("Org/Repo", {"a.gguf": content})
    site.speed, site.hold = 100 << 20, 3 << 20
    sha, _ = site.digests(site.repos["Org/Repo"].files["a.gguf"])
    target = tmp_path / "cache/huggingface/hub/models--Org--Repo/blobs" / sha
    words = [STACKCTL, "--user", "model", "fetch", "hf:Org/Repo"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: partial_file.bytes_on_disk(target, len(content)) > 1 << 20, 20)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert said.endswith("error: interrupted\n")
    assert not target.exists()
    there = partial_file.bytes_on_disk(target, len(content))
    site.speed = site.hold = None
    before = site.sent("/cdn/.*")
    assert cli("model", "fetch", "hf:Org/Repo") == 0
    assert site.sent("/cdn/.*") - before == len(content) - there
