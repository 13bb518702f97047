"""From a source to the facts of a model: fields, layouts of the KV cache, shards, refusals."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
from ggufs import LLAMA, TENSORS, As, Tensor, Value, gguf, write, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackctl.engines.model_mounts import served_name
from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.models import read_model
from stackctl.values.base import to_json
from stackctl.values.model import KvLayout, Model, ModelFile

#: The reason that every GGUF file has.
VLLM = "vllm: GGUF is not served by vLLM here; use llama.cpp or the safetensors checkpoint"


def of(path: Path, arch: str = "llama", **keys: Value | None) -> Model:
    """A model of an architecture; ``__`` in a name stands for a dot."""
    base = {k.replace("llama.", f"{arch}.", 1): v for k, v in LLAMA.items()}
    changes = {f"{arch}.{name.replace('__', '.')}": value for name, value in keys.items()}
    write(path / "m.gguf", {"general.architecture": arch, **changes}, base=base)
    return read_model(f"file:{path}/m.gguf")


def layout(path: Path, arch: str = "llama", **keys: Value | None) -> KvLayout:
    kv = of(path, arch, **keys).kv
    assert kv is not None
    return kv


def fails(source: str | Path, code: ExitCode = ExitCode.FAILED) -> StackctlError:
    with pytest.raises(StackctlError) as caught:
        read_model(str(source))
    assert caught.value.exit_code == code
    return caught.value


def test_every_field(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    model = read_model(f"file:{path}")
    assert model == Model(
        source=f"file:{path}",
        name="Tiny",
        architecture="llama",
        parameters=64 * 4 + 64 + 256 * 3,
        active_parameters=64 * 4 + 64 + 256 * 3,
        quantization="Q4_K_M",
        quantization_method="gguf",
        weights_bytes=272 + 256 + 432,
        embedding_bytes=0,
        layers=4,
        context=4096,
        embedding=64,
        feed_forward=256,
        heads=8,
        vocabulary=4,
        kv=KvLayout(kv_heads=(2, 2, 2, 2), key_dim=8, value_dim=8),
        chat_template=True,
        files=(ModelFile(path=str(path), bytes=path.stat().st_size),),
        unsupported=(VLLM,),
    )


def test_an_embedding_beside_an_output_is_not_read(tmp_path: Path) -> None:
    tensors = [*TENSORS, Tensor("output.weight", (64, 4), "Q8_0")]
    model = read_model(str(write(tmp_path / "m.gguf", tensors=tensors)))
    assert model.embedding_bytes == 272
    assert model.active_parameters == model.parameters - 64 * 4
    tensors = [*TENSORS, Tensor("per_layer_token_embd.weight", (32,), "F32")]
    model = read_model(str(write(tmp_path / "m.gguf", tensors=tensors)))
    assert (model.embedding_bytes, model.active_parameters) == (128, model.parameters - 32)


def test_what_a_file_does_not_say_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    base: dict[str, Value] = {"general.architecture": "rwkv7", "rwkv7.block_count": 2}
    write(path, base=base, tensors=[Tensor("a", (256,), "Q6_K"), Tensor("b", (8,))])
    model = read_model(str(path))
    assert model.quantization == "Q6_K"
    for name in ("name", "context", "embedding", "feed_forward", "vocabulary", "experts", "kv"):
        assert getattr(model, name) is None
    assert model.expert_bytes is None
    assert model.chat_template is False


@pytest.mark.parametrize(
    ("number", "label"),
    [(0, "F32"), (1, "F16"), (7, "Q8_0"), (17, "Q5_K_M"), (38, "MXFP4_MOE"), (4, "Q4_K")],
)
def test_quantization(tmp_path: Path, number: int, label: str) -> None:
    path = write(tmp_path / "m.gguf", {"general.file_type": number})
    assert read_model(f"file:{path}").quantization == label


def test_a_long_chat_template_and_a_hostile_name(tmp_path: Path) -> None:
    changes: dict[str, Value | None] = {
        "tokenizer.chat_template": "x" * 100_000,
        "general.name": "a\x1b[31m\nb",
        "tokenizer.ggml.tokens": None,
        "llama.vocab_size": 77,
        "llama.feed_forward_length": [256, 512, 128, 0],
    }
    model = read_model(str(write(tmp_path / "m.gguf", changes)))
    assert (model.chat_template, model.name) == (True, "a?[31m?b")
    assert (model.vocabulary, model.feed_forward) == (77, 512)


def test_experts(tmp_path: Path) -> None:
    tensors = [Tensor("blk.0.ffn_up_exps.weight", (32, 2, 4), "Q8_0"), Tensor("b", (8,))]
    changes: dict[str, Value | None] = {"llama.expert_count": 4, "llama.expert_used_count": 2}
    model = read_model(str(write(tmp_path / "m.gguf", changes, tensors=tensors)))
    assert (model.experts, model.experts_used, model.expert_bytes) == (4, 2, 272)
    assert model.weights_bytes == 272 + 32
    assert model.active_parameters == 32 * 2 * 4 // 2 + 8
    changes["llama.expert_used_count"] = 5
    path = write(tmp_path / "m.gguf", changes, tensors=tensors)
    assert fails(path).message == f"{path} uses 5 of 4 experts for a token"
    dense = of(tmp_path, expert_count=0, expert_used_count=2)
    assert (dense.experts, dense.experts_used, dense.expert_bytes) == (None, None, None)


def test_heads_and_dimensions(tmp_path: Path) -> None:
    kv = layout(tmp_path, attention__key_length=192, attention__value_length=128)
    assert (kv.key_dim, kv.value_dim) == (192, 128)
    kv = layout(tmp_path, attention__head_count_kv=None)
    assert (kv.kv_heads, kv.key_dim) == ((8,) * 4, 8)
    kv = layout(tmp_path, attention__head_count_kv=As("i32", [0, 4, 0, 8]))
    assert kv.kv_heads == (0, 4, 0, 8)
    kv = layout(tmp_path, attention__head_count_kv=As("u64", [2, 4, 2]))  # one layer for MTP
    assert kv.kv_heads == (2, 4, 2, 4)
    kv = layout(tmp_path, attention__head_count=As("i32", [0, 16, 8, 8]))
    assert kv.key_dim == 4
    kv = layout(tmp_path, attention__head_count=0, attention__head_count_kv=0)
    assert (kv.kv_heads, kv.key_dim) == ((0,) * 4, 0)
    assert of(tmp_path, attention__head_count=None, attention__head_count_kv=None).kv is None


def test_gemma3_slides_but_for_every_sixth_layer(tmp_path: Path) -> None:
    kv = layout(tmp_path, "gemma3", block_count=18, attention__sliding_window=512)
    assert (kv.sliding_window, kv.sliding_layers) == (512, 15)
    assert [i for i, slides in enumerate(kv.sliding) if not slides] == [5, 11, 17]
    kv = layout(tmp_path, "gemma2", attention__sliding_window=4096)
    assert kv.sliding == (True, False, True, False)
    kv = layout(tmp_path, "gemma3")
    assert (kv.sliding_window, kv.sliding_layers, kv.sliding) == (None, 0, ())


@pytest.mark.parametrize(
    ("pattern", "sliding"),
    [
        (2, (True, False, True, False)),
        (0, (True,) * 4),
        ([True, True, False, True], (True, True, False, True)),
        (As("i32", [0, 1, 1, 0]), (False, True, True, False)),
        ([True, True, True], (True, True, True, False)),
    ],
)
def test_sliding_patterns(tmp_path: Path, pattern: Value, sliding: tuple[bool, ...]) -> None:
    kv = layout(
        tmp_path,
        "gemma3",
        attention__sliding_window=512,
        attention__sliding_window_pattern=pattern,
    )
    assert (kv.sliding, kv.sliding_layers) == (sliding, sum(sliding))


def test_an_unknown_pattern_counts_as_full(tmp_path: Path) -> None:
    for keys in ({}, {"attention__sliding_window_pattern": 1}):
        kv = layout(tmp_path, "phi3", attention__sliding_window=2047, **keys)
        assert (kv.sliding_window, kv.sliding_layers, kv.sliding) == (None, 0, ())


@pytest.mark.parametrize(
    ("arch", "window", "full"),
    [
        ("olmo2", 4096, (3, 7)),
        ("exaone4", 4096, (3, 7)),
        ("exaone-moe", 128, (3, 7)),
        ("afmoe", 2048, (3, 7)),
        ("smallthinker", 4096, (0, 4)),
        ("llama4", None, (3, 7)),
        ("gemma2", None, (1, 3, 5, 7)),
    ],
)
def test_patterns_that_llama_cpp_knows_by_itself(
    tmp_path: Path, arch: str, window: int | None, full: tuple[int, ...]
) -> None:
    kv = layout(tmp_path, arch, block_count=8, attention__sliding_window=window)
    assert kv.sliding_window == (window or {"llama4": 8192, "gemma2": 4096}[arch])
    assert tuple(i for i, slides in enumerate(kv.sliding) if not slides) == full
    kv = layout(tmp_path, arch, block_count=8, attention__sliding_window=0)
    assert (kv.sliding_window, kv.sliding_layers) == (None, 0)


def test_gemma4_has_other_heads_where_it_slides_and_shares_caches(tmp_path: Path) -> None:
    kv = layout(
        tmp_path,
        "gemma4",
        attention__head_count_kv=As("i32", [16, 4, 16, 4]),
        attention__key_length=512,
        attention__value_length=512,
        attention__key_length_swa=256,
        attention__value_length_swa=256,
        attention__sliding_window=1024,
        attention__sliding_window_pattern=[True, False, True, False],
        attention__shared_kv_layers=2,
    )
    assert kv == KvLayout(
        kind="hybrid",
        kv_heads=(16, 4, 0, 0),
        key_dim=512,
        value_dim=512,
        sliding_window=1024,
        sliding_layers=1,
        sliding=(True, False, False, False),
        sliding_key_dim=256,
        sliding_value_dim=256,
    )


def test_recurrent_layers_have_no_cache(tmp_path: Path) -> None:
    assert layout(tmp_path, "qwen3next").kv_heads == (0, 0, 0, 2)
    assert layout(tmp_path, "x", full_attention_interval=2).kv_heads == (0, 2, 0, 2)
    kv = layout(tmp_path, "qwen35", block_count=5, nextn_predict_layers=1)
    assert kv.kv_heads == (0, 0, 0, 2, 2)
    kv = layout(tmp_path, "qwen35", attention__recurrent_layers=[True, False, True])
    assert kv.kv_heads == (0, 2, 0, 2)


def test_recurrent_layers_have_a_state(tmp_path: Path) -> None:
    ssm: dict[str, Value] = {
        "ssm__conv_kernel": 4,
        "ssm__inner_size": 16,
        "ssm__state_size": 8,
        "ssm__group_count": 2,
    }
    state = 4 * (3 * (16 + 2 * 2 * 8) + 8 * 16)
    kv = layout(tmp_path, "qwen3next", **ssm)
    assert (kv.kind, kv.state_bytes) == ("hybrid", 3 * state)
    kv = layout(tmp_path, "falcon-h1", **ssm)
    assert (kv.kind, kv.kv_heads, kv.state_bytes) == ("gqa", (2,) * 4, 4 * state)
    kv = layout(
        tmp_path, "mamba2", attention__head_count=None, attention__head_count_kv=None, **ssm
    )
    assert (kv.kind, kv.kv_heads, kv.state_bytes) == ("hybrid", (0,) * 4, 4 * state)


def test_other_recurrent_states(tmp_path: Path) -> None:
    two = As("i32", [0, 2, 0, 2])
    none: dict[str, Value] = {"attention__head_count": 0, "attention__head_count_kv": 0}
    kv = layout(tmp_path, "lfm2", shortconv__l_cache=3, attention__head_count_kv=two)
    assert kv.state_bytes == 2 * 4 * 2 * 64
    kv = layout(tmp_path, "rwkv7", **none, wkv__head_size=16, token_shift_count=1)
    assert (kv.kv_heads, kv.state_bytes) == ((0,) * 4, 4 * 4 * (64 + 64 * 16))
    keys: dict[str, Value] = {"kda__head_dim": 16, "ssm__conv_kernel": 4}
    kv = layout(tmp_path, "kimi-linear", **keys, attention__head_count_kv=two)
    assert kv.state_bytes == 2 * 4 * (3 * 3 * 8 * 16 + 8 * 16 * 16)
    keys = {"ssm__inner_size": 16, "ssm__state_size": 8}
    kv = layout(tmp_path, "plamo2", **keys, attention__head_count_kv=two)
    assert kv.state_bytes == 2 * 4 * 8 * 16
    # Three kinds of layers: a state, attention, and a feed-forward part alone.
    wide = As("i32", [0, 0, 256, 256])
    one = As("i32", [0, 2, 0, 0])
    kv = layout(
        tmp_path,
        "nemotron_h",
        **keys,
        attention__head_count_kv=one,
        feed_forward_length=wide,
    )
    assert (kv.kv_heads, kv.state_bytes) == ((0, 2, 0, 0), 4 * 8 * 16)


def test_what_writes_no_text_is_not_for_llama_server(tmp_path: Path) -> None:
    for arch, what in (("bert", "makes embeddings"), ("llada", "writes by diffusion")):
        reason = of(tmp_path, arch).unsupported[0]
        assert reason.startswith(f"llama.cpp: a {arch} model {what}")
    assert of(tmp_path, "qwen3").unsupported == (VLLM,)


def test_a_loop_variant_is_known_and_not_for_llama_cpp(tmp_path: Path) -> None:
    model = of(tmp_path, loop__num=2)
    assert model.passes == 2
    assert model.unsupported[0].startswith(
        "llama.cpp: a Loop variant, it asks for 2 runs of all layers"
    )
    assert model.unsupported[1] == VLLM
    write(tmp_path / "m.gguf", {"llama.loop.num": 1000})
    assert "llama.loop.num is 1000" in fails(tmp_path / "m.gguf").message


def test_latent_attention_keeps_one_compressed_key(tmp_path: Path) -> None:
    keys: dict[str, Value] = {
        "attention__head_count_kv": 1,
        "attention__kv_lora_rank": 512,
        "attention__key_length": 576,
        "attention__value_length": 512,
        "attention__key_length_mla": 192,
        "attention__value_length_mla": 128,
        "rope__dimension_count": 64,
    }
    kv = layout(tmp_path, "deepseek2", **keys)
    assert (kv.kind, kv.kv_heads, kv.key_dim, kv.value_dim) == ("mla", (1,) * 4, 576, 0)
    kv = layout(tmp_path, "deepseek2", **{**keys, "attention__key_length": None})
    assert kv.key_dim == 576
    kv = layout(tmp_path, "deepseek32", **keys, attention__indexer__key_length=128)
    assert kv.key_dim == 576 + 128
    # A conversion of before: no MLA keys, all heads in the cache.
    old = {**keys, "attention__head_count_kv": 16, "attention__key_length": 192}
    old |= {"attention__value_length": 128}
    old = {name: value for name, value in old.items() if not name.endswith("_mla")}
    kv = layout(tmp_path, "deepseek2", **old)
    assert (kv.kv_heads[0], kv.key_dim, kv.value_dim) == (16, 192, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.block_count": None}, "how many layers it has (llama.block_count)"),
        ({"llama.block_count": 0}, "llama.block_count is 0"),
        ({"llama.block_count": 4_000_000}, "llama.block_count is 4000000"),
        ({"llama.block_count": "four"}, "llama.block_count is 'four', not a number in range"),
        ({"llama.block_count": [1]}, "llama.block_count is an array"),
        ({"llama.context_length": As("i32", -1)}, "llama.context_length is -1"),
        ({"llama.context_length": True}, "llama.context_length is True"),
        ({"llama.embedding_length": As("u64", 1 << 60)}, "not a number in range"),
        ({"llama.attention.head_count_kv": [1] * 5}, "has 5 values of type uint32 for 4 layers"),
        ({"llama.attention.head_count_kv": ["a"]}, "has 1 values of type string"),
        ({"llama.attention.head_count_kv": As("i32", [1, 1, 1, -1])}, "has 4 values"),
        ({"general.architecture": None}, "does not name its architecture"),
        ({"general.architecture": "a b"}, "does not name its architecture"),
        ({"general.architecture": 3}, "does not name its architecture"),
    ],
)
def test_metadata_that_makes_no_sense(
    tmp_path: Path, changes: dict[str, Value | None], message: str
) -> None:
    path = write(tmp_path / "m.gguf", changes)
    error = fails(path)
    assert message in error.message
    assert str(path) in error.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.type": "adapter"}, "is a LoRA adapter, not a model"),
        ({"general.type": "mmproj"}, "is a multimodal projector, not a model"),
        ({"general.type": "imatrix"}, "is an importance matrix, not a model"),
        ({"general.architecture": "clip", "general.type": None}, "is a multimodal projector"),
    ],
)
def test_what_is_no_model_is_refused(
    tmp_path: Path, changes: dict[str, Value | None], message: str
) -> None:
    error = fails(write(tmp_path / "m.gguf", changes), ExitCode.REFUSED)
    assert message in error.message


def test_a_vocabulary_is_refused(tmp_path: Path) -> None:
    error = fails(write(tmp_path / "m.gguf", tensors=[]), ExitCode.REFUSED)
    assert "is a vocabulary without weights, not a model" in error.message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:org/repo/x.gguf", "hf:org/repo/x.gguf is not understood"),
        ("hf:", "names nothing"),
        ("gemma", "model source 'gemma' is not understood"),
        ("https://example.org/x.bin", "is not the address of a GGUF file"),
        ("file:", "names nothing"),
        ("", "is not understood"),
    ],
)
def test_sources_that_are_usage_errors(source: str, message: str) -> None:
    assert message in fails(source, ExitCode.USAGE).message


def test_paths_become_absolute_and_home_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    models = [read_model(s) for s in ("file:m.gguf", "m.gguf", "file:~/m.gguf", f"file:{path}")]
    assert {model.files[0].path for model in models} == {str(path)}
    assert {model.source for model in models} == {f"file:{path}"}
    assert "cannot find" in fails("file:~nobody-of-that-name/m.gguf").message


def test_links_lead_to_the_real_file(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    real = write(tmp_path / "blobs" / "abc")
    link = tmp_path / "m.gguf"
    link.symlink_to(real)
    model = read_model(f"file:{link}")
    assert (model.source, model.files[0].path) == (f"file:{link}", str(real))
    # A blob's name says nothing; a file that is called after its model is known by that.
    assert (model.files[0].file_name, served_name(model)) == ("m.gguf", "m")
    other = write(tmp_path / "real-name.gguf")
    (tmp_path / "current.gguf").symlink_to(other)
    assert served_name(read_model(f"file:{tmp_path}/current.gguf")) == "real-name"

    real.unlink()
    error = fails(f"file:{link}")
    assert error.message == (
        f"model file not found: {link} is a link to {real}, which does not exist"
    )
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    assert f"cannot read {loop}" in fails(loop).message


def test_missing_files_name_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "gemma-270m.gguf")
    error = fails(tmp_path / "gema-270m.gguf")
    assert error.message == f"model file not found: {tmp_path}/gema-270m.gguf"
    assert error.hint == "did you mean gemma-270m.gguf?"
    assert fails(tmp_path / "zzz.gguf").hint == f"{tmp_path} has gemma-270m.gguf"
    (tmp_path / "sub").mkdir()
    assert fails(tmp_path / "sub" / "a.gguf").hint == f"{tmp_path}/sub has no .gguf files"
    assert "No such file" in str(fails(tmp_path / "none" / "a.gguf").hint)
    assert "Not a directory" in str(fails(tmp_path / "gemma-270m.gguf" / "a.gguf").hint)
    error = fails(f"file:{tmp_path}")
    assert error.message == f"{tmp_path} is a directory, not a GGUF file"
    assert error.hint == "it has gemma-270m.gguf"
    assert fails(f"file:{tmp_path}/sub").hint == "it has no .gguf files"


def test_paths_that_no_file_can_have(tmp_path: Path) -> None:
    assert "null" in fails("file:a\0.gguf").message
    assert "too long" in fails(f"{tmp_path}/{'x' * 300}.gguf").message
    assert "not valid UTF-8" in fails(f"{tmp_path}/\udcff.gguf").message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    path.chmod(0)
    assert "Permission denied" in fails(path).message


def test_damaged_files_are_errors_here_too(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.touch()
    assert fails(path).message == f"{path} is empty"
    path.write_bytes(gguf(LLAMA, TENSORS)[:-1])
    assert "is truncated" in fails(path).message


def test_shards_are_found_from_any_of_them(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    models = [read_model(f"file:{path}") for path in paths]
    assert models[0] == models[1] == models[2]
    model = models[0]
    assert model.source == f"file:{paths[0]}"
    assert [file.path for file in model.files] == [str(path) for path in paths]
    assert (model.parameters, model.weights_bytes) == (4 * 32, 4 * 128)
    assert [file.bytes for file in model.files] == [path.stat().st_size for path in paths]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, count=6)
    paths[2].unlink()
    error = fails(paths[0])
    assert "m-00003-of-00006.gguf of its 6 files not found" in error.message
    for path in paths[3:]:
        path.unlink()
    error = fails(paths[0])
    assert "m-00005-of-00006.gguf and 1 more of its 6" in error.message
    assert len(error.details) == 4
    paths[0].unlink()
    assert str(paths[0]) in fails(paths[1]).message


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    first, second, third = (path.read_bytes() for path in paths)

    paths[1].write_bytes(third)
    assert "is not part 2 of 3 of this model" in fails(paths[0]).message
    paths[1].write_bytes(second[:-1])
    assert f"{paths[1]} is truncated" in fails(paths[0]).message
    fewer = first.replace(b"split.tensors.count\x05\0\0\0\4", b"split.tensors.count\x05\0\0\0\5")
    assert fewer != first
    paths[1].write_bytes(second)
    paths[0].write_bytes(fewer)
    assert "its parts hold 4 tensors, not 5" in fails(paths[0]).message

    renamed = tmp_path / "model.gguf"
    renamed.write_bytes(first)
    assert "is part 1 of 3, which its name does not say" in fails(renamed).message
    renamed.write_bytes(second)
    assert "is part 2 of 3" in fails(renamed).message


def test_shards_behind_links_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    paths = write_shards(tmp_path / "store")
    links = [tmp_path / path.name for path in paths]
    for link, path in zip(links, paths, strict=True):
        link.symlink_to(path)
    assert [f.path for f in read_model(str(links[0])).files] == [str(path) for path in paths]
    # Anywhere, as the hub's cache has them: the engine sees them by the names of the links.
    blob = paths[1].rename(tmp_path / "blob")
    links[1].unlink()
    links[1].symlink_to(blob)
    model = read_model(str(links[0]))
    assert [f.path for f in model.files] == [str(paths[0]), str(blob), str(paths[2])]
    assert [f.file_name for f in model.files] == [link.name for link in links]
    assert served_name(model) == links[0].name.removesuffix("-00001-of-00003.gguf")


def test_a_single_file_that_is_named_like_a_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "m-00001-of-00001.gguf", {"split.count": As("u16", 1)})
    assert len(read_model(str(path)).files) == 1


def test_facts_come_back_as_they_were_written(tmp_path: Path) -> None:
    model = of(tmp_path, "gemma3", attention__sliding_window=512)
    path = tmp_path / "facts.json"
    path.write_text(to_json(model))
    assert read_model(f"facts:{path}") == model


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"layers": 4', '"layer": 4', "layer"),
        ("stackctl.model/1", "stackctl.model/9", "stackctl.model/9"),
        ('"layers": 4', '"layers": 5', "kv.kv_heads has 4 entries for 5 layers"),
        ('"layers": 4', '"layers": 0', "must be at least 1"),
        ('"heads": 8', '"heads": -8', "no other number negative"),
        ('"passes": 1', '"passes": 0', "must be at least 1"),
        ('"key_dim": 8', '"key_dim": -8', "kv must not hold negative numbers"),
        ('"state_bytes": 0', '"state_bytes": -1', "kv must not hold negative numbers"),
        ('"sliding_window": null', '"sliding_window": -1', "kv must not hold negative numbers"),
        ('"layers": 4', '"layers": 100000', "layers (1024 at most)"),
        ('"experts_used": null', '"experts_used": 2', "experts_used is 2 of 0 experts"),
        ('"embedding_bytes": 0', '"embedding_bytes": 9999', "larger than all of them"),
        ('"sliding_layers": 0', '"sliding_layers": 2', "kv.sliding_layers is 2, kv.sliding has 0"),
        ('"bytes": ', '"bytes": -', "no other number negative"),
        ('"sliding": []', '"sliding": [true]', "kv.sliding has 1 entries for 4 layers"),
        ("{", "", "is not valid JSON"),
    ],
)
def test_facts_that_are_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(to_json(of(tmp_path)).replace(old, new, 1))
    error = fails(f"facts:{path}", ExitCode.USAGE)
    assert message in error.message
    assert str(path) in error.message


def test_facts_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "facts.json").touch()
    error = fails(f"facts:{tmp_path}/fact.json")
    assert error.message == f"facts file not found: {tmp_path}/fact.json"
    assert error.hint == "did you mean facts.json?"
    assert "is a directory, not a file" in fails(f"facts:{tmp_path}").message
    (tmp_path / "facts.json").write_bytes(b" " * (2 << 20))
    assert "has more than 1048576 bytes" in fails(f"facts:{tmp_path}/facts.json").message
    os.mkfifo(tmp_path / "pipe.json")  # nobody writes: reading it would never end
    assert "is not a regular file" in fails(f"facts:{tmp_path}/pipe.json").message


def test_facts_with_many_keys_are_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text("{" + ",".join(f'"k{n}":1' for n in range(90_000)) + "}")
    started = time.process_time()
    assert "unknown field" in fails(f"facts:{path}", ExitCode.USAGE).message
    assert time.process_time() - started < 1


VALID = gguf({**LLAMA, "llama.attention.sliding_window": 8, "split.count": As("u16", 1)}, TENSORS)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.integers(4, len(VALID) - 1), st.binary(min_size=1, max_size=4)), max_size=4
    )
)
def test_a_mutated_model_fails_in_one_way_only(
    tmp_path: Path, changes: list[tuple[int, bytes]]
) -> None:
    raw = bytearray(VALID)
    for at, new in changes:
        raw[at : at + len(new)] = new
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with contextlib.suppress(StackctlError):
        to_json(read_model(str(path)))
