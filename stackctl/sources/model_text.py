"""The facts of a model as rows of text; printing is up to the caller."""

from __future__ import annotations

from pathlib import Path

from stackctl.quantity import format_bytes
from stackctl.values.model import KvLayout, Model


def model_rows(model: Model) -> list[tuple[str, str]]:
    """Return rows of name and value, each value for a column of about 64 characters.

    An empty name continues the row above. Characters that are not printable become ``?``, because
    names come from files that others wrote.
    """
    return [(name, printable(text)) for name, text in _rows(model)]


def printable(text: str) -> str:
    """Replace characters that are not printable, such as escape sequences, by ``?``."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _rows(model: Model) -> list[tuple[str, str]]:
    rows = [("model", model.name or model.source), ("source", model.source)]
    rows.append(("architecture", f"{model.architecture} ({model.format})"))
    rows.append(("parameters", _parameters(model)))
    if model.experts:
        used = f", {model.experts_used} used for a token" if model.experts_used else ""
        size = f"; {format_bytes(model.expert_bytes)}" if model.expert_bytes else ""
        rows.append(("experts", f"{model.experts}{used}{size}"))
    passes = f", run {model.passes} times for a token" if model.passes > 1 else ""
    rows.append(("layers", f"{model.layers}{passes}"))
    width = [("width", model.embedding), ("FFN", model.feed_forward), ("heads", model.heads)]
    width.append(("vocabulary", model.vocabulary))
    shape = ", ".join(f"{name} {value:,}" for name, value in width if value)
    if shape:
        rows.append(("shape", shape))
    rows.extend(_kv(model.kv))
    if model.context:
        rows.append(("context", f"{model.context:,} tokens"))
    method = model.quantization_method
    by = f" ({method})" if method and method != "gguf" else ""
    bits = model.weights_bytes * 8 / model.parameters if model.parameters else 0
    rows.append(
        ("quantisation", f"{model.quantization or 'unknown'}{by}, {bits:.2f} bits a weight")
    )
    read = f"{format_bytes(model.active_bytes)} read for a token and pass"
    rows.append(("size", f"{format_bytes(model.weights_bytes)}, {read}"))
    rows.append(("chat template", "yes" if model.chat_template else "no"))
    rows.extend(_files(model))
    rows.extend(("cannot run", reason) for reason in model.unsupported)
    if model.facts != "file":
        rows.append(("facts", model.facts))
    return rows


def format_parameters(number: int) -> str:
    """Format a number of parameters in three digits: ``39.8B``."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _parameters(model: Model) -> str:
    text = format_parameters(model.parameters)
    if model.active_parameters is None:
        return text
    what = "active for a token" if model.experts else "without the embedding"
    if model.active_parameters == model.parameters:
        return f"{text}, all active for a token"
    return f"{text}, {format_parameters(model.active_parameters)} {what}"


def _kv(kv: KvLayout | None) -> list[tuple[str, str]]:
    if kv is None:
        return [("KV cache", "unknown")]
    heads = sorted({count for count in kv.kv_heads if count})
    cached = sum(1 for count in kv.kv_heads if count)
    if not cached:
        text = "none"
    elif kv.kind == "mla" or kv.value_dim == 0:
        text = f"MLA, one latent of {kv.key_dim} in {cached} layers"
    else:
        dims = str(kv.key_dim) if kv.key_dim == kv.value_dim else f"{kv.key_dim}/{kv.value_dim}"
        word = "head" if heads == [1] else "heads"
        text = f"GQA, {' or '.join(map(str, heads))} {word} of {dims} in {cached} layers"
    rows = [("KV cache", text)]
    if cached:
        rows.append(("", _kv_bytes(kv)))
    if kv.sliding_layers and kv.sliding_window is not None:
        rows.append(("", f"{kv.sliding_layers} layers keep only {kv.sliding_window:,} tokens"))
    if kv.state_bytes:
        rows.append(("", f"{format_bytes(kv.state_bytes)} of recurrent state a sequence"))
    return rows


def _kv_bytes(kv: KvLayout) -> str:
    """Return the KV cache of one token at 16 bit, as text: in all layers, and in full layers."""
    sliding = kv.sliding or (False,) * len(kv.kv_heads)
    full = window = 0
    for count, slides in zip(kv.kv_heads, sliding, strict=False):
        if slides:
            key = kv.key_dim if kv.sliding_key_dim is None else kv.sliding_key_dim
            value = kv.value_dim if kv.sliding_value_dim is None else kv.sliding_value_dim
            window += 2 * count * (key + value)
        else:
            full += 2 * count * (kv.key_dim + kv.value_dim)
    text = f"{format_bytes(full + window)} a token at 16 bit"
    return f"{text}, {format_bytes(full)} beyond the window" if window else text


def _files(model: Model) -> list[tuple[str, str]]:
    if not model.files:
        return [("files", "none: the facts of a model that is not here")]
    if len(model.files) == 1:
        return [("files", model.files[0].path)]
    last = Path(model.files[-1].path).name
    first = Path(model.files[0].path)
    return [("files", f"{len(model.files)} in {first.parent}"), ("", f"{first.name} to {last}")]
