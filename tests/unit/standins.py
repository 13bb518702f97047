"""Small models under the names of the catalogue's repositories, for a hub on loopback."""

from __future__ import annotations

import re
from pathlib import Path

import ggufs
from checkpoints import checkpoint
from hub import Hub, Repo

from stackctl.sources.catalogue import HubDownload, catalogue_entries

_FIRST_SHARD = re.compile(r"(?P<stem>.+)-00001-of-(?P<count>\d{5})\.gguf")


def downloads() -> dict[str, HubDownload]:
    """The places of all models of the catalogue that can be fetched, by their ids."""
    known = catalogue_entries().items()
    return {name: entry.download for name, entry in known if entry.download is not None}


def add_standin(site: Hub, download: HubDownload, folder: Path) -> Repo:
    """A repository with a small model where the catalogue says, and others beside it."""
    folder = folder / download.repo.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if download.file is None:
        made = checkpoint(folder / "made")
        return site.add(download.repo, {path.name: path for path in made.iterdir()})
    files = {download.file: ggufs.write(folder / "one.gguf").read_bytes()}
    if shard := _FIRST_SHARD.fullmatch(download.file):
        count = int(shard["count"])
        shards = ggufs.write_shards(folder, count=count)
        files = {
            f"{shard['stem']}-{number:05}-of-{count:05}.gguf": path.read_bytes()
            for number, path in enumerate(shards, 1)
        }
    other = ggufs.write(folder / "other.gguf").read_bytes()
    # The same quantisation in parts, as Qwen's repositories have it, and another one.
    stem = download.file.removesuffix(".gguf")
    beside = {f"{stem}-0000{number}-of-00002.gguf": other for number in (1, 2)}
    return site.add(download.repo, {**files, **({} if shard else beside), "x-Q2_K.gguf": other})
