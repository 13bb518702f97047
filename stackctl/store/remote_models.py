"""The models of a hub's repository: the files of each, and its facts before it is downloaded.

The facts come from the headers of the files: a few MiB of a GGUF, less of safetensors.
"""

from __future__ import annotations

import re
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.http_download import Transfer, host_of
from stackctl.machine.path_security import make_private_folder
from stackctl.quantity import format_bytes
from stackctl.sources.gguf import read_header
from stackctl.sources.gguf_model import read_gguf
from stackctl.sources.hub_cache import HubSource, quant_pattern
from stackctl.sources.huggingface import read_checkpoint
from stackctl.sources.safetensors import MAX_HEADER_BYTES
from stackctl.store import hub
from stackctl.store.hub import RemoteFile, RepoInfo
from stackctl.store.partial_file import write_error
from stackctl.values.model import Model, ModelFormat

_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<end>\w+)")
_QUANT: Final = re.compile(
    r"(?i)(?:^|[-_./])((?:UD-)?(?:I?Q\d_\w+?|TQ\d_\d|BF16|F16|F32|FP16|MXFP4\w*|NVFP4))(?=$|[-./])"
)
#: Files that an engine reads beside the weights.
_BESIDE: Final = re.compile(r"[^/]+\.(json|txt|model|jinja|py|tiktoken)|LICENSE[^/]*")
_MOST_BESIDE_BYTES: Final = 256 << 20
_SHOWN: Final = 12
#: The beginning of a GGUF is fetched in steps of these sizes, that of safetensors in one or two.
_GGUF_STEPS: Final = (2 << 20, 12 << 20, 64 << 20)
_FIRST_BYTES: Final = 128 << 10
_AT_ONCE: Final = 6
_MOST_WEIGHTS: Final = 400
_CONFIGS: Final = ("config.json", "hf_quant_config.json", "quantize_config.json")
_TEMPLATES: Final = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
_MOST_CONFIG_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class RepoModel:
    """A model in a repository. ``label`` is its quantisation, None if that is not unique."""

    label: str | None
    format: ModelFormat
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        """Return the size of all files in bytes."""
        return sum(file.bytes for file in self.files)


def choose_model(info: RepoInfo, wish: str | None) -> RepoModel:
    """Return the model with the quantisation or file name ``wish``.

    Without ``wish``, return the safetensors model or else the only GGUF model.

    Raises:
        StackctlError: no model matches (exit 4), several match (exit 2), or shards are missing.
    """
    ggufs = gguf_models(info)
    whole = safetensors_model(info)
    if wish is None:
        if whole is not None:
            return _complete(info, whole)
        if len(ggufs) == 1:
            return _complete(info, ggufs[0])
        if not ggufs:
            names = ", ".join(file.path for file in info.files[:6])
            raise StackctlError(
                f"{info.repo} holds no model: neither safetensors nor GGUF files",
                hint=f"it has {names}" if names else "it is empty",
                exit_code=ExitCode.NOT_FOUND,
            )
        raise _which(info, ggufs, f"{info.repo} has {len(ggufs)} models", ExitCode.USAGE)
    named = [choice for choice in ggufs if any(file.path == wish for file in choice.files)]
    pattern = quant_pattern(wish)
    found = named or [
        choice
        for choice in ggufs
        if (choice.label or "").lower() == wish.lower() or pattern.fullmatch(choice.files[0].path)
    ]
    if len(found) == 1:
        return _complete(info, found[0])
    if not found:
        raise _which(info, ggufs, f"{info.repo} has no {wish}", ExitCode.NOT_FOUND)
    raise _which(info, found, f"{wish} fits {len(found)} models of {info.repo}", ExitCode.USAGE)


def _which(
    info: RepoInfo, choices: Sequence[RepoModel], what: str, exit_code: ExitCode
) -> StackctlError:
    if not choices:
        return StackctlError(what, hint="it has no GGUF files", exit_code=exit_code)
    details = [
        f"hf:{info.repo}:{choice.label or choice.files[0].path}  {format_bytes(choice.bytes)}"
        for choice in choices[:_SHOWN]
    ]
    if len(choices) > _SHOWN:
        details.append(f"and {len(choices) - _SHOWN} more")
    return StackctlError(
        what,
        details=details,
        hint=f"stackctl model show hf:{info.repo} shows which of them fit this machine",
        exit_code=exit_code,
    )


def gguf_models(info: RepoInfo) -> tuple[RepoModel, ...]:
    """Return the GGUF models of a repository, smallest first; shards may be missing."""
    groups: dict[str, list[RemoteFile]] = {}
    for file in info.files:
        name = file.path.rpartition("/")[2].lower()
        if not name.endswith(".gguf") or "mmproj" in name or "imatrix" in name:
            continue
        match = _SHARD.fullmatch(file.path)
        groups.setdefault(f"{match['stem']}*{match['count']}" if match else file.path, []).append(
            file
        )
    labels = {key: _label(key) for key in groups}
    known = Counter(labels.values())
    choices = []
    for key, files in groups.items():
        label = labels[key]
        if known[label] > 1:
            label = None  # several models with this quantisation: only the file identifies one
        files.sort(key=lambda file: file.path)
        choices.append(RepoModel(label, "gguf", tuple(files)))
    return tuple(sorted(choices, key=lambda choice: choice.bytes))


def _label(key: str) -> str | None:
    found = _QUANT.findall(key.removesuffix(".gguf").partition("*")[0])
    return found[-1] if found else None


def safetensors_model(info: RepoInfo) -> RepoModel | None:
    """Return the safetensors model of a repository with the files beside it, or None."""
    here = [file for file in info.files if "/" not in file.path]
    weights = [file for file in here if file.path.endswith(".safetensors")]
    # Mistral's consolidated.safetensors holds the same weights again.
    weights = [file for file in weights if file.path.startswith("model")] or weights
    if not weights or not any(file.path == "config.json" for file in here):
        return None
    beside = [
        file for file in here if _BESIDE.fullmatch(file.path) and file.bytes <= _MOST_BESIDE_BYTES
    ]
    return RepoModel(None, "safetensors", (*weights, *beside))


def missing_shards(choice: RepoModel) -> str | None:
    """Return a text about the missing shards of a model, or None if it is complete."""
    matches = [match for file in choice.files if (match := _SHARD.fullmatch(file.path))]
    for match in matches[:1]:
        count = int(match["count"])
        numbers = {int(other["number"]) for other in matches}
        if count > 2000 or numbers != set(range(1, count + 1)):
            return f"it has {len(numbers)} of the {count} parts of {match['stem']}"
    return None


def _complete(info: RepoInfo, choice: RepoModel) -> RepoModel:
    """Return the model. Raises StackctlError if shards are missing."""
    if (what := missing_shards(choice)) is not None:
        raise StackctlError(
            f"{info.repo} is incomplete: {what}",
            hint="its owner may be uploading it: try again later",
        )
    return choice


def read_remote(
    source: str, parsed: HubSource, cache: Path, report_wait: Callable[[str], None]
) -> Model:
    """Return the facts of the model that a source names on its hub; like read_remote_facts.

    ``report_wait`` is that of hub.query_repo.
    """
    info = hub.query_repo(parsed.repo, parsed.revision or "main", report_wait=report_wait)
    return read_remote_facts(source, info, choose_model(info, parsed.quant), cache)


def read_remote_facts(source: str, info: RepoInfo, choice: RepoModel, cache: Path) -> Model:
    """Return the facts of a model that is not on the disk: no files, and ``facts`` names the hub.

    Args:
        source: the source of the model.
        info: the repository.
        choice: the model in the repository.
        cache: a folder of this user's own for temporary files.

    Raises:
        StackctlError: the headers cannot be fetched, or are damaged.
    """
    make_private_folder(cache)
    folder = Path(tempfile.mkdtemp(prefix="facts-", dir=cache))
    try:
        model = _read(info, choice, folder)
    except StackctlError as error:
        # The temporary folder is removed, so its path would only confuse.
        error.message = error.message.replace(f"{folder}/", "")
        raise
    except OSError as error:
        raise write_error(cache, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return msgspec.structs.replace(
        model,
        source=source,
        name=model.name if choice.format == "gguf" else info.repo.rpartition("/")[2],
        files=(),
        folder=None,
        facts=f"hub: {info.repo}@{info.commit[:12]}, not downloaded",
    )


def _read(info: RepoInfo, choice: RepoModel, folder: Path) -> Model:
    weights = [f for f in choice.files if f.path.endswith((".gguf", ".safetensors"))]
    if len(weights) > _MOST_WEIGHTS:
        raise StackctlError(f"{info.repo} has {len(weights)} files of weights: too many to look at")
    beside = [
        file
        for file in choice.files
        if file.path in (*_CONFIGS, *_TEMPLATES) and file.bytes <= _MOST_CONFIG_BYTES
    ]
    places = {file.path: folder / Path(file.path).name for file in (*beside, *weights)}
    heads = [_Head(info, file, places[file.path]) for file in (*beside, *weights)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(_Head.download, heads))
    if choice.format == "gguf":
        return read_gguf(str(places[weights[0].path]))
    return read_checkpoint(f"hf:{info.repo}", folder)


class _Head:
    """The beginning of one file of the hub, as much of it as the reader of its format needs.

    It is written to a sparse file ``target`` of the full length.
    """

    def __init__(self, info: RepoInfo, file: RemoteFile, target: Path) -> None:
        base = hub.hub_endpoint()
        self._file = file
        self._target = target
        self._url = hub.file_url(base, info, file)
        self._secret = hub.hub_token(base)

    def download(self) -> None:
        if self._file.path.endswith(".gguf"):
            self._download_gguf()
        elif self._file.path.endswith(".safetensors"):
            text = self._read(0, _FIRST_BYTES)
            length = struct.unpack_from("<Q", text)[0] if len(text) >= 8 else 0
            if length <= MAX_HEADER_BYTES:  # a wrong length is reported by read_checkpoint
                text += self._read(len(text), 8 + length - len(text))
            self._write(text)
        else:
            self._write(self._read(0, self._file.bytes))

    def _download_gguf(self) -> None:
        """Download in growing steps until the header is complete; its length is not known."""
        text = b""
        for size in _GGUF_STEPS:
            text += self._read(len(text), size - len(text))
            self._write(text)
            last = size == _GGUF_STEPS[-1] or len(text) == self._file.bytes
            try:
                if read_header(self._target).data_offset <= len(text):
                    return
            except StackctlError:
                if last or not text.startswith(b"GGUF"):
                    raise
        raise StackctlError(f"{self._file.path}: its header is larger than {len(text)} bytes")

    def _write(self, text: bytes) -> None:
        with self._target.open("wb") as file:
            file.write(text)
            file.truncate(self._file.bytes)

    def _read(self, first: int, count: int) -> bytes:
        """Return ``count`` bytes from the offset ``first``; fewer at the file's end."""
        last = min(first + count, self._file.bytes) - 1
        if last < first:
            return b""
        with Transfer() as transfer:
            headers = {"Range": f"bytes={first}-{last}"}
            response = transfer.get(self._url, headers, secret=self._secret)
            if response.status not in (200, 206):
                raise hub.status_error(self._file.path, response)
            if response.status == 200 and (first or last + 1 < self._file.bytes):
                raise StackctlError(
                    f"{host_of(response.url)} sends no parts of files: {self._file.path} can only "
                    "be fetched whole"
                )
            if response.status == 206:
                hub.check_range(self._file.bytes, response, first, last)
            text = response.read(last - first + 1)
        if len(text) != last - first + 1:
            raise StackctlError(f"{self._file.path}: the connection broke off")
        return text
