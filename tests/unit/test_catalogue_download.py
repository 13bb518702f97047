"""The catalogue's downloads: every shipped profile gets its model, or says which one to make."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import ggufs
import msgspec
import pytest
from hub import Hub, hub
from samples import EPYC_GPU
from standins import add_standin, downloads

from stackctl.cli.main import run
from stackctl.cli.output import Output
from stackctl.cli.session import Session
from stackctl.deploy import model_download
from stackctl.deploy.context import Context
from stackctl.deploy.model_download import ensure_model
from stackctl.deploy.model_integrity import require_verified
from stackctl.deploy.new_generation import UpOptions
from stackctl.deploy.planning import PlanBasis
from stackctl.engines import uses_gpu
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman
from stackctl.resources import data_folder
from stackctl.sources.catalogue import catalogue_entries, find_download, replacement_advice
from stackctl.sources.hub_cache import parse_remote, repo_folder
from stackctl.sources.models import read_model
from stackctl.sources.profiles import Profiles
from stackctl.store.hub import HubRefusal
from stackctl.values.host import Tools
from stackctl.values.profile import Overrides, Profile

PROFILES = Profiles([data_folder("profiles")])
SHIPPED = {name: PROFILES.resolve(name, Overrides()) for name in PROFILES.names()}
ON_CPU = [name for name, profile in SHIPPED.items() if not uses_gpu(profile)]
#: Their models have no known place on a hub.
TO_MAKE = ["gpu-nvfp4", "gpu-reasoning"]


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Context:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    out = Output(json=False, quiet=True, verbose=False, color="never", progress=False)
    return Session(out, "user", yes=True).context(recover="no")


@pytest.fixture
def site(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "hub").mkdir()
    with hub(tmp_path / "hub") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


@pytest.fixture(autouse=True)
def epyc(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan for the EPYC with a GPU, which can run all shipped profiles, not for this machine.

    It has the images that are built.
    """
    basis = PlanBasis(context.paths, context.machine, EPYC_GPU)
    monkeypatch.setattr(model_download, "read_basis", lambda *_: basis)
    monkeypatch.setattr(podman, "image_exists", lambda _: True)


@pytest.mark.parametrize("name", sorted(catalogue_entries()))
def test_every_entry_has_a_download_with_evidence_or_advice(name: str) -> None:
    entry = catalogue_entries()[name]
    assert (entry.download is None) != (entry.instead is None)
    if entry.download is None:
        assert replacement_advice(f"catalogue:{name}") == entry.instead
        assert find_download(f"catalogue:{name}") is None
        return
    parsed = parse_remote(entry.download.source)
    assert parsed is not None
    assert (parsed.repo, parsed.quant) == (entry.download.repo, entry.download.file)
    assert re.fullmatch("[0-9a-f]{40}", entry.download.revision or "0" * 40)
    assert (entry.format == "gguf") == (entry.download.file or "").endswith(".gguf")
    addresses = [one.address for one in entry.download.evidence]
    assert any(
        address.startswith(f"https://huggingface.co/{entry.download.repo}") for address in addresses
    )
    assert all(len(one.text) > 15 for one in entry.download.evidence)
    if entry.download.bytes is not None:
        assert entry.download.bytes == pytest.approx(entry.weights_bytes, rel=0.03)
    assert replacement_advice(f"catalogue:{name}") is None


def test_a_revision_is_part_of_the_source() -> None:
    one = downloads()["qwen2.5-coder-7b-q5_k_m"]
    pinned = msgspec.structs.replace(one, revision="a" * 40)
    assert pinned.source == f"hf:{one.repo}@{'a' * 40}:{one.file}"


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_shipped_profile_has_a_model_that_can_be_fetched_or_advice(name: str) -> None:
    source = SHIPPED[name].model
    assert source is not None
    if name in TO_MAKE:
        assert "--model dir:FOLDER" in (replacement_advice(source) or "")
    else:
        assert find_download(source) is not None


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - set(TO_MAKE)))
def test_up_fetches_the_model_of_a_shipped_profile(
    name: str, context: Context, site: Hub, tmp_path: Path
) -> None:
    profile = SHIPPED[name]
    assert profile.model is not None
    download = find_download(profile.model)
    assert download is not None
    add_standin(site, download, tmp_path)
    assert not read_model(profile.model).files
    ensure_model(context, profile, UpOptions())
    model = read_model(profile.model)
    assert model.source == download.source
    assert model.files
    require_verified(context, model)
    sent = site.sent()
    ensure_model(context, profile, UpOptions())
    assert site.sent() == sent


@pytest.mark.parametrize("name", ["cpu-vllm", "hybrid-moe"])
def test_up_completes_a_model_of_which_another_tool_has_fetched_a_part(
    name: str, context: Context, site: Hub, tmp_path: Path
) -> None:
    source = SHIPPED[name].model or ""
    download = find_download(source)
    assert download is not None
    add_standin(site, download, tmp_path)
    ensure_model(context, SHIPPED[name], UpOptions())
    shutil.rmtree(context.paths.state / "models")
    kept = (download.file or "config.json").rpartition("/")[2]
    for link in (repo_folder(download.repo) / "snapshots").glob("**/*"):
        if link.is_symlink() and link.name != kept:
            link.unlink()
    if download.file is None:
        # A configuration alone is no model, so a plan uses the catalogue's facts.
        assert read_model(source).facts.startswith("catalogue: ")
    ensure_model(context, SHIPPED[name], UpOptions())
    model = read_model(source)
    assert model.files
    require_verified(context, model)


def test_most_of_the_shipped_profiles_run_on_a_cpu() -> None:
    assert {"cpu", "cpu-latency", "cpu-small", "cpu-vllm", "demo"} <= set(ON_CPU)
    assert not set(ON_CPU) & set(TO_MAKE)


def test_the_catalogue_refuses_before_the_hub_is_asked(context: Context, site: Hub) -> None:
    large = "catalogue:kimi-k2.5-1t-a32b-q4_k_s"
    profile = msgspec.structs.replace(SHIPPED["cpu"], model=large)
    with pytest.raises(StackctlError, match="not viable: first token after") as caught:
        ensure_model(context, profile, UpOptions())
    assert caught.value.exit_code == ExitCode.REFUSED
    assert not site.requests


def test_the_header_refuses_before_the_download(
    context: Context, site: Hub, tmp_path: Path
) -> None:
    # A file with other shapes than the catalogue's: its KV cache has 32 TiB.
    download = find_download(SHIPPED["demo"].model or "")
    assert download is not None
    assert download.file is not None
    wide = {f"llama.attention.{part}_length": 1 << 30 for part in ("key", "value")}
    site.add(download.repo, {download.file: ggufs.write(tmp_path / "m.gguf", wide).read_bytes()})
    with pytest.raises(StackctlError, match="does not fit") as caught:
        ensure_model(context, SHIPPED["demo"], UpOptions())
    assert caught.value.exit_code == ExitCode.REFUSED
    assert not (tmp_path / "cache/huggingface").exists()


def test_nothing_is_downloaded_for_a_machine_that_cannot_start_it(
    context: Context, site: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(podman, "image_exists", lambda _: False)
    with pytest.raises(StackctlError, match="there is no local image") as caught:
        ensure_model(context, SHIPPED["cpu-vllm"], UpOptions())
    assert caught.value.exit_code == ExitCode.HOST
    assert "stackctl image build vllm-cpu" in (caught.value.hint or "")
    bare = msgspec.structs.replace(EPYC_GPU, tools=Tools())
    basis = PlanBasis(context.paths, context.machine, bare)
    monkeypatch.setattr(model_download, "read_basis", lambda *_: basis)
    with pytest.raises(StackctlError, match="podman is not installed") as caught:
        ensure_model(context, SHIPPED["cpu-small"], UpOptions())
    # Not apt-get: some releases have a podman that is too old, others have no apt-get.
    assert (caught.value.hint or "").endswith("or newer: stackctl provision --only podman")
    tools = msgspec.structs.replace(EPYC_GPU.tools, cdi=())
    basis = PlanBasis(
        context.paths, context.machine, msgspec.structs.replace(EPYC_GPU, tools=tools)
    )
    with pytest.raises(StackctlError, match="cannot have its GPU"):
        ensure_model(context, SHIPPED["gpu-gguf"], UpOptions())
    assert not site.requests


def test_a_dry_run_names_the_download(context: Context) -> None:
    profile = _demo()
    ensure_model(context, profile, UpOptions(dry_run=True))
    model = read_model(profile.model or "")
    with pytest.raises(StackctlError, match="only facts about it") as caught:
        require_verified(context, model)
    wanted = "stackctl model fetch hf:unsloth/gemma-3-270m-it-GGUF:gemma-3-270m-it-Q4_K_M.gguf"
    assert caught.value.hint == wanted


def test_a_repository_that_is_gone_is_an_error_with_another_way(
    context: Context, site: Hub
) -> None:
    with pytest.raises(HubRefusal, match="no such repository") as caught:
        ensure_model(context, _demo(), UpOptions(force=True))
    assert "another copy of this model: --model file:PATH" in (caught.value.hint or "")


def test_a_repository_without_the_file_is_an_error_with_another_way(
    context: Context, site: Hub, tmp_path: Path
) -> None:
    download = find_download(_demo().model or "")
    assert download is not None
    site.add(download.repo, {"x-Q2_K.gguf": ggufs.write(tmp_path / "x.gguf").read_bytes()})
    with pytest.raises(StackctlError, match=f"has no {download.file}") as caught:
        ensure_model(context, _demo(), UpOptions(force=True))
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    assert "another copy of this model: --model file:PATH" in (caught.value.hint or "")


def test_a_checkpoint_that_nobody_publishes_has_to_be_made(context: Context, site: Hub) -> None:
    with pytest.raises(HubRefusal, match="no such repository") as caught:
        ensure_model(context, SHIPPED["gpu-nvfp4"], UpOptions(force=True))
    assert "ModelOpt" in (caught.value.hint or "")
    assert "stackctl up gpu-gguf" in (caught.value.hint or "")
    profile = SHIPPED["gpu-reasoning"]
    before = len(site.requests)
    ensure_model(context, profile, UpOptions(force=True))
    assert len(site.requests) == before
    with pytest.raises(StackctlError, match="only facts about it") as missing:
        require_verified(context, read_model(profile.model or ""))
    assert "CohereLabs/command-a-reasoning-08-2025" in (missing.value.hint or "")


def test_model_fetch_takes_the_id_of_an_entry(
    context: Context, site: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download = downloads()["qwen2.5-coder-7b-q5_k_m"]
    repo = add_standin(site, download, tmp_path)
    assert run(["--user", "model", "fetch", "catalogue:qwen2.5-coder-7b-q5_k_m"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip().endswith(f"snapshots/{repo.commit}")
    assert download.source in printed.err
    assert run(["--user", "model", "fetch", "catalogue:command-a-reasoning-111b-nvfp4"]) == 2
    assert "llm-compressor" in capsys.readouterr().err


def test_a_profile_shows_where_its_model_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profiles", "show", "cpu-small"]) == 0
    text = "".join(capsys.readouterr().out.split())
    assert "(upfetcheshf:Qwen/Qwen2.5-Coder-7B-Instruct-GGUF:qwen2.5-coder-7b-" in text
    assert run(["profiles", "show", "gpu-reasoning"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(for plans only: up needs --model)" in text
    assert "make one from CohereLabs/command-a-reasoning-08-2025" in text
    assert run(["profiles", "show", "gpu-nvfp4"]) == 0
    text = capsys.readouterr().out
    assert "or serve the GGUF: stackctl up gpu-gguf" in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())


def _demo(**changes: object) -> Profile:
    return msgspec.structs.replace(SHIPPED["demo"], **changes)
