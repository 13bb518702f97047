"""The catalogue: every entry valid, sourced and plausible; and how a model is described."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import checkpoint
from ggufs import write, write_shards

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.catalogue import CatalogueEntry, catalogue_entries
from stackctl.sources.model_text import model_rows
from stackctl.sources.models import read_model
from stackctl.values.base import to_json
from stackctl.values.model import KvLayout, Model

ALL = sorted(catalogue_entries())
NUMBERS = (
    *("parameters", "active_parameters", "weights_bytes", "embedding_bytes", "layers", "context"),
    *("embedding", "feed_forward", "heads", "vocabulary", "kv"),
)


def test_the_reference_models_are_there() -> None:
    for name in (
        *("iquest-coder-40b-q5_k_m", "iquest-coder-40b-nvfp4", "iquest-coder-40b-loop-nvfp4"),
        *("command-a-reasoning-111b-nvfp4", "minimax-m2-229b-a10b-q4_k_m"),
        *("kimi-k2.5-1t-a32b-q4_k_s", "qwen2.5-coder-7b-q5_k_m", "qwen2.5-coder-14b-q5_k_m"),
        *("qwen3-coder-30b-a3b-q4_k_m", "gemma-3-270m-q4_k_m"),
    ):
        assert name in ALL


@pytest.mark.parametrize("name", ALL)
def test_every_number_has_one_source(name: str) -> None:
    entry = catalogue_entries()[name]
    named = [field for source in entry.sources for field in source.of]
    wanted = [*NUMBERS, *(["passes"] if entry.passes > 1 else [])]
    if entry.experts:
        wanted += ["experts", "experts_used", "expert_bytes"]
    assert sorted(named) == sorted(wanted)
    assert all(len(source.text) > 15 for source in entry.sources)


@pytest.mark.parametrize("name", ALL)
def test_sizes_agree_with_the_name(name: str, tmp_path: Path) -> None:
    model = read_model(f"catalogue:{name}")
    assert model.active_parameters is not None
    size = re.search(r"-(\d+(?:\.\d+)?)([mbt])(?:-a(\d+)b)?-", name)
    assert size
    stated = float(size[1]) * {"m": 10**6, "b": 10**9, "t": 10**12}[size[2]]
    assert model.parameters == pytest.approx(stated, rel=0.09)
    if size[3]:
        assert model.active_parameters == pytest.approx(int(size[3]) * 10**9, rel=0.06)
    usual = {"q4_k_s": 4.55, "q4_k_m": 4.85, "q5_k_m": 5.7, "nvfp4": 4.75, "bf16": 16}
    bits = usual[name.split("-")[-1]]
    if model.parameters > 10**9:
        assert model.weights_bytes * 8 / model.parameters == pytest.approx(bits, rel=0.03)
    assert 0 < model.active_bytes <= model.weights_bytes
    assert (model.expert_bytes or 0) + (model.embedding_bytes or 0) < model.weights_bytes
    path = tmp_path / "facts.json"
    path.write_text(to_json(model))
    assert read_model(f"facts:{path}") == model


def counted(entry: CatalogueEntry) -> int:
    """The weights that a dense model of these shapes has, without norms and biases."""
    kv = entry.kv
    attention = 2 * entry.embedding * entry.heads * kv.key_dim
    attention += 2 * entry.embedding * kv.heads * kv.key_dim
    tables = 1 if entry.embedding_bytes == 0 else 2
    layer = attention + 3 * entry.embedding * entry.feed_forward
    return entry.layers * layer + tables * entry.vocabulary * entry.embedding


@pytest.mark.parametrize("name", [name for name in ALL if not catalogue_entries()[name].experts])
def test_dense_models_have_the_parameters_of_their_shapes(name: str) -> None:
    entry = catalogue_entries()[name]
    assert entry.parameters == pytest.approx(counted(entry), rel=0.0003)
    table = entry.vocabulary * entry.embedding if entry.embedding_bytes else 0
    assert entry.active_parameters == entry.parameters - table


def test_the_facts_the_user_measured() -> None:
    nvfp4 = read_model("catalogue:iquest-coder-40b-nvfp4")
    assert round(nvfp4.weights_bytes / 2**30, 1) == 21.9
    loop = read_model("catalogue:iquest-coder-40b-loop-nvfp4")
    assert (loop.passes, nvfp4.passes) == (2, 1)
    assert loop.weights_bytes == pytest.approx(nvfp4.weights_bytes, rel=0.001)
    for model in (nvfp4, loop):
        kv = model.kv
        assert kv is not None
        assert sum(kv.kv_heads) * (kv.key_dim + kv.value_dim) * 2 == 320 * 1024
    command = read_model("catalogue:command-a-reasoning-111b-nvfp4").kv
    assert command is not None
    assert (command.sliding_layers, command.sliding[:4]) == (48, (True, True, True, False))
    kimi = read_model("catalogue:kimi-k2.5-1t-a32b-q4_k_s").kv
    assert kimi is not None
    assert round(sum(kimi.kv_heads) * kimi.key_dim * 2 / 1024, 1) == 68.6


def test_unknown_entries_name_what_is_near() -> None:
    with pytest.raises(StackctlError) as caught:
        read_model("catalogue:iquest-coder-40b")
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    assert "iquest-coder-40b-nvfp4" in (caught.value.hint or "")
    with pytest.raises(StackctlError) as caught:
        read_model("catalogue:zzz")
    assert caught.value.hint == "stackctl model catalogue lists them"


def rows(model: Model) -> dict[str, str]:
    return dict(model_rows(model))


def test_a_description_for_people(tmp_path: Path) -> None:
    found = rows(read_model("catalogue:minimax-m2-229b-a10b-q4_k_m"))
    assert found["parameters"] == "229B, 10.4B active for a token"
    assert found["experts"] == "256, 8 used for a token; 126 GiB"
    assert found["KV cache"] == "GQA, 8 heads of 128 in 62 layers"
    assert found[""] == "248 KiB a token at 16 bit"
    assert found["quantisation"] == "Q4_K_M, 4.84 bits a weight"
    found = rows(read_model("catalogue:iquest-coder-40b-loop-nvfp4"))
    assert found["layers"] == "80, run 2 times for a token"
    assert found["quantisation"] == "nvfp4 (modelopt), 4.73 bits a weight"
    assert found["files"].startswith("none")
    assert rows(read_model("catalogue:kimi-k2.5-1t-a32b-q4_k_s"))["KV cache"].startswith("MLA, one")
    lines = model_rows(read_model("catalogue:gemma-3-270m-q4_k_m"))
    assert ("", "15 layers keep only 512 tokens") in lines
    assert ("parameters", "268M, all active for a token") in lines
    found = rows(read_model(f"dir:{checkpoint(tmp_path / 'm')}"))
    assert found["architecture"] == "LlamaForCausalLM (safetensors)"
    assert found["cannot run"] == "llama.cpp: needs a GGUF"
    shards = write_shards(tmp_path)
    assert f"3 in {tmp_path}" in rows(read_model(str(shards[0])))["files"]


def test_descriptions_fit_80_columns() -> None:
    for name in ALL:
        for label, text in model_rows(read_model(f"catalogue:{name}")):
            if label not in ("facts", "cannot run"):
                assert len(text) <= 64, text


def test_a_description_of_little(tmp_path: Path) -> None:
    model = Model(source="x", architecture="y", parameters=0, weights_bytes=0, layers=1)
    assert rows(model)["KV cache"] == "unknown"
    state = KvLayout(kind="hybrid", kv_heads=(0,), key_dim=0, value_dim=0, state_bytes=2048)
    model = Model(source="x", architecture="y", parameters=900, weights_bytes=1, layers=1, kv=state)
    assert ("KV cache", "none") in model_rows(model)
    assert ("", "2 KiB of recurrent state a sequence") in model_rows(model)
    assert rows(read_model(str(write(tmp_path / "a.gguf"))))["chat template"] == "yes"
