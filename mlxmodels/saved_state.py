"""Layer states in a file: one safetensors file per sequence or batch.

Arrays are named `<layer>.<field>`. The header's metadata holds one JSON document with everything
else (format version, and per layer its class, offsets, window ...) and a checksum of the document
and the arrays: a flipped byte in a prefix cache would otherwise be a quietly wrong answer. It finds
damage and is no signature: whoever may write the file decides what the model continues from.
`state_kinds` says which classes there are and what each must look like.
"""

import json
import os
import reprlib
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import mlx.core as mx

from mlxmodels import state_kinds
from mlxmodels.errors import ModelError
from mlxmodels.safetensors_header import read_file

_VERSION = 1
_DOCUMENT = "gryphon.layer_states"
_CHECKSUM = "gryphon.crc32"
_ADVICE = "Delete it; the states can be computed again."
_NO_METADATA: Mapping[str, str] = MappingProxyType({})


def save_states(
    path: str | Path, states: Sequence[Any], metadata: Mapping[str, str] = _NO_METADATA
) -> None:
    """Write the states of a model's layers, in their order; replaces a file of that name at once.

    Spare capacity is left out. The file can be read and written by its owner only.

    Args:
        path: The file; its directory must exist.
        states: Ours or mlx-lm's for one sequence; they stay as they are.
        metadata: Anything the caller wants back, such as what the states were computed from.

    Raises:
        ValueError: a state is of a class that cannot be saved, or metadata is not text.
        OSError: the file cannot be written; one that was there before is as it was.
    """
    path = Path(path)
    if not _is_text(dict(metadata)):
        raise ValueError("[save_states] expected metadata of str to str.")
    arrays: dict[str, mx.array] = {}
    layers = [_taken_apart(state, f"{i}", arrays) for i, state in enumerate(states)]
    document = json.dumps({"version": _VERSION, "layers": layers, "metadata": dict(metadata)})
    mx.eval(arrays)
    header = {_DOCUMENT: document, _CHECKSUM: _checksum(document, arrays)}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            mx.save_safetensors(file, arrays, header)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_states(path: str | Path) -> tuple[list[Any], dict[str, str]]:
    """Read back what `save_states` wrote; the arrays are in memory when it returns.

    Returns:
        The states and the caller's metadata.

    Raises:
        ModelError: the file cannot be read, is damaged, is something else, is of a newer format, or
            describes states that cannot be.
    """
    path = Path(path)
    document = _read_document(path)
    states = []
    try:
        arrays = mx.load(str(path), format="safetensors")
        assert isinstance(arrays, dict)
        rest = dict(arrays)
        for i, layer in enumerate(document.layers):
            try:
                states.append(_put_together(layer, rest))
            except ValueError as error:
                raise _unusable(path, f"layer {i}, {error}") from error
        if rest:
            raise _unusable(path, f"its array {min(rest)} belongs to no layer")
        checksum = _checksum(document.text, arrays)
    except RuntimeError as error:  # MLX could not read it after all, or lists are nested too deep
        raise _unusable(path, str(error)) from error
    if checksum != document.checksum:
        raise _unusable(
            path, f"expected the checksum {reprlib.repr(document.checksum)}, got {checksum}"
        )
    return states, document.metadata


def saved_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that a file of states was saved with; its arrays are not read.

    Raises:
        ModelError: as `load_states`, as far as it shows without the arrays.
    """
    return _read_document(Path(path)).metadata


@dataclass(frozen=True)
class _Document:
    """What a file holds beside arrays."""

    text: str
    checksum: object
    layers: list[Any]
    metadata: dict[str, str]


def _read_document(path: Path) -> _Document:
    _, entries = read_file(path, _ADVICE)
    text = entries.get(_DOCUMENT)
    if not isinstance(text, str):
        raise _unusable(path, f"expected {_DOCUMENT} in its metadata, got {reprlib.repr(entries)}")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"expected JSON in {_DOCUMENT}, got {reprlib.repr(text)}") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if type(version) is not int or not 1 <= version <= _VERSION:
        raise _unusable(path, f"expected format {_VERSION}, got {reprlib.repr(version)}")
    layers, metadata = fields.get("layers"), fields.get("metadata")
    if not isinstance(layers, list) or not _is_text(metadata):
        raise _unusable(path, "expected a list of layers and metadata of text, got neither or one")
    return _Document(text, entries.get(_CHECKSUM), layers, metadata)


def _taken_apart(state: Any, layer: str, arrays: dict[str, mx.array]) -> dict[str, Any]:
    """A state as JSON; its arrays are put aside under names that begin with its layer's."""
    name = state_kinds.name_of(state)
    if name == state_kinds.CONTAINER:
        inner = enumerate(state.caches)
        return {
            "class": name,
            "states": [_taken_apart(part, f"{layer}.{i}", arrays) for i, part in inner],
        }
    fields = state_kinds.fields_of(state)
    encoded = {key: _encoded(value, f"{layer}.{key}", arrays) for key, value in fields.items()}
    return {"class": name, **encoded}


def _put_together(layer: Any, arrays: dict[str, mx.array]) -> Any:
    """The state that `_taken_apart` described; its arrays are taken out of the dictionary."""
    if not isinstance(layer, dict):
        raise ValueError(f"expected a layer's class and fields, got {reprlib.repr(layer)}")
    name: Any = layer.get("class")
    if name == state_kinds.CONTAINER:
        inner = layer.get("states")
        if not isinstance(inner, list) or not inner:
            raise ValueError(f"expected the states of a {name}, got {reprlib.repr(inner)}")
        return state_kinds.container([_put_together(part, arrays) for part in inner])
    fields = {key: _decoded(value, arrays) for key, value in layer.items() if key != "class"}
    return state_kinds.restore(name, fields)


def _encoded(value: Any, name: str, arrays: dict[str, mx.array]) -> Any:
    if isinstance(value, mx.array):
        arrays[name] = mx.contiguous(value)
        return {"array": name}
    if isinstance(value, list | tuple):
        return [_encoded(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]
    return value


def _decoded(value: Any, arrays: dict[str, mx.array]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    name = value.get("array")
    if not isinstance(name, str) or name not in arrays:
        raise ValueError(f"expected an array of the file, got {reprlib.repr(value)}")
    return arrays.pop(name)


def _checksum(text: str, arrays: Mapping[str, mx.array]) -> str:
    """CRC-32 of the document and of contiguous arrays in the order of their names."""
    total = zlib.crc32(text.encode(errors="surrogatepass"))
    for name in sorted(arrays):
        content: Any = arrays[name]  # a buffer, which MLX's stubs do not say
        total = zlib.crc32(content, total)
    return f"{total:08x}"


def _is_text(metadata: object) -> TypeGuard[dict[str, str]]:
    return isinstance(metadata, dict) and all(
        isinstance(text, str) for pair in metadata.items() for text in pair
    )


def _unusable(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} holds no usable layer states: {reason}. {_ADVICE}")
