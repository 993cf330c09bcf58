"""Per-layer decoding state with one protocol, mlx-lm's batch-cache protocol by duck typing.

Three kinds: `FullCache` grows with the sequence, `WindowCache` is a ring of the last W keys,
`RecurrentState` is a fixed-size state. One class serves a single sequence and a batch, because
every row carries its own `offset`, the absolute position of its next token. Offsets live on the
host, so no step waits for the device to know where it is.

Padding is arithmetic on offsets and never enters a state:

- left: a row padded by n tokens starts at offset -n, and whatever comes before position 0 is
  ignored (`prepare(left_padding=...)` on an empty state);
- right: `prepare(lengths=..., right_padding=...)`, the padded forward calls, `finalize()`; tokens
  past a row's length leave its state and its offset as they were.

The model writes each layer's state during a forward call and moves the offsets once, at its end
(`advance`). A batch is built with `merge` and `extend`, thinned with `filter` and taken apart with
`extract`; rows never influence each other.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import mlx.core as mx


class LayerState:
    """Rows and what is common to every kind of state; subclasses name their arrays, [B, ...]."""

    _arrays: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        for name in self._arrays:
            setattr(self, name, None)
        self._offsets: list[int] = [0]
        # Valid tokens still to come in each row while a right-padded prompt is read, else None.
        self._remaining: list[int] | None = None

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: one number if all rows agree, else [B] int32."""
        if len(set(self._offsets)) == 1:
            return self._offsets[0]
        return mx.array(self._offsets, dtype=mx.int32)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Position of each row's next token, on the host."""
        return tuple(self._offsets)

    @property
    def batch_size(self) -> int:
        return len(self._offsets)

    def prepare(
        self,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padding in the tokens of the following forward calls.

        Args:
            left_padding: Padding tokens before each row's first; the state must be empty.
            lengths: Leading tokens of each row that count, left padding included.
            right_padding: As mlx-lm passes it; carries nothing that lengths does not.

        Raises:
            ValueError: left padding on a state in use, right padding without lengths, or another
                number of rows than the state has.
        """
        if left_padding is not None:
            if not self.empty() or any(self._offsets):
                raise ValueError("[prepare] left padding needs an empty state.")
            self._fit(len(left_padding))
            self._offsets = [-n for n in left_padding]
        if right_padding is not None and any(right_padding) and lengths is None:
            raise ValueError("[prepare] right padding needs lengths.")
        if lengths is not None:
            self._fit(len(lengths))
            self._remaining = list(lengths)

    def finalize(self) -> None:
        """End what `prepare` announced; the next token of every row is a real one."""
        self._remaining = None

    def advance(self, n: int) -> None:
        """Move every row past n tokens of a forward call, or to its end if that comes first."""
        counts = self._counts(n)
        self._offsets = [
            offset + count for offset, count in zip(self._offsets, counts, strict=True)
        ]
        if self._remaining is not None:
            self._remaining = [
                left - count for left, count in zip(self._remaining, counts, strict=True)
            ]

    @classmethod
    def merge(cls, caches: Sequence[Self]) -> Self:
        """One state with the rows of all; the arguments stay as they are."""
        cls._settled(caches)
        merged = cls.from_state(caches[0].state)
        for name in cls._arrays:
            rows = [(getattr(cache, name), cache.batch_size) for cache in caches]
            setattr(merged, name, _stack_rows(rows))
        merged._offsets = [offset for cache in caches for offset in cache._offsets]
        return merged

    def extend(self, other: Self) -> None:
        """Append the rows of another state."""
        self.state = type(self).merge([self, other]).state

    def filter(self, indices: Sequence[int]) -> None:
        """Keep these rows, in this order.

        Raises:
            ValueError: no row would be left, there is no such row, or announced padding has not
                been finalized. The state is then as it was.
        """
        self._check_rows(indices)
        rows = mx.array(list(indices), dtype=mx.int32)
        self._offsets = [self._offsets[i] for i in indices]
        for name in self._arrays:
            array = getattr(self, name)
            setattr(self, name, None if array is None else array[rows])

    def extract(self, index: int) -> Self:
        """A state of its own for one row."""
        row = type(self).from_state(self.state)
        row.filter([index])
        return row

    @classmethod
    def from_state(cls, state: Any) -> Self:
        """Rebuild from what `state` returned."""
        cache = cls.__new__(cls)
        LayerState.__init__(cache)
        cache.state = state
        return cache

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays, numbers and None: enough to rebuild this state with `from_state`."""
        return self._get_state()

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        self._set_state(value)

    def _get_state(self) -> tuple[Any, ...]:
        remaining = None if self._remaining is None else list(self._remaining)
        return (*(getattr(self, name) for name in self._arrays), list(self._offsets), remaining)

    def _set_state(self, value: Sequence[Any]) -> None:
        *arrays, offsets, remaining = value
        for name, array in zip(self._arrays, arrays, strict=True):
            setattr(self, name, array)
        self._offsets = [int(offset) for offset in offsets]
        self._remaining = None if remaining is None else [int(left) for left in remaining]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        arrays = (getattr(self, name) for name in self._arrays)
        return sum(array.nbytes for array in arrays if array is not None)

    def empty(self) -> bool:
        """Whether no token has been read yet."""
        return getattr(self, self._arrays[0]) is None

    def size(self) -> int:
        """Tokens held by the longest row; 0 for a state that does not grow."""
        return 0

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be taken back."""
        return False

    def trim(self, n: int) -> int:
        """Take back n tokens of every row, or all of the shortest; returns how many it was."""
        return 0

    def _fit(self, rows: int) -> None:
        """A new state does not know its batch size until it meets its first tokens."""
        if len(self._offsets) == rows:
            return
        if not self.empty() or self._offsets != [0]:
            raise ValueError(f"[cache] expected {len(self._offsets)} rows, got {rows}.")
        self._offsets = [0] * rows

    def _check_rows(self, indices: Sequence[int]) -> None:
        self._settled([self])
        rows = self.batch_size
        # MLX reads out of bounds without a word.
        if not len(indices) or not all(-rows <= i < rows for i in indices):
            raise ValueError(f"[filter] expected some of {rows} rows, got {list(indices)}.")

    def _counts(self, n: int) -> list[int]:
        """How many of the next n tokens count, per row."""
        if self._remaining is None:
            return [n] * len(self._offsets)
        return [min(n, left) for left in self._remaining]

    def _has_padding(self, n: int) -> bool:
        """Whether any of the next n tokens of any row is padding."""
        return min(self._offsets) < 0 or min(self._counts(n)) < n

    def known_lengths(self, n: int) -> list[int]:
        """Tokens of each row once the next n, or all that `prepare` announced, have been read."""
        coming = self._counts(n) if self._remaining is None else self._remaining
        return [max(0, o + c) for o, c in zip(self._offsets, coming, strict=True)]

    def _lengths(self, n: int) -> mx.array | None:
        if self._remaining is None:
            return None
        return mx.array(self._counts(n), dtype=mx.int32)

    def _positions(self) -> mx.array:
        return mx.array(self._offsets, dtype=mx.int32)

    @staticmethod
    def _settled(caches: "Sequence[LayerState]") -> None:
        if any(cache._remaining is not None for cache in caches):
            raise ValueError("[cache] finalize padded rows before changing them.")


class RecurrentState(LayerState):
    """State of one recurrent block: the last K-1 inputs of its convolution and its hidden state.

    `conv` [B, K-1, E] in the model's dtype and `hidden` [B, E] float32, or None before the first
    token. It cannot be trimmed: a recurrence has no way back.
    """

    _arrays = ("conv", "hidden")
    conv: mx.array | None
    hidden: mx.array | None

    def begin(self, x: mx.array) -> tuple[mx.array | None, mx.array | None]:
        """What the recurrent ops must know about the next tokens x [B, T, ...].

        Returns:
            reset [B, T] bool, true at each row's position 0, None if no row starts here; lengths
            [B] int32, the valid leading tokens, None unless right padding was announced.
        """
        B, T = x.shape[:2]
        self._fit(B)
        reset = None
        if any(-T < offset <= 0 for offset in self._offsets):
            # On the host, which knows the offsets: three operations less on the device, per layer.
            starts = [[False] * T for _ in range(B)]
            for row, offset in zip(starts, self._offsets, strict=True):
                if -T < offset <= 0:
                    row[-offset] = True
            reset = mx.array(starts)
        return reset, self._lengths(T)

    def make_mask(self, n: int) -> mx.array | None:
        """Which of the next n tokens count, [B, n] bool; None if all do."""
        if not self._has_padding(n):
            return None
        steps = mx.arange(n)
        mask = self._positions()[:, None] + steps >= 0
        return mask & (steps < mx.array(self._counts(n))[:, None])


class WindowCache(LayerState):
    """Ring of the last `window` keys and values of each row, [B, Hkv, slots, D], never more.

    The key of position p is in slot p % window, per row, so rows of any lengths share a batch
    without moving a key. As long as no row is past the window, only as many slots exist as are
    needed, in steps of 256.
    """

    _arrays = ("keys", "values")
    _growth = 256
    keys: mx.array | None
    values: mx.array | None

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def is_step(self, tokens: int) -> bool:
        """Whether a forward call of this many tokens is one real token in every row."""
        return tokens == 1 and not self._has_padding(1)

    def write_step(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Write one token's keys and values, [B, Hkv, 1, D]; returns both rings and positions [B].

        Rings that are still growing have fewer slots than the window; then no position is past
        them, so they are rings of that many slots.

        Call only if `is_step(1)`.
        """
        old_keys, old_values = self._rings(keys, 1)
        slots = [offset % self.window for offset in self._offsets]
        self.keys = _write_slots(old_keys, slots, keys)
        self.values = _write_slots(old_values, slots, values)
        return self.keys, self.values, self._positions()

    def write_chunk(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Write T tokens' keys and values, [B, Hkv, T, D], and fetch all that they may look at.

        Returns:
            Keys and values in order of position, [B, Hkv, S, D], the last T being the new ones, and
            key_start [B], the first valid key of each row, None if all are valid.
        """
        T, W = keys.shape[2], self.window
        old_keys, old_values = self._rings(keys, T)
        N = old_keys.shape[2]
        positions = self._positions()[:, None]  # [B, 1]
        past = min(max(0, *self._offsets), W - 1)
        key_start = None
        if min(self._offsets) < past:
            key_start = mx.maximum(past - positions[:, 0], 0)
        all_keys, all_values = keys, values
        if past > 0:
            before = positions - past + mx.arange(past)
            slots = mx.where(before < 0, 0, before % W)  # below 0 key_start hides whatever is read
            all_keys = mx.concatenate([take_slots(old_keys, slots), keys], axis=2)
            all_values = mx.concatenate([take_slots(old_values, slots), values], axis=2)

        # Each slot keeps the newest valid position that maps to it, old or new.
        counts = mx.array(self._counts(T), dtype=mx.int32)[:, None]
        last = positions + counts - 1
        newest = last - (last - mx.arange(N)) % W  # [B, N]
        is_new = (newest >= positions) & (newest >= 0)
        source = mx.where(is_new, N + newest - positions, mx.arange(N))
        self.keys = take_slots(mx.concatenate([old_keys, keys], axis=2), source)
        self.values = take_slots(mx.concatenate([old_values, values], axis=2), source)
        return all_keys, all_values, key_start

    @classmethod
    def merge(cls, caches: Sequence[Self]) -> Self:
        if len({cache.window for cache in caches}) > 1:
            raise ValueError("[merge] rows of one batch need the same window.")
        cls._settled(caches)
        rings = [cache.keys for cache in caches if cache.keys is not None]
        slots = max((ring.shape[2] for ring in rings), default=0)
        grown = []
        for cache in caches:
            part = cls.from_state(cache.state)
            for name in cls._arrays:
                ring = getattr(part, name)
                setattr(part, name, None if ring is None else _grown(ring, slots))
            grown.append(part)
        return super().merge(grown)

    def size(self) -> int:
        return min(max(0, *self._offsets), self.window)

    def is_trimmable(self) -> bool:
        # Past that point a slot has been overwritten by a key that trimming would remove.
        return max(self._offsets) <= self.window

    def trim(self, n: int) -> int:
        self._settled([self])
        if not self.is_trimmable():
            return 0
        n = max(0, min(n, *self._offsets))
        self._offsets = [offset - n for offset in self._offsets]
        return n

    def _get_state(self) -> tuple[Any, ...]:
        return (*super()._get_state(), self.window)

    def _set_state(self, value: Sequence[Any]) -> None:
        *common, window = value
        super()._set_state(common)
        self.window = int(window)

    def _rings(self, like: mx.array, n: int) -> tuple[mx.array, mx.array]:
        """Both rings with room for n more tokens in every row."""
        B, heads, _, D = like.shape
        self._fit(B)
        end = max(o + c for o, c in zip(self._offsets, self._counts(n), strict=True))
        slots = min(self.window, max(1, -(-end // self._growth)) * self._growth)
        if self.keys is None or self.values is None:
            empty = mx.zeros((B, heads, slots, D), dtype=like.dtype)
            return empty, empty
        return _grown(self.keys, slots), _grown(self.values, slots)


def _stack_rows(parts: list[tuple[mx.array | None, int]]) -> mx.array | None:
    """Concatenate rows; a part without an array yet is zeros."""
    like = next((array for array, _ in parts if array is not None), None)
    if like is None:
        return None
    return mx.concatenate(
        [
            mx.zeros((rows, *like.shape[1:]), dtype=like.dtype) if array is None else array
            for array, rows in parts
        ]
    )


def _grown(ring: mx.array, slots: int) -> mx.array:
    """The ring [B, H, N, D] with at least that many slots, new ones zero."""
    missing = slots - ring.shape[2]
    return ring if missing <= 0 else mx.pad(ring, [(0, 0), (0, 0), (0, missing), (0, 0)])


def _write_slots(ring: mx.array, slots: list[int], new: mx.array) -> mx.array:
    """The ring [B, H, W, D] with new [B, H, 1, D] in one slot per row."""
    ring = ring[:]  # assignment below changes the object it is applied to; a snapshot may hold it
    if len(set(slots)) == 1:
        ring[:, :, slots[0]] = new[:, :, 0]
    else:
        ring[mx.arange(len(slots)), :, mx.array(slots)] = new[:, :, 0]
    return ring


def take_slots(x: mx.array, index: mx.array) -> mx.array:
    """Gather x [B, H, S, D] by index [B, N] along S."""
    if x.shape[0] == 1:
        return mx.take(x, index[0], axis=2)
    return mx.take_along_axis(x, index[:, None, :, None], axis=2)
