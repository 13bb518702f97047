"""Models in the store: what is chosen and fetched, that it stays what it was, what is refused."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ggufs
import pytest
from checkpoints import PLAIN, checkpoint, sharded
from hub import Hub, hub

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.hub_cache import ModelNotCached, parse_address, repo_folder
from stackctl.sources.models import read_model
from stackctl.store import (
    fetch,
    lockfile,
    model_export,
    remote_models,
)
from stackctl.store import hub as hubs
from stackctl.store import manifest as manifests
from stackctl.store.download_queue import RetryPolicy
from stackctl.store.hub import RemoteFile, RepoInfo
from stackctl.store.hub_repository import Repository
from stackctl.store.manifest import Manifest
from stackctl.values.base import to_json
from stackctl.values.model_store import StoredModel

NONE = RetryPolicy(attempts=0, first_s=0)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the environment names, and an empty cache."""
    (tmp_path / "hub").mkdir()
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with hub(tmp_path / "hub") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest(tmp_path / "state")


def model_bytes(tmp_path: Path, **changes: Any) -> bytes:
    return ggufs.write(tmp_path / "made.gguf", changes or None).read_bytes()


def get(source: str, manifest: Manifest, lock: Any = None) -> StoredModel:
    return fetch.download_model(fetch.plan_download(source, manifest, lock), manifest)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Fetching


def test_a_fetched_gguf_is_read_from_the_cache(
    site: Hub, manifest: Manifest, tmp_path: Path
) -> None:
    content = model_bytes(tmp_path)
    repo = site.add("Org/Repo", {"tiny-Q4_K_M.gguf": content, "README.md": b"x"})
    record = get("hf:Org/Repo:Q4_K_M", manifest)
    model = read_model("hf:Org/Repo:q4_k_m")
    assert model.name == "Tiny"
    assert [file.file_name for file in model.files] == ["tiny-Q4_K_M.gguf"]
    digest = hashlib.sha256(content).hexdigest()
    assert record.commit == repo.commit
    assert [(f.name, f.bytes, f.sha256) for f in record.files] == [
        ("tiny-Q4_K_M.gguf", len(content), digest)
    ]
    # As the hub's own tools lay it out: relative links to blobs by their hash.
    link = repo_folder("Org/Repo") / "snapshots" / repo.commit / "tiny-Q4_K_M.gguf"
    assert str(link.readlink()) == f"../../blobs/{digest}"
    assert (repo_folder("Org/Repo") / "refs/main").read_text() == repo.commit
    assert manifest.check_model(model) == record


def test_a_fetched_checkpoint_has_all_that_an_engine_reads(
    site: Hub, manifest: Manifest, tmp_path: Path
) -> None:
    folder = sharded(tmp_path / "m", count=3)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"no")
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").write_bytes(b"no")
    files: dict[str, bytes | Path] = dict(files_below(folder))
    site.add("Org/Repo", files)
    get("hf:Org/Repo", manifest)
    model = read_model("hf:Org/Repo")
    assert model.folder is not None
    there = set(files_below(Path(model.folder)))
    assert there == {name for name in files if not name.endswith((".bin", ".onnx"))}
    assert read_model(f"dir:{folder}").parameters == model.parameters


def test_a_model_of_several_parts(site: Hub, manifest: Manifest, tmp_path: Path) -> None:
    paths = ggufs.write_shards(tmp_path, "big-Q8_0", 3)
    site.add("Org/Repo", {f"Q8_0/{path.name}": path for path in paths})
    record = get("hf:Org/Repo:Q8_0", manifest)
    assert len(record.files) == 3
    assert len(read_model("hf:Org/Repo:Q8_0").files) == 3


def test_what_is_here_is_not_fetched_again(site: Hub, manifest: Manifest, tmp_path: Path) -> None:
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path)})
    get("hf:Org/Repo", manifest)
    site.requests.clear()
    get("hf:Org/Repo", manifest)
    assert [r.path for r in site.requests] == ["/api/models/Org/Repo/revision/main"]
    # Fetched by another tool, it is hashed and not fetched either; wrong, it is.
    for record in manifest.all():
        manifest.remove(record.source)
    site.requests.clear()
    record = get("hf:Org/Repo", manifest)
    assert site.sent("/cdn/.*") == 0
    blob = Path(record.files[0].path)
    for _ in range(2):
        manifest.remove(record.source)
        raw = bytearray(blob.read_bytes())
        raw[100] ^= 1
        blob.write_bytes(raw)
        get("hf:Org/Repo", manifest)
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


def test_a_new_commit_leaves_the_old_one(site: Hub, manifest: Manifest, tmp_path: Path) -> None:
    first = site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path)})
    get("hf:Org/Repo", manifest)
    second = site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path, **{"general.name": "Two"})})
    get("hf:Org/Repo", manifest)
    assert read_model("hf:Org/Repo").name == "Two"
    assert read_model(f"hf:Org/Repo@{first.commit}").name == "Tiny"
    assert read_model(f"hf:Org/Repo@{second.commit}").name == "Two"


def test_another_download_at_the_same_time(site: Hub, manifest: Manifest, tmp_path: Path) -> None:
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path, x="y" * 200_000)})
    site.speed = 200_000
    done: list[StoredModel] = []
    threads = [
        threading.Thread(target=lambda: done.append(get("hf:Org/Repo", manifest))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2
    size = site.repos["Org/Repo"].files["a.gguf"].stat().st_size
    assert site.sent("/cdn/.*") == size


def in_processes(work: Callable[..., None], *arguments: Any) -> list[str]:
    """Run a function in three real processes; return the errors.

    It is given a barrier before the arguments, and after them where errors go.
    """
    context = multiprocessing.get_context("spawn")
    barrier, failures = context.Barrier(3), context.SimpleQueue()
    processes = [
        context.Process(target=work, args=(barrier, *arguments, failures)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = []
    while not failures.empty():
        found.append(failures.get())
    return found


def link_in_step(barrier: Any, names: Mapping[str, str], failures: Any) -> None:
    for number in range(60):
        barrier.wait(60)
        try:
            Repository("Org/Repo").write_snapshot(f"{number:040}", names)
        except StackctlError as error:
            failures.put(error.message)


def test_processes_that_finish_the_same_model_at_the_same_time(site: Hub) -> None:
    """Every process succeeds: the model is there, whoever has made the snapshot."""
    place = Repository("Org/Repo")
    place.prepare()
    names = {f"folder/{number}": f"blob{number}" for number in range(20)}
    assert in_processes(link_in_step, names) == []
    snapshots = sorted(path.name for path in (place.folder / "snapshots").iterdir())
    assert snapshots == [f"{number:040}" for number in range(60)]
    for name in snapshots:
        found = {
            path.name: path.readlink().name for path in place.snapshot_path(name).glob("folder/*")
        }
        assert found == {str(number): f"blob{number}" for number in range(20)}


def fetch_in_step(barrier: Any, sources: Sequence[str], state: Path, failures: Any) -> None:
    for source in sources:
        barrier.wait(60)
        try:
            get(source, Manifest(state))
        except StackctlError as error:
            failures.put(f"{source}: {error.message}")


def test_processes_that_fetch_the_same_file_of_the_web_at_the_same_time(
    site: Hub, manifest: Manifest, tmp_path: Path
) -> None:
    """Its name in the store is its hash, which no process knows before the end."""
    sources = []
    for number in range(12):
        content = model_bytes(tmp_path, **{"general.name": f"Model {number}"})
        site.add(f"Org/Repo{number}", {"a.gguf": content})
        digest = hashlib.sha256(content).hexdigest()
        sources.append(f"{site.cdn}/cdn/Org/Repo{number}/{digest}/a.gguf")
    assert in_processes(fetch_in_step, sources, manifest.state) == []
    assert len(manifest.all()) == len(sources)
    for number, source in enumerate(sources):
        assert read_model(source).name == f"Model {number}"


def test_what_another_tool_puts_there_meanwhile_is_hashed(
    site: Hub, manifest: Manifest, tmp_path: Path
) -> None:
    content = model_bytes(tmp_path)
    site.add("Org/Repo", {"a.gguf": content})
    order = fetch.plan_download("hf:Org/Repo", manifest)
    (target,) = (file.target for file in order.todo)
    target.write_bytes(b"x" + content[1:])
    with pytest.raises(StackctlError, match="which another process has fetched, is damaged"):
        fetch.download_model(order, manifest)
    assert not target.exists()
    target.write_bytes(content)
    assert fetch.download_model(order, manifest).files[0].sha256 == target.name
    assert not any(request.cdn for request in site.requests)


def test_parts_that_are_not_there_yet_are_only_missed_where_they_are_meant() -> None:
    found = info("a-Q4_0.gguf", "a-Q8_0-00001-of-00002.gguf")
    assert remote_models.choose_model(found, "Q4_0").label == "Q4_0"
    with pytest.raises(StackctlError, match="it has 1 of the 2 parts"):
        remote_models.choose_model(found, "Q8_0")


def test_offline_nothing_is_asked(
    site: Hub, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path)})
    get("hf:Org/Repo", manifest)
    site.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StackctlError, match="HF_HUB_OFFLINE is set"):
        get("hf:Org/Repo", manifest)
    assert read_model("hf:Org/Repo").files
    assert site.requests == []


def test_too_little_space_is_told_before(
    site: Hub, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {
        "sha": "a" * 40,
        "siblings": [
            {"rfilename": "a.gguf", "size": 1 << 49, "lfs": {"sha256": "b" * 64, "size": 1 << 49}}
        ],
    }
    site.answers["/api/models/Org/Repo/revision/main"] = json.dumps(answer).encode()
    with pytest.raises(StackctlError, match=r"needs 512 TiB more, .* are free") as error:
        get("hf:Org/Repo", manifest)
    assert error.value.exit_code == ExitCode.REFUSED
    assert not any(r.cdn for r in site.requests)


# Of any server


def test_a_file_of_the_web(site: Hub, manifest: Manifest, tmp_path: Path) -> None:
    content = model_bytes(tmp_path)
    site.add("Org/Repo", {"a.gguf": content})
    digest = hashlib.sha256(content).hexdigest()
    url = f"{site.cdn}/cdn/Org/Repo/{digest}/a.gguf"
    for source in (url, f"{url}#sha256={digest}"):
        record = get(source, manifest)
        assert record.files[0].sha256 == digest
        assert read_model(source).name == "Tiny"
    site.requests.clear()
    get(url, manifest)
    assert site.sent("/cdn/.*") == 1
    with pytest.raises(StackctlError, match="came damaged"):
        get(f"{url}?other#sha256={'0' * 64}", manifest)
    with pytest.raises(StackctlError, match="is not a valid checksum"):
        get(f"{url}#md5=1", manifest)


def test_a_token_of_the_hub_is_not_for_any_server(
    site: Hub, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = model_bytes(tmp_path)
    site.add("Org/Repo", {"a.gguf": content})
    monkeypatch.setenv("HF_TOKEN", site.token)
    get(f"{site.cdn}/cdn/Org/Repo/{hashlib.sha256(content).hexdigest()}/a.gguf", manifest)
    assert len(site.requests) == 2
    assert not any("Authorization" in request.headers for request in site.requests)


def test_without_https_only_this_machine_is_asked(manifest: Manifest) -> None:
    with pytest.raises(StackctlError, match="must be fetched by https"):
        get("http://example.org/a.gguf", manifest)


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("https://huggingface.co/Org/Repo", ("Org/Repo", None, None)),
        ("https://huggingface.co/Org/Repo/tree/main", ("Org/Repo", None, None)),
        (
            "https://huggingface.co/Org/Repo/resolve/v2/sub/a%20b.gguf".replace("%20", "-"),
            ("Org/Repo", "v2", "sub/a-b.gguf"),
        ),
        ("https://huggingface.co/Org/Repo/blob/main/a.gguf", ("Org/Repo", None, "a.gguf")),
    ],
)
def test_addresses_of_the_hub_are_its_repositories(
    address: str, source: tuple[str, str | None, str | None]
) -> None:
    found = parse_address(address)
    assert (found.repo, found.revision, found.quant) == source
    assert found.url is None


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("https://me:secret@example.org/a.gguf", "user name or password are refused"),
        ("https://example.org/\udcff/a.gguf", "is not the address of a GGUF file"),
        ("https://[/a.gguf", "is not the address of a GGUF file"),
    ],
)
def test_addresses_that_are_not_fetched_from(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, address: str, says: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://[")
    with pytest.raises(StackctlError, match=says) as error:
        get(address, manifest)
    assert error.value.exit_code == ExitCode.USAGE
    assert "secret" not in error.value.message


# Which files


def info(*names: str, size: int = 1000) -> RepoInfo:
    return RepoInfo("O/R", "a" * 40, tuple(RemoteFile(n, size + i, "b" * 64, None)
                                            for i, n in enumerate(names)))  # fmt: skip


@pytest.mark.parametrize(
    ("names", "wish", "chosen"),
    [
        (["a-Q4_K_M.gguf", "a-Q8_0.gguf"], "Q8_0", ["a-Q8_0.gguf"]),
        (["a-Q4_K_M.gguf", "a-Q4_K_S.gguf"], "q4_k_s", ["a-Q4_K_S.gguf"]),
        (["a.gguf", "mmproj-a.gguf"], None, ["a.gguf"]),
        (["x/a-Q4_0.gguf", "y/a-Q4_0.gguf"], "y/a-Q4_0.gguf", ["y/a-Q4_0.gguf"]),
        (
            ["a-BF16-00001-of-00002.gguf", "a-BF16-00002-of-00002.gguf", "a-Q4_0.gguf"],
            "BF16",
            ["a-BF16-00001-of-00002.gguf", "a-BF16-00002-of-00002.gguf"],
        ),
        (["model.safetensors", "config.json", "a.gguf"], "a.gguf", ["a.gguf"]),
        (
            ["model.safetensors", "consolidated.safetensors", "config.json", "x.bin"],
            None,
            ["model.safetensors", "config.json"],
        ),
    ],
)
def test_the_files_that_are_meant(names: list[str], wish: str | None, chosen: list[str]) -> None:
    assert [file.path for file in remote_models.choose_model(info(*names), wish).files] == chosen


@pytest.mark.parametrize(
    ("names", "wish", "says", "code"),
    [
        (["a-Q4_0.gguf", "a-Q8_0.gguf"], None, "has 2 models", ExitCode.USAGE),
        (["a-Q4_0.gguf"], "Q5_K_M", "has no Q5_K_M", ExitCode.NOT_FOUND),
        (["README.md"], None, "holds no model", ExitCode.NOT_FOUND),
        (["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"], None, "2 of the 3", ExitCode.FAILED),
        (
            ["model-00001-of-00002.safetensors", "config.json"], None, "1 of the 2",
            ExitCode.FAILED,
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(
    names: list[str], wish: str | None, says: str, code: ExitCode
) -> None:
    with pytest.raises(StackctlError, match=says) as error:
        remote_models.choose_model(info(*names), wish)
    assert error.value.exit_code == code


# Hostile hubs


@pytest.mark.parametrize(
    "name",
    [
        "../evil.gguf", "a/../../evil.gguf", "/etc/passwd", "a//b.gguf", "./a.gguf", "a/.",
        "a\\..\\b.gguf", "a\nb.gguf", "\x1b[2Ja.gguf", "", "x" * 300 + ".gguf", "a/" * 600 + "b",
    ],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_refuses_the_repository(
    site: Hub, manifest: Manifest, name: str
) -> None:
    answer = {
        "sha": "a" * 40,
        "siblings": [
            {"rfilename": "a.gguf", "size": 4, "blobId": "b" * 40},
            {"rfilename": name, "size": 4, "blobId": "b" * 40},
        ],
    }
    site.answers["/api/models/Org/Repo/revision/main"] = json.dumps(answer).encode()
    with pytest.raises(StackctlError, match="Org/Repo is refused"):
        fetch.plan_download("hf:Org/Repo", manifest)
    assert not repo_folder("Org/Repo").exists()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"[" * 100_000, "does not answer like a hub"),
        (b'{"sha": 1}', "does not answer like a hub"),
        (b"<html>", "does not answer like a hub"),
        (b'{"sha": "../../x", "siblings": []}', "is refused: its commit"),
        (b'{"sha": "%s", "siblings": [%s]}' % (
            b"a" * 40, b",".join([b'{"rfilename":"a","size":1,"blobId":"%s"}' % (b"b" * 40)] * 2)
        ), "twice"),
        (b'{"sha": "%s", "siblings": [{"rfilename":"a","size":-1}]}' % (b"a" * 40), "bytes"),
        (b'{"sha": "%s", "siblings": [{"rfilename":"a","size":1}]}' % (b"a" * 40), "no hash"),
        (b'{"sha": "%s", "siblings": [{"rfilename":"a","size":1,"blobId":"../x"}]}'
         % (b"a" * 40), "blob"),
        (b" " * (17 << 20), "more than 16777216 bytes"),
    ],
    ids=["deep", "types", "html", "commit", "twice", "size", "hash", "blob", "huge"],
)  # fmt: skip
def test_answers_that_no_hub_gives(site: Hub, manifest: Manifest, answer: bytes, says: str) -> None:
    site.answers["/api/models/Org/Repo/revision/main"] = answer
    with pytest.raises(StackctlError, match=says):
        fetch.plan_download("hf:Org/Repo", manifest)


@pytest.mark.parametrize("where", ["repo", "blobs", "snapshots", "snapshot", "sub", "blob"])
def test_links_that_were_planted_in_the_store_are_not_followed(
    site: Hub, manifest: Manifest, tmp_path: Path, where: str
) -> None:
    content = model_bytes(tmp_path)
    repo = site.add("Org/Repo", {"sub/a.gguf": content})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = repo_folder("Org/Repo")
    digest = hashlib.sha256(content).hexdigest()
    place = {
        "repo": folder,
        "blobs": folder / "blobs",
        "snapshots": folder / "snapshots",
        "snapshot": folder / "snapshots" / repo.commit,
        "sub": folder / "snapshots" / repo.commit / "sub",
        "blob": folder / "blobs" / digest,
    }[where]
    place.parent.mkdir(parents=True)
    target = elsewhere
    if where == "blob":
        target = elsewhere / "victim"
        target.write_text("mine")
    place.symlink_to(target)
    if where == "repo":
        # A folder that the user has moved to another disk is used as such.
        get("hf:Org/Repo", manifest)
        assert read_model("hf:Org/Repo").files
        return
    with pytest.raises(StackctlError, match="link"):
        get("hf:Org/Repo", manifest)
    assert files_below(elsewhere) == ({"victim": b"mine"} if where == "blob" else {})


def test_a_link_out_of_the_store_is_not_served(
    site: Hub, manifest: Manifest, tmp_path: Path
) -> None:
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path)})
    record = get("hf:Org/Repo", manifest)
    assert record.folder is not None
    link = Path(record.folder) / "a.gguf"
    link.unlink()
    link.symlink_to(tmp_path / "made.gguf")
    with pytest.raises(StackctlError, match="leads out of it"):
        read_model("hf:Org/Repo")


# Tokens


def test_a_token_is_taken_from_where_the_hub_s_tools_keep_it(
    site: Hub, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path)}, private=True)
    with pytest.raises(StackctlError, match="private, or there is no such repository") as error:
        hubs.query_repo("Org/Repo", "main", retries=NONE)
    assert "HF_TOKEN" in (error.value.hint or "")
    file = tmp_path / "hf/token"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{site.token}\n")
    assert hubs.query_repo("Org/Repo", "main").files
    file.write_text("hf_another")
    with pytest.raises(StackctlError):
        hubs.query_repo("Org/Repo", "main", retries=NONE)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "other"))
    (tmp_path / "other").write_text(site.token)
    assert hubs.query_repo("Org/Repo", "main").files
    (tmp_path / "other").unlink()
    monkeypatch.setenv("HF_TOKEN", site.token)
    get("hf:Org/Repo", manifest)
    assert all(r.headers.get("Authorization") is None for r in site.requests if r.cdn)


def test_a_gated_repository_says_what_to_do(site: Hub, manifest: Manifest, tmp_path: Path) -> None:
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path)}, gated=True)
    with pytest.raises(StackctlError, match="its owner asks for consent") as error:
        get("hf:Org/Repo", manifest)
    assert "ask for access" in (error.value.hint or "")


def test_a_token_is_neither_shown_nor_sent_in_the_clear(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "two words secret")
    with pytest.raises(StackctlError) as error:
        hubs.hub_token("https://huggingface.co")
    assert "secret" not in error.value.message + (error.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert hubs.hub_token("https://huggingface.co") == "hf_x"
    assert hubs.hub_token("http://mirror.example") is None


@pytest.mark.parametrize("value", ["ftp://x", "nothing", "file:///x", "https://", "http://["])
def test_an_endpoint_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    with pytest.raises(StackctlError, match="HF_ENDPOINT is not") as error:
        hubs.hub_endpoint()
    assert error.value.exit_code == ExitCode.USAGE


# Lock files


def test_a_lock_brings_the_same_bytes_elsewhere(
    site: Hub, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "m")
    site.add("Org/Repo", dict(files_below(folder)))
    record = get("hf:Org/Repo", manifest)
    path = tmp_path / "model.lock"
    path.write_text(to_json(lockfile.lock_of(record)))
    lock = lockfile.read_lock(path)
    assert lock.source == f"hf:Org/Repo@{record.commit}"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    again = get(lock.source, Manifest(tmp_path / "state2"), lock)
    assert [f.sha256 for f in again.files] == [f.sha256 for f in record.files]


def test_a_hub_that_differs_from_the_lock_is_refused(
    site: Hub, manifest: Manifest, tmp_path: Path
) -> None:
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path)})
    lock = lockfile.lock_of(get("hf:Org/Repo", manifest))
    repo = site.repos["Org/Repo"]
    commit = repo.commit
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path, **{"general.name": "Evil"})})
    site.repos["Org/Repo"].commit = commit
    with pytest.raises(StackctlError, match=r"a\.gguf is another file"):
        fetch.plan_download(lock.source, manifest, lock)


@pytest.mark.parametrize(
    "change",
    [
        {"repo": "Org/Other"},
        {"commit": "b" * 40},
        {"commit": "../../x"},
        {"source": "file:/etc/passwd"},
        {"source": "hf:Org/Repo"},
        {"files": []},
        {"path": "../x"},
        {"path": "/etc/passwd"},
        {"sha256": "x"},
        {"blob": "../../../x"},
        {"blob": "d" * 64},
        {"bytes": -1},
        {"schema": "stackctl.lock/2"},
        {"extra": 1},
    ],
    ids=lambda change: "-".join(f"{k}-{v}" for k, v in change.items())[:30],
)
def test_a_lock_file_of_others_is_data(tmp_path: Path, change: Mapping[str, Any]) -> None:
    file = {"path": "a.gguf", "bytes": 4, "sha256": "c" * 64, "blob": "c" * 64}
    lock: dict[str, Any] = {
        "schema": "stackctl.lock/1", "source": f"hf:Org/Repo@{'a' * 40}", "repo": "Org/Repo",
        "commit": "a" * 40, "files": [file],
    }  # fmt: skip
    path = tmp_path / "lock.json"
    path.write_text(json.dumps(lock))
    assert lockfile.read_lock(path).repo == "Org/Repo"
    for key, value in change.items():
        (file if key in file else lock)[key] = value
    path.write_text(json.dumps(lock))
    with pytest.raises(StackctlError):
        lockfile.read_lock(path)


# What is here stays what it was


@pytest.fixture
def kept(site: Hub, manifest: Manifest, tmp_path: Path) -> StoredModel:
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path)})
    return get("hf:Org/Repo", manifest)


def test_a_changed_file_is_named(kept: StoredModel, manifest: Manifest) -> None:
    model = read_model("hf:Org/Repo")
    path = Path(kept.files[0].path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"x")
    with pytest.raises(StackctlError, match=r"a\.gguf\) has changed: its content") as error:
        manifest.check_model(model)
    assert str(path) in error.value.message
    assert error.value.hint == "stackctl model fetch hf:Org/Repo"
    path.write_bytes(raw[:-1])
    with pytest.raises(StackctlError, match="bytes, not"):
        manifest.check_model(model)
    path.unlink()
    with pytest.raises(StackctlError, match="cannot be read"):
        manifest.check_model(model)


def test_a_file_that_was_only_touched_is_hashed_once(kept: StoredModel, manifest: Manifest) -> None:
    model = read_model("hf:Org/Repo")
    path = Path(kept.files[0].path)
    os.utime(path, ns=(1, 1))
    told: list[object] = []
    assert manifest.check_model(model, told.append) is not None
    assert told
    told.clear()
    assert manifest.check_model(model, told.append) is not None
    assert told == []


def test_a_flipped_byte_is_found_though_size_and_time_are_right(
    kept: StoredModel, manifest: Manifest
) -> None:
    assert [r.status for r in manifests.verify_files(kept)] == ["ok"]
    path = Path(kept.files[0].path)
    before = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert manifest.check_model(read_model("hf:Org/Repo")) is not None
    (result,) = manifests.verify_files(kept)
    assert (result.status, result.evidence) == ("fail", str(path))


def test_a_model_is_taken_as_it_lies(manifest: Manifest, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    record = manifests.import_in_place(f"dir:{folder}", manifest)
    assert {Path(f.path).parent for f in record.files} == {folder}
    assert manifest.check_model(read_model(f"dir:{folder}")) is not None
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(StackctlError, match=r"config\.json has changed|config\.json\) has"):
        manifest.check_model(read_model(f"dir:{folder}"))
    assert manifests.remove_model(record, manifest) == 0
    assert folder.is_dir()
    assert manifest.all() == ()


def test_an_imported_model_of_the_hub_keeps_its_files_when_it_is_removed(
    site: Hub, manifest: Manifest, tmp_path: Path
) -> None:
    site.add("Org/Repo", dict(files_below(checkpoint(tmp_path / "m"))))
    fetched = get("hf:Org/Repo", manifest)
    manifest.remove(fetched.source)  # as if another tool had fetched it
    record = manifests.import_in_place("hf:Org/Repo", manifest)
    assert record.commit == fetched.commit
    before = files_below(repo_folder("Org/Repo"))
    # A fetch that finds the imported files in place does not make them stackctl's own.
    record = get("hf:Org/Repo", manifest)
    assert manifests.remove_model(record, manifest) == 0
    assert files_below(repo_folder("Org/Repo")) == before
    assert manifest.all() == ()


def test_a_later_commit_of_an_imported_model_can_be_removed(
    site: Hub, manifest: Manifest, tmp_path: Path
) -> None:
    files = dict(files_below(checkpoint(tmp_path / "m")))
    site.add("Org/Repo", files)
    fetched = get("hf:Org/Repo", manifest)
    manifest.remove(fetched.source)  # as if another tool had fetched it
    imported = manifests.import_in_place(f"hf:Org/Repo@{fetched.commit}", manifest)
    template = b"a new template"
    site.add("Org/Repo", {**files, "chat_template.jinja": template})
    assert manifests.remove_model(get("hf:Org/Repo", manifest), manifest) == len(template)
    assert manifest.check_record(imported) == imported


def test_verify_advises_to_restore_a_missing_file(
    kept: StoredModel, manifest: Manifest, tmp_path: Path
) -> None:
    Path(kept.files[0].path).unlink()
    (result,) = manifests.verify_files(kept)
    assert (result.status, result.remedy) == ("fail", "stackctl model fetch hf:Org/Repo")
    own = tmp_path / "own.gguf"
    own.write_bytes(model_bytes(tmp_path))
    record = manifests.import_in_place(f"file:{own}", manifest)
    own.unlink()
    (result,) = manifests.verify_files(record)
    assert result.remedy is not None
    assert result.remedy.startswith("restore the file")


def test_what_a_killed_process_has_left_is_in_nobody_s_way(
    kept: StoredModel, manifest: Manifest, tmp_path: Path
) -> None:
    assert kept.folder is not None
    folder = Path(kept.folder)
    # Of this process's number, as in a container, and of another.
    for number in (os.getpid(), 1):
        draft = folder.with_name(f".{folder.name}.{number}")
        draft.mkdir()
        (draft / "a.gguf").symlink_to(f"../../blobs/{kept.files[0].sha256}")
    (folder / f".link.{os.getpid()}").symlink_to("nothing")
    disk = tmp_path / "disk"
    (disk / "files").mkdir(parents=True)
    (disk / "files" / f".{kept.files[0].sha256}.part").write_bytes(b"half of it")
    model_export.export_models([kept], [], disk)
    assert set(files_below(disk / "files")) == {kept.files[0].sha256}
    get("hf:Org/Repo", manifest)
    assert manifests.remove_model(kept, manifest) == kept.bytes
    assert not repo_folder("Org/Repo").exists()


def test_an_export_does_not_overwrite_a_file_through_a_hard_link(
    kept: StoredModel, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"another user's")
    files = tmp_path / "disk" / "files"
    files.mkdir(parents=True)
    (files / f".{kept.files[0].sha256}.part").hardlink_to(precious)
    with pytest.raises(StackctlError, match="is not a file of its own"):
        model_export.export_models([kept], [], tmp_path / "disk")
    assert precious.read_bytes() == b"another user's"


def test_what_lies_in_another_cache_is_not_said_to_be_removed(
    kept: StoredModel, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    with pytest.raises(StackctlError, match="is not below"):
        manifests.remove_model(kept, manifest)
    assert manifest.all() == (kept,)
    repo_folder("Org/Repo").parent.mkdir()
    monkeypatch.delenv("HF_HUB_CACHE")
    repo_folder("Org/Repo").rename(tmp_path / "gone")
    assert manifests.remove_model(kept, manifest) == 0
    assert manifest.all() == ()


def test_removing_leaves_what_others_use(site: Hub, manifest: Manifest, tmp_path: Path) -> None:
    one, two = model_bytes(tmp_path), model_bytes(tmp_path, **{"general.name": "Two"})
    site.add("Org/Repo", {"a-Q4_0.gguf": one, "b-Q8_0.gguf": two, "c-Q5_0.gguf": one})
    records = [get(f"hf:Org/Repo:{quant}", manifest) for quant in ("Q4_0", "Q8_0", "Q5_0")]
    assert manifests.remove_model(records[0], manifest) == 0
    assert read_model("hf:Org/Repo:Q5_0").name == "Tiny"
    assert manifests.remove_model(records[1], manifest) == len(two)
    assert manifests.remove_model(records[2], manifest) == len(one)
    assert not repo_folder("Org/Repo").exists()
    with pytest.raises(ModelNotCached):
        read_model("hf:Org/Repo:Q4_0")


# Carried to another machine


def test_a_folder_brings_models_to_a_machine_without_network(
    kept: StoredModel, site: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "disk"
    model_export.export_models([kept], [], folder)
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    site.close()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "there"))
    manifest = Manifest(tmp_path / "state-there")
    records, images = model_export.import_export(folder, manifest)
    assert [record.commit for record in records] == [kept.commit]
    assert images == []
    model = read_model("hf:Org/Repo")
    assert manifest.check_model(model) is not None


def test_a_damaged_folder_leaves_no_model(
    kept: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "disk"
    model_export.export_models([kept], [], folder)
    file = folder / "files" / kept.files[0].sha256
    file.write_bytes(b"x" + file.read_bytes()[1:])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "there"))
    with pytest.raises(StackctlError, match="is damaged"):
        model_export.import_export(folder, Manifest(tmp_path / "state-there"))
    with pytest.raises(ModelNotCached):
        read_model("hf:Org/Repo")
    file.write_bytes(Path(kept.files[0].path).read_bytes())
    document = json.loads((folder / model_export.NAME).read_text())
    document["models"][0]["files"][0]["blob"] = "0" * 40
    (folder / model_export.NAME).write_text(json.dumps(document))
    with pytest.raises(StackctlError, match="is damaged"):
        model_export.import_export(folder, Manifest(tmp_path / "state-there"))
    document["models"][0]["files"][0]["path"] = "../../x"
    (folder / model_export.NAME).write_text(json.dumps(document))
    with pytest.raises(StackctlError, match="is not a valid file name"):
        model_export.import_export(folder, Manifest(tmp_path / "state-there"))


# Before the download


def test_the_facts_of_a_model_are_known_before_its_download(site: Hub, tmp_path: Path) -> None:
    path = ggufs.write(tmp_path / "a.gguf", {"x": "y" * 100})
    weights = checkpoint(tmp_path / "m", PLAIN)
    site.add("Org/Gguf", {"a-Q4_0.gguf": path})
    site.add("Org/St", dict(files_below(weights)))
    site.add("Org/Parts", {p.name: p for p in ggufs.write_shards(tmp_path, "p", 2)})
    for repo, local in (
        ("Org/Gguf", f"file:{path}"),
        ("Org/St", f"dir:{weights}"),
        ("Org/Parts", f"file:{tmp_path}/p-00001-of-00002.gguf"),
    ):
        found = hubs.query_repo(repo, "main")
        model = remote_models.read_remote_facts(
            f"hf:{repo}", found, remote_models.choose_model(found, None), tmp_path / "c"
        )
        here = read_model(local)
        for name in ("parameters", "weights_bytes", "layers", "kv", "architecture", "quantization"):
            assert getattr(model, name) == getattr(here, name), (repo, name)
        assert model.files == ()
        assert model.facts.startswith(f"hub: {repo}@")
    assert list((tmp_path / "c").iterdir()) == []


def test_only_the_beginning_of_a_large_file_is_fetched(site: Hub, tmp_path: Path) -> None:
    tensors = (*ggufs.TENSORS, ggufs.Tensor("blk.0.ffn_down.weight", (1024, 8192), "F32"))
    path = ggufs.write(tmp_path / "a.gguf", tensors=tensors)
    site.add("Org/Repo", {"a.gguf": path})
    found = hubs.query_repo("Org/Repo", "main")
    remote_models.read_remote_facts(
        "hf:Org/Repo", found, remote_models.choose_model(found, None), tmp_path / "c"
    )
    assert site.sent("/cdn/.*") == 2 << 20
    assert path.stat().st_size > 30 << 20


def test_another_range_than_the_requested_one_is_refused(site: Hub, tmp_path: Path) -> None:
    tensors = (*ggufs.TENSORS, ggufs.Tensor("blk.0.ffn_down.weight", (1024, 8192), "F32"))
    site.add("Org/Repo", {"a.gguf": ggufs.write(tmp_path / "a.gguf", tensors=tensors)})
    found = hubs.query_repo("Org/Repo", "main")
    site.fault("/cdn/", shift=7)
    with pytest.raises(StackctlError, match="sent bytes 7-2097158/"):
        remote_models.read_remote_facts(
            "hf:Org/Repo", found, remote_models.choose_model(found, None), tmp_path / "c"
        )


def test_waiting_for_a_busy_hub_is_reported(site: Hub, tmp_path: Path) -> None:
    site.add("Org/Repo", {"a.gguf": model_bytes(tmp_path)})
    site.fault("/api/models/", status=429, times=1, headers={"Retry-After": "1"})
    heard: list[str] = []
    patience = RetryPolicy(attempts=1, first_s=0)
    assert hubs.query_repo("Org/Repo", "main", retries=patience, report_wait=heard.append).files
    host = site.url.removeprefix("http://")
    assert heard == [f"{host} is busy (429): once more in 1 s"]
