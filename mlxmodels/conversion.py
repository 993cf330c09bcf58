"""A Hugging Face checkpoint → an MLX checkpoint, packed or not, one tensor in memory at a time.

`python -m mlxmodels.conversion REQUEST`, where REQUEST is the JSON of a `Request`, is how the app
runs it: in a process of its own, which reports on stdout, a JSON object a line: {"done", "total"}
in bytes, {"kept", "shards"}, at the end {"packed", "undivided", "dtype"}, and at a failure
{"message"}.

What comes out is what `mlx_lm.convert` makes of the same source, tensor for tensor, but for this:

- A recipe leaves alone what the model's `quant_predicate` keeps out or packs its own way (routers
  of experts); mlx-lm's recipes overrule it.
- A layer whose own group size does not divide its rows stays as it is; mlx-lm fails.
- `dtype`, which transformers 5 writes instead of `torch_dtype`, is heeded too.
- Weights that are not finite are refused.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlxmodels import float_checkpoint, loading, quantization, shards
from mlxmodels.errors import ModelError
from mlxmodels.packing import Packing, Settings, recipe_bits, stored_dtype
from mlxmodels.shards import Tensor, Unit
from mlxmodels.tokenizer import Tokenizer

_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint64: "U64",
    mx.int64: "I64",
}
_PACKED_PARTS = ("scales", "biases")
_PLAINLY_PACKED = ("QuantizedLinear", "QuantizedEmbedding", "QuantizedSwitchLinear")
"""Layers that hold what mx.quantize makes of their weight, and nothing else of it."""
_AT_ONCE = 1 << 18
"""Numbers of a tensor that are packed, or asked whether they are finite, at once."""


@dataclass(frozen=True)
class Request:
    """What to convert, and how."""

    source: Path
    destination: Path
    """An existing directory; what is in it and not from an earlier run of this goes."""
    packing: Packing
    shard_bytes: int = shards.SHARD_BYTES

    @classmethod
    def from_json(cls, text: str) -> "Request":
        fields = json.loads(text)
        return cls(
            source=Path(fields["source"]),
            destination=Path(fields["destination"]),
            packing=Packing(**fields["packing"]),
            shard_bytes=fields["shard_bytes"],
        )

    def to_json(self) -> str:
        places = {"source": str(self.source), "destination": str(self.destination)}
        return json.dumps(asdict(self) | places)


@dataclass(frozen=True)
class Outcome:
    """What became of the model."""

    packed: int
    """Layers."""
    undivided: tuple[str, ...]
    """Layers left as they are because no whole number of groups fits their rows."""
    dtype: str
    """Of what is not packed: "bfloat16", or several."""


def convert(request: Request, progress: shards.Progress | None = None) -> Outcome:
    """Write the checkpoint; killed at any point, the next call goes on from the files that are
    whole.

    Raises:
        ModelError: the source is damaged, cannot be converted or changed meanwhile.
    """
    source = float_checkpoint.read(request.source)
    fingerprint = _fingerprint(source, request)
    Tokenizer.from_directory(source.path)  # a model without one is of no use
    # MLX would keep what it has freed for later arrays, and the process would grow by it.
    mx.set_cache_limit(0)
    model = loading.load_lazily(source.path)
    _cast(model, stored_dtype(source.config, request.packing))
    config = dict(source.config)
    outcome = quantization.Quantized({}, (), {})
    floats: dict[str, mx.array] = {}
    if request.packing.is_packed:
        outcome = _plan(model, request.packing)
        floats = _pack(model, outcome.layers)
        config = outcome.describe(config)
    parameters: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    del model
    _check_kinds(request.source, parameters)
    dtypes = sorted({_short(v.dtype) for v in parameters.values() if _is_float(v)})
    shards.write(
        request.destination,
        _units(parameters, floats, outcome.layers),
        fingerprint,
        progress or shards.Progress(),
        request.shard_bytes,
    )
    if _fingerprint(float_checkpoint.read(request.source), request) != fingerprint:
        raise ModelError(f"{request.source} changed while it was converted. Convert it again.")
    _write_side_files(source, config, parameters, dtypes, request)
    return Outcome(len(outcome.layers), outcome.undivided, " and ".join(dtypes))


def _fingerprint(source: float_checkpoint.FloatCheckpoint, request: Request) -> str:
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    return shards.fingerprint_of(
        source.files,
        config=source.config,
        packing=asdict(request.packing),
        shard_bytes=request.shard_bytes,
        versions=versions,
    )


def _cast(model: nn.Module, dtype: str | None) -> None:
    """Floats in `dtype`, but for those that the model wants as they are."""
    if dtype is None:
        return
    wanted = getattr(mx, dtype)
    may_cast = getattr(model, "cast_predicate", lambda name: True)

    def cast(name: str, value: mx.array) -> mx.array:
        return value.astype(wanted) if _is_float(value) and may_cast(name) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def _plan(model: nn.Module, packing: Packing) -> quantization.Quantized:
    settings = packing.defaults
    recipe = packing.recipe
    if recipe is None:
        return quantization.plan(model, **settings)
    if not any("down_proj" in name for name, _ in model.named_modules()):
        raise ModelError(
            f"the recipe {recipe} goes by layers named down_proj, and this model has none. Give "
            f"bits instead."
        )
    layers = len(model.layers)
    own: Callable[[str, nn.Module], Any] = getattr(model, "quant_predicate", lambda *_: True)

    def choose(name: str, layer: nn.Module) -> bool | Mapping[str, Any]:
        if isinstance(own(name, layer), Mapping):
            return True
        return settings | {"bits": recipe_bits(recipe, name, layers)}

    return quantization.plan(model, **settings, choose=choose)


def _pack(model: nn.Module, layers: Mapping[str, Settings]) -> dict[str, mx.array]:
    """Pack the layers, without computing anything; returns what they are packed from, of those that
    `_packed` can make."""
    modules = dict(model.named_modules())
    floats = {name: modules[name].weight for name in layers}
    quantization.quantize_layers(model, layers)
    modules = dict(model.named_modules())
    return {n: v for n, v in floats.items() if type(modules[n]).__name__ in _PLAINLY_PACKED}


def _units(
    parameters: dict[str, mx.array],
    floats: dict[str, mx.array],
    layers: Mapping[str, Settings],
) -> Iterator[Unit]:
    """In the model's order. Nothing else holds the arrays, so that each goes once it is written.

    Args:
        parameters: Of the packed model; none has been computed yet.
        floats: What layers are packed from, by layer.
    """
    whole = set(floats)
    for name in list(parameters):
        layer, _, part = name.rpartition(".")
        if layer in whole and part in _PACKED_PARTS:
            continue  # with its weight
        names = [name]
        value = parameters[name]
        make = partial(_made, name, value)
        if layer in whole and part == "weight":
            names += [f"{layer}.{p}" for p in _PACKED_PARTS if f"{layer}.{p}" in parameters]
            make = partial(_packed, layer, floats.pop(layer), layers[layer])
        nbytes = sum(parameters[one].nbytes for one in names)
        for one in names:
            parameters[one] = mx.zeros(())  # the name alone is asked for later
        yield Unit(tuple(names), nbytes, make)
        del value, make


def _made(name: str, value: mx.array) -> list[Tensor]:
    _check_finite(name, value)
    return [_tensor(name, value)]


def _packed(layer: str, value: mx.array, settings: Settings) -> list[Tensor]:
    """What mx.quantize makes of it, some rows at a time: a mode of floats would take 28 times the
    weight on a CPU."""
    _check_finite(f"{layer}.weight", value)
    rows = value.reshape(-1, value.shape[-1])
    step = max(1, _AT_ONCE // rows.shape[-1])
    parts: list[np.ndarray] = []
    dtypes: list[mx.Dtype] = []
    for start in range(0, len(rows), step):
        block = [_buffer(part) for part in mx.quantize(rows[start : start + step], **settings)]
        for number, (array, dtype) in enumerate(block):
            if len(parts) == number:
                parts.append(np.empty((len(rows), array.shape[-1]), array.dtype))
                dtypes.append(dtype)
            parts[number][start : start + step] = array
    return [
        Tensor(f"{layer}.{name}", _NAMES[dtype], (*value.shape[:-1], array.shape[-1]), array)
        for name, array, dtype in zip(("weight", *_PACKED_PARTS), parts, dtypes, strict=False)
    ]


def _tensor(name: str, value: mx.array) -> Tensor:
    array, dtype = _buffer(value)
    return Tensor(name, _NAMES[dtype], tuple(value.shape), array)


def _buffer(value: mx.array) -> tuple[np.ndarray, mx.Dtype]:
    """An array that has been computed, without copying it, and its dtype; bfloat16 as the integers
    of the same bits."""
    words = value.view(mx.uint16) if value.dtype == mx.bfloat16 else value
    words = mx.contiguous(words)
    mx.eval(words)
    return np.array(words, copy=False), value.dtype


def _check_finite(name: str, value: mx.array) -> None:
    """
    Raises:
        ModelError: NaN or infinity, of which a packed group would make nonsense.
    """
    if not _is_float(value) or not value.size:
        return
    flat = value.reshape(-1)
    for start in range(0, value.size, _AT_ONCE):
        if not mx.isfinite(flat[start : start + _AT_ONCE]).all().item():
            raise ModelError(
                f"{name} holds numbers that are not finite as {_short(value.dtype)}. Download the "
                f"model again, or convert it with another dtype: bfloat16 or float32."
            )


def _check_kinds(source: Path, parameters: Mapping[str, mx.array]) -> None:
    for name, value in parameters.items():
        if value.dtype not in _NAMES:
            raise ModelError(f"{source} stores {name} as {_short(value.dtype)}; use another build.")


def _write_side_files(
    source: float_checkpoint.FloatCheckpoint,
    config: dict[str, Any],
    parameters: Mapping[str, mx.array],
    dtypes: list[str],
    request: Request,
) -> None:
    config.pop("_name_or_path", None)  # somebody's directory
    if not any("vision" in name for name in parameters):
        config.pop("vision_config", None)  # what it describes was left out
    for key in ("torch_dtype", "dtype"):
        if key in config and request.packing.dtype and len(dtypes) == 1:
            config[key] = dtypes[0]
    for file in source.side_files:
        (request.destination / file.name).write_bytes(file.read_bytes())
    text = json.dumps(config, indent=2) + "\n"
    (request.destination / "config.json").write_text(text, encoding="utf-8")


def _is_float(value: mx.array) -> bool:
    return mx.issubdtype(value.dtype, mx.floating)


def _short(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


class _Lines(shards.Progress):
    def kept(self, shards: int, of: int) -> None:
        say(kept=shards, shards=of)

    def written(self, done: int, total: int) -> None:
        say(done=done, total=total)


def say(**fields: Any) -> None:
    """One event of a child process."""
    print(json.dumps(fields), flush=True)


@contextlib.contextmanager
def alone(destination: Path) -> Iterator[None]:
    """Wait for a process that still writes there: its parent may have died before it."""
    lock = os.open(destination.with_name(f"{destination.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def main(arguments: list[str]) -> int:
    """Entry point of the child process."""
    os.umask(0o077)
    request = Request.from_json(arguments[0])
    try:
        with alone(request.destination):
            say(**asdict(convert(request, _Lines())))
    except ModelError as error:
        say(message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
