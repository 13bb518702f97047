"""Select the files of a repository that belong to one model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import format_bytes
from stackctl.sources.hub_cache import quant_pattern
from stackctl.store.hub import RemoteFile, RepoInfo

_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<end>\w+)")
_QUANT: Final = re.compile(
    r"(?i)(?:^|[-_./])((?:UD-)?(?:I?Q\d_\w+?|TQ\d_\d|BF16|F16|F32|FP16|MXFP4\w*|NVFP4))(?=$|[-./])"
)
#: Files that an engine reads beside the weights.
_BESIDE: Final = re.compile(r"[^/]+\.(json|txt|model|jinja|py|tiktoken)|LICENSE[^/]*")
_MOST_BESIDE_BYTES: Final = 256 << 20
_SHOWN: Final = 12


@dataclass(frozen=True)
class RepoModel:
    """A model in a repository. ``label`` is its quantisation, None if that is not unique."""

    label: str | None
    format: Literal["gguf", "safetensors"]
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
