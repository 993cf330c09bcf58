"""The scan, the gated scan and the convolution against float64 loops, and their properties."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from metal import causal_conv1d, linear_scan, rg_lru

from ..tolerance import assert_close

Floats = npt.NDArray[np.float64]

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SHAPES = [
    *[(B, T, 32) for B in (1, 2, 3) for T in (1, 2, 63, 64, 65, 500)],
    *[(2, T, 100) for T in (1, 63, 500)],
    *[(1, T, 2560) for T in (1, 65, 500)],
]


def name_of(value: object) -> str | None:
    if isinstance(value, tuple):
        return "B{}-T{}-E{}".format(*value)
    return str(value).rpartition(".")[2] if isinstance(value, mx.Dtype) else None


def float64(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def scan_loop(
    x: Floats,
    a: Floats,
    h0: Floats,
    lengths: list[int] | None = None,
    reset: npt.NDArray[np.bool_] | None = None,
) -> tuple[Floats, Floats]:
    y, last = np.zeros_like(x), np.array(h0)
    for b in range(x.shape[0]):
        h = h0[b]
        for t in range(x.shape[1] if lengths is None else lengths[b]):
            if reset is not None and reset[b, t]:
                h = np.zeros_like(h)
            h = a[b, t] * h + x[b, t]
            y[b, t] = h
        last[b] = h
    return y, last


def rg_lru_loop(
    x: Floats, gx: Floats, ga: Floats, param: Floats, h0: Floats, reset: npt.NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    log_a = -8.0 / (1.0 + np.exp(-ga)) * np.log1p(np.exp(param))
    a, m = np.exp(log_a), np.sqrt(-np.expm1(2.0 * log_a))
    a = np.where(reset[..., None], 0.0, a)
    m = np.where(reset[..., None], 1.0, m)
    return scan_loop(x / (1.0 + np.exp(-gx)) * m, a, h0)


def conv_loop(
    u: Floats, w: Floats, bias: Floats, state: Floats, reset: npt.NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    K, y = w.shape[1], np.zeros_like(u)
    tail = state.copy()
    for t in range(u.shape[1]):
        tail[reset[:, t]] = 0.0
        taps = np.concatenate([tail, u[:, t : t + 1]], axis=1)
        y[:, t] = (taps * w.T).sum(axis=1) + bias
        tail = taps[:, 1:] if K > 1 else tail
    return y, tail


def scan_inputs(
    shape: tuple[int, ...], dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array, mx.array]:
    mx.random.seed(sum(shape))
    x = mx.random.normal(shape).astype(dtype)
    a = mx.random.uniform(0.0, 1.0, shape).astype(dtype) ** 0.2  # mostly near 1, as trained decays
    return x, a, mx.random.normal((shape[0], shape[2]))


def gate_inputs(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    mx.random.seed(sum(shape))
    sequences = [mx.random.normal(shape).astype(dtype) for _ in range(3)]
    return [*sequences, mx.random.uniform(-5.0, 0.5, (shape[2],))]


def reset_mask(B: int, T: int) -> mx.array:
    """Row b starts anew at token b and, if there is one, in the middle."""
    mask = np.zeros((B, T), dtype=bool)
    for b in range(B):
        mask[b, min(b, T - 1)] = mask[b, T // 2] = True
    return mx.array(mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_linear_scan_matches_float64(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    x, a, h0 = scan_inputs(shape, dtype)
    y, h_last = linear_scan(x, a, h0)
    want_y, want_h = scan_loop(float64(x), float64(a), float64(h0))
    assert y.dtype == dtype and h_last.dtype == mx.float32
    assert_close("y", y, want_y)
    assert_close("h_last", h_last, want_h)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 15, 16, 17, 100, 255, 257])
def test_the_chunks_of_the_scan_are_right_at_any_length(T: int) -> None:
    x, a, h0 = scan_inputs((2, T, 24))
    y, h_last = linear_scan(x, a, h0)
    want_y, want_h = scan_loop(float64(x), float64(a), float64(h0))
    assert_close("y", y, want_y)
    assert_close("h_last", h_last, want_h)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_rg_lru_matches_float64(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    x, gx, ga, param = gate_inputs(shape, dtype)
    h0, reset = mx.random.normal((shape[0], shape[2])), reset_mask(*shape[:2])
    y, h_last = rg_lru(x, gx, ga, param, h0, reset=reset)
    inputs = [float64(v) for v in (x, gx, ga, param, h0)]
    want_y, want_h = rg_lru_loop(*inputs, np.array(reset))
    assert y.dtype == dtype and h_last.dtype == mx.float32
    assert_close("y", y, want_y)
    assert_close("h_last", h_last, want_h)


@pytest.mark.parametrize("K", [1, 2, 4, 5])
@pytest.mark.parametrize("T", [1, 2, 3, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_causal_conv1d_matches_float64(K: int, T: int, dtype: mx.Dtype) -> None:
    mx.random.seed(K * T)
    u, w, bias = mx.random.normal((3, T, 20)), mx.random.normal((20, K)), mx.random.normal((20,))
    state, reset = mx.random.normal((3, K - 1, 20)), reset_mask(3, T)
    u, w, bias, state = (v.astype(dtype) for v in (u, w, bias, state))
    y, tail = causal_conv1d(u, w, bias, state, reset=reset)
    inputs = [float64(v) for v in (u, w, bias, state)]
    want_y, want_tail = conv_loop(*inputs, np.array(reset))
    assert y.dtype == dtype and tail.dtype == dtype
    assert_close("y", y, want_y)
    assert_close("state", tail, want_tail)


@pytest.mark.parametrize("cut", [1, 2, 31, 63])
def test_a_sequence_split_anywhere_equals_the_whole(cut: int) -> None:
    shape = (2, 64, 32)
    x, gx, ga, param = gate_inputs(shape)
    h0 = mx.random.normal((2, 32))
    whole, h_whole = rg_lru(x, gx, ga, param, h0)
    first, h = rg_lru(x[:, :cut], gx[:, :cut], ga[:, :cut], param, h0)
    second, h_last = rg_lru(x[:, cut:], gx[:, cut:], ga[:, cut:], param, h)
    assert_close("y", mx.concatenate([first, second], axis=1), whole)
    assert_close("h_last", h_last, h_whole)

    w, bias, state = mx.random.normal((32, 4)), mx.random.normal((32,)), mx.zeros((2, 3, 32))
    whole, tail_whole = causal_conv1d(x, w, bias, state)
    first, tail = causal_conv1d(x[:, :cut], w, bias, state)
    second, tail = causal_conv1d(x[:, cut:], w, bias, tail)
    assert_close("conv", mx.concatenate([first, second], axis=1), whole)
    assert_close("tail", tail, tail_whole)


def test_the_state_stops_at_each_row_s_length() -> None:
    lengths = [0, 1, 40, 64]
    x, a, h0 = scan_inputs((4, 64, 32))
    y, h_last = linear_scan(x, a, h0, lengths=mx.array(lengths))
    want_y, want_h = scan_loop(float64(x), float64(a), float64(h0), lengths)
    assert_close("h_last", h_last, want_h)
    assert mx.isfinite(y).all()
    for b, n in enumerate(lengths):
        assert_close(f"row {b}", y[b, :n], want_y[b, :n])

    gates = gate_inputs((4, 64, 32))
    _, h_last = rg_lru(*gates, h0, lengths=mx.array(lengths))
    w, bias, state = mx.random.normal((32, 4)), mx.zeros((32,)), mx.random.normal((4, 3, 32))
    _, tail = causal_conv1d(x, w, bias, state, lengths=mx.array(lengths))
    for b, n in enumerate(lengths):
        row = slice(b, b + 1)
        want_h, want_tail = h0[row], state[row]
        if n:
            alone = [v[row, :n] for v in gates[:3]]
            _, want_h = rg_lru(*alone, gates[3], h0[row])
            _, want_tail = causal_conv1d(x[row, :n], w, bias, state[row])
        assert_close(f"row {b} hidden", h_last[row], want_h)
        assert_close(f"row {b} tail", tail[row], want_tail)


def test_padding_on_both_sides_leaves_a_row_as_it_is_alone() -> None:
    gates = gate_inputs((1, 10, 32))
    w, bias = mx.random.normal((32, 4)), mx.random.normal((32,))
    start = mx.arange(10)[None] == 0
    zeros = mx.zeros((1, 3, 32))
    want_y, want_h = rg_lru(*gates, reset=start)
    want_conv, want_tail = causal_conv1d(gates[0], w, bias, zeros, reset=start)

    padded = [mx.pad(v, [(0, 0), (5, 7), (0, 0)], constant_values=9.0) for v in gates[:3]]
    starts, lengths = mx.arange(22)[None] == 5, mx.array([15])
    y, h_last = rg_lru(*padded, gates[3], lengths=lengths, reset=starts)
    conv, tail = causal_conv1d(padded[0], w, bias, zeros, lengths=lengths, reset=starts)
    assert_close("y", y[:, 5:15], want_y)
    assert_close("h_last", h_last, want_h)
    assert_close("conv", conv[:, 5:15], want_conv)
    assert_close("tail", tail, want_tail)


def test_a_row_of_a_batch_equals_the_row_alone() -> None:
    gates = gate_inputs((3, 65, 32))
    y, h_last = rg_lru(*gates)
    for b in range(3):
        alone_y, alone_h = rg_lru(*[v[b : b + 1] for v in gates[:3]], gates[3])
        assert_close("y", y[b : b + 1], alone_y)
        assert_close("h_last", h_last[b : b + 1], alone_h)


@pytest.mark.parametrize("decay", [0.0, 1e-38, 1.0])
@pytest.mark.parametrize("shape", [(2, 200, 32), (1, 500, 2560)], ids=name_of)
def test_extreme_decays_stay_exact_and_finite(shape: tuple[int, ...], decay: float) -> None:
    x, _, h0 = scan_inputs(shape)
    a = mx.full(shape, decay)
    y, h_last = linear_scan(x, a, h0)
    want_y, want_h = scan_loop(float64(x), float64(a), float64(h0))
    assert_close("y", y, want_y)
    assert_close("h_last", h_last, want_h)
    if decay == 0.0:
        assert mx.array_equal(y, x)


@pytest.mark.parametrize("gate", [-200.0, 200.0])
@pytest.mark.parametrize("param", [-60.0, 0.0, 60.0])
def test_rg_lru_is_finite_at_saturated_gates(gate: float, param: float) -> None:
    x, gx, _, _ = gate_inputs((2, 64, 32))
    y, h_last = rg_lru(x, gx, mx.full(x.shape, gate), mx.full((32,), param))
    assert mx.isfinite(y).all() and mx.isfinite(h_last).all()


def test_the_multiplier_keeps_its_digits_when_the_decay_is_close_to_one() -> None:
    # sqrt(1 - a*a) in float32 is 0 here: a rounds to 1.
    x, gx, ga = (mx.ones((1, 1, 8)) for _ in range(3))
    param = mx.full((8,), -20.0)
    y, _ = rg_lru(x, gx, ga, param)
    zeros, never = np.zeros((1, 8)), np.zeros((1, 1), dtype=bool)
    want, _ = rg_lru_loop(float64(x), float64(gx), float64(ga), float64(param), zeros, never)
    assert_close("y", y, want)


def test_the_state_is_float32_over_many_bfloat16_steps() -> None:
    x, a, h0 = scan_inputs((1, 500, 32), mx.bfloat16)
    steps, h = [], h0
    for t in range(500):
        y, h = linear_scan(x[:, t : t + 1], a[:, t : t + 1], h)
        steps.append(y)
    want_y, want_h = scan_loop(float64(x), float64(a), float64(h0))
    assert_close("y", mx.concatenate(steps, axis=1), want_y)
    np.testing.assert_allclose(np.array(h), want_h, rtol=1e-4, atol=1e-5)


def test_non_contiguous_input_is_read_as_it_looks() -> None:
    x, a, h0 = scan_inputs((32, 65, 2))
    strided = [v.transpose(2, 1, 0) for v in (x, a)]
    y, _ = linear_scan(*strided, h0.T)
    want, _ = scan_loop(*[float64(v) for v in strided], float64(h0.T))
    assert_close("y", y, want)


X = mx.zeros((2, 5, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], X[0]), "[linear_scan] expected x [B, T, E] with T >= 1, got (5, 8)."),
        ((X[:, :0], X[:, :0]), "[linear_scan] expected x [B, T, E] with T >= 1, got (2, 0, 8)."),
        (
            (X.astype(mx.int32), X),
            "[linear_scan] expected x float32, float16 or bfloat16, got mlx.core.int32.",
        ),
        (
            (X, X[:, :4]),
            "[linear_scan] expected a (2, 5, 8) of mlx.core.float32, "
            "got (2, 4, 8) of mlx.core.float32.",
        ),
        (
            (X, X, mx.zeros((2, 8), dtype=mx.float16)),
            "[linear_scan] expected h0 (2, 8) of float32, got (2, 8) of mlx.core.float16.",
        ),
    ],
)
def test_linear_scan_refuses_by_name(arguments: tuple[mx.array, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_scan(*arguments)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lengths": mx.zeros((2,))}, "[linear_scan] expected lengths (2,) integer"),
        ({"lengths": mx.array([1])}, "[linear_scan] expected lengths (2,) integer, got (1,)"),
        ({"reset": mx.zeros((2, 5))}, "[linear_scan] expected reset (2, 5) of bool"),
    ],
)
def test_row_arguments_are_refused_by_name(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_scan(X, X, **keywords)


def test_the_other_ops_name_themselves_in_errors() -> None:
    with pytest.raises(ValueError, match=re.escape("[rg_lru] expected recurrent_param (8,)")):
        rg_lru(X, X, X, mx.zeros((7,)))
    with pytest.raises(ValueError, match=re.escape("[rg_lru] expected input_gate (2, 5, 8)")):
        rg_lru(X, X[:1], X, mx.zeros((8,)))
    with pytest.raises(ValueError, match=re.escape("[causal_conv1d] expected weight [8, K]")):
        causal_conv1d(X, mx.zeros((4, 8)), mx.zeros((8,)), mx.zeros((2, 3, 8)))
    with pytest.raises(ValueError, match=re.escape("[causal_conv1d] expected state (2, 3, 8)")):
        causal_conv1d(X, mx.zeros((8, 4)), mx.zeros((8,)), mx.zeros((2, 4, 8)))
    with pytest.raises(ValueError, match=re.escape("[causal_conv1d] expected bias (8,)")):
        causal_conv1d(X, mx.zeros((8, 4)), mx.zeros((4,)), mx.zeros((2, 3, 8)))


def test_gradients_stay_finite_where_the_gates_saturate() -> None:
    """At a = 1 the slope of the multiplier is infinite; the reference implementation clips it."""
    x = mx.random.normal((1, 5, 4), key=mx.random.key(0))
    for gate in (-200.0, 0.0, 200.0):

        def loss(param: mx.array, gate: float = gate) -> mx.array:
            y, _ = rg_lru(x, x, mx.full(x.shape, gate), param)
            return y.sum()

        for start in (-200.0, 0.0, 50.0):
            gradient = mx.grad(loss)(mx.full((4,), start))
            assert mx.isfinite(gradient).all().item(), (gate, start)
