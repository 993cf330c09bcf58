"""Windowed attention against a float64 softmax, and its ring against its sequence form."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from metal import local_attention, local_attention_decode

from ..tolerance import assert_close

Floats = npt.NDArray[np.float64]

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
HEADS = [(4, 4), (4, 2), (4, 1)]


def float64(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def attention_loop(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    window: int,
    softcap: float | None = None,
    key_start: list[int] | None = None,
) -> Floats:
    """Rows before key_start are left zero: what they hold is not specified."""
    queries, keys, values = float64(q), float64(k), float64(v)
    B, H, T, _ = queries.shape
    group, S = H // keys.shape[1], keys.shape[2]
    out = np.zeros_like(queries)
    for b in range(B):
        start = key_start[b] if key_start else 0
        for h in range(H):
            for i in range(T):
                here = S - T + i
                first = max(start, here - window + 1)
                if first > here:
                    continue
                scores = keys[b, h // group, first : here + 1] @ queries[b, h, i] * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, h, i] = weights @ values[b, h // group, first : here + 1]
    return out


def inputs(
    B: int, heads: tuple[int, int], T: int, S: int, D: int = 16, dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array, mx.array]:
    mx.random.seed(B + T + S)
    q = mx.random.normal((B, heads[0], T, D)) * 2.0
    k, v = (mx.random.normal((B, heads[1], S, D)) for _ in range(2))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


@pytest.mark.parametrize("softcap", [None, 1.5, 50.0])
@pytest.mark.parametrize("window", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("T", [1, 7, 8, 9, 33])
def test_matches_float64_around_the_window(T: int, window: int, softcap: float | None) -> None:
    q, k, v = inputs(2, (4, 2), T, T)
    out = local_attention(q, k, v, scale=0.25, window=window, softcap=softcap)
    assert_close("out", out, attention_loop(q, k, v, 0.25, window, softcap))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_matches_float64_with_grouped_heads_and_more_keys_than_queries(
    heads: tuple[int, int], dtype: mx.Dtype, softcap: float | None
) -> None:
    q, k, v = inputs(3, heads, 9, 20, dtype=dtype)
    out = local_attention(q, k, v, scale=0.25, window=6, softcap=softcap)
    assert out.dtype == dtype
    assert_close("out", out, attention_loop(q, k, v, 0.25, 6, softcap))


@pytest.mark.parametrize("window", [1, 16, 100, 256, 300, 2048])
@pytest.mark.parametrize("T", [255, 256, 257, 600])
def test_blocks_join_into_the_masked_full_matrix(T: int, window: int) -> None:
    q, k, v = inputs(1, (2, 1), T, T, D=8)
    query, key = mx.arange(T)[:, None], mx.arange(T)
    mask = (key <= query) & (query - key < window)
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    assert_close("fast", local_attention(q, k, v, scale=0.3, window=window), want)
    capped = local_attention(q, k, v, scale=0.3, window=window, softcap=1e4)
    assert_close("a softcap far above every score changes nothing", capped, want)


def test_no_score_matrix_is_longer_than_a_block_and_a_window() -> None:
    q, k, v = inputs(1, (1, 1), 4096, 4096, D=8)
    mx.eval(q, k, v)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(local_attention(q, k, v, scale=0.3, window=16, softcap=5.0))
    assert mx.get_peak_memory() - before < 4096 * 4096  # a quarter of one float32 matrix


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_left_padding_is_not_seen_and_stays_finite(softcap: float | None) -> None:
    q, k, v = inputs(3, (4, 2), 20, 20)
    starts = [0, 6, 20]
    out = local_attention(
        q, k, v, scale=0.25, window=5, softcap=softcap, key_start=mx.array(starts)
    )
    assert mx.isfinite(out).all()
    want = attention_loop(q, k, v, 0.25, 5, softcap, starts)
    for b, start in enumerate(starts):
        assert_close(f"row {b}", out[b, :, start:], want[b, :, start:])
        # By value: whether softmax over nothing is finite depends on the backend.
        itself = mx.repeat(v[b, :, :start], 2, axis=0)
        assert_close(f"padding of row {b}", out[b, :, :start], itself)


def test_right_padding_leaves_the_valid_queries_as_they_are() -> None:
    q, k, v = inputs(2, (4, 2), 20, 20)
    out = local_attention(q, k, v, scale=0.25, window=5, lengths=mx.array([20, 7]))
    alone = local_attention(q[1:, :, :7], k[1:, :, :7], v[1:, :, :7], scale=0.25, window=5)
    assert_close("row 1", out[1:, :, :7], alone)
    assert mx.isfinite(out).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("heads", HEADS)
def test_ring_decode_equals_the_sequence(
    heads: tuple[int, int], softcap: float | None, dtype: mx.Dtype
) -> None:
    T, W = 40, 8
    q, k, v = inputs(2, heads, T, T, dtype=dtype)
    want = attention_loop(q, k, v, 0.25, W, softcap)
    k_ring, v_ring = (mx.zeros((2, heads[1], W, 16), dtype=dtype) for _ in range(2))
    steps = []
    for t in range(T):
        k_ring[:, :, t % W], v_ring[:, :, t % W] = k[:, :, t], v[:, :, t]
        step = local_attention_decode(
            *(q[:, :, t : t + 1], k_ring, v_ring),
            position=mx.array([t, t], dtype=mx.int32),
            scale=0.25,
            window=W,
            softcap=softcap,
        )
        steps.append(step)
    assert_close("decode", mx.concatenate(steps, axis=2), want)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ring_rows_may_be_at_different_positions(softcap: float | None) -> None:
    W, positions = 8, [0, 6, 7, 8, 21]
    q, k, v = inputs(len(positions), (4, 2), 1, 22)
    k_ring, v_ring = (mx.zeros((len(positions), 2, W, 16)) for _ in range(2))
    for b, position in enumerate(positions):
        for p in range(max(0, position - W + 1), position + 1):
            k_ring[b, :, p % W], v_ring[b, :, p % W] = k[b, :, p], v[b, :, p]
    out = local_attention_decode(
        *(q, k_ring, v_ring),
        position=mx.array(positions, dtype=mx.int32),
        scale=0.25,
        window=W,
        softcap=softcap,
    )
    for b, position in enumerate(positions):
        row = slice(b, b + 1)
        seen = slice(0, position + 1)
        want = attention_loop(q[row], k[row, :, seen], v[row, :, seen], 0.25, W, softcap)
        assert_close(f"row {b}", out[row], want)


def test_a_padding_row_of_a_decode_step_sees_one_slot() -> None:
    q, k, v = inputs(1, (2, 1), 1, 4)
    position = mx.array([-3], dtype=mx.int32)
    for softcap in (None, 5.0):
        out = local_attention_decode(
            q, k, v, position=position, scale=1.0, window=4, softcap=softcap
        )
        assert_close("slot 1", out, mx.repeat(v[:, :, 1:2], 2, axis=1))


Q, K = mx.zeros((2, 4, 5, 8)), mx.zeros((2, 2, 5, 8))


@pytest.mark.parametrize(
    ("q", "k", "v", "keywords", "message"),
    [
        (Q[0], K, K, {}, "expected q [B, H, T, D] with T >= 1, got (4, 5, 8)."),
        (Q.astype(mx.int32), K, K, {}, "expected q float32, float16 or bfloat16"),
        (Q, K[..., :4], K, {}, "expected k [2, Hkv, S, 8]"),
        (Q, K, K[:, :1], {}, "expected v (2, 2, 5, 8)"),
        (Q[:, :3], K, K, {}, "expected key heads that divide 3, got 2."),
        (Q, K[:, :, :4], K[:, :, :4], {}, "expected at least T = 5 keys, got 4."),
        (Q, K, K, {"window": 0}, "expected window >= 1, got 0."),
        (Q, K, K, {"softcap": -1.0}, "expected softcap > 0 or None, got -1.0."),
        (Q, K, K, {"key_start": mx.zeros((2,))}, "expected key_start (2,) integer"),
        (Q, K, K, {"lengths": mx.array([1])}, "expected lengths (2,) integer"),
    ],
)
def test_refuses_by_name(
    q: mx.array, k: mx.array, v: mx.array, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"[local_attention] {message}")):
        local_attention(q, k, v, **{"scale": 1.0, "window": 4, **keywords})


def test_decode_refuses_by_name() -> None:
    position = mx.zeros((2,), dtype=mx.int32)
    with pytest.raises(ValueError, match=re.escape("expected q [B, H, 1, D]")):
        local_attention_decode(Q, K, K, position=position, scale=1.0, window=5)
    with pytest.raises(ValueError, match=re.escape("expected rings of 4 slots, got 5.")):
        local_attention_decode(Q[:, :, :1], K, K, position=position, scale=1.0, window=4)
    with pytest.raises(ValueError, match=re.escape("expected position (2,) integer")):
        local_attention_decode(Q[:, :, :1], K, K, position=position[:1], scale=1.0, window=5)
