"""The facts of a model, derived from the headers of its GGUF files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from stackctl.engines import gguf_architectures, with_unsupported
from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.ggml_types import FILE_TYPES
from stackctl.sources.gguf import GgufHeader, read_header
from stackctl.sources.model_text import printable
from stackctl.sources.source_files import real_path, resolve_path
from stackctl.values.model import KvLayout, Model, ModelFile

_NO_MODELS: Final = {
    "adapter": "a LoRA adapter",
    "clip": "a multimodal projector",
    "controlvector": "a control vector",
    "imatrix": "an importance matrix",
    "mmproj": "a multimodal projector",
}
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LOOP: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\.loop\.num")
#: Twice the limit of the reference engine.
_MAX_LAYERS: Final = 1024
_MAX_LEFT_OUT: Final = 8
_MAX_PASSES: Final = 64


def read_gguf(text: str) -> Model:
    """Read the facts of a model from a GGUF file and its further shards; any shard may be named.

    Raises:
        StackctlError: exit 5 for a file that does not hold a model, 1 for a missing or damaged one.
    """
    path = resolve_path(text)
    match = _SHARD.fullmatch(path.name)
    if match and match["number"] != "00001" and int(match["number"]) <= int(match["count"]):
        real_path(path, "model file")
        path = path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf")
    file = real_path(path, "model file")
    if file.is_dir():
        inside = sorted(entry.name for entry in file.glob("*.gguf"))
        hint = f"it has {', '.join(inside[:5])}" if inside else "it has no .gguf files"
        raise StackctlError(f"{path} is a directory, not a GGUF file", hint=hint)
    header = read_header(path)
    count = _whole(header, "split.count") or 1
    files = [(file, header)]
    if count > 1:
        files = _shards(path, header, count, match)
    return _model(f"file:{path}", files)


def _shards(
    path: Path, first: GgufHeader, count: int, match: re.Match[str] | None
) -> list[tuple[Path, GgufHeader]]:
    """Return all shards of a model in order.

    They are found by their names in one folder, because engines find them like this.

    Raises:
        StackctlError: a shard is missing, misnamed or of another model.
    """
    if match is None or int(match["count"]) != count or _whole(first, "split.no") != 0:
        raise StackctlError(
            f"{path} is part {(_whole(first, 'split.no') or 0) + 1} of {count}, "
            "which its name does not say",
            hint=f"engines find the parts by their names: NAME-00001-of-{count:05}.gguf",
        )
    names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    paths = [path.with_name(name) for name in names]
    missing = [str(shard) for shard in paths if not shard.exists()]
    if missing:
        shown = ", ".join(Path(name).name for name in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise StackctlError(
            f"model is incomplete: {shown}{more} of its {count} files not found in {path.parent}",
            hint="all parts must lie in one folder",
            details=missing[:20],
        )
    files = [(real_path(shard, "model file"), read_header(shard)) for shard in paths]
    for number, (shard, (_, header)) in enumerate(zip(paths, files, strict=True)):
        if _whole(header, "split.no") != number or _whole(header, "split.count") != count:
            raise StackctlError(
                f"{shard} is not part {number + 1} of {count} of this model",
                hint="the file was renamed or belongs to another download",
            )
    tensors = sum(header.tensors.count for _, header in files)
    expected = _whole(first, "split.tensors.count")
    if expected is not None and tensors != expected:
        raise StackctlError(f"{path}: its parts hold {tensors} tensors, not {expected}")
    return files


def _name(file: Path, header: GgufHeader, parts: int) -> str | None:
    """Return the name of the link to a file; None if the engine does not need it.

    Engines find shards by name and recognise GGUF by the ending, and blobs of the hub's cache have
    neither.
    """
    named = Path(header.path).name
    tells = file.suffix == ".gguf" and parts == 1
    return None if tells or named == file.name else named


def _model(source: str, files: Sequence[tuple[Path, GgufHeader]]) -> Model:
    header = files[0][1]
    parts = [part for _, part in files]
    architecture = _check_model(header, sum(part.tensors.count for part in parts))
    layers = _layers(header, architecture)
    experts, used = _experts(header, architecture)
    name = header.metadata.get("general.name")
    parameters = sum(part.tensors.elements for part in parts)
    tables, table_bytes = _lookups(parts)
    idle = sum(part.tensors.expert_elements for part in parts)
    idle = idle - idle * used // experts if experts and used else 0
    tokens = header.arrays.get("tokenizer.ggml.tokens")
    model = Model(
        source=source,
        name=printable(name)[:200] if isinstance(name, str) and name else None,
        architecture=architecture,
        parameters=parameters,
        active_parameters=parameters - tables - idle,
        quantization=_quantization(parts),
        quantization_method="gguf",
        weights_bytes=sum(part.tensors.bytes for part in parts),
        expert_bytes=sum(part.tensors.expert_bytes for part in parts) or None,
        embedding_bytes=table_bytes,
        layers=layers,
        passes=_passes(header),
        context=_whole(header, f"{architecture}.context_length"),
        embedding=_whole(header, f"{architecture}.embedding_length"),
        feed_forward=_largest(header, f"{architecture}.feed_forward_length"),
        vocabulary=tokens.length if tokens else _whole(header, f"{architecture}.vocab_size"),
        heads=_largest(header, f"{architecture}.attention.head_count") or None,
        experts=experts,
        experts_used=used,
        kv=_kv_layout(header, architecture, layers),
        chat_template="tokenizer.chat_template" in header.long_texts
        or bool(header.metadata.get("tokenizer.chat_template")),
        files=tuple(
            ModelFile(path=str(file), bytes=part.size, name=_name(file, part, len(files)))
            for file, part in files
        ),
    )
    return with_unsupported(model)


def _layers(header: GgufHeader, architecture: str) -> int:
    """Return the number of layers. Raises StackctlError if it is missing or out of range."""
    layers = _whole(header, f"{architecture}.block_count")
    if layers is None:
        raise StackctlError(
            f"{header.path} does not say how many layers it has ({architecture}.block_count)",
            hint=f"is {architecture!r} a language model? others come as GGUF files too",
        )
    if not layers or layers > _MAX_LAYERS:
        raise StackctlError(f"{header.path}: {architecture}.block_count is {layers}")
    return layers


def _experts(header: GgufHeader, architecture: str) -> tuple[int | None, int | None]:
    """Return the number of experts, and the number that a token uses; None for a dense model."""
    experts = _whole(header, f"{architecture}.expert_count") or None
    used = _largest(header, f"{architecture}.expert_used_count") if experts else None
    if experts and (used or 0) > experts:
        raise StackctlError(f"{header.path} uses {used} of {experts} experts for a token")
    return experts, used


def _lookups(parts: Sequence[GgufHeader]) -> tuple[int, int]:
    """Return elements and bytes of the tables of which a token reads only one row.

    A model without an output matrix reads its embedding table in full at the end; that table is not
    counted.
    """
    tables = {name: size for part in parts for name, size in part.tensors.tables.items()}
    if tables.pop("output.weight", None) is None:
        tables.pop("token_embd.weight", None)
    return sum(size[0] for size in tables.values()), sum(size[1] for size in tables.values())


def _passes(header: GgufHeader) -> int:
    """Return the number of runs through the layers for one token; more than 1 in Loop models."""
    key = next((key for key in header.metadata if _LOOP.fullmatch(key)), None)
    passes = 1 if key is None else _whole(header, key) or 1
    if passes > _MAX_PASSES:
        raise StackctlError(f"{header.path}: {key} is {passes}")
    return passes


def _check_model(header: GgufHeader, tensors: int) -> str:
    """Return the architecture. Raises StackctlError (exit 5) if the file does not hold a model."""
    architecture = header.metadata.get("general.architecture")
    kind = header.metadata.get("general.type", "model")
    other = _NO_MODELS.get(str(kind)) or _NO_MODELS.get(str(architecture))
    if other is None and not tensors:
        other = "a vocabulary without weights"
    if other:
        raise StackctlError(f"{header.path} is {other}, not a model", exit_code=ExitCode.REFUSED)
    if not isinstance(architecture, str) or not re.fullmatch(
        r"[A-Za-z0-9_.+-]{1,64}", architecture
    ):
        raise StackctlError(f"{header.path} does not name its architecture (general.architecture)")
    return architecture


def _kv_layout(header: GgufHeader, arch: str, layers: int) -> KvLayout | None:
    """Return the layout of the KV cache, as the reference engine of GGUF files allocates it.

    Latent attention (MLA): a file with ``key_length_mla`` and ``value_length_mla`` has one KV head
    of kv_lora_rank + RoPE elements in ``key_length``, and the engine keeps no values for it
    (``has_v = !is_mla`` where it allocates the cache). Older conversions with only ``kv_lora_rank``
    are cached in full, head by head, with the sizes in their other keys. Sparse attention adds one
    indexer key per token.
    """
    attention = f"{arch}.attention"
    heads = _per_layer(header, f"{attention}.head_count", layers)
    kv_heads = _per_layer(header, f"{attention}.head_count_kv", layers) or heads
    state = _state_bytes(header, arch)
    if kv_heads is None:
        if not state:
            return None
        kv_heads = (0,) * layers
    embedding = _whole(header, f"{arch}.embedding_length") or 0
    default = embedding // next((count for count in heads or () if count), embedding + 1)
    key = _largest(header, f"{attention}.key_length")
    value = _largest(header, f"{attention}.value_length")
    kind: Literal["gqa", "mla", "hybrid"] = "gqa"
    if _whole(header, f"{attention}.key_length_mla"):
        kind = "mla"
        rank = _whole(header, f"{attention}.kv_lora_rank") or 0
        key = key or rank + (_whole(header, f"{arch}.rope.dimension_count") or 0)
        key += _whole(header, f"{attention}.indexer.key_length") or 0
        value = 0

    kv_heads = _with_cache(header, arch, kv_heads)
    window, sliding = _sliding(header, arch, kv_heads)
    return KvLayout(
        kind="hybrid" if 0 in kv_heads else kind,
        kv_heads=kv_heads,
        key_dim=default if key is None else key,
        value_dim=default if value is None else value,
        sliding_window=window,
        sliding_layers=sum(sliding),
        sliding=sliding,
        sliding_key_dim=_largest(header, f"{attention}.key_length_swa") if window else None,
        sliding_value_dim=_largest(header, f"{attention}.value_length_swa") if window else None,
        state_bytes=state * _recurrent(header, arch, kv_heads),
    )


def _recurrent(header: GgufHeader, arch: str, kv_heads: tuple[int, ...]) -> int:
    """Return the number of layers with a recurrent state."""
    if arch in gguf_architectures.PARALLEL_STATE:
        return len(kv_heads)
    wide = None
    if arch in gguf_architectures.LONE_LAYERS:
        wide = _per_layer(header, f"{arch}.feed_forward_length", len(kv_heads))
    return sum(1 for i, heads in enumerate(kv_heads) if not heads and not (wide and wide[i]))


def _state_bytes(header: GgufHeader, arch: str) -> int:
    """Return bytes of the state of one recurrent layer for one sequence, 32 bits per element.

    The state is convolution and memory (n_embd_r and n_embd_s in the reference engine), of RWKV,
    LFM2, Kimi's delta attention, or a state space (Mamba, also Qwen's delta net).
    """

    def size(name: str) -> int:
        return _whole(header, f"{arch}.{name}") or 0

    embedding, kernel = size("embedding_length"), max(size("ssm.conv_kernel") - 1, 0)
    if head := size("wkv.head_size"):
        return 4 * embedding * ((size("token_shift_count") or 2) + head)
    if short := size("shortconv.l_cache"):
        return 4 * embedding * (short - 1)
    if head := size("kda.head_dim"):
        inner = head * (_largest(header, f"{arch}.attention.head_count") or 0)
        return 4 * inner * (3 * kernel + head)
    inner, width = size("ssm.inner_size"), size("ssm.state_size")
    return 4 * (kernel * (inner + 2 * size("ssm.group_count") * width) + width * inner)


def _with_cache(header: GgufHeader, arch: str, kv_heads: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``kv_heads`` with 0 for layers that are recurrent or use an earlier layer's cache."""
    layers = len(kv_heads)
    recurrent = _per_layer(header, f"{arch}.attention.recurrent_layers", layers, beyond=0)
    period = _whole(
        header, f"{arch}.full_attention_interval"
    ) or gguf_architectures.RECURRENT_PERIODS.get(arch)
    if recurrent is None and period:
        main = layers - (_whole(header, f"{arch}.nextn_predict_layers") or 0)
        recurrent = tuple(int(i < main and (i + 1) % period != 0) for i in range(layers))
    own = layers - (_whole(header, f"{arch}.attention.shared_kv_layers") or 0)
    return tuple(
        0 if i >= own or (recurrent and recurrent[i]) else count for i, count in enumerate(kv_heads)
    )


def _sliding(
    header: GgufHeader, arch: str, kv_heads: tuple[int, ...]
) -> tuple[int | None, tuple[bool, ...]]:
    """Return the window in tokens, and True for each layer that keeps only the window.

    The pattern in the file is a flag for each layer, or n: every n-th layer has full attention,
    with n = 0 none. If the pattern is unknown, all layers count as full, which is the upper bound
    of memory, and the result is (None, ()).
    """
    window = _whole(header, f"{arch}.attention.sliding_window")
    if window is None:
        window = gguf_architectures.WINDOWS.get(arch)
    if not window:
        return None, ()
    key = f"{arch}.attention.sliding_window_pattern"
    if key in header.arrays:
        slides = [bool(flag) for flag in _per_layer(header, key, len(kv_heads), beyond=0) or ()]
    else:
        period = gguf_architectures.SLIDING_PERIODS.get(arch)
        if key in header.metadata and not isinstance(header.metadata[key], bool):
            period = _whole(header, key)
        if period is None:
            return None, ()
        full = 0 if arch in gguf_architectures.FULL_FIRST else period - 1
        slides = [period == 0 or i % period != full for i in range(len(kv_heads))]
    sliding = tuple(flag and heads > 0 for flag, heads in zip(slides, kv_heads, strict=True))
    return (window, sliding) if any(sliding) else (None, ())


def _quantization(headers: Sequence[GgufHeader]) -> str | None:
    file_type = headers[0].metadata.get("general.file_type")
    if isinstance(file_type, int) and file_type in FILE_TYPES:
        return FILE_TYPES[file_type]
    elements: Counter[str] = Counter()
    for header in headers:
        elements.update(header.tensors.elements_by_type)
    return max(elements, key=lambda name: elements[name], default=None)


def _whole(header: GgufHeader, key: str) -> int | None:
    """Return a number of the metadata; None if the file does not have the key.

    Raises:
        StackctlError: the value is not an integer from 0 to 2**31 - 1.
    """
    value = header.metadata.get(key)
    if value is None and key not in header.arrays:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        shown = repr(value)[:40] if value is not None else "an array"
        raise StackctlError(f"{header.path}: {key} is {shown}, not a number in range")
    return value


def _per_layer(
    header: GgufHeader, key: str, layers: int, beyond: int | None = None
) -> tuple[int, ...] | None:
    """Return a number for every layer; the file has one for all layers or one for each.

    The file may leave out the last layers, which are for multi-token prediction. They get
    ``beyond``, or the largest value if it is None.
    """
    array = header.arrays.get(key)
    if array is None:
        value = _whole(header, key)
        return None if value is None else (value,) * layers
    values = array.values or ()
    left_out = layers - len(values)
    if not values or not 0 <= left_out <= _MAX_LEFT_OUT or min(values) < 0 or max(values) >> 31:
        raise StackctlError(
            f"{header.path}: {key} has {array.length} values of type {array.element} "
            f"for {layers} layers"
        )
    filler = max(values) if beyond is None else beyond
    return (*(int(value) for value in values), *[filler] * left_out)


def _largest(header: GgufHeader, key: str) -> int | None:
    """Return a number; if the file has one for each layer, the largest."""
    array = header.arrays.get(key)
    if array is None:
        return _whole(header, key)
    values = _per_layer(header, key, array.length)
    return None if values is None else max(values)
