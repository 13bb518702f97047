"""Reader of a model's layout from the config.json of a Hugging Face folder.

Families of models use different keys for one property. A missing key means unknown; the value of a
present key must be valid. If only a part of the layout is understood, the larger cache is assumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from stackctl.errors import StackctlError
from stackctl.sources.source_files import read_bytes
from stackctl.values.base import unique_pairs
from stackctl.values.model import KvLayout, Model

MAX_CONFIG_BYTES: Final = 4 << 20
_MAX_LAYERS: Final = 1024
_MAX_PASSES: Final = 64
# Keys of the part that describes text in multimodal models. thinker_config contains text_config.
_TEXT: Final = ("thinker_config", "text_config", "llm_config", "language_config")
# Defaults of a model's class that published files leave out (transformers, Gemma3TextConfig).
_UNSAID: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "gemma3_text": MappingProxyType(
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
            | {"max_position_embeddings": 131072, "vocab_size": 262208}
        )
    }
)
_EXPERTS: Final = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
_USED: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_USED_MORE: Final = ("top_k_experts", "experts_per_token", "moe_top_k", "num_selected_experts")
_CONTEXT: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# Parts of the names of kinds of layers: with a recurrent state, without attention, with a window.
_STATE_KINDS: Final = ("linear", "mamba", "conv", "recurrent", "ssm", "kda", "gdn")
_LONE_KINDS: Final = ("mlp", "moe")
_WINDOW_KINDS: Final = ("sliding", "chunked", "local")
# Families in which every n-th layer has full attention, or none, for files without a pattern.
_PERIODS: Final = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4, "gpt_oss": 2}
_ALL_SLIDE: Final = frozenset({"mistral", "mixtral"})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, without nulls; duplicate keys are refused.

    Raises:
        StackctlError: the file cannot be read, is larger than 4 MiB, or is not a JSON object.
    """
    raw = read_bytes(path, MAX_CONFIG_BYTES)
    try:
        data = json.loads(raw, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise StackctlError(f"{path} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise StackctlError(f"{path} is not a JSON object")
    return data


@dataclass(frozen=True, slots=True)
class HfConfig:
    """The model that a config.json describes, and the types of its weights.

    The sizes and numbers of the weights are 0 in ``model``, because they are not in the file.
    """

    model: Model
    quantization: Mapping[str, Any]
    dtype: str | None


class _Keys:
    """A JSON object with checked access."""

    def __init__(self, where: str, data: Mapping[str, Any]) -> None:
        self.where = where
        self.data = data

    def get(self, *names: str) -> Any:
        return next((self.data[name] for name in names if self.data.get(name) is not None), None)

    def bad(self, name: str, value: object) -> StackctlError:
        return StackctlError(f"{self.where}: {name} is {repr(value)[:60]}, which is not valid")

    def whole(self, *names: str) -> int | None:
        """Return the number from 0 to 2**31 - 1 under the first name that exists, else None."""
        for name in names:
            value = self.data.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
                raise self.bad(name, value)
            return value
        return None

    def largest(self, *names: str) -> int | None:
        """Return a number; of a list with one entry for each layer, the largest."""
        value = self.get(*names)
        if not isinstance(value, list):
            return self.whole(*names)
        return max(self.numbers(names[0], value), default=None)

    def numbers(self, name: str, value: list[Any]) -> list[int]:
        if any(
            isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 1 << 31 for n in value
        ):
            raise self.bad(name, value)
        return value

    def words(self, name: str, layers: int) -> list[str] | None:
        """Return one word for each layer; None if there is no list under the name."""
        value = self.data.get(name)
        if not isinstance(value, list):
            return None
        if not layers <= len(value) <= layers + 8 or not all(isinstance(w, str) for w in value):
            raise self.bad(name, value)
        return value[:layers]


def read_config(source: str, path: Path) -> HfConfig:
    """Read the layout of the model that a config.json describes.

    Raises:
        StackctlError: the file cannot be read or does not describe a language model.
    """
    top = read_json(path)
    data = _text_part(top)
    keys = _Keys(str(path), data)
    layers = keys.whole("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if not layers or layers > _MAX_LAYERS:
        raise StackctlError(
            f"{path} describes no language model: num_hidden_layers is {layers}",
            hint="adapters, image models and tokenizers have a config.json too",
        )
    name = _architecture(path, top.get("architectures") or data.get("architectures"), data)
    experts, used = _experts(keys)
    dtype = keys.get("torch_dtype", "dtype")
    quantization = keys.get("quantization_config", "compression_config")
    model = Model(
        source=source,
        format="safetensors",
        architecture=name,
        parameters=0,
        weights_bytes=0,
        layers=layers,
        passes=_passes(keys, name),
        context=_context(keys),
        embedding=keys.whole("hidden_size", "n_embd", "d_model"),
        feed_forward=keys.largest("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"),
        heads=keys.largest("num_attention_heads", "n_head", "num_heads"),
        vocabulary=keys.whole("vocab_size"),
        experts=experts,
        experts_used=used,
        kv=_kv_layout(keys, layers),
    )
    return HfConfig(
        model,
        MappingProxyType(quantization if isinstance(quantization, dict) else {}),
        dtype if isinstance(dtype, str) else None,
    )


def _text_part(top: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the part that describes text, with values that the family leaves out."""
    data = dict(top)
    for part in _TEXT:
        inner = data.get(part)
        if isinstance(inner, dict):
            data.update({key: value for key, value in inner.items() if value is not None})
    for unsaid, number in _UNSAID.get(str(data.get("model_type")), {}).items():
        if data.get(unsaid) is None:
            data[unsaid] = number
    return data


def _architecture(path: Path, names: object, data: Mapping[str, Any]) -> str:
    """Return the name of the model's class, else its type.

    Raises:
        StackctlError: the file has neither, or the value is not a name.
    """
    name = names[0] if isinstance(names, list) and names else data.get("model_type")
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 100:
        raise StackctlError(f"{path} does not name its architecture (architectures)")
    return name


def _experts(keys: _Keys) -> tuple[int | None, int | None]:
    """Return the number of experts, and the number that a token uses; None for a dense model."""
    experts = keys.largest(*_EXPERTS) or 0
    if experts <= 1:
        return None, None
    used = keys.largest(*_USED, *_USED_MORE)
    if used and used > experts:
        raise StackctlError(f"{keys.where} uses {used} of {experts} experts for a token")
    return experts, used


def _context(keys: _Keys) -> int | None:
    """Return the longest context in tokens, with the RoPE scaling of the configuration.

    The rule is that of the engines (``_get_and_verify_max_len``). YaRN multiplies the length that
    the model was trained with; linear and dynamic scaling multiply the length in the file. With
    other kinds and in Gemma 3, the length in the file is already scaled.
    """
    context = keys.whole(*_CONTEXT)
    rope = keys.get("rope_scaling", "rope_parameters")
    if context is None or not isinstance(rope, dict):
        return context
    kind = rope.get("rope_type", rope.get("type"))
    factor = rope.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor <= 1024:
        return context
    if kind not in ("yarn", "linear", "dynamic") or "gemma3" in str(keys.data.get("model_type")):
        return context
    if kind == "yarn":
        context = _Keys(keys.where, rope).whole("original_max_position_embeddings") or context
    return int(context * factor)


def _passes(keys: _Keys, architecture: str) -> int:
    passes = keys.whole("loop_num")
    if passes is None:
        return 2 if architecture.startswith("IQuestLoop") else 1
    if passes > _MAX_PASSES:
        raise keys.bad("loop_num", passes)
    return max(1, passes)


def _kv_layout(keys: _Keys, layers: int) -> KvLayout | None:
    heads = keys.largest("num_attention_heads", "n_head", "num_heads")
    if not heads:
        return None
    rank = keys.whole("kv_lora_rank")
    hidden = keys.whole("hidden_size", "n_embd", "d_model") or 0
    dim = keys.whole("head_dim", "attention_head_dim") or hidden // heads
    if dim == 0:
        return None
    without, slides, recurrent = _kinds(keys, layers)
    window = keys.whole("sliding_window", "sliding_window_size", "attention_chunk_size")
    if not window or keys.data.get("use_sliding_window") is False:
        slides = [False] * layers
    kv_heads = [1] * layers if rank else _kv_heads(keys, layers, heads)
    key, value = _dimensions(keys, dim, rank)
    kv_heads = _caching(keys, kv_heads, slides, without)
    sliding = tuple(flag and count > 0 for flag, count in zip(slides, kv_heads, strict=True))
    slid = any(sliding)
    other = dim if slid and key != dim and not rank else None
    return KvLayout(
        kind="hybrid" if 0 in kv_heads else "mla" if rank else "gqa",
        kv_heads=tuple(kv_heads),
        key_dim=key,
        value_dim=value,
        sliding_window=window if slid else None,
        sliding_layers=sum(sliding),
        sliding=sliding if slid else (),
        sliding_key_dim=other,
        sliding_value_dim=other,
        state_bytes=_state_bytes(keys) * recurrent,
    )


def _dimensions(keys: _Keys, dim: int, rank: int | None) -> tuple[int, int]:
    """Return the elements of a key and of a value; latent attention caches no value."""
    if rank:
        # Sparse attention also caches a key of its indexer.
        key = rank + (keys.whole("qk_rope_head_dim") or 0) + (keys.whole("index_head_dim") or 0)
        return key, 0
    key = keys.whole("global_head_dim") or dim
    return key, keys.whole("v_head_dim") or key


def _caching(
    keys: _Keys, kv_heads: list[int], slides: list[bool], without: list[bool]
) -> list[int]:
    """Return the number of cached KV heads of each layer; 0 for a layer without its own cache.

    In models with sliding layers, layers with full attention may have another number of heads. The
    last layers may use the cache of an earlier layer.
    """
    full = keys.whole("num_global_key_value_heads")
    if full and any(slides):
        kv_heads = [n if slide else full for n, slide in zip(kv_heads, slides, strict=True)]
    own = len(kv_heads) - (keys.whole("num_kv_shared_layers") or 0)
    return [0 if without[i] or i >= own else count for i, count in enumerate(kv_heads)]


def _kv_heads(keys: _Keys, layers: int, heads: int) -> list[int]:
    names = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
    value = keys.get(*names)
    if isinstance(value, list):
        if len(value) != layers:
            raise keys.bad("num_key_value_heads", value)
        return keys.numbers("num_key_value_heads", value)
    if value is None and keys.data.get("multi_query") is True:
        return [1] * layers
    count = keys.whole(*names)
    return [heads if count is None else count] * layers


def _kinds(keys: _Keys, layers: int) -> tuple[list[bool], list[bool], int]:
    """Return three facts: True for each layer without a KV cache, True for each layer that keeps
    only a window, and the number of layers with a recurrent state."""
    kinds = keys.words("layer_types", layers) or keys.words("layers_block_type", layers)
    if kinds is not None:
        state = [any(word in kind for word in _STATE_KINDS) for kind in kinds]
        lone = [any(word in kind for word in _LONE_KINDS) for kind in kinds]
        without = [a or b for a, b in zip(state, lone, strict=True)]
        windows = [any(word in kind for word in _WINDOW_KINDS) for kind in kinds]
        return without, windows, sum(state)
    without = _without(keys, layers)
    recurrent = sum(without)
    pattern = keys.data.get("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) == layers:
        recurrent = pattern.count("M")
    elif keys.data.get("model_type") == "falcon_h1":  # every layer has attention and a state
        recurrent = layers
    return without, _slides(keys, layers), recurrent


def _without(keys: _Keys, layers: int) -> list[bool]:
    """Return True for each layer without a KV cache, for files that do not list kinds of layers."""
    pattern = keys.data.get("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) == layers:
        return [mark != "*" for mark in pattern]
    listed = keys.data.get("attn_type_list")
    if isinstance(listed, list) and len(listed) == layers:
        return [mark == 0 for mark in listed]
    period = keys.whole("full_attention_interval")
    if period:
        return [(i + 1) % period != 0 for i in range(layers)]
    period = keys.whole("attn_layer_period")
    if period:
        offset = keys.whole("attn_layer_offset") or 0
        return [i % period != offset for i in range(layers)]
    linear = keys.data.get("linear_attn_config")
    if isinstance(linear, dict) and isinstance(linear.get("full_attn_layers"), list):
        full = keys.numbers("full_attn_layers", linear["full_attn_layers"])
        return [i + 1 not in full for i in range(layers)]
    return [False] * layers


def _slides(keys: _Keys, layers: int) -> list[bool]:
    model_type = keys.data.get("model_type")
    period = keys.data.get("sliding_window_pattern")
    if isinstance(period, str) and period:  # one letter a layer, repeated
        return [period[i % len(period)].upper() == "L" for i in range(layers)]
    period = keys.whole("sliding_window_pattern", "_sliding_window_pattern")
    if period is None and isinstance(model_type, str):
        period = _PERIODS.get(model_type, 0 if model_type in _ALL_SLIDE else None)
    if period is None:
        return [False] * layers
    return [period == 0 or i % period < period - 1 for i in range(layers)]


def _state_bytes(keys: _Keys) -> int:
    """Return bytes of the state of one recurrent layer for one sequence.

    The convolution takes 16 bits per element, the memory 32. The size is known for Mamba 2, gated
    delta nets and Kimi's delta attention; it is 0 for other models.
    """
    whole = keys.whole
    kernel = max((whole("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel") or 0) - 1, 0)
    heads = whole("mamba_n_heads", "mamba_num_heads") or 0
    if heads:
        hidden, wider = whole("hidden_size") or 0, whole("mamba_expand") or 2
        auto = keys.data.get("mamba_d_head") == "auto"
        inner = hidden * wider if auto else heads * (whole("mamba_d_head", "mamba_head_dim") or 0)
        state = whole("mamba_d_state", "ssm_state_size") or 0
        groups = whole("mamba_n_groups", "n_groups") or 0
        return 2 * kernel * (inner + 2 * groups * state) + 4 * inner * state
    linear = keys.data.get("linear_attn_config")
    if isinstance(linear, dict):
        inside = _Keys(keys.where, linear)
        dim = inside.whole("head_dim") or 0
        inner = dim * (inside.whole("num_heads") or 0)
        kernel = max((inside.whole("short_conv_kernel_size") or 0) - 1, 0)
        return 2 * kernel * 3 * inner + 4 * inner * dim
    key_heads, key_dim = whole("linear_num_key_heads") or 0, whole("linear_key_head_dim") or 0
    value_heads = whole("linear_num_value_heads") or 0
    value_dim = whole("linear_value_head_dim") or 0
    width = 2 * key_heads * key_dim + value_heads * value_dim
    return 2 * kernel * width + 4 * value_heads * key_dim * value_dim
