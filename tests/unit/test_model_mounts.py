"""Where an engine in its container finds a model: what is mounted is what it reads."""

from __future__ import annotations

from pathlib import Path

import ggufs
import msgspec
import pytest
from checkpoints import checkpoint, sharded
from samples import GEMMA, IQUEST, shipped, shipped_model

from stackctl.deploy.preflight import require_files
from stackctl.engines import model_mounts
from stackctl.engines.model_mounts import served_name
from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.models import read_model
from stackctl.values.base import from_json, to_json
from stackctl.values.model import Model, ModelFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(root: Path, made: Path) -> Path:
    """The files of a folder as the hub's own tools keep them: links to blobs. The snapshot."""
    repo = root / "models--Org--Repo"
    snapshot = repo / "snapshots" / COMMIT
    for part in (repo / "refs", repo / "blobs", snapshot):
        part.mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    for number, file in enumerate(sorted(made.iterdir())):
        blob = repo / "blobs" / f"{number:064x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_a_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    model = read_model(f"dir:{folder}")
    assert model_mounts.model_mounts(model) == ((str(folder), "/models"),)
    assert model_mounts.model_path(model) == "/models"
    assert model_mounts.snapshot_commit(model) is None
    require_files(model)


def test_a_folder_behind_a_link(tmp_path: Path) -> None:
    """A container sees what is mounted, and a unit outlives the link."""
    folder = checkpoint(tmp_path / "disk/m")
    (tmp_path / "models").symlink_to(tmp_path / "disk")
    model = read_model(f"dir:{tmp_path}/models/m")
    assert model_mounts.model_mounts(model) == ((str(folder), "/models"),)
    require_files(model)


@pytest.mark.parametrize("way", ["hf:Org/Repo", "dir:"])
def test_a_snapshot_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = hub(tmp_path, sharded(tmp_path / "made"))
    model = read_model(way if way.startswith("hf:") else f"dir:{snapshot}")
    # Its files lead to the blobs beside it, so all of the repository is seen.
    assert model_mounts.model_mounts(model) == ((str(tmp_path / "models--Org--Repo"), "/models"),)
    assert model_mounts.model_path(model) == f"/models/snapshots/{COMMIT}"
    assert model_mounts.snapshot_commit(model) == COMMIT
    require_files(model)
    inside = Path(model_mounts.model_path(model)).relative_to("/models")
    assert (tmp_path / "models--Org--Repo" / inside / "config.json").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_is_linked_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    require_files(read_model(f"dir:{folder}"))
    elsewhere = (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(StackctlError, match=f"{elsewhere} is a file of the model") as caught:
        require_files(read_model(f"dir:{folder}"))
    assert caught.value.exit_code == ExitCode.FAILED
    assert "not a link to it" in (caught.value.hint or "")


def test_a_folder_of_which_another_s_name_begins_alike(tmp_path: Path) -> None:
    folder, other = checkpoint(tmp_path / "m"), checkpoint(tmp_path / "m2")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other / "model.safetensors")
    with pytest.raises(StackctlError, match="lies outside"):
        require_files(read_model(f"dir:{folder}"))


def test_a_folder_that_went_away(tmp_path: Path) -> None:
    model = read_model(f"dir:{checkpoint(tmp_path / 'm')}")
    (tmp_path / "m").rename(tmp_path / "n")
    with pytest.raises(StackctlError, match=f"cannot read {tmp_path}/m: No such file"):
        require_files(model)


def test_a_gguf_file() -> None:
    (file,) = GEMMA.files
    name = file.path.rpartition("/")[2]
    assert model_mounts.model_mounts(GEMMA) == ((file.path, f"/models/{name}"),)
    assert model_mounts.model_path(GEMMA) == f"/models/{name}"
    assert model_mounts.snapshot_commit(GEMMA) is None


def test_the_parts_of_a_gguf_model() -> None:
    names = [f"x-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    parts = tuple(ModelFile(path=f"/m/{name}", bytes=1) for name in names)
    model = msgspec.structs.replace(IQUEST, files=parts)
    assert model_mounts.model_mounts(model) == tuple(
        (f"/m/{name}", f"/models/{name}") for name in names
    )
    assert model_mounts.model_path(model) == f"/models/{names[0]}"


def test_a_gguf_in_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine must see names: llama.cpp finds further parts by them, clients the model."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "made").mkdir()
    ggufs.write_shards(tmp_path / "made", "big-Q8_0")
    ggufs.write(tmp_path / "made/small-Q4_K_M.gguf")
    blobs = hub(tmp_path, tmp_path / "made").parents[1] / "blobs"
    big, small = read_model("hf:Org/Repo:Q8_0"), read_model("hf:Org/Repo:Q4_K_M")
    assert model_mounts.model_mounts(big) == tuple(
        (f"{blobs}/{part:064x}", f"/models/big-Q8_0-{part + 1:05}-of-00003.gguf")
        for part in range(3)
    )
    assert model_mounts.model_path(big) == "/models/big-Q8_0-00001-of-00003.gguf"
    assert model_mounts.model_mounts(small) == ((f"{blobs}/{3:064x}", "/models/small-Q4_K_M.gguf"),)
    assert (served_name(big), served_name(small)) == ("big-Q8_0", "small-Q4_K_M")
    for model in (big, small):
        require_files(model)
        assert from_json(to_json(model).encode(), Model, where="") == model


def test_a_model_of_which_only_facts_are_known() -> None:
    model = shipped_model(shipped("gpu-nvfp4"))
    assert model_mounts.model_mounts(model) == ()
    assert model_mounts.model_path(model) == "IQuestLab/IQuest-Coder-V1-40B-Instruct-nvfp4"
    with pytest.raises(StackctlError, match="only facts about it") as caught:
        require_files(model)
    assert "--model dir:" in (caught.value.hint or "")
    with pytest.raises(StackctlError, match="only facts about it") as caught:
        require_files(msgspec.structs.replace(IQUEST, files=()))
    assert "--model file:" in (caught.value.hint or "")
