"""Keys and values of full attention: the layer state that grows with the sequence."""

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from mlxmodels.cache import LayerState, take_slots


class FullCache(LayerState):
    """Keys and values of every token, [B, Hkv, capacity, D].

    All rows write at one index, `_end`, so a decode step is one slice update whatever the rows'
    lengths; the key of position p of row b is at index `_starts[b] + p`, and what lies before
    `_starts[b]` belongs to no token. Between calls rows are right-aligned.
    """

    _arrays = ("keys", "values")
    _growth = 256
    keys: mx.array | None
    values: mx.array | None

    def __init__(self) -> None:
        super().__init__()
        self._starts: list[int] = [0]
        self._end = 0

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of position 0 of each row in the fetched keys."""
        return tuple(self._starts)

    def prepare(
        self,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        super().prepare(left_padding, lengths, right_padding)
        if left_padding is not None:
            self._starts = list(left_padding)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write T tokens' keys and values, [B, Hkv, T, D]; returns all of them, [B, Hkv, S, D]."""
        B, _, T, _ = keys.shape
        self._fit(B)
        end = self._end + T
        self.keys = _written(self.keys, keys, self._end, self._growth)
        self.values = _written(self.values, values, self._end, self._growth)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def advance(self, n: int) -> None:
        super().advance(n)
        self._end += n

    def finalize(self) -> None:
        super().finalize()
        shifts = [
            self._end - start - offset
            for start, offset in zip(self._starts, self._offsets, strict=True)
        ]
        if self.keys is None or self.values is None or not any(shifts):
            return
        # The padding that followed each row's last token goes in front of its first; what lies in
        # front of every row's first is dropped.
        starts = [start + shift for start, shift in zip(self._starts, shifts, strict=True)]
        unused = min(self._end, *starts)
        index = (mx.arange(unused, self._end) - mx.array(shifts)[:, None]) % self._end
        self.keys, self.values = take_slots(self.keys, index), take_slots(self.values, index)
        self._starts = [start - unused for start in starts]
        self._end -= unused

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Mask of the next n queries over all keys, for mx.fast.scaled_dot_product_attention.

        None or "causal" if no row is padded, else [B, 1, n, S] bool. A padding query sees itself:
        softmax over nothing would be NaN.
        """
        if not any(self._starts) and not return_array and window_size is None:
            return None if n == 1 else "causal"
        query = mx.arange(self._end, self._end + n)[:, None]
        key = mx.arange(self._end + n)
        mask = key <= query
        if window_size is not None:
            mask = mask & (key > query - window_size)
        starts = mx.array(self._starts)[:, None, None, None]
        return (mask & (key >= starts)) | (key == query)

    @classmethod
    def merge(cls, caches: Sequence[Self]) -> Self:
        end = max(cache._end for cache in caches)
        capacity = (end // cls._growth + 1) * cls._growth
        aligned = []
        for cache in caches:
            part = cls.from_state(cache.state)
            shift = end - cache._end
            for name in cls._arrays:
                array = getattr(cache, name)
                if array is not None:
                    room = [(0, 0), (0, 0), (shift, capacity - end), (0, 0)]
                    setattr(part, name, mx.pad(array[:, :, : cache._end], room))
            part._starts = [start + shift for start in cache._starts]
            aligned.append(part)
        merged = super().merge(aligned)
        merged._starts = [start for part in aligned for start in part._starts]
        merged._end = end
        return merged

    def filter(self, indices: Sequence[int]) -> None:
        self._check_rows(indices)
        self._starts = [self._starts[i] for i in indices]
        unused = min(self._end, *self._starts)
        if self.keys is not None and self.values is not None:
            # Before rows are copied: a slice of the copy would keep all of it in memory.
            self.keys, self.values = self.keys[:, :, unused:], self.values[:, :, unused:]
        super().filter(indices)
        self._starts = [start - unused for start in self._starts]
        self._end -= unused

    def size(self) -> int:
        return self._end

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        self._settled([self])
        n = max(0, min(n, *self._offsets))
        self._offsets = [offset - n for offset in self._offsets]
        self._end -= n
        return n

    def _get_state(self) -> tuple[Any, ...]:
        return (*super()._get_state(), list(self._starts), self._end)

    def _set_state(self, value: Sequence[Any]) -> None:
        *common, starts, end = value
        super()._set_state(common)
        self._starts = [int(start) for start in starts]
        self._end = int(end)

    def _fit(self, rows: int) -> None:
        super()._fit(rows)
        if len(self._starts) != rows:
            self._starts = [0] * rows


def _written(buffer: mx.array | None, new: mx.array, begin: int, growth: int) -> mx.array:
    """The buffer with new tokens at index begin, grown by whole steps if they do not fit."""
    B, H, T, D = new.shape
    end = begin + T
    if buffer is None or end > buffer.shape[2]:
        room = mx.zeros((B, H, -(-end // growth) * growth - begin, D), dtype=new.dtype)
        buffer = room if buffer is None else mx.concatenate([buffer[:, :, :begin], room], axis=2)
    else:
        buffer = buffer[:]  # assignment changes the object it is applied to; a snapshot may hold it
    buffer[:, :, begin:end] = new
    return buffer
