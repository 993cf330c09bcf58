"""Each kind of layer state alone, without a model: which positions it holds, shows and forgets."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxmodels.cache import RecurrentState, WindowCache
from mlxmodels.full_cache import FullCache

W = 5
PADDING = -1.0


def new_window_cache() -> WindowCache:
    return WindowCache(W)


@pytest.fixture(params=[new_window_cache, FullCache], ids=["window", "full"])
def new_cache(request: pytest.FixtureRequest) -> Any:
    """Makes an empty cache of keys."""
    return request.param


def code(row: int, position: int) -> float:
    """Stands for a token's key, so that a misplaced one shows; its value is the negative."""
    return 100.0 * (row + 1) + position


def read(cache: Any, rows: list[int], n: int, dtype: mx.Dtype = mx.float32) -> None:
    """Let the cache read n tokens of every row, and check all that it shows for them."""
    offsets = cache.offsets if cache.batch_size == len(rows) else [0] * len(rows)
    remaining = cache.state[3]
    counts = [n] * len(rows) if remaining is None else [min(n, left) for left in remaining]
    written = [
        [code(row, offset + t) if offset + t >= 0 and t < count else PADDING for t in range(n)]
        for row, offset, count in zip(rows, offsets, counts, strict=True)
    ]
    keys = mx.array(written, dtype)[:, None, :, None]  # [B, 1, n, 1]
    if isinstance(cache, FullCache):
        shown, values = cache.update(keys, -keys)
        starts = cache.starts
    elif cache.is_step(n):
        shown, values, positions = cache.write_step(keys, -keys)
        assert positions.tolist() == list(offsets)
        starts = ()
    else:
        shown, values, key_start = cache.write_chunk(keys, -keys)
        starts = tuple(shown.shape[2] - n - offset for offset in offsets)
        first = [0] * len(rows) if key_start is None else key_start.tolist()
        assert first == [max(0, start) for start in starts]
        assert shown.shape[2] == n + min(max(0, *offsets), cache.window - 1)
    assert mx.array_equal(values, -shown) and shown.dtype == dtype
    for b, start in enumerate(starts):
        line = shown[b, 0, :, 0].tolist()
        for position in range(max(0, -start), offsets[b] + counts[b]):
            assert line[start + position] == code(rows[b], position)
    cache.advance(n)


def check_held(cache: Any, rows: list[int]) -> None:
    """What is kept between calls: in a ring the last W keys of each row and nothing else."""
    window = cache.window if isinstance(cache, WindowCache) else None
    for b, offset in enumerate(cache.offsets):
        line = cache.keys[b, 0, :, 0].tolist()
        if window is not None:
            want = [0.0] * len(line)
            for position in range(max(0, offset - window), offset):
                want[position % window] = code(rows[b], position)
            assert line == want
        else:
            start = cache.starts[b]
            assert start + offset == cache.size()
            assert line[start : start + offset] == [code(rows[b], p) for p in range(offset)]


def filled(cache: Any, *lengths: int) -> Any:
    """The cache after a right-padded prompt of these lengths."""
    longest = max(lengths)
    cache.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    if longest:
        read(cache, list(range(len(lengths))), longest)
    cache.finalize()
    return cache


@pytest.mark.parametrize("seed", range(20))
def test_any_chunks_with_any_padding_show_and_keep_the_right_keys(
    new_cache: Callable[[], Any], seed: int
) -> None:
    draw = random.Random(seed)
    rows = list(range(draw.randint(1, 4)))
    cache = new_cache()
    if draw.random() < 0.5:
        cache.prepare(left_padding=[draw.randint(0, 7) for _ in rows])
    for _ in range(8):
        n = draw.randint(1, 9)
        if draw.random() < 0.6:
            lengths = [draw.randint(0, n) for _ in rows]
            cache.prepare(lengths=lengths, right_padding=[n - length for length in lengths])
        while n > 0:
            size = draw.randint(1, n)
            read(cache, rows, size)
            n -= size
        cache.finalize()
        check_held(cache, rows)
        if draw.random() < 0.3:
            kept = draw.sample(range(len(rows)), draw.randint(1, len(rows)))
            cache.filter(kept)
            rows = [rows[i] for i in kept]
            check_held(cache, rows)
        if draw.random() < 0.3:
            cache.extend(filled(new_cache(), draw.randint(0, 12)))
            rows = [*rows, 0]
            check_held(cache, rows)


def test_a_ring_has_w_slots_and_constant_bytes_however_long_the_text() -> None:
    ring = WindowCache(W)
    read(ring, [0], 1)
    held = ring.nbytes
    assert held == 2 * W * 4
    for n in (1, 3, W - 3, W - 1, W, W + 1, 3 * W, 1):
        read(ring, [0], n)
        check_held(ring, [0])
        assert ring.nbytes == held
    assert ring.size() == W


def test_a_ring_takes_no_more_room_than_its_rows_need() -> None:
    ring = WindowCache(1000)
    slots = []
    for n in (1, 254, 1, 1, 300, 600, 1):
        read(ring, [0], n)
        check_held(ring, [0])
        slots.append(ring.nbytes // (2 * 4))
    assert slots == [256, 256, 256, 512, 768, 1000, 1000]
    short = WindowCache(1000)
    read(short, [0], 5)
    merged = WindowCache.merge([short, ring, WindowCache(1000)])
    check_held(merged, [0, 0, 0])
    assert short.nbytes == 2 * 4 * 256, "merging leaves its arguments as they are"


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_keys_keep_the_model_s_dtype_through_everything(
    new_cache: Callable[[], Any], dtype: mx.Dtype
) -> None:
    cache = new_cache()
    read(cache, [0], 3, dtype)
    cache = type(cache).merge([new_cache(), cache, new_cache()])
    for n in (1, 2, 1):  # positions up to 3: bfloat16 has no room for the codes of more rows
        cache.extend(new_cache())
        cache.filter([1])
        read(cache, [0], n, dtype)
    row = cache.extract(0)
    assert row.keys.dtype == row.values.dtype == dtype
    assert row.nbytes == row.keys.size * dtype.size * 2


@pytest.mark.parametrize(
    ("lengths", "n", "taken"),
    [
        ((5, 2), 4, 2),
        ((2, 5), 4, 2),
        ((5, 2), 1, 1),
        ((4, 0), 3, 0),
        ((3, 3), 9, 3),
        ((3, 4), -1, 0),
    ],
)
def test_trim_takes_as_much_back_from_every_row_as_the_shortest_has(
    new_cache: Callable[[], Any], lengths: tuple[int, int], n: int, taken: int
) -> None:
    cache = filled(new_cache(), *lengths)
    assert cache.is_trimmable() and cache.trim(n) == taken
    assert cache.offsets == tuple(length - taken for length in lengths)
    read(cache, [0, 1], 2)
    read(cache, [0, 1], 1)
    if isinstance(cache, FullCache):
        check_held(cache, [0, 1])


def test_trim_leaves_padding_that_is_still_to_come(new_cache: Callable[[], Any]) -> None:
    cache = new_cache()
    cache.prepare(left_padding=[0, 3])
    read(cache, [0, 1], 2)
    assert cache.trim(1) == 0 and cache.offsets == (2, -1)


def test_a_ring_can_be_trimmed_up_to_its_window_and_not_one_token_later() -> None:
    ring = filled(WindowCache(W), W)
    assert ring.is_trimmable() and ring.trim(2) == 2
    read(ring, [0], 2)
    check_held(ring, [0])
    read(ring, [0], 1)
    assert ring.offsets == (W + 1,) and not ring.is_trimmable() and ring.trim(1) == 0
    assert not filled(WindowCache(W), 1, W + 1).is_trimmable()
    assert filled(WindowCache(W), 1, W).is_trimmable()


def test_a_recurrence_has_no_way_back() -> None:
    state = RecurrentState()
    assert not state.is_trimmable() and state.trim(1) == 0


@pytest.mark.parametrize("act", ["merge", "extend", "join", "filter", "extract", "trim"])
def test_announced_padding_must_be_finalized_before_rows_change(
    new_cache: Callable[[], Any], act: str
) -> None:
    cache = filled(new_cache(), 3, 2)
    cache.prepare(lengths=[1, 2], right_padding=[1, 0])
    acts: dict[str, Callable[[], Any]] = {
        "merge": lambda: type(cache).merge([cache, new_cache()]),
        "extend": lambda: cache.extend(new_cache()),
        "join": lambda: filled(new_cache(), 1).extend(cache),
        "filter": lambda: cache.filter([0]),
        "extract": lambda: cache.extract(0),
        "trim": lambda: cache.trim(1),
    }
    with pytest.raises(ValueError, match="finalize padded rows"):
        acts[act]()
    read(cache, [0, 1], 2)
    cache.finalize()
    check_held(cache, [0, 1])
    acts[act]()


def test_padding_common_to_all_rows_is_dropped() -> None:
    cache = filled(FullCache(), 40, 3, 7)
    cache.filter([1, 2])
    assert cache.size() == 7 and cache.starts == (4, 0)
    check_held(cache, [1, 2])
    cache.prepare(lengths=[2, 1], right_padding=[3, 4])  # more padding than any row needs
    read(cache, [1, 2], 5)
    cache.finalize()
    assert cache.size() == 8 and cache.starts == (3, 0)
    check_held(cache, [1, 2])
    assert cache.extract(0).size() == 5


def test_unread_left_padding_outlives_a_filter() -> None:
    cache = FullCache()
    cache.prepare(left_padding=[0, 4, 6])
    cache.filter([1, 2])
    assert cache.offsets == (-4, -6) and cache.size() == 0
    read(cache, [1, 2], 3)
    cache.filter([0, 1])
    assert cache.offsets == (-1, -3) and cache.size() == 0
    cache.prepare(lengths=[1, 2], right_padding=[1, 0])
    read(cache, [1, 2], 2)
    cache.finalize()
    assert cache.offsets == (0, -1)
    read(cache, [1, 2], 5)
    check_held(cache, [1, 2])


def test_padding_on_both_sides_of_an_unread_row() -> None:
    cache = FullCache()
    cache.prepare(left_padding=[4, 5])
    cache.prepare(lengths=[1, 2], right_padding=[1, 0])
    read(cache, [0, 1], 2)
    cache.finalize()
    assert cache.offsets == (-3, -3) and cache.size() == 0
    read(cache, [0, 1], 5)
    check_held(cache, [0, 1])


def test_a_row_taken_out_of_a_long_batch_does_not_keep_the_batch_in_memory() -> None:
    keys = mx.zeros((2, 4, 3000, 16))
    cache = FullCache()
    cache.prepare(lengths=[3000, 5], right_padding=[0, 2995])
    cache.update(keys, keys)
    cache.advance(3000)
    cache.finalize()
    mx.eval(cache.keys, cache.values)
    before = mx.get_active_memory()
    row = cache.extract(1)
    mx.eval(row.keys, row.values)
    assert row.nbytes <= mx.get_active_memory() - before < row.nbytes + 10_000
    assert row.nbytes < cache.nbytes / 20


@pytest.mark.parametrize("window_size", [None, 1, 3])
@pytest.mark.parametrize("return_array", [False, True])
@pytest.mark.parametrize("lengths", [(0,), (6,), (4, 4), (6, 2), (0, 3)])
@pytest.mark.parametrize("n", [1, 4])
def test_a_mask_shows_each_query_its_row_s_past_and_itself(
    lengths: tuple[int, ...], n: int, return_array: bool, window_size: int | None
) -> None:
    cache = filled(FullCache(), *lengths)
    mask = cache.make_mask(n, return_array=return_array, window_size=window_size)
    if len(set(lengths)) == 1 and not return_array and window_size is None:
        assert mask == (None if n == 1 else "causal")
        return
    end = cache.size()
    want = np.zeros((len(lengths), 1, n, end + n), dtype=bool)
    for b, length in enumerate(lengths):
        for query in range(end, end + n):
            oldest = end - length
            if window_size is not None:
                oldest = max(oldest, query - window_size + 1)
            want[b, 0, query - end, oldest : query + 1] = True
    assert isinstance(mask, mx.array)
    assert np.array_equal(np.broadcast_to(np.array(mask), want.shape), want)


def test_a_padding_query_sees_itself_and_nothing_else() -> None:
    cache = FullCache()
    cache.prepare(left_padding=[0, 3])
    mask = cache.make_mask(4)
    assert isinstance(mask, mx.array) and mask.shape == (2, 1, 4, 4)
    assert mask[1, 0].tolist() == np.diag([True] * 4).tolist()
    assert mask[0, 0].tolist() == np.tri(4, dtype=bool).tolist()


def test_only_a_call_that_holds_a_row_s_start_resets() -> None:
    state = RecurrentState()
    reset, lengths = state.begin(mx.zeros((2, 3, 4)))
    assert reset is not None and reset.tolist() == [[True, False, False]] * 2
    assert lengths is None
    state.advance(3)
    assert state.begin(mx.zeros((2, 1, 4))) == (None, None)
    later = RecurrentState()
    later.prepare(left_padding=[3])
    assert later.begin(mx.zeros((1, 3, 4))) == (None, None)
    padded = RecurrentState()
    padded.prepare(left_padding=[0, 2, 3])
    reset, _ = padded.begin(mx.zeros((3, 3, 4)))
    assert reset is not None
    assert reset.tolist() == [[True, False, False], [False, False, True], [False] * 3]
    padded.advance(3)
    reset, _ = padded.begin(mx.zeros((3, 1, 4)))
    assert reset is not None and reset.tolist() == [[False], [False], [True]]


def test_a_recurrent_mask_marks_padding_on_both_sides() -> None:
    state = RecurrentState()
    assert state.make_mask(5) is None
    state.prepare(left_padding=[0, 2])
    assert state.make_mask(3).tolist() == [[True] * 3, [False, False, True]]
    state.advance(3)
    assert state.make_mask(3) is None
    state.prepare(lengths=[1, 3])
    assert state.make_mask(3).tolist() == [[True, False, False], [True] * 3]
    assert state.begin(mx.zeros((2, 2, 4)))[1].tolist() == [1, 2]
    state.advance(2)
    assert state.begin(mx.zeros((2, 2, 4)))[1].tolist() == [0, 1]


def test_positions_are_known_on_the_host(new_cache: Callable[[], Any]) -> None:
    cache = new_cache()
    assert cache.offset == 0 and cache.empty() and cache.size() == cache.nbytes == 0
    cache.prepare(left_padding=[3, 1])
    assert cache.offset.tolist() == [-3, -1] and cache.offset.dtype == mx.int32
    assert cache.known_lengths(2) == [0, 1] and cache.size() == 0
    read(cache, [0, 1], 4)
    assert cache.offsets == (1, 3) and not cache.empty() and cache.batch_size == 2
    cache.prepare(lengths=[2, 0], right_padding=[0, 2])
    assert cache.known_lengths(1) == [3, 3]
    read(cache, [0, 1], 2)
    cache.finalize()
    assert cache.offset == 3


def test_what_a_snapshot_holds_stays_when_its_source_goes_on(new_cache: Callable[[], Any]) -> None:
    cache = filled(new_cache(), 4, 2)
    cache.prepare(lengths=[3, 5], right_padding=[2, 0])
    read(cache, [0, 1], 2)  # in the middle of a padded prompt
    snapshot = cache.state
    read(cache, [0, 1], 3)
    cache.finalize()
    for _ in range(2 * W):
        read(cache, [0, 1], 1)
        mx.eval(cache.keys, cache.values)
    restored = type(cache).from_state(snapshot)
    for _ in range(2):  # and what is restored from it leaves it alone, too
        again = type(cache).from_state(snapshot)
        read(again, [0, 1], 3)
        again.finalize()
        check_held(again, [0, 1])
        read(again, [0, 1], 1)
        mx.eval(again.keys, again.values)
    read(restored, [0, 1], 3)
    restored.finalize()
    check_held(restored, [0, 1])


def test_misuse_is_refused() -> None:
    cache = FullCache()
    with pytest.raises(ValueError, match="right padding needs lengths"):
        cache.prepare(right_padding=[0, 3])
    filled(cache, 3, 3)
    with pytest.raises(ValueError, match="left padding needs an empty state"):
        cache.prepare(left_padding=[0, 1])
    with pytest.raises(ValueError, match="expected 2 rows, got 3"):
        cache.update(mx.zeros((3, 1, 1, 1)), mx.zeros((3, 1, 1, 1)))
    with pytest.raises(ValueError, match="expected 2 rows, got 3"):
        cache.prepare(lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="expected 2 rows, got 1"):
        FullCache.merge([FullCache(), FullCache()]).prepare(left_padding=[1])
    with pytest.raises(ValueError, match="same window"):
        WindowCache.merge([WindowCache(4), WindowCache(5)])


@pytest.mark.parametrize("indices", [[], [2], [0, -3]])
def test_rows_that_are_not_there_cannot_be_kept(
    new_cache: Callable[[], Any], indices: list[int]
) -> None:
    cache = filled(new_cache(), 6, 4)
    with pytest.raises(ValueError, match="some of 2 rows"):
        cache.filter(indices)
    check_held(cache, [0, 1])
    cache.filter([-1, -2])
    check_held(cache, [1, 0])
