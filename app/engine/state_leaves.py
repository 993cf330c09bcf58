"""The layer states of one sequence as a flat list, and what they have in common with a model's.

A model's states are one per layer, or lists of such (mlx-lm's CacheList). What is kept of them is
decided state by state, so they are handled as the flat list of all that are no lists: leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlxmodels import state_kinds
from mlxmodels.cache import LayerState

# Growing states that can be trimmed at any length: no entry inside a prompt is worth making.
_ALWAYS_TRIMMABLE = {"FullCache", "KVCache", "QuantizedKVCache"}
# Those that can be trimmed as long as they say so. mlx-lm's ConcatenateKVCache says so and keeps
# what it takes back; its ChunkedKVCache says so when it has dropped its beginning.
_TRIMMABLE = _ALWAYS_TRIMMABLE | {"WindowCache", "RotatingKVCache"}
# What a state of a model is beside its arrays, whatever it has read.
_SETTINGS = {"window", "keep", "max_size", "chunk_size", "group_size", "bits"}


def leaves_of(states: Sequence[Any]) -> list[Any]:
    """The flat list."""
    found = []
    for state in states:
        if state_kinds.name_of(state) == state_kinds.CONTAINER:
            found += leaves_of(state.caches)
        else:
            found.append(state)
    return found


def states_of(leaves: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """States made of leaves, in lists as another model's state's are."""
    return _built(like, iter(leaves))


# A function of its own: one inside `states_of` that calls itself would be a cycle, which keeps the
# arrays in memory until Python looks for cycles.
def _built(like: Sequence[Any], leaves: Iterator[Any]) -> list[Any]:
    return [
        state_kinds.container(_built(state.caches, leaves))
        if state_kinds.name_of(state) == state_kinds.CONTAINER
        else next(leaves)
        for state in like
    ]


def can_keep(states: Sequence[Any]) -> bool:
    """Whether the states of a model's layers, as it makes them, are of kinds that can be kept."""
    try:
        copied(states)
    except ValueError:
        return False
    return True


def always_trimmable(states: Sequence[Any]) -> bool:
    """Whether an entry of these states serves every shorter prefix, however long it is."""
    return all(type(state).__name__ in _ALWAYS_TRIMMABLE for state in states)


def is_trimmable(state: Any) -> bool:
    """Whether the last tokens can be taken out of a leaf as it is now."""
    return type(state).__name__ in _TRIMMABLE and bool(state.is_trimmable())


def arrays_in(value: Any) -> Iterator[mx.array]:
    """All arrays of nested lists."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from arrays_in(item)


def copied(states: Sequence[Any], *, compact: bool = False) -> list[Any]:
    """States of their own with the same content and no spare slots.

    Arrays are shared until one of both is written to: ours are never written in place, and to the
    arrays of mlx-lm's states, which are, the copy has handles of its own.

    Args:
        compact: Whether arrays that are a part of larger ones become independent of them.

    Raises:
        ValueError: one is of a kind that cannot be taken apart.
    """
    return [_copied(state, compact) for state in states]


def _copied(state: Any, compact: bool) -> Any:
    name = state_kinds.name_of(state)
    if name == state_kinds.CONTAINER:
        return state_kinds.container([_copied(part, compact) for part in state.caches])

    fields = state_kinds.fields_of(state)
    return state_kinds.restore(name, {key: _own(value, compact) for key, value in fields.items()})


def _own(value: Any, compact: bool) -> Any:
    if isinstance(value, mx.array):
        return mx.contiguous(value) if compact else value[...]
    return [_own(item, compact) for item in value] if isinstance(value, list | tuple) else value


def trimmed(states: Sequence[Any], surplus: int) -> list[Any]:
    """Copies without the last `surplus` tokens; every leaf can be trimmed if there is one."""
    states = copied(states)
    if surplus:
        for state in states:
            state.trim(surplus)
        states = copied(states)  # without the slots that leaves unused
    return states


def layout_of(state: Any) -> tuple[Any, ...]:
    """What every leaf in the same place of the same model has in common, for `==`.

    Class, settings, and of each array the dtype and the axes that do not grow.

    Raises:
        ValueError: it is of a kind that cannot be taken apart.
    """

    def of(name: str, value: Any) -> Any:
        if isinstance(value, mx.array):
            grows = name in ("keys", "values")
            shape = [None if grows and axis == 2 else n for axis, n in enumerate(value.shape)]
            return str(value.dtype), tuple(shape)
        if isinstance(value, list | tuple) and name in ("keys", "values", "cache"):
            return tuple(of(name, item) for item in value)
        return value if name in _SETTINGS else None

    fields = state_kinds.fields_of(state)
    return type(state).__name__, *((name, of(name, fields[name])) for name in sorted(fields))


def tokens_read(state: Any) -> int | None:
    """How many tokens a leaf has read; None where it does not say."""
    if isinstance(state, LayerState):
        return state.offsets[0] if len(state.offsets) == 1 else -1
    return getattr(state, "offset", None)
