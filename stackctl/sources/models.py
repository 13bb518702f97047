"""Reads what is known of a model from its source: GGUF files or a saved facts document."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.gguf import GgufHeader, read_header
from stackctl.values.base import from_json
from stackctl.values.model import KvLayout, Model, ModelFile

# llama_ftype (llama.h), without the values that were removed.
# fmt: off
_FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0",
    38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}
# fmt: on
# Every n-th layer has full attention where the file does not say so (llama.cpp, src/models).
_SLIDING_PERIODS: Final = {
    "cohere2": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "plamo3": 8,
}
# Every fourth layer has attention, the others a recurrent state, where the file does not say so.
_RECURRENT_PERIODS: Final = {"qwen35": 4, "qwen35moe": 4, "qwen3next": 4}
_NO_MODELS: Final = {
    "adapter": "a LoRA adapter",
    "clip": "a multimodal projector",
    "controlvector": "a control vector",
    "imatrix": "an importance matrix",
    "mmproj": "a multimodal projector",
}
_LATER: Final = ("hf", "dir", "catalogue")
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_ARCHITECTURE: Final = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_MAX_LAYERS: Final = 1024  # llama.cpp: 512
_MAX_LEFT_OUT: Final = 8
_MAX_FACTS_BYTES: Final = 1 << 20


def read_model(source: str) -> Model:
    """Read a model from ``file:PATH`` (GGUF, sharded or not; also a bare ``*.gguf`` path) or
    ``facts:FILE`` (a ``stackctl.model/1`` document).

    Raises:
        StackctlError: exit 2 for a source that is not understood, 5 for a file that upstream
            llama.cpp cannot serve, 1 for a missing, damaged or unreadable file.
    """
    kind, colon, rest = source.partition(":")
    if colon and not rest:
        raise StackctlError(f"model source {source!r} names nothing", exit_code=ExitCode.USAGE)
    if kind == "file" and colon:
        return _read_gguf(rest)
    if kind == "facts" and colon:
        return _read_facts(rest)
    if kind in _LATER and colon:
        raise StackctlError(
            f"model source {kind}: is not supported yet by this version",
            hint="download the model's GGUF file and give file:PATH",
            exit_code=ExitCode.USAGE,
        )
    if source.endswith(".gguf") and not re.match(r"[a-z]+://", source):
        return _read_gguf(source)
    raise StackctlError(
        f"model source {source!r} is not understood",
        hint="give file:PATH (a .gguf file) or facts:FILE",
        exit_code=ExitCode.USAGE,
    )


def _absolute(text: str) -> Path:
    try:
        text.encode()
        return Path(text).expanduser().absolute()
    except UnicodeEncodeError:
        raise StackctlError(f"path {text!a} is not valid UTF-8") from None
    except (OSError, RuntimeError) as error:  # no home, or the current folder is gone
        raise StackctlError(f"cannot find {text}: {error}") from None


def _real(path: Path, what: str) -> Path:
    """The file behind all links: the one whose folder a container can mount."""
    try:
        return path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path, what) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StackctlError(f"cannot read {path}: {reason}") from None


def _missing(path: Path, what: str) -> StackctlError:
    try:
        if path.is_symlink():
            return StackctlError(
                f"{what} not found: {path} is a link to {path.readlink()}, which does not exist"
            )
        names = sorted(entry.name for entry in itertools.islice(path.parent.iterdir(), 10_000))
    except OSError as error:
        reason = error.strerror or str(error)
        return StackctlError(f"{what} not found: {path}", hint=f"{path.parent}: {reason}")
    names = [name for name in names if name.endswith(path.suffix or ".gguf")]
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif names:
        hint = f"{path.parent} has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    else:
        hint = f"{path.parent} has no {path.suffix or '.gguf'} files"
    return StackctlError(f"{what} not found: {path}", hint=hint)


def _read_facts(text: str) -> Model:
    path = _absolute(text)
    _real(path, "facts file")
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FACTS_BYTES + 1)
    except OSError as error:
        raise StackctlError(f"cannot read {path}: {error.strerror}") from None
    if len(raw) > _MAX_FACTS_BYTES:
        raise StackctlError(f"{path} is no facts document: it has more than 1 MiB")
    model = from_json(raw, Model, where=str(path))
    kv = model.kv
    wrong = None
    if model.layers < 1 or model.parameters < 0 or model.weights_bytes < 0:
        wrong = "layers, parameters and weights_bytes must not be negative"
    elif kv is not None and len(kv.kv_heads) != model.layers:
        wrong = f"kv.kv_heads has {len(kv.kv_heads)} entries for {model.layers} layers"
    elif kv is not None and min(*kv.kv_heads, kv.key_dim, kv.value_dim, kv.sliding_layers) < 0:
        wrong = "kv must not hold negative numbers"
    elif kv is not None and kv.sliding and len(kv.sliding) != model.layers:
        wrong = f"kv.sliding has {len(kv.sliding)} entries for {model.layers} layers"
    if wrong:
        raise StackctlError(f"{path}: {wrong}", exit_code=ExitCode.USAGE)
    return model


def _read_gguf(text: str) -> Model:
    path = _absolute(text)
    match = _SHARD.fullmatch(path.name)
    if match and match["number"] != "00001" and int(match["number"]) <= int(match["count"]):
        _real(path, "model file")
        path = path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf")
    file = _real(path, "model file")
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
    """All shards of a model in order, as llama.cpp looks for them: by name, in one folder."""
    if match is None or int(match["count"]) != count or _whole(first, "split.no") != 0:
        raise StackctlError(
            f"{path} is part {(_whole(first, 'split.no') or 0) + 1} of {count}, "
            "which its name does not say",
            hint=f"llama.cpp finds the parts by their names: NAME-00001-of-{count:05}.gguf",
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
    files = [(_real(shard, "model file"), read_header(shard)) for shard in paths]
    for number, (shard, (file, header)) in enumerate(zip(paths, files, strict=True)):
        if _whole(header, "split.no") != number or _whole(header, "split.count") != count:
            raise StackctlError(
                f"{shard} is not part {number + 1} of {count} of this model",
                hint="the file was renamed or belongs to another download",
            )
        if file.name != shard.name or file.parent != files[0][0].parent:
            raise StackctlError(
                f"{shard} is a link to {file}: the parts must be real files in one folder",
                hint="llama.cpp finds the parts by their names; copy them with cp -L",
            )
    tensors = sum(header.tensors.count for _, header in files)
    expected = _whole(first, "split.tensors.count")
    if expected is not None and tensors != expected:
        raise StackctlError(f"{path}: its parts hold {tensors} tensors, not {expected}")
    return files


def _model(source: str, files: Sequence[tuple[Path, GgufHeader]]) -> Model:
    header = files[0][1]
    architecture = _check_supported(header, sum(part.tensors.count for _, part in files))
    layers = _whole(header, f"{architecture}.block_count")
    if not layers or layers > _MAX_LAYERS:
        raise StackctlError(f"{header.path}: {architecture}.block_count is {layers}")
    name = header.metadata.get("general.name")
    tokens = header.arrays.get("tokenizer.ggml.tokens")
    return Model(
        source=source,
        name=_printable(name) if isinstance(name, str) and name else None,
        architecture=architecture,
        parameters=sum(part.tensors.elements for _, part in files),
        quantization=_quantization([part for _, part in files]),
        weights_bytes=sum(part.tensors.bytes for _, part in files),
        expert_bytes=sum(part.tensors.expert_bytes for _, part in files) or None,
        layers=layers,
        context=_whole(header, f"{architecture}.context_length"),
        embedding=_whole(header, f"{architecture}.embedding_length"),
        feed_forward=_largest(header, f"{architecture}.feed_forward_length"),
        vocabulary=tokens.length if tokens else _whole(header, f"{architecture}.vocab_size"),
        experts=_whole(header, f"{architecture}.expert_count") or None,
        experts_used=_largest(header, f"{architecture}.expert_used_count") or None,
        kv=_kv_layout(header, architecture, layers),
        chat_template="tokenizer.chat_template" in header.long_texts
        or bool(header.metadata.get("tokenizer.chat_template")),
        files=tuple(ModelFile(path=str(file), bytes=part.size) for file, part in files),
    )


def _check_supported(header: GgufHeader, tensors: int) -> str:
    """The architecture of a file that is a model which llama.cpp can serve."""
    architecture = header.metadata.get("general.architecture")
    kind = header.metadata.get("general.type", "model")
    other = _NO_MODELS.get(str(kind)) or _NO_MODELS.get(str(architecture))
    if other is None and not tensors:
        other = "a vocabulary without weights"
    if other:
        raise StackctlError(f"{header.path} is {other}, not a model", exit_code=ExitCode.REFUSED)
    if any(key.endswith(".loop.num") for key in header.metadata):
        raise StackctlError(
            f"{header.path} is a Loop variant, which llama.cpp cannot run",
            hint="use the variant without Loop (IQuest-Coder Instruct), or serve it with vLLM",
            details=["its key llama.loop.num asks for layers that run more than once per token"],
            exit_code=ExitCode.REFUSED,
        )
    if not isinstance(architecture, str) or not re.fullmatch(
        r"[A-Za-z0-9_.+-]{1,64}", architecture
    ):
        raise StackctlError(f"{header.path} does not name its architecture (general.architecture)")
    return architecture


def _kv_layout(header: GgufHeader, arch: str, layers: int) -> KvLayout | None:
    """What the KV cache holds, as llama.cpp allocates it.

    Latent attention (MLA): a file with ``key_length_mla`` and ``value_length_mla`` has one KV head
    of kv_lora_rank + RoPE elements in ``key_length``, and llama.cpp keeps no values for it
    (``has_v = !is_mla`` in llama-kv-cache.cpp). Older conversions with only ``kv_lora_rank``
    are cached in full, head by head, as their other keys say. Sparse attention adds one indexer
    key a token. The fixed state of recurrent layers is not part of the layout.
    """
    attention = f"{arch}.attention"
    heads = _per_layer(header, f"{attention}.head_count", layers)
    kv_heads = _per_layer(header, f"{attention}.head_count_kv", layers) or heads
    if kv_heads is None:
        return None
    embedding = _whole(header, f"{arch}.embedding_length") or 0
    default = embedding // next((count for count in heads or () if count), embedding + 1)
    key = _largest(header, f"{attention}.key_length")
    value = _largest(header, f"{attention}.value_length")
    if _whole(header, f"{attention}.key_length_mla"):
        rank = _whole(header, f"{attention}.kv_lora_rank") or 0
        key = key or rank + (_whole(header, f"{arch}.rope.dimension_count") or 0)
        key += _whole(header, f"{attention}.indexer.key_length") or 0
        value = 0

    kv_heads = _with_cache(header, arch, kv_heads)
    window, sliding = _sliding(header, arch, kv_heads)
    return KvLayout(
        kv_heads=kv_heads,
        key_dim=default if key is None else key,
        value_dim=default if value is None else value,
        sliding_window=window,
        sliding_layers=sum(sliding),
        sliding=sliding,
        sliding_key_dim=_largest(header, f"{attention}.key_length_swa") if window else None,
        sliding_value_dim=_largest(header, f"{attention}.value_length_swa") if window else None,
    )


def _with_cache(header: GgufHeader, arch: str, kv_heads: tuple[int, ...]) -> tuple[int, ...]:
    """``kv_heads`` with 0 for layers that are recurrent or use the cache of an earlier layer."""
    layers = len(kv_heads)
    recurrent = _per_layer(header, f"{arch}.attention.recurrent_layers", layers, beyond=0)
    period = _whole(header, f"{arch}.full_attention_interval") or _RECURRENT_PERIODS.get(arch)
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
    """The window in tokens and which layers keep only that.

    A pattern is a flag per layer, or n: every n-th layer has full attention (0: none has). With
    an unknown pattern all layers count as full, which is the upper bound.
    """
    window = _whole(header, f"{arch}.attention.sliding_window")
    if not window:
        return None, ()
    key = f"{arch}.attention.sliding_window_pattern"
    if key in header.arrays:
        slides = [bool(flag) for flag in _per_layer(header, key, len(kv_heads), beyond=0) or ()]
    else:
        period = _SLIDING_PERIODS.get(arch)
        if key in header.metadata and not isinstance(header.metadata[key], bool):
            period = _whole(header, key)
        if period is None:
            return None, ()
        slides = [period == 0 or i % period < period - 1 for i in range(len(kv_heads))]
    sliding = tuple(flag and heads > 0 for flag, heads in zip(slides, kv_heads, strict=True))
    return (window, sliding) if any(sliding) else (None, ())


def _quantization(headers: Sequence[GgufHeader]) -> str | None:
    file_type = headers[0].metadata.get("general.file_type")
    if isinstance(file_type, int) and file_type in _FILE_TYPES:
        return _FILE_TYPES[file_type]
    elements: Counter[str] = Counter()
    for header in headers:
        elements.update(header.tensors.elements_by_type)
    return max(elements, key=lambda name: elements[name], default=None)


def _whole(header: GgufHeader, key: str) -> int | None:
    """A number that is not negative; None when the file does not have the key."""
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
    """A number for every layer, given once for all or one by one.

    The last layers, for multi-token prediction, may be left out: ``beyond``, or the largest.
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
    """A number that may differ by layer: its largest value."""
    array = header.arrays.get(key)
    if array is None:
        return _whole(header, key)
    values = _per_layer(header, key, array.length)
    return None if values is None else max(values)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)[:200]
