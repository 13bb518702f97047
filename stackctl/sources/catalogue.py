"""The shipped catalogue: facts of known models, so that a plan needs no download.

Every number in catalogue.yaml names its source and is marked if it was derived rather than read. An
entry also names the repository of a hub from which its model is fetched, with the evidence for it.
"""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Final, Literal

from stackctl.engines import with_unsupported
from stackctl.errors import ExitCode, StackctlError
from stackctl.sources import strict_yaml
from stackctl.values.base import Value, convert
from stackctl.values.model import KvLayout, Model, ModelFormat

_FILE: Final = Path(__file__).with_name("catalogue.yaml")


class FigureSource(Value, frozen=True, kw_only=True):
    """The source of some numbers of an entry: ``of`` lists their fields."""

    of: tuple[str, ...]
    text: str
    derived: bool = False


class KvSpec(Value, frozen=True, kw_only=True):
    """The KV cache of a layer, the same in all layers; dimensions in elements.

    With ``full_every`` n, every n-th layer has full attention and the other layers keep only
    ``sliding_window`` tokens.
    """

    kind: Literal["gqa", "mla"] = "gqa"
    heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    full_every: int | None = None


class DownloadEvidence(Value, frozen=True, kw_only=True):
    """An address that names a repository or a file of a hub, and the text that gives it."""

    address: str
    text: str


class HubDownload(Value, frozen=True, kw_only=True):
    """The place of a model on a hub.

    ``file`` is the path of its first GGUF file; None: the repository holds one safetensors model.
    ``revision`` is a commit, None if none is known. A ``gated`` repository needs the user's consent
    and token. ``bytes`` is the size of all files, None if it is not known.
    """

    repo: str
    file: str | None = None
    revision: str | None = None
    gated: bool
    bytes: int | None = None
    evidence: tuple[DownloadEvidence, ...]

    @property
    def source(self) -> str:
        """Return the source of the model: ``hf:ORG/REPO[@REVISION][:FILE]``."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}{revision}" + (f":{self.file}" if self.file else "")


class CatalogueEntry(Value, frozen=True, kw_only=True):
    """One model of the file; most fields have the meaning that they have in Model.

    ``instead`` is advice for an entry without a download: the model to make or to use in its place.
    ``repo`` is a repository that the facts describe, and that may not be on the hub.
    """

    name: str
    repo: str | None = None
    download: HubDownload | None = None
    instead: str | None = None
    format: ModelFormat
    architecture: str
    quantization: str
    quantization_method: str | None = None
    parameters: int
    active_parameters: int
    weights_bytes: int
    expert_bytes: int | None = None
    embedding_bytes: int
    layers: int
    passes: int = 1
    context: int
    embedding: int
    feed_forward: int
    heads: int
    vocabulary: int
    experts: int | None = None
    experts_used: int | None = None
    chat_template: bool = True
    kv: KvSpec
    sources: tuple[FigureSource, ...]


class _File(Value, frozen=True, kw_only=True):
    """The whole file: entries by their id."""

    models: dict[str, CatalogueEntry]


@functools.cache
def catalogue_entries() -> dict[str, CatalogueEntry]:
    """Return all entries by their id, in the order of the file.

    Raises:
        StackctlError: the file is missing from the installation or damaged.
    """
    try:
        text = _FILE.read_text(encoding="utf-8")
    except OSError as error:
        raise StackctlError(
            f"this installation has no catalogue: {error}", hint="reinstall stackctl-inference"
        ) from None
    return convert(
        strict_yaml.parse_document(text, where=_FILE.name).data, _File, where=_FILE.name
    ).models


def read_entry(name: str) -> Model:
    """Return the facts of one entry.

    Raises:
        StackctlError: exit 4 if there is no such entry, with similar ids in the hint.
    """
    known = catalogue_entries()
    if name in known:
        return _model(name, known[name])
    part = [entry for entry in known if name and name.lower() in entry]
    near = part[:3] or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    raise StackctlError(
        f"the catalogue has no model {name!r}",
        hint=f"did you mean {' or '.join(near)}?"
        if near
        else "stackctl model catalogue lists them",
        exit_code=ExitCode.NOT_FOUND,
    )


def find_repo(repo: str, quantization: str | None) -> Model | None:
    """Return the facts of a hub repository; None unless exactly one entry fits.

    Without a quantisation, an entry of any quantisation fits.
    """
    found = [
        name
        for name, entry in catalogue_entries().items()
        if repo.lower() in _repos(entry)
        and (quantization is None or entry.quantization.lower() == quantization.lower())
    ]
    return _model(found[0], catalogue_entries()[found[0]]) if len(found) == 1 else None


def find_download(source: str) -> HubDownload | None:
    """Return the place of ``catalogue:ID`` on a hub.

    None for another kind of source, an unknown id, and an entry without a known place.
    """
    entry = _entry(source)
    return None if entry is None else entry.download


def replacement_advice(source: str) -> str | None:
    """Return the advice of the entry that a source names, by its id or its repository.

    None if there is no such entry, or if its model can be fetched.
    """
    repo = source.removeprefix("hf:").partition("@")[0].partition(":")[0].lower()
    entry = _entry(source) or next(
        (one for one in catalogue_entries().values() if repo in _repos(one)), None
    )
    return None if entry is None else entry.instead


def _entry(source: str) -> CatalogueEntry | None:
    kind, _, name = source.partition(":")
    return catalogue_entries().get(name) if kind == "catalogue" else None


def _repos(entry: CatalogueEntry) -> set[str]:
    """Return the repositories of an entry, in lower case."""
    repos = (entry.repo, entry.download.repo if entry.download else None)
    return {repo.lower() for repo in repos if repo}


def _model(name: str, entry: CatalogueEntry) -> Model:
    notes = "; ".join(f"{'derived: ' if s.derived else ''}{s.text}" for s in entry.sources)
    kv = entry.kv
    slides = [bool(kv.full_every and (i + 1) % kv.full_every) for i in range(entry.layers)]
    model = Model(
        source=f"catalogue:{name}",
        format=entry.format,
        facts=f"catalogue: {notes}",
        name=entry.name,
        architecture=entry.architecture,
        parameters=entry.parameters,
        active_parameters=entry.active_parameters,
        quantization=entry.quantization,
        quantization_method=entry.quantization_method,
        weights_bytes=entry.weights_bytes,
        expert_bytes=entry.expert_bytes,
        embedding_bytes=entry.embedding_bytes,
        layers=entry.layers,
        passes=entry.passes,
        context=entry.context,
        embedding=entry.embedding,
        feed_forward=entry.feed_forward,
        heads=entry.heads,
        vocabulary=entry.vocabulary,
        experts=entry.experts,
        experts_used=entry.experts_used,
        kv=KvLayout(
            kind=kv.kind,
            kv_heads=(kv.heads,) * entry.layers,
            key_dim=kv.key_dim,
            value_dim=kv.value_dim,
            sliding_window=kv.sliding_window,
            sliding_layers=sum(slides),
            sliding=tuple(slides) if any(slides) else (),
        ),
        chat_template=entry.chat_template,
    )
    return with_unsupported(model)
