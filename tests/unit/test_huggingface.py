"""Hugging Face folders: layouts, quantisations, incomplete and hostile files, the hub cache."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    CONFIG,
    EMBED,
    HEAD,
    PLAIN,
    checkpoint,
    safetensors,
    sharded,
)
from ggufs import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.hub_cache import parse_hub_source
from stackctl.sources.models import read_model
from stackctl.values.base import to_json
from stackctl.values.model import KvLayout, Model, ModelFile

UP = "model.layers.0.mlp.up_proj"


def of(folder: Path, shapes: Any = PLAIN, **config: Any) -> Model:
    return read_model(f"dir:{checkpoint(folder / 'm', shapes, **config)}")


def layout(folder: Path, **config: Any) -> KvLayout:
    kv = of(folder, **config).kv
    assert kv is not None
    return kv


def fails(source: str | Path, code: ExitCode = ExitCode.FAILED) -> StackctlError:
    with pytest.raises(StackctlError) as caught:
        read_model(f"dir:{source}" if isinstance(source, Path) else source)
    assert caught.value.exit_code == code
    return caught.value


def test_every_field(tmp_path: Path) -> None:
    model = of(tmp_path)
    path = tmp_path / "m" / "model.safetensors"
    table = 32 * 64
    assert model == Model(
        source=f"dir:{tmp_path}/m",
        format="safetensors",
        name="m",
        architecture="LlamaForCausalLM",
        parameters=2 * table + 128 * 64 + 64,
        active_parameters=table + 128 * 64 + 64,
        quantization="bf16",
        weights_bytes=2 * (2 * table + 128 * 64 + 64),
        embedding_bytes=2 * table,
        layers=2,
        context=4096,
        embedding=64,
        feed_forward=128,
        heads=4,
        vocabulary=32,
        kv=KvLayout(kv_heads=(2, 2), key_dim=16, value_dim=16),
        files=(ModelFile(path=str(path), bytes=path.stat().st_size),),
        folder=str(path.parent),
        unsupported=("llama.cpp: needs a GGUF",),
    )


def test_a_tied_embedding_is_read_for_every_token(tmp_path: Path) -> None:
    model = of(tmp_path, {name: PLAIN[name] for name in PLAIN if name not in HEAD})
    assert model.embedding_bytes == 0
    assert model.active_parameters == model.parameters


def packed(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {**EMBED, **HEAD, **{f"{UP}.{name}": value for name, value in tensors.items()}}


NVFP4_GROUPS = {"group_0": {"weights": {"num_bits": 4, "type": "float"}}}


@pytest.mark.parametrize(
    ("config", "shapes", "label", "method"),
    [
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            packed(
                weight=("U8", (128, 32)),
                weight_scale=("F8_E4M3", (128, 4)),
                weight_scale_2=("F32", ()),
                input_scale=("F32", ()),
            ),
            "nvfp4",
            "modelopt",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": NVFP4_GROUPS,
            },
            packed(
                weight_packed=("U8", (128, 32)),
                weight_scale=("F8_E4M3", (128, 4)),
                weight_global_scale=("F32", (1,)),
                input_global_scale=("F32", (1,)),
            ),
            "nvfp4",
            "compressed-tensors",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            packed(
                weight_packed=("I32", (128, 8)),
                weight_scale=("BF16", (128, 2)),
                weight_shape=("I64", (2,)),
            ),
            "int4",
            "compressed-tensors",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            packed(weight=("F8_E4M3", (128, 64)), weight_scale=("BF16", (128, 1))),
            "fp8",
            "compressed-tensors",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            packed(weight=("F8_E4M3", (128, 64)), weight_scale_inv=("F32", (1, 1))),
            "fp8",
            "fp8",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64},
            packed(qweight=("I32", (64, 16)), qzeros=("I32", (1, 16)), scales=("F16", (1, 128))),
            "int4",
            "awq",
        ),
        (
            {"quant_method": "gptq", "bits": 8},
            packed(
                qweight=("I32", (16, 128)),
                qzeros=("I32", (1, 32)),
                scales=("F16", (1, 128)),
                g_idx=("I32", (64,)),
            ),
            "int8",
            "gptq",
        ),
        (
            {"quant_method": "mxfp4"},
            packed(up_proj_blocks=("U8", (128, 2, 16)), up_proj_scales=("U8", (128, 2))),
            "mxfp4",
            "mxfp4",
        ),
    ],
    ids=["modelopt", "ct-nvfp4", "ct-int4", "ct-fp8", "fp8", "awq", "gptq", "mxfp4"],
)
def test_packed_weights_count_their_parameters(
    tmp_path: Path, config: Any, shapes: Any, label: str, method: str
) -> None:
    model = of(tmp_path, shapes, quantization_config=config)
    assert (model.quantization, model.quantization_method) == (label, method)
    assert model.parameters == 2 * 32 * 64 + 128 * 64
    assert model.active_parameters == 32 * 64 + 128 * 64


def test_modelopt_beside_the_configuration_and_mixed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, packed(weight=("U8", (128, 32))))
    extra = folder / "hf_quant_config.json"
    extra.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    model = read_model(f"dir:{folder}")
    assert (model.quantization, model.quantization_method) == ("nvfp4", "modelopt")
    assert model.parameters == 2 * 32 * 64 + 128 * 64
    config = json.loads((folder / "config.json").read_text())
    for inside in ({"quant_method": "modelopt"}, {"quantization": {"quant_algo": "NVFP4"}}):
        text = json.dumps({**config, "quantization_config": inside})
        (folder / "config.json").write_text(text)
        model = read_model(f"dir:{folder}")
        assert (model.quantization, model.quantization_method) == ("nvfp4", "modelopt")
    (folder / "config.json").write_text(json.dumps(config))
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    extra.write_text(json.dumps({"quantization": mixed}))
    assert read_model(f"dir:{folder}").quantization == "nvfp4+fp8"
    extra.write_text("{")
    assert f"{extra} is not valid JSON" in fails(folder).message


def test_experts(tmp_path: Path) -> None:
    shapes = {
        **PLAIN,
        "model.layers.1.mlp.experts.0.up_proj.weight": ("BF16", (16, 64)),
        "model.layers.1.mlp.experts.1.up_proj.weight": ("BF16", (16, 64)),
        "model.layers.1.mlp.shared_experts.up_proj.weight": ("BF16", (16, 64)),
    }
    for name in ("n_routed_experts", "num_experts", "num_local_experts"):
        model = of(tmp_path, shapes, num_experts_per_tok=1, **{name: 2})
        assert (model.experts, model.experts_used) == (2, 1)
        assert model.expert_bytes == 2 * 2 * 16 * 64
        assert model.active_parameters == model.parameters - 32 * 64 - 16 * 64
    assert of(tmp_path, num_experts=1).experts is None


def test_experts_of_a_layer_in_one_tensor(tmp_path: Path) -> None:
    """As Granite and gpt-oss store them; the shared part of Granite is always read."""
    moe = "model.layers.1.block_sparse_moe"
    granite = {
        **PLAIN,
        f"{moe}.input_linear.weight": ("BF16", (4, 16, 64)),
        f"{moe}.output_linear.weight": ("BF16", (4, 64, 8)),
        f"{moe}.router.layer.weight": ("BF16", (4, 64)),
    }
    model = of(tmp_path, granite, num_local_experts=4, num_experts_per_tok=1)
    experts = 4 * 16 * 64 + 4 * 64 * 8
    assert model.expert_bytes == 2 * experts
    assert model.active_parameters == model.parameters - 32 * 64 - experts * 3 // 4
    oss = {
        **PLAIN,
        "model.layers.1.mlp.experts.gate_up_proj_blocks": ("U8", (4, 16, 2, 16)),
        "model.layers.1.mlp.experts.gate_up_proj_scales": ("U8", (4, 16, 2)),
        "model.layers.1.mlp.experts.gate_up_proj_bias": ("BF16", (4, 16)),
    }
    config = {"quant_method": "mxfp4"}
    model = of(tmp_path, oss, quantization_config=config, num_local_experts=4, experts_per_token=2)
    experts = 4 * 16 * 64 + 4 * 16
    assert model.parameters == of(tmp_path).parameters + experts
    assert model.active_parameters == model.parameters - 32 * 64 - experts // 2


def test_names_of_layers_that_are_no_numbers(tmp_path: Path) -> None:
    for name in ("model.layers", "layers", "model.layers.x.y", "model.layers.²", "lm_head"):
        shapes = {**PLAIN, name: ("BF16", (2,))}
        assert of(tmp_path, shapes).active_parameters == 32 * 64 + 128 * 64 + 64 + 2


@pytest.mark.parametrize("prefix", ["model.layers.2.", "mtp.layers.0."])
def test_layers_that_draft_are_not_active(tmp_path: Path, prefix: str) -> None:
    plain = of(tmp_path, num_experts=4, num_experts_per_tok=1)
    drafts = {
        **PLAIN,
        f"{prefix}eh_proj.weight": ("BF16", (64, 128)),
        f"{prefix}mlp.experts.0.up_proj.weight": ("BF16", (16, 64)),
    }
    model = of(tmp_path, drafts, num_experts=4, num_experts_per_tok=1)
    assert model.parameters == plain.parameters + 64 * 128 + 16 * 64
    assert model.active_parameters == plain.active_parameters
    assert model.expert_bytes is None
    assert model.active_bytes == plain.active_bytes


def test_embeddings_of_every_layer_are_only_looked_up(tmp_path: Path) -> None:
    tied = {name: PLAIN[name] for name in PLAIN if name not in HEAD}
    name = "model.language_model.embed_tokens_per_layer.weight"
    model = of(tmp_path, {**tied, name: ("BF16", (32, 128))})
    assert model.embedding_bytes == 2 * 32 * 128
    assert model.active_parameters == model.parameters - 32 * 128


@pytest.mark.parametrize("name", ["BertModel", "XLMRobertaModel", "Qwen3ForSequenceClassification"])
def test_what_writes_no_text_is_not_for_vllm(tmp_path: Path, name: str) -> None:
    reason = of(tmp_path, architectures=[name]).unsupported[1]
    assert reason == f"vllm: {name} embeds or classifies: it writes no text"


def test_latent_attention(tmp_path: Path) -> None:
    kv = layout(tmp_path, kv_lora_rank=512, qk_rope_head_dim=64, v_head_dim=128)
    assert kv == KvLayout(kind="mla", kv_heads=(1, 1), key_dim=576, value_dim=0)


# What sizes the cache in published config.json files, and bytes a token at 16 bit: of all layers,
# and of those that keep everything.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Mixtral-8x7B": (
        {
            "model_type": "mixtral",
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": None,
        },
        128 << 10,
        128 << 10,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 48,
            "hidden_size": 2048,
            "head_dim": 128,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 48,
        },
        96 << 10,
        96 << 10,
    ),
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3",
            "num_hidden_layers": 61,
            "hidden_size": 7168,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        61 * 576 * 2,
        61 * 576 * 2,
    ),
    "MiniMax-M2": (
        {
            "model_type": "minimax_m2",
            "num_hidden_layers": 62,
            "hidden_size": 3072,
            "head_dim": 128,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "attn_type_list": [1] * 62,
        },
        248 << 10,
        248 << 10,
    ),
    "gpt-oss-120b": (
        {
            "model_type": "gpt_oss",
            "num_hidden_layers": 36,
            "hidden_size": 2880,
            "head_dim": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 18,
        },
        72 << 10,
        36 << 10,
    ),
    "Qwen3-Next-80B-A3B": (
        {
            "model_type": "qwen3_next",
            "num_hidden_layers": 48,
            "hidden_size": 2048,
            "head_dim": 256,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "full_attention_interval": 4,
        },
        24 << 10,
        24 << 10,
    ),
    "command-r7b (cohere2)": (
        {
            "model_type": "cohere2",
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "head_dim": 128,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        128 << 10,
        32 << 10,
    ),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_caches_of_published_models(tmp_path: Path, name: str) -> None:
    config, every, full = PUBLISHED[name]
    kv = layout(tmp_path, **{"num_key_value_heads": None, **config})
    slides = kv.sliding or (False,) * len(kv.kv_heads)
    sizes = [2 * heads * (kv.key_dim + kv.value_dim) for heads in kv.kv_heads]
    assert sum(sizes) == every
    assert sum(size for size, slide in zip(sizes, slides, strict=True) if not slide) == full


def test_sliding_windows(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    kv = layout(tmp_path, sliding_window=512, layer_types=types)
    assert (kv.sliding_window, kv.sliding_layers, kv.sliding) == (512, 1, (True, False))
    kv = layout(tmp_path, sliding_window=512, model_type="cohere2", num_hidden_layers=8)
    assert [i for i, slides in enumerate(kv.sliding) if not slides] == [3, 7]
    kv = layout(tmp_path, sliding_window=512, sliding_window_pattern=2)
    assert kv.sliding == (True, False)
    for config in ({"use_sliding_window": False}, {"sliding_window": None}, {}):
        kv = layout(tmp_path, **{"sliding_window": 512, **config})
        assert (kv.sliding_window, kv.sliding) == (None, ())
    assert layout(tmp_path, sliding_window=512, model_type="mistral").sliding_layers == 2


def test_layers_without_a_cache(tmp_path: Path) -> None:
    kv = layout(tmp_path, layer_types=["linear_attention", "full_attention"])
    assert (kv.kind, kv.kv_heads) == ("hybrid", (0, 2))
    kv = layout(
        tmp_path,
        num_hidden_layers=4,
        full_attention_interval=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_num_value_heads=4,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
    )
    assert kv.kv_heads == (0, 0, 0, 2)
    assert kv.state_bytes == 3 * (2 * 3 * (2 * 2 * 8 + 4 * 8) + 4 * 4 * 8 * 8)
    assert layout(tmp_path, hybrid_override_pattern="M*").kv_heads == (0, 2)
    assert layout(tmp_path, num_key_value_heads=[1, 2]).kv_heads == (1, 2)


def test_recurrent_states(tmp_path: Path) -> None:
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
    one = 2 * 3 * (32 + 2 * 16) + 4 * 32 * 16
    types = ["mamba", "attention"]
    kv = layout(tmp_path, **mamba, mamba_d_conv=4, layer_types=types)
    assert (kv.kv_heads, kv.state_bytes) == ((0, 2), one)
    auto = {**mamba, "mamba_d_head": "auto", "mamba_expand": 1}
    wide = 2 * 3 * (64 + 2 * 16) + 4 * 64 * 16
    assert layout(tmp_path, **auto, mamba_d_conv=4, layer_types=types).state_bytes == wide
    assert layout(tmp_path, **mamba, mamba_d_conv=4, model_type="falcon_h1").state_bytes == 2 * one
    nemotron = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 1}
    kv = layout(
        tmp_path, **nemotron, conv_kernel=4, num_hidden_layers=4, hybrid_override_pattern="M-*E"
    )
    assert (kv.kv_heads, kv.state_bytes) == ((0, 0, 2, 0), one)
    linear = {
        "full_attn_layers": [2],
        "num_heads": 2,
        "head_dim": 8,
        "short_conv_kernel_size": 4,
    }
    kv = layout(tmp_path, linear_attn_config=linear, kv_lora_rank=512, qk_rope_head_dim=64)
    assert (kv.kind, kv.kv_heads, kv.key_dim) == ("hybrid", (0, 1), 576)
    assert kv.state_bytes == 2 * 3 * 3 * 16 + 4 * 16 * 8


@pytest.mark.parametrize(
    ("rope", "model_type", "context"),
    [
        (None, "llama", 4096),
        ({"type": "yarn", "factor": 4.0}, "qwen2", 16384),
        (
            {"type": "yarn", "factor": 40, "original_max_position_embeddings": 1024},
            "deepseek_v3",
            40960,
        ),
        ({"rope_type": "linear", "factor": 2.5}, "llama", 10240),
        ({"rope_type": "linear", "factor": 8.0}, "gemma3_text", 4096),
        ({"rope_type": "llama3", "factor": 8.0}, "llama", 4096),
        ({"type": "longrope", "factor": 32}, "phi3", 4096),
        ({"rope_type": "yarn", "factor": True}, "llama", 4096),
        ({"rope_type": "yarn", "factor": 1e300}, "llama", 4096),
        ({"rope_type": "yarn"}, "llama", 4096),
    ],
)
def test_a_stretched_context(tmp_path: Path, rope: Any, model_type: str, context: int) -> None:
    assert of(tmp_path, rope_scaling=rope, model_type=model_type).context == context


def test_what_gemma3_leaves_out(tmp_path: Path) -> None:
    """The 4B's published text_config names neither heads nor context."""
    inner = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    folder = checkpoint(tmp_path)
    (folder / "config.json").write_text(
        json.dumps(
            {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
            | {"text_config": inner}
        )
    )
    model = read_model(f"dir:{folder}")
    assert (model.heads, model.context, model.vocabulary) == (8, 131072, 262208)
    assert model.kv is not None
    assert (model.kv.kv_heads, model.kv.key_dim) == ((4,) * 34, 256)
    assert (model.kv.sliding_window, model.kv.sliding_layers) == (1024, 29)


def test_the_loop_variant_runs_twice(tmp_path: Path) -> None:
    assert of(tmp_path, loop_num=2).passes == 2
    loop = of(tmp_path, architectures=["IQuestLoopCoderForCausalLM"])
    assert (loop.passes, loop.unsupported) == (2, ("llama.cpp: needs a GGUF",))
    assert of(tmp_path).passes == 1


def test_text_inside_a_multimodal_model(tmp_path: Path) -> None:
    shapes = {**PLAIN, "vision_tower.blocks.0.weight": ("BF16", (10, 10))}
    inner = {key: CONFIG[key] for key in CONFIG if key not in ("architectures", "model_type")}
    folder = checkpoint(tmp_path, shapes)
    outer = {"architectures": ["Kimi"], "hidden_size": 7, "text_config": inner}
    (folder / "config.json").write_text(json.dumps(outer))
    model = read_model(f"dir:{folder}")
    assert (model.architecture, model.embedding, model.layers) == ("Kimi", 64, 2)
    assert model.active_parameters == model.parameters - 32 * 64 - 100
    nested = {"architectures": ["Omni"], "thinker_config": {"text_config": inner}}
    (folder / "config.json").write_text(json.dumps(nested))
    assert read_model(f"dir:{folder}").layers == 2


def test_shards_with_an_index(tmp_path: Path) -> None:
    whole = of(tmp_path)
    model = read_model(f"dir:{sharded(tmp_path / 's')}")
    assert (model.parameters, model.weights_bytes) == (whole.parameters, whole.weights_bytes)
    assert [Path(file.path).name[:11] for file in model.files] == ["model-00001", "model-00002"]
    second = tmp_path / "s" / "model-00002-of-00002.safetensors"
    raw = second.read_bytes()
    second.write_bytes(raw[:-2])
    assert f"{second} is truncated: it has {len(raw) - 2} bytes" in fails(tmp_path / "s").message
    second.write_bytes(safetensors({}))
    error = fails(tmp_path / "s")
    assert f"{second} lacks 2 tensors" in error.message
    assert "lm_head.weight" in error.details
    second.unlink()
    message = fails(tmp_path / "s").message
    assert message.startswith("model is incomplete: model-00002-of-00002.safetensors of its 2")


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "s")
    (folder / "model.safetensors.index.json").unlink()
    assert len(read_model(f"dir:{folder}").files) == 2
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors" in fails(folder).message
    twice = checkpoint(tmp_path / "t")
    (twice / "model-b.safetensors").write_bytes(safetensors(PLAIN))
    assert "which another file has too" in fails(twice).message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not an index"),
        ('{"weight_map": {}}', "lists no tensors"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "which is not a file beside it"),
        ('{"weight_map": {"a": 3}}', "is not an index"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "model is incomplete: model-9"),
        ("[" * 100_000, "is not an index"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    folder = checkpoint(tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    assert message in fails(folder).message


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_pipes_among_the_files_do_not_hang(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert fails(tmp_path).message == f"{path} is not a regular file"


def test_a_pipe_is_no_tokenizer_configuration(tmp_path: Path) -> None:
    os.mkfifo(checkpoint(tmp_path) / "tokenizer_config.json")
    assert read_model(f"dir:{tmp_path}").chat_template is False


def test_folders_without_a_model(tmp_path: Path) -> None:
    error = fails(tmp_path / "no")
    assert f"model folder not found: {tmp_path}/no" in error.message
    assert error.hint == f"{tmp_path} has no folders"
    (tmp_path / "not").mkdir()
    assert fails(tmp_path / "no").hint == "did you mean not?"
    (tmp_path / "not").rmdir()
    assert fails(tmp_path).hint == "the folder is empty"
    path = write(tmp_path / "a.gguf")
    assert fails(tmp_path).hint == f"give the file: file:{path}"
    assert "is a file, not a folder" in fails(path).message
    folder = checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "has config.json and no safetensors files" in fails(folder).message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": None}, "describes no language model"),
        ({"num_hidden_layers": 5000}, "describes no language model"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({"num_key_value_heads": [1]}, "num_key_value_heads is [1]"),
        ({"num_key_value_heads": [1, -1]}, "num_key_value_heads is [1, -1]"),
        ({"layer_types": ["x"]}, "layer_types is ['x']"),
        ({"loop_num": 1000}, "loop_num is 1000"),
        ({"num_experts": 4, "num_experts_per_tok": 8}, "uses 8 of 4 experts for a token"),
        ({"architectures": ["a\nb"]}, "does not name its architecture"),
        ({"hidden_size": -1}, "hidden_size is -1"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path: Path, config: Any, message: str) -> None:
    assert message in fails(checkpoint(tmp_path, **config)).message


def test_configurations_that_cannot_be_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path) / "config.json"
    for text, message in (
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("[]", "is not a JSON object"),
        ("{", "is not valid JSON"),
        ("[" * 50_000, "is not valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "is not valid JSON"),
        ('{"a":"' + "x" * (5 << 20) + '"}', "has more than"),
    ):
        path.write_text(text)
        assert message in fails(tmp_path).message
    path.write_bytes(b'{"\xff": 1}')
    assert "is not valid JSON" in fails(tmp_path).message


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 6), st.binary(max_size=6)), max_size=4
)


def mutated(raw: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    out = bytearray(raw)
    for at, length, new in changes:
        out[at : at + length] = new
    return bytes(out)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 40) | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        *CONFIG,
        *("text_config", "quantization_config", "layer_types", "sliding_window", "loop_num"),
        *("sliding_window_pattern", "kv_lora_rank", "num_experts", "num_experts_per_tok"),
        *("head_dim", "attn_type_list", "linear_attn_config", "hybrid_override_pattern"),
    ]
)


@FUZZ
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_configuration_fails_in_one_way_only(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with contextlib.suppress(StackctlError):
        to_json(read_model(f"dir:{folder}"))


@FUZZ
@given(CHANGES)
def test_a_mutated_index_fails_in_one_way_only(
    tmp_path: Path, changes: list[tuple[int, int, bytes]]
) -> None:
    folder = sharded(tmp_path / "m")
    path = folder / "model.safetensors.index.json"
    path.write_bytes(mutated(path.read_bytes(), changes))
    with contextlib.suppress(StackctlError):
        read_model(f"dir:{folder}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, repo: str = "Org/Repo", commit: str = "a" * 40) -> Path:
    """An empty snapshot that ``main`` names."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_a_cached_repository(cache: Path) -> None:
    folder = checkpoint(cached(cache))
    model = read_model("hf:Org/Repo")
    assert (model.source, model.name) == ("hf:Org/Repo", "Repo")
    assert model.files[0].path == str(folder / "model.safetensors")
    assert read_model(f"hf:Org/Repo@{'a' * 40}").parameters == model.parameters
    error = fails("hf:Org/Repo@v2")
    assert error.message.startswith("revision v2 of Org/Repo is not in the local hub cache")
    assert error.hint == (
        f"it has main, {'a' * 40}: hf:Org/Repo@main; or: stackctl model fetch hf:Org/Repo@v2"
    )
    assert "has no GGUF file of Q4_K_M" in fails("hf:Org/Repo:Q4_K_M").message


def test_cached_ggufs(cache: Path) -> None:
    folder = cached(cache)
    assert "holds no model" in fails("hf:Org/Repo").message
    write(folder / "m-Q4_K_M.gguf")
    assert read_model("hf:Org/Repo").source == "hf:Org/Repo"
    write(folder / "m-Q8_0.gguf")
    write(folder / "mmproj-Q8_0.gguf")
    model = read_model("hf:Org/Repo:q8_0")
    assert model.files[0].path == str(folder / "m-Q8_0.gguf")
    error = fails("hf:Org/Repo")
    assert "has 2 GGUF files" in error.message
    assert "m-Q4_K_M.gguf, m-Q8_0.gguf" in (error.hint or "")
    assert "has no GGUF file of Q4" in fails("hf:Org/Repo:Q4").message


def test_what_is_not_cached(cache: Path) -> None:
    error = fails("hf:Org/Repo")
    assert error.message == f"Org/Repo is not in the local hub cache ({cache})"
    assert error.hint == "stackctl model fetch hf:Org/Repo"
    source = "hf:IQuestLab/IQuest-Coder-V1-40B-Instruct-nvfp4"
    model = read_model(source)
    assert (model.source, model.quantization, model.files) == (source, "nvfp4", ())
    assert model.facts.startswith("catalogue: ")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"({tmp_path}/.cache/huggingface/hub)" in fails("hf:Org/Repo").message
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert f"({tmp_path}/hf/hub)" in fails("hf:Org/Repo").message
    cached(tmp_path / "hf" / "hub", commit="../../../etc")
    assert "does not hold a commit" in fails("hf:Org/Repo").message


@pytest.mark.parametrize(
    "text", ["repo", "a/b/c", "../b", "a/b@", "a/b@../x", "a/b:", "a/..b", " "]
)
def test_hub_sources_that_are_written_wrongly(text: str) -> None:
    with pytest.raises(StackctlError) as caught:
        parse_hub_source(text)
    assert caught.value.exit_code == ExitCode.USAGE
