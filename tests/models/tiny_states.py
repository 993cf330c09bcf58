"""Small layer states without a model: one of each class that can be saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxmodels.cache import RecurrentState, WindowCache
from mlxmodels.full_cache import FullCache

W = 5


def noise(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def recurrent(rows: int = 1) -> RecurrentState:
    state = RecurrentState()
    state.begin(mx.zeros((rows, 4, 6)))
    state.conv, state.hidden = noise(rows, 3, 6), noise(rows, 6)
    state.advance(4)
    return state


def window(rows: int = 1, tokens: int = 3) -> WindowCache:
    state = WindowCache(W)
    state.write_chunk(noise(rows, 2, tokens, 4), noise(rows, 2, tokens, 4, seed=1))
    state.advance(tokens)
    return state


def full(rows: int = 1, tokens: int = 3) -> FullCache:
    state = FullCache()
    state.update(noise(rows, 2, tokens, 4), noise(rows, 2, tokens, 4, seed=1))
    state.advance(tokens)
    return state


def same(a: Any, b: Any) -> bool:
    """Equal trees of arrays and numbers, to the bit; lists and tuples count alike."""
    if isinstance(a, mx.array):
        equal = isinstance(b, mx.array) and a.dtype == b.dtype and a.shape == b.shape
        return equal and bool(mx.array_equal(a, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def zoo(name: str, *args: Any) -> Any:
    """An empty state of a class of mlx-lm's."""
    from mlx_lm.models import cache

    return getattr(cache, name)(*args)


def fed(state: Any, *sizes: int) -> Any:
    """A state of mlx-lm's after chunks of these sizes."""
    for i, n in enumerate(sizes):
        state.update_and_fetch(noise(1, 2, n, 64, seed=i), noise(1, 2, n, 64, seed=50 + i))
    return state


def arrays_cache() -> Any:
    state = zoo("ArraysCache", 3)
    state[0], state[2] = noise(2, 3, 8), noise(2, 4)
    state.prepare(lengths=[2, 5])
    return state


ZOO: dict[str, Callable[[], Any]] = {
    "kv": lambda: fed(zoo("KVCache"), 5, 1, 3),
    "kv_grown": lambda: fed(zoo("KVCache"), 250, 20),
    "kv_empty": lambda: zoo("KVCache"),
    "rotating": lambda: fed(zoo("RotatingKVCache", 8), 3, 1),
    "rotating_kept": lambda: fed(zoo("RotatingKVCache", 8, 2), 5, *[1] * 6),
    "rotating_long": lambda: fed(zoo("RotatingKVCache", 8), 20),
    "rotating_steps": lambda: fed(zoo("RotatingKVCache", 8), *[1] * 5),
    "rotating_empty": lambda: zoo("RotatingKVCache", 8),
    "quantized": lambda: fed(zoo("QuantizedKVCache", 32, 4), 5, 1),
    "quantized_empty": lambda: zoo("QuantizedKVCache"),
    "chunked": lambda: fed(zoo("ChunkedKVCache", 4), 3, 1),
    "concatenated": lambda: fed(zoo("ConcatenateKVCache"), 3, 2),
    "concatenated_empty": lambda: zoo("ConcatenateKVCache"),
}
