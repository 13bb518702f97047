"""Reader of hub models: from the local cache of Hugging Face, else facts from the catalogue."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import msgspec

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.catalogue import find_download, find_repo, read_entry
from stackctl.sources.gguf_model import read_gguf
from stackctl.sources.huggingface import read_checkpoint
from stackctl.values.model import Model

_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_REVISION: Final = r"[A-Za-z0-9][A-Za-z0-9_./-]{0,99}"
_SOURCE: Final = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?"
    r"(?::(?P<quant>[A-Za-z0-9][A-Za-z0-9_./+-]{0,249}))?"
)
#: The path in the address of a page or a file of a hub, as a browser shows it.
_ADDRESS: Final = re.compile(
    rf"/(?P<repo>{_NAME}/{_NAME})(?:/(?:resolve|blob|tree)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?/?"
)
_HUB_HOSTS: Final = frozenset({"huggingface.co", "hf.co"})
_COMMIT: Final = re.compile(r"[0-9a-f]{7,64}")
_LATER_SHARD: Final = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf")
_MOST_FILES: Final = 5_000


class ModelNotCached(StackctlError):
    """A model of a hub that is not in the local cache."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """The parts of ``ORG/REPO[@REV][:QUANT]``; ``quant`` may also be the path of a file.

    If ``url`` is set, the source is a single file of the web, which the store keeps like a
    repository.
    """

    repo: str
    revision: str | None
    quant: str | None
    url: str | None = None


def parse_hub_source(text: str) -> HubSource:
    """Parse ``ORG/REPO[@REV][:QUANT]``. Raises StackctlError (exit 2) for any other text."""
    match = _SOURCE.fullmatch(text)
    if match is None or ".." in text:
        raise StackctlError(
            f"model source hf:{text} is not understood",
            hint="write hf:ORG/REPO, hf:ORG/REPO@REVISION or hf:ORG/REPO:QUANT",
            exit_code=ExitCode.USAGE,
        )
    return HubSource(match["repo"], match["revision"], match["quant"])


def parse_address(text: str) -> HubSource:
    """Parse ``https://...``: the address of a repository or file of a hub, or of a GGUF file.

    The store keeps a file from outside the hubs as the repository ``web/HOST-HASH``.

    Raises:
        StackctlError: exit 2 for any other address, and for one with a user name or password.
    """
    hubs = set(_HUB_HOSTS)
    with contextlib.suppress(ValueError):
        hubs.add(urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname or "huggingface.co")
    try:
        text.encode()
        parts = urlsplit(text)
        host = parts.hostname or ""
        name = unquote(parts.path).rpartition("/")[2]
    except ValueError:
        host = name = ""
    if host in hubs:
        match = _ADDRESS.fullmatch(unquote(parts.path))
        if match is not None:
            revision = None if match["revision"] == "main" else match["revision"]
            rest = f"@{revision}" if revision else ""
            return parse_hub_source(
                match["repo"] + rest + (f":{match['file']}" if match["file"] else "")
            )
    if not host or not re.fullmatch(r"[\w.+-]{1,200}\.gguf", name):
        raise StackctlError(
            f"{text[:200]} is not the address of a GGUF file",
            hint="write hf:ORG/REPO for a repository of a hub",
            exit_code=ExitCode.USAGE,
        )
    if parts.username is not None:
        raise StackctlError(
            f"{host}: addresses with a user name or password are refused",
            hint="it would be stored and shown with the model",
            exit_code=ExitCode.USAGE,
        )
    plain = parts._replace(fragment="").geturl()
    digest = hashlib.sha256(plain.encode()).hexdigest()[:12]
    return HubSource(f"web/{host.replace(':', '-')[:80]}-{digest}", None, name, plain)


def parse_remote(source: str) -> HubSource | None:
    """Parse a source that can be downloaded; return None for other kinds of sources.

    Raises:
        StackctlError: exit 2 if the text after ``hf:`` or the address is not understood.
    """
    kind, _, rest = source.partition(":")
    if kind == "hf":
        return parse_hub_source(rest)
    return parse_address(source) if kind in ("https", "http") else None


def hub_home() -> Path:
    """Return the folder of the hub's own tools: ``$HF_HOME`` or its default."""
    home = os.environ.get("HF_HOME")
    if not home:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = f"{base}/huggingface"
    return Path(home).expanduser().absolute()


def cache_folder() -> Path:
    """Return the cache of the hub's own tools: ``$HF_HUB_CACHE``, else ``hub`` in hub_home."""
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder).expanduser().absolute()
    return hub_home() / "hub"


def repo_folder(repo: str) -> Path:
    """Return the folder of a repository in the cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def quant_pattern(quant: str) -> re.Pattern[str]:
    """Return a pattern for the paths of files of a quantisation, such as ``Q4_K_M``."""
    return re.compile(rf"(?i)(?:.*[-_./])?{re.escape(quant)}(?:[-./].*)?")


def read_catalogue(name: str) -> Model:
    """Read the facts of a model of the catalogue: from its files if they are in the cache.

    A model from the cache has the source from which it was fetched.

    Raises:
        StackctlError: exit 4 if there is no such entry; 1 if the model in the cache is damaged.
    """
    facts = read_entry(name)
    download = find_download(facts.source)
    if download is None:
        return facts
    try:
        found = read_hub(download.source, parse_hub_source(download.source.removeprefix("hf:")))
    except ModelNotCached:
        return facts
    return found if found.files else facts


def read_hub(source: str, parsed: HubSource) -> Model:
    """Read the facts of a model that can be downloaded, from the cache, else from the catalogue.

    Raises:
        StackctlError: the model is neither in the cache nor in the catalogue, or is damaged.
    """
    try:
        folder = snapshot_folder(parsed)
    except (OSError, RuntimeError) as error:
        where, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        raise StackctlError(f"cannot read {where or cache_folder()}: {why or error}") from None
    if folder is None:
        return _from_catalogue(source, parsed)
    if parsed.quant is None and (folder / "config.json").exists() and _has_weights(folder):
        model = read_checkpoint(source, folder)
    else:
        model = read_gguf(str(_gguf(folder, parsed)))
    root = f"{repo_folder(parsed.repo).resolve()}/"
    for file in model.files:
        if not file.path.startswith(root):
            raise StackctlError(
                f"{file.path} is not in the store: a link of {folder} leads out of it",
                hint=f"remove the link and fetch it again: stackctl model fetch {source}",
            )
    return msgspec.structs.replace(model, source=source)


def snapshot_folder(source: HubSource) -> Path | None:
    """Return the folder with the files of the wanted revision; None if it is not in the cache.

    Raises:
        StackctlError: the cache is damaged.
    """
    repo = repo_folder(source.repo)
    revision = source.revision or "main"
    named = repo / "refs" / revision
    if named.is_file():
        with named.open("rb") as file:
            commit = file.read(100).decode("ascii", "replace").strip()
        if not _COMMIT.fullmatch(commit):
            raise StackctlError(f"{named} does not hold a commit", hint="fetch the model again")
        revision = commit
    elif not _COMMIT.fullmatch(revision):
        return None
    folder = repo / "snapshots" / revision
    return folder if folder.is_dir() else None


def _revisions(source: HubSource) -> list[str]:
    """Return the names and commits of the revisions in the cache."""
    repo, found = repo_folder(source.repo), []
    for part in ("refs", "snapshots"):
        with contextlib.suppress(OSError):
            found += sorted(entry.name for entry in (repo / part).iterdir())
    return [name for name in found if re.fullmatch(_REVISION, name)]


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))


def _gguf(folder: Path, source: HubSource) -> Path:
    """Return the GGUF file of a snapshot that has the wanted quantisation.

    Raises:
        ModelNotCached: no file has the quantisation, or there are no files: other tools fetch a
            configuration without the weights.
        StackctlError: several files fit.
    """
    found = []
    for number, path in enumerate(folder.glob("**/*.gguf")):
        if number > _MOST_FILES:
            break
        if not _LATER_SHARD.search(path.name) and "mmproj" not in path.name.lower():
            found.append(path)
    names = sorted(str(path.relative_to(folder)) for path in found)
    if source.quant:
        wanted = quant_pattern(source.quant)
        exact = [name for name in names if name == source.quant]
        names = exact or [name for name in names if wanted.fullmatch(name)]
    if len(names) == 1:
        return folder / names[0]
    there = sorted(str(path.relative_to(folder)) for path in found)
    shown = f"it has {', '.join(there[:6])}{', ...' if len(there) > 6 else ''}"
    if source.quant and not names:
        raise ModelNotCached(
            f"the cached {source.repo} has no GGUF file of {source.quant}",
            hint=shown if there else f"{folder} holds no GGUF files",
        )
    if not names:
        raise ModelNotCached(
            f"the cached {source.repo} holds no model: neither safetensors nor GGUF files",
            hint=f"fetch all its files again; they would lie in {folder}",
        )
    raise StackctlError(
        f"the cached {source.repo} has {len(names)} GGUF files",
        hint=f"say which: hf:{source.repo}:Q4_K_M; {shown}",
    )


def _from_catalogue(text: str, source: HubSource) -> Model:
    model = find_repo(source.repo, source.quant)
    if model is not None:
        return msgspec.structs.replace(model, source=text)
    where = f"is not in the local hub cache ({cache_folder()})"
    there = _revisions(source)
    if there and source.url is None:
        raise ModelNotCached(
            f"revision {source.revision or 'main'} of {source.repo} {where}",
            hint=f"it has {', '.join(there[:6])}{', ...' if len(there) > 6 else ''}: "
            f"hf:{source.repo}@{there[0]}; or: stackctl model fetch {text}",
        )
    raise ModelNotCached(
        f"{source.url or source.repo} {where}", hint=f"stackctl model fetch {text}"
    )
