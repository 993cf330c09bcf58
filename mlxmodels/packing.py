"""Which settings a layer is packed with, and what a checkpoint becomes by it: names and shapes
alone, no MLX.

Names of modes and recipes, their defaults and the entries of config.json are mlx-lm's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mlxmodels.errors import ModelError
from mlxmodels.safetensors_header import TensorEntry

# What mx.quantize of MLX 0.32 takes, mx.quantize's own default first. It also takes affine with 1
# bit, which leaves the lowest and the highest weight of each group: no model survives that.
MODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
"""Group sizes and bits of each mode."""

RECIPES: Mapping[str, tuple[int, int]] = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
}
"""Bits of most layers, and of those whose rounding costs most."""

DTYPES = ("bfloat16", "float16", "float32")

Settings = dict[str, Any]
"""group_size, bits and mode, as mx.quantize takes them."""

_SENSITIVE = ("down_proj", "v_proj", "v_a_proj", "v_b_proj")
_NUMBER = re.compile(r"\.(\d+)\.")
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def complete(asked: Mapping[str, Any], what: str) -> Settings:
    """Settings with the mode's defaults filled in.

    Raises:
        ModelError: MLX has no such mode, group size or bits.
    """
    mode = asked.get("mode", "affine")  # what a layer's to_quantized takes an absent mode for
    if mode not in MODES:
        known_modes = ", ".join(MODES)
        raise ModelError(f"{what} cannot be packed in mode {mode!r}; known are {known_modes}.")
    settings: Settings = {}
    for key, known in zip(("group_size", "bits"), MODES[mode], strict=True):
        value = asked.get(key)
        settings[key] = known[0] if value is None else value
        if type(settings[key]) is not int or settings[key] not in known:
            values = ", ".join(map(str, sorted(known)))
            raise ModelError(f"{what} cannot be packed with {key} {value!r}: {mode} has {values}.")
    return {**settings, "mode": mode}


def recipe_bits(recipe: str, layer: str, layers: int) -> int:
    """Bits that a mixed recipe gives a layer.

    More for the head, and for values and down projections in the first and the last eighth of the
    layers and every third between them.

    Args:
        layer: Its name, "model.layers.3.mlp.down_proj"; one without a number counts as layer 0.
        layers: How many the model has.
    """
    low, high = RECIPES[recipe]
    if "lm_head" in layer:
        return high
    found = _NUMBER.search(f"{layer}.")
    index, eighth = int(found[1]) if found else 0, layers // 8
    more = index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2
    return high if more and any(part in layer for part in _SENSITIVE) else low


@dataclass(frozen=True)
class Packing:
    """What is asked of a conversion. All None: the weights stay floats, as they are."""

    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None
    recipe: str | None = None
    dtype: str | None = None
    """Of what is not packed; None is what config.json names, else what is stored."""

    def __post_init__(self) -> None:
        """
        Raises:
            ModelError: settings that MLX does not have, or that contradict each other.
        """
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ModelError(f"unknown dtype {self.dtype!r}; known are {', '.join(DTYPES)}.")
        if self.recipe is not None and self.recipe not in RECIPES:
            raise ModelError(f"unknown recipe {self.recipe!r}; known are {', '.join(RECIPES)}.")
        if self.recipe is not None and self.bits is not None:
            raise ModelError(f"the recipe {self.recipe} sets the bits; give one of the two.")
        if self.recipe is not None and self.mode not in (None, "affine"):
            raise ModelError(f"the recipe {self.recipe} is for mode affine, not {self.mode}.")
        if self.is_packed:
            complete(self.defaults, "the model")

    @property
    def is_packed(self) -> bool:
        return any(
            value is not None for value in (self.bits, self.group_size, self.mode, self.recipe)
        )

    @property
    def defaults(self) -> Settings:
        """What a layer gets unless a recipe or the model itself says otherwise."""
        bits = RECIPES[self.recipe][0] if self.recipe else self.bits
        asked = {"bits": bits, "group_size": self.group_size, "mode": self.mode or "affine"}
        return complete(asked, "the model")

    @property
    def suffix(self) -> str:
        """For the name of the result: "4bit", "mixed_3_6", "mxfp4", "bf16", "mlx" …"""
        if not self.is_packed:
            short = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
            return short.get(str(self.dtype), "mlx")
        settings = self.defaults
        words = self.recipe or f"{settings['bits']}bit"
        if settings["mode"] != "affine":
            return str(settings["mode"])
        usual = MODES["affine"][0][0]
        return words + (f"-g{settings['group_size']}" if settings["group_size"] != usual else "")

    def describe(self) -> str:
        """For people."""
        if not self.is_packed:
            return self.dtype or "float, as it is"
        settings = self.defaults
        bits = self.recipe or f"{settings['bits']}-bit"
        mode = "" if settings["mode"] == "affine" else f"{settings['mode']}, "
        return f"{mode}{bits}, groups of {settings['group_size']}"


def stored_dtype(config: Mapping[str, Any], packing: Packing) -> str | None:
    """Name of the dtype that floats are stored in; None leaves each as it is."""
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        for key in ("torch_dtype", "dtype"):
            if packing.dtype is None and source.get(key) in DTYPES:
                return str(source[key])
    return packing.dtype


def expected(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], packing: Packing
) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """config.json and tensors of the result, before the model has been built: close to what will
    come, for its size and whether it fits.

    Every matrix called `*.weight` whose rows the groups divide counts as packed. What the model
    drops or keeps out is known once it is built.
    """
    floats = _STORED_AS.get(stored_dtype(config, packing) or "")
    layers = config.get("num_hidden_layers") or config.get("num_layers") or 1
    entries: dict[str, TensorEntry] = {}
    for name, tensor in tensors.items():
        dtype = floats if floats and tensor.dtype in _BYTES else tensor.dtype
        layer, _, part = name.rpartition(".")
        groups = packing.defaults["group_size"] if packing.is_packed else 0
        if not groups or part != "weight" or len(tensor.shape) != 2 or tensor.shape[-1] % groups:
            size = prod(tensor.shape) * _BYTES[dtype] if dtype in _BYTES else tensor.nbytes
            entries[name] = TensorEntry(dtype, tensor.shape, 0, size)
            continue
        settings = packing.defaults
        if packing.recipe:
            count = layers if type(layers) is int and 0 < layers < 2**20 else 1
            settings["bits"] = recipe_bits(packing.recipe, layer, count)
        rows, columns = tensor.shape
        words, scales = columns * settings["bits"] // 32, (rows, columns // groups)
        entries[name] = TensorEntry("U32", (rows, words), 0, 4 * rows * words)
        is_affine = settings["mode"] == "affine"
        kind = dtype if is_affine else "U8"
        entry = TensorEntry(kind, scales, 0, prod(scales) * _BYTES.get(kind, 1))
        entries[f"{layer}.scales"] = entry
        if is_affine:
            entries[f"{layer}.biases"] = entry
    result = dict(config)
    if packing.is_packed:
        result["quantization"] = packing.defaults
    return result, entries
