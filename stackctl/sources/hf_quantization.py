"""The quantisation of a Hugging Face checkpoint, and the parameters in its packed tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stackctl.sources.hf_config import read_json
from stackctl.sources.safetensors import Tensor

_FORMATS: Final = {
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "float-quantized": "fp8",
    "naive-quantized": "fp8",
    "int-quantized": "int8",
}
_MODELOPT: Final = {"NVFP4": "nvfp4", "FP8": "fp8", "MXFP8": "mxfp8", "INT8": "int8"}
# Tensors that belong to a quantised weight and are not weights.
_BESIDE: Final = frozenset(
    {"weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale", "weight_shape"}
    | {"weight_zero_point", "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point"}
    | {"k_scale", "v_scale", "q_scale", "prob_scale", "output_scale", "act_scale"}
    | {"pre_quant_scale"}
    | {"scales", "qzeros", "g_idx", "absmax", "quant_map", "nested_absmax", "nested_quant_map"}
)
_BESIDE_END: Final = ("_scales", "_scale_inv", "_weight_scale", "_weight_scale_2", "_input_scale")
_DTYPES: Final = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_STORED: Final = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
_MOST_LAYERS: Final = 200_000


@dataclass(frozen=True, slots=True)
class Quantization:
    """A label such as nvfp4, the method that wrote it, and the bits of a packed weight."""

    label: str | None
    method: str | None
    bits: int


def read_quantization(config: Mapping[str, Any], dtype: str | None, folder: Path) -> Quantization:
    """Read the quantization of the weights from config.json, or hf_quant_config.json beside it.

    Raises:
        StackctlError: hf_quant_config.json is damaged.
    """
    config, method = _source(config, folder)
    if not config and method is None:
        return Quantization(_DTYPES.get(dtype or ""), None, 16)
    if method is None and _word(config, "quant_algo"):
        method = "modelopt"
    if method and method.startswith("modelopt"):
        label = _modelopt(config)
        return Quantization(label, "modelopt", 4 if "4" in label else 8)
    if method and method.startswith("compressed"):
        label, bits = _compressed(config)
        return Quantization(label, "compressed-tensors", bits)
    known, bits = _by_method(config, method)
    return Quantization(known, method, bits)


def _source(config: Mapping[str, Any], folder: Path) -> tuple[Mapping[str, Any], str | None]:
    """Return the configuration that describes the weights, and its method; None without one."""
    method = _word(config, "quant_method")
    extra = folder / "hf_quant_config.json"
    inner = config.get("quantization")
    if isinstance(inner, dict):  # the content of hf_quant_config.json, inside config.json
        config = inner
    elif extra.is_file() and not _word(config, "quant_algo") and method in (None, "modelopt"):
        inner = read_json(extra).get("quantization")
        config = inner if isinstance(inner, dict) else {}
        method = "modelopt"
    return config, method


def _by_method(config: Mapping[str, Any], method: str | None) -> tuple[str | None, int]:
    """Return label and bits of a method whose name alone gives the algorithm."""
    bits = _number(config, "bits") or _number(config, "w_bit") or 4
    if method in ("gptq", "awq", "auto-round", "auto_gptq", "awq_marlin", "gptq_marlin"):
        return f"int{bits}", bits
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8", 8
    if method == "mxfp4":
        return "mxfp4", 4
    if method == "bitsandbytes":
        return ("nf4", 4) if config.get("load_in_4bit") is True else ("int8", 8)
    return method, bits


def stored_label(elements: Mapping[str, int]) -> str | None:
    """Return the label of weights without a quantisation method: their most frequent type.

    ``elements`` has the number of weights of each type. None without weights.
    """
    most = max(elements, key=lambda name: elements[name], default="")
    return _STORED.get(most, most.lower() or None)


def parameters_of_tensor(name: str, tensor: Tensor, bits: int) -> int:
    """Return the number of weights in a tensor; packed elements hold several.

    Packed elements are bytes with two 4-bit weights (nvfp4, mxfp4, nf4), and 32-bit words of AWQ,
    GPTQ and compressed-tensors. Scales, zero points and similar tensors count 0.
    """
    last = name.rsplit(".", 1)[-1]
    if last in _BESIDE or last.endswith(_BESIDE_END) or ".quant_state" in name:
        return 0
    if tensor.dtype == "U8" and bits == 4:
        return tensor.elements * 2
    if tensor.dtype in ("I32", "U32") and last in ("qweight", "weight_packed", "weight"):
        return tensor.elements * 32 // bits
    return tensor.elements


def _modelopt(config: Mapping[str, Any]) -> str:
    algo = _word(config, "quant_algo") or ""
    if algo.upper() == "MIXED_PRECISION":
        layers = config.get("quantized_layers")
        found = set()
        for layer in list(layers.values())[:_MOST_LAYERS] if isinstance(layers, dict) else []:
            if isinstance(layer, dict):
                found.add(_one_modelopt(_word(layer, "quant_algo") or ""))
        return "+".join(sorted(found - {""}, key=_size)) or "mixed"
    return _one_modelopt(algo) or "modelopt"


def _one_modelopt(algo: str) -> str:
    algo = algo.upper()
    if "NVFP4" in algo:
        return "nvfp4"
    match = re.fullmatch(r"W(\d)A(8|16).*", algo)
    if match:
        return f"int{match[1]}"
    start = next((name for name in _MODELOPT if algo.startswith(name)), None)
    return _MODELOPT[start] if start else algo.lower()[:20]


def _size(label: str) -> tuple[int, str]:
    digits = re.search(r"\d+", label)
    return (int(digits[0]) if digits else 99, label)


def _compressed(config: Mapping[str, Any]) -> tuple[str, int]:
    """Return label and bits of the packed weights.

    Groups may be quantised differently: then the labels are joined, and the bits are the fewest.
    """
    found: dict[str, int] = {}
    for group in _groups(config):
        weights = group.get("weights")
        if not isinstance(weights, dict):
            continue
        bits = _number(weights, "num_bits") or 8
        form = _word(group, "format") or _word(config, "format") or ""
        label = _FORMATS.get(form)
        if label is None or (label == "fp8" and bits != 8):
            kind = "fp" if _word(weights, "type") == "float" else "int"
            label = f"{kind}{bits}"
        found[label] = bits
    if not found:
        label = _FORMATS.get(_word(config, "format") or "", "compressed")
        return label, 4 if "4" in label else 8
    return "+".join(sorted(found, key=_size)), min(found.values())


def _groups(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else []:
        if isinstance(group, dict):
            yield group


def _word(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    return "".join(c for c in value if c.isprintable())[:40] if isinstance(value, str) else None


def _number(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 16:
        return None
    return value
