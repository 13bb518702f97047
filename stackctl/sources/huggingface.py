"""Reader of models in the layout of Hugging Face: config.json beside safetensors files.

The folder is given by the user, or is a snapshot in the local hub cache. Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from stackctl.engines import with_unsupported
from stackctl.errors import StackctlError
from stackctl.sources import hf_config, hf_quantization
from stackctl.sources.model_text import printable
from stackctl.sources.safetensors import SafetensorsHeader, read_safetensors
from stackctl.sources.source_files import read_bytes, real_path, resolve_path
from stackctl.values.model import Model, ModelFile

INDEX: Final = "model.safetensors.index.json"
MAX_INDEX_BYTES: Final = 40 << 20  # Kimi-K2.5 has 210,000 tensors in 25 MB
MAX_INDEX_TENSORS: Final = 300_000
_MAX_FILES: Final = 2_000
_MAX_TOKENIZER_BYTES: Final = 16 << 20
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_FILE: Final = re.compile(r"[^/\0]{1,200}\.safetensors")
# Parts of the names of tensors, which are separated by dots.
_EMBEDDINGS: Final = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings"})
_OUTPUTS: Final = frozenset({"lm_head", "embed_out"})
_WEIGHTS: Final = frozenset({"weight", "qweight", "weight_packed"})
# Granite keeps the routed experts of a layer in two tensors.
_GRANITE: Final = frozenset({"input_linear", "output_linear"})
# Names of tensors that generating a token of text does not read: parts for images and sound, layers
# that draft further tokens, and Gemma 3n's embeddings of every layer.
_IDLE: Final = frozenset(
    {"vision_tower", "vision_model", "vision_encoder", "visual", "audio_tower", "audio_encoder"}
    | {"multi_modal_projector", "mm_projector", "mtp", "embed_tokens_per_layer"}
)
_NUMBER: Final = re.compile(r"[0-9]{1,6}")
_AGAIN: Final = "the download is incomplete or damaged: fetch the files again"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_folder(text: str) -> Model:
    """Read the facts of the model in a folder that the user names.

    Raises:
        StackctlError: the folder is missing, or its model is incomplete or damaged.
    """
    folder = resolve_path(text)
    if not real_path(folder, "model folder", folder=True).is_dir():
        hint = f"give file:{folder}" if folder.suffix == ".gguf" else "give the folder it lies in"
        raise StackctlError(f"{folder} is a file, not a folder", hint=hint)
    return read_checkpoint(f"dir:{folder}", folder)


def read_checkpoint(source: str, folder: Path) -> Model:
    """Read the facts of the model in a folder with config.json and safetensors files.

    Raises:
        StackctlError: the model is incomplete or damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        _refuse_folder(folder)
    config = hf_config.read_config(source, path)
    quantization = hf_quantization.read_quantization(config.quantization, config.dtype, folder)
    count = _Count(quantization.bits, config.model.layers)
    files = []
    placed = _index(folder)
    for name in _file_names(folder, placed):
        header = read_safetensors(folder / name)
        files.append(ModelFile(path=str(Path(header.path).resolve()), bytes=header.size))
        count.add(header)
        if placed is not None:
            _check_index(header, placed.get(name, set()))
    return _model(config.model, folder, quantization, count, tuple(files))


class _Count:
    """Sums over the tensors of all files, by role; ``stored`` has the parameters of each type.

    "embedding" is the table that the output may share. "idle" are the tensors that a token of text
    never reads: parts for images and sound, tables of which it takes one row per layer, and layers
    that draft further tokens. Draft layers are numbered after the model's own layers.
    """

    def __init__(self, bits: int, layers: int) -> None:
        self.bits = bits
        self.layers = layers
        self.names: set[str] = set()
        self.parameters: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()

    def add(self, header: SafetensorsHeader) -> None:
        for name, tensor in header.tensors.items():
            if name in self.names:
                raise StackctlError(
                    f"{header.path} has tensor {name[:100]!r}, which another file has too",
                    hint="the folder mixes two downloads: keep one",
                )
            self.names.add(name)
            role = self._role(name)
            held = hf_quantization.parameters_of_tensor(name, tensor, self.bits)
            self.parameters[role] += held
            self.bytes[role] += tensor.bytes
            self.stored[tensor.dtype] += held
        if len(self.names) > MAX_INDEX_TENSORS:
            raise StackctlError(f"the model has more than {MAX_INDEX_TENSORS} tensors")

    def _role(self, name: str) -> str:
        *path, last = name.split(".")
        owner = path[-1] if path else ""
        if not _IDLE.isdisjoint(path) or self._drafts(path):
            return "idle"
        if "experts" in path or (owner in _GRANITE and "block_sparse_moe" in path):
            return "expert"
        if owner in _EMBEDDINGS and last == "weight":
            return "embedding"
        return "output" if owner in _OUTPUTS and last in _WEIGHTS else "other"

    def _drafts(self, path: list[str]) -> bool:
        """Return True if a tensor belongs to a layer after the model's own layers."""
        if "layers" not in path:
            return False
        number = path[path.index("layers") + 1 :][:1]
        return bool(number and _NUMBER.fullmatch(number[0])) and int(number[0]) >= self.layers


def _model(
    layout: Model,
    folder: Path,
    quantization: hf_quantization.Quantization,
    count: _Count,
    files: tuple[ModelFile, ...],
) -> Model:
    parameters, idle_bytes = count.parameters.total(), count.bytes["idle"]
    active = parameters - count.parameters["idle"]
    if "output" in count.parameters:
        active -= count.parameters["embedding"]
        idle_bytes += count.bytes["embedding"]
    experts, used = layout.experts, layout.experts_used
    if experts and used:
        routed = count.parameters["expert"]
        active -= routed - routed * used // experts
    model = msgspec.structs.replace(
        layout,
        name=_name(layout.source, folder),
        parameters=parameters,
        active_parameters=active,
        quantization=quantization.label or hf_quantization.stored_label(count.stored),
        quantization_method=quantization.method,
        weights_bytes=count.bytes.total(),
        expert_bytes=count.bytes["expert"] or None,
        embedding_bytes=idle_bytes,
        chat_template=_has_template(folder),
        files=files,
        folder=str(folder.resolve()),
    )
    return with_unsupported(model)


def _name(source: str, folder: Path) -> str:
    name = source.split("@")[0].rsplit("/", 1)[-1] if source.startswith("hf:") else folder.name
    return printable(name)[:200]


def _refuse_folder(folder: Path) -> None:
    names = _names(folder)
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        raise StackctlError(
            f"{folder} holds GGUF files and no config.json",
            hint=f"give the file: file:{folder / ggufs[0]}",
        )
    shown = f"it has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    raise StackctlError(
        f"{folder} has no config.json", hint=shown if names else "the folder is empty"
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise StackctlError(f"cannot read {folder}: {error.strerror}") from None


def _index(folder: Path) -> dict[str, set[str]] | None:
    """Return the names of the tensors that the index lists for each file; None without an index."""
    path = folder / INDEX
    if not path.exists():
        return None
    raw = read_bytes(path, MAX_INDEX_BYTES)
    # An entry has four quotes. They are counted before parsing, so that a hostile text cannot
    # become millions of objects.
    if raw.count(b'"') > 4 * MAX_INDEX_TENSORS:
        raise StackctlError(f"{path} is larger than the index of any model")
    try:
        index = msgspec.json.decode(raw, type=_Index)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise StackctlError(f"{path} is not an index: {str(error)[:200]}", hint=_AGAIN) from None
    placed: dict[str, set[str]] = {}
    for tensor, name in index.weight_map.items():
        if name not in placed and not _FILE.fullmatch(name):
            raise StackctlError(f"{path} names {name[:100]!r}, which is not a file beside it")
        placed.setdefault(name, set()).add(tensor)
    if not placed:
        raise StackctlError(f"{path} lists no tensors", hint=_AGAIN)
    return placed


def _check_index(header: SafetensorsHeader, expected: set[str]) -> None:
    missing = sorted(expected - header.tensors.keys())
    if missing:
        raise StackctlError(
            f"{header.path} lacks {len(missing)} tensors that {INDEX} places in it",
            hint="the file belongs to another download of this model: fetch it again",
            details=[name[:100] for name in missing[:5]],
        )


def _file_names(folder: Path, placed: Mapping[str, set[str]] | None) -> Iterator[str]:
    """Yield the names of the weight files. Raises StackctlError if one is missing."""
    if placed is not None:
        names = sorted(placed)
    else:
        names = [name for name in _names(folder) if name.endswith(".safetensors")]
        # Mistral adds consolidated*.safetensors, which hold the same weights again.
        names = [name for name in names if name.startswith("model")] or names
        shards = [match for name in names if (match := _SHARD.fullmatch(name))]
        if shards:
            stem, count = shards[0]["stem"], shards[0]["count"]
            total = min(int(count), _MAX_FILES)
            names = [f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, total + 1)]
    if not names:
        raise StackctlError(
            f"{folder} has config.json and no safetensors files",
            hint="weights as .bin or .pt are not supported: get the safetensors version",
        )
    if len(names) > _MAX_FILES:
        raise StackctlError(f"{folder} has more than {_MAX_FILES} files of weights")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise StackctlError(
            f"model is incomplete: {', '.join(missing[:3])}{more} of its {len(names)} files "
            f"not found in {folder}",
            hint="fetch the missing files; a link in the hub cache may lead nowhere",
            details=missing[:20],
        )
    yield from names


def _has_template(folder: Path) -> bool:
    if any((folder / f"chat_template.{end}").is_file() for end in ("jinja", "json")):
        return True
    try:
        raw = read_bytes(folder / "tokenizer_config.json", _MAX_TOKENIZER_BYTES)
    except StackctlError:
        return False
    return b'"chat_template"' in raw
