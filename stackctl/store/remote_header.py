"""Read the facts of a hub's model before it is downloaded, from the headers of its files.

Only the beginning of each file is fetched: a few MiB of a GGUF, less of safetensors. It is written
to a sparse file of the full length, which is then read like any other model.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from stackctl.errors import StackctlError
from stackctl.machine.http_download import Transfer, host_of
from stackctl.machine.path_security import make_private_folder
from stackctl.sources.gguf import read_header
from stackctl.sources.gguf_model import read_gguf
from stackctl.sources.hub_cache import HubSource
from stackctl.sources.huggingface import read_checkpoint
from stackctl.sources.safetensors import MAX_HEADER_BYTES
from stackctl.store import hub
from stackctl.store.file_selection import RepoModel, choose_model
from stackctl.store.hub import RemoteFile, RepoInfo, check_range, status_error
from stackctl.store.partial_file import write_error
from stackctl.values.model import Model

_GGUF_STEPS: Final = (2 << 20, 12 << 20, 64 << 20)
_FIRST_BYTES: Final = 128 << 10
_AT_ONCE: Final = 6
_MOST_FILES: Final = 400
_BESIDE: Final = ("config.json", "hf_quant_config.json", "quantize_config.json")
_TEMPLATES: Final = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
_MOST_BESIDE_BYTES: Final = 8 << 20


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
    if len(weights) > _MOST_FILES:
        raise StackctlError(f"{info.repo} has {len(weights)} files of weights: too many to look at")
    names = {file.path: file.path.rpartition("/")[2] for file in choice.files}
    if choice.format == "gguf":
        jobs = [_job(_gguf_head, info, file, folder / names[file.path]) for file in weights]
        _all(jobs)
        return read_gguf(str(folder / names[weights[0].path]))
    beside = [
        file
        for file in choice.files
        if file.path in (*_BESIDE, *_TEMPLATES) and file.bytes <= _MOST_BESIDE_BYTES
    ]
    jobs = [_job(_whole, info, file, folder / names[file.path]) for file in beside]
    jobs += [_job(_safetensors_head, info, file, folder / names[file.path]) for file in weights]
    _all(jobs)
    return read_checkpoint(f"hf:{info.repo}", folder)


Head = Callable[["_Source", Path], None]


def _job(head: Head, info: RepoInfo, file: RemoteFile, target: Path) -> Callable[[], None]:
    return lambda: head(_Source(info, file), target)


def _all(jobs: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


class _Source:
    """Reads ranges of one file of the hub."""

    def __init__(self, info: RepoInfo, file: RemoteFile) -> None:
        self.file = file
        base = hub.hub_endpoint()
        self._url = f"{base}/{info.repo}/resolve/{info.commit}/{quote(file.path)}"
        self._secret = hub.hub_token(base)

    def read(self, first: int, count: int) -> bytes:
        """Return ``count`` bytes from the offset ``first``; fewer at the file's end."""
        last = min(first + count, self.file.bytes) - 1
        if last < first:
            return b""
        with Transfer() as transfer:
            headers = {"Range": f"bytes={first}-{last}"}
            response = transfer.get(self._url, headers, secret=self._secret)
            if response.status not in (200, 206):
                raise status_error(self.file.path, response)
            whole = response.status == 200 and (first or last + 1 < self.file.bytes)
            if whole:
                raise StackctlError(
                    f"{host_of(response.url)} sends no parts of files: {self.file.path} can only "
                    "be fetched whole"
                )
            if response.status == 206:
                check_range(self.file.bytes, response, first, last)
            text = response.read(last - first + 1)
        if len(text) != last - first + 1:
            raise StackctlError(f"{self.file.path}: the connection broke off")
        return text


def _put(source: _Source, target: Path, text: bytes) -> None:
    with target.open("wb") as file:
        file.write(text)
        file.truncate(source.file.bytes)


def _whole(source: _Source, target: Path) -> None:
    _put(source, target, source.read(0, source.file.bytes))


def _gguf_head(source: _Source, target: Path) -> None:
    """Fetch a GGUF file in growing steps until its header is complete; its length is not known."""
    text = b""
    for size in _GGUF_STEPS:
        text += source.read(len(text), size - len(text))
        _put(source, target, text)
        last = size == _GGUF_STEPS[-1] or len(text) == source.file.bytes
        try:
            if read_header(target).data_offset <= len(text):
                return
        except StackctlError:
            if last or not text.startswith(b"GGUF"):
                raise
    raise StackctlError(f"{source.file.path}: its header is larger than {len(text)} bytes")


def _safetensors_head(source: _Source, target: Path) -> None:
    text = source.read(0, _FIRST_BYTES)
    length = struct.unpack_from("<Q", text)[0] if len(text) >= 8 else 0
    if length <= MAX_HEADER_BYTES:  # a wrong length is reported by read_checkpoint
        text += source.read(len(text), 8 + length - len(text))
    _put(source, target, text)
