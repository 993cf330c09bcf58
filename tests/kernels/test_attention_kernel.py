"""The kernels of attention on the Metal host: against a float64 softmax, and their properties."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal import (
    attention_kernel,
    build,
    dispatch,
    local_attention,
    local_attention_decode,
    reference,
)
from metal.attention_kernel import LOCAL_ATTENTION, LOCAL_ATTENTION_DECODE

from .. import metal_host
from ..tolerance import assert_close
from .test_local_attention import attention_loop, inputs

pytestmark = pytest.mark.usefixtures("apple_gpu")

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
MHA, GQA, MQA = (1, 1), (4, 2), (10, 1)

# Pairwise over B, T, keys before the queries' own, window, heads, D, softcap, dtype, and padding on
# the left and on the right. Up to 8 queries of a D that 32 divides take the decode kernel; fewer
# than 8 rows arrive in Metal's constant memory.
CASES = [
    (1, 1, 0, 1, MHA, 64, None, F32, False, False),
    (2, 1, 40, 16, GQA, 96, 5.0, F16, True, False),
    (3, 1, 300, 2048, MQA, 256, 50.0, BF16, False, True),
    (1, 1, 259, 300, MQA, 128, None, BF16, True, True),
    (2, 2, 0, 16, MQA, 64, 5.0, BF16, False, True),
    (3, 2, 21, 1, GQA, 128, None, F16, True, True),
    (1, 8, 150, 2048, GQA, 256, 5.0, F32, True, False),
    (1, 8, 150, 125, GQA, 64, None, F16, False, False),
    (9, 1, 0, 1, GQA, 64, None, F16, True, True),
    (1, 2, 0, 16, MHA, 72, None, F32, False, False),
    (1, 1, 5, 16, MHA, 8, 5.0, F16, True, True),
    (1, 9, 0, 16, GQA, 64, None, F32, False, False),
    (1, 63, 0, 16, MHA, 64, 5.0, F16, False, False),
    (2, 63, 7, 62, GQA, 96, None, BF16, True, False),
    (3, 63, 0, 2048, MHA, 128, 50.0, F32, True, True),
    (1, 64, 30, 1, MQA, 64, None, F16, True, True),
    (2, 64, 0, 64, MHA, 96, 50.0, F32, False, False),
    (1, 64, 0, 16, GQA, 256, 5.0, F32, False, True),
    (9, 64, 0, 16, MHA, 64, None, F16, True, True),
    (1, 65, 0, 2048, GQA, 64, None, BF16, False, True),
    (2, 65, 31, 16, MHA, 256, None, BF16, True, True),
    (1, 65, 3, 64, MQA, 128, 5.0, BF16, False, False),
    (3, 65, 0, 1, GQA, 256, 5.0, F16, False, False),
    (2, 20, 13, 2048, MQA, 72, 5.0, F16, True, True),
]


def case_id(case: tuple[Any, ...]) -> str:
    B, T, extra, W, heads, D, cap, dtype, *_ = case
    kind = str(dtype).rpartition(".")[2]
    return f"B{B}-T{T}-S{T + extra}-W{W}-H{heads[0]}_{heads[1]}-D{D}-cap{cap}-{kind}"


def assert_attends(
    out: mx.array,
    arrays: tuple[mx.array, mx.array, mx.array],
    scale: float,
    window: int,
    softcap: float | None = None,
    starts: list[int] | None = None,
    lengths: list[int] | None = None,
) -> None:
    """Against float64; a padding query on the left must have its own value, by its own key."""
    q, k, v = arrays
    want = attention_loop(q, k, v, scale, window, softcap, starts)
    (B, H, T, _), S = q.shape, k.shape[2]
    own = np.array(mx.repeat(v[:, :, S - T :], H // v.shape[1], axis=1).astype(F32))
    assert out.shape == q.shape and out.dtype == q.dtype
    assert mx.isfinite(out).all()
    for b in range(B):
        first = min(max((starts[b] if starts else 0) - (S - T), 0), T)
        want[b, :, :first] = own[b, :, :first]
        end = lengths[b] if lengths else T
        assert_close(f"row {b}", out[b, :, :end], want[b, :, :end])


def row_arguments(
    B: int, T: int, S: int, has_starts: bool, has_lengths: bool
) -> tuple[list[int] | None, list[int] | None, dict[str, mx.array]]:
    """Starts from none to everything, lengths from everything to none."""
    starts = [b * S // max(B - 1, 1) for b in range(B)] if has_starts else None
    lengths = [T - b * T // max(B - 1, 1) for b in range(B)] if has_lengths else None
    given = {"key_start": starts, "lengths": lengths}
    return starts, lengths, {name: mx.array(v) for name, v in given.items() if v is not None}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_matches_float64(case: tuple[Any, ...]) -> None:
    B, T, extra, window, heads, D, softcap, dtype, has_starts, has_lengths = case
    arrays = inputs(B, heads, T, T + extra, D, dtype)
    starts, lengths, rows = row_arguments(B, T, T + extra, has_starts, has_lengths)
    options = {"scale": D**-0.5, "window": window, "softcap": softcap}
    with metal_host.install():
        out = local_attention(*arrays, **options, **rows, backend="metal")
    assert_attends(out, arrays, **options, starts=starts, lengths=lengths)


@pytest.mark.parametrize(
    ("T", "S", "window", "heads", "D", "softcap", "dtype"),
    [
        (500, 500, 100, MQA, 256, 5.0, BF16),
        (500, 700, 2048, GQA, 64, None, F16),
        (500, 500, 16, MHA, 128, 50.0, F32),
        (3, 2000, 1500, MQA, 256, 5.0, BF16),
    ],
)
def test_large_shapes_match_float64(
    T: int,
    S: int,
    window: int,
    heads: tuple[int, int],
    D: int,
    softcap: float | None,
    dtype: mx.Dtype,
) -> None:
    arrays = inputs(1, heads, T, S, D, dtype)
    options = {"scale": D**-0.5, "window": window, "softcap": softcap}
    with metal_host.install(check=False):
        out = local_attention(*arrays, **options, backend="metal")
    assert_attends(out, arrays, **options)


@pytest.mark.parametrize("T", [1, 8, 40])
@pytest.mark.parametrize("window", [1, 20, 60, 100])
def test_without_a_softcap_it_is_mlx_s_own_attention_with_the_window_as_mask(
    window: int, T: int
) -> None:
    S = 60
    q, k, v = inputs(2, GQA, T, S, 64)
    query, key = mx.arange(S - T, S)[:, None], mx.arange(S)
    mask = (key <= query) & (query - key < window)
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask=mask)
    with metal_host.install(schedules=("forward",)):
        out = local_attention(q, k, v, scale=0.125, window=window, backend="metal")
    assert_close("out", out, want)


def views(D: int, T: int, S: int) -> dict[str, tuple[mx.array, mx.array, mx.array]]:
    """Queries, keys and values [2, 4, T, D], [2, 2, S, D] as models have them, and worse."""
    mx.random.seed(D + T)
    q, k = mx.random.normal((2, T, 4, D)), mx.random.normal((2, S, 2, D))
    fused = mx.random.normal((2, S, 8 * D)).reshape(2, S, 8, D).swapaxes(1, 2)
    ring = mx.random.normal((2, 2, S + 9, D))
    wide = mx.random.normal((2, 2, S, 2 * D))
    whole = mx.random.normal((D, S, 2, 2))
    q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    return {
        "heads behind tokens": (q, k, k + 1.0),
        "slices of one projection": (fused[:, :4, S - T :], fused[:, 4:6], fused[:, 6:]),
        "slots of a longer ring": (q, ring[:, :, :S], ring[:, :, 9:]),
        "keys and values apart": (q, k, ring[:, :, :S]),
        "every second element": (q, wide[..., ::2], wide[..., 1::2]),
        "every second element of queries": (
            wide[:, :1, S - T :, ::2],
            wide[:, :1, :, 1::2],
            ring[:, :1, :S],
        ),
        "reversed axes": (q, whole.T, whole.T + 1.0),
        "one key head for all": (q, mx.broadcast_to(k[:, :1], k.shape), k),
        "one batch row for all": (q, mx.broadcast_to(k[:1], k.shape), k),
    }


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("layout", list(views(64, 1, 1)))
def test_views_are_read_in_place_and_as_they_look(layout: str, T: int) -> None:
    arrays = views(64, T, 50)[layout]
    mx.eval(arrays)
    with metal_host.install(schedules=("forward",)) as host:
        out = local_attention(*arrays, scale=0.2, window=30, softcap=5.0, backend="metal")
    assert not any(launch.ensure_row_contiguous for launch in host.launches)
    assert_attends(out, arrays, 0.2, 30, 5.0)


@pytest.mark.parametrize(("T", "S"), [(1, 30), (1, 200), (1, 4300), (40, 60)])
@pytest.mark.parametrize("levels", [(-700, -400), (-2000, 2000), (2000, -2000)], ids=str)
def test_scores_far_from_zero_neither_vanish_nor_overflow(
    levels: tuple[int, int], T: int, S: int
) -> None:
    """Scores run from one level to the other; exp(-400) is zero and exp(400) infinite."""
    D = 32
    q, _, v = inputs(1, MHA, T, S, D, F16)
    q = mx.ones_like(q)
    k = mx.broadcast_to(mx.linspace(*levels, S)[:, None] / D, v.shape).astype(F16)
    with metal_host.install(check=False):
        out = local_attention(q, k, v, scale=1.0, window=S, backend="metal")
    assert_attends(out, (q, k, v), 1.0, S)


def test_a_window_of_any_size_is_one_that_sees_everything() -> None:
    for T in (1, 20):
        arrays = inputs(1, GQA, T, 20, 32)
        with metal_host.install(check=False):
            out, want = (
                local_attention(*arrays, scale=0.2, window=window, backend="metal")
                for window in (1 << 40, 20)
            )
        assert mx.array_equal(out, want)


@pytest.mark.parametrize("cut", [1, 8, 33, 63])
def test_a_prompt_in_chunks_equals_the_whole(cut: int) -> None:
    q, k, v = inputs(2, GQA, 64, 64, 64)
    options: dict[str, Any] = {"scale": 0.125, "window": 20, "softcap": 5.0, "backend": "metal"}
    with metal_host.install(schedules=("forward",)):
        whole = local_attention(q, k, v, **options)
        first = local_attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], **options)
        second = local_attention(q[:, :, cut:], k, v, **options)
    assert_close("out", mx.concatenate([first, second], axis=2), whole)


@pytest.mark.parametrize("T", [1, 40])
def test_a_row_of_a_batch_is_the_row_alone_bit_for_bit(T: int) -> None:
    q, k, v = inputs(3, GQA, T, 200, 64)
    starts = mx.array([0, 190, 50])
    options: dict[str, Any] = {"scale": 0.125, "window": 190, "softcap": 5.0, "backend": "metal"}
    with metal_host.install(check=False):
        out = local_attention(q, k, v, key_start=starts, **options)
        for b in range(3):
            row = slice(b, b + 1)
            alone = local_attention(q[row], k[row], v[row], key_start=starts[row], **options)
            assert mx.array_equal(out[row], alone)


@pytest.mark.parametrize("T", [1, 40])
def test_a_second_run_is_the_first_bit_for_bit(T: int) -> None:
    arrays = inputs(2, GQA, T, 200, 64)
    with metal_host.install(check=False):
        runs = [
            local_attention(*arrays, scale=0.125, window=190, softcap=5.0, backend="metal")
            for _ in range(2)
        ]
    assert mx.array_equal(*runs)


def test_what_lies_past_the_lengths_is_not_looked_at() -> None:
    q, k, v = inputs(2, GQA, 70, 70, 64)
    lengths = [70, 21]
    past = (mx.arange(70) >= mx.array(lengths)[:, None])[:, None, :, None]
    poisoned = tuple(mx.where(past, mx.nan, a) for a in (q, k, v))
    with metal_host.install(schedules=("forward",)):
        out = local_attention(
            *poisoned, scale=0.125, window=30, lengths=mx.array(lengths), backend="metal"
        )
    assert_attends(out, (q, k, v), 0.125, 30, lengths=lengths)
    assert not out[1, :, 21:].any()


def ring_of(
    sequence: mx.array, positions: list[int], window: int, unwritten: float = 0.0
) -> mx.array:
    """Of each row of [B, Hkv, S, D] the last `window` elements up to its position, as a ring."""
    B, Hkv, _, D = sequence.shape
    ring = mx.full((B, Hkv, window, D), unwritten, dtype=sequence.dtype)
    for b, position in enumerate(positions):
        for p in range(max(0, position - window + 1), position + 1):
            ring[b, :, p % window] = sequence[b, :, p]
    return ring


DECODE_CASES = [
    (1, MHA, 64, None, F32),
    (16, GQA, 64, 5.0, F16),
    (16, MQA, 256, None, BF16),
    (16, (7, 1), 256, 5.0, F32),
    (100, GQA, 96, 50.0, F32),
    (130, MQA, 128, 5.0, BF16),
    (300, GQA, 64, None, F16),
    (300, MQA, 256, 50.0, BF16),
]


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode_matches_float64_around_the_window(case: tuple[Any, ...]) -> None:
    W, heads, D, softcap, dtype = case
    positions = [0, W // 2, W - 1, W, W + 1, 3 * W + 2]
    q, k, v = inputs(len(positions), heads, 1, 3 * W + 3, D, dtype)
    rings = (ring_of(k, positions, W), ring_of(v, positions, W))
    with metal_host.install():
        out = local_attention_decode(
            *(q, *rings),
            position=mx.array(positions),
            scale=D**-0.5,
            window=W,
            softcap=softcap,
            backend="metal",
        )
    for b, p in enumerate(positions):
        row, seen = slice(b, b + 1), slice(0, p + 1)
        want = attention_loop(q[row], k[row, :, seen], v[row, :, seen], D**-0.5, W, softcap)
        assert_close(f"position {p}", out[row], want)


@pytest.mark.parametrize("W", [20, 300])
@pytest.mark.parametrize("dtype", [mx.int32, mx.int64, mx.uint32])
def test_slots_that_are_not_written_yet_are_not_looked_at(dtype: mx.Dtype, W: int) -> None:
    positions = [0, 5, W // 2]
    q, k, v = inputs(3, GQA, 1, W, 64)
    options: dict[str, Any] = {
        "position": mx.array(positions, dtype=dtype),
        "scale": 0.125,
        "window": W,
        "backend": "metal",
    }
    with metal_host.install():
        clean, poisoned = (
            local_attention_decode(
                q, ring_of(k, positions, W, x), ring_of(v, positions, W, x), **options
            )
            for x in (0.0, mx.nan)
        )
    assert mx.isfinite(poisoned).all()
    assert mx.array_equal(poisoned, clean)


@pytest.mark.parametrize("W", [20, 300])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_padding_row_of_a_decode_step_sees_one_slot(softcap: float | None, W: int) -> None:
    positions = [-1, -3, -W, -W - 2]
    q, k, v = inputs(4, GQA, 1, W, 64)
    with metal_host.install(schedules=("forward",)):
        out = local_attention_decode(
            *(q, k, v),
            position=mx.array(positions),
            scale=0.125,
            window=W,
            softcap=softcap,
            backend="metal",
        )
    for b, position in enumerate(positions):
        slot = position % W
        assert_close(f"row {b}", out[b], mx.repeat(v[b, :, slot : slot + 1], 2, axis=0))


@pytest.mark.parametrize("T", [40, 200])
def test_decode_equals_the_last_row_of_prefill(T: int) -> None:
    W = 150
    q, k, v = inputs(1, GQA, T, T, 64)
    rings = (ring_of(k, [T - 1], W, mx.nan), ring_of(v, [T - 1], W, mx.nan))
    options: dict[str, Any] = {"scale": 0.125, "window": W, "softcap": 5.0, "backend": "metal"}
    with metal_host.install(check=False):
        whole = local_attention(q, k, v, **options)
        step = local_attention_decode(q[:, :, -1:], *rings, position=mx.array([T - 1]), **options)
    assert_close("out", step, whole[:, :, -1:])


def test_the_slots_of_a_longer_ring_are_read_in_place() -> None:
    q, k, v = inputs(2, GQA, 1, 90, 64)
    position, options = mx.array([3, 49]), {"scale": 0.125, "window": 50}
    with metal_host.install(schedules=("forward",)) as host:
        out = local_attention_decode(
            q, k[:, :, :50], v[:, :, 40:], position=position, **options, backend="metal"
        )
    want = reference.local_attention_decode(
        q, k[:, :, :50], v[:, :, 40:], position, 0.125, 50, None
    )
    assert not host.launches[0].ensure_row_contiguous
    assert_close("out", out, want)


def keys_read(T: int, S: int, window: int, group: int, rows: int) -> int:
    """Keys that the tiles of one key head have to read."""
    count = 0
    for first in range(0, T * group, rows):
        begin = S - T + first // group
        end = S - T + min((first + rows - 1) // group, T - 1)
        count += end - max(0, begin - window + 1) + 1
    return count


@pytest.mark.parametrize("heads", [(4, 1), (4, 4)])
@pytest.mark.parametrize("T", [256, 250])
def test_prefill_reads_what_its_tiles_see_and_nothing_else(heads: tuple[int, int], T: int) -> None:
    q, k, v = inputs(1, heads, T, T + 5, 64, BF16)
    with metal_host.install(schedules=("forward",)) as host:
        local_attention(q, k, v, scale=0.125, window=64, softcap=5.0, backend="metal")
    (report,) = host.reports
    count = heads[1] * keys_read(T, T + 5, 64, heads[0] // heads[1], 32)
    assert report.bytes_read["q"] == q.nbytes and report.bytes_written["out"] == q.nbytes
    assert report.bytes_read["k"] == report.bytes_read["v"] == count * 64 * 2


def test_rows_that_are_padded_read_less() -> None:
    q, k, v = inputs(2, MHA, 128, 128, 64, BF16)
    with metal_host.install(schedules=("forward",)) as host:
        local_attention(
            *(q, k, v),
            scale=0.125,
            window=128,
            key_start=mx.array([0, 96]),
            lengths=mx.array([32, 128]),
            backend="metal",
        )
    (report,) = host.reports
    # The first row has one tile. The second has three of padding, which see themselves, and one.
    assert report.bytes_read["k"] == (32 + 4 * 32) * 64 * 2
    assert report.bytes_read["q"] == (32 + 128) * 64 * 2


@pytest.mark.parametrize(("heads", "D", "times"), [(MQA, 256, 2), (GQA, 64, 1), ((7, 1), 256, 2)])
def test_decode_reads_each_key_once_for_all_heads_of_a_threadgroup(
    heads: tuple[int, int], D: int, times: int
) -> None:
    q, k, v = inputs(2, heads, 1, 300, D, BF16)
    with metal_host.install(schedules=("forward",)) as host:
        local_attention_decode(
            *(q, k, v),
            position=mx.array([1000, 99]),
            scale=0.1,
            window=300,
            softcap=5.0,
            backend="metal",
        )
    step, merge = host.reports
    seen = heads[1] * (300 + 100) * D * 2
    assert step.bytes_read["k"] == step.bytes_read["v"] == times * seen
    assert merge.bytes_read["means"] == step.bytes_written["out"]


def test_nothing_but_what_the_text_says_makes_another_kernel() -> None:
    q, k = mx.zeros((2, 8, 300, 64)), mx.zeros((2, 8, 600, 64))

    def variant(B: int, H: int, Hkv: int, T: int, S: int, W: int) -> Any:
        arrays = (q[:B, :H, :T], k[:B, :Hkv, :S], k[:B, :Hkv, :S])
        return attention_kernel.attention_variant(*arrays, 0.1 * W, W, 2.0 + W, None, None)

    tiles = {
        variant(B, H, Hkv, T, S, W)
        for B, H, Hkv in ((1, 4, 4), (2, 8, 2))
        for T, S, W in ((9, 9, 1), (64, 65, 70), (300, 600, 10))
    }
    steps = {variant(B, 8, 2, T, S, 100) for B in (1, 2) for T, S in ((1, 1), (8, 600), (3, 30))}
    assert len(tiles) == len(steps) == 1


def row_views(values: list[int]) -> dict[str, mx.array]:
    every_second = mx.array([v for value in values for v in (value, 99)])[::2]
    return {
        "every second": every_second,
        "one for all": mx.broadcast_to(mx.array(values[:1]), (len(values),)),
        "backwards": mx.array(values[::-1])[::-1],
    }


@pytest.mark.parametrize("T", [2, 12])
@pytest.mark.parametrize("how", row_views([0]))
def test_what_is_said_of_rows_may_lie_in_memory_as_it_likes(how: str, T: int) -> None:
    q, k, v = inputs(3, GQA, T, 20, 32)
    key_start, lengths = row_views([5, 9, 16])[how], row_views([T, T - 1, T])[how]
    position = row_views([3, 25, 40])[how]
    plain: dict[str, Any] = {"scale": 0.2, "backend": "reference"}
    with metal_host.install(schedules=("forward",)):
        got = local_attention(
            *(q, k, v),
            **plain | {"backend": "metal", "window": 7},
            key_start=key_start,
            lengths=lengths,
        )
        step = local_attention_decode(
            *(q[:, :, :1], k, v), position=position, **plain | {"backend": "metal", "window": 20}
        )
    want = local_attention(q, k, v, window=7, key_start=key_start, **plain)
    for b, n in enumerate(np.array(lengths)):
        assert_close(f"row {b}", got[b, :, :n], want[b, :, :n])
    one = local_attention_decode(q[:, :, :1], k, v, position=position, window=20, **plain)
    assert_close("step", step, one)


@pytest.mark.parametrize(("D", "dtype"), [(64, F16), (256, BF16)])
def test_every_variant_passes_its_self_check(D: int, dtype: mx.Dtype) -> None:
    yes = (True, True)
    tiles = [attention_kernel.TileVariant(dtype, D, *yes, *yes)]
    tiles += [replace(tiles[0], has_few_rows=False)]
    tiles += [replace(tiles[0], has_softcap=False, has_key_start=False, has_lengths=False)]
    steps = [attention_kernel.DecodeVariant(dtype, D, 2, *yes, *yes, True)]
    steps += [replace(steps[0], has_few_rows=False)]
    steps += [replace(steps[0], is_split=False, has_softcap=False, has_key_start=False)]
    with metal_host.install(check=False):
        for variant in (*tiles, *(replace(step, is_ring=False) for step in steps)):
            assert LOCAL_ATTENTION.check(variant) is None
        for step in steps:
            ring = replace(step, has_key_start=False)
            assert LOCAL_ATTENTION_DECODE.check(ring) is None


@pytest.mark.parametrize(("T", "S"), [(1, 200), (30, 30)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_are_the_reference_s(softcap: float | None, T: int, S: int) -> None:
    arrays = inputs(2, GQA, T, S, 32)
    weights = mx.random.normal(arrays[0].shape)
    lengths = mx.array([T, T // 2])
    valid = (mx.arange(T) < lengths[:, None])[:, None, :, None]
    gradients = {}
    with metal_host.install(check=False):
        for backend in ("metal", "reference"):

            def loss(q: mx.array, k: mx.array, v: mx.array, backend: Any = backend) -> mx.array:
                out = local_attention(
                    *(q, k, v),
                    scale=0.2,
                    window=12,
                    softcap=softcap,
                    key_start=mx.array([0, 4]),
                    lengths=lengths,
                    backend=backend,
                )
                # The kernel must not let a gradient in from past a length, whoever asks for it.
                of = weights if backend == "metal" else mx.where(valid, weights, 0.0)
                return (out * of).sum()

            gradients[backend] = mx.grad(loss, argnums=(0, 1, 2))(*arrays)
    for got, want in zip(gradients["metal"], gradients["reference"], strict=True):
        assert_close("gradient", got, want)


def test_the_gradient_of_a_decode_step_is_the_reference_s() -> None:
    q, k, v = inputs(2, GQA, 1, 20, 32)
    position = mx.array([3, 30])

    def loss(q: mx.array, k: mx.array, v: mx.array, backend: Any) -> mx.array:
        options = {"position": position, "scale": 0.2, "window": 20, "softcap": 5.0}
        return (local_attention_decode(q, k, v, **options, backend=backend) ** 2).sum()

    with metal_host.install(check=False):
        got, want = (
            mx.grad(lambda *a, b=backend: loss(*a, b), argnums=(0, 1, 2))(q, k, v)
            for backend in ("metal", "reference")
        )
    for one, other in zip(got, want, strict=True):
        assert_close("gradient", one, other)


@pytest.mark.parametrize("D", [12, 264])
def test_head_dims_without_a_kernel_go_to_the_reference_or_are_refused_by_name(D: int) -> None:
    arrays = inputs(1, GQA, 9, 9, D)
    options: dict[str, Any] = {"scale": 0.2, "window": 5, "softcap": 5.0}
    with metal_host.install() as host:
        out = local_attention(*arrays, **options)
        message = re.escape(
            "[local_attention] the Metal kernel takes head dims that are multiples of 8"
        )
        with pytest.raises(dispatch.Unsupported, match=message + f".*, got {D}"):
            local_attention(*arrays, **options, backend="metal")
    assert not host.launches
    assert mx.array_equal(out, local_attention(*arrays, **options, backend="reference"))


def test_decode_is_refused_by_name() -> None:
    q, k, v = inputs(1, GQA, 1, 20, 48)
    options: dict[str, Any] = {"position": mx.array([3]), "scale": 0.2, "window": 20}
    with metal_host.install() as host:
        out = local_attention_decode(q, k, v, **options)
        message = (
            "[local_attention_decode] the Metal kernel takes head dims that are multiples of 32"
        )
        with pytest.raises(dispatch.Unsupported, match=re.escape(message)):
            local_attention_decode(q, k, v, **options, backend="metal")
    assert not host.launches
    assert mx.array_equal(out, local_attention_decode(q, k, v, **options, backend="reference"))


@pytest.mark.parametrize(
    ("T", "window", "D", "keywords", "has_launches"),
    [
        (1, 5, 64, {}, False),
        (1, 5, 64, {"softcap": 5.0}, True),
        (1, 5, 64, {"key_start": mx.array([2])}, True),
        (1, 5, 32, {}, True),
        (4, 30, 64, {}, False),
        (4, 5, 64, {}, True),
        (20, 30, 64, {}, False),
        (20, 19, 64, {}, True),
        (20, 30, 64, {"softcap": 5.0}, True),
        (20, 30, 256, {}, True),
    ],
)
def test_auto_leaves_to_mlx_what_its_own_kernels_do_without_a_mask(
    T: int,
    window: int,
    D: int,
    keywords: dict[str, Any],
    has_launches: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = []

    @functools.cache
    def kernel(name: str, *_: Any, **__: Any) -> build.Launch:
        def launch(**call: Any) -> list[mx.array]:
            launched.append(name)
            shapes = zip(call["output_shapes"], call["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shapes]

        return launch

    monkeypatch.setattr(build, "kernel", kernel)
    arrays = inputs(1, GQA, T, 30 if T < 9 else T, D)
    local_attention(*arrays, scale=0.2, window=window, **keywords)
    assert bool(launched) == has_launches
    launched.clear()
    local_attention(*arrays, scale=0.2, window=window, **keywords, backend="metal")
    assert launched
