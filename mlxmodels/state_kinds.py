"""The classes of layer state that a file can hold, and what makes one of them valid.

A closed table: a file names a class of it, nothing is imported by a name from a file. Beside our
own it has mlx-lm's classes for one sequence. Its batch classes are left out: their `state` forgets
announced padding, and one rebuilt from it lacks attributes its next step reads (mlx-lm 0.32);
extract their rows first.
"""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxmodels.cache import LayerState, RecurrentState, WindowCache
from mlxmodels.full_cache import FullCache

Fields = dict[str, Any]
"""What a state consists of, by name: arrays, integers, lists of both, None."""

CONTAINER = "CacheList"
"""mlx-lm's list of states that belong to one layer."""

_ZOO = "mlx_lm.models.cache"
_OURS: dict[str, type[LayerState]] = {
    cls.__name__: cls for cls in (RecurrentState, WindowCache, FullCache)
}


@dataclass(frozen=True)
class Kind:
    """One class of state."""

    fields: tuple[str, ...]
    """Names of what its `state` holds, in order."""
    check: Callable[[Fields], None]
    """Raises ValueError, naming the field, if the fields contradict each other."""
    used: str | None = None
    """The field that counts the slots of keys and values in use, where there may be spare ones."""


def name_of(state: object) -> str:
    """The name under which a state is saved.

    Raises:
        ValueError: it is of no class in the table.
    """
    cls = type(state)
    name = cls.__name__
    is_zoo = cls.__module__ == _ZOO and (name in KINDS or name == CONTAINER) and name not in _OURS
    if is_zoo or cls is _OURS.get(name):
        return name
    raise ValueError(
        f"[save_states] expected states of {', '.join(KINDS)} or {CONTAINER}, got a {name}."
    )


def fields_of(state: Any) -> Fields:
    """A state's content by name, without spare slots.

    Raises:
        ValueError: it could not be restored from this.
    """
    kind = KINDS[name_of(state)]
    fields = dict(zip(kind.fields, state.state, strict=True))
    kind.check(fields)
    if kind.used is not None:
        used = fields[kind.used]
        fields |= {name: _first_slots(fields[name], used) for name in ("keys", "values")}
    return fields


def restore(name: str, fields: Fields) -> Any:
    """The state that `fields_of` took apart.

    Raises:
        ValueError: no state of the class named can have these fields.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"class: expected one of {', '.join(KINDS)}, got {reprlib.repr(name)}")
    kind = KINDS[name]
    if set(fields) != set(kind.fields):
        raise ValueError(f"expected the fields {list(kind.fields)}, got {reprlib.repr([*fields])}")
    kind.check(fields)
    state = tuple(fields[field] for field in kind.fields)
    if name in _OURS:
        return _OURS[name].from_state(state)
    from mlx_lm.models import cache as zoo

    if name == "ConcatenateKVCache" and fields["keys"] is None:
        return zoo.ConcatenateKVCache()  # an empty one cannot be rebuilt from its state
    return getattr(zoo, name).from_state(state)


def container(states: Sequence[Any]) -> Any:
    """mlx-lm's list of these states."""
    from mlx_lm.models import cache as zoo

    return zoo.CacheList(*states)


def _first_slots(value: Any, n: int) -> Any:
    if value is None:
        return None
    if isinstance(value, mx.array):
        return value[:, :, :n]
    return [array[:, :, :n] for array in value]


def _check_recurrent(fields: Fields) -> None:
    rows = _check_rows(fields)
    conv, hidden = fields["conv"], fields["hidden"]
    if conv is None and hidden is None:
        return _check_unread(fields)
    _expect(_is_floating(conv, ndim=3), "conv", "a floating array [B, K-1, E]", conv)
    want = (rows, conv.shape[2])
    is_hidden = isinstance(hidden, mx.array) and hidden.dtype == mx.float32
    _expect(is_hidden and hidden.shape == want, "hidden", f"float32 of shape {want}", hidden)
    _expect(conv.shape[0] == rows, "conv", f"{rows} rows", conv)


def _check_window(fields: Fields) -> None:
    rows = _check_rows(fields)
    keys, values, window = fields["keys"], fields["values"], fields["window"]
    _expect(_is_count(window) and window > 0, "window", "a positive integer", window)
    if keys is None and values is None:
        return _check_unread(fields)
    needed = min(window, max(0, *fields["offsets"]))
    is_ring = _is_floating(keys, ndim=4) and keys.shape[0] == rows
    is_ring = is_ring and needed <= keys.shape[2] <= window
    slots = f"{needed} to {window} slots"
    _expect(is_ring, "keys", f"a floating array of {rows} rows and {slots}", keys)
    same = isinstance(values, mx.array) and (values.shape, values.dtype) == (keys.shape, keys.dtype)
    _expect(same, "values", f"shape and dtype of keys, {_shown(keys)}", values)


def _check_full(fields: Fields) -> None:
    rows = _check_rows(fields)
    keys, values = fields["keys"], fields["values"]
    starts, end = fields["starts"], fields["end"]
    _expect(_are_counts(starts, rows), "starts", f"{rows} integers from 0 up", starts)
    _expect(_is_count(end), "end", "an integer from 0 up", end)
    _check_keys_values(fields, end)
    if keys is None:
        return _check_unread(fields)
    is_kept = _is_floating(keys, ndim=4) and keys.shape[0] == rows
    _expect(is_kept, "keys", f"a floating array of {rows} rows", keys)
    _expect(values.dtype == keys.dtype, "values", f"the dtype of keys, {_shown(keys)}", values)
    # Rows are right-aligned, except while padding that was announced is being read.
    ends = [start + offset for start, offset in zip(starts, fields["offsets"], strict=True)]
    is_open = fields["remaining"] is not None
    aligned = all(at <= end if is_open else at == end for at in ends)
    _expect(aligned, "starts + offsets", f"{end} in every row", ends)


def _check_kv(fields: Fields) -> None:
    _expect(_is_count(fields["offset"]), "offset", "an integer from 0 up", fields["offset"])
    _check_keys_values(fields, fields["offset"])


def _check_concatenated(fields: Fields) -> None:
    _check_keys_values(fields, 0)


def _check_quantized(fields: Fields) -> None:
    for name in ("offset", "group_size", "bits"):
        _expect(_is_count(fields[name]), name, "an integer from 0 up", fields[name])
    keys, values = fields["keys"], fields["values"]
    if keys is None and values is None:
        return _expect(fields["offset"] == 0, "offset", "0 without keys", fields["offset"])
    for name, parts in (("keys", keys), ("values", values)):
        is_triple = isinstance(parts, list | tuple) and len(parts) == 3
        _expect(is_triple, name, "weights, scales and biases", parts)
    for part in (*keys, *values):
        _check_keys_values({"keys": keys[0], "values": part}, fields["offset"])


def _check_rotating(fields: Fields) -> None:
    for name in ("offset", "keep", "max_size", "index"):
        _expect(_is_count(fields[name]), name, "an integer from 0 up", fields[name])
    keep, size = fields["keep"], fields["max_size"]
    _expect(keep < size, "keep", f"less than max_size, {size}", keep)
    _check_keys_values(fields, fields["index"])


def _check_chunked(fields: Fields) -> None:
    for name in ("offset", "chunk_size", "start_position"):
        _expect(_is_count(fields[name]), name, "an integer from 0 up", fields[name])
    held = fields["offset"] - fields["start_position"]
    _expect(held >= 0, "start_position", f"at most {fields['offset']}", fields["start_position"])
    _check_keys_values(fields, held)


def _check_arrays(fields: Fields) -> None:
    arrays = fields["cache"]
    is_list = isinstance(arrays, list | tuple)
    _expect(is_list and len(arrays) > 0, "cache", "a list of arrays", arrays)
    held = {f"cache.{i}": array for i, array in enumerate(arrays)}
    held |= {name: fields[name] for name in ("left_padding", "lengths")}
    held = {name: array for name, array in held.items() if array is not None}
    for name, array in held.items():
        _expect(isinstance(array, mx.array) and array.ndim > 0, name, "an array with rows", array)
    rows = [array.shape[0] for array in held.values()]
    _expect(len(set(rows)) <= 1, "cache", "arrays with equally many rows", rows)


def _check_rows(fields: Fields) -> int:
    """What all of ours share; returns the number of rows."""
    offsets, remaining = fields["offsets"], fields["remaining"]
    is_list = isinstance(offsets, list) and len(offsets) > 0
    is_valid = is_list and all(type(o) is int and abs(o) < 2**31 for o in offsets)
    _expect(is_valid, "offsets", "a list of 32-bit integers", offsets)
    if remaining is not None:
        rows = len(offsets)
        _expect(_are_counts(remaining, rows), "remaining", f"{rows} integers from 0 up", remaining)
    return len(offsets)


def _check_unread(fields: Fields) -> None:
    offsets = fields["offsets"]
    _expect(max(offsets) <= 0, "offsets", "none past 0 without arrays", offsets)


def _check_keys_values(fields: Fields, slots: int) -> None:
    """keys and values [B, H, S, ...] agree up to their last axis and have the slots."""
    keys, values = fields["keys"], fields["values"]
    if keys is None and values is None:
        return _expect(slots == 0, "keys", f"{slots} slots or more", None)
    _expect(isinstance(keys, mx.array) and keys.ndim == 4, "keys", "an array [B, H, S, D]", keys)
    is_equal = isinstance(values, mx.array) and values.shape[:3] == keys.shape[:3]
    _expect(is_equal and values.ndim == 4, "values", f"shape {[*keys.shape[:3], 'D']}", values)
    _expect(slots <= keys.shape[2], "keys", f"{slots} slots or more", keys)


def _is_floating(value: object, ndim: int) -> bool:
    if not isinstance(value, mx.array) or value.ndim != ndim:
        return False
    return bool(mx.issubdtype(value.dtype, mx.floating))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _are_counts(value: object, n: int) -> bool:
    return isinstance(value, list) and len(value) == n and all(_is_count(item) for item in value)


def _expect(is_so: bool, field: str, expected: str, got: object) -> None:
    if not is_so:
        raise ValueError(f"{field}: expected {expected}, got {_shown(got)}")


def _shown(value: object) -> str:
    if isinstance(value, mx.array):
        return f"{str(value.dtype).removeprefix('mlx.core.')} of shape {value.shape}"
    return reprlib.repr(value)


KINDS: dict[str, Kind] = {
    "RecurrentState": Kind(("conv", "hidden", "offsets", "remaining"), _check_recurrent),
    "WindowCache": Kind(("keys", "values", "offsets", "remaining", "window"), _check_window),
    "FullCache": Kind(
        ("keys", "values", "offsets", "remaining", "starts", "end"), _check_full, used="end"
    ),
    "KVCache": Kind(("keys", "values", "offset"), _check_kv, used="offset"),
    "ConcatenateKVCache": Kind(("keys", "values"), _check_concatenated),
    "QuantizedKVCache": Kind(
        ("keys", "values", "offset", "group_size", "bits"), _check_quantized, used="offset"
    ),
    "RotatingKVCache": Kind(
        ("keys", "values", "offset", "keep", "max_size", "index"), _check_rotating, used="offset"
    ),
    "ChunkedKVCache": Kind(
        ("keys", "values", "offset", "chunk_size", "start_position"), _check_chunked
    ),
    "ArraysCache": Kind(("cache", "left_padding", "lengths"), _check_arrays),
}
