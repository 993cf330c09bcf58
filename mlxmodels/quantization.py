"""MLX quantized checkpoints: packing a model, and reading from config.json how a file is packed.

A layer is quantized iff the file holds `<layer>.scales`; its settings are its own entry in
`config["quantization"]`, else that object's defaults. Mixed files (4-bit here, 8-bit there) need
nothing more.

Only layers that know how to pack themselves (Linear, Embedding) ever are. Norms, RecurrentGemma's
convolution and its RG-LRU gates are plain tensors of modules that do not, and `quant_predicate`
keeps heads of a few labels out.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmodels.checkpoint import listed
from mlxmodels.errors import ModelError
from mlxmodels.packing import MODES, Settings, complete

Choice = Callable[[str, nn.Module], bool | Mapping[str, Any]]
"""Whether to pack a layer, or with which settings of its own; mlx-lm's `quant_predicate`."""


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did to a model."""

    layers: dict[str, Settings]
    """Settings of every packed layer, by its name."""
    undivided: tuple[str, ...]
    """Layers left as they are because no whole number of groups fits their rows."""
    settings: Settings
    """The defaults, then by name each layer that differs from them; False for the undivided."""

    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the packed model, with the two entries that mlx-lm writes."""
        entries = dict.fromkeys(("quantization", "quantization_config"), self.settings)
        return {**config, **entries}


def quantize(
    model: nn.Module,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    choose: Choice | None = None,
) -> Quantized:
    """Pack a model's layers, in place; all of them are chosen and checked before one is changed.

    Args and errors as `plan`. Warns with the names of layers whose rows the group size does not
    divide.
    """
    outcome = plan(model, bits=bits, group_size=group_size, mode=mode, choose=choose)
    if outcome.undivided:
        warnings.warn(
            f"{len(outcome.undivided)} layers stay as they are, because their rows are not "
            f"divisible by the group size: {listed(list(outcome.undivided))}",
            stacklevel=2,
        )
    quantize_layers(model, outcome.layers)
    mx.eval(model.parameters())
    return outcome


def plan(
    model: nn.Module,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    choose: Choice | None = None,
) -> Quantized:
    """Choose the layers to pack and check that they can be; the model stays as it is.

    Args:
        model: A float model, a port of ours or mlx-lm's. What its `quant_predicate` keeps out stays
            as it is.
        bits, group_size: None is the mode's default: affine 4 bits in groups of 64, mxfp4 and
            mxfp8 in groups of 32, nvfp4 in groups of 16.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        choose: Asked about every layer that may be packed; None packs them all.

    Raises:
        ModelError: settings MLX does not have, a model already packed, or nothing left to pack.
    """
    defaults = complete({"mode": mode, "group_size": group_size, "bits": bits}, "the model")
    layers: dict[str, Settings] = {}
    undivided: list[str] = []
    for name, layer in _packable(model).items():
        settings = _chosen(name, layer, defaults, (getattr(model, "quant_predicate", None), choose))
        if settings is None:
            continue
        if layer.weight.shape[-1] % settings["group_size"]:
            undivided.append(name)
        else:
            layers[name] = settings
    if not layers:
        raise ModelError(
            f"no layer can be packed in groups of {defaults['group_size']}"
            + (f": they do not divide the rows of {listed(undivided)}." if undivided else ".")
        )
    own = {name: settings for name, settings in layers.items() if settings != defaults}
    entry = defaults | own | dict.fromkeys(undivided, False)
    return Quantized(layers=layers, undivided=tuple(undivided), settings=entry)


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
    return {layer: _settings(layer, described, weights[f"{layer}.scales"]) for layer in layers}


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


def _packable(model: nn.Module) -> dict[str, Any]:
    """The layers that know how to pack themselves, in the model's order."""
    leaves = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    packed = [name for name, layer in leaves.items() if "scales" in layer]
    if packed:
        raise ModelError(
            f"{len(packed)} layers of the model are quantized already ({listed(packed)}); start "
            f"from its float weights, or load it with a dtype, which expands it."
        )
    return {name: layer for name, layer in leaves.items() if hasattr(layer, "to_quantized")}


def _chosen(
    name: str, layer: nn.Module, defaults: Settings, choices: tuple[Choice | None, ...]
) -> Settings | None:
    """Settings of one layer, the last choice's own going first; None if any keeps it out."""
    settings = defaults
    for choice in choices:
        answer = True if choice is None else choice(name, layer)
        if isinstance(answer, Mapping):
            settings = complete(answer, name)
        elif not answer:
            return None
    return settings


def _settings(layer: str, described: Mapping[str, Any], scales: mx.array) -> Settings:
    own = described.get(layer)
    if own is False:
        raise ModelError(f"config.json says {layer} is not quantized, but the file packs it.")
    own = own if isinstance(own, dict) else {}
    mode = own.get("mode", described.get("mode", "affine"))
    if own and "mode" not in own and mx.issubdtype(scales.dtype, mx.floating):
        mode = "affine"  # as mlx-lm reads it: gpt-oss is mxfp4 but for such entries
    settings = {key: own.get(key, described.get(key)) for key in ("group_size", "bits")}
    valid = all(type(value) is int and value > 0 for value in settings.values())
    if not valid or mode not in tuple(MODES):
        raise ModelError(
            f"config.json quantizes {layer} with {settings} and mode {mode!r}, "
            f"expected two numbers and one of {', '.join(MODES)}."
        )
    return {**settings, "mode": mode}
