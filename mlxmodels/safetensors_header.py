"""Reads and checks the header of a safetensors file, before MLX opens it.

A file cut short by a broken download or edited by hand must end in a sentence, not in a crash
inside a memory-mapped read, so everything the header claims is compared with the file itself.
Pure Python. Format: https://github.com/huggingface/safetensors#format
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mlxmodels.errors import ModelError

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}

PREFIX_BYTES = 8
"""The length of the header comes first, little-endian."""

_MAX_DIMENSIONS = 32
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


class _Damage(ValueError):
    """What is wrong with a file."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it; begin and end count from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of a safetensors file by tensor name.

    Raises:
        ModelError: the file is truncated, is not safetensors, or contradicts itself.
    """
    return read_file(path, "Download or convert the model again.")[0]


def read_file(path: Path, advice: str) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """Entries of a safetensors file, and its `__metadata__`, empty if there is none.

    Args:
        advice: What to do about a damaged file; the last sentence of the error.

    Raises:
        ModelError: as `read_header`.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ModelError(f"{path} is not a regular file. {advice}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(PREFIX_BYTES)
            header = _parse(file.read(_header_bytes(prefix, size)))
        metadata = header.pop("__metadata__", {})
        entries = _entries(header, size - PREFIX_BYTES - int.from_bytes(prefix, "little"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except _Damage as error:
        raise ModelError(f"{path} is damaged: {error}. {advice}") from error
    return entries, metadata if isinstance(metadata, dict) else {}


def header_bytes(prefix: bytes, file_bytes: int) -> int:
    """Length of the JSON header that follows the first `PREFIX_BYTES` of a file.

    For files that are elsewhere, whose beginning alone has been fetched.

    Raises:
        ModelError: the file is too short for it; the message completes "NAME is damaged: ".
    """
    try:
        return _header_bytes(prefix, file_bytes)
    except _Damage as error:
        raise ModelError(str(error)) from error


def parse_header(header: bytes, file_bytes: int) -> dict[str, TensorEntry]:
    """Entries by tensor name, from the JSON header of a file of `file_bytes` in all.

    Raises:
        ModelError: as `header_bytes`.
    """
    try:
        fields = _parse(header)
        fields.pop("__metadata__", None)
        return _entries(fields, file_bytes - PREFIX_BYTES - len(header))
    except _Damage as error:
        raise ModelError(str(error)) from error


def _header_bytes(prefix: bytes, file_bytes: int) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX_BYTES or length > file_bytes - PREFIX_BYTES:
        raise _Damage(f"it is cut short after {file_bytes:,} bytes")
    if length > _MAX_HEADER_BYTES:
        raise _Damage(f"its header claims {length:,} bytes")
    return length


def _entries(header: dict[str, Any], data_bytes: int) -> dict[str, TensorEntry]:
    entries = {name: _entry(name, fields) for name, fields in header.items()}
    _check_layout(entries, data_bytes)
    return entries


def _parse(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise _Damage("its header names something twice")
        return fields

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except _Damage:
        raise
    except (ValueError, RecursionError) as error:
        raise _Damage("its header is not JSON") from error
    if not isinstance(header, dict):
        raise _Damage("its header is not a JSON object")
    return header


def _entry(name: str, fields: object) -> TensorEntry:
    if not isinstance(fields, dict):
        raise _Damage(f"tensor {name!r} is not described")
    dtype = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Damage(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _Damage(f"tensor {name!r} has no valid shape and data_offsets")
    begin, end = offsets
    if end - begin != prod(shape) * _BITS[dtype] // 8:
        raise _Damage(
            f"tensor {name!r} of shape {shape} and dtype {dtype} claims {end - begin:,} bytes"
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def _is_sizes(value: Any) -> bool:
    """Few and of 63 bits, so that their product is computed at once."""
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(entries: dict[str, TensorEntry], data_bytes: int) -> None:
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise _Damage(f"tensor {name!r} overlaps another or leaves a gap")
        at = entry.end
    if at > data_bytes:
        raise _Damage(f"it is cut short: {at:,} bytes of tensors, {data_bytes:,} are there")
    if at < data_bytes:
        raise _Damage(f"{data_bytes - at:,} bytes at its end belong to no tensor")
