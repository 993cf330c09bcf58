"""MLX quantized checkpoints: which layers are packed and how, taken from config.json.

A layer is quantized iff the file holds `<layer>.scales`; its settings are its own entry in
`config["quantization"]`, else that object's defaults. Mixed files (4-bit here, 8-bit there) need
nothing more.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxmodels.checkpoint import listed
from mlxmodels.errors import ModelError

_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")

Settings = dict[str, Any]


def layer_settings(
    config: Mapping[str, Any], weights: Mapping[str, mx.array]
) -> dict[str, Settings]:
    """group_size, bits and mode of every quantized layer of a checkpoint, by layer name.

    Raises:
        ModelError: packed tensors without settings, or settings that make no sense.
    """
    layers = sorted(name.removesuffix(".scales") for name in weights if name.endswith(".scales"))
    described = config.get("quantization")
    foreign = config.get("quantization_config")
    if described is None and isinstance(foreign, dict) and "group_size" in foreign and layers:
        described = foreign  # MLX writes both keys; some copies kept only this one
    if described is None and isinstance(foreign, dict):
        method = foreign.get("quant_method", "unknown")
        raise ModelError(
            f"the checkpoint is quantized by {method!r}, which is not an MLX format; "
            f"use the float checkpoint or an MLX conversion."
        )
    if not layers:
        return {}
    if not isinstance(described, dict):
        raise ModelError(
            f"{len(layers)} layers are quantized ({listed(layers)}), but config.json has no "
            f"quantization entry that says how; convert the model again."
        )
    return {layer: _settings(layer, described) for layer in layers}


def quantize_layers(model: nn.Module, plan: Mapping[str, Settings]) -> None:
    """Replace the planned layers by their quantized kind, in place, ready for packed weights."""

    def predicate(name: str, module: nn.Module) -> bool | Settings:
        return plan.get(name, False) if hasattr(module, "to_quantized") else False

    nn.quantize(model, class_predicate=predicate)


def expanded(
    weights: Mapping[str, mx.array], plan: Mapping[str, Settings], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Every floating tensor in `dtype`, packed layers unpacked to it.

    Raises:
        ModelError: a packed layer has no weight, or its parts do not fit together.
    """
    result = {}
    for name, value in weights.items():
        layer, _, part = name.rpartition(".")
        if layer not in plan:
            is_float = mx.issubdtype(value.dtype, mx.floating)
            result[name] = value.astype(dtype) if is_float else value
        elif part == "weight":
            result[name] = _unpacked(layer, weights, plan[layer], dtype)
        elif part not in ("scales", "biases"):
            result[name] = value.astype(dtype)
    return result


def _unpacked(
    layer: str, weights: Mapping[str, mx.array], settings: Settings, dtype: mx.Dtype
) -> mx.array:
    scales = weights[f"{layer}.scales"]
    biases = weights.get(f"{layer}.biases")
    if settings["mode"] == "affine":
        # Unpacking happens in the dtype of the scales; float32 products are exact to the last bit.
        scales = scales.astype(mx.float32)
        biases = None if biases is None else biases.astype(mx.float32)
    try:
        full = mx.dequantize(weights[f"{layer}.weight"], scales, biases, **settings)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the quantized layer {layer} does not match its settings {settings}: {error}"
        ) from error
    return full.astype(dtype)


def _settings(layer: str, described: Mapping[str, Any]) -> Settings:
    own = described.get(layer)
    if own is False:
        raise ModelError(f"config.json says {layer} is not quantized, but the file packs it.")
    own = own if isinstance(own, dict) else {}
    mode = own.get("mode", described.get("mode", "affine"))
    settings = {key: own.get(key, described.get(key)) for key in ("group_size", "bits")}
    valid = all(type(value) is int and value > 0 for value in settings.values())
    if not valid or mode not in _MODES:
        raise ModelError(
            f"config.json quantizes {layer} with {settings} and mode {mode!r}, "
            f"expected two numbers and one of {', '.join(_MODES)}."
        )
    return {**settings, "mode": mode}
